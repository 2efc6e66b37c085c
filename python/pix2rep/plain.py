"""The losses as the papers' code writes them, in plain PyTorch: what the fused ones are profiled against.

The whole of view 1 is warped by `grid_sample`; NT-Xent stores the similarities of all 2P rows. Written as lean as the formula allows
(the diagonal is filled in place where the official code copies the matrix without it). Features in half precision are taken to float32
first, as autocast does for `grid_sample`.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from pix2rep.config import LossConfig
from pix2rep.methods.pix2rep import IMAGE_MODE
from pix2rep.views.spatial import dense

COPIES = 3  # of the similarities at the worst moment of a step, in backward: log-softmax as saved, its gradient, and the next gradient


class PlainLoss:
    """Called as `Pix2RepLoss`, with the same value for the same generator."""

    def __init__(self, config: LossConfig):
        self.config = config

    def __call__(
        self, features_1: Tensor, features_2: Tensor, grid: Tensor, *, head: Callable | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        config, size = self.config, features_1.shape[2:]
        if features_1.dtype in (torch.float16, torch.bfloat16):
            features_1, features_2 = features_1.float(), features_2.float()
        positions = dense(grid, tuple(size)).to(features_1.dtype)
        warped = F.grid_sample(features_1, positions, mode=IMAGE_MODE[config.mode], align_corners=True)
        rows = [f.movedim(1, -1).flatten(0, -2) for f in (warped, features_2)]
        groups = self._drawn(len(features_1), math.prod(size), features_1.device, generator)
        points = groups[0] if len(groups) == 1 else torch.cat(groups)
        rows = [r[points] if head is None else head(r[points]).float() for r in rows]
        inside = (positions.abs() <= 1).all(-1).flatten()[points] if config.outside == "drop" else torch.ones(len(rows[0]), dtype=torch.bool)
        if config.objective == "barlow":
            return barlow(*(r[inside] if config.outside == "drop" else r for r in rows), config.lambda_param)
        parts = [r.chunk(len(groups)) for r in (F.normalize(rows[0]), F.normalize(rows[1]), inside)]  # groups are equally large
        pairs = [(a[keep], b[keep]) if config.outside == "drop" else (a, b) for a, b, keep in zip(*parts, strict=True)]
        return sum(nt_xent(a, b, config.temperature) for a, b in pairs) / (2 * sum(len(a) for a, _ in pairs))

    def _drawn(self, batch: int, pixels: int, device, generator) -> list[Tensor | slice]:
        """Flat indices of the pixels that are contrasted with each other, a group an entry."""
        samples = self.config.num_samples
        if self.config.per_image:
            count = min(samples or pixels, pixels)
            if count == pixels:
                local = torch.arange(pixels, device=device).expand(batch, -1)
            else:
                local = torch.rand(batch, pixels, device=device, generator=generator).topk(count, dim=1).indices
            return [points + image * pixels for image, points in enumerate(local)]
        total = batch * pixels
        if samples is None or samples >= total:
            return [slice(None)]
        return [torch.randperm(total, device=device, generator=generator)[:samples]]


def nt_xent(a: Tensor, b: Tensor, temperature: float) -> Tensor:
    """Sum over the 2P rows of their cross-entropy against all others; the (2P)^2 similarities are stored."""
    z = torch.cat([a, b])
    s = z @ z.T / temperature
    s.fill_diagonal_(-torch.inf)
    return F.cross_entropy(s, torch.arange(len(z), device=z.device).roll(len(a)), reduction="sum")


def barlow(a: Tensor, b: Tensor, lambda_param: float) -> Tensor:
    """Barlow Twins of rows [P, D]: batch norm without affine, then the cross-correlation's distance from the identity."""
    x, y = (F.batch_norm(rows, None, None, training=True) for rows in (a, b))
    c = x.T @ y / len(x)
    on = c.diagonal()
    return (on - 1).square().sum() + lambda_param * (c.square().sum() - on.square().sum())


def similarity_bytes(config: LossConfig, batch: int, pixels: int) -> int:
    """Of one float32 copy of the similarities of a batch, `pixels` an image: 4 (2P)^2 for every group of P pairs; 0 for "barlow" and other methods."""
    if config.objective == "barlow" or config.method != "pix2rep":
        return 0
    groups, most = (batch, pixels) if config.per_image else (1, batch * pixels)
    return groups * 4 * (2 * min(config.num_samples or most, most)) ** 2
