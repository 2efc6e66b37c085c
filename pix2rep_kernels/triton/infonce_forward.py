"""Sums over the negatives (infonce.2): one sweep over tiles of exp2(s), whose row and column sums share one exponential a pair.

A program owns a range of blocks of `own` rows, resident one at a time, and streams a range of tiles of `stream` rows past each. Own sums stay in
registers, stream sums go to the program's private slice, which no other program touches: fixed order, no atomics.
"""

import triton
import triton.language as tl

from pix2rep_kernels.triton.infonce_rows import shift_of
from pix2rep_kernels.triton.tiles import NOTHING, OWN_POSITIVE, left_out, similarities, tile, touches


@triton.jit
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
    """TRIANGLE: own and stream are the same rows and parts; parts below the diagonal are the mirror of those above, those on it need row sums only."""
    program = tl.program_id(0)
    stream_part = program % stream_parts
    own_part = program // stream_parts % own_parts
    group = (program // (stream_parts * own_parts)).to(tl.int64)
    if TRIANGLE:
        if stream_part > own_part:
            return
    stream_group = group % stream_groups  # a queue has one group for all
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
        positive = own
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
            if SHIFT:
                s -= shift
            if LEFT_OUT != NOTHING:
                if touches(own_first, stream_first, OWN, STREAM, span, LEFT_OUT):
                    s = tl.where(left_out(own[None, :], stream[:, None], positive[None, :], span, LEFT_OUT), -float("inf"), s)
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
            if stream_part != own_part:
                tl.store(own_sums_ptr + own, own_sums)
        else:
            tl.store(own_sums_ptr + own, own_sums)
        if STREAM_SUMS:
            tl.debug_barrier()  # the next block adds to the same stream sums


@triton.jit
def online(
    own_ptr, stream_ptr, own_weight_ptr, stream_weight_ptr, own_ids_ptr, stream_ids_ptr, positive_ptr,
    fast_ptr,  # [parts, G, own_padded] what `sums` found, RESCUE only
    lse2_ptr,  # [G, own_padded] log2 of the sums
    groups, own_count, stream_count, own_padded, stream_padded, stream_groups, span, parts, too_small,
    D: tl.constexpr, CHUNK: tl.constexpr, OWN: tl.constexpr, STREAM: tl.constexpr,
    LEFT_OUT: tl.constexpr, VALID: tl.constexpr, IDS: tl.constexpr, RESCUE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sums of the own rows with a running maximum: right at any temperature. RESCUE: only in blocks with a row whose plain sum is nearly flushed."""
    blocks = tl.cdiv(own_count, OWN)
    block = tl.program_id(0) % blocks
    group = (tl.program_id(0) // blocks).to(tl.int64)
    stream_group = group % stream_groups
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
    positive = own
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
        if LEFT_OUT != NOTHING:
            keep = keep & ~left_out(own[:, None], stream[None, :], positive[:, None], span, LEFT_OUT)
        if IDS:
            keep = keep & (own_ids[:, None] != tl.load(stream_ids_ptr + stream)[None, :])
        if VALID:
            keep = keep & (tl.load(stream_weight_ptr + stream) > 0)[None, :]
        s = tl.where(keep, s, -float("inf"))
        above = tl.maximum(top, tl.max(s, 1))  # drops NaN, which exp2(s) brings back
        total = total * tl.exp2(top - above) + tl.sum(tl.exp2(s - above[:, None]), 1)
        top = above
    tl.store(lse2_ptr + group * own_padded + own, top + tl.log2(total))
