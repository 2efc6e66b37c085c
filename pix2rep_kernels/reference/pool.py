"""Mean feature of every region in plain PyTorch, line for line (pool.1-3)."""

import torch
from torch import Tensor

from pix2rep_kernels.layout import new_empty


def forward(features, labels, regions) -> tuple[Tensor, Tensor]:
    """means [B, R, C], counts [B, R]."""
    batch, channels = features.shape[:2]
    slot = _slots(labels, regions)  # [B, prod(S)]
    counts = torch.zeros(batch, regions + 1, dtype=torch.int64, device=features.device)
    counts.scatter_add_(1, slot, torch.ones_like(slot))  # (pool.1)
    sums = torch.zeros(batch, regions + 1, channels, dtype=torch.float64, device=features.device)
    rows = features.flatten(2).transpose(1, 2).double()
    sums.scatter_add_(1, slot.unsqueeze(2).expand(-1, -1, channels), rows)
    counts = counts[:, :regions].contiguous()
    means = sums[:, :regions] / counts.clamp(min=1).unsqueeze(2)  # (pool.2)
    return means.to(torch.float64 if features.dtype == torch.float64 else torch.float32), counts


def backward(grad_means, counts, labels, like, shape, channels_last) -> Tensor:
    """Gradient of features, [B, C, *S]."""
    batch, channels, *_ = shape
    slot = _slots(labels, counts.shape[1])
    rows = torch.where((counts > 0).unsqueeze(2), grad_means / counts.clamp(min=1).unsqueeze(2), 0)
    rows = torch.cat([rows, rows.new_zeros(batch, 1, channels)], 1)  # no region, no gradient
    grad = rows.gather(1, slot.unsqueeze(2).expand(-1, -1, channels))  # (pool.3)
    out = new_empty(like, shape, channels_last)
    return out.copy_(grad.transpose(1, 2).reshape(shape))


def _slots(labels: Tensor, regions: int) -> Tensor:
    """Labels [B, prod(S)] int64, with `regions` for a pixel that has no region."""
    labels = labels.flatten(1).long()
    return torch.where((labels >= 0) & (labels < regions), labels, regions)
