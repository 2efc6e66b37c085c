"""What infonce does once a row, around the sweeps over pairs: prepared operands, losses (infonce.3-4), weights of the gradients."""

import triton
import triton.language as tl

from pix2rep_kernels.triton.infonce_blocks import VARYING
from pix2rep_kernels.triton.tiles import LN2, LOG2E, log1p, one_minus_exp

# How exp2(s) keeps its range: as it is; less one constant, with rows that it would flush swept again; with a running maximum.
PLAIN = tl.constexpr(0)
SHIFTED = tl.constexpr(1)
ONLINE = tl.constexpr(2)


@triton.jit
def temperature_of(temperature_ptr, floor):
    """tau, clamped to its floor; NaN stays."""
    temperature = tl.load(temperature_ptr).to(tl.float32)
    return tl.where(temperature < floor, floor, temperature)


@triton.jit
def root_of(temperature_ptr, floor):
    """sqrt(log2(e) / tau). Every row has its error, which no sum averages out: correctly rounded, unlike `/` and `tl.sqrt`."""
    return tl.sqrt_rn(tl.div_rn(LOG2E, temperature_of(temperature_ptr, floor)))


@triton.jit
def shift_of(temperature_ptr, floor, headroom):
    """The smallest c >= 0 with which a sum of exp2(s - c) cannot overflow; headroom = 125 - log2(candidates)."""
    most = 1.004 / temperature_of(temperature_ptr, floor) * LOG2E  # rounded unit rows may reach a cosine of 1.002
    return tl.where(most < headroom, 0.0, most - headroom)


