"""One file a paper: which views, which heads, one step."""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from pix2rep.config import Config, from_dict

if TYPE_CHECKING:
    from torch import nn

    from pix2rep.methods.base import Method

METHODS = {
    "pix2rep": "Pix2Rep",
    "bim": "BIM",
    "lrc": "LRC",
    "pgl": "PGL",
    "simclr": "SimCLR",
}


def method_class(name: str) -> "type[Method]":
    """The method named by loss.method. Raises ValueError for an unknown one."""
    if name not in METHODS:
        raise ValueError(f"loss.method must be one of {', '.join(METHODS)}, got {name!r}")
    return getattr(import_module(f"pix2rep.methods.{name}"), METHODS[name])


def build_method(config: Config, backbone: "nn.Module") -> "Method":
    """The method named by loss.method with fresh heads for the backbone. Raises ValueError for an unknown one, or options that it refuses."""
    return method_class(config.loss.method)(config, backbone)


def load_method(run: str | Path) -> "tuple[Method, nn.Module]":
    """Method and backbone of a run's newest checkpoint, on the CPU, in eval mode; `method.config` is the run's.

    Raises FileNotFoundError where there is no checkpoint, ValueError for one that cannot be read.
    """
    from pix2rep import checkpoint
    from pix2rep.networks import build_backbone

    found = checkpoint.newest(run)
    if found is None:
        raise FileNotFoundError(f"run must be the folder of a pre-training with a checkpoint, found none in {run}")
    _, state = found
    config = from_dict(state["config"])
    backbone = build_backbone(config.network)
    method = build_method(config, backbone)
    backbone.load_state_dict(state["backbone"])
    method.load_state_dict(state["method"])
    return method.eval(), backbone.eval()
