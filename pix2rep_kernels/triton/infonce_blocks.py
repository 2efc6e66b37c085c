"""Formats and block sizes of the infonce kernels: plain functions of the features, the precision and a multiprocessor's shared memory."""

from typing import NamedTuple

import torch
import triton

PAD = 256  # a multiple of every block
PROGRAMS = 264  # two for each of the 132 multiprocessors of an H100 or H200
SHARED_H100 = 232448  # bytes that one program may hold


# Of the kernels' arguments: compiled once for every value, since a step may have rows of any number.
VARYING = (
    "groups", "count", "own_count", "stream_count", "stream_groups", "partner_count", "span", "parts", "queue_parts", "part_tiles", "own_parts",
    "stream_parts", "own_blocks", "stream_tiles", "written", "source", "offset", "partner_offset", "column", "anchors",
)  # fmt: skip


class Format(NamedTuple):
    """How wide the operands are and which product multiplies them."""

    half: bool  # float16 similarities and bfloat16 gradient products, else float32
    precision: str  # of float32 products
    d: int
    chunk: int  # features held at a time
    span: int  # the power of two that holds d

    @property
    def scaled(self) -> torch.dtype:
        return torch.float16 if self.half else torch.float32

    @property
    def bytes(self) -> int:
        return 2 if self.half else 4

    @property
    def slice(self) -> int:
        """Features of the gradient that one program accumulates."""
        limit = 256 if self.half else 128
        return next(size for size in (self.d, 256, 128) if size <= limit and self.d % size == 0)

    @property
    def rows(self) -> int:
        """Of a program that works once a row."""
        return max(1, min(16, 8192 // self.span))

    @property
    def sizes(self) -> dict[str, int]:
        """Of kernels that work once a row: 32 values a thread, of which the gradients hold several."""
        return {"D": self.d, "SPAN": self.span, "BLOCK": self.rows, "num_warps": 8 if self.span > 256 else 4}


class Blocks(NamedTuple):
    """Rows that a program keeps, rows that it streams past them, and how it is compiled."""

    own: int
    stream: int
    num_warps: int
    num_stages: int
    maxnreg: int | None = None

    @property
    def options(self) -> dict[str, int]:
        options = {"OWN": self.own, "STREAM": self.stream, "num_warps": self.num_warps, "num_stages": self.num_stages}
        return options | ({"maxnreg": self.maxnreg} if self.maxnreg else {})


def format_of(width: int, dtypes: set[torch.dtype], precision: str | None) -> Format:
    """Features are padded to a power of two up to 256, where exponentials or loads cost more than padding; beyond to a multiple of 128.

    float16 rows are held whole to 256 features. float32 rows are taken in chunks: whole ones fill the registers, as parts of three products
    or as operands of scalar ones.
    """
    if precision is None:
        strict = torch.float32 in dtypes and torch.get_float32_matmul_precision() == "highest"
        precision = "tf32x3" if strict else "fp16"
    d = max(16, triton.next_power_of_2(width)) if width <= 256 else triton.cdiv(width, 128) * 128
    half = precision == "fp16"
    chunk = (d if d <= 256 else 128) if half else min(d, 32)
    return Format(half, "ieee" if half else precision, d, chunk, triton.next_power_of_2(d))


def sum_blocks(form: Format, masked: bool, shared: int = SHARED_H100) -> Blocks:
    """`masked`: single pairs are left out by masks, ids or given positives, or a queue is streamed, whose groups take a register.

    64 streamed rows leave 64 values of the tile to a thread. What is kept is so wide that its loads from L2, 2 D / own bytes a pair, take
    less time than the exponentials or products: 128 rows to D = 64, 256 beyond. 128 registers keep 16 warps on a multiprocessor, which
    overlap one's exponentials with another's products; masks hold one more value a column.
    """
    if not form.half:
        return Blocks(64, 32, 8, 2) if form.precision == "ieee" else Blocks(64, 64, 4, 2)  # scalar products hold their operands in registers
    wide = [] if form.d <= 64 or (masked and form.d == 128) else [Blocks(256, 64, 8, 3, 128), Blocks(256, 64, 8, 2)][form.d > 128 :]
    narrow = Blocks(128, 64, 4, 3, 128 if form.d <= 64 and not masked else None)
    return _fitting(form, shared, False, *wide, narrow, Blocks(128, 64, 4, 2), Blocks(64, 64, 4, 2), Blocks(32, 32, 4, 2))


def row_blocks(form: Format, shared: int = SHARED_H100) -> Blocks:
    """Of the rare sweeps, over edges and with a running maximum: what fits everywhere. Before Hopper operands take registers too."""
    wide = [Blocks(64, 64, 4, 2)] if shared >= SHARED_H100 else [Blocks(64, 32, 4, 2)]
    return _fitting(form, shared, False, *wide, Blocks(32, 32, 4, 1)) if form.half else Blocks(64, 32, 4, 2)


def product_blocks(form: Format, shared: int = SHARED_H100, plain: bool = True) -> Blocks:
    """128 own rows, because loads from L2 are 4 D / own bytes a pair. A thread of 8 warps holds 64 values of the tile and 64 of the
    accumulator at D = 128; beyond, 32 and 128. To D = 64 two programs share a multiprocessor, with half as many streamed rows where ids, a shift or
    a running maximum (not `plain`) take registers too; before Hopper those leave none for it."""
    if not form.half:
        return Blocks(64, 32, 4, 1 if form.precision == "ieee" else 2)
    shares = form.d <= 64
    wide = [Blocks(128, 128 if plain or not shares else 64, 8, 2, 128 if shares else None)] if form.slice <= 128 and (plain or shared >= SHARED_H100) else []
    return _fitting(form, shared, True, *wide, Blocks(128, 64, 8, 2), Blocks(64, 64, 4, 2), Blocks(64, 32, 4, 2), Blocks(32, 32, 4, 1))


def _fitting(form: Format, shared: int, product: bool, *candidates: Blocks) -> Blocks:
    """The first whose operands fit; the last when none does."""

    def held(blocks: Blocks) -> int:
        copy = 2 * form.slice * blocks.stream if product and form.half else 0
        if form.d == form.chunk:
            return blocks.own * form.d * form.bytes + blocks.num_stages * (blocks.stream * form.d * form.bytes + copy)
        return blocks.num_stages * (blocks.own + blocks.stream) * form.chunk * form.bytes + copy

    blocks = next((blocks for blocks in candidates if held(blocks) + 1536 <= shared), candidates[-1])
    return blocks if shared >= SHARED_H100 else blocks._replace(maxnreg=None)  # before Hopper operands take registers too


def parts_of(own_blocks: int, tiles: int, groups: int) -> tuple[int, int]:
    """Blocks and tiles of one program: at most 32 x 32 programs, which keeps their private sums small against the operands and fills the
    device in whole waves; enough programs for the device; else at least 8 tiles, to pay for the start of the pipeline."""
    own_parts = max(1, min(32, own_blocks))
    stream_parts = max(1, min(32, tiles, max(triton.cdiv(PROGRAMS, own_parts * max(1, groups)), tiles // 8)))
    return max(1, triton.cdiv(own_blocks, own_parts)), max(1, triton.cdiv(tiles, stream_parts))


def triangle_parts_of(own_blocks: int, blocks: Blocks) -> tuple[int, int]:
    """The same for the triangle of equal parts: 64 give 2080 programs, 23 are the fewest that fill the device."""
    parts = min(own_blocks, 64, max(23, own_blocks // 4))
    own_part = max(1, triton.cdiv(own_blocks, max(1, parts)))
    return own_part, own_part * (blocks.own // blocks.stream)
