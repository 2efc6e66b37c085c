"""Joint sums of two cluster maps in plain PyTorch, line for line (joint.1-3, joint.6-7): one slice of both maps a displacement."""

import itertools

import torch
from torch import Tensor

from pix2rep_kernels.layout import new_empty


def forward(a, b, mask, radius, collapsed, logits) -> Tensor:
    """S [1, K, K] when collapsed, else [(2T+1)^dims, K, K]."""
    p, q = (_probabilities(t, (a, b), mask, logits) for t in (a, b))
    sums = [
        torch.einsum("bkp,blp->kl", p[there].flatten(2), q[here].flatten(2))  # (joint.2)
        for there, here in _overlaps(a.shape[2:], radius)
    ]
    sums = torch.stack(sums)
    return sums.sum(0, keepdim=True) if collapsed else sums  # (joint.3)


def backward(
    grad_sums, a, b, mask, radius, collapsed, logits, need_a, need_b, channels_last_a, channels_last_b
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of a and b; [0] where one is not needed."""
    p, q = (_probabilities(t, (a, b), mask, logits) for t in (a, b))
    dp, dq = torch.zeros_like(p), torch.zeros_like(q)
    for d, (there, here) in enumerate(_overlaps(a.shape[2:], radius)):
        g = grad_sums[0 if collapsed else d].to(p.dtype)
        dp[there] += torch.einsum("kl,bl...->bk...", g, q[here])  # (joint.6)
        dq[here] += torch.einsum("kl,bk...->bl...", g, p[there])
    return tuple(
        _finish(gradient, probabilities, like, mask, logits, last) if need else like.new_empty(0)
        for gradient, probabilities, like, need, last in ((dp, p, a, need_a, channels_last_a), (dq, q, b, need_b, channels_last_b))
    )


def _probabilities(t, maps, mask, logits) -> Tensor:
    compute = torch.float64 if torch.float64 in [m.dtype for m in maps] else torch.float32
    p = t.to(compute).softmax(1) if logits else t.to(compute)  # (joint.1)
    return p if mask is None else torch.where(mask.unsqueeze(1), p, 0)


def _finish(gradient, probabilities, like, mask, logits, channels_last) -> Tensor:
    if logits:
        gradient = probabilities * (gradient - (probabilities * gradient).sum(1, keepdim=True))  # (joint.7)
    if mask is not None:
        gradient = torch.where(mask.unsqueeze(1), gradient, 0)
    out = new_empty(like, like.shape, channels_last)
    return out.copy_(gradient)


def _overlaps(space, radius):
    """(there, here) for each displacement d: index tuples of a [B, K, *S] map such that there = here + d inside the image."""
    for displacement in itertools.product(range(-radius, radius + 1), repeat=len(space)):
        there = tuple(slice(min(max(d, 0), n), max(min(n + d, n), 0)) for d, n in zip(displacement, space, strict=True))
        here = tuple(slice(min(max(-d, 0), n), max(min(n - d, n), 0)) for d, n in zip(displacement, space, strict=True))
        yield (..., *there), (..., *here)
