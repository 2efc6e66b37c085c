"""Local normalised cross-correlation in Triton: programs walk along the first spatial axis (H of a 2D map, D of a volume), a column of pixels a lane.

A step adds the pixels of the window that lie across the walk, and the parts of the last k steps stay in registers: a pixel costs k (2D) or k^2 (3D)
loads of each map instead of k^2 or k^3. Windows too large for that are summed pixel by pixel. The gradient takes two kernels: A, 2 B, 2 B' and the means
of every window (lncc.5), in five float32 maps (four when one gradient is asked for), then their sums seen from each pixel (lncc.9), nothing scattered.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pix2rep_kernels.triton.lncc_windows import VARYING, at, columns, lncc_windows_kernel, pixel

BLOCK = 128
WARPS = 4
LARGEST_RING = 11  # parts of larger windows do not fit in the registers
LANES = 270336  # that an H200 holds at once


@triton.jit
def _add(window, size, a, b, di, b_j, dj, mean_i, mean_j, mask, BOTH: tl.constexpr):
    """(lncc.9): one more window, seen from (mean_i, mean_j); it weighs nothing where it does not exist."""
    wa = tl.load(window, mask=mask, other=0)
    wb = tl.load(window + size, mask=mask, other=0)
    off_i = mean_i - tl.load(window + 2 * size, mask=mask, other=0)
    off_j = mean_j - tl.load(window + 3 * size, mask=mask, other=0)
    di += wa * off_j + wb * off_i
    if BOTH:
        wb_j = tl.load(window + 4 * size, mask=mask, other=0)
        dj += wa * off_i + wb_j * off_j
        b_j += wb_j
    return a + wa, b + wb, di, b_j, dj


@triton.jit
def _seen(
    weights, ok, z, y, x, L, H, W, size,
    BOTH: tl.constexpr, KZ: tl.constexpr, KY: tl.constexpr, K: tl.constexpr, UNROLLED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The means of the window around (z, y, x), and of the KZ x KY x K windows around it the sums of A and 2 B, dI seen from those means, sum of 2 B', dJ."""
    here = ok & (z >= 0) & (z < L)
    own = weights + tl.cast(z, tl.int64) * H * W
    mean_i, mean_j = tl.load(own + 2 * size, mask=here, other=0), tl.load(own + 3 * size, mask=here, other=0)
    zero = tl.zeros([BLOCK], tl.float32)
    a, b, di, b_j, dj = zero, zero, zero, zero, zero
    for row in range(KZ * KY):
        dz, dy = row // KY - KZ // 2, row % KY - KY // 2
        inside = ok & (z + dz >= 0) & (z + dz < L) & (y + dy >= 0) & (y + dy < H)
        first = weights + (tl.cast(z + dz, tl.int64) * H + dy) * W - K // 2
        # By itself: fewer roundings than one long sum.
        row_a, row_b, row_di, row_b_j, row_dj = zero, zero, zero, zero, zero
        if UNROLLED:
            for t in tl.static_range(K):
                mask = inside & (x + (t - K // 2) >= 0) & (x + (t - K // 2) < W)
                row_a, row_b, row_di, row_b_j, row_dj = _add(first + t, size, row_a, row_b, row_di, row_b_j, row_dj, mean_i, mean_j, mask, BOTH)
        else:
            for t in range(K):
                mask = inside & (x + (t - K // 2) >= 0) & (x + (t - K // 2) < W)
                row_a, row_b, row_di, row_b_j, row_dj = _add(first + t, size, row_a, row_b, row_di, row_b_j, row_dj, mean_i, mean_j, mask, BOTH)
        a, b, di, b_j, dj = a + row_a, b + row_b, di + row_di, b_j + row_b_j, dj + row_dj
    return mean_i, mean_j, a, b, di, b_j, dj


@triton.jit(do_not_specialize=VARYING)
def lncc_sums_kernel(
    weights, i, j, grad_i, grad_j, C, L, H, W, N, i_b, i_c, i_z, i_y, i_x, j_b, j_c, j_z, j_y, j_x,
    BOTH: tl.constexpr, K: tl.constexpr, KY: tl.constexpr, RING: tl.constexpr, UNROLLED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dI, and with BOTH dJ, by (lncc.9): the sums of each step are seen from the mean in its middle, and then from the pixel."""
    P = tl.cast(H, tl.int64) * W
    start, ok, place, image, channel, y, x = columns(P, W, C, L, N, CHUNK, BLOCK)
    i = at(i, image, channel, y, x, i_b, i_c, i_y, i_x)
    j = at(j, image, channel, y, x, j_b, j_c, j_y, j_x)
    KZ: tl.constexpr = K // RING
    FEW: tl.constexpr = 7 if BOTH else 5
    size = tl.cast(N, tl.int64) * L
    ring = (tl.zeros([BLOCK], tl.float32),) * (FEW * RING)
    for step in range(tl.minimum(L - start, CHUNK) + RING - 1):
        z = start + step - RING // 2
        ring = ring[FEW:] + _seen(weights + place, ok, z, y, x, L, H, W, size, BOTH, KZ, KY, K, UNROLLED, BLOCK)[:FEW]
        centre = z - RING // 2
        if centre >= start:
            pixel_i, pixel_j = pixel(i, ok, centre, L, i_z), pixel(j, ok, centre, L, j_z)
            di = tl.zeros([BLOCK], tl.float32)
            dj = di
            for t in tl.static_range(RING):
                off_i = pixel_i - ring[t * FEW]
                off_j = pixel_j - ring[t * FEW + 1]
                di += ring[t * FEW + 2] * off_j + ring[t * FEW + 3] * off_i + ring[t * FEW + 4]
                if BOTH:
                    dj += ring[t * FEW + 2] * off_i + ring[t * FEW + 5] * off_j + ring[t * FEW + 6]
            to = place + centre * P
            tl.store(grad_i + to, di.to(grad_i.dtype.element_ty), mask=ok)
            if BOTH:
                tl.store(grad_j + to, dj.to(grad_j.dtype.element_ty), mask=ok)


def _walk(i, window) -> tuple[tuple, dict, int]:
    """C, L, H, W, N as the kernels name them, their constants, and the number of programs."""
    batch, channels, length, *plane = i.shape
    height, width = plane if len(plane) == 2 else (1, *plane)
    lanes = batch * channels * height * width
    ring = window if window <= LARGEST_RING else 1
    # Every program walks ring - 1 steps more than it owns: long walks, while there are programs enough.
    chunk = 8
    while chunk < 64 and 2 * chunk <= length and lanes * length > 2 * chunk * LANES:
        chunk *= 2
    options = {
        "K": window, "KY": window if len(plane) == 2 else 1, "RING": ring, "UNROLLED": window <= LARGEST_RING, "CHUNK": chunk, "BLOCK": BLOCK,
        "num_warps": WARPS,
    }  # fmt: skip
    return (channels, length, height, width, lanes), options, triton.cdiv(lanes, BLOCK) * triton.cdiv(length, chunk)


def _strides(x: Tensor) -> tuple[int, ...]:
    """b, c, z, y, x."""
    strides = x.stride()
    return strides if x.ndim == 5 else (*strides[:3], 0, strides[3])


def forward(i, j, window, eps) -> Tensor:
    """cc [B, C, *S], float32."""
    cc = i.new_empty(i.shape, dtype=torch.float32)
    if cc.numel() == 0:
        return cc
    sizes, options, programs = _walk(i, window)
    with torch.cuda.device_of(i):
        lncc_windows_kernel[(programs,)](
            i, j, i, cc, eps, *sizes, *_strides(i), *_strides(j), *_strides(i), WEIGHTS=False, BOTH=False, **options
        )  # fmt: skip
    return cc


def backward(grad_cc, i, j, window, eps, need_i, need_j) -> tuple[Tensor, Tensor]:
    """Gradients of i and j; [0] where one is not needed."""
    grad_i, grad_j = (x.new_empty(x.shape if need else (0,)) for x, need in ((i, need_i), (j, need_j)))
    if i.numel() == 0 or not (need_i or need_j):
        return grad_i, grad_j
    both = need_i and need_j
    (x, grad_x), (y, grad_y) = ((i, grad_i), (j, grad_j)) if need_i else ((j, grad_j), (i, grad_i))
    sizes, options, programs = _walk(i, window)
    weights = i.new_empty((5 if both else 4, *i.shape), dtype=torch.float32)
    with torch.cuda.device_of(i):
        lncc_windows_kernel[(programs,)](
            x, y, grad_cc, weights, eps, *sizes, *_strides(x), *_strides(y), *_strides(grad_cc), WEIGHTS=True, BOTH=both, **options
        )  # fmt: skip
        lncc_sums_kernel[(programs,)](weights, x, y, grad_x, grad_y, *sizes, *_strides(x), *_strides(y), BOTH=both, **options)
    return grad_i, grad_j
