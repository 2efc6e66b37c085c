"""Entropy of softmax in plain PyTorch, line for line (entropy.1-3)."""

import torch
from torch import Tensor

from pix2rep_kernels.layout import new_empty


def forward(logits, mask) -> Tensor:
    """H [B, 1, *S]."""
    c, shifted, z = _softmax(logits)
    h = z.log() - (c * shifted).sum(1, keepdim=True)  # (entropy.2)
    return h if mask is None else torch.where(mask.unsqueeze(1), h, 0)


def backward(grad_h, logits, mask, channels_last) -> Tensor:
    """Gradient of the logits."""
    c, shifted, _ = _softmax(logits)
    gradient = -grad_h * c * (shifted - (c * shifted).sum(1, keepdim=True))  # (entropy.3); l - m serves as l does
    if mask is not None:
        gradient = torch.where(mask.unsqueeze(1), gradient, 0)
    return new_empty(logits, logits.shape, channels_last).copy_(gradient)


def _softmax(logits) -> tuple[Tensor, Tensor, Tensor]:
    """c, l - m and Z (entropy.1). l - m ends where the exponential has long been 0: there c (l - m) is 0, and not NaN for a logit of -inf."""
    shifted = logits.to(torch.float64 if logits.dtype == torch.float64 else torch.float32)
    shifted = (shifted - shifted.amax(1, keepdim=True)).clamp(min=-1e4)
    powers = shifted.exp()
    z = powers.sum(1, keepdim=True)
    return powers / z, shifted, z
