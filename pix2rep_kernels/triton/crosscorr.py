"""Moments of two views about a pivot on the GPU, and their gradients.

    crosscorr_blocks     block sizes, operand formats
    crosscorr_forward    pivot, one sweep over tiles of D1 x D2 and ranges of rows, the sum over the ranges
    crosscorr_backward   one sweep of the rows for both gradients

float32 views follow `torch.get_float32_matmul_precision()`: "highest" multiplies in tf32x3, anything else in tf32. Views of one 16-bit dtype are multiplied
in it with float32 sums: the pivot is rounded to it, which leaves x - c nearly exact. Sums and squares are float32, of what was not rounded. All
reductions have a fixed order.
"""

import torch
from torch import Tensor

from pix2rep_kernels.triton import crosscorr_backward, crosscorr_forward


def forward(x, y, weight) -> tuple[Tensor, ...]:
    """count [], pivots [D1] [D2], sums [D1] [D2], squares [D1] [D2], product [D1, D2]."""
    with torch.cuda.device_of(x):
        return crosscorr_forward.moments(x, y, weight)


def backward(
    grad_sum_x, grad_sum_y, grad_square_x, grad_square_y, grad_product, x, y, weight, pivot_x, pivot_y, need_x, need_y
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of x and y; [0] where one is not needed."""
    with torch.cuda.device_of(x):
        return crosscorr_backward.gradients(
            (grad_sum_x, grad_sum_y), (grad_square_x, grad_square_y), grad_product, x, y, weight, (pivot_x, pivot_y), (need_x, need_y)
        )
