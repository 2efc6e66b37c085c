"""Seconds of a pre-training step, and the number of steps that fill another method's time."""

import contextlib
import statistics
import time
from dataclasses import replace

import torch

from pix2rep.config import Config
from pix2rep.data.slices import SliceSource
from pix2rep.training import Training, pick_device

WARMUP, BLOCKS, STEPS = 3, 9, 4  # steps; blocks a method; steps a block
SLOW = 3.0  # seconds


def seconds_a_step(configs: list[Config], source: SliceSource, blocks: int = BLOCKS) -> list[float]:
    """Median over blocks of the mean seconds of a step, a method's blocks alternating with the others': what slows the machine slows all."""
    running = [_Running(config, source) for config in configs]
    try:
        for one in running:
            one.seconds(WARMUP)
        found = [[one.seconds(STEPS) for one in running] for _ in range(blocks)]
    finally:
        for one in running:
            one.batches.close()
    return [statistics.median(own) for own in zip(*found, strict=True)]


def quick_seconds_a_step(config: Config, source: SliceSource) -> float:
    """Of a few steps, or of the first one where it takes seconds: good enough to say when to come back."""
    one = _Running(config, source)
    with contextlib.closing(one.batches):
        first = one.seconds(1)
        return first if first > SLOW else one.seconds(STEPS)


def matched_steps(reference: Config, config: Config, source: SliceSource) -> dict[str, float | int]:
    """{"steps", "seconds_a_step", "reference_steps", "reference_seconds_a_step"}: `steps` of `config` take as long as those of `reference`."""
    theirs, own = seconds_a_step([reference, config], source)
    steps = max(1, round(reference.pretrain.steps * theirs / own))
    return {"steps": steps, "seconds_a_step": own, "reference_steps": reference.pretrain.steps, "reference_seconds_a_step": theirs}


class _Running:
    def __init__(self, config: Config, source: SliceSource):
        endless = replace(config, pretrain=replace(config.pretrain, steps=10**9))
        self.training = Training(endless, pick_device(config.pretrain.device), source)
        self.batches = self.training.batches(0)
        self.done = 0

    def seconds(self, steps: int) -> float:
        """Of one of `steps` steps taken now."""
        device = self.training.device
        began = time.perf_counter()
        for _ in range(steps):
            self.training.step(self.done, self.batches, monitor=False)
            self.done += 1
        self.training.pending.clear()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return (time.perf_counter() - began) / steps
