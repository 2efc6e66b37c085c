"""Checkpoints to resume from, the published weights; every file whole or absent.

    RUN/checkpoints/step_0000500.pt, last.pt    everything that resuming needs; `torch.load(weights_only=True)` reads it
    RUN/weights.safetensors                     the backbone; metadata: config (JSON), steps, versions
"""

import json
import logging
import os
import shutil
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pix2rep import config as config_file
from pix2rep.disk import atomic

if TYPE_CHECKING:  # torch is imported where it is used: config.save comes through here
    import torch

FORMAT = 2  # 1 had Pix2Rep's "head" in place of "method"

log = logging.getLogger(__name__)


class OtherFormat(ValueError):
    """A checkpoint that another version of this package wrote."""


def save(run: str | Path, state: dict[str, Any], keep: int) -> Path:
    """Write `state` (`state["step"]` names the file), point last.pt at it, then delete all but the newest `keep` up to that step.

    Raises `disk.DiskFull` where there is no space; every earlier checkpoint is then still there.
    """
    import torch

    folder = Path(run) / "checkpoints"
    path = folder / f"step_{state['step']:07d}.pt"
    with atomic(path) as temporary, open(temporary, "wb") as file:  # given a path, PyTorch's writer would not say why it failed
        torch.save({"format": FORMAT, **state}, file)
    with atomic(folder / "last.pt") as temporary:
        temporary.unlink()
        try:
            os.link(path, temporary)
        except OSError:  # a file system without hard links
            shutil.copyfile(path, temporary)
    before = [older for older in numbered(run) if _number(older) <= state["step"]]  # a later one is of a run that was set back
    for older in before[keep:]:
        older.unlink(missing_ok=True)
    return path


def numbered(run: str | Path) -> list[Path]:
    """step_*.pt of a run, newest first."""
    return sorted((path for path in (Path(run) / "checkpoints").glob("step_*.pt") if _number(path) >= 0), key=_number, reverse=True)


def _number(path: Path) -> int:
    digits = path.stem.removeprefix("step_")
    return int(digits) if digits.isdecimal() else -1


def last(run: str | Path) -> Path | None:
    """The checkpoint that a run goes on from: last.pt, else the newest step_*.pt; None before the first one."""
    path = Path(run) / "checkpoints" / "last.pt"
    return path if path.is_file() else next(iter(numbered(run)), None)


def newest(run: str | Path) -> tuple[Path, dict[str, Any]] | None:
    """Path and state of last.pt or, where it is missing or damaged, of the newest step_*.pt that loads; None before the first one.

    A damaged file is said in a warning. Raises ValueError when all are damaged, OtherFormat for one that is whole but of another version.
    """
    first = last(run)
    if first is None:
        return None
    same = [first, *(path for path in numbered(run) if path != first)]
    for path in same:
        try:
            state = load(path)
        except OtherFormat:
            raise
        except ValueError as error:
            log.warning("%s", error)
            failed = error
            continue
        if path != first:
            log.warning("taking %s (step %d) instead of %s", path, state["step"], first)
        return path, state
    raise ValueError(f"run must hold a checkpoint that loads, all {len(same)} in {first.parent} are damaged; {failed}") from failed


def load(path: str | Path, device: "str | torch.device" = "cpu") -> dict[str, Any]:
    """What `save` wrote. Raises ValueError when the file is damaged, OtherFormat when another version wrote it."""
    import torch

    try:
        with zipfile.ZipFile(path) as archive:  # torch.load takes wrong bytes as they are
            if (wrong := archive.testzip()) is not None:
                raise zipfile.BadZipFile(f"wrong checksum of {wrong}")
        state = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # zip, pickle and OS errors alike mean that this file cannot be resumed from
        raise ValueError(f"checkpoint must be a file written by pix2rep pretrain, cannot read {path}: {error}") from error
    if not isinstance(state, dict) or "format" not in state:
        raise ValueError(f"checkpoint must be a file written by pix2rep pretrain, got a {type(state).__name__} without a format in {path}")
    if state["format"] != FORMAT:
        raise OtherFormat(
            f"checkpoint must have format {FORMAT} to be resumed, got {state['format']} in {path}: another version of pix2rep wrote it"
            " (a weights.safetensors of any version can be used)"
        )
    return state


def save_tensors(path: Path, tensors: "dict[str, torch.Tensor]", metadata: dict[str, str]) -> None:
    """A safetensors file, written atomically. Raises `disk.DiskFull` where there is no space."""
    from safetensors.torch import save

    data = save({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, metadata)
    with atomic(path) as temporary:
        temporary.write_bytes(data)


def save_backbone(run: str | Path, backbone: "torch.nn.Module", config: config_file.Config, steps: int) -> Path:
    """Write RUN/weights.safetensors with the config, the steps taken and the versions inside."""
    import torch

    path = Path(run) / "weights.safetensors"
    metadata = {"format": "pt", "config": json.dumps(config_file.to_dict(config)), "steps": str(steps), "torch": torch.__version__}
    save_tensors(path, backbone.state_dict(), metadata)
    return path


def load_backbone(run: str | Path, device: "str | torch.device" = "cpu") -> "tuple[torch.nn.Module, config_file.Config]":
    """The pre-trained backbone in eval mode, and the config of its run (RUN/config.yaml).

    Raises FileNotFoundError when pre-training has not ended, ValueError when weights and config.yaml do not belong together.
    """
    from safetensors import safe_open

    from pix2rep.networks import build_backbone

    run = Path(run)
    path = run / "weights.safetensors"
    if not path.is_file():
        hint = "continue it with: pix2rep pretrain DATA RUN --resume" if last(run) else "make it with: pix2rep pretrain DATA RUN"
        raise FileNotFoundError(f"run must be the folder of a finished pre-training, found no {path}; {hint}")
    config = config_file.load(run / "config.yaml")
    with safe_open(path, framework="pt", device=str(device)) as file:
        trained = json.loads(file.metadata()["config"])["network"]
        weights = {name: file.get_tensor(name) for name in file.keys()}
    trained = config_file.to_dict(config_file.from_dict({"network": trained}))["network"]  # older weights lack newer options
    network = config_file.to_dict(config)["network"]
    if network != trained:
        raise ValueError(f"network in {run / 'config.yaml'} must be that of the weights, {trained}, got {network}")
    backbone = build_backbone(config.network).to(device)
    backbone.load_state_dict(weights)
    return backbone.eval(), config


def load_weights(backbone: "torch.nn.Module", path: str | Path, option: str) -> None:
    """Load a backbone's weights from a weights.safetensors, or from a saved downstream model, whose head is left out.

    Raises FileNotFoundError, or ValueError naming `option` for a file that is no safetensors or has not exactly the backbone's tensors.
    """
    from safetensors.torch import load_file

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{option} must be a safetensors file, found no {path}")
    try:
        found = load_file(path)
    except Exception as error:  # safetensors has an error of its own for each way in which a file is not one
        raise ValueError(f"{option} must be a safetensors file, cannot read {path}: {error}") from error
    wanted = backbone.state_dict()
    if not found.keys() & wanted.keys():
        found = {name.removeprefix("backbone."): value for name, value in found.items() if name.startswith("backbone.")}
    other = [name for name in wanted if name not in found or found[name].shape != wanted[name].shape]
    other += [name for name in found if name not in wanted]
    if other:
        raise ValueError(f"{option} must hold the weights of this network, {len(wanted)} tensors, got others in {path}: {', '.join(other[:5])}")
    backbone.load_state_dict(found)
