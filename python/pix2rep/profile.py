"""Where the memory and the time of a pre-training step go, with the fused loss and with the papers' plain one.

What is measured is the trainer's own step (`Training.step`), marked where the networks, the loss, backward and the optimiser begin.
Memory is bytes of tensors (`meter.CpuMemory`, `meter.CudaMemory`); on Linux the growth of a fresh process is the cross-check on the CPU.
"""

import contextlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from pix2rep.config import Config, from_dict, to_dict
from pix2rep.data.patches import open_source
from pix2rep.data.slices import SliceSource, StepSampler
from pix2rep.meter import Meter, Snapshot, allocated_bytes, memory_source, resident_bytes, time_source, usable_bytes
from pix2rep.methods.base import Batch
from pix2rep.methods.pix2rep import pixel_loss
from pix2rep.plain import COPIES, PlainLoss, similarity_bytes
from pix2rep.training import Training, pick_device

LOSSES = ("ours", "eager")
READING = "reading"  # the wait for the loader; a part of steps that read from a folder
PARTS = (
    "views", "backbone, view 1", "head, view 1", "backbone, view 2", "head, view 2",
    "loss forward", "loss backward", "networks backward, view 2", "networks backward, view 1", "optimiser",
)  # fmt: skip


class Profiled:
    """A Training with one fixed batch, and its step in parts.

    images: [B, 1, *S] float32 in [0, 1]; B overrides pretrain.batch_size. One micro-batch a step: accumulating repeats all but the optimiser.
    source: slices that the timed steps read as `pretrain` does, the next batch while one is used, instead of taking `images` again.
    """

    def __init__(self, config: Config, images: Tensor, device: torch.device, source: SliceSource | None = None):
        if config.loss.method != "pix2rep":
            raise ValueError(f'loss.method must be "pix2rep" to be profiled (no other has an eager twin here), got {config.loss.method!r}')
        opt = replace(config.pretrain, batch_size=len(images), accumulate=1)
        self.config, self.device, self.images = replace(config, pretrain=opt), device, images.to(device)
        self.training = Training(self.config, device, source)
        self.losses = losses_of(config)
        self.steps = 0
        self.parts = PARTS if source is None else (READING, *PARTS)

    def _batches(self, mark: Callable[[str], None], read: Iterator[Batch] | None) -> Iterator[Batch]:
        while True:
            if self.parts != PARTS:
                mark(READING)
            batch = Batch(self.images) if read is None else next(read)
            mark("views")
            yield batch

    def step(self, which: str, mark: Callable[[str], None] = lambda name: None, read: Iterator[Batch] | None = None) -> None:
        """One update of the weights with the loss `which`; `mark` is called with a part's name where it begins. read: batches, not `images`."""
        training = self.training
        network, method = training.network, training.method
        training.network = _marked("backbone", network, mark)
        method.project = _marked("head", method.project, mark)
        method.contrast = partial(_loss, self.losses[which], mark)
        update = training.scaler.step

        def marked_update(optimizer):
            mark("optimiser")
            return update(optimizer)

        training.scaler.step = marked_update
        try:
            training.step(self.steps % training.config.pretrain.steps, self._batches(mark, read), monitor=False)
        finally:
            training.network = network
            del method.project, method.contrast, training.scaler.step  # those of the classes show again
            training.pending.clear()
            training.optimizer.zero_grad()
        self.steps += 1

    @property
    def pixels(self) -> int:
        """Of an image."""
        return self.images[0, 0].numel()

    def standing(self) -> dict[str, int]:
        """Bytes of the tensors that are there before a step and after it (the optimiser's after its first step)."""
        training = self.training
        networks = (training.backbone, training.method)
        states = [value for state in training.optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
        found = {
            "parameters": _bytes(training.parameters),
            "buffers": _bytes(buffer for net in networks for buffer in net.buffers()),
            "optimiser state": _bytes(states),
            "images": _bytes([self.images]),
        }
        allocated = allocated_bytes(self.device)
        return found if allocated is None else found | {"workspaces and rounding": allocated - sum(found.values())}

    def memory(self, which: str) -> dict[str, tuple[int, int]]:
        """{part: (kept, peak)}, bytes beyond `standing`, of one step."""
        with Meter(memory_source(self.device)) as meter:
            self.step(which, meter)
        return dict(meter.parts)

    def memory_of(self, batch: int, which: str) -> dict[str, int]:
        """{part: peak bytes of all tensors} of one step on `batch` synthetic images."""
        self.images = synthetic(self.config, batch).to(self.device)
        parts = self.memory(which)
        standing = sum(self.standing().values())
        return {part: standing + peak for part, (_, peak) in parts.items()}

    def seconds(self, which: str, read: Iterator[Batch] | None = None) -> dict[str, float]:
        with Meter(time_source(self.device)) as meter:
            self.step(which, meter, read)
        return dict(meter.parts)


def losses_of(config: Config) -> dict[str, Callable]:
    """The two losses of `loss.*`, called alike."""
    return {"ours": pixel_loss(config.loss), "eager": PlainLoss(config.loss)}


def _marked(name: str, network: Callable[[Tensor], Tensor], mark: Callable[[str], None]) -> Callable[[Tensor], Tensor]:
    views = iter((1, 2))

    def call(x: Tensor) -> Tensor:
        mark(f"{name}, view {next(views)}")
        return network(x)

    return call


def _loss(loss: Callable, mark: Callable[[str], None], features_1: Tensor, features_2: Tensor, *rest, **options) -> Tensor:
    # Autograd takes what was made last first: the loss is through before a network's backward begins, with view 2's.
    features_1.register_hook(lambda _: mark("networks backward, view 1"))
    features_2.register_hook(lambda _: mark("networks backward, view 2"))
    mark("loss forward")
    value = loss(features_1, features_2, *rest, **options)
    mark("loss backward")
    return value


def _bytes(tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def synthetic(config: Config, batch: int) -> Tensor:
    """Noise [batch, 1, *data.size]: neither time nor memory depends on the values."""
    return torch.rand(batch, 1, *config.data.size, generator=torch.Generator().manual_seed(config.pretrain.seed))


@contextlib.contextmanager
def folder_source(folder: str | Path, config: Config) -> Iterator[SliceSource]:
    """Slices of the folder's volumes: of all where data.cache names a folder to prepare them in, else of as many as a batch has images,
    prepared for as long as the block lasts.
    """
    from pix2rep.data.cache import prepare
    from pix2rep.data.discover import discover

    with TemporaryDirectory() as temporary:
        cases = discover(folder)
        kept = config.data.cache
        prepared = prepare(cases if kept else cases[: config.pretrain.batch_size], config.data, kept or temporary)
        yield open_source(prepared, prepared.patients, config)


def first_batch(source: SliceSource, config: Config) -> Tensor:
    """The batch that `pretrain` would draw first from these slices."""
    return source.batch(StepSampler(len(source), config.pretrain.batch_size, config.pretrain.seed).indices(0))[0]


def profile_step(
    config: Config, source: SliceSource | None = None, *, losses=LOSSES, repeats: int = 5, limit: float = 20.0, resident: bool = False,
    snapshot: str | Path | None = None,
) -> dict:  # fmt: skip
    """Profile one step with each of `losses`.

    source: slices to train on, read as `pretrain` reads them; default: one `synthetic` batch, and no reading.
    repeats: timed steps of each loss, fewer where they would take longer than `limit` seconds together.
    resident: also the growth of a fresh process (CPU on Linux). snapshot: file for PyTorch's memory viewer, of the first loss (CUDA).

    Returns {"standing": bytes by kind, "gradients": bytes, "batch_size", "pixels", "losses": {name: result}}, with a source also
    "reading_cpu_seconds": of the loader's thread, a batch (the wait for it is the part "reading"). A result has `parts` (dicts of
    part, added_bytes, kept_bytes and peak_bytes beyond what stands, seconds, share), `peak_bytes` and `after_bytes` (all tensors, at most and when the
    step is over), `step_seconds` (median), `images_per_s`, `loss_share`, and `resident_bytes` where asked. An eager loss that the free
    memory cannot hold (`usable_bytes`) has `would_need_bytes` instead: what COPIES of its similarities take, from their shape, and nothing else.
    """
    device = pick_device(config.pretrain.device)
    recorder = Snapshot(Path(snapshot), device) if snapshot else None
    if config.pretrain.threads:
        torch.set_num_threads(config.pretrain.threads)
    images = synthetic(config, config.pretrain.batch_size) if source is None else first_batch(source, config)
    profiled = Profiled(config, images, device, source)
    batch, pixels = len(profiled.images), profiled.pixels
    results, times = {}, {}
    for which in losses:
        needed = COPIES * similarity_bytes(config.loss, batch, pixels) if which == "eager" else 0
        if needed > usable_bytes(device):
            results[which] = {"would_need_bytes": needed}
            continue
        profiled.step(which)  # warm: oneDNN's and cuDNN's choices, the optimiser's state
        with recorder or contextlib.nullcontext():
            memory = profiled.memory(which)
        recorder = None
        results[which], times[which] = {"memory": memory}, []
    began, training = time.perf_counter(), profiled.training
    with contextlib.closing(_endless(training)) if source else contextlib.nullcontext() as read:
        while times and (not min(map(len, times.values())) or (len(times[losses[0]]) < repeats and time.perf_counter() - began < limit)):
            for which, taken in times.items():  # in turns: a busy machine slows both alike
                taken.append(profiled.seconds(which, read))
    standing = profiled.standing()
    for which, taken in times.items():
        results[which] = _result(results[which]["memory"], taken, sum(standing.values()), batch)
        if resident and device.type == "cpu" and resident_bytes():
            results[which] |= in_fresh_process(profiled.config, which)
    gradients = _bytes(training.parameters)
    found = {"batch_size": batch, "pixels": pixels, "standing": standing, "gradients": gradients, "losses": results}
    return found if source is None else found | {"reading_cpu_seconds": training.reading / (1 + sum(map(len, times.values())))}  # one is read ahead


def _endless(training: Training) -> Iterator[Batch]:
    while True:
        yield from training.batches(0)


def _result(memory: dict[str, tuple[int, int]], times: list[dict[str, float]], standing: int, batch: int) -> dict:
    seconds = {part: statistics.median(taken[part] for taken in times) for part in memory}
    total = sum(seconds.values())
    parts, before = [], 0
    for part, (kept, peak) in memory.items():
        row = {"part": part, "added_bytes": kept - before, "kept_bytes": kept, "peak_bytes": peak}
        parts.append(row | {"seconds": seconds[part], "share": seconds[part] / total})
        before = kept
    step = statistics.median(sum(taken.values()) for taken in times)
    return {
        "parts": parts,
        "peak_bytes": standing + max(peak for _, peak in memory.values()),
        "after_bytes": standing + parts[-1]["kept_bytes"],
        "timed_steps": len(times),
        "step_seconds": step,
        "images_per_s": batch / step,
        "loss_share": sum(part["share"] for part in parts if part["part"].startswith("loss")),
    }


def in_fresh_process(config: Config, which: str) -> dict[str, int]:
    """{"resident_bytes": growth of a new process's resident memory over one step of a full batch, after a step of one small batch}."""
    asked = json.dumps({"config": to_dict(config), "which": which, "threads": torch.get_num_threads()})
    code = "from pix2rep.profile import child; child()"
    done = subprocess.run([sys.executable, "-c", code], input=asked, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(f"the process that measures resident memory ended with {done.returncode}: {last}")
    return json.loads(done.stdout.splitlines()[-1])


def child() -> None:
    """What `in_fresh_process` runs: reads its request from stdin, prints JSON."""
    asked = json.loads(sys.stdin.read())
    torch.set_num_threads(asked["threads"])
    config, device = from_dict(asked["config"]), torch.device("cpu")
    profiled = Profiled(config, synthetic(config, 1), device)
    profiled.step("ours")  # libraries, threads, the optimiser's state
    profiled.images = synthetic(config, config.pretrain.batch_size)
    now, _ = resident_bytes()
    profiled.step(asked["which"])
    _, most = resident_bytes()
    print(json.dumps({"resident_bytes": most - now}))


