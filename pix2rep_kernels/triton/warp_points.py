"""Where the points of warp and align are and what they sum: coordinates (warp.1), positions, taps and gathers (warp.2-3), and the block sizes that suit them.

Coordinates are float32 (a float64 grid is cast), in the reference's order of operations and without fused multiply-adds (every launch passes
enable_fp_fusion=False), so that both agree on a tie of "nearest". A size of 1 is a constant when compiled: tl.cast takes both, `.to` tensors only.
"""

import math
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

EPSILON = tl.constexpr(1e-12)
TAPS = {"nearest": 1, "linear": 2, "bicubic": 4}  # an axis
# Of the kernels' arguments: compiled once for every value. Of the others it matters to loads whether they are 1 or a multiple of 16.
VARYING = (
    "P", "B", "OD", "OH", "OW", "D", "H", "W", "D1", "H1", "W1", "D2", "H2", "W2",
    "grid_b", "grid_r", "grid_c", "grid1_b", "grid1_r", "grid1_c", "grid2_b", "grid2_r", "grid2_c",
)  # fmt: skip


def blocks(channels: int, channels_last: bool, taps: int, backward: bool = False) -> tuple[int, int, int]:
    """(BLOCK_P, BLOCK_C, num_warps): as many values a thread as their taps and addresses fit in registers (no spills); rows that are not aligned
    need an address a value."""
    values = {8: 1024, 16: 256}.get(taps, 2048)
    if channels_last and channels % 16 and taps == 4:
        values //= 2
    if backward:
        values = max(values // 2, 256)
    widest = values // 4 if channels_last else 16 if taps > 4 or backward else 64
    block_c = min(triton.next_power_of_2(max(channels, 1)), widest)
    return (values // block_c, block_c, 4) if channels_last else (32, block_c, 8 if block_c > 32 else 4)


@triton.jit
def output(i, extent, ALIGN: tl.constexpr):
    """Normalised coordinate of output index i, as in F.affine_grid."""
    last = extent - 1
    if ALIGN:
        return tl.div_rn((2 * i - last).to(tl.float32), tl.cast(tl.maximum(last, 1), tl.float32))
    else:
        return tl.div_rn((2 * i - last).to(tl.float32), tl.cast(extent, tl.float32))


@triton.jit
def affine_row(theta, ok, stride, x, y, z, DIMS: tl.constexpr):
    """One row of (warp.1); the products are summed from x on."""
    g = tl.load(theta, mask=ok, other=0).to(tl.float32) * x
    g += tl.load(theta + stride, mask=ok, other=0).to(tl.float32) * y
    if DIMS == 3:
        g += tl.load(theta + 2 * stride, mask=ok, other=0).to(tl.float32) * z
    return g + tl.load(theta + DIMS * stride, mask=ok, other=0).to(tl.float32)


@triton.jit
def locate(
    points, points_stride, grid, grid_b, grid_r, grid_c, P, B, OD, OH, OW,
    AFFINE: tl.constexpr, ALIGN: tl.constexpr, GIVEN: tl.constexpr, DIMS: tl.constexpr, WIDE: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """p [BLOCK_P], which p are points of the grid, their image and (x, y, z) in normalised input coordinates (z repeats y in 2D)."""
    p = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    ok = p < P
    count = tl.cast(OD, tl.int64) * OH * OW
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
        x, y, z = output(rest - line * OW, OW, ALIGN), output(line - plane * OH, OH, ALIGN), output(plane, OD, ALIGN)
        theta = grid + image.to(tl.int64) * grid_b
        gx = affine_row(theta, ok, grid_c, x, y, z, DIMS)
        gy = affine_row(theta + grid_r, ok, grid_c, x, y, z, DIMS)
        gz = gy
        if DIMS == 3:
            gz = affine_row(theta + 2 * grid_r, ok, grid_c, x, y, z, DIMS)
    else:
        at = grid + point.to(tl.int64) * DIMS
        gx = tl.load(at, mask=ok, other=0).to(tl.float32)
        gy = tl.load(at + 1, mask=ok, other=0).to(tl.float32)
        gz = gy
        if DIMS == 3:
            gz = tl.load(at + 2, mask=ok, other=0).to(tl.float32)
    return p, ok, image.to(tl.int64), gx, gy, gz


@triton.jit
def position(g, extent, ALIGN: tl.constexpr, BORDER: tl.constexpr, TAPS: tl.constexpr):
    """(warp.2), moved into the map when padding is "border"; bicubic moves its taps instead."""
    if ALIGN:
        x = (g + 1) * 0.5 * tl.cast(extent - 1, tl.float32)
    else:
        x = ((g + 1) * tl.cast(extent, tl.float32) - 1) * 0.5
    if BORDER and TAPS != 4:
        x = tl.minimum(tl.maximum(x, 0.0), tl.cast(extent - 1, tl.float32))
    return x


@triton.jit
def near_weight(d):
    return ((-0.75 + 2) * d - (-0.75 + 3)) * d * d + 1


@triton.jit
def far_weight(d):
    return ((-0.75 * d + 5 * 0.75) * d - 8 * 0.75) * d + 4 * 0.75


@triton.jit
def axis_tap(x, extent, k: tl.constexpr, BORDER: tl.constexpr, TAPS: tl.constexpr):
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
            weight = far_weight(t + 1)
        elif k == 1:
            weight = near_weight(t)
        elif k == 2:
            weight = near_weight(1 - t)
        else:
            weight = far_weight(2 - t)
    last = tl.cast(extent - 1, tl.float32)
    if not BORDER:
        weight = tl.where((centre < 0) | (centre > last), 0.0, weight)
    centre = tl.where(centre == centre, centre, 0.0)  # minimum and maximum treat NaN differently when interpreted
    return tl.minimum(tl.maximum(centre, 0.0), last).to(tl.int64), weight


@triton.jit
def tap(
    x, y, z, bad, D, H, W, stride_z, stride_y, stride_x,
    kz: tl.constexpr, ky: tl.constexpr, kx: tl.constexpr, BORDER: tl.constexpr, TAPS: tl.constexpr, DIMS: tl.constexpr,
):  # fmt: skip
    """Offset inside the image and weight of one tap q_k of (warp.3); the weight is NaN where `bad`."""
    iy, weight = axis_tap(y, H, ky, BORDER, TAPS)
    offset = iy * stride_y
    if DIMS == 3:
        iz, wz = axis_tap(z, D, kz, BORDER, TAPS)
        offset += iz * stride_z
        weight = wz * weight
    ix, wx = axis_tap(x, W, kx, BORDER, TAPS)
    return offset + ix * stride_x, tl.where(bad, float("nan"), weight * wx)


@triton.jit
def spread(p, c, LAST: tl.constexpr):
    """Point and channel vectors as a tile [P, C] when channels are last, else [C, P]: the lanes run along the second axis."""
    if LAST:
        return p[:, None], c[None, :]
    else:
        return p[None, :], c[:, None]


@triton.jit
def gather(
    features, stride_c, c, C, ok, x, y, z, bad, D, H, W, stride_z, stride_y, stride_x,
    BORDER: tl.constexpr, TAPS: tl.constexpr, DIMS: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """(warp.3) of one channel block, `features` being each point's image; a tap without weight is not read and passes no NaN."""
    known, channel = spread(ok, c, LAST)
    f = tl.zeros((known & (channel < C)).shape, tl.float32)
    for kz in tl.static_range(TAPS if DIMS == 3 else 1):
        for ky in tl.static_range(TAPS):
            for kx in tl.static_range(TAPS):
                offset, weight = tap(x, y, z, bad, D, H, W, stride_z, stride_y, stride_x, kz, ky, kx, BORDER, TAPS, DIMS)
                at, channel = spread(features + offset, c, LAST)
                w, channel = spread(weight, c, LAST)
                value = tl.load(at + channel.to(tl.int64) * stride_c, mask=known & (w != 0) & (channel < C), other=0)
                f = tl.fma(value.to(tl.float32), tl.broadcast_to(w, f.shape), f)
    return f


class Where(NamedTuple):
    grid: Tensor
    points: Tensor
    strides: tuple[int, int, int, int]  # grid_b, grid_r, grid_c, points_stride


def shared(grid, size, points, mode, align_corners, padding_mode) -> tuple[Where, dict]:
    """Where the points are, and the constants that the kernels share."""
    dims, affine = len(size), grid.ndim == 3
    grid = grid if affine else grid.contiguous()
    strides = grid.stride() if affine else (0, 0, 0)
    where = Where(grid, grid if points is None else points, (*strides, 0 if points is None else points.stride(0)))
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


def volume(values, fill: int) -> tuple[int, int, int]:
    """Sizes or strides of the spatial axes as of three."""
    return (fill,) * (3 - len(values)) + tuple(values)
