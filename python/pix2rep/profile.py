"""Where the memory and the time of a pre-training step go, with the fused loss and with the papers' plain one.

What is measured is the trainer's own step (`Training.step`) of any method, marked where a network is called and left (`Method.call`), forward and
backward, and where the optimiser begins. What lies between the networks is the loss: its warps, poolings and normalisations with it.
Memory is bytes of tensors (`meter.CpuMemory`, `meter.CudaMemory`); on Linux the growth of a fresh process is the cross-check on the CPU.
"""

import contextlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from pix2rep.config import Config, from_dict, to_dict
from pix2rep.data.patches import open_source
from pix2rep.data.slices import SliceSource
from pix2rep.meter import Meter, Snapshot, allocated_bytes, memory_source, resident_bytes, time_source, usable_bytes
from pix2rep.methods.base import Batch, Method
from pix2rep.methods.pix2rep import pixel_loss
from pix2rep.plain import COPIES, PlainLoss, similarity_bytes
from pix2rep.synthetic import synthetic
from pix2rep.training import Training, pick_device

LOSSES = ("ours", "eager")
READING = "reading"  # the wait for the loader; a part of steps that read from a folder
PARTS = (READING, "views", "backbone", "heads", "loss forward", "loss backward", "networks backward", "optimiser", "moving average")


class Bytes(NamedTuple):
    """Of a part: left behind by it, live at its end, and the most within it; the latter two beyond what stands before the step."""

    added: int
    kept: int
    peak: int


