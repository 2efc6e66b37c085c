"""Block sizes and operand formats of crosscorr, from sizes and dtypes alone."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
PROGRAMS = 264  # two for each multiprocessor of a large GPU

VARYING = ("n", "blocks", "parts", "d", "d_own", "d_other")  # of the kernels' arguments: compiled once for every value


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


def in_planes(view: torch.Tensor) -> bool:
    """Whether rows, not features, are contiguous."""
    return view.stride(0) < view.stride(1)


def scattered(view: torch.Tensor) -> bool:
    """Whether features cannot be loaded 16 bytes at a time. A thread then holds more of a tile's addresses: smaller tiles."""
    return view.stride(1) != 1 or view.stride(0) % 16 != 0


def even(d: int, block: int) -> bool:
    """Whether whole blocks hold exactly the features."""
    return d > 0 and d % block == 0


class Blocks(NamedTuple):
    own: int  # features of x, or of the view whose gradient is taken
    other: int
    rows: int
    num_warps: int
    num_stages: int

    def kept(self, features: int, view: torch.Tensor) -> int:
        """Rows that all threads together load at once, 16 bytes each: the others of a thread are its own to add. 1 where rows lie along the 16 bytes."""
        if in_planes(view):
            return 1
        return max(1, min(self.rows, self.num_warps * 32 * 16 // (view.element_size() * features)))


def product_blocks(form: Format, d1: int, d2: int, scattered: bool) -> Blocks:
    """One tile of the product. x is read cdiv(d2, other) times and y cdiv(d1, own) times, but for the first from L2: the programs of one range of rows
    follow each other. That is twice at D = 256 and once to D = 128; 64 features at most in tf32x3, which needs its operands twice."""
    strict = form.precision == "tf32x3"
    own, other = (min(64 if strict or scattered else 128, max(16, triton.next_power_of_2(d))) for d in (d1, d2))
    few = own * other <= 64 * 64 and not strict and not scattered
    return Blocks(own, other, 16 if strict else 32, 4 if few else 8, 3 if form.half else 2)


def splits_of(n: int, tiles: int, blocks: Blocks) -> int:
    """Ranges of rows whose products are added at the end: as many as give every multiprocessor its programs, each of at least four steps."""
    return max(1, min(triton.cdiv(PROGRAMS, tiles), n // (4 * blocks.rows)))


def gradient_blocks(form: Format, d_own: int, d_other: int, scattered: bool) -> Blocks:
    """Rows x own features of one gradient; other features are taken `other` at a time. All at once where they fit: then the gradient of the product stays
    in shared memory for all rows of a program, and the other view is read cdiv(d_own, own) times, but for the first from L2."""
    own, other = (max(16, triton.next_power_of_2(d)) for d in (d_own, d_other))
    if form.half:
        return Blocks(min(own, 64 if scattered else 128), other if other <= 256 else 64, 64, 8, 2)
    if form.precision == "tf32":
        return Blocks(min(own, 64 if scattered else 128), min(other, 32 if scattered else 64), 64, 8, 2)
    return Blocks(min(own, 32 if scattered else 64), min(other, 16), 64, 4 if scattered else 8, 2)
