"""The windows of lncc in Triton, (lncc.1-5): a program takes a block of columns and walks along the first spatial axis.

A lane is one column of pixels, z its index along the axis that is walked, (y, x) its place in the plane across it (y = 0 in 2D).
"""

import triton
import triton.language as tl


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
    p = (n - channel * P).to(tl.int32)
    place = channel * L * P + p
    image = channel // C
    y = p // W
    return start, ok, place, image, channel - image * C, y, p - y * W


@triton.jit
def at(x, image, channel, row, column, stride_b, stride_c, stride_y, stride_x):
    return x + image * stride_b + channel * stride_c + row.to(tl.int64) * stride_y + column.to(tl.int64) * stride_x


@triton.jit
def pixel(x, ok, z, L, stride):
    """Pixels of plane z, 0 outside the image."""
    return tl.load(x + tl.cast(z, tl.int64) * stride, mask=ok & (z >= 0) & (z < L), other=0).to(tl.float32)


@triton.jit
def _row(i, j, i0, j0, inside, x, W, i_x, j_x, K: tl.constexpr):
    """(lncc.8) of the K pixels around x, less the pivot (i0, j0): means, centred sums II, JJ, IJ."""
    di = tl.zeros_like(i0)
    dj, dii, djj, dij = di, di, di, di
    for column in range(K):
        dx = column - K // 2
        mask = inside & (x + dx >= 0) & (x + dx < W)
        pi = tl.load(i + tl.cast(dx, tl.int64) * i_x, mask=mask, other=0).to(tl.float32) - i0
        pj = tl.load(j + tl.cast(dx, tl.int64) * j_x, mask=mask, other=0).to(tl.float32) - j0
        di += pi
        dj += pj
        dii += pi * pi
        djj += pj * pj
        dij += pi * pj
    n: tl.constexpr = 1.0 / K
    return di * n, dj * n, dii - di * di * n, djj - dj * dj * n, dij - di * dj * n


@triton.jit
def _part(
    i, j, ok, z, y, x, L, H, W, i_z, i_y, i_x, j_z, j_y, j_x,
    KZ: tl.constexpr, KY: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """(lncc.8) of the KZ x KY x K pixels around (z, y, x), that pixel being the pivot: means, centred sums II, JJ, IJ."""
    i0, j0 = pixel(i, ok, z, L, i_z), pixel(j, ok, z, L, j_z)
    if KZ * KY == 1:
        di, dj, v, w, c = _row(i + tl.cast(z, tl.int64) * i_z, j + tl.cast(z, tl.int64) * j_z, i0, j0, ok & (z >= 0) & (z < L), x, W, i_x, j_x, K)
        return i0 + di, j0 + dj, v, w, c
    else:
        di = tl.zeros_like(i0)
        dj, dii, djj, dij, v, w, c = di, di, di, di, di, di, di
        for row in range(KZ * KY):
            dz, dy = row // KY - KZ // 2, row % KY - KY // 2
            inside = ok & (z + dz >= 0) & (z + dz < L) & (y + dy >= 0) & (y + dy < H)
            i_row = i + tl.cast(z + dz, tl.int64) * i_z + tl.cast(dy, tl.int64) * i_y
            j_row = j + tl.cast(z + dz, tl.int64) * j_z + tl.cast(dy, tl.int64) * j_y
            # The row's own pixel is nearer to it than the pivot is.
            own_i, own_j = tl.load(i_row, mask=inside, other=0).to(tl.float32), tl.load(j_row, mask=inside, other=0).to(tl.float32)
            pi, pj, row_v, row_w, row_c = _row(i_row, j_row, own_i, own_j, inside, x, W, i_x, j_x, K)
            pi += own_i - i0
            pj += own_j - j0
            di += pi
            dj += pj
            dii += pi * pi
            djj += pj * pj
            dij += pi * pj
            v += row_v
            w += row_w
            c += row_c
        n: tl.constexpr = 1.0 / (KZ * KY)
        return i0 + di * n, j0 + dj * n, v + K * (dii - di * di * n), w + K * (djj - dj * dj * n), c + K * (dij - di * dj * n)


@triton.jit
def _merged(ring, COUNT: tl.constexpr, K: tl.constexpr):
    """(lncc.8) of the K parts in the ring, each of COUNT pixels; the part in the middle is the pivot."""
    i0, j0 = ring[K // 2 * 5], ring[K // 2 * 5 + 1]
    di = tl.zeros_like(i0)
    dj, dii, djj, dij, ii, jj, ij = di, di, di, di, di, di, di
    for t in tl.static_range(K):
        pi = ring[t * 5] - i0
        pj = ring[t * 5 + 1] - j0
        di += pi
        dj += pj
        dii += pi * pi
        djj += pj * pj
        dij += pi * pj
        ii += ring[t * 5 + 2]
        jj += ring[t * 5 + 3]
        ij += ring[t * 5 + 4]
    n: tl.constexpr = 1.0 / K
    return i0 + di * n, j0 + dj * n, ii + COUNT * (dii - di * di * n), jj + COUNT * (djj - dj * dj * n), ij + COUNT * (dij - di * dj * n)


@triton.jit
def _clamped(x, eps):
    """max(x, eps); NaN stays."""
    return tl.where(x <= eps, eps, x)


@triton.jit
def lncc_windows_kernel(
    i, j, grad_cc, out, eps, C, L, H, W, N, i_b, i_c, i_z, i_y, i_x, j_b, j_c, j_z, j_y, j_x, g_b, g_c, g_z, g_y, g_x,
    WEIGHTS: tl.constexpr, BOTH: tl.constexpr, K: tl.constexpr, KY: tl.constexpr, RING: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """cc (lncc.4); or with WEIGHTS the maps A, 2 B, mean I, mean J and with BOTH 2 B' of every window (lncc.5), one after the other."""
    P = H * W
    start, ok, place, image, channel, y, x = columns(P, W, C, L, N, CHUNK, BLOCK)
    i = at(i, image, channel, y, x, i_b, i_c, i_y, i_x)
    j = at(j, image, channel, y, x, j_b, j_c, j_y, j_x)
    g = at(grad_cc, image, channel, y, x, g_b, g_c, g_y, g_x)
    KZ: tl.constexpr = K // RING
    size = tl.cast(N, tl.int64) * L
    ring = (tl.zeros([BLOCK], tl.float32),) * (5 * RING)
    for step in range(tl.minimum(L - start, CHUNK) + RING - 1):
        z = start + step - RING // 2
        ring = ring[5:] + _part(i, j, ok, z, y, x, L, H, W, i_z, i_y, i_x, j_z, j_y, j_x, KZ, KY, K)
        centre = z - RING // 2
        if centre >= start:
            mean_i, mean_j, v, w, c = _merged(ring, KZ * KY * K, RING)
            to = out + place + tl.cast(centre, tl.int64) * P
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
