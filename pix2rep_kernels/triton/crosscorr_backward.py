"""Gradients of both views (crosscorr.6): one program takes a block of rows through both affine products, so that each view is read once from memory."""

import torch
import triton
import triton.language as tl

from pix2rep_kernels.triton.crosscorr_blocks import PROGRAMS, VARYING, even, format_of, gradient_blocks, scattered
from pix2rep_kernels.triton.crosscorr_forward import features_of, power_of_two, shifted
from pix2rep_kernels.triton.tiles import add_product

EDGE = 32


@triton.jit(do_not_specialize=VARYING)
def crosscorr_scale_kernel(g_ptr, largest_ptr, out_ptr, d_own, d_other, own_stride, other_stride, width, TOP: tl.constexpr, EDGE: tl.constexpr):
    """gP or its transpose into [padded, width], 0 past its end: scaled so that the largest entry is in [TOP, 2 TOP), which fits into 16 bits, or as it is
    where TOP is 0."""
    own = tl.program_id(0) * EDGE + tl.arange(0, EDGE)
    other = tl.program_id(1) * EDGE + tl.arange(0, EDGE)
    inside = (own < d_own)[:, None] & (other < d_other)[None, :]
    offsets = own.to(tl.int64)[:, None] * own_stride + other.to(tl.int64)[None, :] * other_stride
    g = tl.load(g_ptr + offsets, mask=inside, other=0.0)
    if TOP > 0:
        g *= TOP / power_of_two(largest_ptr)
    tl.store(out_ptr + own[:, None] * width + other[None, :], g.to(out_ptr.dtype.element_ty))


@triton.jit
def affine(
    own_ptr, other_ptr, weight_ptr, g_ptr, sum_ptr, square_ptr, pivot_own_ptr, pivot_other_ptr, out_ptr, unit, begin, first_block, last_block,
    n, d_own, d_other, own_row, own_column, other_row, other_column, weight_stride, width,
    WEIGHTED: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr, OWN: tl.constexpr, OTHER: tl.constexpr, ROWS: tl.constexpr,
    WHOLE: tl.constexpr, EVEN_OWN: tl.constexpr, EVEN_OTHER: tl.constexpr,
):  # fmt: skip
    """w (gs + 2 gq u + g v) of `OWN` features. WHOLE: one block holds all other features, so that g stays in shared memory."""
    columns = begin + tl.arange(0, OWN)
    inside = columns < d_own
    features = tl.arange(0, OTHER)
    pivot_own = tl.load(pivot_own_ptr + columns, mask=inside, other=0.0)
    constant = tl.load(sum_ptr + columns, mask=inside, other=0.0)
    slope = 2.0 * tl.load(square_ptr + columns, mask=inside, other=0.0)
    g_ptr += columns[:, None] * width + features[None, :]
    if WHOLE:
        g = tl.load(g_ptr)
        pivot = tl.load(pivot_other_ptr + features, mask=features < d_other, other=0.0)
    for block in range(first_block, last_block):
        first = block * ROWS
        rows = first + tl.arange(0, ROWS)
        present = rows < n
        keep = present
        if WEIGHTED:
            weight = tl.load(weight_ptr + rows.to(tl.int64) * weight_stride, mask=present, other=0.0)
            keep = weight != 0
        total = tl.zeros([ROWS, OWN], tl.float32)
        if WHOLE:
            own = features_of(own_ptr, first, own_row, own_column, columns, present, inside, ROWS, EVEN_OWN)  # on its way during the product
            other = features_of(other_ptr, first, other_row, other_column, features, present, features < d_other, ROWS, EVEN_OTHER)
            v = shifted(other, pivot, keep, features < d_other, EVEN_OTHER)
            total = add_product(v.to(DTYPE), tl.trans(g), total, PRECISION)
        else:
            for k in range(0, d_other, OTHER):
                inner = k + features
                pivot = tl.load(pivot_other_ptr + inner, mask=inner < d_other, other=0.0)
                other = features_of(other_ptr, first, other_row, other_column, inner, present, inner < d_other, ROWS, EVEN_OTHER)
                v = shifted(other, pivot, keep, inner < d_other, EVEN_OTHER)
                total = add_product(v.to(DTYPE), tl.trans(tl.load(g_ptr + k)), total, PRECISION)
            own = features_of(own_ptr, first, own_row, own_column, columns, present, inside, ROWS, EVEN_OWN)
        u = shifted(own, pivot_own, keep, inside, EVEN_OWN)
        gradient = constant[None, :] + slope[None, :] * u + total * unit
        if WEIGHTED:
            gradient = tl.where(keep[:, None], gradient * weight[:, None], 0.0)
        to = out_ptr + tl.cast(first, tl.int64) * d_own + tl.arange(0, ROWS)[:, None] * d_own + columns[None, :]
        tl.store(to, gradient.to(out_ptr.dtype.element_ty), mask=present[:, None] & inside[None, :])


