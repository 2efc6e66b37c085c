"""InfoNCE on the GPU: prepare the rows, sweep the pairs once for the sums, once a side for the gradients; nothing of size N x M is stored.

Forward: one exponential a pair serves row and column sums; "joint" sweeps one triangle of its square. Backward: "joint" one product over the square,
"cross" one for `a` and one for `b`. Positive pairs stay outside every product (infonce.3). All reductions have a fixed order.
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from pix2rep_kernels.triton import infonce_backward, infonce_forward, infonce_rows
from pix2rep_kernels.triton.infonce_problem import ROW_BLOCK, Format, Half, Problem, Rows
from pix2rep_kernels.triton.infonce_rows import ONLINE, PLAIN, SHIFTED
from pix2rep_kernels.triton.tiles import DIAGONAL, JOINT, LOG2E, NOTHING, OWN_POSITIVE, STREAM_POSITIVE

PAD = 256  # a multiple of every block below
PROGRAMS = 264  # two for each of the 132 multiprocessors of an H100 or H200


class Blocks(NamedTuple):
    """Rows that a program keeps, rows that it streams past them, and how it is compiled."""

    own: int
    stream: int
    num_warps: int
    num_stages: int

    @property
    def options(self) -> dict[str, int]:
        return {"OWN": self.own, "STREAM": self.stream, "num_warps": self.num_warps, "num_stages": self.num_stages}


def sum_blocks(format: Format) -> Blocks:
    """64 streamed rows keep the tile at 64 values a thread; what is kept is wide enough that its loads from L2 (2 D / own bytes a pair) stay below
    the exponentials: 128 rows to D = 64, 256 at 128."""
    if not format.half:
        return Blocks(64, 32, 4, 2)
    if format.chunk <= 64:
        return Blocks(128, 64, 4, 3)
    return Blocks(256, 64, 8, 3) if format.d == 128 else Blocks(128, 64, 4, 2)


def online_blocks(format: Format) -> Blocks:
    """The rare path: what fits without spilling."""
    return Blocks(64, 64, 4, 2) if format.half else Blocks(64, 32, 4, 2)


def product_blocks(format: Format) -> Blocks:
    """The accumulator takes own x slice / (32 warps) registers of a thread, the tile own x stream / (32 warps): 64 and 64 to D = 128, 128 and 32 beyond."""
    if not format.half:
        return Blocks(64, 32, 4, 2)
    return Blocks(128, 128, 8, 2) if format.d <= 128 else Blocks(64, 64, 4, 2)


def slice_of(format: Format) -> int:
    """Features of the gradient that one program accumulates."""
    limit = 256 if format.half else 128
    return next(size for size in (format.d, 256, 128) if size <= limit and format.d % size == 0)


class Sums(NamedTuple):
    """Sums of one set of rows: parts that add up, and log2 of the whole where the running maximum found it."""

    sums: Tensor  # [parts, G, padded]
    lse2: Tensor  # [G, padded]

    @property
    def parts(self) -> int:
        return self.sums.shape[0]


def forward(*arguments) -> tuple[Tensor, Tensor]:
    """losses and lse, both [G, anchors]; arguments as in `reference.infonce.forward`."""
    a = arguments[0]
    with torch.cuda.device_of(a):
        problem = Problem(arguments, gradient=False, pad=PAD)
        outputs = a.new_empty((2, problem.groups, problem.anchors), dtype=torch.float32)
        if problem.index is not None:
            outputs.fill_(float("nan"))  # rows of b that no index names
        losses, lse = outputs.unbind()
        if problem.groups * problem.n > 0:
            sums_x, sums_y = _negatives(problem)
            queue = _sweep(problem, problem.x, problem.queue, NOTHING.value)[0] if problem.queue else None
            for half, sums in zip(problem.anchor_halves, (sums_x, sums_y), strict=False):
                _losses(problem, half, sums, queue, losses, lse)
    return losses, lse


def _negatives(problem: Problem) -> tuple[Sums, Sums]:
    x, y = problem.x, problem.y
    if problem.negatives == "forward":
        left_out = DIAGONAL if problem.positive is None else OWN_POSITIVE
        return _sweep(problem, x, y, left_out.value)[0], None
    if problem.negatives == "joint":
        sums = _sweep(problem, x, y, JOINT.value, triangle=True)[0]
        return sums, sums
    sums_y, sums_x = _sweep(problem, y, x, DIAGONAL.value, both=True)
    return sums_x, sums_y


def _sweep(problem: Problem, own: Rows, stream: Rows, left_out: int, *, triangle: bool = False, both: bool = False) -> tuple[Sums, Sums | None]:
    """Sums over `stream` of each row of `own`, and with `both` the other way round."""
    groups, has_ids = problem.groups, problem.has_ids and stream is not problem.queue
    empty = problem.x.weight
    if problem.regime == ONLINE.value:
        found = [(own, stream, Sums(empty.new_empty((1, 0)), empty))]
        found += [(stream, own, found[0][2])] if both else []
    else:
        blocks = sum_blocks(problem.format)
        own_blocks, tiles = triton.cdiv(own.count, blocks.own), triton.cdiv(stream.count, blocks.stream)
        own_part, part_tiles = _triangle_parts(own_blocks, blocks) if triangle else _parts(own_blocks, tiles, groups)
        own_parts, stream_parts = triton.cdiv(own_blocks, own_part), max(1, triton.cdiv(tiles, part_tiles))
        shape = (own_parts, groups, stream.padded)
        stream_sums = empty.new_zeros(shape) if both or triangle else empty
        own_sums = stream_sums if triangle else empty.new_empty((stream_parts, groups, own.padded))
        valid = own.ragged or stream.ragged
        infonce_forward.sums[(own_parts * stream_parts * groups,)](
            own.scaled, stream.scaled, own.weight, stream.weight, own.ids, stream.ids, problem.positive, own_sums, stream_sums,
            *problem.clamp, problem.headroom, groups, own.count, stream.count, own.padded, stream.padded, stream.scaled.shape[0], problem.n,
            own_parts, stream_parts, own_part, part_tiles, D=problem.format.d, CHUNK=problem.format.chunk, LEFT_OUT=left_out, TRIANGLE=triangle,
            STREAM_SUMS=both or triangle, VALID=valid, IDS=has_ids, SHIFT=problem.regime == SHIFTED.value, PRECISION=problem.format.precision,
            **blocks.options,
        )  # fmt: skip
        found = [(own, stream, Sums(own_sums, empty))]
        found += [(stream, own, Sums(stream_sums, empty))] if both else []
    if problem.regime != PLAIN.value:
        found = [(rows, others, _online(problem, rows, others, left_out, sums, has_ids)) for rows, others, sums in found]
    return found[0][2], found[1][2] if both else None


def _parts(own_blocks: int, tiles: int, groups: int) -> tuple[int, int]:
    """Blocks and tiles of one program: at most 32 x 32 programs, which keeps the private slices small against the operands and fills the device in
    whole waves; enough programs for the device; else at least 8 tiles, to pay for the start of the pipeline."""
    own_parts = max(1, min(32, own_blocks))
    stream_parts = max(1, min(32, tiles, max(triton.cdiv(PROGRAMS, own_parts * groups), tiles // 8)))
    return max(1, triton.cdiv(own_blocks, own_parts)), max(1, triton.cdiv(tiles, stream_parts))


def _triangle_parts(own_blocks: int, blocks: Blocks) -> tuple[int, int]:
    """The same for the triangle of equal parts: 64 give 2080 programs, 23 are the fewest that fill the device."""
    parts = min(own_blocks, 64, max(23, own_blocks // 4))
    own_part = max(1, triton.cdiv(own_blocks, max(1, parts)))
    return own_part, own_part * (blocks.own // blocks.stream)


def _online(problem: Problem, own: Rows, stream: Rows, left_out: int, sums: Sums, has_ids: bool) -> Sums:
    blocks = online_blocks(problem.format)
    lse2 = torch.empty_like(own.weight)
    infonce_forward.online[(problem.groups * triton.cdiv(own.count, blocks.own),)](
        own.scaled, stream.scaled, own.weight, stream.weight, own.ids, stream.ids, problem.positive, sums.sums, lse2,
        problem.groups, own.count, stream.count, own.padded, stream.padded, stream.scaled.shape[0], problem.n, sums.parts, problem.too_small,
        D=problem.format.d, CHUNK=problem.format.chunk, LEFT_OUT=left_out, VALID=stream.ragged, IDS=has_ids, RESCUE=problem.regime == SHIFTED.value,
        PRECISION=problem.format.precision, **blocks.options,
    )  # fmt: skip
    return Sums(sums.sums, lse2)


def _losses(problem: Problem, half: Half, sums: Sums, queue: Sums | None, losses: Tensor, lse: Tensor) -> None:
    extra = queue or sums
    own, partner = half.own, half.partner
    infonce_rows.losses[(problem.groups * triton.cdiv(half.count, ROW_BLOCK),)](
        own.scaled, partner.scaled, own.weight, partner.weight, half.index, problem.positive, sums.sums, sums.lse2, extra.sums, extra.lse2, losses, lse,
        *problem.clamp, problem.headroom, problem.too_small, problem.groups, half.count, own.padded, partner.padded, problem.m,
        half.offset, half.partner_offset, half.column, problem.anchors, sums.parts, extra.parts, **problem.format.sizes,
        INDEX=half.index is not None, POSITIVE=problem.positive is not None, QUEUE=queue is not None, REGIME=problem.regime,
    )  # fmt: skip


class Weights(NamedTuple):
    """Weights of the anchors of one set of rows, [G, padded]."""

    share: Tensor  # g exp2(c - lse2)
    positive_share: Tensor
    grad: Tensor
    lse2: Tensor


def backward(grad_losses: Tensor, losses: Tensor, lse: Tensor, *arguments) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a, b and temperature; one that is not needed has shape [0]. Arguments as in `reference.infonce.backward`."""
    *inputs, need_a, need_b, need_temperature = arguments
    a, b, temperature = inputs[:3]
    with torch.cuda.device_of(a):
        problem = Problem(inputs, gradient=True, pad=PAD)
        grads = [_grad_like(rows, need, half) for rows, need, half in zip((a, b), (need_a, need_b), problem.halves, strict=True)]
        grad_temperature = temperature.new_zeros(() if need_temperature else (0,))
        if problem.groups * problem.n == 0 or not (need_a or need_b or need_temperature):
            return *(grad.zero_() for grad in grads), grad_temperature
        finite = (lse != torch.inf) & grad_losses.isfinite()
        largest = torch.where(finite, grad_losses, 0).abs().amax(1).float()
        weights = _weights(problem, grad_losses, losses, lse, largest)
        flushed = _flushed(problem, lse)
        joint = problem.negatives == "joint"
        # <x, dx> over all rows counts each pair of "joint" twice, but its queue once; "cross" and "forward" have all of it in a.
        measured = (need_temperature, need_temperature and joint)
        dots = []
        products = None
        for side, (half, grad, need) in enumerate(zip(problem.halves, grads, (need_a, need_b), strict=True)):
            if need or measured[side]:
                products = products if joint and products else _products(problem, side, weights, flushed)
                target = grad if need else torch.empty_like((a, b)[side], memory_format=torch.contiguous_format)
                dots.append(_gradients(problem, side, half, products, weights, largest, target, measured[side]))
        if need_temperature:
            tau = temperature.float().clamp(min=problem.floor)
            total = -torch.cat([d for d in dots if d is not None]).sum() / tau  # (infonce.7)
            grad_temperature = torch.where(temperature < problem.floor, 0, total).to(temperature.dtype)
    return *grads, grad_temperature


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
            grad_losses, losses, lse, largest, half.index, *weights, *problem.clamp, problem.headroom, half.count, written, half.offset, own.padded,
            half.column, problem.anchors, *grad_losses.stride(), BLOCK=128, INDEX=half.index is not None, SHIFT=problem.regime == SHIFTED.value,
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
    if problem.negatives == "joint":
        left_out = JOINT
    elif problem.positive is not None:
        left_out = STREAM_POSITIVE if side else OWN_POSITIVE
    else:
        left_out = DIAGONAL
    main = _product(problem, own, stream, weights.get(id(own)), weights.get(id(stream)), left_out.value, flushed)
    queue = None
    if problem.queue is not None and id(own) in weights:
        queue = _product(problem, own, problem.queue, weights[id(own)], None, NOTHING.value, flushed)
    return main, queue


