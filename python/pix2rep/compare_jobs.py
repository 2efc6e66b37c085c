"""A comparison's jobs: one pre-training, or one cell (one probe or fine-tuned model, tested), here or in processes of their own."""

import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
import traceback
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch

from pix2rep import checkpoint, log
from pix2rep import compare_records as records
from pix2rep.config import Config, PretrainConfig, from_dict, to_dict
from pix2rep.metrics import nanmean

PATIENCE = 120  # seconds that a stopped worker has for its step and its checkpoint


@dataclass(frozen=True, eq=False)
class Job:
    """`task` is "pretrain" or one of plan.TASKS; `inputs` are what decides the result (`compare_records`)."""

    config: Config
    out: Path
    task: str
    method: str
    seed: int
    inputs: dict[str, Any]
    labelled: int = 0
    patients: tuple[str, ...] = ()
    random: bool = False  # a cell without pre-training

    @property
    def folder(self) -> Path:
        return self.out / self.method / f"seed{self.seed}"

    @property
    def record(self) -> Path:
        return self.folder / ("pretrained.json" if self.task == "pretrain" else f"{self.task}_n{self.labelled}.json")

    @property
    def name(self) -> str:
        parts = [self.method, self.task, f"n={self.labelled}" if self.labelled else "", f"seed {self.seed}"]
        return " ".join(part for part in parts if part)


@dataclass(frozen=True)
class Outcome:
    """`failed`: the reason; `stopped`: exit code of a pre-training that a signal ended after its checkpoint."""

    seconds: float
    dice: float | None = None
    failed: str | None = None
    stopped: int = 0


def execute(job: Job) -> Outcome:
    """Run a job and write its record, last. An error is its outcome, recorded with its traceback; KeyboardInterrupt passes."""
    from pix2rep.pretrain import Interrupted

    began = time.perf_counter()
    try:
        dice = _pretrain(job) if job.task == "pretrain" else _cell(job)
        return Outcome(time.perf_counter() - began, dice)
    except Interrupted as stopped:
        return Outcome(time.perf_counter() - began, stopped=stopped.exit_code)
    except Exception as error:
        return fail(job, str(error) or type(error).__name__, time.perf_counter() - began, traceback.format_exc())


def fail(job: Job, reason: str, seconds: float = 0.0, trace: str | None = None) -> Outcome:
    records.write(job.record, {"inputs": job.inputs, "failed": reason, "traceback": trace, "seconds": round(seconds, 1)})
    return Outcome(seconds, failed=reason)


def _pretrain(job: Job) -> None:
    from pix2rep.pretrain import run

    started = job.folder / "started.json"
    before = records.read(started)
    if before is not None and before["inputs"] != job.inputs:  # weights of other options, which nothing may continue from
        for part in ("checkpoints", "tensorboard"):
            shutil.rmtree(job.folder / part, ignore_errors=True)
        for part in ("pretrained.json", "weights.safetensors", "log.jsonl", "split.json"):
            (job.folder / part).unlink(missing_ok=True)
    records.write(started, {"inputs": job.inputs})
    run(job.config.data.root, job.folder, job.config, resume=True)
    seconds = checkpoint.load(checkpoint.last(job.folder))["seconds"]  # of the steps, over every session
    records.write(job.record, {"inputs": job.inputs, "steps": job.config.pretrain.steps, "seconds": round(seconds, 1)})


def _cell(job: Job) -> float:
    from pix2rep.downstream import one_model, random_backbone

    began = time.perf_counter()
    shared = replace(Config(), data=job.config.data, pretrain=PretrainConfig(device=job.config.pretrain.device))
    study = replace(_study(job.out, job.inputs["volumes"] + job.inputs["split"], json.dumps(to_dict(shared))), config=job.config)
    backbone = random_backbone(study, job.seed) if job.random else checkpoint.load_backbone(job.folder)[0].to(study.device)
    entry = {"what": job.task, "labelled": job.labelled, "seed": job.seed, "arm": job.method, "patients": list(job.patients)}
    model, entry, _, rows = one_model(backbone, study, entry, study.volumes("val"), study.volumes("test"))
    metadata = {"pix2rep": json.dumps(entry | {"classes": list(study.classes)})}
    checkpoint.save_tensors(job.record.with_suffix(".safetensors"), model.state_dict(), metadata)
    seconds = round(time.perf_counter() - began, 1)
    records.write(job.record, {"inputs": job.inputs} | entry | {"seconds": seconds, "rows": rows})
    return nanmean([row["dice"] for row in rows])


@cache
def _study(out: Path, volumes: str, config: str):
    """Opened once a process for one state of the data; `config` as JSON, `volumes` their digest."""
    from pix2rep.study import open_study

    return open_study(out, from_dict(json.loads(config)))


def run_here(jobs: list[Job]) -> Iterator[tuple[Job, Outcome]]:
    for job in jobs:
        yield job, execute(job)


def run_in_processes(jobs: list[Job], count: int) -> Iterator[tuple[Job, Outcome]]:
    """Run jobs in `count` fresh processes, yielding each as it ends.

    A process that dies fails its job and is replaced. Leaving the generator early stops the others: a pre-training writes its checkpoint.
    """
    waiting, busy, idle, processes = deque(jobs), {}, [], []

    def start():
        ours, theirs = spawn.Pipe()
        process = spawn.Process(target=_serve, args=(theirs,), daemon=True)
        process.start()
        theirs.close()
        processes.append(process)
        idle.append((ours, process))

    spawn = multiprocessing.get_context("spawn")  # a forked child may neither use CUDA nor PyTorch's thread pools
    try:
        for _ in range(min(count, len(jobs))):
            start()
        while waiting or busy:
            while waiting and idle:
                ours, process = idle.pop()
                job = waiting.popleft()
                ours.send(job)
                busy[ours] = process, job
            for ours in wait(list(busy)):
                process, job = busy.pop(ours)
                try:
                    outcome = ours.recv()
                    idle.append((ours, process))
                except EOFError:
                    process.join()
                    outcome = fail(job, f"its process ended with exit code {process.exitcode}")
                    start()
                yield job, outcome
    finally:
        for process in processes:
            process.terminate()
        deadline = time.monotonic() + PATIENCE
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
            process.kill()


def _serve(pipe) -> None:
    """Of a worker: jobs in, outcomes out, until the comparison ends."""
    if hasattr(os, "setsid"):
        os.setsid()  # Ctrl-C reaches the comparison alone, which then stops its workers
    parent = multiprocessing.parent_process()

    def follow():
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=follow, daemon=True).start()
    log.console.quiet = True  # the comparison speaks for its workers
    with contextlib.suppress(EOFError):
        while True:
            job = pipe.recv()
            if job.config.pretrain.threads:
                torch.set_num_threads(job.config.pretrain.threads)
            outcome = execute(job)
            pipe.send(outcome)
            if outcome.stopped:
                return
