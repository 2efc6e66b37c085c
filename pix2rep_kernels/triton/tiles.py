"""Helpers that Triton kernels share: matrix products, accurate logarithms near 1, which pairs of a tile are left out."""

import os

import triton
import triton.language as tl

# The interpreter keeps bfloat16 as raw bits and multiplies those.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

# Which pairs of own row and stream row are left out of a sweep.
NOTHING = tl.constexpr(0)
DIAGONAL = tl.constexpr(1)  # own == stream; `span` is 0: a comparison that the compiler cannot simplify takes fewer registers
JOINT = tl.constexpr(2)  # own == stream, and the two rows `span` apart
OWN_POSITIVE = tl.constexpr(3)  # stream == positive[own]
STREAM_POSITIVE = tl.constexpr(4)  # own == positive[stream]


@triton.jit
def product(a, b, PRECISION: tl.constexpr):
    """a @ b in float32. PRECISION ("ieee", "tf32x3") matters to float32 operands alone."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def add_product(a, b, total, PRECISION: tl.constexpr):
    """total + a @ b in float32."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")
    return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def tile(pointer, first, ROWS: tl.constexpr, STRIDE: tl.constexpr, WIDTH: tl.constexpr):
    """Rows [first, first + ROWS) and columns [0, WIDTH) of a row-major matrix that is padded to whole tiles."""
    offsets = tl.arange(0, ROWS)[:, None] * STRIDE + tl.arange(0, WIDTH)[None, :]
    return tl.load(pointer + tl.cast(first, tl.int64) * STRIDE + offsets)


@triton.jit
def similarities(
    x_ptr, y_ptr, x, y, x_first, y_first,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, D: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """x @ y.T of two tiles of rows: of x and y themselves when one chunk holds all features, else loaded chunk by chunk."""
    if D == CHUNK:
        return product(x, y.T, PRECISION)
    s = tl.zeros([ROWS, COLUMNS], tl.float32)
    for chunk in range(0, D, CHUNK):
        s = add_product(tile(x_ptr + chunk, x_first, ROWS, D, CHUNK), tile(y_ptr + chunk, y_first, COLUMNS, D, CHUNK).T, s, PRECISION)
    return s


@triton.jit
def log1p(x):
    """log(1 + x) for x in [0, 1] as 2 atanh(x / (2 + x)), to 2e-8 of its value; the hardware's logarithm has an absolute error near 1."""
    z = x / (2.0 + x)
    w = z * z
    series = w * (1 / 9 + w * (1 / 11 + w * (1 / 13 + w * (1 / 15))))
    return 2.0 * z * (1.0 + w * (1 / 3 + w * (1 / 5 + w * (1 / 7 + series))))


@triton.jit
def one_minus_exp(x):
    """1 - exp(-x) for x >= 0, by its series where the difference would cancel."""
    series = x * (1 - x / 2 * (1 - x / 3 * (1 - x / 4 * (1 - x / 5 * (1 - x / 6 * (1 - x / 7 * (1 - x / 8)))))))
    return tl.where(x < 0.5, series, 1.0 - tl.exp2(-x * LOG2E))


@triton.jit
def touches(own, stream, BLOCK: tl.constexpr, span, LEFT_OUT: tl.constexpr):
    """Whether the square blocks that begin at own and stream hold a pair left out by its position; symmetric in own and stream."""
    apart = tl.abs(stream - own)
    found = tl.abs(apart - span) < BLOCK
    if LEFT_OUT == JOINT:
        found = found | (apart < BLOCK)
    return found


@triton.jit
def left_out(own, stream, span, LEFT_OUT: tl.constexpr):
    """The pairs that their position leaves out, from indices that broadcast against each other."""
    if LEFT_OUT == JOINT:
        return (own == stream) | (stream - own == span) | (own - stream == span)
    return stream - own == span
