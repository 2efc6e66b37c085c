"""Warp, gather and normalise in Triton: one tile of points x channels a program; neither an affine grid nor the warped map is ever in memory.

Channels-last features put channels along the lanes, every other layout puts consecutive points there. Coordinates are float32 (a float64 grid is cast), in
the reference's order of operations and without fused multiply-adds, so that both agree on a tie of "nearest".
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

EPSILON = tl.constexpr(1e-12)
TAPS = {"nearest": 1, "linear": 2, "bicubic": 4}  # an axis


def blocks(channels: int, channels_last: bool) -> tuple[int, int, int]:
    """(BLOCK_P, BLOCK_C, num_warps). 16 values a thread keep 2^d taps of each in flight, under 128 registers on sm_80 and sm_90."""
    block_c = min(triton.next_power_of_2(max(channels, 1)), 512 if channels_last else 64)
    return max(2048 // block_c, 1 if channels_last else 32), block_c, 4


@triton.jit
def _output(i, extent, ALIGN: tl.constexpr):
    """Normalised coordinate of output index i, as in F.affine_grid."""
    last = extent - 1
    if ALIGN:
        return tl.div_rn((2 * i - last).to(tl.float32), tl.maximum(last, 1).to(tl.float32))
    else:
        return tl.div_rn((2 * i - last).to(tl.float32), extent.to(tl.float32))


@triton.jit
def _affine(theta, ok, stride, x, y, z, DIMS: tl.constexpr):
    """One row of (warp.1); the products are summed from x on."""
    g = tl.load(theta, mask=ok, other=0).to(tl.float32) * x
    g += tl.load(theta + stride, mask=ok, other=0).to(tl.float32) * y
    if DIMS == 3:
        g += tl.load(theta + 2 * stride, mask=ok, other=0).to(tl.float32) * z
    return g + tl.load(theta + DIMS * stride, mask=ok, other=0).to(tl.float32)


@triton.jit
def _points(
    points, points_stride, grid, grid_b, grid_r, grid_c, P, B, OD, OH, OW,
    AFFINE: tl.constexpr, ALIGN: tl.constexpr, GIVEN: tl.constexpr, DIMS: tl.constexpr, WIDE: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """p [BLOCK_P], which p are points of the grid, their image and (x, y, z) in normalised input coordinates (z repeats y in 2D)."""
    p = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    ok = p < P
    count = OD.to(tl.int64) * OH * OW
    point = p
    if GIVEN:
        point = tl.load(points + p * points_stride, mask=ok, other=0)
        ok = ok & (point >= 0) & (point < B * count)
    point = tl.where(ok, point, 0)
    if not WIDE:  # 32-bit divisions are several times cheaper
        point, count = point.to(tl.int32), count.to(tl.int32)
    image = point // tl.maximum(count, 1)
    if AFFINE:
        rest = point - image * count
        line = rest // tl.maximum(OW, 1)
        plane = line // tl.maximum(OH, 1)
        x, y, z = _output(rest - line * OW, OW, ALIGN), _output(line - plane * OH, OH, ALIGN), _output(plane, OD, ALIGN)
        theta = grid + image.to(tl.int64) * grid_b
        gx = _affine(theta, ok, grid_c, x, y, z, DIMS)
        gy = _affine(theta + grid_r, ok, grid_c, x, y, z, DIMS)
        gz = gy
        if DIMS == 3:
            gz = _affine(theta + 2 * grid_r, ok, grid_c, x, y, z, DIMS)
    else:
        at = grid + point.to(tl.int64) * DIMS
        gx = tl.load(at, mask=ok, other=0).to(tl.float32)
        gy = tl.load(at + 1, mask=ok, other=0).to(tl.float32)
        gz = gy
        if DIMS == 3:
            gz = tl.load(at + 2, mask=ok, other=0).to(tl.float32)
    return p, ok, image.to(tl.int64), gx, gy, gz


@triton.jit
def _position(g, extent, ALIGN: tl.constexpr, BORDER: tl.constexpr, TAPS: tl.constexpr):
    """(warp.2), moved into the map when padding is "border"; bicubic moves its taps instead."""
    if ALIGN:
        x = (g + 1) * 0.5 * (extent - 1).to(tl.float32)
    else:
        x = ((g + 1) * extent.to(tl.float32) - 1) * 0.5
    if BORDER and TAPS != 4:
        x = tl.minimum(tl.maximum(x, 0.0), (extent - 1).to(tl.float32))
    return x


@triton.jit
def _keys_near(d):
    return ((-0.75 + 2) * d - (-0.75 + 3)) * d * d + 1


@triton.jit
def _keys_far(d):
    return ((-0.75 * d + 5 * 0.75) * d - 8 * 0.75) * d + 4 * 0.75


@triton.jit
def _axis_tap(x, extent, k: tl.constexpr, BORDER: tl.constexpr, TAPS: tl.constexpr):
    """Index and weight of tap k of one axis; the index is always inside the map."""
    base = tl.floor(x)
    t = x - base
    if TAPS == 1:
        odd = base - 2 * tl.floor(base * 0.5)
        centre = base + tl.where((t > 0.5) | ((t == 0.5) & (odd != 0)), 1.0, 0.0)
        weight = tl.full(x.shape, 1.0, tl.float32)
    elif TAPS == 2:
        centre = base + k
        weight = t if k == 1 else 1 - t
    else:
        centre = base + (k - 1)
        if k == 0:
            weight = _keys_far(t + 1)
        elif k == 1:
            weight = _keys_near(t)
        elif k == 2:
            weight = _keys_near(1 - t)
        else:
            weight = _keys_far(2 - t)
    last = (extent - 1).to(tl.float32)
    if not BORDER:
        weight = tl.where((centre < 0) | (centre > last), 0.0, weight)
    centre = tl.where(centre == centre, centre, 0.0)  # minimum and maximum treat NaN differently when interpreted
    return tl.minimum(tl.maximum(centre, 0.0), last).to(tl.int64), weight


@triton.jit
def _tap(
    x, y, z, bad, D, H, W, stride_z, stride_y, stride_x,
    kz: tl.constexpr, ky: tl.constexpr, kx: tl.constexpr, BORDER: tl.constexpr, TAPS: tl.constexpr, DIMS: tl.constexpr,
):  # fmt: skip
    """Offset inside the image and weight of one tap q_k of (warp.3); the weight is NaN where `bad`."""
    iy, weight = _axis_tap(y, H, ky, BORDER, TAPS)
    offset = iy * stride_y
    if DIMS == 3:
        iz, wz = _axis_tap(z, D, kz, BORDER, TAPS)
        offset += iz * stride_z
        weight = wz * weight
    ix, wx = _axis_tap(x, W, kx, BORDER, TAPS)
    return offset + ix * stride_x, tl.where(bad, float("nan"), weight * wx)


@triton.jit
def _spread(p, c, LAST: tl.constexpr):
    """Point and channel vectors as a tile [P, C] when channels are last, else [C, P]: the lanes run along the second axis."""
    if LAST:
        return p[:, None], c[None, :]
    else:
        return p[None, :], c[:, None]


@triton.jit
def _gather(
    features, stride_c, c, C, ok, x, y, z, bad, D, H, W, stride_z, stride_y, stride_x,
    BORDER: tl.constexpr, TAPS: tl.constexpr, DIMS: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """(warp.3) of one channel block, `features` being each point's image; a tap without weight is not read and passes no NaN."""
    known, channel = _spread(ok, c, LAST)
    f = tl.zeros((known & (channel < C)).shape, tl.float32)
    for kz in tl.static_range(TAPS if DIMS == 3 else 1):
        for ky in tl.static_range(TAPS):
            for kx in tl.static_range(TAPS):
                offset, weight = _tap(x, y, z, bad, D, H, W, stride_z, stride_y, stride_x, kz, ky, kx, BORDER, TAPS, DIMS)
                at, channel = _spread(features + offset, c, LAST)
                w, channel = _spread(weight, c, LAST)
                value = tl.load(at + channel.to(tl.int64) * stride_c, mask=known & (w != 0) & (channel < C), other=0)
                f = tl.fma(value.to(tl.float32), tl.broadcast_to(w, f.shape), f)
    return f


