"""Pre-training: a backbone from unlabelled volumes.

    RUN/lock  config.yaml  split.json  skipped.json  log.jsonl  cache/  checkpoints/  weights.safetensors
"""

import contextlib
import os
import platform
import shlex
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from pix2rep import checkpoint, disk
from pix2rep.config import Config, completed, flatten, from_dict, save
from pix2rep.data.cache import prepare
from pix2rep.data.discover import Case, discover
from pix2rep.data.patches import open_source
from pix2rep.data.problems import write_skipped
from pix2rep.data.slices import SliceSource
from pix2rep.data.splits import make_split, read_split, warn_of_shared_images, write_split
from pix2rep.log import Progress, RunLog, peak_memory, read_log, say
from pix2rep.methods import method_class
from pix2rep.training import Training, learning_rate, pick_device

# A resumed run may change these: none alters what a step computes.
FREE = {f"pretrain.{key}" for key in ("steps", "device", "threads", "log_every", "checkpoint_every", "keep", "tensorboard")}
FREE |= {"data.root", "data.cache", "data.skip_bad", "split.file"}
PAUSE = 10.0  # seconds before a full disk is tried a second time


class NonFiniteLoss(RuntimeError):
    """Training diverged; the message names step, patients and the last checkpoint."""

    exit_code = 3


class Interrupted(RuntimeError):
    """Stopped by a signal, after a checkpoint; the message says how to continue."""

    def __init__(self, message: str, number: int):
        super().__init__(message)
        self.exit_code = 128 + number  # what a shell reports of a process that the signal ended


def run(data: str | Path, run_dir: str | Path, config: Config, resume: bool = False) -> Path:
    """Pre-train on the volumes under `data`, write everything under `run_dir`, return the path of weights.safetensors.

    resume: continue from RUN/checkpoints/last.pt (where that is damaged, from the newest checkpoint that loads); without a checkpoint the run
    starts at its first step. A full disk is tried twice, then ends the run; earlier checkpoints stay.
    Raises ValueError or OSError for data, folder or config that cannot be used, `disk.InUse` where another process writes to the folder,
    `disk.DiskFull`, NonFiniteLoss, and Interrupted after SIGINT or SIGTERM.
    """
    run_dir = Path(run_dir)
    config = completed(replace(config, data=replace(config.data, root=str(Path(data).resolve()))))
    if config.pretrain.threads:
        torch.set_num_threads(config.pretrain.threads)
    device = pick_device(config.pretrain.device)
    cases = discover(config.data.root)
    try:
        disk.make_folder(run_dir)
        with disk.lock(run_dir / "lock", str(run_dir)), _determinism(config.pretrain.deterministic):
            return _run(cases, run_dir, config, device, resume)
    except disk.DiskFull as error:
        raise disk.DiskFull(f"{error}; {_way_on(run_dir, config)}") from error


def _run(cases: list[Case], run_dir: Path, config: Config, device: torch.device, resume: bool) -> Path:
    opt = config.pretrain
    state = _open(run_dir, config, resume)
    start = state["step"] if state else 0
    for folder in filter(None, (run_dir, config.data.cache)):
        disk.clear(folder)
    with contextlib.ExitStack() as stack:
        if state is None:
            stack.enter_context(_claim(run_dir, config))
        log = stack.enter_context(contextlib.closing(RunLog(run_dir / "log.jsonl", start, run_dir / "tensorboard" if opt.tensorboard else None)))
        source = _slices(cases, config, run_dir, resume, log)
        training = Training(config, device, source, fresh=state is None)
        if state:
            training.restore(state)
            save(config, run_dir / "config.yaml")
        skipped = source.prepared.skipped_ids
        log.write(
            "resume" if state else "start", step=start, device=str(device), slices=len(source), skipped=skipped, versions=versions()
        )
        say(training.summary() + (f"; resuming after step {start}" if state else ""))
        loop(training, start, run_dir, log)
        path = _twice(checkpoint.save_backbone, run_dir, training.backbone, config, opt.steps)
        log.write("end", step=opt.steps, weights=path.name)
    say(f"weights: {path}")
    return path


