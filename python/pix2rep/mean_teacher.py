"""Mean teacher (Tarvainen and Valpola 2017, arXiv 1703.01780): fine-tuning that also learns from images without labels.

    L = supervised loss + w(t) mean (softmax s(a(x)) - softmax s'(a'(x)))^2      x: unlabelled; a, a': one geometry, photometric noise of their own

The teacher s' is a moving average of the student s and gets no gradient; it is what is validated and kept. Both are in training mode and
normalise by their own batches.
"""

import copy
import math
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from pix2rep.data.patches import open_source
from pix2rep.data.slices import StepSampler
from pix2rep.networks import move_towards
from pix2rep.training import seed_of

if TYPE_CHECKING:
    from pix2rep.finetune import Augment
    from pix2rep.study import Study


class MeanTeacher:
    """The teacher of one `finetune.fit`: a moving average of `student`, and the images of the pre-training patients, whose labels stay unread.

    Those images are all of the split's pretrain part, slices or patches at data.size, the labelled patients' among them. weight: of the
    consistency loss, once ramped up.
    """

    def __init__(self, student: nn.Module, study: "Study", weight: float, seed: int):
        self.options, self.weight = study.config.downstream, weight
        self.network = copy.deepcopy(student).requires_grad_(False)
        own = replace(study.config, pretrain=replace(study.config.pretrain, seed=seed))  # where patches lie
        self.source = open_source(study.prepared, study.split["pretrain"], own)
        self.sampler = StepSampler(len(self.source), self.options.teacher_batch_size, seed)
        self.device = study.device
        self.generator = torch.Generator(study.device).manual_seed(seed_of(seed, 1))  # not `finetune.fit`'s: labelled images are drawn alike

    def loss(self, student: nn.Module, step: int, augment: "Augment | None") -> Tensor:
        """Weighted consistency of step `step`, counted from 0."""
        self.network.train()
        first, second = self.views(step, augment)
        with torch.no_grad():
            target = self.network(second)
        return self.weight * ramp(step, self.options.teacher_ramp * self.options.finetune_steps) * consistency(student(first), target)

    def views(self, step: int, augment: "Augment | None") -> tuple[Tensor, Tensor]:
        """The student's and the teacher's view of a step's unlabelled images, [B, 1, *S] each: pixels correspond."""
        indices, source = self.sampler.indices(step), self.source.at(step)
        images = source.batch(indices)[0].to(self.device)
        if augment is None:
            return images, images
        spacing = source.spacing(indices).to(self.device) if images.ndim == 5 else None
        return augment.views(images, self.generator, spacing)

    def follow(self, student: nn.Module, step: int) -> None:
        """Move towards the student after step `step`, counted from 0."""
        move_towards(self.network, student, min(1 - 1 / (step + 2), self.options.teacher_decay))


def consistency(logits: Tensor, target: Tensor) -> Tensor:
    """Mean over pixels and classes of the squared difference of two softmaxes of logits [B, K, *S]."""
    return (logits.softmax(1) - target.softmax(1)).square().mean()


def ramp(step: int, length: float) -> float:
    """Share of the consistency weight at a step: exp(-5) at 0, growing like a sigmoid, 1 from `length` steps on."""
    return math.exp(-5 * (1 - min(1.0, step / length)) ** 2)
