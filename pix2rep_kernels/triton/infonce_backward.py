"""Gradient products (infonce.6) over the negatives: every program recomputes the tiles of its rows and multiplies them at once; no atomics.

With w_i = g_i exp2(c - lse2_i), the pair (i, j) weighs P_ij = exp2(s_ij - c) (w_i + w_j): in "joint" and "cross" each row of a pair is an
anchor to the other, so that one product a side is the whole gradient. "forward" keeps the anchors' term alone.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pix2rep_kernels.triton import infonce_rows
from pix2rep_kernels.triton.infonce_blocks import PROGRAMS, VARYING, product_blocks
from pix2rep_kernels.triton.infonce_problem import Half, Problem, Rows
from pix2rep_kernels.triton.infonce_rows import ONLINE, PLAIN, SHIFTED, root_of, shift_of, temperature_of
from pix2rep_kernels.triton.tiles import (
    LOG2E,
    NOTHING,
    OWN_POSITIVE,
    STREAM_POSITIVE,
    add_product,
    left_out,
    similarities,
    tile,
    touches,
)


@triton.jit(do_not_specialize=VARYING)
def products(
    own_ptr, stream_ptr, stream_plain_ptr,  # [G, own_padded, D], [G, stream_padded, D] twice: scaled, and as it enters the gradient
    own_share_ptr, stream_share_ptr,  # [G, padded] w; ONLINE: g, and lse2 below
    own_lse2_ptr, stream_lse2_ptr, stream_weight_ptr,
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
    stream_group = tl.where(stream_groups > 1, group, 0)
    own_ptr += group * own_padded * D
    stream_ptr += stream_group * stream_padded * D
    stream_plain_ptr += stream_group * stream_padded * D + first_feature
    stream_share_ptr += stream_group * stream_padded
    stream_lse2_ptr += stream_group * stream_padded
    stream_weight_ptr += stream_group * stream_padded
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
        if LEFT_OUT == OWN_POSITIVE:
            s = tl.where(stream[None, :] == own_positive[:, None], -float("inf"), s)
        elif LEFT_OUT == STREAM_POSITIVE:
            stream_positive = tl.load(positive_ptr + group * stream_count + stream, mask=stream < stream_count, other=-1).to(tl.int32)
            s = tl.where(own[:, None] == stream_positive[None, :], -float("inf"), s)
        elif LEFT_OUT != NOTHING:
            if touches(own_first, stream_first, OWN if OWN > STREAM else STREAM, span, LEFT_OUT):
                s = tl.where(left_out(own[:, None], stream[None, :], span, LEFT_OUT), -float("inf"), s)
        if IDS:
            s = tl.where(own_ids[:, None] != tl.load(stream_ids_ptr + stream)[None, :], s, -float("inf"))
        if REGIME == ONLINE:
            # A row of zeros adds nothing as long as its weight is finite, which one shift ensures and this does not.
            s = tl.where((tl.load(stream_weight_ptr + stream) > 0)[None, :], s, -float("inf"))
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


@triton.jit(do_not_specialize=VARYING)
def gradients(
    products_ptr, queue_products_ptr,  # [parts, G, own_padded, D] float32
    own_ptr, partner_ptr, own_weight_ptr,  # scaled operands; 0 where invalid
    own_share_ptr, partner_share_ptr,  # [G, padded] positive shares of the anchors
    index_ptr,  # [G, count] int64: the row of grad
    positive_ptr,  # PARTNERS == "gather": [G, count]; "list": the anchors [G, anchors] in the order of their positives
    first_ptr,  # "list": [G, count + 1] where each row's anchors begin
    largest_ptr, temperature_ptr, floor,
    grad_ptr, dots_ptr,  # [G, count, width]; [G, blocks] sums of <x, grad>
    groups, count, own_padded, partner_padded, partner_count, offset, partner_offset, width, parts, queue_parts,
    halved,  # the weight of <x, grad> less the queue's share: "joint" counts each pair twice
    D: tl.constexpr, SPAN: tl.constexpr, BLOCK: tl.constexpr, OWN_ANCHORS: tl.constexpr, STREAM_ANCHORS: tl.constexpr,
    INDEX: tl.constexpr, PARTNERS: tl.constexpr, QUEUE: tl.constexpr, DOTS: tl.constexpr, UNSCALE: tl.constexpr,
):  # fmt: skip
    """Gradient of `count` rows: sum the parts in order, add the positive pairs, scale, zero invalid rows, store where they came from."""
    blocks = tl.cdiv(count, BLOCK)
    group = (tl.program_id(0) // blocks).to(tl.int64)
    row = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    mask = row < count
    feature = tl.arange(0, SPAN)
    features = (feature < D)[None, :]
    known = mask[:, None] & features
    own = group * own_padded + offset + row
    cells = own[:, None] * D + feature[None, :]
    root = root_of(temperature_ptr, floor)
    negatives = tl.zeros([BLOCK, SPAN], tl.float32)
    for part in range(parts):
        negatives += tl.load(products_ptr + tl.cast(part, tl.int64) * groups * own_padded * D + cells, mask=known, other=0.0)
    queued = tl.zeros([BLOCK, SPAN], tl.float32)
    if QUEUE:
        for part in range(queue_parts):
            queued += tl.load(queue_products_ptr + tl.cast(part, tl.int64) * groups * own_padded * D + cells, mask=known, other=0.0)
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
    scale = tl.div_rn(tl.load(largest_ptr + group), temperature_of(temperature_ptr, floor))
    total = negatives + attracted / root
    kept = mask & (tl.load(own_weight_ptr + own, mask=mask, other=0.0) > 0)
    if DOTS:
        x = tl.load(own_ptr + cells, mask=known, other=0.0).to(tl.float32) / root
        dots = tl.sum(x * (total * halved + queued), 1) * scale
        tl.store(dots_ptr + tl.program_id(0), tl.sum(tl.where(kept, dots, 0.0), 0))
    total = tl.where(kept[:, None], (total + queued) * scale, 0.0)
    home = row.to(tl.int64)
    if INDEX:
        home = tl.load(index_ptr + group * count + row, mask=mask, other=-1)
        mask = mask & (home >= 0) & (home < count)
    grad = (group * count + home)[:, None] * width + feature[None, :]
    tl.store(grad_ptr + grad, total.to(grad_ptr.dtype.element_ty), mask=mask[:, None] & (feature < width)[None, :])


class Weights(NamedTuple):
    """Weights of the anchors of one set of rows, [G, padded]."""

    share: Tensor  # g exp2(c - lse2)
    positive_share: Tensor
    grad: Tensor
    lse2: Tensor


def grads(
    problem: Problem, grad_losses: Tensor, losses: Tensor, lse: Tensor, a: Tensor, b: Tensor, needs: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a, b and temperature; one that is not needed has shape [0]."""
    temperature, need_temperature = problem.temperature, needs[2]
    found = [_grad_like(rows, need, half) for rows, need, half in zip((a, b), needs, problem.halves, strict=False)]
    grad_temperature = temperature.new_zeros(() if need_temperature else (0,))
    if problem.groups * problem.n == 0 or not any(needs):
        return *(grad.zero_() for grad in found), grad_temperature
    finite = (lse != torch.inf) & grad_losses.isfinite()
    largest = torch.where(finite, grad_losses, 0).abs().amax(1).float()
    weights = _weights(problem, grad_losses, losses, lse, largest)
    flushed = _flushed(problem, lse)
    joint = problem.negatives == "joint"
    # <x, dx> over all rows counts each pair of "joint" twice, but its queue once; "cross" and "forward" have all of it in a.
    measured = (need_temperature, need_temperature and joint)
    dots = []
    parts = None
    for side, half in enumerate(problem.halves):
        if needs[side] or measured[side]:
            parts = parts if joint and parts else _products(problem, side, weights, flushed)
            target = found[side] if needs[side] else torch.empty_like((a, b)[side], memory_format=torch.contiguous_format)
            dots.append(_gradients(problem, side, half, parts, weights, largest, target, measured[side]))
    if need_temperature:
        tau = temperature.float().clamp(min=problem.floor)
        total = -torch.cat([d for d in dots if d is not None]).sum() / tau  # (infonce.7)
        grad_temperature = torch.where(temperature < problem.floor, 0, total).to(temperature.dtype)
    return *found, grad_temperature


