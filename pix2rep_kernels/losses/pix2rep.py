"""Pix2Rep: equivariant pixel-level contrast (arXiv 2407.20395, MIDL 2024), and its Barlow Twins form Pix2Rep-v2 (arXiv 2609.01427)."""

import math
from collections.abc import Callable
from numbers import Integral

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pix2rep_kernels import distributed
from pix2rep_kernels.check import checked_mask, expect, expect_choice, expect_device, expect_dtype, expect_temperature, expect_tensor
from pix2rep_kernels.dispatch import CHOICES
from pix2rep_kernels.losses.common import compute_dtype, expect_finite, expect_like, expect_map, flag, weight
from pix2rep_kernels.ops.crosscorr import correlation, moments
from pix2rep_kernels.ops.infonce import infonce
from pix2rep_kernels.ops.warp import MODES, warp

OBJECTIVES = ("infonce", "barlow")
OUTSIDE = ("keep", "drop")


class Pix2RepLoss(nn.Module):
    """Contrast each pixel of one view with the same pixel of the other, against every other pixel drawn.

    `features_1` are the features of the un-warped view, `features_2` those of the warped view: F1 = W(h f(v1)), F2 = h f(W v2). The same output
    pixels are gathered from both, and

        "infonce": their L2-normalised rows go through NT-Xent over all 2P of them (infonce, negatives="joint"), exactly and in O(P C) memory;
        "barlow":  C = crosscorr(rows_1, rows_2), each column standardised over the P rows;  sum_i (C_ii - 1)^2 + lambda sum_{i != j} C_ij^2.

    The defaults are Pix2Rep's official ones. Pix2Rep-v2's: `Pix2RepLoss("barlow", num_samples=None, mode="bicubic")` (in 3D: num_samples=2**17, "linear").

    Args:
        objective: "infonce" or "barlow".
        temperature: tau > 0 of "infonce"; 0.53 in the official code.
        lambda_param: lambda >= 0 of "barlow"; 5e-3 in the official code (0.0051 in Barlow Twins).
        num_samples: pixel pairs of a batch, 1000 in the official code; None takes every pixel. Fewer pixels than samples: all are used.
        per_image: draw `num_samples` in each image; "infonce" then contrasts inside the image only, the statistics of "barlow" stay those of all rows.
        outside: "keep" pixels that the warp took from outside the map (official) or "drop" them.
        mode: interpolation of the warp: "linear" (official), "nearest" or "bicubic" (2D; Pix2Rep-v2).
        gather_distributed: the batch is that of all ranks of torch.distributed, exactly (pix2rep_kernels/distributed.py): negatives, statistics and the mean
            are global, every rank returns the global loss, and DistributedDataParallel's mean of the gradients is that loss's gradient. `num_samples`
            counts the global batch too, spread evenly and rounded up to it. "infonce" needs equally many pixels on every rank. False: each rank its own batch.
        check_finite: raise on NaN or inf features, naming the argument; reads a value back from the device, so it stops CUDA graphs and fullgraph.
        backend: "auto", "reference", "cpu", "triton" or "cuda".

    Shape:
        features_1, features_2: [B, C, *S] with 2 or 3 spatial axes, one floating dtype and device, any strides (channels-last is fastest).
        grid: affine [B, d, d+1] or dense [B, *S, d] (align_corners=True), or None where the views are aligned already.
        mask: [B, *S] or [B, 1, *S] bool, pixels of the warped frame that may be drawn.
        points: int64 flat indices into B * prod(S): [P], or [B, P] inside one image each with `per_image`. Replaces the draw.
        head: None, or a callable [P, C] -> [P, D] that the gathered rows of each view go through, view 1 first: `features_*` are then the backbone's, and a
            projection head costs O(P) instead of O(pixels). Not the same loss: features are interpolated before the head instead of after it, and batch
            norms of the head see the P rows of a view. A row outside the map is 0 before the head.
        generator: of the draw, on the features' device. `torch.compile(fullgraph=True)` holds for generator=None or given points.
        output: scalar, float32 (float64 for float64 features); of "infonce" the mean over the anchors drawn. 0 when no pixel is valid.

    Raises:
        ValueError, TypeError: an argument is off; the message names argument, expectation and value.

    Example:
        >>> loss = Pix2RepLoss(num_samples=None)(head(net(view_1)), head(net(view_2)), theta)
    """

    def __init__(
        self,
        objective: str = "infonce",
        *,
        temperature: float = 0.53,
        lambda_param: float = 5e-3,
        num_samples: int | None = 1000,
        per_image: bool = False,
        outside: str = "keep",
        mode: str = "linear",
        gather_distributed: bool = False,
        check_finite: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        expect_choice(objective, "objective", OBJECTIVES)
        expect_choice(outside, "outside", OUTSIDE)
        expect_choice(mode, "mode", MODES)
        expect_choice(backend, "backend", CHOICES)
        expect_temperature(temperature)
        whole = isinstance(num_samples, Integral) and not isinstance(num_samples, bool)
        expect(num_samples is None or (whole and num_samples > 0), "num_samples", "be None or an integer > 0", num_samples)
        self.objective, self.temperature, self.lambda_param = objective, float(temperature), weight(lambda_param, "lambda_param")
        self.num_samples, self.per_image = num_samples, per_image
        self.outside, self.mode, self.check_finite, self.backend = outside, mode, check_finite, backend
        self.gather_distributed = flag(gather_distributed, "gather_distributed")

    def forward(
        self,
        features_1: Tensor,  # [B, C, *S]
        features_2: Tensor,  # [B, C, *S]
        grid: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        points: Tensor | None = None,
        head: Callable[[Tensor], Tensor] | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        mask = self._check(features_1, features_2, grid, mask, points)
        batch, _, *size = features_1.shape
        if points is None:
            points = self._draw(batch, math.prod(size), mask, features_1.device, generator)
        valid = None if mask is None else _at(mask.flatten(), points)
        if self.per_image and points is not None:
            pixels = math.prod(size)
            first = torch.arange(batch, device=points.device).unsqueeze(1) * pixels
            # An index past its image must not take the next one's pixel: -1 is outside for `warp`, which gives NaN.
            points = torch.where((points >= 0) & (points < pixels), points + first, -1).flatten()
        rows_1, inside = self._rows(features_1, grid, points, head)
        rows_2, _ = self._rows(features_2, None, points, head)
        valid = None if valid is None else valid.flatten()
        if self.outside == "drop" and grid is not None:
            valid = inside if valid is None else valid & inside
        if self.objective == "barlow":
            return self._barlow(rows_1, rows_2, valid)
        groups = (batch, -1) if self.per_image else (-1,)
        valid = None if valid is None else valid.unflatten(0, groups)
        contrast = distributed.infonce if self._ranks() > 1 and not self.per_image else infonce
        losses = contrast(
            rows_1.unflatten(0, groups), rows_2.unflatten(0, groups), temperature=self.temperature, valid_a=valid, backend=self.backend
        )  # fmt: skip
        if self._ranks() > 1:
            return distributed.mean(losses, None if valid is None else 2 * valid.sum())
        if valid is None:
            return losses.mean()
        return losses.sum() / (2 * valid.sum()).clamp(min=1)

    def _ranks(self) -> int:
        return distributed.ranks() if self.gather_distributed else 1

    def _rows(self, features, grid, points, head) -> tuple[Tensor, Tensor | None]:
        """Rows [P, C] of the map at the points, warped by the grid if there is one, through the head if there is one, and which lie inside."""
        normalize = self.objective == "infonce"
        if grid is None and points is None and (head or not normalize):
            rows, inside = features.movedim(1, -1).flatten(0, -2), None
        else:
            mode, grid = (self.mode, grid) if grid is not None else ("nearest", identity(features))
            rows, inside = warp(features, grid, points=points, mode=mode, normalize=normalize and not head, backend=self.backend)
        return (rows if head is None else self._projected(rows, head, normalize)), inside

    @staticmethod
    def _projected(rows: Tensor, head: Callable[[Tensor], Tensor], normalize: bool) -> Tensor:
        made = head(rows)
        if not isinstance(made, Tensor) or made.ndim != 2 or len(made) != len(rows):
            shape = tuple(made.shape) if isinstance(made, Tensor) else type(made).__name__
            expect(False, "head", f"give rows [P, D] for rows [P, C] = {tuple(rows.shape)}", shape)
        return F.normalize(made.to(compute_dtype(made)), dim=1) if normalize else made

    def _barlow(self, rows_1, rows_2, valid) -> Tensor:
        found = (distributed.moments if self._ranks() > 1 else moments)(rows_1, rows_2, weight=valid, backend=self.backend)
        c = correlation(found)  # [C, C]
        target = torch.eye(c.shape[0], dtype=c.dtype, device=c.device)
        weights = target + self.lambda_param * (1 - target)
        loss = (weights * (c - target).square()).sum()
        return loss if valid is None else torch.where(found.count > 0, loss, 0)

    def extra_repr(self) -> str:
        names = ("objective", "temperature", "lambda_param", "num_samples", "per_image", "outside", "mode", "gather_distributed", "backend")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)

    def _draw(self, batch, pixels, mask, device, generator) -> Tensor | None:
        """Flat indices of the pixels drawn: [P], or [B, P] inside each image; None stands for all."""
        total = pixels if self.per_image else batch * pixels
        share = 1 if self.per_image else self._ranks()
        count = total if self.num_samples is None else min(-(-self.num_samples // share), total)
        if count == total:
            if not self.per_image or self.objective == "barlow":
                return None
            return torch.arange(pixels, device=device).expand(batch, -1)
        given = {} if generator is None else {"generator": generator}  # with dynamic shapes torch.compile refuses generator=None
        if mask is None and not self.per_image:
            return torch.randperm(total, device=device, **given)[:count]
        keys = torch.rand((batch, pixels) if self.per_image else (total,), device=device, **given)
        if mask is not None:
            keys = torch.where(mask.reshape(keys.shape), keys, -1.0)  # drawn last
        return keys.topk(count, dim=-1).indices

    def _check(self, features_1, features_2, grid, mask, points) -> Tensor | None:
        expect_map(features_1, "features_1")
        expect_like(features_2, "features_2", features_1, "features_1")
        if self.check_finite:
            expect_finite(features_1, "features_1")
            expect_finite(features_2, "features_2")
        batch, _, *size = features_1.shape
        if grid is not None:
            expect_tensor(grid, "grid")
            if grid.ndim != 3 and list(grid.shape[1:-1]) != size:
                expect(False, "grid", f"have shape [{batch}, {len(size)}, {len(size) + 1}] or {(batch, *size, len(size))}", tuple(grid.shape))
        if mask is not None:
            mask = checked_mask(mask, features_1, "features_1")
        if points is not None:
            self._check_points(points, batch, math.prod(size), features_1)
        return mask

    def _check_points(self, points, batch, pixels, features) -> None:
        expect_dtype(points, "points", torch.int64)
        if self.per_image and (points.ndim != 2 or points.shape[0] != batch):
            expect(False, "points", f"have shape [{batch}, P] with per_image", tuple(points.shape))
        if not self.per_image and points.ndim != 1:
            expect(False, "points", "have shape [P]", tuple(points.shape))
        if points.numel() == 0:
            expect(False, "points", "name at least one pixel", tuple(points.shape))
        expect_device(points, "points", features, "features_1")
        if points.device.type == "cpu" and not torch.compiler.is_compiling():
            last = pixels if self.per_image else batch * pixels
            least, most = int(points.min()), int(points.max())
            expect(0 <= least and most < last, "points", f"be in [0, {last})", f"values from {least} to {most}")


def identity(features: Tensor) -> Tensor:
    """The affine grid [B, d, d+1] that changes nothing, float32, on the device of `features` [B, C, *S]."""
    dims = features.ndim - 2
    return torch.eye(dims, dims + 1, device=features.device).expand(features.shape[0], -1, -1)


def _at(flags: Tensor, points: Tensor | None) -> Tensor:
    """flags [B * prod(S)] at flat points [P] or, inside each image, [B, P]; True where a point is none, so that its NaN is seen."""
    if points is None:
        return flags
    flags = flags.unflatten(0, (points.shape[0] if points.ndim == 2 else 1, -1))
    known = (points >= 0) & (points < flags.shape[1])
    taken = flags.gather(1, torch.where(known, points, 0).reshape(flags.shape[0], -1)).reshape(points.shape)
    return taken | ~known
