"""Backbone by name, projection head, segmenter, moving averages. A backbone maps [B, 1, *S] to full-resolution features [B, out_channels, *S]."""

import importlib

import torch
from torch import Tensor, nn

from pix2rep.backbones import BACKBONES
from pix2rep.config import NetworkConfig
from pix2rep.network_config import completed

CONV = {2: nn.Conv2d, 3: nn.Conv3d}
BATCH_NORM = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def build_backbone(config: NetworkConfig) -> nn.Module:
    """The network named by `config.name`: one of `network_config.NETWORKS`, or "package.module:factory", called with the NetworkConfig.

    Returns a Module with `out_channels`. Raises ValueError for an unknown name, options that the named network has not, strides that are left
    open (`config.completed` derives them), or a factory whose module has no such number.
    """
    config = completed(config)
    if config.name in BACKBONES:
        return BACKBONES[config.name](config)
    module, colon, factory = config.name.partition(":")
    if not colon:
        raise ValueError(f'network.name must be one of {", ".join(BACKBONES)}, or "package.module:factory", got {config.name!r}')
    try:
        backbone = getattr(importlib.import_module(module), factory)(config)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"network.name must name something importable, got {config.name!r}: {error}") from error
    if not isinstance(getattr(backbone, "out_channels", None), int):
        raise ValueError(f"network.name must make a Module with an integer out_channels, {config.name!r} made {type(backbone).__name__}")
    return backbone


def projection_head(config: NetworkConfig, in_channels: int) -> nn.Sequential:
    """`head_depth` times (1x1 conv, batch norm, ReLU), then a 1x1 conv: [B, in_channels, *S] -> [B, projection, *S].

    Thrown away after pre-training.
    """
    conv, norm, width = CONV[config.dims], BATCH_NORM[config.dims], in_channels
    layers: list[nn.Module] = []
    for _ in range(config.head_depth):
        layers += [conv(width, config.head_hidden, 1), norm(config.head_hidden), nn.ReLU(inplace=True)]
        width = config.head_hidden
    return nn.Sequential(*layers, conv(width, config.projection, 1))


class Segmenter(nn.Module):
    """Backbone and a linear layer a pixel (`head`, a 1x1 conv): [B, 1, *S] -> logits [B, classes, *S], background included in `classes`."""

    def __init__(self, backbone: nn.Module, classes: int, dims: int = 2):
        super().__init__()
        if classes < 2:
            raise ValueError(f"classes must be at least 2 (background is one), got {classes}")
        self.backbone = backbone
        self.head = CONV[dims](backbone.out_channels, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))


@torch.no_grad()
def move_towards(target: nn.Module, online: nn.Module, momentum: float) -> None:
    """Parameters of `target` become momentum * target + (1 - momentum) * online. Buffers stay: running statistics are the target's own."""
    for mine, theirs in zip(target.parameters(), online.parameters(), strict=True):
        mine.lerp_(theirs, 1 - momentum)


def channels_last(dims: int) -> torch.memory_format:
    """The layout in which convolutions and the losses read a pixel's features as one row."""
    return torch.channels_last if dims == 2 else torch.channels_last_3d
