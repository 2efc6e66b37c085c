"""Pix2Rep (arXiv 2407.20395): features of an image, warped, shall be the features of the warped image.

    v1 = psi_1(x)              F1 = W_phi(h(f(v1)))
    v2 = W_phi(psi_2(x))       F2 = h(f(v2))           L = NT-Xent over pixel pairs (F1(p), F2(p))

psi: photometric, drawn for each view; phi: one spatial transform an image. f (backbone) and h (head) see the views in separate calls:
batch statistics belong to a view.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from pix2rep.config import Config
from pix2rep.monitor import collapse
from pix2rep.views.photometric import Photometric
from pix2rep.views.spatial import SpatialView, warp_image
from pix2rep_kernels import Pix2RepLoss, warp

Network = Callable[[Tensor], Tensor]
MONITORED = 512  # pixels that the collapse monitors look at
IMAGE_MODE = {"linear": "bilinear", "nearest": "nearest", "bicubic": "bicubic"}


class Pix2Rep:
    """Views and loss of Pix2Rep, from a Config (sections spatial, photometric, loss, network.dims)."""

    def __init__(self, config: Config):
        loss = config.loss
        self.spatial = SpatialView(config.spatial, config.network.dims)
        self.photometric = Photometric(config.photometric)
        self.mode, self.backend = loss.mode, loss.backend
        self.loss = Pix2RepLoss(
            loss.objective,
            temperature=loss.temperature,
            lambda_param=loss.lambda_param,
            num_samples=loss.num_samples,
            per_image=loss.per_image,
            outside=loss.outside,
            mode=loss.mode,
            backend=loss.backend,
        )

    def step(
        self, backbone: Network, head: Network, images: Tensor, generator: torch.Generator, monitor: bool = False
    ) -> tuple[Tensor, dict[str, float]]:
        """Loss of one batch, and the collapse statistics of `monitor.collapse` when `monitor` (they wait for the device), else {}.

        images: [B, 1, *S] float32 in [0, 1]; generator: of every draw, on the device of the images.
        """
        view_1 = self.photometric(images, generator)
        grid = self.spatial(images.shape[0], images.shape[2:], generator, images.device)
        view_2 = warp_image(self.photometric(images, generator), grid, IMAGE_MODE[self.mode])
        features_1 = head(backbone(view_1))  # [B, D, *S]
        features_2 = head(backbone(view_2))
        loss = self.loss(features_1, features_2, grid, generator=generator)
        return loss, self._monitor(features_1.detach(), features_2.detach(), grid) if monitor else {}

    def _monitor(self, features_1: Tensor, features_2: Tensor, grid: Tensor) -> dict[str, float]:
        pixels = features_2.movedim(1, -1)  # [B, *S, D]
        total = pixels[..., 0].numel()
        points = torch.randperm(total, generator=torch.Generator().manual_seed(0))[:MONITORED].to(pixels.device)
        rows, inside = warp(features_1, grid, points=points, mode=self.mode, backend=self.backend)
        index = points[inside]
        where = torch.unravel_index(index, pixels.shape[:-1])
        return collapse(rows[inside], pixels[where])
