"""Contrast of a few rows where several others may be a row's positives; with one positive each, `pix2rep_kernels.infonce` is the fast one."""

import torch
import torch.nn.functional as F
from torch import Tensor


def info_nce(rows: Tensor, groups: Tensor, temperature: float) -> Tensor:
    """Mean over rows [N, D] of -log softmax at the other rows of their group (int [N]), themselves left out; a group has at least two rows."""
    rows = F.normalize(rows.to(torch.promote_types(rows.dtype, torch.float32)), dim=1)
    itself = torch.eye(len(rows), dtype=torch.bool, device=rows.device)
    log_p = (rows @ rows.T / temperature).masked_fill(itself, -torch.inf).log_softmax(1)
    positive = (groups[:, None] == groups) & ~itself
    return -(torch.where(positive, log_p, 0).sum(1) / positive.sum(1)).mean()
