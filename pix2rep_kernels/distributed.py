"""Losses of the global batch under torch.distributed, exactly: what one process with all the rows computes, value and gradient.

R ranks hold the rows x_0 .. x_{R-1} and equal weights. What each rank returns is the global loss L; the training objective is the mean of what the ranks
return, which is L again, and DistributedDataParallel takes the mean of the ranks' gradients. So with every collective differentiated as the linear map that
it is, over all ranks at once,

    total   y   = sum_r x_r on every rank            dx_r = sum_s dy_s                    (distributed.1)
    gather  y   = [x_0; ..; x_{R-1}] on every rank   dx_r = sum_s dy_s[rows of rank r]    (distributed.2)
    L_r     = total(sum of the losses) / total(number of anchors)                         (distributed.3)
    (1/R) sum_r dL_r/dweights_r  =  dL/dweights                                           (distributed.4)

no factor of R is left to the caller: dx of (distributed.3) is R times what one process finds, and the mean over ranks divides by R. Where gradients are
summed over ranks, divide by R yourself.

A rank computes the losses of its own anchors against the rows of all ranks: "joint" over ranks is the op's "forward" against gathered rows, with `positive`
and with ids that leave out the anchor itself. Cross-correlation needs no rows at all: the ranks' moments, brought about one pivot, add.

Every rank must call the same functions in the same order, forward and backward. Without a process group, or with one rank, all is local.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from pix2rep_kernels.check import FLOATS, expect, expect_choice
from pix2rep_kernels.ops import crosscorr as crosscorr_op
from pix2rep_kernels.ops import infonce as infonce_op
from pix2rep_kernels.ops.crosscorr import Moments


def ranks(group: "dist.ProcessGroup | None" = None) -> int:
    """Number of ranks; 1 where no process group is initialised."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def total(x: Tensor, group: "dist.ProcessGroup | None" = None) -> Tensor:
    """Sum of `x`, of one shape on every rank, over the ranks (distributed.1)."""
    return _Total.apply(x, group) if ranks(group) > 1 else x


def gather(x: Tensor, group: "dist.ProcessGroup | None" = None) -> Tensor:
    """Rows [n, ..] of every rank in the order of the ranks, [R n, ..] (distributed.2). n must be the same on every rank; `infonce` checks that."""
    return _Gather.apply(x, group) if ranks(group) > 1 else x


def mean(losses: Tensor, count: Tensor | int | None = None, group: "dist.ProcessGroup | None" = None) -> Tensor:
    """Mean of the losses of all ranks (distributed.3), the same scalar on every rank.

    Args:
        losses: of this rank, any shape; those of invalid anchors are 0.
        count: anchors of this rank that count; default all. 0 on every rank gives 0.
    """
    count = losses.numel() if count is None else count
    count = torch.as_tensor(count, device=losses.device, dtype=losses.dtype).detach()
    value, number = total(torch.stack([losses.sum(), count]), group).unbind()
    return value / number.detach().clamp(min=1)


def infonce(
    a: Tensor,  # [N, D]
    b: Tensor,  # [M, D]
    *,
    temperature: float | Tensor,
    temperature_floor: float = 0.01,
    negatives: str = "joint",
    positive: Tensor | None = None,  # [N]
    valid_a: Tensor | None = None,  # [N]
    valid_b: Tensor | None = None,  # [M]
    ids_a: Tensor | None = None,  # [N]
    ids_b: Tensor | None = None,  # [M]
    queue: Tensor | None = None,  # [Q, D]
    precision: str | None = None,
    backend: str = "auto",
    group: "dist.ProcessGroup | None" = None,
) -> Tensor:
    """Losses of this rank's anchors against the rows of every rank: the global batch's `infonce`, this rank's part of it. `mean` takes their global mean.

    Arguments are those of `pix2rep_kernels.infonce`, this rank's part of each, with these differences:

    a, b: without leading groups; N, M and D are the same on every rank.
    positive: column of this rank's own b.
    ids_a, ids_b: compared over all ranks: number them over the global batch.
    queue: the same on every rank, if the result is to be that of one process.
    group: process group; default the whole world.

    Raises ValueError, on every rank, when the ranks' sizes, dtypes or optional arguments differ.
    """
    options = {"temperature": temperature, "temperature_floor": temperature_floor, "queue": queue, "precision": precision, "backend": backend}
    if ranks(group) == 1:
        return infonce_op.infonce(a, b, negatives=negatives, positive=positive, valid_a=valid_a, valid_b=valid_b, ids_a=ids_a, ids_b=ids_b, **options)
    infonce_op._check(a, b, negatives, positive, valid_a, valid_b, ids_a, ids_b, queue, precision)
    if a.ndim != 2:
        expect(False, "a", "have shape [N, D] over ranks (groups stay on one rank: use pix2rep_kernels.infonce)", tuple(a.shape))
    n, m = len(a), len(b)
    if n == m:
        valid_b, ids_b = valid_a if valid_b is None else valid_b, ids_a if ids_b is None else ids_b
    alike = {"rows of `a`": n, "rows of `b`": m, "features of `a`": a.shape[1], "negatives": infonce_op.NEGATIVES.index(negatives)}
    alike |= {f"dtype of `{name}`": FLOATS.index(t.dtype) for name, t in (("a", a), ("b", b))}
    given = {"positive": positive, "valid_a": valid_a, "valid_b": valid_b, "ids_a": ids_a, "ids_b": ids_b}
    alike |= {f"`{name}` (0: not given)": int(t is not None) for name, t in given.items()}
    _agree(alike, a.device, group)

    def against(anchors, candidates, column, valid, valid_candidates, ids, ids_candidates):
        first = dist.get_rank(group) * len(candidates)
        everything = gather(candidates, group)
        if valid is not None:  # the default of a missing one is `valid` where the numbers of rows happen to be equal
            valid_candidates = _or_all(valid_candidates, candidates)
        return infonce_op.infonce(
            anchors, everything, negatives="forward", positive=column + first, valid_a=valid, valid_b=_gathered(valid_candidates, group), ids_a=ids,
            ids_b=_gathered(ids_candidates, group), **options,
        )  # fmt: skip

    column = torch.arange(n, device=a.device) if positive is None else positive
    if negatives == "forward":
        return against(a, b, column, valid_a, valid_b, ids_a, ids_b)
    back = column.argsort()  # of a permutation: its inverse
    if negatives == "cross":
        forth = against(a, b, column, valid_a, valid_b, ids_a, ids_b)
        return torch.cat([forth, against(b, a, back, valid_b, valid_a, ids_b, ids_a)])
    rows = torch.cat([a, b])
    valid = None if valid_a is None and valid_b is None else torch.cat([_or_all(valid_a, a), _or_all(valid_b, b)])
    # Rows of one id are not each other's negatives, an anchor and itself among them.
    ids = torch.cat([ids_a, ids_b]) if ids_a is not None else None
    own = torch.arange(len(rows), device=a.device) + dist.get_rank(group) * len(rows) if ids is None else ids
    return against(rows, rows, torch.cat([column + n, back]), valid, valid, own, own)


