"""PGL (arXiv 2011.12640): two crops of a volume shall have the same features wherever they show the same place.

    q_v = p(g(f(x_v)))    z_v = g'(f'(x_v))        x_1, x_2: crops, resized, flipped, their intensities changed
    L = 1/M sum_m |n(A_1 q_1)(m) - n(A_2 z_2)(m)|^2 + the same with 1 and 2 swapped

A_v interpolates a map at M points of the region that both crops see. f: backbone, g: projector, p: predictor; f' and g' follow f and g as moving
averages without gradient.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pix2rep.config import Config
from pix2rep.methods.base import Batch, Method, Network, expect_encoder
from pix2rep.monitor import collapse
from pix2rep.networks import move_towards, projection_head
from pix2rep.views.intensity import Intensity
from pix2rep.views.random import uniform
from pix2rep.views.spatial import identity
from pix2rep_kernels import PriorGuidedLocalLoss, box_grid, warp

MONITORED = 512  # points that the collapse monitors look at


class PGL(Method):
    """Views, heads, target and loss of PGL, from a Config (sections pgl, network, loss.backend). Raises ValueError for 2D networks."""

    needs = frozenset({"crops", "boxes"})
    scheduled = True

    def __init__(self, config: Config, backbone: nn.Module):
        super().__init__(config, backbone)
        options = self.options = config.pgl
        if config.network.dims != 3:
            raise ValueError(f"network.dims must be 3 for loss.method=pgl, got {config.network.dims}")
        if options.global_weight and config.pretrain.batch_size < 2:
            raise ValueError("pretrain.batch_size must be at least 2 for pgl.global_weight above 0: its heads normalise over the batch, got 1")
        if options.where == "encoder":
            width = expect_encoder(backbone, "pgl.where=encoder")[-1]
        else:
            width = backbone.out_channels
        self.intensity = Intensity(options)
        self.heads = nn.ModuleDict(self._heads("", width))
        if options.global_weight:
            self.heads.update(self._heads("global_", width))
        projectors = {name: copy.deepcopy(head) for name, head in self.heads.items() if name.endswith("projector")}
        self.target = nn.ModuleDict({"backbone": copy.deepcopy(backbone), **projectors}).requires_grad_(False)
        self.loss = PriorGuidedLocalLoss(options.norm, mode=options.mode, backend=config.loss.backend)

    def _heads(self, name: str, width: int) -> dict[str, nn.Module]:
        options = self.options
        network = replace(self.config.network, head_hidden=options.head_hidden, head_depth=1, projection=options.projection)
        heads = {f"{name}projector": projection_head(network, width)}
        return heads | ({f"{name}predictor": projection_head(network, options.projection)} if options.predictor else {})

    def step(self, backbone: Callable, batch: Batch, generator: torch.Generator, monitor: bool = False) -> tuple[Tensor, dict[str, float]]:
        size = tuple(batch.crops.shape[3:])
        flips = [self._flips(len(crop), generator, crop.device) for crop in batch.crops]
        views = [self.intensity(flipped(crop, flip), generator) for crop, flip in zip(batch.crops, flips, strict=True)]
        with torch.no_grad():  # first: what this network takes is given back before the other's activations are there
            target = [self._map(Network(self, self.target["backbone"]), view) for view in views]
        online = [self._map(backbone, view) for view in views]
        grids = [self._grid(low, high, size, flip, online[0]) for low, high, flip in zip(*batch.boxes, flips, strict=True)]
        points = self.options.points or tuple(online[0].shape[2:])
        local_online, local_target = online, target
        if self.options.align == "before":
            local_online, local_target = ([self._interpolated(*pair, points) for pair in zip(maps, grids, strict=True)] for maps in (online, target))
            grids = [identity(len(m), 3, m.device) for m in local_online]
        predictions, targets = self._branches("", local_online, local_target)
        loss = self._both(lambda one, other: self.loss(predictions[one], targets[other], grids[one], grids[other], size=points))
        if self.options.global_weight:
            rows = self._branches("global_", *([m.mean((2, 3, 4), keepdim=True) for m in maps] for maps in (online, target)))
            loss = loss + self.options.global_weight * self._both(lambda one, other: cosine_distance(rows[0][one], rows[1][other]))
        return loss, self._monitor(predictions[0].detach(), targets[1], grids, points) if monitor else {}

    def after_step(self, backbone: nn.Module, step: int, steps: int) -> None:
        """The target goes on where the optimiser skipped the step (fp16, a gradient that overflowed), towards weights that stayed."""
        momentum = self.momentum(step, steps)
        for name, module in self.target.items():
            move_towards(module, backbone if name == "backbone" else self.heads[name], momentum)

    def momentum(self, step: int, steps: int) -> float:
        """Of the target after step `step` of `steps`, counted from 0."""
        start, end = self.options.momentum, self.options.momentum_end
        return end - (end - start) * (1 + math.cos(math.pi * step / steps)) / 2

    def _branches(self, name: str, online: list[Tensor], target: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Predictions of the online maps and projections of the target's."""
        predictions = [self.call(self.heads[f"{name}projector"], m) for m in online]
        if self.options.predictor:
            predictions = [self.call(self.heads[f"{name}predictor"], p) for p in predictions]
        with torch.no_grad():
            return predictions, [self.call(self.target[f"{name}projector"], m) for m in target]

    def _both(self, loss: Callable[[int, int], Tensor]) -> Tensor:
        return loss(0, 1) + loss(1, 0) if self.options.symmetric else loss(0, 1)

    def _map(self, network: Callable, view: Tensor) -> Tensor:
        return network.encode(view)[-1] if self.options.where == "encoder" else network(view)

    def _flips(self, batch: int, generator, device) -> Tensor:
        """bool [B, 3]: axes along which a crop is flipped."""
        draw = uniform((batch, 3), 0, 1, generator, device)
        return torch.stack([draw[:, axis] < p for axis, p in enumerate(self.options.flip)], 1)

    def _grid(self, low: Tensor, high: Tensor, size: tuple[int, ...], flip: Tensor, features: Tensor) -> Tensor:
        """From the common region into a map: affine [B, 3, 4]. An encoder's map covers what the backbone pads a crop to."""
        padded = size
        if self.options.where == "encoder" and hasattr(self.target["backbone"], "padded"):
            padded = self.target["backbone"].padded(size)
        own = tuple(max(1, n * s // p) for n, s, p in zip(features.shape[2:], size, padded, strict=True))
        grid = box_grid(low, high, size, flip, features=own)
        scale = grid.new_tensor([s / p for s, p in zip(size, padded, strict=True)][::-1])
        shift = grid.new_tensor([((p - s) // 2 - (p - s + 1) // 2) / p for s, p in zip(size, padded, strict=True)][::-1])
        return torch.cat([grid[..., :3] * scale[:, None], (grid[..., 3] * scale + shift)[..., None]], 2)

    def _interpolated(self, features: Tensor, grid: Tensor, points: tuple[int, ...]) -> Tensor:
        """A map [B, C, *S] at `points` of an affine grid: [B, C, *points]. The grid keeps its own precision: half of it would move the points."""
        found = {"size": points, "mode": self.options.mode, "align_corners": False, "padding_mode": "border"}
        rows, _ = warp(features, grid, backend=self.config.loss.backend, **found)
        return rows.unflatten(0, (len(features), *points)).movedim(-1, 1)

    def _monitor(self, predictions: Tensor, targets: Tensor, grids: list[Tensor], points: tuple[int, ...]) -> dict[str, float]:
        total = len(predictions) * math.prod(points)
        chosen = torch.randperm(total, generator=torch.Generator().manual_seed(0))[:MONITORED].to(predictions.device)
        found = {"size": points, "points": chosen, "mode": self.options.mode, "align_corners": False, "padding_mode": "border"}
        rows = [warp(m, grid, backend=self.config.loss.backend, **found)[0] for m, grid in zip((predictions, targets), grids, strict=True)]
        return collapse(*rows)


def flipped(x: Tensor, flip: Tensor) -> Tensor:
    """Images [B, C, *S] flipped along the axes that bool [B, d] names."""
    for axis in range(flip.shape[1]):
        x = torch.where(flip[:, axis].view(-1, *[1] * (x.ndim - 1)), x.flip(2 + axis), x)
    return x


def cosine_distance(rows_1: Tensor, rows_2: Tensor) -> Tensor:
    """Mean of 2 - 2 cos over a batch of features [B, C, ...]."""
    rows_1, rows_2 = (rows.flatten(1).to(torch.promote_types(rows.dtype, torch.float32)) for rows in (rows_1, rows_2))
    return (2 - 2 * F.cosine_similarity(rows_1, rows_2)).mean()
