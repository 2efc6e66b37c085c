"""Every op once on every backend that runs here, forward and backward, against the reference: what `make test-triton36` runs. Needs torch, triton, pytest."""

import pytest
import torch
import torch.nn.functional as F

import pix2rep_kernels as p2r
from pix2rep_kernels.dispatch import OPS
from pix2rep_kernels.testing import backends, error, placed


def affine(shift):
    return torch.tensor([[1.0, 0.1, shift], [-0.1, 0.9, 0.05]]).repeat(2, 1, 1)


warp, infonce, crosscorr, joint, lncc, pool, align, entropy = (placed(getattr(p2r, op)) for op in OPS)

# op -> [name of each tensor that wants a gradient, shape], the call
PROBLEMS = {
    "warp": ([(2, 3, 5, 6)], lambda x, **o: warp(x, affine(0.1), normalize=True, **o)[0]),
    "infonce": ([(9, 4), (9, 4)], lambda a, b, **o: infonce(F.normalize(a), F.normalize(b), temperature=0.5, **o)),
    "crosscorr": ([(9, 4), (9, 3)], crosscorr),
    "joint": ([(2, 3, 5, 6), (2, 3, 5, 6)], lambda a, b, **o: joint(a, b, radius=1, **o)),
    "lncc": ([(2, 1, 7, 8), (2, 1, 7, 8)], lncc),
    "pool": ([(2, 3, 5, 6)], lambda x, **o: pool(x, torch.arange(60).view(2, 5, 6) % 5 - 1, regions=5, **o)[0]),
    "align": ([(2, 3, 5, 6), (2, 3, 5, 6)], lambda a, b, **o: torch.stack(align(a, b, affine(0.1), affine(-0.1), size=(4, 4), **o)[:3])),
    "entropy": ([(2, 3, 5, 6)], entropy),
}


@pytest.mark.parametrize("op", OPS)
def test_backends_agree(op):
    shapes, call = PROBLEMS[op]
    tensors = [torch.randn(shape) for shape in shapes]
    upstream = torch.randn_like(call(*tensors, backend="reference"))

    def both(backend):
        inputs = [t.clone().requires_grad_() for t in tensors]
        out = call(*inputs, backend=backend)
        return out.detach(), *torch.autograd.grad(out, inputs, upstream)

    truth = both("reference")
    for backend in backends(op):
        assert error(both(backend), truth) < 1e-3, backend
