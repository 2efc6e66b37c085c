"""Time and peak memory of one call, each in the way that cannot flatter: medians after warm-up, and memory in a process of its own."""

import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path


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
