"""A plan's comparison: every pre-training, every cell, one report; what is finished is not computed again.

    OUT/plan.yaml  split.json  cache/  match_time.json  METHOD/seedK/ (a run folder, and its cells)
    OUT/results.csv  results.json  table.md  label_efficiency.png .svg  overlays/  record.json
"""

import contextlib
import os
import shlex
import signal
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch
import yaml

from pix2rep import compare_records as records
from pix2rep import disk
from pix2rep.checkpoint import atomic
from pix2rep.compare_jobs import Job, Outcome, fail, run_here, run_in_processes
from pix2rep.compare_time import matched_steps
from pix2rep.config import Config
from pix2rep.data.cache import Prepared, prepare
from pix2rep.data.discover import discover
from pix2rep.data.patches import open_source
from pix2rep.data.splits import PARTS, labelled_patients, make_split, read_split, warn_of_shared_images, write_split
from pix2rep.log import say
from pix2rep.plan import TASKS, Plan, plan_of, to_dict
from pix2rep.pretrain import versions
from pix2rep.study import Study, study_of
from pix2rep.typed import ConfigError, Loader


class Stopped(RuntimeError):
    """Ended by a signal; the message says how to continue."""

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.exit_code = code


class _Terminated(KeyboardInterrupt):
    """SIGTERM, treated as Ctrl-C is."""


def run(plan: Plan, jobs: int = 1, again: str = "") -> dict:
    """Compute what is missing of the comparison in plan.out, write the report, return what results.json holds.

    jobs: processes side by side; 1 works in this one. again: the command that continues, for the message of a stop. Failed cells are in the
    result's "failed". Raises ValueError or OSError for a plan, data or folder that cannot be used, Stopped after SIGINT or SIGTERM.
    """
    from pix2rep import compare_plot, compare_report

    clock, threads = _Clock(), torch.get_num_threads()
    comparison = Comparison(plan, jobs)
    hint = f"what is finished is kept; continue with: {again}" if again else "what is finished is kept"
    comparison.check_out()
    disk.make_folder(comparison.out)
    try:
        with _sigterm(), disk.lock(comparison.out / "lock", plan.out):
            comparison.open()
            clock("prepare")
            comparison.match_times()
            clock("match_time")
            comparison.announce()
            random = [job for job in comparison.cells() if job.random]  # they wait for no weights: processes left over may train them
            comparison.work("pre-training, random cells", [job for job in (*comparison.pretrainings(), *random) if comparison.why_to_do(job)])
            clock("pretrain")
            comparison.work("cells", [job for job in comparison.runnable_cells() if comparison.why_to_do(job)])
            clock("cells")
            result = compare_report.write(comparison)
            compare_plot.write(comparison, result)
            clock("report")
    except _Terminated:
        raise Stopped(f"stopped by SIGTERM; {hint}", 128 + signal.SIGTERM) from None
    except KeyboardInterrupt:
        raise Stopped(f"stopped by SIGINT; {hint}", 128 + signal.SIGINT) from None
    finally:
        if comparison.study is not None:
            _record(comparison, clock)
        torch.set_num_threads(threads)
    compare_report.show(result)
    return result


