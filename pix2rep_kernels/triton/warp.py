"""Warp, gather and normalise in Triton: one tile of points x channels a program; neither an affine grid nor the warped map is ever in memory.

Channels-last features put channels along the lanes, every other layout puts consecutive points there.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from pix2rep_kernels.triton.warp_backward import atomic, ordered
from pix2rep_kernels.triton.warp_points import EPSILON, VARYING, blocks, gather, locate, position, shared, spread, volume


@triton.jit
def _store(rows, p, P, c, C, f, LAST: tl.constexpr):
    if not LAST:
        f = tl.trans(f)
    at = rows + p[:, None] * C + c[None, :]
    tl.store(at, f.to(rows.dtype.element_ty), mask=(p < P)[:, None] & (c < C)[None, :])


@triton.jit(do_not_specialize=VARYING)
def warp_forward_kernel(
    features, grid, points, rows, inside, norms, P, B, C, D, H, W, OD, OH, OW,
    stride_b, stride_c, stride_z, stride_y, stride_x, grid_b, grid_r, grid_c, points_stride,
    AFFINE: tl.constexpr, ALIGN: tl.constexpr, GIVEN: tl.constexpr, BORDER: tl.constexpr, TAPS: tl.constexpr, DIMS: tl.constexpr,
    NORMALIZE: tl.constexpr, WIDE: tl.constexpr, LAST: tl.constexpr, LOOP: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    p, ok, image, gx, gy, gz = locate(
        points, points_stride, grid, grid_b, grid_r, grid_c, P, B, OD, OH, OW, AFFINE, ALIGN, GIVEN, DIMS, WIDE, BLOCK_P
    )
    lies_inside = ok & (tl.abs(gx) <= 1) & (tl.abs(gy) <= 1) & (tl.abs(gz) <= 1)
    tl.store(inside + p, lies_inside, mask=p < P)
    bad = (gx != gx) | (gy != gy) | (gz != gz) | ~ok
    x, y, z = position(gx, W, ALIGN, BORDER, TAPS), position(gy, H, ALIGN, BORDER, TAPS), position(gz, D, ALIGN, BORDER, TAPS)
    base = features + image * stride_b
    c = tl.arange(0, BLOCK_C)
    f = gather(base, stride_c, c, C, ok, x, y, z, bad, D, H, W, stride_z, stride_y, stride_x, BORDER, TAPS, DIMS, LAST)
    scale = tl.full([BLOCK_P], 1.0, tl.float32)
    if NORMALIZE:  # (warp.4)
        squares = tl.sum(f * f, 1 if LAST else 0)
        if LOOP:
            for c0 in range(BLOCK_C, C, BLOCK_C):
                more = gather(base, stride_c, c0 + c, C, ok, x, y, z, bad, D, H, W, stride_z, stride_y, stride_x, BORDER, TAPS, DIMS, LAST)
                squares += tl.sum(more * more, 1 if LAST else 0)
        norm = tl.sqrt_rn(squares)
        tl.store(norms + p, norm, mask=p < P)
        scale = tl.div_rn(1.0, tl.where(norm < EPSILON, EPSILON, norm))  # NaN stays, which maximum drops
    along, _ = spread(scale, c, LAST)
    _store(rows, p, P, c, C, f * along, LAST)
    if LOOP:
        for c0 in range(BLOCK_C, C, BLOCK_C):
            f = gather(base, stride_c, c0 + c, C, ok, x, y, z, bad, D, H, W, stride_z, stride_y, stride_x, BORDER, TAPS, DIMS, LAST)
            _store(rows, p, P, c0 + c, C, f * along, LAST)


def forward(features, grid, size, points, mode, align_corners, padding_mode, normalize) -> tuple[Tensor, Tensor, Tensor]:
    """rows [P, C], inside [P], norms [P] ([0] unless normalize)."""
    batch, channels, *spatial = features.shape
    count = batch * math.prod(size) if points is None else len(points)
    rows = features.new_empty(count, channels)
    inside = features.new_empty(count, dtype=torch.bool)
    norms = features.new_empty(count if normalize else 0, dtype=torch.float32)
    if count == 0:
        return rows, inside, norms
    last = features.stride(1) == 1 and channels > 1
    where, options = shared(grid, size, points, mode, align_corners, padding_mode)
    block_p, block_c, warps = blocks(channels, last, options["TAPS"] ** len(spatial))
    strides = features.stride()[:2] + volume(features.stride()[2:], 0)
    with torch.cuda.device_of(features):
        warp_forward_kernel[(triton.cdiv(count, block_p),)](
            features, where.grid, where.points, rows, inside, norms, count, batch, channels, *volume(spatial, 1), *volume(size, 1),
            *strides, *where.strides, **options, NORMALIZE=normalize, LAST=last, LOOP=channels > block_c,
            BLOCK_P=block_p, BLOCK_C=block_c, num_warps=warps, enable_fp_fusion=False,
        )  # fmt: skip
    return rows, inside, norms


def backward(
    grad_rows, rows, norms, grid, size, points, mode, align_corners, padding_mode, normalize, shape, channels_last
) -> Tensor:  # fmt: skip
    """Gradient of features, [B, C, *S]: float32 atomics, or a sort and sums in its order under `torch.use_deterministic_algorithms`."""
    where, options = shared(grid, size, points, mode, align_corners, padding_mode)
    run = ordered if torch.are_deterministic_algorithms_enabled() else atomic
    with torch.cuda.device_of(rows):
        grad = run(grad_rows, rows, norms, where, options, volume(size, 1), normalize, tuple(shape), channels_last)
    return grad if channels_last else grad.contiguous()
