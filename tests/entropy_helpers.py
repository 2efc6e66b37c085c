"""Calls of entropy that its tests share: problems, PyTorch's compositions, comparison with float64."""

import torch

import pix2rep_kernels
from joint_helpers import lay
from pix2rep_kernels.testing import backends, error, home, placed, poisoned, tolerance

FAST = [b for b in backends("entropy") if b != "triton" or home(b) == "cuda"]  # interpreted kernels have a table of their own
entropy = placed(pix2rep_kernels.entropy)


def problem(clusters=5, batch=2, space=(7, 9), layout="first", dtype=torch.float32, masked=False, scale=3.0):
    """Logits, an upstream gradient and a mask."""
    logits = lay((scale * torch.randn(batch, clusters, *space, dtype=torch.float64)).to(dtype), layout)
    return logits, torch.randn(batch, 1, *space), torch.rand(batch, *space) > 0.3 if masked else None


def official(logits, mask=None):
    """As the boundary-aware paper's code writes it."""
    c = logits.softmax(1)
    h = -(c * (c + 1e-16).log()).sum(1, keepdim=True)
    return h if mask is None else torch.where(mask.unsqueeze(1), h, 0)


def plain(logits, mask=None):
    h = torch.special.entr(logits.softmax(1)).sum(1, keepdim=True)
    return h if mask is None else torch.where(mask.unsqueeze(1), h, 0)


def both(function, logits, upstream, **options):
    """H and the gradient."""
    logits = logits.detach().requires_grad_()
    h = function(logits, **options)
    h.backward(upstream.to(h.dtype))
    return h.detach(), logits.grad


def compare(backend, logits, upstream, mask=None):
    """H and gradient no further from float64 than twice PyTorch's own at the same precision; 16-bit maps are float32 to PyTorch.

    In float64 PyTorch is the truth; its own error is then a rounding a cluster and a few more. Where (entropy.3) cancels, PyTorch's error on few pixels
    may be luckily small: added is the rounding of what is subtracted, eps |dH| c (|l - m| + <c, |l - m|>).
    """
    compute = torch.float64 if logits.dtype == torch.float64 else torch.float32
    truth = both(plain, logits.double(), upstream, mask=mask)
    eager = [t.to(dtype) for t, dtype in zip(both(official, logits.to(compute), upstream, mask=mask), (compute, logits.dtype), strict=True)]
    with poisoned():
        got = both(entropy, logits, upstream, mask=mask, backend=backend)
    x = logits.double()
    c, far = x.softmax(1), x.amax(1, keepdim=True) - x
    cancelled = (upstream.double() * c * (far + (c * far).sum(1, keepdim=True))).norm()
    for g, e, t, more in zip(got, eager, truth, (0.0, cancelled), strict=True):
        assert g.dtype == e.dtype and g.shape == t.shape
        own = error([e], [t]) if compute == torch.float32 else (logits.shape[1] + 4) * torch.finfo(compute).eps
        norm = t.norm() if t.norm() > 0 else 1
        assert error([g], [t]) * norm <= tolerance(own, g.dtype) * norm + torch.finfo(compute).eps * more, (backend, logits.shape, error([g], [t]), own)
    return got