def loop(training: Training, start: int, run_dir: Path, log: RunLog) -> None:
    """Steps `start` to pretrain.steps; every log_every of them a row in the log, every checkpoint_every a checkpoint."""
    opt = training.config.pretrain
    began = time.perf_counter() - training.seconds
    row_step, row_seconds = start, training.seconds
    with _signals() as caught, Progress(opt.steps, start) as progress, contextlib.closing(training.batches(start)) as batches:
        for step in range(start, opt.steps):
            done = step + 1
            is_last = done == opt.steps
            is_row = is_last or done % opt.log_every == 0
            stats = training.step(step, batches, monitor=is_row)
            progress.advance(done)

            stopped = bool(caught) and not is_last
            is_checkpoint = is_last or stopped or done % opt.checkpoint_every == 0
            if is_row or is_checkpoint:
                _check_losses(training, done, run_dir, log)
                training.seconds = time.perf_counter() - began
            if is_row:
                rate = (done - row_step) * opt.batch_size * opt.accumulate / (training.seconds - row_seconds)
                loss, memory = sum(training.losses) / len(training.losses), peak_memory(training.device)
                log.write("step", step=done, loss=loss, lr=learning_rate(opt, step), **stats, images_per_s=rate, peak_memory_mib=memory)
                progress.show(loss, rate, memory)
                training.losses = []
                row_step, row_seconds = done, training.seconds
            if is_checkpoint:
                path = _checkpoint(training, done, run_dir, log)
            if stopped:
                again = shlex.join(["pix2rep", "pretrain", training.config.data.root, str(run_dir), "--resume"])
                message = f"stopped by {caught[0].name} after step {done} of {opt.steps}; checkpoint: {path}; continue with: {again}"
                raise Interrupted(message, caught[0])


def _open(run_dir: Path, config: Config, resume: bool) -> dict | None:
    """The checkpoint to continue from, if any. Raises for a folder that holds another run, or a config that is not the checkpoint's."""
    if not resume:
        _refuse_taken(run_dir)
        return None
    found = checkpoint.newest(run_dir)
    if found is None:
        say(f"no checkpoint in {run_dir}: starting at the first step")
        return None
    path, state = found
    before, now = flatten(from_dict(state["config"])), flatten(config)
    changed = [key for key in now if now[key] != before[key] and key not in FREE and not key.startswith("downstream.")]
    opt = config.pretrain
    scheduled = opt.schedule != "constant" or opt.warmup or method_class(config.loss.method).scheduled
    if scheduled and opt.steps != before["pretrain.steps"]:
        changed.append("pretrain.steps")
    if changed:
        listed = ", ".join(f"{key} was {before[key]!r}, got {now[key]!r}" for key in changed)
        raise ValueError(f"config must be the checkpoint's to resume: {listed}")
    if opt.steps < state["step"]:
        raise ValueError(f"pretrain.steps must be at least the {state['step']} steps taken, got {opt.steps}")
    return state


def _refuse_taken(run_dir: Path) -> None:
    """Raise FileExistsError for a folder that holds a run, begun or done, or a file that a run would overwrite."""
    saved = checkpoint.numbered(run_dir)
    if _begun(run_dir / "log.jsonl") or checkpoint.last(run_dir) or any((run_dir / name).exists() for name in ("config.yaml", "weights.safetensors")):
        steps = int(saved[0].stem.removeprefix("step_")) if saved else 0
        raise FileExistsError(f"run must be a new folder, got {run_dir}, a run of {steps} steps; continue it with --resume")
    if (run_dir / "split.json").exists():
        raise FileExistsError(f"run must be a folder without split.json, which would be overwritten, got {run_dir}; give a split as split.file")


def _begun(log: Path) -> bool:
    """Whether a log holds more than what a start that failed had said of the volumes; somebody else's file does."""
    if not log.is_file() or not log.stat().st_size:
        return False
    events = {row.get("event") for row in read_log(log)}
    return events != {"skipped"}


@contextlib.contextmanager
def _claim(run_dir: Path, config: Config) -> Iterator[None]:
    """Write config.yaml, which marks the folder as a run from its first moment. Nothing new is left of a run that fails before its first step."""
    new = [path for path in (run_dir / "config.yaml", run_dir / "split.json") if not path.exists()]
    save(config, run_dir / "config.yaml")
    try:
        yield
    except BaseException:
        if not _begun(run_dir / "log.jsonl"):
            for path in new:
                path.unlink(missing_ok=True)
        raise


