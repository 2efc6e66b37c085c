"""Warp, gather and normalise in plain PyTorch, line for line (warp.1-6): explicit taps, so that forward and backward share one table."""

import math

import torch
from torch import Tensor

EPSILON = 1e-12


def forward(features, grid, size, points, mode, align_corners, padding_mode, normalize) -> tuple[Tensor, Tensor, Tensor]:
    """rows [P, C], inside [P], norms [P] ([0] unless normalize)."""
    batch, channels, *spatial = features.shape
    compute = torch.float64 if features.dtype == torch.float64 else torch.float32
    image, index, weights, inside = taps(grid, size, points, spatial, mode, align_corners, padding_mode)
    flat = features.flatten(2).transpose(1, 2)  # [B, prod(S), C]
    rows = torch.zeros(len(image), channels, dtype=compute, device=features.device)
    for q, w in zip(index.unbind(1), weights.to(compute).unbind(1), strict=True):
        values = flat[image, q].to(compute) * w.unsqueeze(1)
        rows += torch.where((w == 0).unsqueeze(1), 0, values)  # (warp.3); a tap without weight passes no NaN
    if not normalize:
        return rows.to(features.dtype), inside, rows.new_empty(0)
    norms = rows.norm(dim=1)
    return (rows / norms.clamp(min=EPSILON).unsqueeze(1)).to(features.dtype), inside, norms  # (warp.4)


def backward(
    grad_rows, rows, norms, grid, size, points, mode, align_corners, padding_mode, normalize, shape, channels_last
) -> Tensor:  # fmt: skip
    """Gradient of features, [B, C, *S]."""
    batch, channels, *spatial = shape
    compute = torch.float64 if rows.dtype == torch.float64 else torch.float32
    image, index, weights, _ = taps(grid, size, points, spatial, mode, align_corners, padding_mode)
    df = grad_rows.to(compute)
    if normalize:  # (warp.5)
        y = rows.to(compute)
        tangent = df - y * (y * df).sum(1, keepdim=True)
        df = torch.where((norms < EPSILON).unsqueeze(1), df / EPSILON, tangent / norms.clamp(min=EPSILON).unsqueeze(1))
    count = math.prod(spatial)
    grad = torch.zeros(batch * count, channels, dtype=compute, device=rows.device)
    for q, w in zip(index.unbind(1), weights.to(compute).unbind(1), strict=True):  # (warp.6)
        grad.index_add_(0, image * count + q, torch.where((w == 0).unsqueeze(1), 0, df * w.unsqueeze(1)))
    grad = grad.to(rows.dtype).reshape(batch, *spatial, channels).movedim(-1, 1)
    return grad if channels_last else grad.contiguous()


def taps(grid, size, points, spatial, mode, align_corners, padding_mode) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """image [P], index [P, K] into prod(S), weights [P, K], inside [P]: what (warp.3) sums."""
    g, image = coordinates(grid, size, points, align_corners)  # [P, d], x first
    inside = (g.abs() <= 1).all(1)
    axes = []  # per axis, slowest first: (index [P, k], weight [P, k])
    for axis, extent in enumerate(spatial):
        u = g[:, len(spatial) - 1 - axis]
        x = (u + 1) / 2 * (extent - 1) if align_corners else ((u + 1) * extent - 1) / 2  # (warp.2)
        axes.append(_axis_taps(x, extent, mode, padding_mode))
    index = torch.zeros(len(image), 1, dtype=torch.int64, device=grid.device)
    weights = torch.ones(len(image), 1, dtype=g.dtype, device=grid.device)
    for (i, w), extent in zip(axes, spatial, strict=True):
        index = (index.unsqueeze(2) * extent + i.unsqueeze(1)).flatten(1)
        weights = (weights.unsqueeze(2) * w.unsqueeze(1)).flatten(1)
    # A NaN coordinate may lose its weight to a zero on another axis.
    weights = torch.where(g.isnan().any(1, keepdim=True), torch.nan, weights)
    return image, index, weights, inside


def coordinates(grid, size, points, align_corners) -> tuple[Tensor, Tensor]:
    """Normalised input coordinates g [P, d] of the points (warp.1), and their image [P]."""
    count = math.prod(size)
    if points is None:
        points = torch.arange(grid.shape[0] * count, device=grid.device)
    elif points.numel() and points.device.type == "cpu" and (int(points.min()) < 0 or int(points.max()) >= grid.shape[0] * count):
        raise ValueError(f"`points` must be in [0, {grid.shape[0] * count}), got values from {int(points.min())} to {int(points.max())}")
    image, rest = points // max(count, 1), points % max(count, 1)
    if grid.ndim != 3:
        return grid.flatten(1, -2)[image, rest], image
    output = []  # x first
    for extent in reversed(size):
        i, rest = (rest % extent).to(grid.dtype), rest // extent
        last = extent - 1
        output.append((2 * i - last) / (max(last, 1) if align_corners else extent))
    theta = grid[image]  # [P, d, d+1]
    # The same products in the same order in every backend: a nearest tap at a tie must not depend on it.
    terms = [theta[:, :, k] * o.unsqueeze(1) for k, o in enumerate(output)]
    g = terms[0]
    for term in terms[1:]:
        g = g + term
    return g + theta[:, :, -1], image


def _axis_taps(x: Tensor, extent: int, mode: str, padding_mode: str) -> tuple[Tensor, Tensor]:
    if padding_mode == "border" and mode != "bicubic":
        x = x.clamp(0, extent - 1)
    if mode == "nearest":
        centres, weights = x.round().unsqueeze(1), torch.ones_like(x).unsqueeze(1)
    else:
        base = x.floor()
        t = x - base
        if mode == "linear":
            offsets, weights = (0, 1), torch.stack([1 - t, t], 1)
        else:
            offsets, weights = (-1, 0, 1, 2), _cubic(t)
        centres = base.unsqueeze(1) + torch.tensor(offsets, dtype=x.dtype, device=x.device)
    if padding_mode == "zeros":
        weights = torch.where((centres < 0) | (centres > extent - 1), 0, weights)
    centres = torch.where(centres.isnan(), 0, centres).clamp(0, extent - 1)
    return centres.long(), weights


def _cubic(t: Tensor, a: float = -0.75) -> Tensor:
    """Keys' weights of the taps at -1, 0, 1, 2 for the fraction t in [0, 1)."""

    def near(d):
        return ((a + 2) * d - (a + 3)) * d * d + 1

    def far(d):
        return ((a * d - 5 * a) * d + 8 * a) * d - 4 * a

    return torch.stack([far(t + 1), near(t), near(1 - t), far(2 - t)], 1)