def _product(
    problem: Problem, own: Rows, stream: Rows, own_weights: Weights | None, stream_weights: Weights | None, left_out: int, flushed: Tensor | None
) -> Tensor:
    blocks, size = product_blocks(problem.format), slice_of(problem.format)
    tiles = triton.cdiv(stream.count, blocks.stream)
    programs = triton.cdiv(own.count, blocks.own) * problem.groups * (problem.format.d // size)
    parts = max(1, min(tiles, triton.cdiv(PROGRAMS, programs)))
    out = own.weight.new_empty((parts, problem.groups, own.padded, problem.format.d))
    empty = own.weight
    for regime in (SHIFTED, ONLINE) if problem.regime == SHIFTED.value else (problem.regime,):
        regime = getattr(regime, "value", regime)
        shares = [empty if w is None else w.grad if regime == ONLINE.value else w.share for w in (own_weights, stream_weights)]
        lse2 = [empty if w is None else w.lse2 for w in (own_weights, stream_weights)]
        infonce_backward.products[(parts * programs,)](
            own.scaled, stream.scaled, stream.plain, *shares, *lse2, own.ids, stream.ids, problem.positive, out, flushed, *problem.clamp,
            problem.headroom, problem.groups, own.count, stream.count, own.padded, stream.padded, stream.scaled.shape[0], problem.n, parts,
            triton.cdiv(tiles, parts), D=problem.format.d, CHUNK=problem.format.chunk, SLICE=size, LEFT_OUT=left_out,
            OWN_ANCHORS=own_weights is not None, STREAM_ANCHORS=stream_weights is not None, IDS=problem.has_ids and stream is not problem.queue,
            SHARED=stream.plain is stream.scaled, REGIME=regime, GUARDED=flushed is not None, PRECISION=problem.format.precision, **blocks.options,
        )  # fmt: skip
    return out


def _gradients(
    problem: Problem, side: int, half: Half, products: tuple[Tensor, Tensor | None], weights: dict[int, Weights], largest: Tensor, grad: Tensor,
    measured: bool,
) -> Tensor | None:  # fmt: skip
    """Finish the gradient of one view in `grad`; partial sums of <x, dx> when `measured`."""
    own, partner = half.own, half.partner
    main, queue = products
    partners, positive, first = "same", None, None
    if problem.positive is not None and side == 0:
        partners, positive = "gather", problem.positive
    elif problem.positive is not None:
        ordered, positive = problem.positive.sort(dim=1, stable=True)
        rows = torch.arange(half.count + 1, device=ordered.device).expand(problem.groups, -1).contiguous()
        partners, first = "list", torch.searchsorted(ordered, rows)
    own_weights, partner_weights = weights.get(id(own)), weights.get(id(partner))
    programs = problem.groups * triton.cdiv(half.count, ROW_BLOCK)
    dots = own.weight.new_empty(programs) if measured else None
    if programs:
        infonce_backward.gradients[(programs,)](
            main, main if queue is None else queue, own.scaled, partner.scaled, own.weight,
            own.weight if own_weights is None else own_weights.positive_share,
            own.weight if partner_weights is None else partner_weights.positive_share,
            half.index, positive, first, largest, *problem.clamp, grad, dots, problem.groups, half.count, own.padded, partner.padded,
            problem.n if side or partners == "same" and problem.negatives != "forward" else problem.m, half.offset, half.partner_offset,
            grad.shape[2], main.shape[0], 0 if queue is None else queue.shape[0], 0.5 if problem.negatives == "joint" else 1.0,
            **problem.format.sizes, OWN_ANCHORS=own_weights is not None, STREAM_ANCHORS=partner_weights is not None, INDEX=half.index is not None,
            PARTNERS=partners, QUEUE=queue is not None, DOTS=measured, UNSCALE=not problem.format.half,
        )  # fmt: skip
    return dots