class Comparison:
    """A plan with its data opened: which jobs there are, and which are finished."""

    def __init__(self, plan: Plan, jobs: int):
        for key in ("data", "out"):
            if not getattr(plan, key):
                raise ConfigError(f"the plan must name {key}, or the command must (--{key}), got neither")
        self.plan, self.jobs, self.out = plan, jobs, Path(plan.out)
        self.threads = plan.base.pretrain.threads or (max(1, torch.get_num_threads() // jobs) if jobs > 1 else None)
        self.study: Study | None = None
        self.matched: dict[str, dict] = {}
        self._weights: dict[Path, tuple[float, str]] = {}

    def config(self, method: str, seed: int) -> Config:
        made = self.plan.config_of(method, seed, self.matched.get(method, {}).get("steps"))
        data = replace(made.data, root=str(Path(self.plan.data).resolve()), cache=str(self.out / "cache"))
        split = replace(made.split, file=str(self.out / "split.json"))
        return replace(made, data=data, split=split, pretrain=replace(made.pretrain, threads=made.pretrain.threads or self.threads))

    def check_out(self) -> None:
        """Raise FileExistsError for a folder of something else."""
        begun = {"cache", "lock", "split.json"}  # what a comparison has before its plan.yaml
        if self.out.exists() and not (self.out / "plan.yaml").is_file() and {entry.name for entry in self.out.iterdir()} - begun:
            raise FileExistsError(f"out must be a new folder or that of a comparison (with plan.yaml), got {self.out}")

    def open(self, write: bool = True) -> None:
        """Prepare the volumes and split the patients. `write`: the folder becomes this plan's."""
        self.check_out()
        out, config = self.out, self.config(next(iter(self.plan.methods)), 0)
        cases = discover(config.data.root)
        prepared = prepare(cases, config.data, out / "cache")
        split = self._split(prepared)
        before = out / "split.json"
        if before.is_file() and read_split(before, cases) != split:
            say("the split differs from that of the cells in this folder: all are redone")
        if write:
            write_split(split, before)  # before the plan: a plan.yaml vouches for its split
            with atomic(out / "plan.yaml") as temporary:
                temporary.write_text(yaml.safe_dump(to_dict(self.plan), sort_keys=False, default_flow_style=None), encoding="utf-8")
        warn_of_shared_images(prepared.cases, split)
        if config.pretrain.threads:
            torch.set_num_threads(config.pretrain.threads)
        study = study_of(out, config, cases, prepared, split)
        for part in PARTS:
            study.volumes(part)
        labelled = {case.patient for case in prepared.cases if case.label_file is not None}
        self.total = len(labelled & set(split["pretrain"]))
        self.draws = {  # too few patients must not cost an hour of pre-training
            (n, seed): labelled_patients(split, prepared.cases, n, seed) for n in self.plan.counts(self.total) for seed in self.plan.seeds
        }
        self.images = records.digest_of_volumes(prepared.cases, split["pretrain"], labels=False)
        self.volumes = records.digest_of_volumes(prepared.cases, [patient for part in PARTS for patient in split[part]], labels=True)
        self.study = study

    def _split(self, prepared: Prepared) -> dict:
        """That of the folder as long as its options are the plan's: patients who joined the data later do not move the others."""
        own, file = self.plan.base.split, self.out / "split.json"
        if own.file:
            return read_split(own.file, prepared.cases)
        with contextlib.suppress(ConfigError, OSError, yaml.YAMLError):
            before = plan_of(yaml.load((self.out / "plan.yaml").read_text(encoding="utf-8"), Loader))
            if before.base.split == own and file.is_file():
                return read_split(file, prepared.cases)
        return make_split(prepared.cases, own)

    def match_times(self) -> None:
        """Set the steps of methods with match_time, timed once for a pair of configs and then kept in OUT/match_time.json."""
        file = self.out / "match_time.json"
        self.matched = self.kept_times()
        patients = self.study.split["pretrain"]
        for name, method in self.plan.methods.items():
            if method.match_time is None:
                continue
            if name not in self.matched:
                if self.threads:
                    torch.set_num_threads(self.threads)
                source = open_source(self.study.prepared, patients, self.plan.base)
                inputs, configs = self._timed(name), (self.config(method.match_time, 0), self.config(name, 0))
                timed = {"reference": method.match_time, "inputs": inputs, "threads": torch.get_num_threads()} | matched_steps(*configs, source)
                records.write(file, (records.read(file) or {}) | {name: timed})
                self.matched[name] = timed
            found = self.matched[name]
            say(f"{name}: {found['steps']} steps of {found['seconds_a_step']:.4f} s, the time of {found['reference_steps']} of {found['reference']}")

    def kept_times(self) -> dict[str, dict]:
        """What OUT/match_time.json has for this plan's methods as they are."""
        kept = records.read(self.out / "match_time.json") or {}
        own = [name for name, method in self.plan.methods.items() if method.match_time]
        return {name: kept[name] for name in own if name in kept and kept[name]["inputs"] == self._timed(name)}

    def _timed(self, name: str) -> list[dict]:
        """What decides the steps that `name` gets: both methods' options, its own steps apart."""
        configs = [self.plan.config_of(method) for method in (self.plan.methods[name].match_time, name)]
        reference, own = (records.inputs_of_pretraining(config, self.images, self.study.split["pretrain"]) for config in configs)
        return [reference, {key: value for key, value in own.items() if key != "pretrain.steps"}]

    def pretrainings(self) -> list[Job]:
        jobs = []
        for method, seed in self.plan.pretrainings():
            config = self.config(method, seed)
            inputs = records.inputs_of_pretraining(config, self.images, self.study.split["pretrain"])
            jobs.append(Job(config, self.out, "pretrain", method, seed, inputs))
        return jobs

    def cells(self) -> list[Job]:
        """Every cell; the inputs of one whose pre-training is not finished say so."""
        jobs, weights = [], {(job.method, job.seed): self._weights_of(job) for job in self.pretrainings()}
        for task, n, method, seed in self.plan.cells(self.total):
            config, patients = self.config(method, seed), self.draws[n, seed]
            is_random = (method, seed) not in weights
            own = "random" if is_random else weights[method, seed]
            inputs = records.inputs_of_cell(config, task, patients, own, self.volumes, self.study.split, self.study.classes)
            jobs.append(Job(config, self.out, task, method, seed, inputs, n, tuple(patients), is_random))
        return jobs

    def _weights_of(self, job: Job) -> str:
        file = job.folder / "weights.safetensors"
        if self.why_to_do(job) or not file.is_file():
            return "not finished"
        stamp = file.stat().st_mtime
        if self._weights.get(file, (None,))[0] != stamp:
            self._weights[file] = stamp, records.digest_of_weights(file)
        return self._weights[file][1]

    def why_to_do(self, job: Job) -> list[str]:
        """Why a job has to run: what changed since its record; empty when it is finished."""
        record = records.read(job.record)
        model = "weights.safetensors" if job.task == "pretrain" else job.record.with_suffix(".safetensors").name
        if record is None:
            return ["new"]
        return records.changed(record, job.inputs) or ([] if (job.folder / model).is_file() else ["missing"])

    def runnable_cells(self) -> list[Job]:
        """Cells whose weights are there. The others are recorded as failed, with the reason of their pre-training."""
        broken = {(job.method, job.seed): records.read(job.record) for job in self.pretrainings() if self.why_to_do(job)}
        found = []
        for job in self.cells():
            if (job.method, job.seed) in broken:
                fail(job, f"pre-training: {(broken[job.method, job.seed] or {}).get('failed', 'not finished')}")
            else:
                found.append(job)
        return found

    def finished(self) -> tuple[list[tuple[Job, dict]], list[tuple[Job, str]]]:
        """Cells of this plan and split with their records, and those that failed with the reason."""
        cells = [(job, records.read(job.record)) for job in self.cells()]
        done = [(job, record) for job, record in cells if not self.why_to_do(job)]
        return done, [(job, record["failed"]) for job, record in cells if record and "failed" in record and record["inputs"] == job.inputs]

    def announce(self) -> None:
        """Say how much there is to do, and which finished cells are redone because of what."""
        split, stages = self.study.split, {"pre-trainings": self.pretrainings(), "cells": self.cells()}
        counts = ", ".join(f"{len(split[part])} {part}" for part in PARTS)
        say(f"{Path(self.plan.data).name}: patients {counts}; {self.total} of pretrain with labels; {len(self.plan.methods)} methods")
        again = defaultdict(list)
        for what, jobs in stages.items():
            why = {job: self.why_to_do(job) for job in jobs}
            say(f"{what}: {len(jobs)}, {sum(not reasons for reasons in why.values())} finished")
            for job, reasons in why.items():
                if reasons and reasons != ["new"]:
                    again[", ".join(reasons)].append(job.name)
        for reasons, names in again.items():
            say(f"redone ({reasons}): {'; '.join(names)}")

    def work(self, stage: str, jobs: list[Job]) -> None:
        """Run jobs, with a line for each that names it, its Dice and the time left in this stage."""
        spent: dict[str, list[float]] = defaultdict(list)
        left = Counter(_kind(job) for job in jobs)
        runner = run_here(jobs) if self.jobs == 1 else run_in_processes(jobs, self.jobs)
        with contextlib.closing(runner):
            for done, (job, outcome) in enumerate(runner, 1):
                if outcome.stopped:
                    raise _Terminated if outcome.stopped == 128 + signal.SIGTERM else KeyboardInterrupt
                spent[_kind(job)].append(outcome.seconds)
                left[_kind(job)] -= 1
                every = [seconds for own in spent.values() for seconds in own]
                rest = sum(count * statistics.mean(spent.get(kind) or every) for kind, count in left.items()) / self.jobs
                say(f"{stage} {done}/{len(jobs)}  {job.name}: {_told(outcome)}, {outcome.seconds:.1f} s; {timedelta(seconds=round(rest))} left")


def _kind(job: Job) -> str:
    return f"{job.task} {job.method}" if job.task == "pretrain" else f"{job.task} {job.labelled}"


def _told(outcome: Outcome) -> str:
    if outcome.failed:
        return f"failed, {outcome.failed.splitlines()[0]}"
    return "done" if outcome.dice is None else f"test Dice {outcome.dice:.3f}"


class _Clock:
    """Wall seconds of the stages: call it where one ends."""

    def __init__(self):
        self.at, self.stages = time.perf_counter(), {}

    def __call__(self, stage: str) -> None:
        now = time.perf_counter()
        self.stages[stage], self.at = round(now - self.at, 2), now


def _record(comparison: Comparison, clock: _Clock) -> None:
    """Add this session to OUT/record.json: nothing in it names the machine."""
    file = comparison.out / "record.json"
    sessions = (records.read(file) or {}).get("sessions", [])
    session = {"versions": versions(), "cpus": os.cpu_count(), "threads": comparison.threads or torch.get_num_threads(), "jobs": comparison.jobs}
    sessions.append(session | {"device": comparison.study.device.type, "seconds": clock.stages})
    total = sum(seconds for one in sessions for seconds in one["seconds"].values())
    jobs = dict.fromkeys(("pretrain", *TASKS), 0.0)
    for job in (*comparison.pretrainings(), *comparison.cells()):
        record = records.read(job.record)
        if record and "failed" not in record:
            jobs[job.task] += record["seconds"]
    records.write(file, {"seconds": round(total, 1), "seconds_of_jobs": {k: round(v, 1) for k, v in jobs.items()}, "sessions": sessions})


@contextlib.contextmanager
def _sigterm() -> Iterator[None]:
    """SIGTERM ends the comparison as Ctrl-C does. (Only the main thread may listen.)"""

    def stop(number, frame):
        raise _Terminated

    before = None
    with contextlib.suppress(ValueError):
        before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def command(plan: str, data, out, jobs: int, overrides) -> str:
    """The command line that continues a comparison."""
    words = ["pix2rep", "compare", plan, *(overrides or ())]
    given = {"--data": data, "--out": out, "--jobs": jobs if jobs > 1 else None}
    words += [word for flag, value in given.items() if value for word in (flag, str(value))]
    return shlex.join(words)