def _grad_like(rows: Tensor, need: bool, half: Half) -> Tensor:
    grad = torch.empty(rows.shape if need else (0,), dtype=rows.dtype, device=rows.device)
    return grad if half.index is None else grad.fill_(float("nan"))  # rows of b that no index names


def _weights(problem: Problem, grad_losses: Tensor, losses: Tensor, lse: Tensor, largest: Tensor) -> dict[int, Weights]:
    """Weights of x and y by the identity of their rows."""
    found = {}
    for half in problem.anchor_halves:
        own = half.own
        new = id(own) not in found
        weights = found.setdefault(id(own), Weights(*torch.empty((4, *own.weight.shape), device=own.weight.device)))
        written = half.count if problem.negatives == "joint" and new else own.padded - half.offset
        infonce_rows.weights[(problem.groups * triton.cdiv(written, 128),)](
            grad_losses, losses, lse, largest, half.index, *weights, *problem.clamp, problem.headroom, half.count, written, half.offset,
            own.padded, half.column, problem.anchors, *grad_losses.stride(), BLOCK=128, INDEX=half.index is not None,
            SHIFT=problem.regime == SHIFTED.value,
        )  # fmt: skip
    return found


def _flushed(problem: Problem, lse: Tensor) -> Tensor | None:
    """Whether a weight exp2(c - lse2) leaves the range that one constant c serves, as a bool on the device."""
    if problem.regime != SHIFTED.value:
        return None
    tau = problem.temperature.float().clamp(min=problem.floor)
    shift = (LOG2E.value / tau * 1.004 - problem.headroom).clamp(min=0)
    return shift - lse.amin() * LOG2E.value > 100