@triton.jit
def _store(rows, p, P, c, C, f, LAST: tl.constexpr):
    if not LAST:
        f = tl.trans(f)
    at = rows + p[:, None] * C + c[None, :]
    tl.store(at, f.to(rows.dtype.element_ty), mask=(p < P)[:, None] & (c < C)[None, :])


@triton.jit
def warp_forward_kernel(
    features, grid, points, rows, inside, norms, P, B, C, D, H, W, OD, OH, OW,
    stride_b, stride_c, stride_z, stride_y, stride_x, grid_b, grid_r, grid_c, points_stride,
    AFFINE: tl.constexpr, ALIGN: tl.constexpr, GIVEN: tl.constexpr, BORDER: tl.constexpr, TAPS: tl.constexpr, DIMS: tl.constexpr,
    NORMALIZE: tl.constexpr, WIDE: tl.constexpr, LAST: tl.constexpr, LOOP: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    p, ok, image, gx, gy, gz = _points(
        points, points_stride, grid, grid_b, grid_r, grid_c, P, B, OD, OH, OW, AFFINE, ALIGN, GIVEN, DIMS, WIDE, BLOCK_P
    )
    lies_inside = ok & (tl.abs(gx) <= 1) & (tl.abs(gy) <= 1) & (tl.abs(gz) <= 1)
    tl.store(inside + p, lies_inside, mask=p < P)
    bad = (gx != gx) | (gy != gy) | (gz != gz) | ~ok
    x, y, z = _position(gx, W, ALIGN, BORDER, TAPS), _position(gy, H, ALIGN, BORDER, TAPS), _position(gz, D, ALIGN, BORDER, TAPS)
    base = features + image * stride_b
    c = tl.arange(0, BLOCK_C)
    f = _gather(base, stride_c, c, C, ok, x, y, z, bad, D, H, W, stride_z, stride_y, stride_x, BORDER, TAPS, DIMS, LAST)
    scale = tl.full([BLOCK_P], 1.0, tl.float32)
    if NORMALIZE:  # (warp.4)
        squares = tl.sum(f * f, 1 if LAST else 0)
        if LOOP:
            for c0 in range(BLOCK_C, C, BLOCK_C):
                more = _gather(base, stride_c, c0 + c, C, ok, x, y, z, bad, D, H, W, stride_z, stride_y, stride_x, BORDER, TAPS, DIMS, LAST)
                squares += tl.sum(more * more, 1 if LAST else 0)
        norm = tl.sqrt_rn(squares)
        tl.store(norms + p, norm, mask=p < P)
        scale = tl.div_rn(1.0, tl.maximum(norm, EPSILON))
    along, _ = _spread(scale, c, LAST)
    _store(rows, p, P, c, C, f * along, LAST)
    if LOOP:
        for c0 in range(BLOCK_C, C, BLOCK_C):
            f = _gather(base, stride_c, c0 + c, C, ok, x, y, z, bad, D, H, W, stride_z, stride_y, stride_x, BORDER, TAPS, DIMS, LAST)
            _store(rows, p, P, c0 + c, C, f * along, LAST)


@triton.jit
def _grad(grad_rows, rows, grad_p, grad_c, p, ok, c, C, dot, norm, NORMALIZE: tl.constexpr):
    """(warp.5) of one channel block, [P, C]."""
    mask = ok[:, None] & (c < C)[None, :]
    df = tl.load(grad_rows + p[:, None] * grad_p + c[None, :].to(tl.int64) * grad_c, mask=mask, other=0).to(tl.float32)
    if NORMALIZE:
        y = tl.load(rows + p[:, None] * C + c[None, :], mask=mask, other=0).to(tl.float32)
        scale = tl.div_rn(1.0, tl.maximum(norm, EPSILON))
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
def warp_backward_atomic_kernel(
    grad_rows, rows, norms, grid, points, grad_features, P, B, C, D, H, W, OD, OH, OW,
    stride_b, stride_c, stride_z, stride_y, stride_x, grid_b, grid_r, grid_c, points_stride, grad_p, grad_c,
    AFFINE: tl.constexpr, ALIGN: tl.constexpr, GIVEN: tl.constexpr, BORDER: tl.constexpr, TAPS: tl.constexpr, DIMS: tl.constexpr,
    NORMALIZE: tl.constexpr, WIDE: tl.constexpr, LAST: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """(warp.5-6), scattered by float32 atomics."""
    p, ok, image, gx, gy, gz = _points(
        points, points_stride, grid, grid_b, grid_r, grid_c, P, B, OD, OH, OW, AFFINE, ALIGN, GIVEN, DIMS, WIDE, BLOCK_P
    )
    bad = (gx != gx) | (gy != gy) | (gz != gz)
    x, y, z = _position(gx, W, ALIGN, BORDER, TAPS), _position(gy, H, ALIGN, BORDER, TAPS), _position(gz, D, ALIGN, BORDER, TAPS)
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
        known, channel = _spread(ok, c, LAST)
        for kz in tl.static_range(TAPS if DIMS == 3 else 1):
            for ky in tl.static_range(TAPS):
                for kx in tl.static_range(TAPS):
                    offset, weight = _tap(x, y, z, bad, D, H, W, stride_z, stride_y, stride_x, kz, ky, kx, BORDER, TAPS, DIMS)
                    at, channel = _spread(grad_features + image * stride_b + offset, c, LAST)
                    w, channel = _spread(weight, c, LAST)
                    mask = known & (w != 0) & (channel < C)
                    tl.atomic_add(at + channel.to(tl.int64) * stride_c, w * df, mask=mask, sem="relaxed")


@triton.jit
def warp_backward_records_kernel(
    grad_rows, rows, grid, points, keys, weights, dots, P, B, C, D, H, W, OD, OH, OW,
    grid_b, grid_r, grid_c, points_stride, grad_p, grad_c,
    AFFINE: tl.constexpr, ALIGN: tl.constexpr, GIVEN: tl.constexpr, BORDER: tl.constexpr, TAPS: tl.constexpr, DIMS: tl.constexpr,
    NORMALIZE: tl.constexpr, WIDE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One record a tap: key = image * prod(S) + pixel (B * prod(S) when it weighs nothing) and weight, [P, K]; <row, drow> [P]."""
    p, ok, image, gx, gy, gz = _points(
        points, points_stride, grid, grid_b, grid_r, grid_c, P, B, OD, OH, OW, AFFINE, ALIGN, GIVEN, DIMS, WIDE, BLOCK_P
    )
    bad = (gx != gx) | (gy != gy) | (gz != gz)
    x, y, z = _position(gx, W, ALIGN, BORDER, TAPS), _position(gy, H, ALIGN, BORDER, TAPS), _position(gz, D, ALIGN, BORDER, TAPS)
    count = D.to(tl.int64) * H * W
    K: tl.constexpr = TAPS * TAPS * (TAPS if DIMS == 3 else 1)
    for kz in tl.static_range(TAPS if DIMS == 3 else 1):
        for ky in tl.static_range(TAPS):
            for kx in tl.static_range(TAPS):
                pixel, weight = _tap(x, y, z, bad, D, H, W, H * W, W, 1, kz, ky, kx, BORDER, TAPS, DIMS)
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
    block_p, block_c, warps = blocks(channels, last)
    where, options = _shared(grid, size, points, mode, align_corners, padding_mode)
    strides = features.stride()[:2] + _volume(features.stride()[2:], 0)
    with torch.cuda.device_of(features):
        warp_forward_kernel[(triton.cdiv(count, block_p),)](
            features, where.grid, where.points, rows, inside, norms, count, batch, channels, *_volume(spatial, 1), *_volume(size, 1),
            *strides, *where.strides, **options, NORMALIZE=normalize, LAST=last, LOOP=channels > block_c,
            BLOCK_P=block_p, BLOCK_C=block_c, num_warps=warps, enable_fp_fusion=False,
        )  # fmt: skip
    return rows, inside, norms


def backward(
    grad_rows, rows, norms, grid, size, points, mode, align_corners, padding_mode, normalize, shape, channels_last
) -> Tensor:  # fmt: skip
    """Gradient of features, [B, C, *S]: float32 atomics, or a sort and sums in its order under `torch.use_deterministic_algorithms`."""
    where, options = _shared(grid, size, points, mode, align_corners, padding_mode)
    run = _sorted if torch.are_deterministic_algorithms_enabled() else _atomic
    with torch.cuda.device_of(rows):
        grad = run(grad_rows, rows, norms, where, options, _volume(size, 1), normalize, tuple(shape), channels_last)
    return grad if channels_last else grad.contiguous()


def _atomic(grad_rows, rows, norms, where, options, size, normalize, shape, channels_last) -> Tensor:
    batch, channels, *spatial = shape
    memory = rows.new_zeros((batch, *spatial, channels) if channels_last else shape, dtype=torch.float32)
    grad = memory.movedim(-1, 1) if channels_last else memory
    if rows.numel():
        last = channels_last and channels > 1
        block_p, block_c, warps = blocks(channels, last)
        strides = grad.stride()[:2] + _volume(grad.stride()[2:], 0)
        warp_backward_atomic_kernel[(triton.cdiv(len(rows), block_p),)](
            grad_rows, rows, norms, where.grid, where.points, grad, len(rows), batch, channels, *_volume(spatial, 1), *size,
            *strides, *where.strides, *grad_rows.stride(), **options, NORMALIZE=normalize, LAST=last,
            BLOCK_P=block_p, BLOCK_C=block_c, num_warps=warps, enable_fp_fusion=False,
        )  # fmt: skip
    return grad.to(rows.dtype)


def _sorted(grad_rows, rows, norms, where, options, size, normalize, shape, channels_last) -> Tensor:
    batch, channels, *spatial = shape
    pixels = batch * math.prod(spatial)
    memory = rows.new_zeros((batch, *spatial, channels))
    if rows.numel():
        taps = options["TAPS"] ** len(spatial)
        keys = torch.empty(len(rows) * taps, dtype=torch.int64, device=rows.device)
        weights = torch.empty_like(keys, dtype=torch.float32)
        dots = torch.empty_like(norms)
        block_p, block_c, warps = blocks(channels, True)
        warp_backward_records_kernel[(triton.cdiv(len(rows), block_p),)](
            grad_rows, rows, where.grid, where.points, keys, weights, dots, len(rows), batch, channels, *_volume(spatial, 1), *size,
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


class _Where(NamedTuple):
    grid: Tensor
    points: Tensor
    strides: tuple[int, int, int, int]  # grid_b, grid_r, grid_c, points_stride


def _shared(grid, size, points, mode, align_corners, padding_mode) -> tuple[_Where, dict]:
    """Where the points are, and the constants that the kernels share."""
    dims, affine = len(size), grid.ndim == 3
    grid = grid if affine else grid.contiguous()
    strides = grid.stride() if affine else (0, 0, 0)
    where = _Where(grid, grid if points is None else points, (*strides, 0 if points is None else points.stride(0)))
    options = {
        "AFFINE": affine,
        "ALIGN": align_corners,
        "GIVEN": points is not None,
        "BORDER": padding_mode == "border",
        "TAPS": TAPS[mode],
        "DIMS": dims,
        "WIDE": grid.shape[0] * math.prod(size) >= 2**31,
    }
    return where, options


def _volume(values, fill: int) -> tuple[int, int, int]:
    """Sizes or strides of the spatial axes as of three."""
    return (fill,) * (3 - len(values)) + tuple(values)
