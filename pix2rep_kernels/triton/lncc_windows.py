"""The windows of lncc in Triton, (lncc.1-5): a program takes a block of columns and walks along the first spatial axis.

A lane is one column of pixels, z its index along the axis that is walked, (y, x) its place in the plane across it (y = 0 in 2D).
"""

import triton
import triton.language as tl

# Of the kernels' arguments: compiled once for every value. A lane loads single pixels, to which only the stride along x matters.
VARYING = ("C", "L", "H", "W", "N", *(f"{name}_{axis}" for name in "ijg" for axis in "bczy"))


@triton.jit
def columns(P, W, C, L, N, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """First z of the program; of each lane whether it exists, its first place in a contiguous map, image, channel, y, x."""
    chunks = tl.cdiv(L, CHUNK)
    block = tl.program_id(0) // chunks
    start = (tl.program_id(0) - block * chunks) * CHUNK
    n = tl.cast(block, tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ok = n < N
    n = tl.where(ok, n, 0)
    channel = n // P
    p = n - channel * P
    place = channel * L * P + p
    image = channel // C
    y = p // W
    return start, ok, place, image, channel - image * C, y.to(tl.int32), (p - y * W).to(tl.int32)


@triton.jit
def at(x, image, channel, row, column, stride_b, stride_c, stride_y, stride_x):
    return x + image * stride_b + channel * stride_c + row.to(tl.int64) * stride_y + column.to(tl.int64) * stride_x


@triton.jit
def pixel(x, ok, z, L, stride):
    """Pixels of plane z, 0 outside the image."""
    return tl.load(x + tl.cast(z, tl.int64) * stride, mask=ok & (z >= 0) & (z < L), other=0).to(tl.float32)


@triton.jit
def _merge(mean_i, mean_j, v, w, c, i, j, step, weight):
    """(lncc.8): one more part of means i and j, whose centred sums v, w and c hold already."""
    i -= mean_i
    j -= mean_j
    return mean_i + i * step, mean_j + j * step, v + weight * (i * i), w + weight * (j * j), c + weight * (i * j)


@triton.jit
def _pixels(i, j, mean_i, mean_j, v, w, c, inside, x, W, i_x, j_x, t, step, weight, K: tl.constexpr):
    """Pixel t of a row of K around x."""
    dx = t - K // 2
    mask = inside & (x + dx >= 0) & (x + dx < W)
    i = tl.load(i + tl.cast(dx, tl.int64) * i_x, mask=mask, other=0).to(tl.float32)
    j = tl.load(j + tl.cast(dx, tl.int64) * j_x, mask=mask, other=0).to(tl.float32)
    return _merge(mean_i, mean_j, v, w, c, i, j, step, weight)


@triton.jit
def _row(i, j, inside, x, W, i_x, j_x, K: tl.constexpr, UNROLLED: tl.constexpr, BLOCK: tl.constexpr):
    """(lncc.8) of the K pixels around x: means, centred sums II, JJ, IJ."""
    mean_i = tl.zeros([BLOCK], tl.float32)
    mean_j, v, w, c = mean_i, mean_i, mean_i, mean_i
    if UNROLLED:
        for t in tl.static_range(K):
            mean_i, mean_j, v, w, c = _pixels(i, j, mean_i, mean_j, v, w, c, inside, x, W, i_x, j_x, t, 1.0 / (t + 1), t / (t + 1.0), K)
    else:
        for t in range(K):
            step = 1.0 / (t + 1)
            mean_i, mean_j, v, w, c = _pixels(i, j, mean_i, mean_j, v, w, c, inside, x, W, i_x, j_x, t, step, t * step, K)
    return mean_i, mean_j, v, w, c


@triton.jit
def _part(
    i, j, ok, z, y, x, L, H, W, i_z, i_y, i_x, j_z, j_y, j_x,
    KZ: tl.constexpr, KY: tl.constexpr, K: tl.constexpr, UNROLLED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """(lncc.8) of the KZ x KY x K pixels around (z, y, x): means, centred sums II, JJ, IJ."""
    if KZ * KY == 1:
        here = ok & (z >= 0) & (z < L)
        return _row(i + tl.cast(z, tl.int64) * i_z, j + tl.cast(z, tl.int64) * j_z, here, x, W, i_x, j_x, K, UNROLLED, BLOCK)
    else:
        mean_i = tl.zeros([BLOCK], tl.float32)
        mean_j, v, w, c = mean_i, mean_i, mean_i, mean_i
        for row in range(KZ * KY):
            dz, dy = row // KY - KZ // 2, row % KY - KY // 2
            inside = ok & (z + dz >= 0) & (z + dz < L) & (y + dy >= 0) & (y + dy < H)
            i_row = i + tl.cast(z + dz, tl.int64) * i_z + tl.cast(dy, tl.int64) * i_y
            j_row = j + tl.cast(z + dz, tl.int64) * j_z + tl.cast(dy, tl.int64) * j_y
            row_i, row_j, row_v, row_w, row_c = _row(i_row, j_row, inside, x, W, i_x, j_x, K, UNROLLED, BLOCK)
            step = 1.0 / (row + 1)
            mean_i, mean_j, v, w, c = _merge(mean_i, mean_j, v + row_v, w + row_w, c + row_c, row_i, row_j, step, K * row * step)
        return mean_i, mean_j, v, w, c


@triton.jit
def _merged(ring, COUNT: tl.constexpr, K: tl.constexpr):
    """(lncc.8) of the K parts in the ring, each of COUNT pixels."""
    mean_i, mean_j, v, w, c = ring[0], ring[1], ring[2], ring[3], ring[4]
    for t in tl.static_range(1, K):
        v += ring[t * 5 + 2]
        w += ring[t * 5 + 3]
        c += ring[t * 5 + 4]
        mean_i, mean_j, v, w, c = _merge(mean_i, mean_j, v, w, c, ring[t * 5], ring[t * 5 + 1], 1.0 / (t + 1), COUNT * t / (t + 1.0))
    lost_i, lost_j = v - v, w - w  # NaN where the sums were infinite, as the differences in (lncc.2-3) would be
    return mean_i, mean_j, v + lost_i, w + lost_j, c + (lost_i + lost_j)


@triton.jit
def _clamped(x, eps):
    """max(x, eps); NaN stays."""
    return tl.where(x <= eps, eps, x)


@triton.jit(do_not_specialize=VARYING)
def lncc_windows_kernel(
    i, j, grad_cc, out, eps, C, L, H, W, N, i_b, i_c, i_z, i_y, i_x, j_b, j_c, j_z, j_y, j_x, g_b, g_c, g_z, g_y, g_x,
    WEIGHTS: tl.constexpr, BOTH: tl.constexpr, K: tl.constexpr, KY: tl.constexpr, RING: tl.constexpr, UNROLLED: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """cc (lncc.4); or with WEIGHTS the maps A, 2 B, mean I, mean J and with BOTH 2 B' of every window (lncc.5), one after the other."""
    P = tl.cast(H, tl.int64) * W
    start, ok, place, image, channel, y, x = columns(P, W, C, L, N, CHUNK, BLOCK)
    i = at(i, image, channel, y, x, i_b, i_c, i_y, i_x)
    j = at(j, image, channel, y, x, j_b, j_c, j_y, j_x)
    g = at(grad_cc, image, channel, y, x, g_b, g_c, g_y, g_x)
    KZ: tl.constexpr = K // RING
    size = tl.cast(N, tl.int64) * L
    ring = (tl.zeros([BLOCK], tl.float32),) * (5 * RING)
    for step in range(tl.minimum(L - start, CHUNK) + RING - 1):
        z = start + step - RING // 2
        ring = ring[5:] + _part(i, j, ok, z, y, x, L, H, W, i_z, i_y, i_x, j_z, j_y, j_x, KZ, KY, K, UNROLLED, BLOCK)
        centre = z - RING // 2
        if centre >= start:
            mean_i, mean_j, v, w, c = _merged(ring, KZ * KY * K, RING)
            to = out + place + centre * P
            top, by_i, by_j = _clamped(c, eps), _clamped(v, eps), _clamped(w, eps)
            if WEIGHTS:
                cc = (top / by_i) * (top / by_j) * (2 * pixel(g, ok, centre, L, g_z))
                tl.store(to, tl.where(c <= eps, 0.0, cc / top), mask=ok)
                tl.store(to + size, tl.where(v <= eps, 0.0, -cc / by_i), mask=ok)
                tl.store(to + 2 * size, mean_i, mask=ok)
                tl.store(to + 3 * size, mean_j, mask=ok)
                if BOTH:
                    tl.store(to + 4 * size, tl.where(w <= eps, 0.0, -cc / by_j), mask=ok)
            else:
                tl.store(to, tl.div_rn(top, by_i) * tl.div_rn(top, by_j), mask=ok)  # exactly 1 where all three are clamped
