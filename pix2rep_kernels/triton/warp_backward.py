"""The gradient of warp, (warp.5-6): float32 atomics, or records sorted by pixel and summed in that order, the same bits every time."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from pix2rep_kernels.triton.warp_points import EPSILON, VARYING, blocks, locate, position, spread, tap, volume


@triton.jit
def _grad(grad_rows, rows, grad_p, grad_c, p, ok, c, C, dot, norm, NORMALIZE: tl.constexpr):
    """(warp.5) of one channel block, [P, C]."""
    mask = ok[:, None] & (c < C)[None, :]
    df = tl.load(grad_rows + p[:, None] * grad_p + c[None, :].to(tl.int64) * grad_c, mask=mask, other=0).to(tl.float32)
    if NORMALIZE:
        y = tl.load(rows + p[:, None] * C + c[None, :], mask=mask, other=0).to(tl.float32)
        scale = tl.div_rn(1.0, tl.where(norm < EPSILON, EPSILON, norm))
        df = (df - tl.where(norm < EPSILON, 0.0, dot)[:, None] * y) * scale[:, None]
    return df


@triton.jit
def _dot(grad_rows, rows, grad_p, grad_c, p, ok, C, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """<row, drow> of (warp.5)."""
    c = tl.arange(0, BLOCK_C)
    dot = tl.zeros([BLOCK_P], tl.float32)
    for c0 in range(0, C, BLOCK_C):
        mask = ok[:, None] & (c0 + c < C)[None, :]
        g = tl.load(grad_rows + p[:, None] * grad_p + (c0 + c)[None, :].to(tl.int64) * grad_c, mask=mask, other=0).to(tl.float32)
        dot += tl.sum(g * tl.load(rows + p[:, None] * C + (c0 + c)[None, :], mask=mask, other=0).to(tl.float32), 1)
    return dot


@triton.jit
def scatter(
    to, stride_c, c, C, ok, x, y, z, bad, D, H, W, stride_z, stride_y, stride_x, df,
    BORDER: tl.constexpr, TAPS: tl.constexpr, DIMS: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """(warp.6) of one channel block by float32 atomics, `to` being each point's image; df is laid out as `gather` returns it."""
    known, channel = spread(ok, c, LAST)
    for kz in tl.static_range(TAPS if DIMS == 3 else 1):
        for ky in tl.static_range(TAPS):
            for kx in tl.static_range(TAPS):
                offset, weight = tap(x, y, z, bad, D, H, W, stride_z, stride_y, stride_x, kz, ky, kx, BORDER, TAPS, DIMS)
                at, channel = spread(to + offset, c, LAST)
                w, channel = spread(weight, c, LAST)
                mask = known & (w != 0) & (channel < C)
                tl.atomic_add(at + channel.to(tl.int64) * stride_c, w * df, mask=mask, sem="relaxed")