def _products(problem: Problem, side: int, weights: dict[int, Weights], flushed: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Products of the rows of one side with all its candidates, and with the queue; [parts, G, padded, D] float32 each."""
    half = problem.halves[side]
    own, stream = half.own, half.partner
    positive_of_stream = side == 1 and problem.positive is not None
    left_out = STREAM_POSITIVE.value if positive_of_stream else problem.left_out
    main = _product(problem, own, stream, weights.get(id(own)), weights.get(id(stream)), left_out, flushed)
    queue = None
    if problem.queue is not None and id(own) in weights:
        queue = _product(problem, own, problem.queue, weights[id(own)], None, NOTHING.value, flushed)
    return main, queue


def _product(
    problem: Problem, own: Rows, stream: Rows, own_weights: Weights | None, stream_weights: Weights | None, left_out: int,
    flushed: Tensor | None,
) -> Tensor:  # fmt: skip
    form, empty = problem.format, own.weight
    has_ids = problem.has_ids and stream is not problem.queue
    blocks = product_blocks(form, problem.shared, plain=not has_ids and problem.regime == PLAIN.value)
    tiles = triton.cdiv(stream.count, blocks.stream)
    programs = triton.cdiv(own.count, blocks.own) * problem.groups * (form.d // form.slice)
    parts = max(1, min(tiles, triton.cdiv(PROGRAMS, programs)))
    out = own.weight.new_empty((parts, problem.groups, own.padded, form.d))
    for regime in (SHIFTED, ONLINE) if problem.regime == SHIFTED.value else (problem.regime,):
        regime = getattr(regime, "value", regime)
        shares = [empty if w is None else w.grad if regime == ONLINE.value else w.share for w in (own_weights, stream_weights)]
        lse2 = [empty if w is None else w.lse2 for w in (own_weights, stream_weights)]
        products[(parts * programs,)](
            own.scaled, stream.scaled, stream.plain, *shares, *lse2, stream.weight, own.ids, stream.ids, problem.positive, out, flushed,
            *problem.clamp, problem.headroom, problem.groups, own.count, stream.count, own.padded, stream.padded, stream.scaled.shape[0],
            problem.span, parts, triton.cdiv(tiles, parts), D=form.d, CHUNK=form.chunk, SLICE=form.slice, LEFT_OUT=left_out,
            OWN_ANCHORS=own_weights is not None, STREAM_ANCHORS=stream_weights is not None,
            IDS=has_ids, SHARED=stream.plain is stream.scaled, REGIME=regime,
            GUARDED=flushed is not None, PRECISION=form.precision, **blocks.options,
        )  # fmt: skip
    return out


def _gradients(
    problem: Problem, side: int, half: Half, parts: tuple[Tensor, Tensor | None], weights: dict[int, Weights], largest: Tensor,
    grad: Tensor, measured: bool,
) -> Tensor | None:  # fmt: skip
    """Finish the gradient of one view in `grad`; partial sums of <x, dx> when `measured`."""
    own, partner = half.own, half.partner
    main, queue = parts
    partners, positive, first = "same", None, None
    if problem.positive is not None and side == 0:
        partners, positive = "gather", problem.positive
    elif problem.positive is not None:
        ordered, positive = problem.positive.sort(dim=1, stable=True)
        rows = torch.arange(half.count + 1, device=ordered.device).expand(problem.groups, -1).contiguous()
        partners, first = "list", torch.searchsorted(ordered, rows)
    own_weights, partner_weights = weights.get(id(own)), weights.get(id(partner))
    programs = problem.groups * triton.cdiv(half.count, problem.format.rows)
    dots = own.weight.new_empty(programs) if measured else None
    if programs:
        gradients[(programs,)](
            main, main if queue is None else queue, own.scaled, partner.scaled, own.weight,
            own.weight if own_weights is None else own_weights.positive_share,
            own.weight if partner_weights is None else partner_weights.positive_share,
            half.index, positive, first, largest, *problem.clamp, grad, dots, problem.groups, half.count, own.padded, partner.padded,
            problem.n if side else problem.m, half.offset, half.partner_offset, grad.shape[2], main.shape[0],
            0 if queue is None else queue.shape[0], 0.5 if problem.negatives == "joint" else 1.0, **problem.format.sizes,
            OWN_ANCHORS=own_weights is not None, STREAM_ANCHORS=partner_weights is not None, INDEX=half.index is not None,
            PARTNERS=partners, QUEUE=queue is not None, DOTS=measured, UNSCALE=not problem.format.half,
        )  # fmt: skip
    return dots
