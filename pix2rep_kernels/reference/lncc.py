"""Local normalised cross-correlation in plain PyTorch, line for line (lncc.1-7)."""

import torch
import torch.nn.functional as F
from torch import Tensor


def forward(i, j, window, eps) -> Tensor:
    """cc [B, C, *S]."""
    i, j = _computed(i, j)
    _, _, c, v, w = _sums(i, j, window)
    c, v, w = (t.clamp(min=eps) for t in (c, v, w))
    return (c / v) * (c / w)  # (lncc.4); c^2 and v w would leave float32 long before their ratio does


def backward(grad_cc, i, j, window, eps, need_i, need_j) -> tuple[Tensor, Tensor]:
    """Gradients of i and j; [0] where one is not needed."""
    like_i, like_j = i, j
    i, j = _computed(i, j)
    mean_i, mean_j, c, v, w = _sums(i, j, window)
    open_c, open_v, open_w = c > eps, v > eps, w > eps
    c, v, w = (t.clamp(min=eps) for t in (c, v, w))
    # A NaN is neither above nor below: it must still reach the gradient.
    g = grad_cc * ((c / v) * (c / w))
    a = torch.where(open_c | c.isnan(), 2 * g / c, 0)  # (lncc.5)
    b = torch.where(open_v | v.isnan(), -g / v, 0)
    b_j = torch.where(open_w | w.isnan(), -g / w, 0)

    def gradient(x, y, mean_x, mean_y, b):  # (lncc.6-7)
        return y * box(a, window) - box(a * mean_y, window) + 2 * x * box(b, window) - 2 * box(b * mean_x, window)

    return (
        gradient(i, j, mean_i, mean_j, b).to(like_i.dtype) if need_i else like_i.new_empty(0),
        gradient(j, i, mean_j, mean_i, b_j).to(like_j.dtype) if need_j else like_j.new_empty(0),
    )


def box(x: Tensor, window: int) -> Tensor:
    """Sum over the window around each pixel of x [B, C, *S], zero-padded, axis by axis."""
    if x.numel() == 0:
        return x
    for axis in range(2, x.ndim):
        padded = F.pad(x.movedim(axis, -1), (window // 2, window // 2))
        x = padded.unfold(-1, window, 1).sum(-1).movedim(-1, axis)
    return x.contiguous()


def _computed(i, j):
    compute = torch.float64 if torch.float64 in (i.dtype, j.dtype) else torch.float32
    return i.to(compute), j.to(compute)


def _sums(i, j, window):
    n = window ** (i.ndim - 2)
    s_i, s_j, s_ii, s_jj, s_ij = (box(t, window) for t in (i, j, i * i, j * j, i * j))  # (lncc.1)
    return s_i / n, s_j / n, s_ij - s_i * s_j / n, s_ii - s_i * s_i / n, s_jj - s_j * s_j / n
