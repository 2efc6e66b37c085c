"""Backbone, projection head, segmenter, moving averages. A backbone maps [B, 1, *S] to full-resolution features [B, features, *S]."""

import importlib
import math

import torch
import torch.nn.functional as F
from monai.networks.nets import BasicUNet
from torch import Tensor, nn

from pix2rep.config import NetworkConfig

CONV = {2: nn.Conv2d, 3: nn.Conv3d}
BATCH_NORM = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


class UNet(BasicUNet):
    """MONAI's BasicUNet without its last 1x1 convolution: [B, 1, *S] -> [B, out_channels, *S], any S.

    `feature_levels` 1: the decoder's last map, of `features` channels; n: with the n - 1 coarser ones beside it, resized linearly (a hypercolumn).

    Every other weight keeps MONAI's name, so `BasicUNet.load_state_dict(weights, strict=False)` takes them and misses `final_conv` alone.
    """

    STRIDE = 16  # four poolings
    SMALLEST = 32  # 2 x 2 at the bottom: norms cannot train on a single value

    def __init__(self, config: NetworkConfig):
        if len(config.channels) != 5:
            raise ValueError(f"network.channels must be five levels for basicunet, got {list(config.channels)}")
        norm = {
            "batch": "batch",
            "instance": ("instance", {"affine": True}),
            "group": ("group", {"num_groups": math.gcd(8, *config.channels, config.features)}),
        }[config.norm]
        super().__init__(config.dims, in_channels=1, out_channels=1, features=(*config.channels, config.features), norm=norm)
        self.final_conv = nn.Identity()
        for up in (self.upcat_4, self.upcat_3, self.upcat_2, self.upcat_1):
            up.is_pad = False  # `forward` pads; MONAI's padding by 0 costs a copy, and torch.compile 2.13 fails on it in channels-last
        self.levels = config.feature_levels
        self.encoder_channels = tuple(config.channels)
        self.out_channels = sum((config.features, *config.channels[1:4])[: self.levels])

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x), tuple(x.shape[2:]))

    def encode(self, x: Tensor) -> list[Tensor]:
        """Five maps, channels `encoder_channels`, coarsest (the bottleneck, stride 16) last; of x padded to sizes that can be halved four times."""
        missing = [p - n for p, n in zip(self.padded(x.shape[2:]), x.shape[2:], strict=True)]
        if any(missing):
            pad = [p for m in reversed(missing) for p in (m // 2, m - m // 2)]
            x = F.pad(x, pad, mode="replicate")
        maps = [self.conv_0(x)]
        for down in (self.down_1, self.down_2, self.down_3, self.down_4):
            maps.append(down(maps[-1]))
        return maps

    def padded(self, size: tuple[int, ...]) -> tuple[int, ...]:
        """Sides that the maps of `encode` cover: an input of `size` is padded to them at both ends, where that is odd once more behind."""
        return tuple(max(self.SMALLEST, math.ceil(n / self.STRIDE) * self.STRIDE) for n in size)

    def decode(self, maps: list[Tensor], size: tuple[int, ...]) -> Tensor:
        """Features [B, out_channels, *size] from the maps that `encode` made of an input of this size."""
        *skips, deepest = maps
        made = [deepest]
        for up in (self.upcat_4, self.upcat_3, self.upcat_2, self.upcat_1):
            made.append(up(made[-1], skips.pop()))
        features, *coarser = made[: -1 - self.levels : -1]
        if coarser:
            mode = "bilinear" if len(size) == 2 else "trilinear"
            features = torch.cat([features, *(F.interpolate(m, features.shape[2:], mode=mode) for m in coarser)], 1)
        if features.shape[2:] == torch.Size(size):
            return features
        return features[(..., *(slice((m - n) // 2, (m - n) // 2 + n) for m, n in zip(features.shape[2:], size, strict=True)))]


def build_backbone(config: NetworkConfig) -> nn.Module:
    """The network named by `config.name`: "basicunet", or "package.module:factory", called with the NetworkConfig.

    Returns a Module with `out_channels`. Raises ValueError for an unknown name or a factory whose module has no such number.
    """
    if config.name == "basicunet":
        return UNet(config)
    module, colon, factory = config.name.partition(":")
    if not colon:
        raise ValueError(f'network.name must be "basicunet" or "package.module:factory", got {config.name!r}')
    try:
        backbone = getattr(importlib.import_module(module), factory)(config)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"network.name must name something importable, got {config.name!r}: {error}") from error
    if not isinstance(getattr(backbone, "out_channels", None), int):
        raise ValueError(f"network.name must make a Module with an integer out_channels, {config.name!r} made {type(backbone).__name__}")
    return backbone


def projection_head(config: NetworkConfig, in_channels: int | None = None) -> nn.Sequential:
    """`head_depth` times (1x1 conv, batch norm, ReLU), then a 1x1 conv: [B, in_channels, *S] -> [B, projection, *S].

    Thrown away after pre-training. `in_channels`: default config.features.
    """
    conv, norm = CONV[config.dims], BATCH_NORM[config.dims]
    width = config.features if in_channels is None else in_channels
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
