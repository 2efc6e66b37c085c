"""The section `network`: its options, and what the network's name decides where they are left open."""

import math
from dataclasses import dataclass, replace
from typing import Literal

from pix2rep.typed import ConfigError, shown

Axes = tuple[tuple[int, ...], ...]  # one number, or one an axis, for each level

LEAST = 4  # voxels that halving leaves along an axis


@dataclass
class NetworkConfig:
    name: str = "basicunet"  # or another of NETWORKS, all MONAI's; or "package.module:factory" returning a Module with `out_channels`
    dims: int = 2
    channels: tuple[int, ...] | None = None  # encoder, a level each, finest first; null: the network's own
    features: int | None = None  # channels of the decoder's last, full-resolution map; null: the network's own
    feature_levels: int = 1  # of the decoder, 1 to 4, that head, probe and segmenter read: the last map and the n - 1 coarser ones, resized
    norm: Literal["batch", "instance", "group"] = "batch"
    strides: Axes | None = None  # from each level to the next, a number or one an axis; null: from data.size and data.spacing, or fixed
    kernels: Axes | None = None  # of dynunet's levels, likewise
    head_hidden: int = 256  # projection head: 1x1 conv, BN, ReLU, 1x1 conv
    head_depth: int = 1  # hidden layers
    projection: int = 256  # D


@dataclass(frozen=True)
class Known:
    """What a network by name takes."""

    channels: tuple[int, ...]  # by default
    features: int | None = None  # by default; None: always the first of `channels`
    options: frozenset[str] = frozenset()  # of strides, kernels, norm
    levels: tuple[int, int] = (2, 99)
    widths: tuple[int, ...] | None = None  # channels as multiples of the first one; None: any


NETWORKS = {
    "basicunet": Known((32, 32, 64, 128, 256), 32, frozenset({"norm"}), (5, 5)),
    "unet": Known((32, 64, 128, 256, 320), 32, frozenset({"norm", "strides"})),
    "dynunet": Known((32, 64, 128, 256, 320), None, frozenset({"norm", "strides", "kernels"}), (3, 99)),
    "attentionunet": Known((32, 64, 128, 256, 320), None, frozenset({"strides"})),
    "segresnet": Known((32, 64, 128, 256), None, frozenset({"norm"}), (2, 5), (1, 2, 4, 8, 16)),
    "swinunetr": Known((24, 24, 48, 96, 192, 384), None, frozenset({"norm"}), (6, 6), (1, 1, 2, 4, 8, 16)),
}
COUNTS = {5: "five", 6: "six"}


def completed(config: NetworkConfig, size: tuple[int, ...] | None = None, spacing: tuple[float, ...] | None = None) -> NetworkConfig:
    """`config` with nothing left open that its name decides; strides and kernels only where `size` (data.size) is given, else as they are.

    spacing: data.spacing, mm; its last entries are those of `size`; None: 2D pixels are square, 3D strides must be given. Complete options
    stay as they are, whatever size and spacing. Raises ConfigError for options that the named network has not.
    """
    known = NETWORKS.get(config.name)
    if known is None:
        default = NETWORKS["basicunet"]
        return replace(config, channels=config.channels or default.channels, features=config.features or default.features)
    config = replace(config, channels=config.channels or known.channels)
    config = replace(config, features=config.features or known.features or config.channels[0])
    _check(config, known)
    if "strides" not in known.options:
        return config
    levels = len(config.channels)
    strides = _axes(config, "strides", levels - 1)
    kernels = _axes(config, "kernels", levels)
    if size is not None:
        voxel = _voxel(config, spacing)
        strides = strides or _strides(config, tuple(size), voxel)
        if "kernels" in known.options:
            kernels = kernels or _kernels(voxel or (1.0,) * config.dims, strides)
    return replace(config, strides=strides, kernels=kernels)