@triton.jit(do_not_specialize=VARYING)
def prepare(
    rows_ptr, index_ptr, valid_ptr,  # [G, source, width] in any strides; [G, count] int64; [G, source] bool
    scaled_ptr, plain_ptr, weight_ptr,  # [G, padded, D] x sqrt(log2(e) / tau); [G, padded, D]; [G, padded]
    temperature_ptr, floor,
    count, written, source, offset, padded, stride_group, stride_row, stride_feature, width,
    D: tl.constexpr, SPAN: tl.constexpr, BLOCK: tl.constexpr, INDEX: tl.constexpr, VALID: tl.constexpr, COPY: tl.constexpr,
):  # fmt: skip
    """Rows offset .. offset + written of the operands: invalid rows and those from `count` on are 0, rows from outside the source NaN."""
    blocks = tl.cdiv(written, BLOCK)
    group = (tl.program_id(0) // blocks).to(tl.int64)
    row = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    feature = tl.arange(0, SPAN)
    present = row < count
    home = row.to(tl.int64)
    if INDEX:
        home = tl.load(index_ptr + group * count + row, mask=present, other=0)
    inside = present & (home >= 0) & (home < source)
    weight = present
    if VALID:
        weight = tl.load(valid_ptr + group * source + home, mask=inside, other=1).to(tl.int1) & present
    places = group * stride_group + home[:, None] * stride_row + feature[None, :].to(tl.int64) * stride_feature
    loaded = (inside & weight)[:, None] & (feature < width)[None, :]
    x = tl.load(rows_ptr + places, mask=loaded, other=0.0).to(tl.float32)
    x = tl.where((present & ~inside)[:, None], float("nan"), x)
    out = group * padded + offset + row
    within = row < written
    tl.store(weight_ptr + out, weight.to(tl.float32), mask=within)
    stored = within[:, None] & (feature < D)[None, :]
    at = out[:, None] * D + feature[None, :]
    root = root_of(temperature_ptr, floor)
    tl.store(scaled_ptr + at, (x * root).to(scaled_ptr.dtype.element_ty), mask=stored)
    if COPY:
        tl.store(plain_ptr + at, x.to(plain_ptr.dtype.element_ty), mask=stored)


@triton.jit
def log2_sum(sums_ptr, lse2_ptr, row, mask, parts, part_stride, shift, too_small, REGIME: tl.constexpr):
    """log2 of the sum over one set of candidates, from the parts of the sweep in their order."""
    if REGIME == ONLINE:
        return tl.load(lse2_ptr + row, mask=mask, other=0.0)
    total = tl.zeros(row.shape, tl.float32)
    for first in range(0, parts, 16):  # 16 loads under way at a time
        part = first + tl.arange(0, 16)
        cells = part[:, None].to(tl.int64) * part_stride + row[None, :]
        total += tl.sum(tl.load(sums_ptr + cells, mask=(part < parts)[:, None] & mask[None, :], other=0.0), 0)
    log2 = tl.log2(total) + shift
    if REGIME == SHIFTED:
        log2 = tl.where(total < too_small, tl.load(lse2_ptr + row, mask=mask, other=0.0), log2)
    return log2


@triton.jit(do_not_specialize=VARYING)
def losses(
    own_ptr, partner_ptr, own_weight_ptr, partner_weight_ptr,  # prepared operands and weights
    index_ptr, positive_ptr,  # [G, count] int64: column of the outputs; row of the partner
    sums_ptr, lse2_ptr, queue_sums_ptr, queue_lse2_ptr,  # [parts, G, padded], [G, padded] of `sums` and `online`
    losses_ptr, lse_ptr,  # [G, anchors]
    temperature_ptr, floor, headroom, too_small,
    groups, count, padded, partner_padded, partner_count, offset, partner_offset, column, anchors, parts, queue_parts,
    D: tl.constexpr, SPAN: tl.constexpr, BLOCK: tl.constexpr,
    INDEX: tl.constexpr, POSITIVE: tl.constexpr, QUEUE: tl.constexpr, REGIME: tl.constexpr,
):  # fmt: skip
    """Losses and lse of `count` anchors, the prepared rows from `offset` on."""
    blocks = tl.cdiv(count, BLOCK)
    group = (tl.program_id(0) // blocks).to(tl.int64)
    anchor = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    mask = anchor < count
    feature = tl.arange(0, SPAN)
    own = group * padded + offset + anchor
    match = anchor.to(tl.int64)
    if POSITIVE:
        match = tl.load(positive_ptr + group * count + anchor, mask=mask, other=0)
    inside = mask & (match >= 0) & (match < partner_count)
    partner = group * partner_padded + partner_offset + match
    x = tl.load(own_ptr + own[:, None] * D + feature[None, :], mask=mask[:, None] & (feature < D)[None, :], other=0.0)
    y = tl.load(partner_ptr + partner[:, None] * D + feature[None, :], mask=inside[:, None] & (feature < D)[None, :], other=0.0)
    s = tl.sum(x.to(tl.float32) * y.to(tl.float32), 1)  # of the operands that the sums used
    s = tl.where(mask & ~inside, float("nan"), s)
    active = (tl.load(own_weight_ptr + own, mask=mask, other=0.0) > 0) & (tl.load(partner_weight_ptr + partner, mask=inside, other=1.0) > 0)
    shift = 0.0
    if REGIME == SHIFTED:
        shift = shift_of(temperature_ptr, floor, headroom)
    r = log2_sum(sums_ptr, lse2_ptr, own, mask, parts, groups * padded, shift, too_small, REGIME)  # (infonce.2)
    if QUEUE:
        r_queue = log2_sum(queue_sums_ptr, queue_lse2_ptr, own, mask, queue_parts, groups * padded, shift, too_small, REGIME)
        top = tl.maximum(tl.maximum(r, r_queue), -1e30)  # finite: -inf less -inf is NaN
        r = top + tl.log2(tl.exp2(r - top) + tl.exp2(r_queue - top))
    loss = tl.maximum((r - s) * LN2, 0.0) + log1p(tl.exp2(-tl.abs(r - s)))  # (infonce.3)
    out = group * anchors + column + anchor
    if INDEX:
        home = tl.load(index_ptr + group * count + anchor, mask=mask, other=-1)
        mask = mask & (home >= 0) & (home < count)
        out = group * anchors + column + home
    tl.store(losses_ptr + out, tl.where(active, loss, 0.0), mask=mask)
    tl.store(lse_ptr + out, tl.where(active, s * LN2 + loss, float("inf")), mask=mask)  # (infonce.4)


@triton.jit(do_not_specialize=(*VARYING, "stride_group"))
def weights(
    grad_losses_ptr, losses_ptr, lse_ptr, largest_ptr,  # [G, anchors] in any strides (first) or contiguous; [G] largest |g| of a group
    index_ptr,  # [G, count] int64
    share_ptr, positive_share_ptr, grad_ptr, lse2_ptr,  # [G, padded]
    temperature_ptr, floor, headroom,
    count, written, offset, padded, column, anchors, stride_group, stride_anchor,
    BLOCK: tl.constexpr, INDEX: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """g exp2(c - lse2), the weight of an anchor's exp2(s - c) in (infonce.5); that of its positive; g and lse2. g is divided by the group's
    largest, so that no weight underflows that another does not dwarf."""
    blocks = tl.cdiv(written, BLOCK)
    group = (tl.program_id(0) // blocks).to(tl.int64)
    anchor = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    mask = anchor < count
    home = anchor.to(tl.int64)
    inside = mask
    if INDEX:
        home = tl.load(index_ptr + group * count + anchor, mask=mask, other=-1)
        inside = mask & (home >= 0) & (home < count)
    saved = group * anchors + column + home
    lse = tl.load(lse_ptr + saved, mask=inside, other=float("inf"))
    lse = tl.where(mask & ~inside, float("nan"), lse)
    loss = tl.load(losses_ptr + saved, mask=inside, other=0.0)
    grad = tl.load(grad_losses_ptr + group * stride_group + (column + home) * stride_anchor, mask=inside, other=0.0).to(tl.float32)
    largest = tl.load(largest_ptr + group)
    active = lse != float("inf")
    grad = tl.where(active, grad / tl.where(largest > 0, largest, 1.0), 0.0)
    lse2 = lse * LOG2E
    shift = 0.0
    if SHIFT:
        shift = shift_of(temperature_ptr, floor, headroom)
    out = group * padded + offset + anchor
    within = anchor < written
    tl.store(share_ptr + out, tl.where(active, grad * tl.exp2(shift - lse2), 0.0), mask=within)
    tl.store(positive_share_ptr + out, tl.where(active, -grad * one_minus_exp(loss), 0.0), mask=within)
    tl.store(grad_ptr + out, grad, mask=within)
    tl.store(lse2_ptr + out, lse2, mask=within)