@triton.jit(do_not_specialize=VARYING)
def warp_backward_atomic_kernel(
    grad_rows, rows, norms, grid, points, grad_features, P, B, C, D, H, W, OD, OH, OW,
    stride_b, stride_c, stride_z, stride_y, stride_x, grid_b, grid_r, grid_c, points_stride, grad_p, grad_c,
    AFFINE: tl.constexpr, ALIGN: tl.constexpr, GIVEN: tl.constexpr, BORDER: tl.constexpr, TAPS: tl.constexpr, DIMS: tl.constexpr,
    NORMALIZE: tl.constexpr, WIDE: tl.constexpr, LAST: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """(warp.5-6), scattered by float32 atomics."""
    p, ok, image, gx, gy, gz = locate(
        points, points_stride, grid, grid_b, grid_r, grid_c, P, B, OD, OH, OW, AFFINE, ALIGN, GIVEN, DIMS, WIDE, BLOCK_P
    )
    bad = (gx != gx) | (gy != gy) | (gz != gz)
    x, y, z = position(gx, W, ALIGN, BORDER, TAPS), position(gy, H, ALIGN, BORDER, TAPS), position(gz, D, ALIGN, BORDER, TAPS)
    dot = tl.zeros([BLOCK_P], tl.float32)
    norm = tl.full([BLOCK_P], 1.0, tl.float32)
    if NORMALIZE:
        dot = _dot(grad_rows, rows, grad_p, grad_c, p, ok, C, BLOCK_P, BLOCK_C)
        norm = tl.load(norms + p, mask=ok, other=1)
    for c0 in range(0, C, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)
        df = _grad(grad_rows, rows, grad_p, grad_c, p, ok, c, C, dot, norm, NORMALIZE)
        if not LAST:
            df = tl.trans(df)
        to = grad_features + image * stride_b
        scatter(to, stride_c, c, C, ok, x, y, z, bad, D, H, W, stride_z, stride_y, stride_x, df, BORDER, TAPS, DIMS, LAST)


@triton.jit(do_not_specialize=VARYING)
def warp_backward_records_kernel(
    grad_rows, rows, grid, points, keys, weights, dots, P, B, C, D, H, W, OD, OH, OW,
    grid_b, grid_r, grid_c, points_stride, grad_p, grad_c,
    AFFINE: tl.constexpr, ALIGN: tl.constexpr, GIVEN: tl.constexpr, BORDER: tl.constexpr, TAPS: tl.constexpr, DIMS: tl.constexpr,
    NORMALIZE: tl.constexpr, WIDE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One record a tap: key = image * prod(S) + pixel (B * prod(S) when it weighs nothing) and weight, [P, K]; <row, drow> [P]."""
    p, ok, image, gx, gy, gz = locate(
        points, points_stride, grid, grid_b, grid_r, grid_c, P, B, OD, OH, OW, AFFINE, ALIGN, GIVEN, DIMS, WIDE, BLOCK_P
    )
    bad = (gx != gx) | (gy != gy) | (gz != gz)
    x, y, z = position(gx, W, ALIGN, BORDER, TAPS), position(gy, H, ALIGN, BORDER, TAPS), position(gz, D, ALIGN, BORDER, TAPS)
    plane = tl.cast(H, tl.int64) * W
    count = plane * D
    K: tl.constexpr = TAPS * TAPS * (TAPS if DIMS == 3 else 1)
    for kz in tl.static_range(TAPS if DIMS == 3 else 1):
        for ky in tl.static_range(TAPS):
            for kx in tl.static_range(TAPS):
                pixel, weight = tap(x, y, z, bad, D, H, W, plane, W, 1, kz, ky, kx, BORDER, TAPS, DIMS)
                at = p * K + (kz * TAPS + ky) * TAPS + kx
                tl.store(keys + at, tl.where(ok & (weight != 0), image * count + pixel, B * count), mask=p < P)
                tl.store(weights + at, weight, mask=p < P)
    if NORMALIZE:
        tl.store(dots + p, _dot(grad_rows, rows, grad_p, grad_c, p, ok, C, BLOCK_P, BLOCK_C), mask=p < P)


@triton.jit
def warp_backward_sum_kernel(
    grad_rows, rows, norms, weights, dots, order, starts, grad_features, C, grad_p, grad_c,
    K: tl.constexpr, NORMALIZE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """(warp.6) of one pixel: its records in sorted order, BLOCK_R at a time."""
    pixel = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    start, stop = tl.load(starts + pixel), tl.load(starts + pixel + 1)
    total = tl.zeros([BLOCK_C], tl.float32)
    for first in range(start, stop, BLOCK_R):
        j = first + tl.arange(0, BLOCK_R)
        record = tl.load(order + j, mask=j < stop, other=0)
        p = record // K
        dot = tl.zeros([BLOCK_R], tl.float32)
        norm = tl.full([BLOCK_R], 1.0, tl.float32)
        if NORMALIZE:
            dot = tl.load(dots + p, mask=j < stop, other=0)
            norm = tl.load(norms + p, mask=j < stop, other=1)
        df = _grad(grad_rows, rows, grad_p, grad_c, p, j < stop, c, C, dot, norm, NORMALIZE)
        weight = tl.load(weights + record, mask=j < stop, other=0)
        total += tl.sum(weight[:, None] * df, 0)
    tl.store(grad_features + pixel * C + c, total.to(grad_features.dtype.element_ty), mask=c < C)


def atomic(grad_rows, rows, norms, where, options, size, normalize, shape, channels_last) -> Tensor:
    batch, channels, *spatial = shape
    memory = rows.new_zeros((batch, *spatial, channels) if channels_last else shape, dtype=torch.float32)
    grad = memory.movedim(-1, 1) if channels_last else memory
    if rows.numel():
        last = channels_last and channels > 1
        block_p, block_c, warps = blocks(channels, last, options["TAPS"] ** len(spatial), backward=True)
        strides = grad.stride()[:2] + volume(grad.stride()[2:], 0)
        warp_backward_atomic_kernel[(triton.cdiv(len(rows), block_p),)](
            grad_rows, rows, norms, where.grid, where.points, grad, len(rows), batch, channels, *volume(spatial, 1), *size,
            *strides, *where.strides, *grad_rows.stride(), **options, NORMALIZE=normalize, LAST=last,
            BLOCK_P=block_p, BLOCK_C=block_c, num_warps=warps, enable_fp_fusion=False,
        )  # fmt: skip
    return grad.to(rows.dtype)


def ordered(grad_rows, rows, norms, where, options, size, normalize, shape, channels_last) -> Tensor:
    batch, channels, *spatial = shape
    pixels = batch * math.prod(spatial)
    allocate = rows.new_empty if rows.numel() else rows.new_zeros
    memory = allocate((batch, *spatial, channels))
    if rows.numel():
        taps = options["TAPS"] ** len(spatial)
        keys = torch.empty(len(rows) * taps, dtype=torch.int64, device=rows.device)
        weights = torch.empty_like(keys, dtype=torch.float32)
        dots = torch.empty_like(norms)
        block_p, block_c, warps = blocks(channels, True, taps, backward=True)
        warp_backward_records_kernel[(triton.cdiv(len(rows), block_p),)](
            grad_rows, rows, where.grid, where.points, keys, weights, dots, len(rows), batch, channels, *volume(spatial, 1), *size,
            *where.strides, *grad_rows.stride(), **options, NORMALIZE=normalize, BLOCK_P=block_p, BLOCK_C=block_c, num_warps=warps,
            enable_fp_fusion=False,
        )  # fmt: skip
        keys, order = torch.sort(keys, stable=True)
        starts = torch.searchsorted(keys, torch.arange(pixels + 1, device=rows.device))
        block_c = min(triton.next_power_of_2(channels), 256)
        warp_backward_sum_kernel[(pixels, triton.cdiv(channels, block_c))](
            grad_rows, rows, norms, weights, dots, order, starts, memory, channels, *grad_rows.stride(),
            K=taps, NORMALIZE=normalize, BLOCK_R=4, BLOCK_C=block_c, num_warps=max(1, block_c // 64),
        )  # fmt: skip
    return memory.movedim(-1, 1)
