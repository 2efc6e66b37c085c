"""Region means in Triton: pixels sorted by region once, then sums of fixed pieces of the sorted order; no atomics, the same bits every time.

Bytes a pixel of C channels: 4 C of features in float32, read once, and about 60 for labels, keys and the radix sort of 16-bit keys (32-bit: twice that).
The alternative without a sort, tiles of pixels against a one-hot matrix on the tensor cores, reads the features once a block of regions, so a second
time from 129 regions or so on; and it multiplies every pixel with 0 for every other region, which lets one NaN reach them all.

Sums are float64: no slower where memory is what takes the time, and a mean is one rounding away from the exact one. A region is cut in pieces of about
the square root of an image's pixels: one region that is the whole image is then summed by as many programs as each of them sums pixels.
Memory beyond the outputs: keys twice and their order (12 to 24 bytes a pixel), the sort's own buffers as much again, 8 C bytes a piece.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from pix2rep_kernels.layout import new_empty
from pix2rep_kernels.triton.warp_points import spread, volume

LEAST = 128  # pixels of a piece
# Of the kernels' arguments: compiled once for every value.
SIZES = ("P", "B", "D", "H", "W", "R", "BR", "ROWS")
OF_LABELS = ("stride_b", "stride_z", "stride_y")  # read one at a time


def piece(pixels: int) -> int:
    """Sorted pixels that one program sums, at most: its partial sum costs little beside them, and no region has many more pieces than that."""
    return max(LEAST, triton.next_power_of_2(math.isqrt(pixels)))


def blocks(channels: int, channels_last: bool) -> tuple[int, int]:
    """(BLOCK_P, BLOCK_C): 16 values a thread of 4 warps, channels-last rows up to 512 bytes of float32; planes keep 16 channels of an image in cache."""
    block_c = min(triton.next_power_of_2(channels), 128 if channels_last else 16)
    return min(2048 // block_c, LEAST), block_c


@triton.jit
def _pixel(p, D, H, W):
    """Image and place (z, y, x) of flat pixel p; there are fewer than 2^31, and 32-bit divisions are several times cheaper."""
    line = p // W
    plane = line // H
    image = plane // D
    return image.to(tl.int64), (plane - image * D).to(tl.int64), (line - plane * H).to(tl.int64), (p - line * W).to(tl.int64)


@triton.jit
def _label(labels, image, z, y, x, ok, R, stride_b, stride_z, stride_y, stride_x):
    """Region of each pixel as int64, and which pixels have one."""
    label = tl.load(labels + image * stride_b + z * stride_z + y * stride_y + x * stride_x, mask=ok, other=0).to(tl.int64)
    return label, ok & (label >= 0) & (label < R)


@triton.jit(do_not_specialize=SIZES + OF_LABELS)
def pool_keys_kernel(labels, keys, P, B, D, H, W, R, stride_b, stride_z, stride_y, stride_x, BLOCK_P: tl.constexpr):
    """image * R + label, B * R for a pixel of no region."""
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    image, z, y, x = _pixel(p, D, H, W)
    label, known = _label(labels, image, z, y, x, p < P, R, stride_b, stride_z, stride_y, stride_x)
    key = tl.where(known, image * R + label, tl.cast(B, tl.int64) * R)
    tl.store(keys + p, key.to(keys.dtype.element_ty), mask=p < P)


@triton.jit(do_not_specialize=SIZES)
def pool_sum_kernel(
    features, order, starts, slots, owners, partials, BR, C, D, H, W, stride_b, stride_c, stride_z, stride_y, stride_x,
    PIECE: tl.constexpr, LAST: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Sum over one piece of a region, BLOCK_P sorted pixels at a time."""
    slot = tl.program_id(0).to(tl.int64)
    region = tl.load(owners + slot) - 1
    if region < BR:
        first = tl.load(starts + region) + (slot - tl.load(slots + region)) * PIECE
        stop = tl.minimum(first + PIECE, tl.load(starts + region + 1))
        c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
        total = tl.zeros([BLOCK_P, BLOCK_C] if LAST else [BLOCK_C, BLOCK_P], tl.float64)
        for i in range(first, stop, BLOCK_P):
            j = i + tl.arange(0, BLOCK_P)
            image, z, y, x = _pixel(tl.load(order + j, mask=j < stop, other=0).to(tl.int32), D, H, W)
            at, channel = spread(features + image * stride_b + z * stride_z + y * stride_y + x * stride_x, c, LAST)
            known, channel = spread(j < stop, c, LAST)
            total += tl.load(at + channel.to(tl.int64) * stride_c, mask=known & (channel < C), other=0).to(tl.float64)
        tl.store(partials + slot * C + c, tl.sum(total, 0 if LAST else 1), mask=c < C)


