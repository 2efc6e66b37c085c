"""Time and peak memory of one call, each in the way that cannot flatter: medians after warm-up, and memory in a process of its own.

The main of a bench_<op>.py is `parser`, `start` and `tabulate`.
"""

import argparse
import json
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent


def interleaved(calls: dict[str, Callable], repeats: int = 7) -> dict[str, dict[str, float]]:
    """Median and interquartile range in seconds of each call, taken in turns so that a busy machine slows all of them alike."""
    times = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    summary = {}
    for name, taken in times.items():
        low, median, high = statistics.quantiles(taken, n=4)
        summary[name] = {"median_s": median, "iqr_s": high - low, "best_s": min(taken)}
    return summary


def peak_mib(code: str, *arguments: object) -> float:
    """Growth of a fresh process's resident memory, MiB, while the last statement of `code` runs.

    `code` defines `prepare()`, which warms up and returns the inputs, and `work(inputs)`.
    """
    result = subprocess.run([sys.executable, "-m", "benchmarks.harness", code, *map(str, arguments)], capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(result.stderr.strip().splitlines()[-1] if result.stderr else f"exit code {result.returncode}")
    return json.loads(result.stdout.splitlines()[-1])


def parser(doc: str) -> argparse.ArgumentParser:
    """What every benchmark takes; `doc` is the module's."""
    made = argparse.ArgumentParser(prog=f"python -m benchmarks.{Path(sys.argv[0]).stem}", description=doc.partition("\n")[0])
    made.add_argument("--threads", type=int, default=2)
    made.add_argument("--repeats", type=int, default=7)
    made.add_argument("--json", type=Path, help="write the rows here")
    return made


def start(made: argparse.ArgumentParser) -> argparse.Namespace:
    asked = made.parse_args()
    torch.set_num_threads(asked.threads)
    return asked


def tabulate(asked: argparse.Namespace, header: str, rows: Iterable[dict], line: Callable[[dict], str]) -> None:
    """Print each row as it is measured, and write all of them with what they belong to: device, versions, commit, command."""
    print(header)
    table = []
    for row in rows:
        table.append(row)
        print(line(row), flush=True)
    if asked.json:
        write_json(asked.json, {"threads": asked.threads, **surroundings(), "rows": table})


def surroundings() -> dict:
    """Device, platform, versions, commit and command of a measurement."""
    from pix2rep_kernels.__main__ import versions

    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()) if Path("/proc/cpuinfo").exists() else None
    return {
        "device": f"{model[1] if model else platform.processor()}, {os.cpu_count()} cores",
        "platform": platform.platform(),
        "versions": versions(),
        **commit("pix2rep_kernels", "csrc", "benchmarks/*.py"),
        "command": shlex.join(["python", "-m", f"benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]]),
    }


def commit(*paths: str) -> dict:
    """The commit, and whether `paths` differ from it."""

    def git(*arguments):
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    return {"commit": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain", "--", *paths))}


def write_json(path: Path, content: dict) -> None:
    """Lists one entry a line, so that a difference shows the row."""
    lists = {key: "[\n  " + ",\n  ".join(map(json.dumps, value)) + "\n ]" for key, value in content.items() if isinstance(value, list) and value}
    text = ",\n".join(f" {json.dumps(key)}: {lists.get(key) or json.dumps(value)}" for key, value in content.items())
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text("{\n" + text + "\n}\n")
    os.replace(temporary, path)


def resident_peak_mib() -> float:
    """Peak resident memory of this process image. (`ru_maxrss` would not do: a child starts with its parent's.)"""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1024


def _child() -> None:
    scope = {"arguments": sys.argv[2:]}
    exec(sys.argv[1], scope)
    inputs = scope["prepare"]()
    before = resident_peak_mib()
    scope["work"](inputs)
    print(resident_peak_mib() - before)


if __name__ == "__main__":
    _child()
