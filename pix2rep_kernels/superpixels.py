"""Superpixels and supervoxels by Felzenszwalb's and Huttenlocher's graph segmentation, compiled (csrc/cpu/felzenszwalb.cpp)."""

from collections.abc import Sequence
from math import isfinite

import torch
from torch import Tensor

from pix2rep_kernels import native
from pix2rep_kernels.check import expect, expect_float

MOST = 2**32 // 13  # voxels: edges are numbered in 32 bits


def felzenszwalb(
    image: Tensor, *, scale: float = 1.0, sigma: float = 0.8, min_size: int = 20, spacing: Sequence[float] | None = None
) -> Tensor:
    """Segments of a plane or a volume along its edges: Efficient Graph-Based Image Segmentation (IJCV 2004), with 8 or 26 neighbours.

    A plane is cut as `skimage.segmentation.felzenszwalb(image, channel_axis=None)` cuts it; scikit-image takes no volumes. Edges of equal cost are taken
    in the order of their first voxel, then of their second, so an image has one segmentation (scikit-image's depends on an unstable sort there).

    The work is one thread's, in float64; other threads may run meanwhile. Memory: about 100 bytes a voxel, 60 a pixel. A volume of 128^3 takes seconds.

    Args:
        image: [H, W] or [D, H, W], float16, bfloat16, float32 or float64, finite, at most 330382099 voxels, on the CPU; any strides. `scale` is meant for
            intensities of [0, 1].
        scale: >= 0; larger makes larger segments. Divided by 255, as in the published program.
        sigma: deviation of the Gaussian blur before, >= 0, in voxels (of the finest axis, with `spacing`); 0: none.
        min_size: segments of fewer voxels are merged with a neighbour, >= 0.
        spacing: voxel size along each axis of `image`, > 0, in any unit: the blur is as wide in that unit along every axis. None: equal.

    Returns:
        int32 of the image's shape: segments numbered from 0 in the order of their first voxels. Each is connected.

    Raises:
        TypeError, ValueError: an argument is off; the message names argument, expectation and value. RuntimeError: nothing is compiled.
    """
    expect_float(image, "image")
    expect(image.device.type == "cpu", "image", "be on the CPU", image.device)
    expect(image.dim() in (2, 3), "image", "have shape [H, W] or [D, H, W]", tuple(image.shape))
    expect(image.numel() <= MOST, "image", f"have at most {MOST} voxels", image.numel())
    _expect_number(scale, "scale")
    _expect_number(sigma, "sigma")
    expect(isinstance(min_size, int) and min_size >= 0, "min_size", "be a whole number >= 0", min_size)
    deviations = [float(sigma)] * image.dim()
    if spacing is not None:
        sizes = [float(size) for size in spacing]
        good = len(sizes) == image.dim() and all(isfinite(size) and size > 0 for size in sizes)
        expect(good, "spacing", f"be {image.dim()} finite numbers > 0", tuple(spacing))
        deviations = [sigma * min(sizes) / size for size in sizes]
    finite = image.isfinite()
    if not finite.all():
        expect(False, "image", "be finite", f"{int((~finite).sum())} of {image.numel()} values that are not")
    if reason := native.why_missing("cpu"):
        raise RuntimeError(f"felzenszwalb needs the compiled CPU kernels: {reason}")
    if not hasattr(torch.ops.pix2rep_native, "felzenszwalb"):
        raise RuntimeError("felzenszwalb needs newer CPU kernels: _C was built before it existed (rebuild: pip install --no-build-isolation .)")
    return torch.ops.pix2rep_native.felzenszwalb(image.detach().double(), float(scale) / 255, deviations, min_size)


def _expect_number(value: object, argument: str) -> None:
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and isfinite(value) and value >= 0
    expect(good, argument, "be a finite number >= 0", value)
