"""Gradient products (infonce.6) over the negatives: every program recomputes the tiles of its rows and multiplies them at once; no atomics.

With w_i = g_i exp2(c - lse2_i), the pair (i, j) weighs P_ij = exp2(s_ij - c) (w_i + w_j): both rows contrast with each other in "joint" and "cross",
so that one product a side is the whole gradient. "forward" keeps the anchors' term alone.
"""

import triton
import triton.language as tl

from pix2rep_kernels.triton.infonce_rows import ONLINE, SHIFTED, shift_of, temperature_of
from pix2rep_kernels.triton.tiles import LOG2E, NOTHING, OWN_POSITIVE, STREAM_POSITIVE, add_product, left_out, similarities, tile, touches


@triton.jit
def products(
    own_ptr, stream_ptr, stream_plain_ptr,  # [G, own_padded, D], [G, stream_padded, D] twice: scaled, and as it enters the gradient
    own_share_ptr, stream_share_ptr,  # [G, padded] w; ONLINE: g, and lse2 below
    own_lse2_ptr, stream_lse2_ptr,
    own_ids_ptr, stream_ids_ptr,  # [G, padded] int32
    positive_ptr,  # [G, anchors] int64
    out_ptr,  # [parts, G, own_padded, D] float32
    flushed_ptr,  # [] bool: SHIFTED would flush a row
    temperature_ptr, floor, headroom,
    groups, own_count, stream_count, own_padded, stream_padded, stream_groups, span, parts, part_tiles,
    D: tl.constexpr, CHUNK: tl.constexpr, SLICE: tl.constexpr, OWN: tl.constexpr, STREAM: tl.constexpr,
    LEFT_OUT: tl.constexpr, OWN_ANCHORS: tl.constexpr, STREAM_ANCHORS: tl.constexpr, IDS: tl.constexpr, SHARED: tl.constexpr,
    REGIME: tl.constexpr, GUARDED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """SHARED: stream_plain is stream. GUARDED: run only if `flushed` says that this REGIME is the one to run."""
    if GUARDED:
        if (tl.load(flushed_ptr) != 0) != (REGIME == ONLINE):
            return
    program = tl.program_id(0)
    part = program % parts
    first_feature = program // parts % (D // SLICE) * SLICE
    blocks = tl.cdiv(own_count, OWN)
    own_first = program // (parts * (D // SLICE)) % blocks * OWN
    group = (program // (parts * (D // SLICE) * blocks)).to(tl.int64)
    stream_group = group % stream_groups
    own_ptr += group * own_padded * D
    stream_ptr += stream_group * stream_padded * D
    stream_plain_ptr += stream_group * stream_padded * D + first_feature
    stream_share_ptr += stream_group * stream_padded
    stream_lse2_ptr += stream_group * stream_padded
    stream_ids_ptr += stream_group * stream_padded
    own = own_first + tl.arange(0, OWN)
    if OWN_ANCHORS:
        own_share = tl.load(own_share_ptr + group * own_padded + own)
        if REGIME == ONLINE:
            own_lse2 = tl.load(own_lse2_ptr + group * own_padded + own)
    if IDS:
        own_ids = tl.load(own_ids_ptr + group * own_padded + own)
    if LEFT_OUT == OWN_POSITIVE:
        own_positive = tl.load(positive_ptr + group * own_count + own, mask=own < own_count, other=-1).to(tl.int32)
    if REGIME == SHIFTED:
        shift = shift_of(temperature_ptr, floor, headroom)
    x = tile(own_ptr, own_first, OWN, D, CHUNK)
    total = tl.zeros([OWN, SLICE], tl.float32)
    first_tile = part * part_tiles
    for index in range(first_tile, tl.minimum(first_tile + part_tiles, tl.cdiv(stream_count, STREAM))):
        stream_first = index * STREAM
        stream = stream_first + tl.arange(0, STREAM)
        y = tile(stream_ptr, stream_first, STREAM, D, CHUNK)
        s = similarities(own_ptr, stream_ptr, x, y, own_first, stream_first, OWN, STREAM, D, CHUNK, PRECISION)  # (infonce.1)
        if LEFT_OUT != NOTHING:
            if touches(own_first, stream_first, OWN, STREAM, span, LEFT_OUT):
                if LEFT_OUT == OWN_POSITIVE:
                    positive = own_positive[:, None]
                elif LEFT_OUT == STREAM_POSITIVE:
                    positive = tl.load(positive_ptr + group * stream_count + stream, mask=stream < stream_count, other=-1).to(tl.int32)[None, :]
                else:
                    positive = own[:, None]
                s = tl.where(left_out(own[:, None], stream[None, :], positive, span, LEFT_OUT), -float("inf"), s)
        if IDS:
            s = tl.where(own_ids[:, None] != tl.load(stream_ids_ptr + stream)[None, :], s, -float("inf"))
        if REGIME == ONLINE:
            p = tl.zeros([OWN, STREAM], tl.float32)
            if OWN_ANCHORS:
                p += own_share[:, None] * tl.exp2(s - own_lse2[:, None])
            if STREAM_ANCHORS:
                p += tl.load(stream_share_ptr + stream)[None, :] * tl.exp2(s - tl.load(stream_lse2_ptr + stream)[None, :])
        else:
            if REGIME == SHIFTED:
                s -= shift
            if OWN_ANCHORS and STREAM_ANCHORS:
                p = tl.exp2(s) * (own_share[:, None] + tl.load(stream_share_ptr + stream)[None, :])  # (infonce.5)
            elif OWN_ANCHORS:
                p = tl.exp2(s) * own_share[:, None]
            else:
                p = tl.exp2(s) * tl.load(stream_share_ptr + stream)[None, :]
        if SHARED and SLICE == CHUNK and SLICE == D:
            z = y
        else:
            z = tile(stream_plain_ptr, stream_first, STREAM, D, SLICE)
        total = add_product(p.to(stream_plain_ptr.dtype.element_ty), z, total, PRECISION)
    out = (tl.cast(part, tl.int64) * groups + group) * own_padded * D + first_feature
    tl.store(out_ptr + out + own[:, None].to(tl.int64) * D + tl.arange(0, SLICE)[None, :], total)


@triton.jit
def gradients(
    products_ptr, queue_products_ptr,  # [parts, G, own_padded, D] float32
    own_ptr, partner_ptr, own_weight_ptr,  # scaled operands; 0 where invalid
    own_share_ptr, partner_share_ptr,  # [G, padded] positive shares of the anchors
    index_ptr,  # [G, count] int64: the row of grad
    positive_ptr,  # PARTNERS == "gather": [G, count]; "list": the anchors [G, anchors] in the order of their positives
    first_ptr,  # "list": [G, count + 1] where each row's anchors begin
    largest_ptr, temperature_ptr, floor,
    grad_ptr, dots_ptr,  # [G, count, width]; [G, blocks] sums of <x, grad>
    groups, count, own_padded, partner_padded, partner_count, offset, partner_offset, width, parts, queue_parts, halved,
    D: tl.constexpr, SPAN: tl.constexpr, BLOCK: tl.constexpr, OWN_ANCHORS: tl.constexpr, STREAM_ANCHORS: tl.constexpr,
    INDEX: tl.constexpr, PARTNERS: tl.constexpr, QUEUE: tl.constexpr, DOTS: tl.constexpr, UNSCALE: tl.constexpr,
):  # fmt: skip
    """Gradient of `count` rows: sum the parts in their order, add the positive pairs, scale, zero invalid rows, store where the row came from."""
    blocks = tl.cdiv(count, BLOCK)
    group = (tl.program_id(0) // blocks).to(tl.int64)
    row = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    mask = row < count
    feature = tl.arange(0, SPAN)
    features = (feature < D)[None, :]
    own = group * own_padded + offset + row
    cells = own[:, None] * D + feature[None, :]
    tau = temperature_of(temperature_ptr, floor)
    root = tl.sqrt(1.0 / tau * LOG2E)
    negatives = tl.zeros([BLOCK, SPAN], tl.float32)
    for part in range(parts):
        negatives += tl.load(products_ptr + tl.cast(part, tl.int64) * groups * own_padded * D + cells, mask=mask[:, None] & features, other=0.0)
    queued = tl.zeros([BLOCK, SPAN], tl.float32)
    if QUEUE:
        for part in range(queue_parts):
            queued += tl.load(queue_products_ptr + tl.cast(part, tl.int64) * groups * own_padded * D + cells, mask=mask[:, None] & features, other=0.0)
    if UNSCALE:
        negatives /= root
        queued /= root
    attracted = tl.zeros([BLOCK, SPAN], tl.float32)
    if PARTNERS == "list":
        begin = tl.load(first_ptr + group * (count + 1) + row, mask=mask, other=0)
        length = tl.load(first_ptr + group * (count + 1) + row + 1, mask=mask, other=0) - begin
        for step in range(tl.max(length, 0)):
            more = mask & (step < length)
            anchor = group * partner_padded + tl.load(positive_ptr + group * partner_count + begin + step, mask=more, other=0)
            share = tl.load(partner_share_ptr + anchor, mask=more, other=0.0)
            y = tl.load(partner_ptr + anchor[:, None] * D + feature[None, :], mask=more[:, None] & features, other=0.0)
            attracted += share[:, None] * y.to(tl.float32)
    else:
        match = row.to(tl.int64)
        if PARTNERS == "gather":
            match = tl.load(positive_ptr + group * count + row, mask=mask, other=-1)
        inside = mask & (match >= 0) & (match < partner_count)
        partner = group * partner_padded + partner_offset + match
        y = tl.load(partner_ptr + partner[:, None] * D + feature[None, :], mask=inside[:, None] & features, other=0.0).to(tl.float32)
        if OWN_ANCHORS:
            attracted += tl.load(own_share_ptr + own, mask=mask, other=0.0)[:, None] * y
        if STREAM_ANCHORS:
            attracted += tl.load(partner_share_ptr + partner, mask=inside, other=0.0)[:, None] * y
    scale = tl.load(largest_ptr + group) / tau
    total = negatives + attracted / root
    kept = mask & (tl.load(own_weight_ptr + own, mask=mask, other=0.0) > 0)
    if DOTS:
        x = tl.load(own_ptr + cells, mask=mask[:, None] & features, other=0.0).to(tl.float32) / root
        dots = tl.sum(x * (total * halved + queued), 1) * scale
        tl.store(dots_ptr + tl.program_id(0), tl.sum(tl.where(kept, dots, 0.0), 0))
    total = tl.where(kept[:, None], (total + queued) * scale, 0.0)
    home = row.to(tl.int64)
    if INDEX:
        home = tl.load(index_ptr + group * count + row, mask=mask, other=-1)
        mask = mask & (home >= 0) & (home < count)
    grad = (group * count + home)[:, None] * width + feature[None, :]
    tl.store(grad_ptr + grad, total.to(grad_ptr.dtype.element_ty), mask=mask[:, None] & (feature < width)[None, :])
