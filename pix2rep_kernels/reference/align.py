"""Two maps at corresponding warped positions in plain PyTorch, line for line (align.1-4), on the taps of warp."""

import torch
from torch import Tensor

from pix2rep_kernels.reference import warp


def forward(f1, f2, grid1, grid2, size, mode, align_corners, padding_mode) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dot, sq1, sq2, valid [B, *M]."""
    (q, inside_1), (z, inside_2) = (_rows(f, g, size, mode, align_corners, padding_mode) for f, g in ((f1, grid1), (f2, grid2)))
    shape = (len(f1), *size)
    return *(t.sum(1).reshape(shape) for t in (q * z, q * q, z * z)), (inside_1 & inside_2).reshape(shape)  # (align.2)


def backward(
    grad_dot, grad_sq1, grad_sq2, f1, f2, grid1, grid2, size, mode, align_corners, padding_mode, need_1, need_2, channels_last_1, channels_last_2
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of f1 and f2; [0] where one is not needed."""
    options = (size, None, mode, align_corners, padding_mode)
    (q, _), (z, _) = (_rows(f, g, size, mode, align_corners, padding_mode) for f, g in ((f1, grid1), (f2, grid2)))
    dot, sq1, sq2 = (g.flatten().unsqueeze(1) for g in (grad_dot, grad_sq1, grad_sq2))
    norms = q.new_empty(0)
    found = []
    for f, grid, rows, need, last in (  # (align.3)
        (f1, grid1, dot * z + 2 * sq1 * q, need_1, channels_last_1),
        (f2, grid2, dot * q + 2 * sq2 * z, need_2, channels_last_2),
    ):
        gradient = warp.backward(rows, rows, norms, grid, *options, False, f.shape, last) if need else f.new_empty(0)  # (align.4)
        found.append(gradient.to(f.dtype))
    return tuple(found)


def _rows(features, grid, size, mode, align_corners, padding_mode) -> tuple[Tensor, Tensor]:
    """Warped rows [B prod(M), C] in the compute dtype (align.1), and which lie inside."""
    compute = torch.float64 if features.dtype == torch.float64 else torch.float32
    rows, inside, _ = warp.forward(features.to(compute), grid, size, None, mode, align_corners, padding_mode, False)
    return rows, inside
