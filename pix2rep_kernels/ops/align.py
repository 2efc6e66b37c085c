"""Compare two feature maps at corresponding warped positions: inner product and squared norms a point, the warped maps never stored.

    q_m  = sum_k w_k F1[b, :, q_k],   z_m = sum_k w'_k F2[b, :, q'_k]           (align.1)
    dot  = <q_m, z_m>,  sq1 = <q_m, q_m>,  sq2 = <z_m, z_m>                     (align.2)
    dq_m = gdot z_m + 2 gsq1 q_m,   dz_m = gdot q_m + 2 gsq2 z_m                (align.3)
    dF1[b, :, q_k] += w_k dq_m,   dF2[b, :, q'_k] += w'_k dz_m                  (align.4)

m runs over the points of a common frame that each grid maps into its own map; taps and weights are those of warp (warp.1-3), the grids get no gradient.
Cosine, squared error and the cosine of the flattened maps are each a line of PyTorch on the three results. The backward pass gathers again.
Floor: 2 * 2^dims M C values read; backward as many read and scattered.

Source: PGL, arXiv 2011.12640 (aligned voxel-wise consistency).
"""

import math

import torch
from torch import Tensor

from pix2rep_kernels.check import expect, expect_choice, expect_device, expect_float, expect_tensor
from pix2rep_kernels.layout import is_channels_last, new_empty
from pix2rep_kernels.register import register

MODES = ("linear", "nearest")
PADDING_MODES = ("zeros", "border")

_OPTIONS = "SymInt[] size, str mode, bool align_corners, str padding_mode"
SCHEMA = f"align(Tensor f1, Tensor f2, Tensor grid1, Tensor grid2, {_OPTIONS}, str backend) -> (Tensor dot, Tensor sq1, Tensor sq2, Tensor valid)"
BACKWARD_SCHEMA = (
    f"align_backward(Tensor grad_dot, Tensor grad_sq1, Tensor grad_sq2, Tensor f1, Tensor f2, Tensor grid1, Tensor grid2, {_OPTIONS}, "
    "bool need_1, bool need_2, bool channels_last_1, bool channels_last_2, str backend) -> (Tensor grad_1, Tensor grad_2)"
)


