"""What a comparison would compute, without computing it."""

import statistics
from collections import Counter, defaultdict
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory

from pix2rep.compare import Comparison
from pix2rep.compare_jobs import Job
from pix2rep.compare_report import show_jobs
from pix2rep.compare_time import quick_seconds_a_step
from pix2rep.data.patches import open_source
from pix2rep.log import say
from pix2rep.plan import Plan


def dry_run(plan: Plan, jobs: int = 1) -> dict[str, int]:
    """Print every job and whether it is finished, and how long what is left may take. Computes nothing; a new plan.out is not made.

    Returns how many jobs there are and how many of them are to do: {"pretrainings", "cells", "pretrainings_to_do", "cells_to_do"}.
    """
    comparison = Comparison(plan, jobs)
    with TemporaryDirectory() as temporary:
        is_new = not (comparison.out / "plan.yaml").is_file()
        if is_new:
            comparison.check_out()
            comparison.out = Path(temporary)
        comparison.open(write=is_new)
        comparison.matched = comparison.kept_times()
        comparison.announce()
        stages = {"pretrainings": comparison.pretrainings(), "cells": comparison.cells()}
        why = {job: comparison.why_to_do(job) for own in stages.values() for job in own}
        show_jobs(why)
        for line in _estimates(comparison, [job for job, reasons in why.items() if reasons]):
            say(line)
    return {name: len(own) for name, own in stages.items()} | {f"{name}_to_do": sum(bool(why[job]) for job in own) for name, own in stages.items()}


def _estimates(comparison: Comparison, jobs: list[Job]) -> list[str]:
    """How long `jobs` may take: pre-training by a few steps timed here, cells by those that are finished."""
    lines, source, seconds = [], None, 0.0
    for name in dict.fromkeys(job.method for job in jobs if job.task == "pretrain"):
        source = source or open_source(comparison.study.prepared, comparison.study.split["pretrain"], comparison.plan.base)
        config, own = comparison.config(name, 0), sum(job.task == "pretrain" and job.method == name for job in jobs)
        one = quick_seconds_a_step(config, source)
        seconds += own * one * config.pretrain.steps
        note = "; before its steps are matched" if comparison.plan.methods[name].match_time and name not in comparison.matched else ""
        lines.append(f"{name}: {own} pre-trainings of {config.pretrain.steps} steps, {one:.4f} s each{note}")
    spent = defaultdict(list)
    for job, record in comparison.finished()[0]:
        spent[job.task].append(record["seconds"])
    todo = Counter(job.task for job in jobs if job.task != "pretrain")
    if todo and set(todo) <= set(spent):
        seconds += sum(count * statistics.mean(spent[task]) for task, count in todo.items())
        lines.append(f"about {timedelta(seconds=round(seconds / comparison.jobs))} in all")
    elif seconds:
        lines.append(f"about {timedelta(seconds=round(seconds / comparison.jobs))} of pre-training; a cell's time is known once one is finished")
    return lines
