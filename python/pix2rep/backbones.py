"""MONAI's segmentation networks without their last layer: [B, 1, *S] -> full-resolution features [B, out_channels, *S], any S.

Every other weight keeps MONAI's name, so that `load_state_dict(weights, strict=False)` moves weights either way.
"""

import math
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from monai.networks import nets
from torch import Tensor, nn

from pix2rep.config import ConfigError, NetworkConfig


class FullResolution:
    """Padding, cropping and reading of several levels, the same for each network; a subclass says how its maps are made.

    Attributes, set by `_describe`: `encoder_channels`, of the maps of `encode`; `out_channels`, of the features; `stride`, input voxels a
    voxel of the coarsest map, for each axis.
    """

    least = 1  # voxels of the coarsest map along each axis

    def _describe(self, config: NetworkConfig, encoder: tuple[int, ...], decoder: tuple[int, ...], strides: tuple[tuple[int, ...], ...]) -> None:
        """Channels of the maps of `_down` and of `_up`."""
        self.levels = config.feature_levels
        self.encoder_channels = tuple(encoder)
        self.out_channels = sum(decoder[: self.levels])
        self.stride = tuple(math.prod(axis) for axis in zip(*strides, strict=True))

    def _down(self, x: Tensor) -> list[Tensor]:
        """The encoder's maps, coarsest last."""
        raise NotImplementedError

    def _up(self, maps: list[Tensor]) -> list[Tensor]:
        """The decoder's maps, full resolution last."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x), tuple(x.shape[2:]))

    def encode(self, x: Tensor) -> list[Tensor]:
        """Maps of x padded to `padded`, channels `encoder_channels`, coarsest (the bottleneck) last."""
        missing = [p - n for p, n in zip(self.padded(x.shape[2:]), x.shape[2:], strict=True)]
        if any(missing):
            pad = [p for m in reversed(missing) for p in (m // 2, m - m // 2)]
            x = F.pad(x, pad, mode="replicate")
        return self._down(x)

    def padded(self, size: tuple[int, ...]) -> tuple[int, ...]:
        """Sides that the maps of `encode` cover: an input of `size` is padded to them at both ends, where that is odd once more behind."""
        coarsest = [max(self.least, math.ceil(n / s)) for n, s in zip(size, self.stride, strict=True)]
        if math.prod(coarsest) == 1:
            coarsest[-1] = 2  # norms cannot train on a single value
        return tuple(n * s for n, s in zip(coarsest, self.stride, strict=True))

    def decode(self, maps: list[Tensor], size: tuple[int, ...]) -> Tensor:
        """Features [B, out_channels, *size] from the maps that `encode` made of an input of this size."""
        features, *coarser = self._up(maps)[: -1 - self.levels : -1]
        if coarser:
            mode = "bilinear" if len(size) == 2 else "trilinear"
            features = torch.cat([features, *(F.interpolate(m, features.shape[2:], mode=mode) for m in coarser)], 1)
        if features.shape[2:] == torch.Size(size):
            return features
        return features[(..., *(slice((m - n) // 2, (m - n) // 2 + n) for m, n in zip(features.shape[2:], size, strict=True)))]


class BasicUNet(FullResolution, nets.BasicUNet):
    """Misses `final_conv`."""

    least = 2

    def __init__(self, config: NetworkConfig):
        super().__init__(config.dims, in_channels=1, out_channels=1, features=(*config.channels, config.features), norm=_norm(config))
        self.final_conv = nn.Identity()
        for up in (self.upcat_4, self.upcat_3, self.upcat_2, self.upcat_1):
            up.is_pad = False  # `encode` pads; MONAI's padding by 0 costs a copy, and torch.compile 2.13 fails on it in channels-last
        self._describe(config, config.channels, (config.features, *config.channels[1:4]), _halvings(config))

    def _down(self, x):
        maps = [self.conv_0(x)]
        for down in (self.down_1, self.down_2, self.down_3, self.down_4):
            maps.append(down(maps[-1]))
        return maps

    def _up(self, maps):
        *skips, deepest = maps
        made = [deepest]
        for up in (self.upcat_4, self.upcat_3, self.upcat_2, self.upcat_1):
            made.append(up(made[-1], skips.pop()))
        return made


class UNet(FullResolution, nets.UNet):
    """Misses nothing: MONAI's last block goes from half resolution to the classes, here to `features` channels."""

    def __init__(self, config: NetworkConfig):
        strides = _strides(config)
        super().__init__(config.dims, 1, config.features, config.channels, strides, num_res_units=2, norm=_norm(config))
        self._describe(config, config.channels, (config.features, *config.channels[:-2]), strides)

    def _down(self, x):
        maps, level = [], self.model
        while isinstance(level, nn.Sequential):  # down, what is below, up
            maps.append(x := level[0](x))
            level = level[1].submodule
        return [*maps, level(x)]

    def _up(self, maps):
        *skips, x = maps
        ups, level = [], self.model
        while isinstance(level, nn.Sequential):
            ups.append(level[2])
            level = level[1].submodule
        made = []
        for up, skip in zip(reversed(ups), reversed(skips), strict=True):
            made.append(x := up(torch.cat([skip, x], 1)))
        return made


