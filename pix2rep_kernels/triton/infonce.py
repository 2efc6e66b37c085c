"""InfoNCE on the GPU: prepare the rows, sweep the pairs once for the sums, once a side for the gradients; nothing of size N x M is stored.

    infonce_blocks     formats and block sizes
    infonce_rows       kernels that work once a row: operands, losses (infonce.3-4), weights
    infonce_problem    one call's operands
    infonce_forward    sums over the negatives (infonce.2): one exponential a pair serves rows and columns, "joint" sweeps one triangle
    infonce_backward   gradient products (infonce.5-6): one over the square for "joint", one for `a` and one for `b` otherwise

Positive pairs stay outside every product (infonce.3). All reductions have a fixed order.
"""

import torch
from torch import Tensor

from pix2rep_kernels.triton import infonce_backward, infonce_forward
from pix2rep_kernels.triton.infonce_problem import Problem


def forward(
    a, b, temperature, temperature_floor, negatives, positive, valid_a, valid_b, ids_a, ids_b, queue, precision
) -> tuple[Tensor, Tensor]:
    """losses and lse, both [G, anchors]; lse is inf for an anchor that is none."""
    inputs = (a, b, temperature, temperature_floor, negatives, positive, valid_a, valid_b, ids_a, ids_b, queue, precision)
    with torch.cuda.device_of(a):
        return infonce_forward.losses(Problem(inputs, gradient=False))


def backward(
    grad_losses, losses, lse, a, b, temperature, temperature_floor, negatives, positive, valid_a, valid_b, ids_a, ids_b, queue, precision,
    need_a, need_b, need_temperature,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of a, b and temperature; one that is not needed has shape [0]."""
    inputs = (a, b, temperature, temperature_floor, negatives, positive, valid_a, valid_b, ids_a, ids_b, queue, precision)
    with torch.cuda.device_of(a):
        problem = Problem(inputs, gradient=True)
        return infonce_backward.grads(problem, grad_losses, losses, lse, a, b, (need_a, need_b, need_temperature))
