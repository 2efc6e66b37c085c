"""Pix2Rep (arXiv 2407.20395): features of an image, warped, shall be the features of the warped image.

    v1 = psi_1(x)              F1 = W_phi(h(f(v1)))
    v2 = W_phi(psi_2(x))       F2 = h(f(v2))           L = NT-Xent over pixel pairs (F1(p), F2(p))

psi: photometric, drawn for each view; phi: one spatial transform an image. f (backbone) and h (head) see the views in separate calls:
batch statistics belong to a view. loss.head_on=rows puts h behind the gathering of the pixels drawn: F1(p) = h(W_phi(f(v1))(p)).
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from pix2rep.config import Config, LossConfig
from pix2rep.methods.base import Batch, Method
from pix2rep.monitor import collapse
from pix2rep.networks import projection_head
from pix2rep.views.photometric import Photometric
from pix2rep.views.spatial import SpatialView, warp_image
from pix2rep_kernels import Pix2RepLoss, warp

MONITORED = 512  # pixels that the collapse monitors look at
IMAGE_MODE = {"linear": "bilinear", "nearest": "nearest", "bicubic": "bicubic"}


class Pix2Rep(Method):
    """Views, head and loss of Pix2Rep, from a Config (sections spatial, photometric, loss, network)."""

    def __init__(self, config: Config, backbone: nn.Module):
        super().__init__(config, backbone)
        self.spatial = SpatialView(config.spatial, config.network.dims)
        self.needs = frozenset({"spacing"}) if config.network.dims == 3 else self.needs  # pixels are square in plane, voxels are seldom cubes
        self.photometric = Photometric(config.photometric)
        self.mode, self.backend = config.loss.mode, config.loss.backend
        self.head = projection_head(config.network, backbone.out_channels)
        self.loss = pixel_loss(config.loss)

    def step(self, backbone: Callable, batch: Batch, generator: torch.Generator, monitor: bool = False) -> tuple[Tensor, dict[str, float]]:
        images = batch.images
        view_1 = self.photometric(images, generator)
        grid = self.spatial(images.shape[0], images.shape[2:], generator, images.device, batch.spacing)
        view_2 = warp_image(self.photometric(images, generator), grid, IMAGE_MODE[self.mode])
        on_rows = self.config.loss.head_on == "rows"
        features_1, features_2 = (self._features(backbone, view, not on_rows) for view in (view_1, view_2))
        loss = self.contrast(features_1, features_2, grid, head=self._rows if on_rows else None, generator=generator)
        return loss, self._monitor(features_1.detach(), features_2.detach(), grid) if monitor else {}

    def contrast(self, features_1: Tensor, features_2: Tensor, grid: Tensor, **options) -> Tensor:
        return self.loss(features_1, features_2, grid, **options)

    def _features(self, backbone: Callable, view: Tensor, projected: bool) -> Tensor:
        """[B, D, *S], or the backbone's [B, C, *S]."""
        features = backbone(view)
        return self.call(self.head, features) if projected else features

    def _rows(self, rows: Tensor) -> Tensor:
        """The head on rows [P, C] -> [P, D], as a map of one image: a line along the last axis, as oneDNN takes far longer over one along the first."""
        ones = (1,) * (self.config.network.dims - 1)
        return self.call(self.head, rows.T.reshape(1, rows.shape[1], *ones, -1)).flatten(1).view(-1, len(rows)).T

    def _monitor(self, features_1: Tensor, features_2: Tensor, grid: Tensor) -> dict[str, float]:
        """Of the maps that the loss looks at: with the head on rows, those before it."""
        pixels = features_2.movedim(1, -1)  # [B, *S, D]
        total = pixels[..., 0].numel()
        points = torch.randperm(total, generator=torch.Generator().manual_seed(0))[:MONITORED].to(pixels.device)
        rows, inside = warp(features_1, grid, points=points, mode=self.mode, backend=self.backend)
        index = points[inside]
        where = torch.unravel_index(index, pixels.shape[:-1])
        return collapse(rows[inside], pixels[where])


def pixel_loss(config: LossConfig) -> Pix2RepLoss:
    return Pix2RepLoss(
        config.objective,
        temperature=config.temperature,
        lambda_param=config.lambda_param,
        num_samples=config.num_samples,
        per_image=config.per_image,
        outside=config.outside,
        mode=config.mode,
        backend=config.backend,
    )
