"""Calls of lncc that its tests share: problems by name, the paper's formula in plain PyTorch, the comparison with float64."""

import torch
import torch.nn.functional as F

from pix2rep_kernels import lncc
from pix2rep_kernels.testing import backends, error, poisoned, tolerance

FAST = [b for b in backends("lncc") if b != "triton" or torch.cuda.is_available()]  # interpreted kernels have a table of their own
HERE = [b for b in FAST if b != "triton"]  # on the CPU, with float64
DEVICE = {b: "cuda" if b in ("triton", "cuda") and torch.cuda.is_available() else "cpu" for b in backends("lncc")}
NEEDS = ((True, True), (True, False), (False, True))


def problem(shape=(2, 1, 9, 11), dtype=torch.float32, j_dtype=None):
    """Two maps in [0, 1] that correlate in places, and an upstream gradient."""
    i, noise, mix = (torch.rand(shape, dtype=torch.float64) for _ in range(3))
    j = mix * i + (1 - mix) * noise
    return i.to(dtype), j.to(j_dtype or dtype), torch.randn(shape)


def paper(i, j, window=5, eps=1e-5):
    """Five box sums as convolutions with ones, zero-padded, and n = k^dims everywhere."""
    dtype = torch.promote_types(torch.promote_types(i.dtype, j.dtype), torch.float32)
    i, j = i.to(dtype), j.to(dtype)
    dims = i.ndim - 2
    ones = torch.ones(1, 1, *(window,) * dims, dtype=dtype)

    def box(x):
        return (F.conv2d, F.conv3d)[dims - 2](x.flatten(0, 1)[:, None], ones, padding=window // 2).view_as(x)

    n = window**dims
    cross = (box(i * j) - box(i) * box(j) / n).clamp(min=eps)
    var_i = (box(i * i) - box(i) ** 2 / n).clamp(min=eps)
    var_j = (box(j * j) - box(j) ** 2 / n).clamp(min=eps)
    return cross**2 / (var_i * var_j)


def ours(backend):
    def run(i, j, **options):
        return lncc(i.to(DEVICE[backend]), j.to(DEVICE[backend]), backend=backend, **options).cpu()

    return run


def both(function, i, j, upstream, needs=(True, True), **options):
    """cc, and the gradients that are asked for."""
    i, j = i.detach().requires_grad_(needs[0]), j.detach().requires_grad_(needs[1])
    cc = function(i, j, **options)
    cc.backward(upstream.to(cc.dtype))
    return [cc.detach(), *(x.grad for x in (i, j) if x.requires_grad)]


def compare(backend, i, j, upstream, **options):
    """cc and gradients no further from float64 than twice PyTorch's own at the same precision."""
    truth = both(paper, i.double(), j.double(), upstream, **options)
    eager = both(paper, i, j, upstream, **options)
    with poisoned():
        got = both(ours(backend), i, j, upstream, **options)
    for g, e, t in zip(got, eager, truth, strict=True):
        assert g.dtype == e.dtype and g.shape == t.shape
        # In float64 PyTorch is the truth and has no error of its own; its sums, all below a hundred pixels' worth, then round up to a hundred times.
        own = 100 * torch.finfo(torch.float64).eps if e.dtype == torch.float64 else error([e], [t])
        assert error([g], [t]) <= tolerance(own, g.dtype), (backend, i.dtype, j.dtype, tuple(i.shape), options)
