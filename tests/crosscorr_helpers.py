"""Calls of crosscorr that its tests share: views by name, PyTorch's two-pass composition, the comparison with float64."""

import math

import pytest
import torch

from pix2rep_kernels import crosscorr
from pix2rep_kernels.ops.crosscorr import correlation, moments
from pix2rep_kernels.reference import crosscorr as reference
from pix2rep_kernels.testing import backends, error, home, poisoned, tolerance

GPU = torch.cuda.is_available()
EVERY = backends("crosscorr")
SMALL = [b for b in EVERY if b in ("triton", "cuda") and not GPU]  # interpreted and emulated kernels have a table of their own
FAST = [b for b in EVERY if b not in SMALL]
CPU = [b for b in FAST if b not in ("triton", "cuda")]
DEVICE = {b: home(b) for b in EVERY}
NORMALIZATIONS = ("batchnorm", "std", "none")


def views(n, d1, d2, dtype=torch.float32, dtype_y=None, layout="rows"):
    """Two views with something in common, and means off zero."""
    common = torch.randn(n, 1, dtype=torch.float64)
    x, y = (torch.randn(n, d, dtype=torch.float64) * 1.5 + common * torch.randn(d, dtype=torch.float64) + 2 for d in (d1, d2))
    return laid_out(x.to(dtype), layout), laid_out(y.to(dtype_y or dtype), layout)


def laid_out(x, layout):
    if layout == "planes":
        return x.T.contiguous().T
    if layout == "wide":  # every second feature of longer rows
        return torch.stack([x, torch.full_like(x, math.nan)], 2).flatten(1)[:, ::2]
    if layout == "offset":  # an address that no vector is aligned to
        return torch.cat([x.new_zeros(1), x.flatten()])[1:].view_as(x)
    if layout == "backwards":  # rows between others
        return torch.cat([x, torch.full_like(x, math.nan)], 1)[:, : x.shape[1]]
    return x


def weights(kind, n):
    """None, a mask, or numbers with zeros among them."""
    if kind == "none":
        return None
    kept = torch.rand(n) > 0.3
    return kept if kind == "mask" else (torch.rand(n) + 0.1) * kept


def pytorch(x, y, weight=None, normalization="batchnorm"):
    """Two passes: standardise, then multiply; as F.batch_norm or a standard deviation would."""
    w = torch.ones(len(x), dtype=x.dtype) if weight is None else weight.to(x.dtype)
    n = w.sum()
    w = w.unsqueeze(1)

    def standardised(t):
        centred = torch.where(w != 0, t, 0)
        centred = torch.where(w != 0, centred - (w * centred).sum(0) / n, 0)
        variance = (w * centred * centred).sum(0) / n
        if normalization == "none":
            return centred
        return centred / ((variance + 1e-5).sqrt() if normalization == "batchnorm" else (variance * n / (n - 1)).sqrt() + 1e-6)

    return (w * standardised(x)).T @ standardised(y) / n


def ours(backend):
    def run(x, y, weight=None, normalization="batchnorm"):
        device = DEVICE[backend]
        weight = None if weight is None else weight.to(device)
        return crosscorr(x.to(device), y.to(device), weight=weight, normalization=normalization, backend=backend).cpu()

    run.device = DEVICE[backend]
    return run