def _last_good(run_dir: Path) -> str | None:
    """Path and step of the newest checkpoint that loads."""
    try:
        found = checkpoint.newest(run_dir)
    except ValueError:
        found = None
    return f"{found[0]} (step {found[1]['step']})" if found else None


def _way_on(run_dir: Path, config: Config) -> str:
    """Words for the end of a run that the disk had no room for."""
    good = _last_good(run_dir)
    where = f"last good checkpoint: {good}" if good else "no checkpoint yet"
    again = shlex.join(["pix2rep", "pretrain", config.data.root, str(run_dir), "--resume"])
    return f"{where}; free some space, then continue with: {again}"


def _twice(write: Callable, *arguments):
    """Call `write` again after a pause where the disk was full: another program's files may have gone."""
    try:
        return write(*arguments)
    except disk.DiskFull as error:
        say(f"{error}; trying again in {PAUSE:g} s")
        time.sleep(PAUSE)
        return write(*arguments)


def _slices(cases: list[Case], config: Config, run_dir: Path, resume: bool, log: RunLog) -> SliceSource:
    """Slices of the split's pre-training patients; RUN/split.json is made, or copied from split.file, or read again on a resume."""
    prepared = prepare(cases, config.data, config.data.cache or run_dir / "cache")
    file = run_dir / "skipped.json"
    if config.data.skip_bad:
        write_skipped(prepared.problems, file)
    else:
        file.unlink(missing_ok=True)
    for case, reason in prepared.skipped:
        log.write("skipped", case=case, reason=reason)
    if skipped := prepared.skipped_ids:
        say(f"skipped {len(skipped)} of {len(cases)} volumes (reasons in {file}): {', '.join(skipped)}")
    file = run_dir / "split.json"
    if resume and file.is_file():
        split = read_split(file, cases)
    else:
        split = read_split(config.split.file, cases) if config.split.file else make_split(prepared.cases, config.split)
        write_split(split, file)
        warn_of_shared_images(prepared.cases, split)
    return open_source(prepared, split["pretrain"], config)


def _check_losses(training: Training, done: int, run_dir: Path, log: RunLog) -> None:
    if bad := training.collect(done):
        index, value = bad
        _diverged(training, f"loss must be finite, got {value}", index // training.config.pretrain.accumulate + 1, [index], run_dir, log)


def _checkpoint(training: Training, done: int, run_dir: Path, log: RunLog) -> Path:
    if not training.weights_are_finite():  # a finite loss can have a gradient that is not
        accumulate = training.config.pretrain.accumulate
        _diverged(training, "weights must be finite, got NaN or inf", done, range((done - 1) * accumulate, done * accumulate), run_dir, log)
    path = _twice(checkpoint.save, run_dir, training.state(done), training.config.pretrain.keep)
    log.write("checkpoint", step=done, file=path.name)
    return path


def _diverged(training: Training, what: str, step: int, micro_batches, run_dir: Path, log: RunLog) -> None:
    sampler = training.sampler()
    patients = sorted({patient for index in micro_batches for patient in training.source.patients_of(sampler.indices(index))})
    where = _last_good(run_dir) or "none"
    log.write("diverged", step=step, what=what, patients=patients, checkpoint=where)
    raise NonFiniteLoss(f"{what} at step {step}; patients in the batch: {', '.join(patients)}; last checkpoint: {where}")


@contextlib.contextmanager
def _signals() -> Iterator[list[signal.Signals]]:
    """SIGINT or SIGTERM, once received: the loop stops after its step. A second one stops at once. (Only the main thread may listen.)"""
    caught: list[signal.Signals] = []
    before = {}

    def note(number, frame):
        caught.append(signal.Signals(number))
        for listened, handler in before.items():
            signal.signal(listened, handler)

    with contextlib.suppress(ValueError):
        before |= {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _determinism(wanted: bool) -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it starts
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def versions() -> dict[str, str]:
    """Of Python and of the packages that a run's numbers depend on."""
    found = {"python": platform.python_version()}
    for package in ("pix2rep-kernels", "torch", "triton", "monai", "numpy", "nibabel"):
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found
