"""Block sizes and operand formats of crosscorr, from sizes and dtypes alone."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
PROGRAMS = 264  # two for each multiprocessor of a large GPU


class Format(NamedTuple):
    """How the products take their operands."""

    half: bool  # in the views' own 16 bits, else in float32
    dtype: tl.dtype
    precision: str  # of float32 products


def format_of(x: torch.dtype, y: torch.dtype) -> Format:
    """Both views 16-bit and alike: their dtype. Otherwise float32, as `torch.get_float32_matmul_precision()` says."""
    if x == y and x != torch.float32:
        return Format(True, TYPES[x], "ieee")
    return Format(False, tl.float32, "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32")


class Blocks(NamedTuple):
    own: int  # features of x, or of the view whose gradient is taken
    other: int
    rows: int
    num_warps: int
    num_stages: int


def product_blocks(form: Format, d1: int, d2: int) -> Blocks:
    """One tile of the product. x is read cdiv(d2, other) times and y cdiv(d1, own) times, but for the first from L2: the programs of one range of rows
    follow each other. At D = 256 and 16 bits that is 1 and 2."""
    d1, d2 = (max(16, triton.next_power_of_2(d)) for d in (d1, d2))
    if form.half:
        own, other = min(d1, 128), min(d2, 256 if d1 >= 128 else 128)
        return Blocks(own, other, 64 if own * other <= 128 * 128 else 32, 8 if own * other >= 128 * 128 else 4, 3)
    edge = 64 if form.precision == "tf32x3" else 128
    own, other = min(d1, edge), min(d2, edge)
    return Blocks(own, other, 32, 8 if own * other >= 128 * 128 else 4, 2)


def splits_of(n: int, d1: int, d2: int, blocks: Blocks) -> int:
    """Ranges of rows whose products are added at the end: as many as give every multiprocessor its programs, each of at least four steps."""
    tiles = triton.cdiv(d1, blocks.own) * triton.cdiv(d2, blocks.other)
    return max(1, min(triton.cdiv(PROGRAMS, tiles), n // (4 * blocks.rows)))


def gradient_blocks(form: Format, d_own: int, d_other: int) -> Blocks:
    """Rows x own features of one gradient; other features are taken `other` at a time."""
    own, other = (max(16, triton.next_power_of_2(d)) for d in (d_own, d_other))
    if form.half:
        return Blocks(min(own, 256), min(other, 64), 128, 8, 3)
    if form.precision == "tf32":
        return Blocks(min(own, 128), min(other, 32), 128, 8, 3)
    return Blocks(min(own, 64), min(other, 32), 64, 4, 2)
