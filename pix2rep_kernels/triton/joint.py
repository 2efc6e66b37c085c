"""Joint distribution in Triton: softmax and product of one tile of clusters x pixels at a time, clusters padded to a power of two.

    joint_tiles      tiles, formats, block sizes
    joint_forward    sums (joint.1-3)
    joint_backward   gradients (joint.6-7)

Without a radius no probability is ever in memory. With one, those of the map that is moved are: a float32 map, two while it is box-filtered.
"""

import torch
from torch import Tensor

from pix2rep_kernels.layout import new_empty
from pix2rep_kernels.triton import joint_backward, joint_forward
from pix2rep_kernels.triton.joint_tiles import format_of


def forward(a, b, mask, radius, collapsed, logits) -> Tensor:
    """S [1, K, K] when collapsed, else [(2T+1)^dims, K, K]."""
    if a.numel() == 0:
        count = 1 if collapsed else (2 * radius + 1) ** (a.ndim - 2)
        return a.new_zeros((count, a.shape[1], a.shape[1]), dtype=torch.float32)
    with torch.cuda.device_of(a):
        return joint_forward.sums(a, b, _dense(mask), radius, collapsed, logits, format_of(a, b, logits))


def backward(
    grad_sums, a, b, mask, radius, collapsed, logits, need_a, need_b, channels_last_a, channels_last_b
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of a and b; [0] where one is not needed."""
    grad_a = new_empty(a, a.shape, channels_last_a) if need_a else None
    grad_b = new_empty(b, b.shape, channels_last_b) if need_b else None
    if a.numel() > 0 and (need_a or need_b):
        with torch.cuda.device_of(a):
            joint_backward.grads(grad_sums, a, b, _dense(mask), radius, collapsed, logits, grad_a, grad_b, format_of(a, b, logits))
    return a.new_empty(0) if grad_a is None else grad_a, b.new_empty(0) if grad_b is None else grad_b


def _dense(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.contiguous()