def placed(x, device):
    """The same numbers in the same strides on `device`; `.to` closes gaps."""
    if device == "cpu":
        return x
    whole = x.detach().as_strided((x.untyped_storage().nbytes() // x.element_size(),), (1,), 0)
    return whole.to(device).as_strided(x.shape, x.stride(), x.storage_offset())


def both(function, x, y, upstream, needs=(True, True), **options):
    """C and the gradients that are asked for."""
    device = getattr(function, "device", "cpu")
    x, y = (placed(t, device).detach().requires_grad_(need) for t, need in zip((x, y), needs, strict=True))
    c = function(x, y, **options)
    if any(needs):
        c.backward(upstream.to(c.dtype))
    return [c.detach(), *(t.grad.cpu() for t, need in zip((x, y), needs, strict=True) if need)]


def rounding(x, y, upstream, weight, normalization, truth):
    """One rounding of each term, against the results: entries of C are products of unit columns, gradients the three terms of (crosscorr.6).

    Where terms cancel, as with two rows, PyTorch's own error is a matter of luck and may be any part of this.
    """
    m = moments(x.double(), y.double(), weight=weight, backend="reference")
    leaves = [t.detach().requires_grad_() for t in m[3:]]
    grads = torch.autograd.grad(correlation(type(m)(*m[:3], *leaves), normalization), leaves, upstream, materialize_grads=True)
    zero = [torch.zeros_like(g) for g in grads]
    terms = torch.zeros(2, dtype=torch.float64)
    weight = None if weight is None else weight.double()
    for k in range(5):
        chosen = [g if i == k else z for i, (g, z) in enumerate(zip(grads, zero, strict=True))]
        found = reference.backward(*chosen, x.double(), y.double(), weight, *m[1:3], True, True)
        terms += torch.stack([g.norm() for g in found])
    auto = [correlation(moments(t.double(), t.double(), weight=weight, backend="reference"), normalization).diagonal().clamp(min=0).sqrt() for t in (x, y)]
    size = torch.stack([torch.outer(*auto).norm(), *terms])
    return [float(s / t.norm()) if t.norm() > 0 else float(s) for s, t in zip(size, truth, strict=True)]


def compare(backend, x, y, weight=None, normalization="batchnorm", needs=(True, True)):
    """C and gradients no further from float64 than twice PyTorch's own at the same precision; memory is poisoned.

    In float64 PyTorch is the truth: its own error is then that in float32, smaller by the ratio of their roundings.
    """
    options = {"weight": weight, "normalization": normalization}
    upstream = torch.randn(x.shape[1], y.shape[1], dtype=torch.float64)
    truth = both(pytorch, x.double(), y.double(), upstream, **options)
    wide = torch.float64 in (x.dtype, y.dtype)
    narrow = backend in ("triton", "cuda") and x.dtype == y.dtype and x.dtype != torch.float32  # products of 16-bit operands
    working = x.dtype if narrow else torch.float32
    eager = both(pytorch, x.to(working), y.to(working), upstream, **options)
    eps = torch.finfo(working).eps
    shrink = torch.finfo(torch.float64).eps / eps if wide else 1
    with poisoned():
        got = both(ours(backend), x, y, upstream, needs, **options)
    assert got[0].dtype == (torch.float64 if wide else torch.float32)
    noise = rounding(x, y, upstream, weight, normalization, truth)
    rows = list(zip(("C", "x", "y"), truth, eager, noise, strict=True))
    for g, (name, t, e, r), given in zip(got, [rows[0], *(row for row, need in zip(rows[1:], needs, strict=True) if need)], (None, x, y), strict=False):
        assert g.shape == t.shape and (name == "C" or g.dtype == {"x": x, "y": y}[name].dtype), given
        own = max(error([e], [t]), eps * r) * shrink * (1.5 if wide else 1)
        allowed = tolerance(own, g.dtype)
        assert error([g], [t]) <= allowed, (backend, name, tuple(x.shape), tuple(y.shape), x.dtype, options["normalization"], error([g], [t]), allowed)


def refuses_what_does_not_fit(ops, *bad):
    """The compiled op of a namespace and its backward name the argument that is off; `bad` are calls beyond those that every backend refuses."""
    x, y = views(5, 3, 4)
    for arguments in ((x[0], y, None), (x, y[:4], None), (x, y, torch.ones(4)), (x, y, torch.ones(5, 1)), (x, y, torch.ones(5, dtype=torch.bool)), *bad):
        with pytest.raises(RuntimeError, match="` must "):
            ops.crosscorr(*arguments)
    good = [torch.zeros(3), torch.zeros(4), torch.zeros(3), torch.zeros(4), torch.zeros(3, 4), x, y, torch.ones(5), torch.zeros(3), torch.zeros(4), True, True]
    assert [g.shape for g in ops.crosscorr_backward(*good)] == [x.shape, y.shape]
    for k in (0, 1, 2, 3, 4, 7, 8, 9):
        for off in (good[k][:-1], good[k].double(), good[k].unsqueeze(0)):
            with pytest.raises(RuntimeError, match="` must "):
                ops.crosscorr_backward(*good[:k], off, *good[k + 1 :])