@triton.jit(do_not_specialize=("blocks",))  # n that 16 divides saves instructions of its mask
def crosscorr_gradients_kernel(
    x_ptr, y_ptr, weight_ptr, for_x_ptr, for_y_ptr, largest_ptr, sum_x_ptr, sum_y_ptr, square_x_ptr, square_y_ptr, pivot_x_ptr, pivot_y_ptr,
    grad_x_ptr, grad_y_ptr, n, d1, d2, x_row, x_column, y_row, y_column, weight_stride, width_x, width_y, blocks,  # of rows, to a program
    NEED_X: tl.constexpr, NEED_Y: tl.constexpr, WEIGHTED: tl.constexpr, TOP: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    OWN_X: tl.constexpr, OTHER_X: tl.constexpr, OWN_Y: tl.constexpr, OTHER_Y: tl.constexpr, ROWS: tl.constexpr,
    WHOLE_X: tl.constexpr, WHOLE_Y: tl.constexpr, EVEN_X: tl.constexpr, EVEN_Y: tl.constexpr,
):  # fmt: skip
    """Neighbouring programs take the same rows: what one reads from memory, the others find in L2."""
    tiles_x = tl.cdiv(d1, OWN_X) if NEED_X else 0
    tiles = tiles_x + (tl.cdiv(d2, OWN_Y) if NEED_Y else 0)
    tile = tl.program_id(0) % tiles
    first = tl.program_id(0) // tiles * blocks
    last = tl.minimum(first + blocks, tl.cdiv(n, ROWS))
    unit = 1.0
    if TOP > 0:
        unit = power_of_two(largest_ptr) / TOP
    if NEED_X:
        if tile < tiles_x:
            affine(
                x_ptr, y_ptr, weight_ptr, for_x_ptr, sum_x_ptr, square_x_ptr, pivot_x_ptr, pivot_y_ptr, grad_x_ptr, unit, tile * OWN_X, first, last,
                n, d1, d2, x_row, x_column, y_row, y_column, weight_stride, width_x,
                WEIGHTED, DTYPE, PRECISION, OWN_X, OTHER_X, ROWS, WHOLE_X, EVEN_X, EVEN_Y,
            )  # fmt: skip
    if NEED_Y:
        if tile >= tiles_x:
            affine(
                y_ptr, x_ptr, weight_ptr, for_y_ptr, sum_y_ptr, square_y_ptr, pivot_y_ptr, pivot_x_ptr, grad_y_ptr, unit, (tile - tiles_x) * OWN_Y,
                first, last, n, d2, d1, y_row, y_column, x_row, x_column, weight_stride, width_y,
                WEIGHTED, DTYPE, PRECISION, OWN_Y, OTHER_Y, ROWS, WHOLE_Y, EVEN_Y, EVEN_X,
            )  # fmt: skip


def scaled(g, form, top, largest, dtype, own, other):
    """g [D_own, D_other] as the products take it: padded to whole blocks, the features that are summed over contiguous."""
    units = [max(EDGE, block) for block in (own, other)]  # powers of two
    padded = [triton.cdiv(max(d, 1), unit) * unit for d, unit in zip(g.shape, units, strict=True)]
    out = g.new_empty(padded, dtype=dtype)
    grid = [size // EDGE for size in padded]
    crosscorr_scale_kernel[tuple(grid)](g, largest, out, *g.shape, *g.stride(), padded[1], TOP=top, EDGE=EDGE)
    return out


def gradients(grad_sums, grad_squares, grad_product, x, y, weight, pivots, needs):
    """Gradients of x and y; [0] where one is not needed."""
    n, d1, d2 = *x.shape, y.shape[1]
    grads = [t.new_empty(t.shape if need else 0) for t, need in zip((x, y), needs, strict=True)]
    if n == 0 or not any(needs):
        return tuple(grads)
    form = format_of(x.dtype, y.dtype)
    top = {torch.float16: 2.0**14, torch.bfloat16: 1.0}[x.dtype] if form.half else 0.0
    largest = torch.linalg.vector_norm(grad_product, float("inf")) if form.half and grad_product.numel() else None
    narrow = scattered(x) or scattered(y)
    blocks = [gradient_blocks(form, *sizes, narrow) for sizes in ((d1, d2), (d2, d1))]
    dtype = x.dtype if form.half else torch.float32
    operands = [
        scaled(g, form, top if largest is not None else 0.0, largest, dtype, b.own, b.other) if need else None
        for g, b, need in zip((grad_product, grad_product.T), blocks, needs, strict=True)
    ]
    rows = blocks[0].rows
    needs = [need and d > 0 for need, d in zip(needs, (d1, d2), strict=True)]
    tiles = sum(triton.cdiv(d, b.own) for d, b, need in zip((d1, d2), blocks, needs, strict=True) if need)
    steps = triton.cdiv(triton.cdiv(n, rows), max(1, triton.cdiv(PROGRAMS, max(tiles, 1))))
    crosscorr_gradients_kernel[(tiles * triton.cdiv(triton.cdiv(n, rows), steps),)](
        x, y, weight, *operands, largest, *(t.contiguous() for t in (*grad_sums, *grad_squares)), *pivots, *grads,
        n, d1, d2, *x.stride(), *y.stride(), 0 if weight is None else weight.stride(0), *(0 if o is None else o.shape[1] for o in operands), steps,
        NEED_X=needs[0], NEED_Y=needs[1], WEIGHTED=weight is not None, TOP=top if largest is not None else 0.0, DTYPE=form.dtype,
        PRECISION=form.precision, OWN_X=blocks[0].own, OTHER_X=blocks[0].other, OWN_Y=blocks[1].own, OTHER_Y=blocks[1].other, ROWS=rows,
        WHOLE_X=d2 <= blocks[0].other, WHOLE_Y=d1 <= blocks[1].other,
        EVEN_X=even(d1, max(blocks[0].own, blocks[1].other)), EVEN_Y=even(d2, max(blocks[1].own, blocks[0].other)),
        num_warps=max(b.num_warps for b in blocks), num_stages=min(b.num_stages for b in blocks),
    )  # fmt: skip
    return tuple(grads)
