"""Entropy of softmax in plain PyTorch, line for line (entropy.1-3)."""

import torch
from torch import Tensor

from pix2rep_kernels.layout import new_empty


def forward(logits, mask) -> Tensor:
    """H [B, 1, *S]."""
    l, z = _shifted(logits)
    c = l.exp() / z  # (entropy.1)
    h = z.log() - (c * l.clamp(min=_least(l))).sum(1, keepdim=True)  # (entropy.2)
    return h if mask is None else torch.where(mask.unsqueeze(1), h, 0)


def backward(grad_h, logits, mask, channels_last) -> Tensor:
    """Gradient of the logits."""
    l, z = _shifted(logits)
    c, l = l.exp() / z, l.clamp(min=_least(l))
    gradient = -grad_h * c * (l - (c * l).sum(1, keepdim=True))  # (entropy.3)
    if mask is not None:
        gradient = torch.where(mask.unsqueeze(1), gradient, 0)
    return new_empty(logits, logits.shape, channels_last).copy_(gradient)


def _shifted(logits) -> tuple[Tensor, Tensor]:
    """l - m, and Z."""
    l = logits.to(torch.float64 if logits.dtype == torch.float64 else torch.float32)
    l = l - l.amax(1, keepdim=True)
    return l, l.exp().sum(1, keepdim=True)


def _least(l) -> float:
    """Finite, and where the exponential has long been 0: there c l is 0 and not NaN."""
    return -1e4
