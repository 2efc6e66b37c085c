"""BIM (arXiv 2202.02371): two cluster maps of one image agree, use all clusters, and are unsure where the image has edges.

    x, x'   = crop(image), in colours of their own
    x_t     = T(x'^gamma)                            T: affine and mirrored, nearest neighbour, one an image
    f, f_t  = backbone(cat[x, x_t])                  one pass: joint batch statistics
    L       = mean over heads of [w_rr RR + w_cc CC](head(T f), head(f_t), edges of x_t)  +  w_e InfoNCE(bottlenecks of x and x_t)

The features are transformed before the heads. RR and CC: `pix2rep_kernels.BoundaryInfoMaxLoss`.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from pix2rep.config import Config, SpatialConfig
from pix2rep.method_config import BimConfig
from pix2rep.methods.base import Batch, Method, expect_encoder
from pix2rep.methods.contrast import info_nce
from pix2rep.monitor import clustering
from pix2rep.networks import CONV
from pix2rep.views.random import uniform
from pix2rep.views.spatial import SpatialView, warp_image
from pix2rep_kernels import BoundaryInfoMaxLoss, warp

SLOPE = 0.01  # of LeakyReLU


class BIM(Method):
    """Views, sub-heads and losses of BIM, from a Config (sections bim, network, and loss.backend)."""

    def __init__(self, config: Config, backbone: nn.Module):
        super().__init__(config, backbone)
        opt, dims = config.bim, config.network.dims
        self.needs = frozenset({"spacing"}) if dims == 3 else self.needs  # pixels are square in plane, voxels are seldom cubes
        self.crop = SpatialView(SpatialConfig(rotation=opt.crop_rotation, scale=opt.crop_scale, flip=()), dims)
        self.turn = SpatialView(SpatialConfig(rotation=opt.rotation, scale=(1.0, 1.0), flip=()), dims)
        self.heads = nn.ModuleList(cluster_head(opt, backbone.out_channels, dims) for _ in range(opt.heads))
        self.loss = BoundaryInfoMaxLoss(
            opt.alpha,
            opt.lamda,
            opt.boundary_weight,
            opt.window,
            opt.power,
            information_weight=opt.information_weight,
            backend=config.loss.backend,
        )
        if opt.encoder_weight:
            width = expect_encoder(backbone, "bim.encoder_weight")[-1]
            layers = nn.Linear(width, opt.encoder_hidden), nn.LeakyReLU(SLOPE), nn.Linear(opt.encoder_hidden, opt.encoder_projection)
            self.encoder_head = nn.Sequential(*layers)
            self.needs = self.needs | {"depths"} if dims == 2 else self.needs  # a volume has no depth in anything

    def step(self, backbone: Callable, batch: Batch, generator: torch.Generator, monitor: bool = False) -> tuple[Tensor, dict[str, float]]:
        view_1, view_2, theta = self.views(batch.images, generator, batch.spacing)
        features, bottleneck = self._features(backbone, torch.cat([view_1, view_2]))
        features_1, features_2 = features.chunk(2)
        features_1, inside = self.transform(features_1, theta)
        logits_1, logits_2 = ([self.call(head, f) for head in self.heads] for f in (features_1, features_2))
        loss = self.loss(logits_1, logits_2, view_2, mask=inside if self.config.bim.outside == "drop" else None)
        stats = clustering(logits_1, logits_2) if monitor else {}
        if bottleneck is not None:
            encoder = self._encoder_loss(bottleneck, batch.depths)
            loss = loss + self.config.bim.encoder_weight * encoder
            stats |= {"encoder_loss": encoder.item()} if monitor else {}
        return loss, stats

    @torch.no_grad()
    def views(self, images: Tensor, generator: torch.Generator, spacing: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """x, x_t [B, 1, *S] in [0, 1] and the grid of T [B, d, d+1] (`align_corners=False`). spacing: [B, d], voxel sizes; None: all alike."""
        opt, count, size = self.config.bim, len(images), tuple(images.shape[2:])
        images = warp_image(images, mirrored(self.crop(count, size, generator, images.device, spacing), opt.crop_flip, generator))
        view_1, view_2 = (jittered(images, opt.jitter, generator) for _ in range(2))
        theta = mirrored(self._affine(count, size, spacing, generator, images.device), opt.mirror, generator)
        gamma = uniform((count,) + (1,) * (len(size) + 1), *opt.gamma, generator, images.device)
        return view_1, self.transform(view_2**gamma, theta)[0], theta

    def transform(self, maps: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        """T of maps [B, C, *S], 0 from outside, and [B, *S] bool: what comes from inside."""
        rows, inside = warp(maps, theta, mode="nearest", align_corners=False, backend=self.config.loss.backend)
        shape = (len(maps), *maps.shape[2:])
        return rows.unflatten(0, shape).movedim(-1, 1), inside.view(shape)

    def _affine(self, count: int, size: tuple[int, ...], spacing: Tensor | None, generator, device) -> Tensor:
        opt, d = self.config.bim, len(size)
        faces = torch.tensor([n / max(n - 1, 1) for n in size]).to(device, non_blocking=True).expand(count, d)  # ends of T's grid; SpatialView's: centres
        rotation = self.turn(count, size, generator, device, faces if spacing is None else faces * spacing)[:, :, :d]
        scale = uniform((count, 1, 1), *opt.scale, generator, device)
        return torch.cat([rotation / scale, uniform((count, d, 1), -opt.translation, opt.translation, generator, device)], 2)

    def _features(self, backbone: Callable, views: Tensor) -> tuple[Tensor, Tensor | None]:
        """Full-resolution features, and the coarsest map where the encoder has a loss."""
        if not self.config.bim.encoder_weight:
            return backbone(views), None
        maps = backbone.encode(views)
        return backbone.decode(maps, tuple(views.shape[2:])), maps[-1]

    def _encoder_loss(self, bottleneck: Tensor, depths: Tensor | None) -> Tensor:
        opt, pooled = self.config.bim, bottleneck.flatten(2).mean(2)
        pooled = torch.cat([view[: opt.encoder_images] for view in pooled.chunk(2)])
        count = len(pooled) // 2
        groups = torch.arange(count, device=pooled.device) if depths is None else (depths[:count] * opt.partitions).long()
        return info_nce(self.call(self.encoder_head, pooled), groups.repeat(2), opt.temperature)


def cluster_head(config: BimConfig, in_channels: int, dims: int) -> nn.Module:
    """[B, in_channels, *S] -> logits [B, clusters, *S]."""
    conv = CONV[dims]
    if config.head == "linear":
        return conv(in_channels, config.clusters, 1)
    return nn.Sequential(conv(in_channels, config.head_hidden, 1), nn.LeakyReLU(SLOPE), conv(config.head_hidden, config.clusters, 1))


@torch.no_grad()
def cluster_map(method: BIM, backbone: nn.Module, images: Tensor, head: int = 0) -> Tensor:
    """The likeliest cluster of every pixel: images [B, 1, *S] float32 in [0, 1] -> int64 [B, *S], 0 to bim.clusters - 1, of one sub-head.

    Batch statistics are the running ones, whatever mode the backbone is in. Raises ValueError for a head that is not there.
    """
    if not 0 <= head < len(method.heads):
        raise ValueError(f"head must be in 0 to {len(method.heads) - 1} (bim.heads), got {head}")
    was_training = backbone.training
    backbone.eval()
    try:
        return method.heads[head](backbone(images)).argmax(1)
    finally:
        backbone.train(was_training)


def mirrored(grid: Tensor, probability: float, generator: torch.Generator) -> Tensor:
    """Affine grids [B, d, d+1], each axis of the output mirrored with this probability."""
    count, d, _ = grid.shape
    drawn = uniform((count, 1, d), 0, 1, generator, grid.device) < probability
    return torch.cat([grid[:, :, :d] * torch.where(drawn, -1.0, 1.0), grid[:, :, d:]], 2)


def jittered(x: Tensor, limits: tuple[float, float], generator: torch.Generator) -> Tensor:
    """Brightness b x, then contrast c x + (1 - c) mean(x), b and c an image's own, each clamped to [0, 1]."""
    shape = (len(x),) + (1,) * (x.ndim - 1)
    x = (x * uniform(shape, *limits, generator, x.device)).clamp(0, 1)
    contrast = uniform(shape, *limits, generator, x.device)
    mean = x.flatten(1).mean(1).view(shape)
    return torch.lerp(mean, x, contrast).clamp(0, 1)
