"""Networks, optimiser and data of a pre-training run, and one step of it.

Batches, views and pixel draws are functions of (pretrain.seed, step, micro-batch) and nothing else, so a run that stops and resumes ends in
the weights of one that did not.
"""

import math
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import torch
from torch import Tensor

from pix2rep.checkpoint import load_weights
from pix2rep.config import Config, PretrainConfig, completed, to_dict
from pix2rep.data.slices import SliceSource, StepSampler
from pix2rep.data.superpixels import Superpixels
from pix2rep.heap import Heap
from pix2rep.methods import build_method
from pix2rep.methods.base import Batch, Network
from pix2rep.networks import build_backbone, channels_last
from pix2rep.optimizers import build_optimizer


class Training:
    """Everything that a step touches."""

    def __init__(self, config: Config, device: torch.device, source: SliceSource, fresh: bool = True):
        """fresh: begin with the weights of pretrain.init, if any (a resumed run has its own, and `init` may be gone)."""
        config = completed(config)
        opt = config.pretrain
        torch.manual_seed(opt.seed)  # the initial weights
        layout = channels_last(config.network.dims)
        self.config, self.device, self.source = config, device, source
        self.backbone = build_backbone(config.network)
        if fresh and opt.init is not None:
            load_weights(self.backbone, opt.init, "pretrain.init")
        self.method = build_method(config, self.backbone)
        if source is not None and "regions" in self.method.needs:
            self.source = source.with_superpixels(Superpixels(config.lrc, config.network.dims))
        for module in (self.backbone, self.method):
            module.to(device, memory_format=layout).train()
        self.parameters = [*self.backbone.parameters(), *(p for p in self.method.parameters() if p.requires_grad)]
        self.optimizer = build_optimizer(opt, self.parameters, device)
        self.amp = pick_amp(opt.amp, device)
        self.method.autocast = partial(torch.autocast, device.type, self.amp, enabled=self.amp is not None)
        self.network = Network(self.method, self.backbone)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.amp is torch.float16)
        self.generator = torch.Generator(device)
        self.pending: list[Tensor] = []  # losses still on the device: reading one every step would make the CPU wait for the GPU
        self.heap = Heap()
        self.losses: list[float] = []  # of the micro-batches since the last row of the log, known to be finite
        self.seconds = 0.0  # in the loop, over all sessions
        self.reading = 0.0  # seconds of the CPU that the loader's thread took

    def step(self, step: int, batches: Iterator[Batch], monitor: bool) -> dict[str, float]:
        """Update the weights by `accumulate` micro-batches; returns the collapse statistics of the last one when `monitor`."""
        opt, stats = self.config.pretrain, {}
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(opt, step)
        for micro in range(opt.accumulate):
            batch = next(batches).to(self.device)
            seed = seed_of(opt.seed, step * opt.accumulate + micro)
            torch.manual_seed(seed)  # dropout of a custom backbone
            self.generator.manual_seed(seed)
            loss, stats = self.method.step(self.network, batch, self.generator, monitor and micro == opt.accumulate - 1)
            self.scaler.scale(loss / opt.accumulate).backward()
            self.pending.append(loss.detach())
        if opt.clip_grad is not None:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.parameters, opt.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.method.after_step(self.backbone, step, opt.steps)
        return stats

    def batches(self, start: int) -> Iterator[Batch]:
        """The micro-batches from step `start` to the end, each read while the one before is used."""
        opt = self.config.pretrain
        sampler = self.sampler()
        first, last = start * opt.accumulate, opt.steps * opt.accumulate

        def read(index: int) -> Batch:
            began = time.thread_time()
            indices, source = sampler.indices(index), self.source.at(index)
            beside = {name: getattr(source, name)(indices) for name in self.method.needs}
            images = beside["crops"][0] if "crops" in beside else source.batch(indices)[0]
            batch = Batch(images, patients=[self.source.patients_of([i])[0] for i in indices], **beside)
            batch = batch.pin_memory() if self.device.type == "cuda" else batch
            self.reading += time.thread_time() - began
            return batch

        with ThreadPoolExecutor(1, "pix2rep-data") as pool:
            coming = pool.submit(read, first)
            for index in range(first, last):
                batch = coming.result()
                if index + 1 < last:
                    coming = pool.submit(read, index + 1)
                yield batch

    def sampler(self) -> StepSampler:
        """Which slices a micro-batch holds, by its index (step * accumulate + micro)."""
        return StepSampler(len(self.source), self.config.pretrain.batch_size, self.config.pretrain.seed)

    def collect(self, done: int) -> tuple[int, float] | None:
        """Move the losses of the steps up to `done` to the host. Returns (micro-batch index, loss) of the first that is not finite."""
        first = done * self.config.pretrain.accumulate - len(self.pending)
        values = torch.stack(self.pending).tolist()
        self.pending.clear()
        self.heap.trim()
        self.losses += values
        return next(((index, value) for index, value in enumerate(values, first) if not math.isfinite(value)), None)

    def weights_are_finite(self) -> bool:
        weights = [*self.backbone.state_dict().values(), *self.method.state_dict().values()]
        return bool(torch.stack([value.isfinite().all() for value in weights]).all())

    def state(self, done: int) -> dict:
        """What `restore` needs to go on after step `done`."""
        return {
            "step": done,
            "config": to_dict(self.config),
            "cases": self.cases(),
            "slices": len(self.source),
            "backbone": self.backbone.state_dict(),
            "method": self.method.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "losses": self.losses,
            "seconds": self.seconds,
        }

    def restore(self, state: dict) -> None:
        """Continue from a checkpoint. Raises ValueError when the data are not those that it was made with."""
        before, now = state["cases"], self.cases()
        if before != now or state["slices"] != len(self.source):
            missing, new = (", ".join(sorted(set(a) - set(b))) or "none" for a, b in ((before, now), (now, before)))
            raise ValueError(
                f"data must be those of the checkpoint, {len(before)} volumes with {state['slices']} slices, got {len(now)} with"
                f" {len(self.source)}; missing: {missing}; new: {new}"
            )
        for name in ("backbone", "method", "optimizer", "scaler"):
            getattr(self, name).load_state_dict(state[name])
        self.losses, self.seconds = list(state["losses"]), state["seconds"]

    def cases(self) -> list[str]:
        return [case.id for case in self.source.cases]

    def summary(self) -> str:
        opt, count = self.config.pretrain, sum(p.numel() for p in self.parameters)
        items = "slices" if len(self.source.size) == 2 else "volumes"
        amp = "off" if self.amp is None else str(self.amp).removeprefix("torch.")
        return (
            f"pre-training on {len(self.source)} {items} of {len({case.patient for case in self.source.cases})} patients,"
            f" {opt.batch_size} x {opt.accumulate} a step; {count / 1e6:.2f} M parameters on {self.device}, mixed precision {amp}"
        )


def learning_rate(opt: PretrainConfig, step: int) -> float:
    """Rate of a step counted from 0: linear warm-up over `warmup` of the steps, then constant or half a cosine to 0."""
    warmup = round(opt.warmup * opt.steps)
    if step < warmup:
        return opt.lr * (step + 1) / warmup
    if opt.schedule == "constant":
        return opt.lr
    return opt.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (opt.steps - warmup)))


def seed_of(seed: int, index: int) -> int:
    """64-bit seed of a micro-batch: neighbouring seeds and indices share no stream."""
    return int(np.random.SeedSequence([seed, index]).generate_state(1, np.uint64)[0])


def pick_device(name: str) -> torch.device:
    """ "auto": CUDA where there is one. Raises ValueError for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # a CPU build of PyTorch asserts
        raise ValueError(f"pretrain.device must be a device of this machine, got {name!r}: {str(error).splitlines()[0]}") from error
    return device


def pick_amp(name: str, device: torch.device) -> torch.dtype | None:
    """Type of autocast, None for full precision."""
    if name == "auto":
        if device.type != "cuda":
            return None
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[name]