class DynUNet(FullResolution, nets.DynUNet):
    """Misses `output_block`, and `skip_layers`, MONAI's second name for each of the other weights."""

    def __init__(self, config: NetworkConfig):
        strides = _strides(config)
        kernels = config.kernels or ((3,) * config.dims,) * len(config.channels)
        first = (1,) * config.dims
        super().__init__(config.dims, 1, 1, kernels, (first, *strides), strides, filters=config.channels, norm_name=_norm(config))
        self.output_block = nn.Identity()
        del self.skip_layers  # safetensors takes no tensor under two names
        self._describe(config, config.channels, config.channels[:-1], strides)

    def _down(self, x):
        maps = [self.input_block(x)]
        for down in (*self.downsamples, self.bottleneck):
            maps.append(down(maps[-1]))
        return maps

    def _up(self, maps):
        *skips, x = maps
        made = []
        for up, skip in zip(self.upsamples, reversed(skips), strict=True):
            made.append(x := up(x, skip))
        return made


class AttentionUNet(FullResolution, nets.AttentionUnet):
    """Misses `model.2`."""

    def __init__(self, config: NetworkConfig):
        strides = _strides(config)
        super().__init__(config.dims, 1, 1, config.channels, strides)
        self.model[2] = nn.Identity()
        self._describe(config, config.channels, config.channels[:-1], strides)

    def _levels(self) -> list[tuple[nn.Module, nn.Module]]:
        """Each level's attention layer, and the convolutions that lead below it."""
        found, layer = [], self.model[1]
        while layer is not None:
            below, inner = layer.submodule if isinstance(layer.submodule, nn.Sequential) else (layer.submodule, None)
            found.append((layer, below))
            layer = inner
        return found

    def _down(self, x):
        maps = [self.model[0](x)]
        for _, below in self._levels():
            maps.append(below(maps[-1]))
        return maps

    def _up(self, maps):
        *skips, x = maps
        made = []
        for (layer, _), skip in zip(reversed(self._levels()), reversed(skips), strict=True):
            x = layer.upconv(x)
            made.append(x := layer.merge(torch.cat([layer.attention(g=x, x=skip), x], 1)))
        return made


class SegResNet(FullResolution, nets.SegResNet):
    """Misses `conv_final.2`. Blocks a level: MONAI's 1, 2, 2, 4, and 4 at a fifth one."""

    def __init__(self, config: NetworkConfig):
        channels = config.channels
        blocks, last = (1, 2, 2, 4, 4)[: len(channels)], (1,) * (len(channels) - 1)
        super().__init__(config.dims, channels[0], 1, 1, norm=_norm(config), blocks_down=blocks, blocks_up=last)
        self.conv_final[2] = nn.Identity()
        self._describe(config, channels, channels[:-1], _halvings(config))

    def _down(self, x):
        return nets.SegResNet.encode(self, x)[1]

    def _up(self, maps):
        *skips, x = maps
        made = []
        for enlarge, blocks, skip in zip(self.up_samples, self.up_layers, reversed(skips), strict=True):
            made.append(x := blocks(enlarge(x) + skip))
        return [*made[:-1], self.conv_final(x)]


class SwinUNETR(FullResolution, nets.SwinUNETR):
    """Misses `out`. Its encoder's maps are what the decoder takes: residual blocks on the transformer's. Raises ConfigError without einops."""

    def __init__(self, config: NetworkConfig):
        if find_spec("einops") is None:
            raise ConfigError("network.name=swinunetr needs the package einops, which is not installed: pip install einops")
        super().__init__(in_channels=1, out_channels=1, feature_size=config.channels[0], norm_name=_norm(config), spatial_dims=config.dims)
        self.out = nn.Identity()
        self._describe(config, config.channels, config.channels[:-1], _halvings(config))

    def _down(self, x):
        halved, *states = self.swinViT(x, self.normalize)
        maps = [self.encoder1(x), self.encoder2(halved), self.encoder3(states[0]), self.encoder4(states[1]), states[2]]
        return [*maps, self.encoder10(states[3])]

    def _up(self, maps):
        *skips, x = maps
        made = []
        for up, skip in zip((self.decoder5, self.decoder4, self.decoder3, self.decoder2, self.decoder1), reversed(skips), strict=True):
            made.append(x := up(x, skip))
        return made


BACKBONES = {
    "basicunet": BasicUNet, "unet": UNet, "dynunet": DynUNet, "attentionunet": AttentionUNet, "segresnet": SegResNet, "swinunetr": SwinUNETR,
}  # fmt: skip


def _norm(config: NetworkConfig) -> str | tuple[str, dict]:
    return {
        "batch": "batch",
        "instance": ("instance", {"affine": True}),
        "group": ("group", {"num_groups": math.gcd(8, *config.channels, config.features)}),
    }[config.norm]


def _halvings(config: NetworkConfig) -> tuple[tuple[int, ...], ...]:
    return ((2,) * config.dims,) * (len(config.channels) - 1)


def _strides(config: NetworkConfig) -> tuple[tuple[int, ...], ...]:
    if config.strides is None:
        raise ConfigError(f"network.strides must be given to make {config.name}: pix2rep.config.completed derives them from a whole config, got None")
    return config.strides
