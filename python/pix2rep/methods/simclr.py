"""SimCLR (arXiv 2002.05709) on slices or patches: an image's two views are each other's match among all views of a batch.

    v_1, v_2 = W_1(psi_1(x)), W_2(psi_2(x))      psi: photometric, W: spatial; each view draws both
    z        = n(h(pool(e(cat[v_1, v_2]))))      one pass: joint batch statistics
    L        = NT-Xent over the 2B rows z

e: encoder of the backbone, pool: mean over space of its coarsest map, h: an MLP, n: unit length. The decoder gets no gradient.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pix2rep.config import Config
from pix2rep.methods.base import Batch, Method, expect_encoder
from pix2rep.methods.contrast import info_nce
from pix2rep.monitor import collapse
from pix2rep.views.photometric import Photometric
from pix2rep.views.spatial import SpatialView, warp_image
from pix2rep_kernels import infonce


class SimCLR(Method):
    """Views, head and loss of SimCLR, from a Config (sections simclr, spatial, photometric, network.dims, loss.backend).

    Raises ValueError for a batch of one image, which has no negatives, and for positives by position in 3D.
    """

    def __init__(self, config: Config, backbone: nn.Module):
        super().__init__(config, backbone)
        options, dims = config.simclr, config.network.dims
        if config.pretrain.batch_size < 2:
            raise ValueError(f"pretrain.batch_size must be at least 2 for loss.method=simclr: other images are the negatives, got {config.pretrain.batch_size}")
        self.by_position = options.positives == "position"
        if self.by_position and dims != 2:
            raise ValueError(f"network.dims must be 2 for simclr.positives=position: a volume has no depth in anything, got {dims}")
        self.needs = frozenset({"depths"} if self.by_position else {"spacing"} if dims == 3 else ())
        self.spatial, self.photometric = SpatialView(config.spatial, dims), Photometric(config.photometric)
        width = expect_encoder(backbone, "loss.method=simclr")[-1]
        self.head = nn.Sequential(nn.Linear(width, options.head_hidden), nn.ReLU(), nn.Linear(options.head_hidden, options.projection))

    def step(self, backbone: Callable, batch: Batch, generator: torch.Generator, monitor: bool = False) -> tuple[Tensor, dict[str, float]]:
        views = torch.cat([self.view(batch, generator) for _ in range(2)])
        pooled = backbone.encode(views)[-1].flatten(2).mean(2)
        rows = self.call(self.head, pooled)
        rows = F.normalize(rows.to(torch.promote_types(rows.dtype, torch.float32)), dim=1)
        loss = self.contrast(rows, batch.depths)
        return loss, collapse(*rows.detach().chunk(2)) if monitor else {}

    @torch.no_grad()
    def view(self, batch: Batch, generator: torch.Generator) -> Tensor:
        """One view of every image, [B, 1, *S]."""
        images = self.photometric(batch.images, generator)
        return warp_image(images, self.spatial(len(images), images.shape[2:], generator, images.device, batch.spacing))

    def contrast(self, rows: Tensor, depths: Tensor | None) -> Tensor:
        """Mean loss of unit rows [2B, D], the first views' before the second's; depths [B] where they decide the positives."""
        options = self.config.simclr
        if self.by_position:
            return info_nce(rows, (depths * options.partitions).long().repeat(2), options.temperature)
        return infonce(*rows.chunk(2), temperature=options.temperature, negatives="joint", backend=self.config.loss.backend).mean()
