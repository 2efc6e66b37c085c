"""Checks that the losses share."""

from numbers import Integral

import torch
from torch import Tensor

from pix2rep_kernels.check import expect, expect_device, expect_float


def number(value: object, argument: str) -> float:
    """`value` as a float. Raises TypeError unless it is a Python number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"`{argument}` must be a float, got {value!r}")
    return float(value)


def weight(value: object, argument: str) -> float:
    """`value` as a float. Raises TypeError or ValueError unless it is a Python number >= 0 and finite."""
    expect(0 <= number(value, argument) < float("inf"), argument, "be >= 0 and finite", value)
    return float(value)


def whole(value: object, argument: str, least: int = 1) -> int:
    """`value` as an int. Raises TypeError or ValueError unless it is one, of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"`{argument}` must be an int, got {value!r}")
    expect(value >= least, argument, f"be >= {least}", value)
    return int(value)


def flag(value: object, argument: str) -> bool:
    """`value`. Raises TypeError unless it is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"`{argument}` must be a bool, got {value!r}")
    return value


def expect_map(features, argument: str, least_axes: int = 2) -> None:
    """Raise unless `features` is a floating map [B, C, *S] with `least_axes` to 3 spatial axes and something in it."""
    expect_float(features, argument)
    if not least_axes + 2 <= features.ndim <= 5:
        shapes = ("[B, C, L]", "[B, C, H, W]", "[B, C, D, H, W]")[least_axes - 1 :]
        expect(False, argument, "have shape " + " or ".join(shapes), tuple(features.shape))
    if features.numel() == 0:
        expect(False, argument, "have at least one pixel and channel", tuple(features.shape))


def expect_like(features, argument: str, like: Tensor, like_name: str, *, same_space: bool = True) -> None:
    """Raise unless `features` has the shape (the spatial axes excepted if not `same_space`), dtype and device of the map `like`."""
    expect_map(features, argument, least_axes=1)
    if same_space and features.shape != like.shape:
        expect(False, argument, f"have the shape of {like_name} {tuple(like.shape)}", tuple(features.shape))
    if features.ndim != like.ndim or features.shape[:2] != like.shape[:2]:
        expect(False, argument, f"have the batch, channels and number of axes of {like_name} {tuple(like.shape)}", tuple(features.shape))
    if features.dtype != like.dtype:
        raise TypeError(f"`{argument}` must be {like.dtype} as `{like_name}` is, got {features.dtype}")
    expect_device(features, argument, like, like_name)


def expect_finite(tensor: Tensor, argument: str) -> None:
    """Raise ValueError if `tensor` holds NaN or inf; reads a value back from the device."""
    bad = int((~tensor.isfinite()).sum())
    if bad:
        expect(False, argument, "be finite", f"{bad} NaN or inf values of {tensor.numel()}")


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """float64 for float64, else float32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