def moments(
    x: Tensor, y: Tensor, *, weight: Tensor | None = None, backend: str = "auto", group: "dist.ProcessGroup | None" = None
) -> Moments:  # fmt: skip
    """Moments (crosscorr.1-5) of the rows of every rank, the same on each; arguments as in `pix2rep_kernels.crosscorr`.

    The ranks' numbers of rows may differ: every row counts alike. D1 and D2 may not; ranks with other data, scale or offset included, are no special case.
    """
    own = crosscorr_op.moments(x, y, weight=weight, backend=backend)
    if ranks(group) == 1:
        return own
    _agree({"features of `x`": x.shape[1], "features of `y`": y.shape[1]}, x.device, group)
    sums = [own.count.reshape(1), own.sum_x + own.count * own.pivot_x, own.sum_y + own.count * own.pivot_y]
    sizes = [1, x.shape[1], y.shape[1]]
    count, pivot_x, pivot_y = total(torch.cat(sums).detach(), group).split(sizes)
    count = torch.where(count == 0, 1, count)
    about = own.about(pivot_x / count, pivot_y / count)  # the global mean: no rank's variance cancels against another's offset
    parts = [about.count.detach().reshape(1), about.sum_x, about.sum_y, about.square_x, about.square_y, about.product.flatten()]
    count, *parts, product = total(torch.cat(parts), group).split([*sizes, *sizes[1:], about.product.numel()])
    return Moments(count.detach().squeeze(0), about.pivot_x, about.pivot_y, *parts, product.view_as(about.product))


def crosscorr(
    x: Tensor, y: Tensor, *, normalization: str = "batchnorm", weight: Tensor | None = None, backend: str = "auto",
    group: "dist.ProcessGroup | None" = None,
) -> Tensor:  # fmt: skip
    """Cross-correlation [D1, D2] of the rows of every rank, standardised by the statistics of all; arguments as in `pix2rep_kernels.crosscorr`."""
    expect_choice(normalization, "normalization", crosscorr_op.NORMALIZATIONS)
    return crosscorr_op.correlation(moments(x, y, weight=weight, backend=backend, group=group), normalization)


# torch 2.13 renamed both.
_ALL_GATHER = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)
_REDUCE_SCATTER = getattr(dist, "reduce_scatter_single", None) or getattr(dist, "reduce_scatter_tensor", None)


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        y = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(y, group=group)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group, ctx.rows = group, len(x)
        y = x.new_empty((ranks(group) * len(x), *x.shape[1:]))
        _ALL_GATHER(y, x.contiguous(), group=group)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        wide = grad.to(torch.float32 if grad.dtype.itemsize < 4 else grad.dtype).contiguous()  # 16 bits would round once a rank
        own = wide.new_empty((ctx.rows, *wide.shape[1:]))
        _REDUCE_SCATTER(own, wide, group=ctx.group)
        return own.to(grad.dtype), None


def _gathered(flags: Tensor | None, group) -> Tensor | None:
    """Masks or ids of every rank."""
    if flags is None or flags.dtype != torch.bool:
        return None if flags is None else gather(flags, group)
    return gather(flags.to(torch.uint8), group).bool()


def _or_all(valid: Tensor | None, rows: Tensor) -> Tensor:
    return torch.ones(len(rows), dtype=torch.bool, device=rows.device) if valid is None else valid


def _agree(values: dict[str, int], device: torch.device, group) -> None:
    """Raise ValueError on every rank unless each of the values is the same on all: later collectives would hang, or mix rows up."""
    own = torch.tensor(list(values.values()), dtype=torch.int64, device=device)
    found = gather(own.unsqueeze(0), group).T.tolist()
    for name, sizes in zip(values, found, strict=True):
        if len(set(sizes)) > 1:
            got = ", ".join(f"{size} on rank {rank}" for rank, size in enumerate(sizes))
            cure = " (drop the last batch, or pad it and mask the padding)" if name.startswith("rows") else ""
            raise ValueError(f"{name} must be the same on every rank, got {got}{cure}")
