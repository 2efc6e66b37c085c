"""What decides a pre-training's weights and a cell's scores, and the files that remember it.

    OUT/METHOD/seedK/pretrained.json          inputs of the pre-training, steps, seconds; written when it has ended
    OUT/METHOD/seedK/started.json             the same inputs, while it runs
    OUT/METHOD/seedK/<task>_n<N>.json         inputs of a cell, its choice, rows, seconds; or why it failed

A result counts as finished while its recorded inputs equal those of the plan.
"""

import hashlib
import json
import math
from pathlib import Path
from typing import Any

from pix2rep import config as config_file
from pix2rep.checkpoint import atomic
from pix2rep.config import Config
from pix2rep.pretrain import FREE

PLACES = ("data.root", "data.cache", "split.")
# Of the downstream options, those that train no kind of model, and those of other kinds alone.
REPORTING = ("downstream.labelled", "downstream.seeds", "downstream.overlays", "downstream.bootstrap")
OF_THE_OTHER = {
    "probe": ("downstream.finetune_", "downstream.teacher_", "downstream.augment", "spatial.", "photometric."),
    "finetune": ("downstream.probe_", "downstream.class_weights", "downstream.teacher_"),
    "mean_teacher": ("downstream.probe_", "downstream.class_weights"),
}


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def digest_of_volumes(cases, patients: list[str], labels: bool) -> str:
    """Of the prepared images (and labels) of some patients: the same volumes elsewhere, or prepared again, have the same."""
    wanted = set(patients)
    files = [(case.id, case.image_file, case.label_file if labels else None) for case in cases if case.patient in wanted]
    return digest([[name, *(file and hashlib.sha256(file.read_bytes()).hexdigest() for file in pair)] for name, *pair in files])


def digest_of_weights(file: Path) -> str:
    """Of the tensors in a safetensors file, not of its metadata."""
    from safetensors.torch import load_file

    whole = hashlib.sha256()
    for name, tensor in sorted(load_file(file).items()):
        whole.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        whole.update(tensor.numpy().tobytes())
    return whole.hexdigest()[:16]


def inputs_of_pretraining(config: Config, images: str, patients: list[str]) -> dict[str, Any]:
    """`images`: the digest of the volumes of `patients`, the split's pretrain part."""
    found = {key: value for key, value in _flat(config).items() if key not in FREE - {"pretrain.steps"}}
    kept = {key: value for key, value in found.items() if not key.startswith(("downstream.", *PLACES)) and key != "data.classes"}
    return kept | {"images": images, "patients": patients}


def inputs_of_cell(config: Config, task: str, patients: list[str], weights: str, volumes: str, split: dict, classes) -> dict[str, Any]:
    """`weights`: digest of the pre-trained ones, or "random"; `volumes`: digest of those of the whole split, with labels."""
    parts = ("data.", "network.", "photometric.", "spatial.flip", "downstream.")
    left_out = (*PLACES, *REPORTING, *OF_THE_OTHER[task])
    kept = {key: value for key, value in _flat(config).items() if key.startswith(parts) and not key.startswith(left_out)}
    own = {"task": task, "seed": config.pretrain.seed, "patients": sorted(patients), "weights": weights}
    return kept | own | {"volumes": volumes, "split": digest(split), "classes": list(classes)}


def _flat(config: Config) -> dict[str, Any]:
    return plain(config_file.flatten(config))


def changed(record: dict, inputs: dict) -> list[str]:
    """Names of the inputs that are not those of a record; a failed one's never are."""
    before = record.get("inputs", {})
    return sorted(key for key in {*before, *inputs} if before.get(key) != inputs.get(key)) + (["failed"] if "failed" in record else [])


def read(file: Path) -> dict | None:
    """A record, None where there is none. NaN comes back as NaN."""
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def write(file: Path, record: dict) -> None:
    with atomic(file) as temporary:
        temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def plain(value: Any) -> Any:
    """As JSON has it: keys are text, NaN and infinities null."""
    if isinstance(value, dict):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
