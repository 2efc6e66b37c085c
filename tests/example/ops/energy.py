"""The smallest op there can be: half the squared norm of each row.

    e_n  = <x_n, x_n> / 2                                                       (energy.1)
    dx_n = g_n x_n                                                              (energy.2)

Floor: N D values read, N written.
"""

import torch
from torch import Tensor

from pix2rep_kernels.check import expect, expect_float
from pix2rep_kernels.register import register

SCHEMA = "energy(Tensor x, str backend) -> Tensor energies"
BACKWARD_SCHEMA = "energy_backward(Tensor grad_energies, Tensor x, str backend) -> Tensor grad_x"


def energy(x: Tensor, *, backend: str = "auto") -> Tensor:  # [N, D] -> [N]
    """Half the squared norm of each row of x [N, D] (energy.1). Raises ValueError and TypeError naming the argument."""
    expect_float(x, "x")
    expect(x.ndim == 2, "x", "have shape [N, D]", tuple(x.shape))
    return torch.ops.pix2rep.energy(x, backend)


def why_not(backend: str, tensors: list[Tensor | None]) -> str | None:
    return None if backend == "reference" else f"energy has no {backend} kernel"


def _setup_context(ctx, inputs, output):
    x, ctx.backend = inputs
    ctx.save_for_backward(x)


def _backward(ctx, grad_energies):
    return torch.ops.pix2rep.energy_backward(grad_energies, *ctx.saved_tensors, ctx.backend), None


register(
    SCHEMA, BACKWARD_SCHEMA, fake=lambda x, backend: x.new_empty(x.shape[0]), backward_fake=lambda g, x, backend: x.new_empty(x.shape),
    setup_context=_setup_context, backward=_backward, home="example",
)  # fmt: skip
