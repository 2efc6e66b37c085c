"""One InfoNCE call as the kernels see it: operands prepared row by row, in the order of the positives, and what depends on them alone."""

import math
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from torch.nn import functional as F

from pix2rep_kernels.triton import infonce_rows as rows
from pix2rep_kernels.triton.infonce_blocks import PAD, SHARED_H100, format_of
from pix2rep_kernels.triton.tiles import DIAGONAL, JOINT, LOG2E, OWN_POSITIVE


class Rows(NamedTuple):
    """Prepared rows, padded to whole tiles."""

    scaled: Tensor  # [G, padded, D] times sqrt(log2(e) / tau), 0 where invalid
    plain: Tensor  # as it enters the gradient product: bfloat16, or `scaled`
    weight: Tensor  # [G, padded] 1, or 0 where invalid
    ids: Tensor  # [G, padded] int32
    count: int
    ragged: bool  # some weight may be 0

    @property
    def padded(self) -> int:
        return self.scaled.shape[1]


class Half(NamedTuple):
    """The anchors of one view: where their prepared rows, their partners and their outputs are."""

    own: Rows
    offset: int
    partner: Rows
    partner_offset: int
    index: Tensor | None  # [G, count] prepared row -> row of the view
    column: int  # of losses
    count: int


class Problem:
    """Operands of one call; `gradient` also prepares what the backward pass multiplies."""

    def __init__(self, arguments, gradient: bool):
        a, b, temperature, floor, self.negatives, positive, valid_a, valid_b, ids_a, ids_b, queue, precision = arguments
        self.groups, self.n, self.m = a.shape[0], a.shape[1], b.shape[1]
        self.temperature, self.floor, self.gradient = temperature, floor, gradient
        self.format = format_of(a.shape[2], {a.dtype, b.dtype}, precision)
        self.shared = torch.cuda.get_device_properties(a.device).shared_memory_per_block_optin if a.is_cuda else SHARED_H100
        self.span = self.n if self.negatives == "joint" else 0
        paired = self.negatives != "forward"
        self.index = positive.contiguous() if paired and positive is not None else None
        self.positive = None if paired or positive is None else positive.contiguous()
        self.has_ids = ids_a is not None
        self.queue = None
        if queue is not None and queue.shape[0] > 0:
            self.queue = self._rows([(queue.unsqueeze(0), None, None)], None)
        if paired and self.has_ids and positive is not None:
            ids_b = ids_b.gather(1, positive.clamp(0, self.n - 1))
        ids = ranks([ids_a, ids_b]) if self.has_ids else None
        if self.negatives == "joint":
            both = self._rows([(a, valid_a, None), (b, valid_b, self.index)], None if ids is None else torch.cat(ids, 1))
            self.x = self.y = both
            self.halves = (Half(both, 0, both, self.n, None, 0, self.n), Half(both, self.n, both, 0, self.index, self.n, self.n))
        else:
            self.x = self._rows([(a, valid_a, None)], None if ids is None else ids[0])
            self.y = self._rows([(b, valid_b, self.index)], None if ids is None else ids[1])
            self.halves = (Half(self.x, 0, self.y, 0, None, 0, self.n), Half(self.y, 0, self.x, 0, self.index, self.n, self.m))
        candidates = max(self.y.count + (self.queue.count if self.queue else 0), self.x.count, 2)
        self.headroom = 125 - math.log2(candidates)
        self.too_small = 2.0 ** (20 - 126) * candidates  # a sum above it lost less than 2^-20 to flushed terms

    @property
    def anchors(self) -> int:
        return self.n if self.negatives == "forward" else 2 * self.n

    @property
    def anchor_halves(self) -> tuple[Half, ...]:
        return self.halves[:1] if self.negatives == "forward" else self.halves

    @property
    def regime(self) -> int:
        """By the floor alone. One constant serves down to 0.0075: below, cosines under -0.2 would be flushed as a rule."""
        if LOG2E.value / self.floor * 1.004 <= self.headroom:
            return rows.PLAIN.value
        return rows.SHIFTED.value if self.floor >= 0.0075 else rows.ONLINE.value

    @property
    def left_out(self) -> int:
        """Which candidates are no negatives of an own row by their position."""
        if self.negatives == "joint":
            return JOINT.value
        return DIAGONAL.value if self.positive is None else OWN_POSITIVE.value

    @property
    def clamp(self) -> tuple[Tensor, float]:
        return self.temperature, self.floor

    def _rows(self, sources, ids: Tensor | None) -> Rows:
        first = sources[0][0]
        count = sum(source.shape[1] for source, _, _ in sources)
        padded = max(1, triton.cdiv(count, PAD)) * PAD
        groups = first.shape[0]
        scaled = first.new_empty((groups, padded, self.format.d), dtype=self.format.scaled)
        copy = self.gradient and self.format.half
        plain = first.new_empty(scaled.shape, dtype=torch.bfloat16) if copy else scaled
        weight = first.new_empty((groups, padded), dtype=torch.float32)
        offset = 0
        for k, (source, valid, index) in enumerate(sources):
            n = source.shape[1]
            written = padded - offset if k == len(sources) - 1 else n
            valid = None if valid is None else valid.contiguous()
            if groups * written > 0:
                rows.prepare[(groups * triton.cdiv(written, self.format.rows),)](
                    source, index, valid, scaled, plain, weight, *self.clamp, n, written, n, offset, padded, *source.stride(),
                    source.shape[2], **self.format.sizes, INDEX=index is not None, VALID=valid is not None, COPY=copy,
                )  # fmt: skip
            offset += n
        ids = weight if ids is None else F.pad(ids, (0, padded - count))
        return Rows(scaled, plain, weight, ids, count, padded > count or any(valid is not None for _, valid, _ in sources))


def ranks(ids: list[Tensor]) -> list[Tensor]:
    """int32 ids of the same equalities, group by group: half the registers and comparisons of int64 in the sweeps."""
    ordered, order = torch.cat(ids, 1).sort(dim=1, stable=True)
    steps = F.pad((ordered[:, 1:] != ordered[:, :-1]).int(), (1, 0)) if ordered.shape[1] else ordered.int()
    rank = torch.empty_like(steps).scatter_(1, order, steps.cumsum(1, dtype=torch.int32))
    return list(rank.split([i.shape[1] for i in ids], 1))