class Profiled:
    """A Training with one fixed batch, and its step in parts.

    batch: images; overrides pretrain.batch_size. One micro-batch a step: accumulating repeats all but the optimiser.
    source: what the timed steps read as `pretrain` does, the next batch while one is used; its first batch is the fixed one. Default: `synthetic`.
    """

    def __init__(self, config: Config, batch: int, device: torch.device, source: SliceSource | None = None):
        opt = replace(config.pretrain, batch_size=batch, accumulate=1)
        self.config, self.device = replace(config, pretrain=opt), device
        self.training = Training(self.config, device, source)
        self.reads = source is not None
        self.batch = self._first() if self.reads else self._synthetic(batch)
        self.losses = losses_of(config)
        self.steps = 0

    def _first(self) -> Batch:
        with contextlib.closing(self.training.batches(0)) as batches:
            found = next(batches).to(self.device)
        self.training.reading = 0.0
        return found

    def _synthetic(self, batch: int) -> Batch:
        return synthetic(self.config, batch, self.training.method.needs).to(self.device)

    def _batches(self, mark: Callable[[str], None], read: Iterator[Batch] | None) -> Iterator[Batch]:
        while True:
            if self.reads:
                mark(READING)
            batch = self.batch if read is None else next(read)
            mark("views")
            yield batch

    def step(self, which: str, mark: Callable[[str], None] = lambda name: None, read: Iterator[Batch] | None = None) -> None:
        """One update of the weights with the loss `which`; `mark` is called with a part's name where it begins. read: batches, not `batch`."""
        training, method = self.training, self.training.method
        changed = {method: _marked(method, training.backbone, mark), training.scaler: {"step": _before(training.scaler.step, mark, "optimiser")}}
        if self.losses[which] is not None:
            changed[method]["contrast"] = self.losses[which]
        for thing, functions in changed.items():
            vars(thing).update(functions)
        try:
            training.step(self.steps % training.config.pretrain.steps, self._batches(mark, read), monitor=False)
        finally:
            for thing, functions in changed.items():
                for name in functions:
                    delattr(thing, name)  # those of the classes show again
            training.pending.clear()
            training.optimizer.zero_grad()
        self.steps += 1

    @property
    def pixels(self) -> int:
        """Of an image."""
        return self.batch.images[0, 0].numel()

    def standing(self) -> dict[str, int]:
        """Bytes of the tensors that are there before a step and after it (the optimiser's after its first step)."""
        training = self.training
        networks = (training.backbone, training.method)
        states = [value for state in training.optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
        averaged = [p for net in networks for p in net.parameters() if not p.requires_grad]
        found = {
            "parameters": _bytes(training.parameters),
            **({"moving average": _bytes(averaged)} if averaged else {}),
            "buffers": _bytes(buffer for net in networks for buffer in net.buffers()),
            "optimiser state": _bytes(states),
            "images": _bytes([value for value in vars(self.batch).values() if isinstance(value, Tensor)]),
        }
        allocated = allocated_bytes(self.device)
        return found if allocated is None else found | {"workspaces and rounding": allocated - sum(found.values())}

    def memory(self, which: str) -> dict[str, Bytes]:
        """{part: bytes} of one step."""
        return merged(self.stamps(which))

    def stamps(self, which: str) -> list[tuple[str, tuple[int, int]]]:
        """(part, (kept, peak)) of one step in the order of its parts, bytes beyond what stands before the step."""
        with Meter(memory_source(self.device)) as meter:
            self.step(which, meter)
        return meter.parts

    def memory_of(self, batch: int, which: str) -> dict[str, int]:
        """{part: peak bytes of all tensors} of one step on `batch` synthetic images."""
        self.batch = self._synthetic(batch)
        parts = self.memory(which)
        standing = sum(self.standing().values())
        return {part: standing + found.peak for part, found in parts.items()}

    def seconds(self, which: str, read: Iterator[Batch] | None = None) -> dict[str, float]:
        with Meter(time_source(self.device)) as meter:
            self.step(which, meter, read)
        return {part: sum(taken for name, taken in meter.parts if name == part) for part in PARTS if part in dict(meter.parts)}


def merged(stamps: list[tuple[str, tuple[int, int]]]) -> dict[str, Bytes]:
    """Each part once, in the order of PARTS."""
    found, before = {}, 0
    for part, (kept, peak) in stamps:
        earlier = found.get(part, Bytes(0, 0, 0))
        found[part] = Bytes(earlier.added + kept - before, kept, max(earlier.peak, peak))
        before = kept
    return {part: found[part] for part in PARTS if part in found}


def loss_bytes(stamps: list[tuple[str, tuple[int, int]]]) -> int:
    """The most that the loss, gradients of features included, holds at a time: what is live in its parts beyond what the other parts left."""
    others = before = most = 0
    for part, (kept, peak) in stamps:
        if part.startswith("loss"):
            most = max(most, peak - others)
        else:
            others += kept - before
        before = kept
    return most


def losses_of(config: Config) -> dict[str, Callable | None]:
    """The losses that a method is profiled with; both of pix2rep's are called alike, None stands for the method's own."""
    if config.loss.method != "pix2rep":
        return {"ours": None}
    return {"ours": pixel_loss(config.loss), "eager": PlainLoss(config.loss)}


def _marked(method: Method, backbone: nn.Module, mark: Callable[[str], None]) -> dict[str, Callable]:
    """`method.call`, `method.step` and `method.after_step`, each telling `mark` what begins.

    Autograd takes what was made last first, and a tensor's hook runs right before the node that made it: there a network begins or ends in backward.
    """
    plain_call, plain_step, made = method.call, method.step, WeakIdKeyDictionary()

    def call(function: Callable, *inputs):
        for tensor in _differentiable(inputs):
            if tensor not in made:
                tensor.register_hook(lambda _: mark("loss backward"))
        owner = getattr(function, "__self__", function)
        frozen = not any(p.requires_grad for p in owner.parameters())
        mark("backbone" if owner is backbone else "moving average" if frozen else "heads")
        outputs = plain_call(function, *inputs)
        mark("loss forward")
        for tensor in _differentiable([outputs]):
            made[tensor] = True
            tensor.register_hook(lambda _: mark("networks backward"))
        return outputs

    def step(*given):
        found = plain_step(*given)
        mark("loss backward")
        return found

    averages = type(method).after_step is not Method.after_step
    return {"call": call, "step": step} | ({"after_step": _before(method.after_step, mark, "moving average")} if averages else {})


def _before(function: Callable, mark: Callable[[str], None], name: str) -> Callable:
    def marked(*given):
        mark(name)
        return function(*given)

    return marked


def _differentiable(values) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, list | tuple):
            yield from _differentiable(value)
        elif isinstance(value, Tensor) and value.requires_grad:
            yield value


