"""Pivots, and moments about them (crosscorr.1-5): one sweep of the rows, split into ranges whose sums a second kernel adds in order."""

import torch
import triton
import triton.language as tl

from pix2rep_kernels.triton.crosscorr_blocks import VARYING, even, format_of, product_blocks, scattered, splits_of
from pix2rep_kernels.triton.tiles import add_product

PILOT_ROWS = 128
ADDED = 1024  # numbers that a program adds over the ranges


@triton.jit(do_not_specialize=VARYING)
def crosscorr_pivot_kernel(
    x_ptr, weight_ptr, pivot_ptr, n, d, row_stride, column_stride, weight_stride, WEIGHTED: tl.constexpr, PILOTS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Mean of the pilot rows that take part, in the dtype of x; 0 when none does."""
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    pilot = tl.arange(0, PILOTS)
    step = tl.cast(tl.maximum(n // PILOTS, 1), tl.int64)
    row = pilot * step + (((pilot * 40503) & 0xFFFF) * step >> 16)
    keep = pilot < n
    if WEIGHTED:
        keep = keep & (tl.load(weight_ptr + row * weight_stride, mask=keep, other=0.0) != 0)
    wanted = keep[:, None] & (columns < d)[None, :]
    x = tl.load(x_ptr + row[:, None] * row_stride + columns.to(tl.int64)[None, :] * column_stride, mask=wanted, other=0.0).to(tl.float32)
    mean = tl.sum(x, 0) / tl.maximum(tl.sum(keep.to(tl.float32), 0), 1.0)
    tl.store(pivot_ptr + columns, mean.to(x_ptr.dtype.element_ty).to(tl.float32), mask=columns < d)


@triton.jit
def power_of_two(pointer):
    """The power of two at or below a number from memory, within 2^-100 and 2^100; 1 where there is none."""
    bits = tl.load(pointer).to(tl.int32, bitcast=True) & 0x7F800000
    bits = tl.where(bits == 0x7F800000, 0x3F800000, tl.minimum(tl.maximum(bits, 27 << 23), 227 << 23))
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def features_of(pointer, first, row_stride, column_stride, columns, present, inside, ROWS: tl.constexpr, EVEN: tl.constexpr):
    """A block of rows as it is stored. EVEN: all features are inside. Rows left out by their weight are read too: a mask without pattern would break up
    loads along the rows."""
    pointer += tl.cast(first, tl.int64) * row_stride
    offsets = tl.arange(0, ROWS).to(tl.int64)[:, None] * row_stride + columns.to(tl.int64)[None, :] * column_stride
    return tl.load(pointer + offsets, mask=present[:, None] if EVEN else present[:, None] & inside[None, :], other=0.0)


@triton.jit
def shifted(x, pivot, keep, inside, EVEN: tl.constexpr):
    """x - c in float32, exactly 0 in rows and features that do not take part."""
    return tl.where(keep[:, None] if EVEN else keep[:, None] & inside[None, :], x.to(tl.float32) - pivot[None, :], 0.0)


@triton.jit
def over_rows(x, ROWS: tl.constexpr, KEPT: tl.constexpr, COLUMNS: tl.constexpr):
    """Sums of the rows KEPT apart: a thread holds those, so that nothing is exchanged."""
    return tl.sum(tl.reshape(x, [ROWS // KEPT, KEPT, COLUMNS]), 0)


@triton.jit(do_not_specialize=("blocks",))  # n that 16 divides saves the mask of rows up to 50 registers
def crosscorr_moments_kernel(
    x_ptr, y_ptr, weight_ptr, largest_ptr, pivot_x_ptr, pivot_y_ptr,
    product_ptr, sum_x_ptr, sum_y_ptr, square_x_ptr, square_y_ptr,  # [splits, ...]
    n, d1, d2, x_row, x_column, y_row, y_column, weight_stride, blocks,  # of rows, to a range
    WEIGHTED: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr, OWN: tl.constexpr, OTHER: tl.constexpr, ROWS: tl.constexpr,
    KEPT_X: tl.constexpr, KEPT_Y: tl.constexpr, EVEN_X: tl.constexpr, EVEN_Y: tl.constexpr,
):  # fmt: skip
    tiles_j = tl.maximum(tl.cdiv(d2, OTHER), 1)
    tiles = tl.maximum(tl.cdiv(d1, OWN), 1) * tiles_j
    split = tl.program_id(0) // tiles
    i = tl.program_id(0) % tiles // tiles_j
    j = tl.program_id(0) % tiles_j
    columns_x = i * OWN + tl.arange(0, OWN)
    columns_y = j * OTHER + tl.arange(0, OTHER)
    inside_x = columns_x < d1
    inside_y = columns_y < d2
    pivot_x = tl.load(pivot_x_ptr + columns_x, mask=inside_x, other=0.0)
    pivot_y = tl.load(pivot_y_ptr + columns_y, mask=inside_y, other=0.0)
    total = tl.zeros([OWN, OTHER], tl.float32)
    sum_x = tl.zeros([KEPT_X, OWN], tl.float32)
    square_x = tl.zeros([KEPT_X, OWN], tl.float32)
    sum_y = tl.zeros([KEPT_Y, OTHER], tl.float32)
    square_y = tl.zeros([KEPT_Y, OTHER], tl.float32)
    unit = 1.0
    if WEIGHTED:
        unit = power_of_two(largest_ptr)  # times a weight, a shifted value must fit into 16 bits
    for block in range(split * blocks, tl.minimum((split + 1) * blocks, tl.cdiv(n, ROWS))):
        first = block * ROWS
        rows = first + tl.arange(0, ROWS)
        present = rows < n
        keep = present
        if WEIGHTED:
            weight = tl.load(weight_ptr + rows.to(tl.int64) * weight_stride, mask=present, other=0.0)
            keep = weight != 0
        x = features_of(x_ptr, first, x_row, x_column, columns_x, present, inside_x, ROWS, EVEN_X)
        y = features_of(y_ptr, first, y_row, y_column, columns_y, present, inside_y, ROWS, EVEN_Y)
        u = shifted(x, pivot_x, keep, inside_x, EVEN_X)
        v = shifted(y, pivot_y, keep, inside_y, EVEN_Y)
        if j == 0:
            wu = u
            if WEIGHTED:
                wu = u * weight[:, None]
            sum_x += over_rows(wu, ROWS, KEPT_X, OWN)
            square_x += over_rows(wu * u, ROWS, KEPT_X, OWN)
        if i == 0:
            wv = v
            if WEIGHTED:
                wv = v * weight[:, None]
            sum_y += over_rows(wv, ROWS, KEPT_Y, OTHER)
            square_y += over_rows(wv * v, ROWS, KEPT_Y, OTHER)
        if WEIGHTED:
            u = u * (weight / unit)[:, None]
        total = add_product(tl.trans(u.to(DTYPE)), v.to(DTYPE), total, PRECISION)
    wide = tl.cast(split, tl.int64)
    offsets = columns_x[:, None] * d2 + columns_y[None, :]
    tl.store(product_ptr + wide * d1 * d2 + offsets, total * unit, mask=inside_x[:, None] & inside_y[None, :])
    if j == 0:
        tl.store(sum_x_ptr + wide * d1 + columns_x, tl.sum(sum_x, 0), mask=inside_x)
        tl.store(square_x_ptr + wide * d1 + columns_x, tl.sum(square_x, 0), mask=inside_x)
    if i == 0:
        tl.store(sum_y_ptr + wide * d2 + columns_y, tl.sum(sum_y, 0), mask=inside_y)
        tl.store(square_y_ptr + wide * d2 + columns_y, tl.sum(square_y, 0), mask=inside_y)


@triton.jit(do_not_specialize=VARYING)
def crosscorr_add_kernel(parts_ptr, total_ptr, count, parts, BLOCK: tl.constexpr):
    """Sum over the ranges of rows, in order."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for part in range(parts):
        total += tl.load(parts_ptr + tl.cast(part, tl.int64) * count + at, mask=at < count, other=0.0)
    tl.store(total_ptr + at, total, mask=at < count)


def pivot(x, weight):
    n, d = x.shape
    out = x.new_empty(d, dtype=torch.float32)
    stride = 0 if weight is None else weight.stride(0)
    if d:
        crosscorr_pivot_kernel[(triton.cdiv(d, 32),)](
            x, weight, out, n, d, *x.stride(), stride, WEIGHTED=weight is not None, PILOTS=PILOT_ROWS, BLOCK=32
        )
    return out


def moments(x, y, weight):
    """count [], pivots [D1] [D2], sums [D1] [D2], squares [D1] [D2], product [D1, D2]."""
    n, d1, d2 = *x.shape, y.shape[1]
    count = x.new_full((), n, dtype=torch.float32) if weight is None else weight.sum()
    pivots = [pivot(t, weight) for t in (x, y)]
    form = format_of(x.dtype, y.dtype)
    blocks = product_blocks(form, d1, d2, scattered(x) or scattered(y))
    tiles = triton.cdiv(max(d1, 1), blocks.own) * triton.cdiv(max(d2, 1), blocks.other)  # a view without features leaves the other its sums
    splits = splits_of(n, tiles, blocks)
    steps = triton.cdiv(triton.cdiv(n, blocks.rows), splits)
    shapes = ((d1, d2), (d1,), (d2,), (d1,), (d2,))
    parts = [x.new_empty((splits, *shape), dtype=torch.float32) for shape in shapes]
    largest = None if weight is None else torch.linalg.vector_norm(weight, float("inf")) if n else weight.new_ones(())
    crosscorr_moments_kernel[(splits * tiles,)](
        x, y, weight, largest, *pivots, *parts, n, d1, d2, *x.stride(), *y.stride(), 0 if weight is None else weight.stride(0), steps,
        WEIGHTED=weight is not None, DTYPE=form.dtype, PRECISION=form.precision, OWN=blocks.own, OTHER=blocks.other, ROWS=blocks.rows,
        KEPT_X=blocks.kept(blocks.own, x), KEPT_Y=blocks.kept(blocks.other, y), EVEN_X=even(d1, blocks.own), EVEN_Y=even(d2, blocks.other),
        num_warps=blocks.num_warps, num_stages=blocks.num_stages,
    )  # fmt: skip
    product, *sums = (total(part) for part in parts)
    return count, *pivots, *sums, product


def total(parts):
    if parts.shape[0] == 1:
        return parts.squeeze(0)
    out = parts.new_empty(parts.shape[1:])
    if out.numel():
        crosscorr_add_kernel[(triton.cdiv(out.numel(), ADDED),)](parts, out, out.numel(), parts.shape[0], BLOCK=ADDED)
    return out