def _check(config: NetworkConfig, known: Known) -> None:
    channels, (fewest, most) = config.channels, known.levels
    levels = f"{COUNTS.get(most, most)} levels" if fewest == most else f"{fewest} {'or more' if most == 99 else f'to {most}'} levels"
    widths = None if known.widths is None else tuple(factor * channels[0] for factor in known.widths[: len(channels)])
    own = {key: getattr(config, key) for key in ("strides", "kernels") if key not in known.options}
    for holds, key, expected in (
        (fewest <= len(channels) <= most, "channels", levels),
        (widths is None or channels == widths, "channels", f"{channels[0]} times {', '.join(map(str, known.widths or ()))}"),
        (config.name != "swinunetr" or channels[0] % 12 == 0, "channels", "multiples of 12"),
        (known.features is not None or config.features == channels[0], "features", f"null or the first of network.channels, {channels[0]},"),
        (config.feature_levels < len(channels), "feature_levels", f"under the number of levels, {len(channels)},"),
        ("norm" in known.options or config.norm == "batch", "norm", "batch"),
        *((value is None, key, "null") for key, value in own.items()),
    ):
        if not holds:
            raise ConfigError(f"network.{key} must be {expected} for {config.name}, got {shown(getattr(config, key))}")


def _axes(config: NetworkConfig, key: str, count: int) -> Axes | None:
    """The option with one number for every axis. Raises ConfigError."""
    given, dims = getattr(config, key), config.dims
    if given is None:
        return None
    full = tuple(entry * dims if len(entry) == 1 else entry for entry in given)
    fits = len(full) == count and all(len(entry) == dims and min(entry) >= 1 for entry in full)
    if not fits or (key == "kernels" and not all(k % 2 for entry in full for k in entry)):
        what = f"{count} entries, each {'an odd' if key == 'kernels' else 'a'} number of at least 1 or {dims} of them, in a list"
        raise ConfigError(f"network.{key} must be {what}, for network.channels of {len(config.channels)} levels, got {shown(given)}")
    return full


def _voxel(config: NetworkConfig, spacing: tuple[float, ...] | None) -> tuple[float, ...] | None:
    """mm along each axis of the network's input, None where nobody said."""
    if spacing is None and config.dims == 2:
        return 1.0, 1.0
    return tuple(spacing[-config.dims :]) if spacing is not None and len(spacing) >= config.dims else None


def _strides(config: NetworkConfig, size: tuple[int, ...], spacing: tuple[float, ...] | None) -> Axes:
    """As in nnU-Net, an axis is halved where LEAST voxels are left and its own are less than twice as coarse as the finest of such axes."""
    if spacing is None:
        raise ConfigError(f"data.spacing must be {config.dims} numbers for network.name={config.name}: network.strides follow from it, or must be given")
    found = []
    for level in range(1, len(config.channels)):
        finest = min((s for n, s in zip(size, spacing, strict=True) if n >= 2 * LEAST), default=0.0)
        step = tuple(2 if n >= 2 * LEAST and s < 2 * finest else 1 for n, s in zip(size, spacing, strict=True))
        if math.prod(step) == 1:
            most = f"at most {level} levels for {config.name} at data.size {shown(size)}, data.spacing {shown(spacing)}"
            raise ConfigError(f"network.channels must be {most}: nothing is left to halve (or give network.strides), got {shown(config.channels)}")
        found.append(step)
        size = tuple(math.ceil(n / k) for n, k in zip(size, step, strict=True))
        spacing = tuple(s * k for s, k in zip(spacing, step, strict=True))
    return tuple(found)


def _kernels(spacing: tuple[float, ...], strides: Axes) -> Axes:
    """As in nnU-Net, 1 along an axis until its voxels are less than twice as coarse as the finest, or it is halved; then 3."""
    kernel, found = (1,) * len(spacing), []
    for step in ((1,) * len(spacing), *strides):
        spacing = tuple(s * k for s, k in zip(spacing, step, strict=True))
        kernel = tuple(3 if k == 3 or n > 1 or s < 2 * min(spacing) else 1 for k, n, s in zip(kernel, step, spacing, strict=True))
        found.append(kernel)
    return tuple(found)