def _bytes(tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


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


def profile_step(
    config: Config, source: SliceSource | None = None, *, losses: Iterable[str] | None = None, repeats: int = 5, limit: float = 20.0, resident: bool = False,
    snapshot: str | Path | None = None,
) -> dict:  # fmt: skip
    """Profile one step with each of `losses` (default: all of `losses_of`).

    source: slices or patches to train on, read as `pretrain` reads them; default: one `synthetic` batch, and no reading.
    repeats: timed steps of each loss, fewer where they would take longer than `limit` seconds together.
    resident: also the growth of a fresh process (CPU on Linux). snapshot: file for PyTorch's memory viewer, of the first loss (CUDA).

    Returns {"standing": bytes by kind, "gradients": bytes, "batch_size", "pixels", "losses": {name: result}}, with a source also
    "reading_cpu_seconds": of the loader's thread, a batch (the wait for it is the part "reading"). A result has `parts` (dicts of
    part, added_bytes, kept_bytes and peak_bytes as `Bytes`, seconds, share; a part that comes several times is one row), `peak_bytes` and
    `after_bytes` (all tensors, at most and when the step is over), `loss_bytes` (the most that the loss adds to what is live when it begins),
    `step_seconds` (median), `images_per_s`, `loss_share`, and `resident_bytes` where asked. An eager loss that the free memory cannot hold
    (`usable_bytes`) has `would_need_bytes` instead: what COPIES of its similarities take, from their shape, and nothing else.
    """
    device = pick_device(config.pretrain.device)
    recorder = Snapshot(Path(snapshot), device) if snapshot else None
    if config.pretrain.threads:
        torch.set_num_threads(config.pretrain.threads)
    profiled = Profiled(config, config.pretrain.batch_size, device, source)
    losses = tuple(losses or profiled.losses)
    batch, pixels = len(profiled.batch.images), profiled.pixels
    results, stamps, times = {}, {}, {}
    for which in losses:
        needed = COPIES * similarity_bytes(config.loss, batch, pixels) if which == "eager" else 0
        if needed > usable_bytes(device):
            results[which] = {"would_need_bytes": needed}
            continue
        profiled.step(which)  # warm: oneDNN's and cuDNN's choices, the optimiser's state
        with recorder or contextlib.nullcontext():
            stamps[which] = profiled.stamps(which)
        recorder = None
        times[which] = []
    began, training = time.perf_counter(), profiled.training
    with contextlib.closing(_endless(training)) if source else contextlib.nullcontext() as read:
        while times and (not min(map(len, times.values())) or (len(times[losses[0]]) < repeats and time.perf_counter() - began < limit)):
            for which, taken in times.items():  # in turns: a busy machine slows both alike
                taken.append(profiled.seconds(which, read))
    standing = profiled.standing()
    for which, taken in times.items():
        results[which] = _result(stamps[which], taken, sum(standing.values()), batch)
        if resident and device.type == "cpu" and resident_bytes():
            results[which] |= in_fresh_process(profiled.config, which)
    gradients = _bytes(training.parameters)
    found = {"batch_size": batch, "pixels": pixels, "standing": standing, "gradients": gradients, "losses": results}
    return found if source is None else found | {"reading_cpu_seconds": training.reading / (1 + sum(map(len, times.values())))}  # one is read ahead


def _endless(training: Training) -> Iterator[Batch]:
    while True:
        yield from training.batches(0)


def _result(stamps: list, times: list[dict[str, float]], standing: int, batch: int) -> dict:
    memory = merged(stamps)
    seconds = {part: statistics.median(taken[part] for taken in times) for part in memory}
    total = sum(seconds.values())
    parts = [
        {"part": part, **{f"{name}_bytes": count for name, count in found._asdict().items()}, "seconds": seconds[part], "share": seconds[part] / total}
        for part, found in memory.items()
    ]
    step = statistics.median(sum(taken.values()) for taken in times)
    return {
        "parts": parts,
        "peak_bytes": standing + max(found.peak for found in memory.values()),
        "after_bytes": standing + sum(found.added for found in memory.values()),
        "loss_bytes": loss_bytes(stamps),
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
    profiled = Profiled(config, 1, device)
    profiled.step("ours")  # libraries, threads, the optimiser's state
    profiled.batch = profiled._synthetic(config.pretrain.batch_size)
    now, _ = resident_bytes()
    profiled.step(asked["which"])
    _, most = resident_bytes()
    print(json.dumps({"resident_bytes": most - now}))


