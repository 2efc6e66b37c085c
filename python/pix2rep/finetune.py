"""Fine-tuning: every weight of backbone and 1x1 head, on a few labelled slices."""

import copy
import math
from collections.abc import Callable

import numpy as np
import torch

from pix2rep.config import Config, SpatialConfig
from pix2rep.data.slices import StepSampler
from pix2rep.heap import Heap
from pix2rep.mean_teacher import MeanTeacher
from pix2rep.networks import Segmenter
from pix2rep.probe import at_once
from pix2rep.views.photometric import Photometric
from pix2rep.views.spatial import SpatialView, warp_image

WARMUP = 0.1  # share of steps: AdamW from a random start needs it at the higher learning rates, and both arms get it
VALIDATIONS = 5  # evenly spaced; the best one's weights are kept


class Augment:
    """Random rotation, crop-scale, translation and flip of image and labels together for `augment_p` of the images, then the photometric
    changes of pre-training. spacing: as of `SpatialView`.
    """

    def __init__(self, config: Config, spacing: tuple[float, ...] | None = None):
        down = config.downstream
        dims = len(config.data.size)
        spatial = SpatialConfig(down.augment_rotation, tuple(down.augment_scale), down.augment_translation, tuple(config.spatial.flip))
        self.probability = down.augment_p
        self.spatial, self.photometric = SpatialView(spatial, dims, spacing), Photometric(config.photometric)

    def __call__(self, images: torch.Tensor, labels: torch.Tensor, generator: torch.Generator):
        """images [B, 1, *S], labels int64 [B, *S] -> the same shapes; generator on their device."""
        move = self._geometry(images, generator)
        labels = move(labels[:, None].to(images.dtype), "nearest").round().long()[:, 0]
        return self.photometric(move(images), generator), labels

    def views(self, images: torch.Tensor, generator: torch.Generator, spacing: torch.Tensor | None = None):
        """Two views [B, 1, *S] of images of that shape: one spatial change for both, photometric ones of their own. spacing: [B, d]."""
        moved = self._geometry(images, generator, spacing)(images)
        return self.photometric(moved, generator), self.photometric(moved, generator)

    def _geometry(self, images: torch.Tensor, generator: torch.Generator, spacing: torch.Tensor | None = None) -> Callable:
        """move(x, mode) of maps like `images`, by grids drawn now."""
        grid = self.spatial(len(images), images.shape[2:], generator, images.device, spacing)
        chosen = torch.rand(len(images), generator=generator, device=images.device) < self.probability
        keep = chosen.view(-1, *[1] * (images.ndim - 1))
        return lambda x, mode="bilinear": torch.where(keep, warp_image(x, grid, mode), x)


def build(backbone, classes: int, dims: int, seed: int) -> torch.nn.Module:
    """A Segmenter on a copy of `backbone`, its head seeded: both arms start from the same head."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Segmenter(copy.deepcopy(backbone), classes + 1, dims)


def fit(
    model, images: torch.Tensor, labels: torch.Tensor, lr: float, config: Config, seed: int, validate, spacing=None, teacher: MeanTeacher | None = None
):
    """Train `model` (a Segmenter) at backbone learning rate `lr`, keeping the weights of the best validation.

    images [N, 1, *S], labels int64 [N, *S]; `validate(model) -> float`, higher is better. MONAI DiceCELoss (over the batch, background in
    the cross-entropy only), AdamW, 10 % warm-up then cosine. Returns (best validation score, its step), (NaN, 0) when the loss stopped
    being finite before the first validation. spacing: voxel sizes for `Augment`. teacher: adds its loss, and is validated and kept in the
    place of the student that it follows.
    """
    from monai.losses import DiceCELoss

    down = config.downstream
    criterion = DiceCELoss(include_background=False, softmax=True, to_onehot_y=True, batch=True)
    head = list(model.head.parameters())
    body = [p for p in model.backbone.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        [{"params": body, "lr": lr}, {"params": head, "lr": down.finetune_head_lr}], weight_decay=down.weight_decay
    )
    steps = down.finetune_steps
    warm = max(1, round(WARMUP * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda t: (t + 1) / warm if t < warm else 0.5 * (1 + math.cos(math.pi * (t - warm) / max(1, steps - warm)))
    )
    sampler = StepSampler(len(images), down.finetune_batch_size, seed)
    augment = Augment(config, spacing) if down.augment else None
    generator = torch.Generator(images.device).manual_seed(seed)
    checks = {round(steps * (i + 1) / VALIDATIONS) for i in range(VALIDATIONS)}
    kept = teacher.network if teacher else model
    best, best_step, state, heap = -math.inf, 0, None, Heap()
    for step in range(1, steps + 1):
        model.train()
        picked = torch.as_tensor(np.asarray(sampler.indices(step - 1)), device=images.device)
        x, y = images[picked], labels[picked]
        if augment:
            x, y = augment(x, y, generator)
        loss = criterion(model(x), y[:, None])
        if teacher:
            loss = loss + teacher.loss(model, step - 1, augment)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if teacher:
            teacher.follow(model, step - 1)
        if step in checks:
            heap.trim()
            if not torch.isfinite(loss):
                break
            score = validate(kept)
            if score > best:
                best, best_step, state = score, step, copy.deepcopy(kept.state_dict())
    if state is None:
        return math.nan, 0
    model.load_state_dict(state)
    return best, best_step


@torch.no_grad()
def predict(model, images: torch.Tensor, batch_size: int | None = None) -> np.ndarray:
    """Arg-max labels of images [N, 1, *S] -> uint8 [N, *S], the model in eval mode."""
    model.eval()
    batch_size = batch_size or at_once(images)
    out = [model(images[start : start + batch_size]).argmax(1).to(torch.uint8).cpu() for start in range(0, len(images), batch_size)]
    return torch.cat(out).numpy()
