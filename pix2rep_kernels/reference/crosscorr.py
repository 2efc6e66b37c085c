"""Shifted moments of two feature sets in plain PyTorch, line for line (crosscorr.1-6)."""

import torch
from torch import Tensor

PILOT_ROWS = 128


def forward(x, y, weight) -> tuple[Tensor, ...]:
    """count [], pivots [D1] [D2], sums [D1] [D2], squares [D1] [D2], product [D1, D2]."""
    compute = torch.float64 if torch.float64 in (x.dtype, y.dtype) else torch.float32
    x, y = x.to(compute), y.to(compute)
    w = x.new_ones(len(x)) if weight is None else weight
    pivot_x, pivot_y = pivot(x, w), pivot(y, w)
    u, v = (torch.where((w != 0).unsqueeze(1), t - c, 0) for t, c in ((x, pivot_x), (y, pivot_y)))  # (crosscorr.1)
    wu, wv = w.unsqueeze(1) * u, w.unsqueeze(1) * v
    return w.sum(), pivot_x, pivot_y, wu.sum(0), wv.sum(0), (wu * u).sum(0), (wv * v).sum(0), wu.T @ v  # (crosscorr.2-5)


def pivot(x: Tensor, w: Tensor) -> Tensor:
    """Mean [D] of the pilot rows, those of weight 0 left out; 0 when none is left."""
    pilots = pilot_rows(len(x), x.device)
    rows, counts = x[pilots], (w[pilots] != 0).unsqueeze(1)
    return torch.where(counts, rows, 0).sum(0) / counts.sum().clamp(min=1)


def pilot_rows(n: int, device) -> Tensor:
    """Up to `PILOT_ROWS` rows, one in each of equal steps over the N, at multiples of the golden ratio within the steps.

    Rows at even distances would share a column of pixels wherever the step is a multiple of the image's width: the border, often masked.
    """
    i = torch.arange(min(n, PILOT_ROWS), device=device)
    step = max(n // PILOT_ROWS, 1)
    return i * step + ((i * 40503 & 0xFFFF) * step >> 16)


def backward(
    grad_sum_x, grad_sum_y, grad_square_x, grad_square_y, grad_product, x, y, weight, pivot_x, pivot_y, need_x, need_y
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of x and y; [0] where one is not needed."""
    u, v = x.to(pivot_x.dtype) - pivot_x, y.to(pivot_y.dtype) - pivot_y
    w = None if weight is None else weight.unsqueeze(1)

    def weighted(gradient):
        return gradient if w is None else torch.where(w != 0, w * gradient, 0)

    grad_x = weighted(grad_sum_x + 2 * grad_square_x * u + v @ grad_product.T).to(x.dtype) if need_x else x.new_empty(0)  # (crosscorr.6)
    grad_y = weighted(grad_sum_y + 2 * grad_square_y * v + u @ grad_product).to(y.dtype) if need_y else y.new_empty(0)
    return grad_x, grad_y
