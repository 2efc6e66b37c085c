"""Files that are whole or absent: atomic writes, checkpoints to resume from, the published weights.

    RUN/checkpoints/step_0000500.pt, last.pt    everything that resuming needs; `torch.load(weights_only=True)` reads it
    RUN/weights.safetensors                     the backbone; metadata: config (JSON), steps, versions
"""

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pix2rep import config as config_file

if TYPE_CHECKING:  # torch is imported where it is used: config.save comes through here
    import torch

FORMAT = 1


@contextlib.contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` (same suffixes) to write to; it replaces `path` when the block ends.

    A block that raises leaves `path` as it was. The folder is made where it is missing; the bytes are on the disk before the name is.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{uuid.uuid4().hex[:8]}-{path.name}")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save(run: str | Path, state: dict[str, Any], keep: int) -> Path:
    """Write `state` (`state["step"]` names the file), point last.pt at it, delete all but the newest `keep`."""
    import torch

    folder = Path(run) / "checkpoints"
    path = folder / f"step_{state['step']:07d}.pt"
    with atomic(path) as temporary:
        torch.save({"format": FORMAT, **state}, temporary)
    with atomic(folder / "last.pt") as temporary:
        try:
            os.link(path, temporary)
        except OSError:  # a file system without hard links
            shutil.copyfile(path, temporary)
    for older in sorted(folder.glob("step_*.pt"))[:-keep]:
        older.unlink(missing_ok=True)
    return path


def last(run: str | Path) -> Path | None:
    """The newest checkpoint of a run, None before its first one."""
    path = Path(run) / "checkpoints" / "last.pt"
    return path if path.is_file() else None


def load(path: str | Path, device: "str | torch.device" = "cpu") -> dict[str, Any]:
    """What `save` wrote. Raises ValueError when the file is damaged or of another format."""
    import torch

    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # zip, pickle and OS errors alike mean that this file cannot be resumed from
        raise ValueError(f"checkpoint must be a file written by pix2rep pretrain, cannot read {path}: {error}") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        found = state.get("format") if isinstance(state, dict) else type(state).__name__
        raise ValueError(f"checkpoint must have format {FORMAT}, got {found} in {path}")
    return state


def save_backbone(run: str | Path, backbone: "torch.nn.Module", config: config_file.Config, steps: int) -> Path:
    """Write RUN/weights.safetensors with the config, the steps taken and the versions inside."""
    import torch
    from safetensors.torch import save_file

    path = Path(run) / "weights.safetensors"
    weights = {name: value.detach().cpu().contiguous() for name, value in backbone.state_dict().items()}
    metadata = {"format": "pt", "config": json.dumps(config_file.to_dict(config)), "steps": str(steps), "torch": torch.__version__}
    with atomic(path) as temporary:
        save_file(weights, temporary, metadata)
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
    network = config_file.to_dict(config)["network"]
    if network != trained:
        raise ValueError(f"network in {run / 'config.yaml'} must be that of the weights, {trained}, got {network}")
    backbone = build_backbone(config.network).to(device)
    backbone.load_state_dict(weights)
    return backbone.eval(), config
