"""Calls of joint that its tests share: problems, PyTorch's composition, comparison with float64."""

import itertools

import torch

from pix2rep_kernels.layout import memory_format
from pix2rep_kernels.testing import backends, error, poisoned, tolerance

FAST = [b for b in backends("joint") if b != "triton" or torch.cuda.is_available()]  # interpreted kernels have a table of their own
DEVICE = {b: "cuda" if b in ("triton", "cuda") and torch.cuda.is_available() else "cpu" for b in backends("joint")}
LAYOUTS = ("first", "last", "strided")


def lay(t, layout):
    """t in one of LAYOUTS; "strided" has its rows where columns belong."""
    if layout == "last":
        return t.contiguous(memory_format=memory_format(t.ndim))
    return t.transpose(-1, -2).contiguous().transpose(-1, -2) if layout == "strided" else t.contiguous()


def problem(clusters=5, batch=2, space=(7, 9), layouts=("first", "first"), dtypes=(torch.float32,) * 2, masked=False, logits=True):
    """a, b and a mask; probabilities are positive."""
    maps = [torch.randn(batch, clusters, *space, dtype=torch.float64) for _ in range(2)]
    maps = [lay((m if logits else m.abs()).to(dtype), layout) for m, layout, dtype in zip(maps, layouts, dtypes, strict=True)]
    return *maps, torch.rand(batch, *space) > 0.3 if masked else None


def pytorch(a, b, mask=None, radius=0, collapsed=True, logits=True):
    """The sums as a user would write them: softmax, one pair of shifted slices a displacement, einsum."""
    p, q = ((t.softmax(1) if logits else t) for t in (a, b))
    if mask is not None:
        p, q = (torch.where(mask.unsqueeze(1), t, 0) for t in (p, q))
    sums = []
    for d in itertools.product(range(-radius, radius + 1), repeat=a.ndim - 2):
        there, here = (..., *(slice(max(x, 0), max(n + min(x, 0), 0)) for x, n in zip(d, a.shape[2:], strict=True))), (
            ..., *(slice(max(-x, 0), max(n - max(x, 0), 0)) for x, n in zip(d, a.shape[2:], strict=True))
        )  # fmt: skip
        sums.append(torch.einsum("bkp,blp->kl", p[there].flatten(2), q[here].flatten(2)))
    return torch.stack(sums).sum(0, keepdim=True) if collapsed else torch.stack(sums)


def raw(backend):
    """The op itself: sums before (joint.4)."""

    def run(a, b, mask=None, radius=0, collapsed=True, logits=True):
        device = DEVICE[backend]
        mask = None if mask is None else mask.to(device)
        return torch.ops.pix2rep.joint(a.to(device), b.to(device), mask, radius, collapsed, logits, backend).cpu()

    return run


def three(function, a, b, upstream, needs=(True, True), **options):
    """Sums and the gradients of the maps that need one."""
    a, b = (t.detach().requires_grad_(need) for t, need in zip((a, b), needs, strict=True))
    sums = function(a, b, **options)
    if any(needs):
        sums.backward(upstream.to(sums.dtype))
    return [t for t in (sums.detach(), a.grad, b.grad) if t is not None]


def upstream_of(a, radius=0, collapsed=True, **_):
    count = 1 if collapsed else (2 * radius + 1) ** (a.ndim - 2)
    return torch.randn(count, a.shape[1], a.shape[1], dtype=torch.float64)


def compare(backend, a, b, needs=(True, True), **options):
    """Sums and gradients no further from float64 than twice PyTorch's own at the same precision; 16-bit maps are float32 to PyTorch.

    In float64 PyTorch is the truth; its own error is then that of a normaliser, a rounding a cluster, and of a few more operations.
    Where (joint.7) cancels, PyTorch's error on few pixels may be luckily small: added is the rounding of what is subtracted, eps p <p, |g|>.
    """
    upstream = upstream_of(a, **options)
    compute = torch.float64 if torch.float64 in (a.dtype, b.dtype) else torch.float32
    truth = three(pytorch, a.double(), b.double(), upstream.to(compute), needs, **options)
    eager = three(pytorch, a.to(compute), b.to(compute), upstream, needs, **options)
    eager = [e.to(t.dtype) for e, t in zip(eager, [eager[0], *(m for m, need in zip((a, b), needs, strict=True) if need)], strict=True)]
    with poisoned():
        got = three(raw(backend), a, b, upstream, needs, **options)
    cancelled = cancellation(a, b, upstream, needs, **options)
    for g, e, t, c in zip(got, eager, truth, [0.0, *cancelled], strict=True):
        assert g.dtype == e.dtype and g.shape == t.shape
        own = error([e], [t]) if compute == torch.float32 else (a.shape[1] + 4) * torch.finfo(compute).eps
        allowed = tolerance(own, g.dtype) * t.norm() + torch.finfo(compute).eps * c
        assert error([g], [t]) * (t.norm() if t.norm() > 0 else 1) <= allowed, (backend, options, error([g], [t]), own)
    return got


def cancellation(a, b, upstream, needs=(True, True), logits=True, **options):
    """Norm of p (|g| + <p, |g|>), |g| the gradient of the probabilities with every sign positive; 0 without softmax."""
    if not logits:
        return [0.0] * sum(needs)
    p, q = (t.double().softmax(1) for t in (a, b))
    p, q = ((t if options.get("mask") is None else torch.where(options["mask"].unsqueeze(1), t, 0)) for t in (p, q))
    options = {k: v for k, v in options.items() if k != "mask"}
    grads = three(pytorch, p, q, upstream.abs(), needs, logits=False, **options)[1:]
    kept = [t for t, need in zip((p, q), needs, strict=True) if need]
    return [(t * (g + (t * g).sum(1, keepdim=True))).norm() for t, g in zip(kept, grads, strict=True)]
