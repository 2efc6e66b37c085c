"""Two maps at corresponding warped positions in Triton: a program takes a block of points through all channels; no warped row is stored by default.

The backward gathers both rows again and scatters their gradients by float32 atomics. Under `torch.use_deterministic_algorithms` it writes the row gradients
of one map at a time, float32 [P, C], and sums them in warp's sorted order.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from pix2rep_kernels.triton.warp_backward import ordered, scatter
from pix2rep_kernels.triton.warp_points import VARYING, blocks, gather, locate, position, shared, spread, volume


@triton.jit
def _place(
    grid, grid_b, grid_r, grid_c, P, B, OD, OH, OW, D, H, W,
    AFFINE: tl.constexpr, ALIGN: tl.constexpr, BORDER: tl.constexpr, TAPS: tl.constexpr, DIMS: tl.constexpr, WIDE: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Points p, which exist, their image, position (x, y, z) in the map, whether that is NaN, whether it lies inside."""
    p, ok, image, gx, gy, gz = locate(grid, 0, grid, grid_b, grid_r, grid_c, P, B, OD, OH, OW, AFFINE, ALIGN, False, DIMS, WIDE, BLOCK_P)
    inside = (tl.abs(gx) <= 1) & (tl.abs(gy) <= 1) & (tl.abs(gz) <= 1)
    bad = (gx != gx) | (gy != gy) | (gz != gz)
    x, y, z = position(gx, W, ALIGN, BORDER, TAPS), position(gy, H, ALIGN, BORDER, TAPS), position(gz, D, ALIGN, BORDER, TAPS)
    return p, ok, image, x, y, z, bad, inside


