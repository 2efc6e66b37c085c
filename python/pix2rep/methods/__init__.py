"""One file a paper: which views, which heads, one step."""

from importlib import import_module
from typing import TYPE_CHECKING

from pix2rep.config import Config

if TYPE_CHECKING:
    from torch import nn

    from pix2rep.methods.base import Method

METHODS = {
    "pix2rep": "Pix2Rep",
    "pgl": "PGL",
}


def method_class(name: str) -> "type[Method]":
    """The method named by loss.method. Raises ValueError for an unknown one."""
    if name not in METHODS:
        raise ValueError(f"loss.method must be one of {', '.join(METHODS)}, got {name!r}")
    return getattr(import_module(f"pix2rep.methods.{name}"), METHODS[name])


def build_method(config: Config, backbone: "nn.Module") -> "Method":
    """The method named by loss.method with fresh heads for the backbone. Raises ValueError for an unknown one, or options that it refuses."""
    return method_class(config.loss.method)(config, backbone)
