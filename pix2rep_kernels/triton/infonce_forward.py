"""Sums over the negatives (infonce.2): one sweep over tiles of exp2(s), whose row and column sums share one exponential a pair.

A program owns a range of blocks of `own` rows, resident one at a time, and streams a range of tiles of `stream` rows past each. Own sums
stay in registers, stream sums go to the program's private slice, which no other program touches: fixed order, no atomics. Blocks that hold
pairs left out by their position are another kernel's: masks here would cost every tile the registers.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pix2rep_kernels.triton import infonce_rows
from pix2rep_kernels.triton.infonce_blocks import VARYING, parts_of, row_blocks, sum_blocks, triangle_parts_of
from pix2rep_kernels.triton.infonce_problem import Half, Problem, Rows
from pix2rep_kernels.triton.infonce_rows import ONLINE, PLAIN, SHIFTED, shift_of
from pix2rep_kernels.triton.tiles import DIAGONAL, JOINT, NOTHING, OWN_POSITIVE, left_out, similarities, tile, touches


@triton.jit(do_not_specialize=VARYING)
def sums(
    own_ptr, stream_ptr,  # [G, own_padded, D], [G, stream_padded, D], prepared: scaled by sqrt(log2(e) / tau), 0 where invalid
    own_weight_ptr, stream_weight_ptr,  # [G, own_padded], [G, stream_padded]: 1, or 0 where invalid
    own_ids_ptr, stream_ids_ptr,  # [G, own_padded], [G, stream_padded] int32
    positive_ptr,  # [G, own_count] int64
    own_sums_ptr, stream_sums_ptr,  # [stream_parts, G, own_padded], [own_parts, G, stream_padded]; "joint": one buffer
    temperature_ptr, floor, headroom,
    groups, own_count, stream_count, own_padded, stream_padded, stream_groups, span,
    own_parts, stream_parts, own_blocks, stream_tiles,  # blocks and tiles of one part
    D: tl.constexpr, CHUNK: tl.constexpr, OWN: tl.constexpr, STREAM: tl.constexpr,
    LEFT_OUT: tl.constexpr, TRIANGLE: tl.constexpr, STREAM_SUMS: tl.constexpr, VALID: tl.constexpr, IDS: tl.constexpr, SHIFT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """TRIANGLE: own and stream are the same rows in the same parts; those below the diagonal mirror those above."""
    program = tl.program_id(0)
    stream_part = program % stream_parts
    own_part = program // stream_parts % own_parts
    group = (program // (stream_parts * own_parts)).to(tl.int64)
    if TRIANGLE:
        if stream_part > own_part:
            return
    stream_group = tl.where(stream_groups > 1, group, 0)  # a queue has one group for all
    own_ptr += group * own_padded * D
    stream_ptr += stream_group * stream_padded * D
    own_weight_ptr += group * own_padded
    stream_weight_ptr += stream_group * stream_padded
    own_ids_ptr += group * own_padded
    stream_ids_ptr += stream_group * stream_padded
    own_sums_ptr += (tl.cast(stream_part, tl.int64) * groups + group) * own_padded
    stream_sums_ptr += (tl.cast(own_part, tl.int64) * groups + group) * stream_padded
    if SHIFT:
        shift = shift_of(temperature_ptr, floor, headroom)
    first_tile = stream_part * stream_tiles
    last_tile = tl.minimum(first_tile + stream_tiles, tl.cdiv(stream_count, STREAM))
    last_block = tl.minimum((own_part + 1) * own_blocks, tl.cdiv(own_count, OWN))
    for block in range(own_part * own_blocks, last_block):
        own_first = block * OWN
        own = own_first + tl.arange(0, OWN)
        y = tile(own_ptr, own_first, OWN, D, CHUNK)
        if VALID:
            own_weight = tl.load(own_weight_ptr + own)
        if IDS:
            own_ids = tl.load(own_ids_ptr + own)
        if LEFT_OUT == OWN_POSITIVE:
            positive = tl.load(positive_ptr + group * own_count + own, mask=own < own_count, other=-1).to(tl.int32)
        # An MMA thread holds rows r and r + 8 of 16: adding those in the thread halves the accumulator.
        total = tl.zeros([STREAM // 16, 8, OWN], tl.float32)
        for index in range(first_tile, last_tile):
            stream_first = index * STREAM
            stream = stream_first + tl.arange(0, STREAM)
            if STREAM_SUMS:
                so_far = tl.load(stream_sums_ptr + stream)
            x = tile(stream_ptr, stream_first, STREAM, D, CHUNK)
            s = similarities(stream_ptr, own_ptr, x, y, stream_first, own_first, STREAM, OWN, D, CHUNK, PRECISION)
            if LEFT_OUT == OWN_POSITIVE:
                s = tl.where(stream[:, None] == positive[None, :], -float("inf"), s)
            inside = True
            if LEFT_OUT == DIAGONAL or LEFT_OUT == JOINT:
                inside = ~touches(own_first, stream_first // OWN * OWN, OWN, span, LEFT_OUT)
            if inside:
                if SHIFT:
                    s -= shift
                e = tl.exp2(s)
                if IDS:
                    stream_ids = tl.load(stream_ids_ptr + stream)
                    e = tl.where(stream_ids[:, None] != own_ids[None, :], e, 0.0)
                by_own = e
                by_stream = e
                if VALID:  # an invalid row is 0 in the product, so that e is finite here unless its partner is not
                    by_own = e * tl.load(stream_weight_ptr + stream)[:, None]
                    by_stream = e * own_weight[None, :]
                total += tl.sum(tl.reshape(by_own, [STREAM // 16, 2, 8, OWN]), 1)
                if STREAM_SUMS:
                    tl.store(stream_sums_ptr + stream, so_far + tl.sum(by_stream, 1))
        own_sums = tl.sum(tl.sum(total, 0), 0)
        if TRIANGLE:
            if stream_part != own_part:  # a part on the diagonal is a full square, whose stream sums are all there is
                tl.store(own_sums_ptr + own, own_sums)
        else:
            tl.store(own_sums_ptr + own, own_sums)
        if STREAM_SUMS:
            tl.debug_barrier()  # the next block adds to the same stream sums


@triton.jit(do_not_specialize=VARYING)
def edges(
    own_ptr, stream_ptr, own_weight_ptr, stream_weight_ptr, own_ids_ptr, stream_ids_ptr,  # as in `sums`
    own_sums_ptr,  # [G, own_padded]
    temperature_ptr, floor, headroom,
    own_count, stream_count, own_padded, stream_padded, span,
    D: tl.constexpr, CHUNK: tl.constexpr, OWN: tl.constexpr, STREAM: tl.constexpr, BLOCK: tl.constexpr,  # BLOCK: OWN of `sums`
    LEFT_OUT: tl.constexpr, VALID: tl.constexpr, IDS: tl.constexpr, SHIFT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Own sums over the blocks that `sums` leaves to this kernel."""
    programs = tl.cdiv(own_count, OWN)
    own_first = tl.program_id(0) % programs * OWN
    group = (tl.program_id(0) // programs).to(tl.int64)
    block_first = own_first // BLOCK * BLOCK
    own_ptr += group * own_padded * D
    stream_ptr += group * stream_padded * D
    stream_weight_ptr += group * stream_padded
    stream_ids_ptr += group * stream_padded
    own = own_first + tl.arange(0, OWN)
    if IDS:
        own_ids = tl.load(own_ids_ptr + group * own_padded + own)
    if SHIFT:
        shift = shift_of(temperature_ptr, floor, headroom)
    x = tile(own_ptr, own_first, OWN, D, CHUNK)
    total = tl.zeros([OWN], tl.float32)
    done = 0
    for side in tl.static_range(-1, 2):
        if side == 0 or LEFT_OUT == JOINT:
            window = block_first + side * span
            first = tl.maximum(tl.maximum(window, 0) // BLOCK * BLOCK, done)
            last = tl.minimum(tl.cdiv(tl.maximum(window + BLOCK, 0), BLOCK) * BLOCK, stream_count)
            for stream_first in range(first, last, STREAM):
                stream = stream_first + tl.arange(0, STREAM)
                y = tile(stream_ptr, stream_first, STREAM, D, CHUNK)
                s = similarities(own_ptr, stream_ptr, x, y, own_first, stream_first, OWN, STREAM, D, CHUNK, PRECISION)
                if SHIFT:
                    s -= shift
                keep = ~left_out(own[:, None], stream[None, :], span, LEFT_OUT)
                if IDS:
                    keep = keep & (own_ids[:, None] != tl.load(stream_ids_ptr + stream)[None, :])
                if VALID:
                    keep = keep & (tl.load(stream_weight_ptr + stream) > 0)[None, :]
                total += tl.sum(tl.where(keep, tl.exp2(s), 0.0), 1)
            done = tl.maximum(done, tl.cdiv(tl.maximum(window + BLOCK, 0), BLOCK) * BLOCK)
    tl.store(own_sums_ptr + group * own_padded + own, total)


@triton.jit(do_not_specialize=VARYING)
def online(
    own_ptr, stream_ptr, own_weight_ptr, stream_weight_ptr, own_ids_ptr, stream_ids_ptr, positive_ptr,
    fast_ptr,  # [parts, G, own_padded] what `sums` found, RESCUE only
    lse2_ptr,  # [G, own_padded] log2 of the sums
    groups, own_count, stream_count, own_padded, stream_padded, stream_groups, span, parts, too_small,
    D: tl.constexpr, CHUNK: tl.constexpr, OWN: tl.constexpr, STREAM: tl.constexpr,
    LEFT_OUT: tl.constexpr, VALID: tl.constexpr, IDS: tl.constexpr, RESCUE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Own sums with a running maximum, right at any temperature. RESCUE: only in blocks with a row whose plain sum is all but flushed."""
    blocks = tl.cdiv(own_count, OWN)
    block = tl.program_id(0) % blocks
    group = (tl.program_id(0) // blocks).to(tl.int64)
    stream_group = tl.where(stream_groups > 1, group, 0)
    own_first = block * OWN
    own = own_first + tl.arange(0, OWN)
    own_weight = tl.load(own_weight_ptr + group * own_padded + own)
    if RESCUE:
        found = tl.zeros([OWN], tl.float32)
        for part in range(parts):
            found += tl.load(fast_ptr + (tl.cast(part, tl.int64) * groups + group) * own_padded + own)
        if tl.max(((found < too_small) & (own_weight > 0)).to(tl.int32), 0) == 0:
            return
    own_ptr += group * own_padded * D
    stream_ptr += stream_group * stream_padded * D
    stream_weight_ptr += stream_group * stream_padded
    stream_ids_ptr += stream_group * stream_padded
    if IDS:
        own_ids = tl.load(own_ids_ptr + group * own_padded + own)
    if LEFT_OUT == OWN_POSITIVE:
        positive = tl.load(positive_ptr + group * own_count + own, mask=own < own_count, other=-1).to(tl.int32)
    x = tile(own_ptr, own_first, OWN, D, CHUNK)
    top = tl.full([OWN], -1e30, tl.float32)  # finite: -inf less -inf is NaN
    total = tl.zeros([OWN], tl.float32)
    for stream_first in range(0, stream_count, STREAM):
        stream = stream_first + tl.arange(0, STREAM)
        y = tile(stream_ptr, stream_first, STREAM, D, CHUNK)
        s = similarities(own_ptr, stream_ptr, x, y, own_first, stream_first, OWN, STREAM, D, CHUNK, PRECISION)
        keep = (stream < stream_count)[None, :] & (own < own_count)[:, None]
        if LEFT_OUT == OWN_POSITIVE:
            keep = keep & (stream[None, :] != positive[:, None])
        elif LEFT_OUT != NOTHING:
            keep = keep & ~left_out(own[:, None], stream[None, :], span, LEFT_OUT)
        if IDS:
            keep = keep & (own_ids[:, None] != tl.load(stream_ids_ptr + stream)[None, :])
        if VALID:
            keep = keep & (tl.load(stream_weight_ptr + stream) > 0)[None, :]
        s = tl.where(keep, s, -float("inf"))
        above = tl.maximum(top, tl.max(s, 1))  # drops NaN, which exp2(s) brings back
        total = total * tl.exp2(top - above) + tl.sum(tl.exp2(s - above[:, None]), 1)
        top = above
    tl.store(lse2_ptr + group * own_padded + own, top + tl.log2(total))


class Sums(NamedTuple):
    """Sums of one set of rows: parts that add up, and log2 of the whole where the running maximum found it."""

    sums: Tensor  # [parts, G, padded]
    lse2: Tensor  # [G, padded]

    @property
    def parts(self) -> int:
        return self.sums.shape[0]


def losses(problem: Problem) -> tuple[Tensor, Tensor]:
    """losses and lse, both [G, anchors]."""
    losses, lse = (problem.x.weight.new_empty((problem.groups, problem.anchors)) for _ in range(2))
    if problem.index is not None:  # rows of b that no index names
        losses.fill_(float("nan"))
        lse.fill_(float("nan"))
    if problem.groups * problem.n > 0:
        queue = _sweep(problem, problem.x, problem.queue, NOTHING.value)[0] if problem.queue else None
        for half, sums in zip(problem.anchor_halves, _negatives(problem), strict=True):
            _losses(problem, half, sums, queue, losses, lse)
    return losses, lse


def _negatives(problem: Problem) -> list[Sums]:
    """Of the anchors of each view."""
    x, y = problem.x, problem.y
    if problem.negatives == "forward":
        return _sweep(problem, x, y, problem.left_out)
    if problem.negatives == "joint":
        return _sweep(problem, x, y, problem.left_out, triangle=True) * 2
    return _sweep(problem, y, x, problem.left_out, both=True)[::-1]


def _sweep(problem: Problem, own: Rows, stream: Rows, left_out: int, *, triangle: bool = False, both: bool = False) -> list[Sums]:
    """Sums over `stream` of each row of `own`, and with `both` the other way round."""
    form, has_ids = problem.format, problem.has_ids and stream is not problem.queue
    pairs = [(own, stream), (stream, own)] if both else [(own, stream)]
    empty = own.weight
    if problem.regime == ONLINE.value:
        return [_online(problem, *pair, left_out, Sums(empty.unsqueeze(0), empty), has_ids) for pair in pairs]
    weighed = own.ragged or stream.ragged
    blocks = sum_blocks(form, weighed or has_ids or left_out in (OWN_POSITIVE.value, NOTHING.value), problem.shared)
    own_blocks, tiles = triton.cdiv(own.count, blocks.own), triton.cdiv(stream.count, blocks.stream)
    own_part, part_tiles = triangle_parts_of(own_blocks, blocks) if triangle else parts_of(own_blocks, tiles, problem.groups)
    own_parts, stream_parts = triton.cdiv(own_blocks, own_part), triton.cdiv(tiles, part_tiles)
    edge = int(left_out in (DIAGONAL.value, JOINT.value))
    found = [empty.new_zeros((own_parts + edge, problem.groups, stream.padded))] if both or triangle else []
    found.insert(0, found[0] if triangle else empty.new_empty((stream_parts + edge, problem.groups, own.padded)))
    options = {"VALID": weighed, "IDS": has_ids, "SHIFT": problem.regime == SHIFTED.value, "PRECISION": form.precision}
    sums[(own_parts * stream_parts * problem.groups,)](
        own.scaled, stream.scaled, own.weight, stream.weight, own.ids, stream.ids, problem.positive, found[0], found[-1], *problem.clamp,
        problem.headroom, problem.groups, own.count, stream.count, own.padded, stream.padded, stream.scaled.shape[0], problem.span,
        own_parts, stream_parts, own_part, part_tiles, D=form.d, CHUNK=form.chunk, LEFT_OUT=left_out, TRIANGLE=triangle,
        STREAM_SUMS=both or triangle, **options, **blocks.options,
    )  # fmt: skip
    result = []
    for (own, stream), into in zip(pairs, found, strict=False):
        if edge:
            few = row_blocks(form, problem.shared)
            edges[(problem.groups * triton.cdiv(own.count, few.own),)](
                own.scaled, stream.scaled, own.weight, stream.weight, own.ids, stream.ids, into[-1], *problem.clamp, problem.headroom,
                own.count, stream.count, own.padded, stream.padded, problem.span, D=form.d, CHUNK=form.chunk, BLOCK=blocks.own,
                LEFT_OUT=left_out, **options, **few.options,
            )  # fmt: skip
        plain = Sums(into, empty)
        result.append(plain if problem.regime == PLAIN.value else _online(problem, own, stream, left_out, plain, has_ids))
    return result


def _online(problem: Problem, own: Rows, stream: Rows, left_out: int, plain: Sums, has_ids: bool) -> Sums:
    form, blocks = problem.format, row_blocks(problem.format, problem.shared)
    lse2 = torch.empty_like(own.weight)
    online[(problem.groups * triton.cdiv(own.count, blocks.own),)](
        own.scaled, stream.scaled, own.weight, stream.weight, own.ids, stream.ids, problem.positive, plain.sums, lse2,
        problem.groups, own.count, stream.count, own.padded, stream.padded, stream.scaled.shape[0], problem.span, plain.parts,
        problem.too_small, D=form.d, CHUNK=form.chunk, LEFT_OUT=left_out, VALID=stream.ragged, IDS=has_ids,
        RESCUE=problem.regime == SHIFTED.value, PRECISION=form.precision, **blocks.options,
    )  # fmt: skip
    return Sums(plain.sums, lse2)


def _losses(problem: Problem, half: Half, found: Sums, queue: Sums | None, losses: Tensor, lse: Tensor) -> None:
    extra = queue or found
    own, partner = half.own, half.partner
    infonce_rows.losses[(problem.groups * triton.cdiv(half.count, problem.format.rows),)](
        own.scaled, partner.scaled, own.weight, partner.weight, half.index, problem.positive,
        found.sums, found.lse2, extra.sums, extra.lse2, losses, lse,
        *problem.clamp, problem.headroom, problem.too_small, problem.groups, half.count, own.padded, partner.padded, problem.m,
        half.offset, half.partner_offset, half.column, problem.anchors, found.parts, extra.parts, **problem.format.sizes,
        INDEX=half.index is not None, POSITIVE=problem.positive is not None, QUEUE=queue is not None, REGIME=problem.regime,
    )  # fmt: skip