def align(
    f1: Tensor,  # [B, C, *S1]
    f2: Tensor,  # [B, C, *S2]
    grid1: Tensor,  # [B, d, d+1] or [B, *M, d]
    grid2: Tensor,  # [B, d, d+1] or [B, *M, d]
    *,
    size: tuple[int, ...] | None = None,
    mode: str = "linear",
    align_corners: bool = False,
    padding_mode: str = "border",
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inner product and squared norms of two maps at the points of a common frame (align.2).

    Args:
        f1, f2: maps [B, C, *S1] and [B, C, *S2] with d = 2 or 3 spatial axes, S1 and S2 may differ; one dtype of float16, bfloat16, float32 or float64;
            any strides, channels-last is the fast layout.
        grid1, grid2: where the common frame lies in each map: affine matrices [B, d, d+1] (frame to map, normalised, as `F.affine_grid`) or dense grids
            [B, *M, d] (as `F.grid_sample`); float32 or float64, each of its own kind. They get no gradient. A flip is a negative diagonal entry.
        size: M of the affine grids; default the dense grid's, or S1 when both are affine. Axes of at most 2^24, B * prod(M) < 2^62.
        mode: "linear" (bi- or trilinear by rank) or "nearest".
        align_corners: whether -1 and 1 are the outermost pixel centres (True) or edges (False, as RoIAlign).
        padding_mode: "zeros" or "border".
        backend: "auto", "reference", "cpu", "triton" or "cuda".

    Returns:
        dot, sq1, sq2: [B, *M] float32 (float64 for float64 maps); each carries gradient to both maps, as far as it depends on them.
        valid: [B, *M] bool: the point lies within both maps, |g| <= 1 (as `inside` of warp).

    Raises:
        ValueError: a shape, device or choice is off; the message names argument, expectation and value.
        TypeError: an argument has the wrong type or dtype.
        RuntimeError: the named backend cannot run; a second derivative is asked for.
    """
    size = _check(f1, f2, grid1, grid2, size, mode, padding_mode)
    return torch.ops.pix2rep.align(f1, f2, grid1.detach(), grid2.detach(), size, mode, align_corners, padding_mode, backend)


def why_not(backend: str, tensors: list[Tensor | None]) -> str | None:
    """Limits of a backend that depend on the tensors; `dispatch.why_not` asks."""
    # The grids, which may be float64, have 3 axes or as many as the maps; maps come first, after the three gradients in the backward pass.
    maps = tensors[3:5] if len(tensors) == 7 else tensors[:2]
    if backend in ("triton", "cuda") and any(t is not None and t.dtype == torch.float64 for t in maps):
        return "float64 maps run on the backends reference and cpu only"
    return None


def _check(f1, f2, grid1, grid2, size, mode, padding_mode) -> tuple[int, ...]:
    expect_float(f1, "f1")
    expect_float(f2, "f2")
    dims = f1.ndim - 2
    if dims not in (2, 3):
        expect(False, "f1", "have shape [B, C, H, W] or [B, C, D, H, W]", tuple(f1.shape))
    if f2.ndim != f1.ndim or f2.shape[:2] != f1.shape[:2]:
        expect(False, "f2", f"have shape [{f1.shape[0]}, {f1.shape[1]}, *S2] with {dims} spatial axes", tuple(f2.shape))
    if f2.dtype != f1.dtype:
        raise TypeError(f"`f2` must be {f1.dtype} as `f1` is, got {f2.dtype}")
    expect_device(f2, "f2", f1, "f1")
    for name, f in (("f1", f1), ("f2", f2)):
        if f.numel() == 0 and 0 not in f.shape[:2]:
            expect(False, name, "have no empty spatial axis", tuple(f.shape))
        if max(f.shape[2:]) > 2**24:
            expect(False, name, "have spatial axes of at most 2^24, the whole numbers of float32", tuple(f.shape))
    expect_choice(mode, "mode", MODES)
    expect_choice(padding_mode, "padding_mode", PADDING_MODES)
    if size is not None and (not isinstance(size, (tuple, list)) or not all(isinstance(n, (int, torch.SymInt)) and not isinstance(n, bool) for n in size)):
        raise TypeError(f"`size` must be a tuple of ints, got {size!r}")
    for name, grid in (("grid1", grid1), ("grid2", grid2)):
        size = _check_grid(grid, name, f1, size)
    size = tuple(f1.shape[2:]) if size is None else tuple(size)
    if len(size) != dims or min(size) < 0 or max(size) > 2**24:
        expect(False, "size", f"have {dims} entries of 0 to 2^24", size)
    if f1.shape[0] * math.prod(size) >= 2**62:
        expect(False, "size", "have B * prod(size) < 2^62 points", size)
    return size


def _check_grid(grid, name, f1, size):
    """`size`, or the dense grid's where it was None."""
    expect_tensor(grid, name)
    if grid.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"`{name}` must be float32 or float64, got {str(grid.dtype).removeprefix('torch.')}")
    expect_device(grid, name, f1, "f1")
    batch, dims = f1.shape[0], f1.ndim - 2
    if grid.ndim == 3 and grid.shape == (batch, dims, dims + 1):
        return size
    if grid.ndim != dims + 2 or grid.shape[0] != batch or grid.shape[-1] != dims:
        expect(False, name, f"have shape [{batch}, {dims}, {dims + 1}] or [{batch}, *M, {dims}]", tuple(grid.shape))
    own = tuple(grid.shape[1:-1])
    if size is not None and tuple(size) != own:
        expect(False, name, f"have M = {tuple(size)} points as `size` or the other grid has", own)
    return own


def compute_dtype(f1: Tensor) -> torch.dtype:
    """float64 for float64 maps, else float32: the dtype of the three results."""
    return torch.float64 if f1.dtype == torch.float64 else torch.float32


def _fake(f1, f2, grid1, grid2, size, mode, align_corners, padding_mode, backend):
    shape = (f1.shape[0], *size)
    return *(f1.new_empty(shape, dtype=compute_dtype(f1)) for _ in range(3)), f1.new_empty(shape, dtype=torch.bool)


def _backward_fake(
    grad_dot, grad_sq1, grad_sq2, f1, f2, grid1, grid2, size, mode, align_corners, padding_mode, need_1, need_2, channels_last_1, channels_last_2, backend
):  # fmt: skip
    grad_1 = new_empty(f1, f1.shape, channels_last_1) if need_1 else f1.new_empty(0)
    grad_2 = new_empty(f2, f2.shape, channels_last_2) if need_2 else f2.new_empty(0)
    return grad_1, grad_2


def _setup_context(ctx, inputs, output):
    f1, f2, grid1, grid2, *ctx.options = inputs
    ctx.mark_non_differentiable(output[3])
    ctx.save_for_backward(f1, f2, grid1, grid2)


def _backward(ctx, grad_dot, grad_sq1, grad_sq2, grad_valid):
    f1, f2, grid1, grid2 = ctx.saved_tensors
    *options, backend = ctx.options
    needs = ctx.needs_input_grad[:2]
    grads = torch.ops.pix2rep.align_backward(
        grad_dot, grad_sq1, grad_sq2, f1, f2, grid1, grid2, *options, *needs, is_channels_last(f1), is_channels_last(f2), backend
    )
    return *(grad if need else None for grad, need in zip(grads, needs, strict=True)), *(None,) * 7


register(SCHEMA, BACKWARD_SCHEMA, fake=_fake, backward_fake=_backward_fake, setup_context=_setup_context, backward=_backward)
