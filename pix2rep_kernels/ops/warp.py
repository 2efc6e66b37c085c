"""Features at warped positions: gather all or some points of an affine or dense grid, optionally L2-normalised, in one pass.

    g(p)  = theta_b [o(p); 1]  or  grid[b, p]                                   (warp.1)
    x     = (g + 1)/2 (W - 1)  or, align_corners=False, ((g + 1) W - 1)/2       (warp.2)
    f     = sum_k w_k F[b, :, q_k]                                              (warp.3)
    row   = f / max(|f|, 1e-12)  when normalize, else f                         (warp.4)
    df    = (drow - row <row, drow>) / |f|, or drow / 1e-12 where |f| < 1e-12   (warp.5)
    dF[b, :, q_k] += w_k df                                                     (warp.6)

p runs over the output points of image b, o(p) are its normalised coordinates as in `F.affine_grid`; the last grid axis holds (x, y) or (x, y, z), x along
the last spatial axis. q_k, w_k are the taps of x: "linear" 2^d with the products of (1-t, t); "nearest" the nearest centre, halves to even; "bicubic" 4 x 4
with Keys' a = -0.75. A tap outside the map weighs 0 ("zeros") or is moved to the border ("border"). The grid gets no gradient.

Neither the grid of an affine warp nor the warped map is stored. Floor: 2^d P C values read, P C written.
"""

import math

import torch
from torch import Tensor

from pix2rep_kernels.check import expect, expect_choice, expect_device, expect_float
from pix2rep_kernels.layout import is_channels_last, new_empty
from pix2rep_kernels.register import register

MODES = ("linear", "nearest", "bicubic")
PADDING_MODES = ("zeros", "border")
EPSILON = 1e-12  # of the norm, as in F.normalize

_OPTIONS = "SymInt[] size, Tensor? points, str mode, bool align_corners, str padding_mode, bool normalize"
SCHEMA = f"warp(Tensor features, Tensor grid, {_OPTIONS}, str backend) -> (Tensor rows, Tensor inside, Tensor norms)"
BACKWARD_SCHEMA = (
    f"warp_backward(Tensor grad_rows, Tensor rows, Tensor norms, Tensor grid, {_OPTIONS}, SymInt[] shape, bool channels_last, str backend) "
    "-> Tensor grad_features"
)


