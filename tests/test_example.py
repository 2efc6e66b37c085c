"""The op of CONTRIBUTING lives: hub and reference alone make a whole op, with autograd, fake tensors and reasons."""

import pytest
import torch

from example.ops.energy import energy


def test_energy():
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.allclose(energy(x), x.norm(dim=1) ** 2 / 2)
    assert torch.autograd.gradcheck(energy, x)
    torch.library.opcheck(torch.ops.pix2rep.energy.default, (x, "reference"))
    assert torch.compile(energy, fullgraph=True)(x).shape == (5,)


def test_energy_explains_itself():
    with pytest.raises(RuntimeError, match="backend 'triton' cannot run energy"):
        energy(torch.randn(5, 3), backend="triton")
    with pytest.raises(ValueError, match=r"`x` must have shape \[N, D\], got \(5,\)"):
        energy(torch.randn(5))
    x = torch.randn(5, 3, requires_grad=True)
    (grad,) = torch.autograd.grad(energy(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="energy has no second derivative"):
        grad.sum().backward()