@triton.jit(do_not_specialize=VARYING)
def align_forward_kernel(
    f1, f2, grid1, grid2, dot, sq1, sq2, valid, P, B, C, OD, OH, OW, D1, H1, W1, D2, H2, W2,
    b1, c1, z1, y1, x1, b2, c2, z2, y2, x2, grid1_b, grid1_r, grid1_c, grid2_b, grid2_r, grid2_c,
    AFFINE_1: tl.constexpr, AFFINE_2: tl.constexpr, ALIGN: tl.constexpr, BORDER: tl.constexpr, TAPS: tl.constexpr, DIMS: tl.constexpr,
    WIDE: tl.constexpr, LAST: tl.constexpr, LOOP: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """(align.1-2)"""
    p, ok, image, px1, py1, pz1, bad1, inside1 = _place(
        grid1, grid1_b, grid1_r, grid1_c, P, B, OD, OH, OW, D1, H1, W1, AFFINE_1, ALIGN, BORDER, TAPS, DIMS, WIDE, BLOCK_P
    )
    p, ok, image, px2, py2, pz2, bad2, inside2 = _place(
        grid2, grid2_b, grid2_r, grid2_c, P, B, OD, OH, OW, D2, H2, W2, AFFINE_2, ALIGN, BORDER, TAPS, DIMS, WIDE, BLOCK_P
    )
    tl.store(valid + p, inside1 & inside2, mask=ok)
    from1, from2 = f1 + image * b1, f2 + image * b2
    across = tl.zeros([BLOCK_P], tl.float32)
    own1 = tl.zeros([BLOCK_P], tl.float32)
    own2 = tl.zeros([BLOCK_P], tl.float32)
    for c0 in range(0, C if LOOP else 1, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)
        q = gather(from1, c1, c, C, ok, px1, py1, pz1, bad1, D1, H1, W1, z1, y1, x1, BORDER, TAPS, DIMS, LAST)
        z = gather(from2, c2, c, C, ok, px2, py2, pz2, bad2, D2, H2, W2, z2, y2, x2, BORDER, TAPS, DIMS, LAST)
        across += tl.sum(q * z, 1 if LAST else 0)
        own1 += tl.sum(q * q, 1 if LAST else 0)
        own2 += tl.sum(z * z, 1 if LAST else 0)
    tl.store(dot + p, across, mask=ok)
    tl.store(sq1 + p, own1, mask=ok)
    tl.store(sq2 + p, own2, mask=ok)


@triton.jit(do_not_specialize=VARYING)
def align_backward_kernel(
    grad_dot, grad_sq1, grad_sq2, f1, f2, grid1, grid2, grad1, grad2, P, B, C, OD, OH, OW, D1, H1, W1, D2, H2, W2,
    b1, c1, z1, y1, x1, b2, c2, z2, y2, x2, grid1_b, grid1_r, grid1_c, grid2_b, grid2_r, grid2_c, to_b1, to_c1, to_z1, to_y1, to_x1,
    to_b2, to_c2, to_z2, to_y2, to_x2,
    AFFINE_1: tl.constexpr, AFFINE_2: tl.constexpr, ALIGN: tl.constexpr, BORDER: tl.constexpr, TAPS: tl.constexpr, DIMS: tl.constexpr,
    WIDE: tl.constexpr, LAST: tl.constexpr, NEED_1: tl.constexpr, NEED_2: tl.constexpr, ROWS: tl.constexpr,
    LOOP: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """(align.3-4) by atomics, or with ROWS (align.3) alone: dq into grad1 [P, C]."""
    p, ok, image, px1, py1, pz1, bad1, inside1 = _place(
        grid1, grid1_b, grid1_r, grid1_c, P, B, OD, OH, OW, D1, H1, W1, AFFINE_1, ALIGN, BORDER, TAPS, DIMS, WIDE, BLOCK_P
    )
    p, ok, image, px2, py2, pz2, bad2, inside2 = _place(
        grid2, grid2_b, grid2_r, grid2_c, P, B, OD, OH, OW, D2, H2, W2, AFFINE_2, ALIGN, BORDER, TAPS, DIMS, WIDE, BLOCK_P
    )
    from1, from2 = f1 + image * b1, f2 + image * b2
    across = tl.load(grad_dot + p, mask=ok, other=0)
    own1 = 2 * tl.load(grad_sq1 + p, mask=ok, other=0)
    own2 = 2 * tl.load(grad_sq2 + p, mask=ok, other=0)
    for c0 in range(0, C if LOOP else 1, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)
        q = gather(from1, c1, c, C, ok, px1, py1, pz1, bad1, D1, H1, W1, z1, y1, x1, BORDER, TAPS, DIMS, LAST)
        z = gather(from2, c2, c, C, ok, px2, py2, pz2, bad2, D2, H2, W2, z2, y2, x2, BORDER, TAPS, DIMS, LAST)
        w, channel = spread(across, c, LAST)
        if NEED_1:
            own, channel = spread(own1, c, LAST)
            dq = w * z + own * q
            if ROWS:
                known, channel = spread(ok, c, LAST)
                row, channel = spread(p * C, c, LAST)
                tl.store(grad1 + row + channel, dq, mask=known & (channel < C))
            else:
                scatter(grad1 + image * to_b1, to_c1, c, C, ok, px1, py1, pz1, bad1, D1, H1, W1, to_z1, to_y1, to_x1, dq, BORDER, TAPS, DIMS, LAST)
        if NEED_2:
            own, channel = spread(own2, c, LAST)
            dz = w * q + own * z
            scatter(grad2 + image * to_b2, to_c2, c, C, ok, px2, py2, pz2, bad2, D2, H2, W2, to_z2, to_y2, to_x2, dz, BORDER, TAPS, DIMS, LAST)


def _blocks(channels: int, last: bool, taps: int) -> tuple[int, int, int]:
    """(BLOCK_P, BLOCK_C, num_warps) for the values of two maps; a trilinear tap of rows that are not aligned needs an address a value, half as many fit."""
    block_p, block_c, warps = blocks(channels, last, taps, backward=True)
    return (block_p // 2 if last and taps == 8 and channels % 16 else block_p), block_c, warps


def _launch(kernel, before, f1, f2, grid1, grid2, after, size, mode, align_corners, padding_mode, strides=(), **options):
    """One program a block of points, over the arguments that both kernels share."""
    batch, channels, *space1 = f1.shape
    count = batch * math.prod(size)
    where1, shared1 = shared(grid1, size, None, mode, align_corners, padding_mode)
    where2, shared2 = shared(grid2, size, None, mode, align_corners, padding_mode)
    constants = {name: shared1[name] for name in ("ALIGN", "BORDER", "TAPS", "DIMS", "WIDE")}
    last = channels > 1 and f1.stride(1) == 1 and f2.stride(1) == 1
    block_p, block_c, warps = _blocks(channels, last, constants["TAPS"] ** len(space1))
    with torch.cuda.device_of(f1):
        kernel[(triton.cdiv(count, block_p),)](
            *before, f1, f2, where1.grid, where2.grid, *after, count, batch, channels, *volume(size, 1), *volume(space1, 1), *volume(f2.shape[2:], 1),
            *_strides(f1), *_strides(f2), *where1.strides[:3], *where2.strides[:3], *strides,
            AFFINE_1=shared1["AFFINE"], AFFINE_2=shared2["AFFINE"], **constants, LAST=last, LOOP=channels > block_c, **options,
            BLOCK_P=block_p, BLOCK_C=block_c, num_warps=warps, enable_fp_fusion=False,
        )  # fmt: skip


def _strides(tensor) -> tuple[int, ...]:
    return *tensor.stride()[:2], *volume(tensor.stride()[2:], 0)


def forward(f1, f2, grid1, grid2, size, mode, align_corners, padding_mode) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dot, sq1, sq2, valid [B, *M]."""
    shape = (f1.shape[0], *size)
    sums = [f1.new_empty(shape, dtype=torch.float32) for _ in range(3)]
    valid = f1.new_empty(shape, dtype=torch.bool)
    if valid.numel():
        _launch(align_forward_kernel, (), f1, f2, grid1, grid2, (*sums, valid), size, mode, align_corners, padding_mode)
    return *sums, valid


def backward(
    grad_dot, grad_sq1, grad_sq2, f1, f2, grid1, grid2, size, mode, align_corners, padding_mode, need_1, need_2, channels_last_1, channels_last_2
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of f1 and f2; [0] where one is not needed."""
    upstream = [g.contiguous() for g in (grad_dot, grad_sq1, grad_sq2)]
    options = (size, mode, align_corners, padding_mode)
    run = _ordered if torch.are_deterministic_algorithms_enabled() else _atomic
    return run(upstream, (f1, f2), (grid1, grid2), options, (need_1, need_2), (channels_last_1, channels_last_2))


def _atomic(upstream, maps, grids, options, needs, lasts):
    grads = []
    for f, need, last in zip(maps, needs, lasts, strict=True):
        batch, channels, *space = f.shape
        memory = f.new_zeros(((batch, *space, channels) if last else f.shape) if need else 0, dtype=torch.float32)
        grads.append(memory.movedim(-1, 1) if need and last else memory)
    if any(needs) and upstream[0].numel():
        strides = [s for grad, need in zip(grads, needs, strict=True) for s in (_strides(grad) if need else (0,) * 5)]
        _launch(align_backward_kernel, upstream, *maps, *grids, grads, *options, strides, NEED_1=needs[0], NEED_2=needs[1], ROWS=False)
    return tuple(grad.to(f.dtype) for grad, f in zip(grads, maps, strict=True))


def _ordered(upstream, maps, grids, options, needs, lasts):
    """The row gradients of one map at a time in scratch memory, then sums over the taps of each pixel in sorted order."""
    dot, sq1, sq2 = upstream
    size, mode, align_corners, padding_mode = options
    grads = []
    for i, f in enumerate(maps):
        if not needs[i]:
            grads.append(f.new_empty(0))
            continue
        rows = f.new_empty(dot.numel(), f.shape[1], dtype=torch.float32)
        if rows.numel():  # the equations are the same with the maps exchanged
            own, other = ((dot, sq1, sq2), (dot, sq2, sq1))[i], 1 - i
            _launch(
                align_backward_kernel, own, f, maps[other], grids[i], grids[other], (rows, rows), *options, (0,) * 10, NEED_1=True, NEED_2=False, ROWS=True
            )  # fmt: skip
        where, shared_options = shared(grids[i], size, None, mode, align_corners, padding_mode)
        with torch.cuda.device_of(f):
            grad = ordered(rows, rows, rows.new_empty(0), where, shared_options, volume(size, 1), False, tuple(f.shape), lasts[i]).to(f.dtype)
        grads.append(grad if lasts[i] else grad.contiguous())
    return tuple(grads)