def warp(
    features: Tensor,  # [B, C, *S]
    grid: Tensor,  # [B, d, d+1] or [B, *S_out, d]
    *,
    size: tuple[int, ...] | None = None,
    points: Tensor | None = None,  # [P]
    mode: str = "linear",
    align_corners: bool = True,
    padding_mode: str = "zeros",
    normalize: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Gather the features at warped positions (warp.1-4): `F.grid_sample`, permute, index and `F.normalize` in one kernel.

    Args:
        features: [B, C, *S] with d = 2 or 3 spatial axes; float16, bfloat16, float32 or float64; any strides, channels-last is the fast layout.
        grid: affine matrices [B, d, d+1] that map normalised output to normalised input coordinates, as `F.affine_grid` takes them, or a dense grid
            [B, *S_out, d] as `F.grid_sample` takes it; float32 or float64. It gets no gradient.
        size: S_out of an affine grid, axes of at most 2^24, B * prod(S_out) < 2^62; default S. A dense grid brings its own.
        points: int64 flat indices into B * prod(S_out), image first; default: every point, in order. Repeats are allowed. An index outside raises on the
            CPU; on CUDA its row is NaN and not inside.
        mode: "linear" (bi- or trilinear by rank), "nearest" or "bicubic" (d = 2 only).
        align_corners: whether -1 and 1 are the outermost pixel centres (True) or edges (False).
        padding_mode: "zeros" or "border".
        normalize: divide each row by its L2 norm (warp.4).
        backend: "auto", "reference", "cpu", "triton" or "cuda".

    Returns:
        rows: [P, C], the dtype of `features`; a NaN coordinate gives a NaN row.
        inside: [P] bool: the point lies within the outermost pixel centres (edges if not align_corners), |g| <= 1.

    Raises:
        ValueError: a shape, device or choice is off; the message names argument, expectation and value.
        TypeError: an argument has the wrong type or dtype.
        RuntimeError: the named backend cannot run; a second derivative is asked for.
    """
    size = _check(features, grid, size, points, mode, padding_mode)
    rows, inside, _ = torch.ops.pix2rep.warp(features, grid.detach(), size, points, mode, align_corners, padding_mode, normalize, backend)
    return rows, inside


def why_not(backend: str, tensors: list[Tensor | None]) -> str | None:
    """Limits of a backend that depend on the tensors; `dispatch.why_not` asks."""
    if backend in ("triton", "cuda") and tensors[0].dtype == torch.float64:
        return "float64 features run on the backends reference and cpu only"
    return None


def _check(features, grid, size, points, mode, padding_mode) -> tuple[int, ...]:
    expect_float(features, "features")
    dims = features.ndim - 2
    expect(dims in (2, 3), "features", "have shape [B, C, H, W] or [B, C, D, H, W]", tuple(features.shape))
    expect(features.numel() > 0 or 0 in features.shape[:2], "features", "have no empty spatial axis", tuple(features.shape))
    expect(max(features.shape[2:]) <= 2**24, "features", "have spatial axes of at most 2^24, the whole numbers of float32", tuple(features.shape))
    expect_choice(mode, "mode", MODES)
    expect(mode != "bicubic" or dims == 2, "mode", 'be "linear" or "nearest" with 3 spatial axes', repr(mode))
    expect_choice(padding_mode, "padding_mode", PADDING_MODES)
    if grid.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"`grid` must be float32 or float64, got {str(grid.dtype).removeprefix('torch.')}")
    expect_device(grid, "grid", features, "features")
    batch = features.shape[0]
    if size is not None:
        size = _size(size)
    if grid.ndim == 3:
        if grid.shape != (batch, dims, dims + 1):
            expect(False, "grid", f"have shape {(batch, dims, dims + 1)} (affine)", tuple(grid.shape))
        size = tuple(features.shape[2:]) if size is None else size
        expect(len(size) == dims, "size", f"have {dims} entries", size)
        expect(min(size) >= 0, "size", "have no negative entry", size)
        expect(max(size) <= 2**24, "size", "have entries of at most 2^24, the whole numbers of float32", size)
        # The kernels' int64 indices, with room for the taps' arithmetic.
        expect(batch * math.prod(size) < 2**62, "size", "have B * prod(size) < 2^62 points", size)
    else:
        if grid.ndim != dims + 2 or grid.shape[0] != batch or grid.shape[-1] != dims:
            expect(False, "grid", f"have shape [{batch}, {dims}, {dims + 1}] or [{batch}, *S_out, {dims}]", tuple(grid.shape))
        own = tuple(grid.shape[1:-1])
        if size is not None and size != own:
            expect(False, "size", f"be {own} as the dense grid is, or None", size)
        size = own
    if points is not None:
        if points.dtype != torch.int64:
            raise TypeError(f"`points` must be int64, got {str(points.dtype).removeprefix('torch.')}")
        expect(points.ndim == 1, "points", "have shape [P]", tuple(points.shape))
        expect_device(points, "points", features, "features")
    return size


def _size(size) -> tuple[int, ...]:
    if not isinstance(size, (tuple, list)) or not all(isinstance(n, (int, torch.SymInt)) and not isinstance(n, bool) for n in size):
        raise TypeError(f"`size` must be a tuple of ints, got {size!r}")
    return tuple(size)


def _fake(features, grid, size, points, mode, align_corners, padding_mode, normalize, backend):
    count = features.shape[0] * math.prod(size) if points is None else points.shape[0]
    norm_dtype = torch.float64 if features.dtype == torch.float64 else torch.float32
    return (
        features.new_empty((count, features.shape[1])),
        features.new_empty((count,), dtype=torch.bool),
        features.new_empty((count if normalize else 0,), dtype=norm_dtype),
    )


def _backward_fake(
    grad_rows, rows, norms, grid, size, points, mode, align_corners, padding_mode, normalize, shape, channels_last, backend
):  # fmt: skip
    return new_empty(rows, shape, channels_last)


def _setup_context(ctx, inputs, output):
    features, grid, size, points, mode, align_corners, padding_mode, normalize, backend = inputs
    rows, inside, norms = output
    ctx.mark_non_differentiable(inside, norms)
    ctx.save_for_backward(rows, norms, grid, points)
    ctx.options = (size, mode, align_corners, padding_mode, normalize, features.shape, is_channels_last(features), backend)


def _backward(ctx, grad_rows, grad_inside, grad_norms):
    rows, norms, grid, points = ctx.saved_tensors
    size, mode, align_corners, padding_mode, normalize, shape, channels_last, backend = ctx.options
    grad_features = torch.ops.pix2rep.warp_backward(
        grad_rows, rows, norms, grid, size, points, mode, align_corners, padding_mode, normalize, shape, channels_last, backend
    )
    return grad_features, *(None,) * 8


register(SCHEMA, BACKWARD_SCHEMA, fake=_fake, backward_fake=_backward_fake, setup_context=_setup_context, backward=_backward)
