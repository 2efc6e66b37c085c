"""Localized Region Contrast (arXiv 2304.03406): superpixels of one view against the same superpixels of the other, beside a global contrast.

    v_q = psi_1(x)    v_k = W_phi(psi_2(x))    r_q = r    r_k = W_phi(r)        r: superpixels, made beforehand; W of r takes the nearest
    L = w_local InfoNCE(means of f(v_q) over r_q, of f'(v_k) over r_k) + w_global InfoNCE(h(pool(e(v_q))), h'(pool(e'(v_k))), queue)

f: backbone with decoder; e: its bottleneck; h: an MLP. f', e', h' follow f, e, h as a moving average and get no gradient (MoCo, arXiv
1911.05722). The queue holds the keys of earlier steps: they alone are negatives of the global term, those of the query's own image left out.
"""

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pix2rep.config import Config
from pix2rep.methods.base import Batch, Method, Network, expect_encoder
from pix2rep.monitor import collapse
from pix2rep.networks import move_towards
from pix2rep.views.photometric import Photometric
from pix2rep.views.spatial import SpatialView, warp_image, warp_labels
from pix2rep_kernels import LocalRegionContrastLoss, pool


class LRC(Method):
    """Views, losses, moving average and queue of LRC, from a Config (sections lrc, spatial, photometric, network.dims, loss.backend)."""

    def __init__(self, config: Config, backbone: nn.Module):
        super().__init__(config, backbone)
        options = self.options = config.lrc
        self.needs = frozenset({"regions"} | ({"spacing"} if config.network.dims == 3 and options.warp else set()))
        self.spatial = SpatialView(config.spatial, config.network.dims)
        self.photometric = Photometric(config.photometric)
        self.local_loss = LocalRegionContrastLoss(
            options.temperature, options.max_regions, options.normalize_first, options.negatives, num_samples=options.num_samples,
            same_samples=options.same_samples, min_pixels=options.min_pixels, detach_keys=options.keys == "momentum", symmetric=options.symmetric,
            backend=config.loss.backend,
        )  # fmt: skip
        self.momentum = _frozen(backbone)
        self.head = self.momentum_head = None
        self.keys: list[Tensor] = []  # of this step's micro-batches
        self.key_ids: list[Tensor] = []
        if options.global_weight:
            width = expect_encoder(backbone, "lrc.global_weight above 0")[-1]
            self.head = nn.Sequential(nn.Linear(width, options.global_hidden), nn.ReLU(), nn.Linear(options.global_hidden, options.global_projection))
            self.momentum_head = _frozen(self.head)
            self.register_buffer("queue", F.normalize(torch.randn(options.queue, options.global_projection), dim=1))
            self.register_buffer("oldest", torch.zeros((), dtype=torch.int64))  # row of the queue that the next key replaces
            if options.own_keys == "drop":
                self.needs |= {"indices"}
                self.register_buffer("queue_ids", torch.full((options.queue,), -1))  # items of the source; -1: a random row of the start
                self.register_load_state_dict_pre_hook(_without_ids)

    def step(self, backbone: Callable, batch: Batch, generator: torch.Generator, monitor: bool = False) -> tuple[Tensor, dict[str, float]]:
        options, images, regions_q = self.options, batch.images, batch.regions
        view_q, view_k, regions_k = self.photometric(images, generator), self.photometric(images, generator), None
        if options.warp:
            grid = self.spatial(images.shape[0], images.shape[2:], generator, images.device, batch.spacing)
            view_k = warp_image(view_k, grid)
            regions_k = warp_labels(regions_q + 1, grid) - 1  # outside the image is no region
        local, follows = options.local_weight > 0, options.keys == "momentum"
        with torch.no_grad():  # first: what this network takes is given back before the other's activations are there
            features_k, key = self._see(Network(self, self.momentum), self.momentum_head, view_k, local and follows)
        features_q, query = self._see(backbone, self.head, view_q, local)
        terms = {}
        if local:
            features_k = features_k if follows else backbone(view_k)
            terms["local"] = self.local_loss(features_q, features_k, regions_q, regions_k, generator=generator)
        if options.global_weight:
            own = None
            if options.own_keys == "drop":
                own = batch.indices[:, None] == self.queue_ids
                self.key_ids.append(batch.indices)
            terms["global"] = moco(query, key, self.queue, options.global_temperature, own)
            self.keys.append(key)
        loss = sum(getattr(options, f"{name}_weight") * term for name, term in terms.items())
        if not monitor:
            return loss, {}
        stats = {f"loss_{name}": term.item() for name, term in terms.items()}
        return loss, stats | self._monitor(features_q, features_k, regions_q, regions_q if regions_k is None else regions_k)

    @torch.no_grad()
    def after_step(self, backbone: nn.Module, step: int, steps: int) -> None:
        """Average and queue go on where the optimiser skipped the step (fp16, a gradient that overflowed): weights and keys are finite."""
        move_towards(self.momentum, backbone, self.options.momentum)
        if self.head is None:
            return
        move_towards(self.momentum_head, self.head, self.options.momentum)
        size = len(self.queue)
        keys = torch.cat(self.keys)[-size:]
        self.keys.clear()
        rows = (self.oldest + torch.arange(len(keys), device=keys.device)) % size
        self.queue[rows] = keys
        if self.key_ids:
            self.queue_ids[rows] = torch.cat(self.key_ids)[-size:]
            self.key_ids.clear()
        self.oldest.copy_((self.oldest + len(keys)) % size)

    def _see(self, network: Callable, head: nn.Module | None, view: Tensor, local: bool) -> tuple[Tensor | None, Tensor | None]:
        """Decoder features [B, C, *S] where `local`, and unit rows of the global head [B, D] where there is one."""
        if head is None:
            return network(view) if local else None, None
        maps = network.encode(view)
        features = network.decode(maps, tuple(view.shape[2:])) if local else None
        rows = self.call(head, maps[-1].flatten(2).mean(2))
        return features, F.normalize(rows.to(torch.promote_types(rows.dtype, torch.float32)), dim=1)

    def _monitor(self, features_q: Tensor, features_k: Tensor, regions_q: Tensor, regions_k: Tensor) -> dict[str, float]:
        """Of the means over the regions that both views have."""
        if features_q is None:
            return {}
        limit, backend = self.options.max_regions, self.config.loss.backend
        rows_q, sizes_q = pool(features_q.detach(), regions_q, regions=limit, backend=backend)
        rows_k, sizes_k = pool(features_k.detach(), regions_k, regions=limit, backend=backend)
        both = torch.minimum(sizes_q, sizes_k) >= self.options.min_pixels
        return {"regions": both.sum().item() / len(both)} | collapse(rows_q[both], rows_k[both])


def moco(query: Tensor, key: Tensor, queue: Tensor, temperature: float, dropped: Tensor | None = None) -> Tensor:
    """-log of the share of each query's own key among it and the queue; rows of unit length, [B, D], [B, D], [Q, D] -> mean, scalar.

    dropped: bool [B, Q], keys of the queue that are none of a query's negatives.
    """
    others = query @ queue.T
    if dropped is not None:
        others = others.masked_fill(dropped, -torch.inf)
    logits = torch.cat([(query * key).sum(1, keepdim=True), others], 1) / temperature
    return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.int64, device=logits.device))


def _without_ids(method: LRC, state: dict, prefix: str, *_) -> None:
    state.setdefault(f"{prefix}queue_ids", method.queue_ids)  # a checkpoint of before there were any: these keys are negatives of all


def _frozen(module: nn.Module) -> nn.Module:
    return copy.deepcopy(module).requires_grad_(False)