@triton.jit
def pool_mean_kernel(starts, slots, partials, means, C, PIECE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """(pool.2) of one region from the sums of its pieces."""
    region = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    count = tl.load(starts + region + 1) - tl.load(starts + region)
    slot = tl.load(slots + region)
    stop = slot + (count + PIECE - 1) // PIECE
    total = tl.zeros([BLOCK_P, BLOCK_C], tl.float64)
    for i in range(slot, stop, BLOCK_P):
        j = i + tl.arange(0, BLOCK_P)
        total += tl.load(partials + j[:, None] * C + c[None, :], mask=(j < stop)[:, None] & (c < C)[None, :], other=0)
    mean = tl.sum(total, 0) / tl.maximum(count, 1).to(tl.float64)
    tl.store(means + region * C + c, mean.to(tl.float32), mask=c < C)


@triton.jit(do_not_specialize=SIZES)
def pool_share_kernel(grad, counts, table, ROWS, R, C, stride_b, stride_r, stride_c, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """dmu_r / c_r of (pool.3) in the gradient's dtype, [B, R + 1, C]; the last row of an image is that of no region."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    image = row // (R + 1)
    region = row - image * (R + 1)
    count = tl.load(counts + image * R + region, mask=(row < ROWS) & (region < R), other=0)
    at = grad + (image * stride_b + region * stride_r)[:, None] + c.to(tl.int64)[None, :] * stride_c
    share = tl.load(at, mask=(count > 0)[:, None] & (c < C)[None, :], other=0)
    share = tl.div_rn(share, tl.broadcast_to(tl.maximum(count, 1).to(tl.float32)[:, None], share.shape))
    tl.store(table + row[:, None] * C + c[None, :], share.to(table.dtype.element_ty), mask=(row < ROWS)[:, None] & (c < C)[None, :])


@triton.jit(do_not_specialize=SIZES + OF_LABELS)
def pool_put_kernel(
    table, labels, out, P, C, D, H, W, R, stride_b, stride_z, stride_y, stride_x, LAST: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """(pool.3): each pixel's row of the table; planes are written along the pixels."""
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    image, z, y, x = _pixel(p, D, H, W)
    label, known = _label(labels, image, z, y, x, p < P, R, stride_b, stride_z, stride_y, stride_x)
    row = image * (tl.cast(R, tl.int64) + 1) + tl.where(known, label, R)
    value = tl.load(table + row[:, None] * C + c[None, :], mask=(p < P)[:, None] & (c < C)[None, :], other=0)
    if LAST:
        tl.store(out + p.to(tl.int64)[:, None] * C + c[None, :], value, mask=(p < P)[:, None] & (c < C)[None, :])
    else:
        pixels = tl.cast(D, tl.int64) * H * W
        at = out + (image * (C - 1) * pixels + p)[None, :] + c.to(tl.int64)[:, None] * pixels
        tl.store(at, tl.trans(value), mask=(p < P)[None, :] & (c < C)[:, None])


def forward(features, labels, regions) -> tuple[Tensor, Tensor]:
    """means [B, R, C] float32, counts [B, R] int64."""
    batch, channels, *space = features.shape
    total, pixels = batch * regions, math.prod(space)
    if labels.numel() == 0 or total == 0:
        return features.new_zeros(batch, regions, channels, dtype=torch.float32), labels.new_zeros(batch, regions, dtype=torch.int64)
    sizes, device = volume(space, 1), features.device
    with torch.cuda.device_of(features):
        dtype = next(d for d in (torch.int16, torch.int32, torch.int64) if total <= torch.iinfo(d).max)  # a radix sort takes a pass a byte
        keys = torch.empty(batch * pixels, dtype=dtype, device=device)
        strides = labels.stride()[:1] + volume(labels.stride()[1:], 0)
        pool_keys_kernel[(triton.cdiv(len(keys), 1024),)](labels, keys, len(keys), batch, *sizes, regions, *strides, BLOCK_P=1024)
        keys, order = torch.sort(keys, stable=True)
        every = torch.arange(total + 1, dtype=dtype, device=device)
        starts = torch.searchsorted(keys, every)
        counts = starts.diff().view(batch, regions)
        means = features.new_empty(batch, regions, channels, dtype=torch.float32)
        if channels == 0:
            return means, counts
        # A region's pieces take slots from starts // size + region on: ceil(n / size) of them always fit before those of the next.
        size = piece(pixels)
        slots = starts // size + every
        many = batch * pixels // size + total
        owners = torch.searchsorted(slots, torch.arange(many, device=device), right=True)
        partials = torch.empty(many, channels, dtype=torch.float64, device=device)
        last = features.stride(1) == 1 and channels > 1
        block_p, block_c = blocks(channels, last)
        strides = features.stride()[:2] + volume(features.stride()[2:], 0)
        grid = triton.cdiv(channels, block_c)
        pool_sum_kernel[(many, grid)](
            features, order, starts, slots, owners, partials, total, channels, *sizes, *strides,
            PIECE=size, LAST=last, BLOCK_P=block_p, BLOCK_C=block_c,
        )  # fmt: skip
        pool_mean_kernel[(total, grid)](starts, slots, partials, means, channels, PIECE=size, BLOCK_P=16, BLOCK_C=block_c)
    return means, counts


def backward(grad_means, counts, labels, like, shape, channels_last) -> Tensor:
    """Gradient of features, [B, C, *S]."""
    batch, channels, *space = shape
    regions, pixels = counts.shape[1], math.prod(space)
    grad = new_empty(like, shape, channels_last)
    if grad.numel() == 0:
        return grad
    with torch.cuda.device_of(labels):
        counts = counts.contiguous()
        table = like.new_empty(batch * (regions + 1), channels)
        block_p, block_c = blocks(channels, True)
        pool_share_kernel[(triton.cdiv(len(table), block_p), triton.cdiv(channels, block_c))](
            grad_means, counts, table, len(table), regions, channels, *grad_means.stride(), BLOCK_P=block_p, BLOCK_C=block_c
        )
        last = channels_last or channels == 1
        if not last:
            block_p, block_c = 64, min(triton.next_power_of_2(channels), 32)
        strides = labels.stride()[:1] + volume(labels.stride()[1:], 0)
        pool_put_kernel[(triton.cdiv(batch * pixels, block_p), triton.cdiv(channels, block_c))](
            table, labels, grad, batch * pixels, channels, *volume(space, 1), regions, *strides, LAST=last, BLOCK_P=block_p, BLOCK_C=block_c
        )
    return grad
