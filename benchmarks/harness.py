"""Time, peak memory and ceilings of a machine, each in the way that cannot flatter: interleaved medians after warm-up, memory in a process of its own."""

import ctypes
import json
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
LONG_S = 20  # a first call that took longer is its own measurement
FLUSH_BYTES = 256 << 20  # several times a GPU's L2 cache


class Clock:
    """Seconds between the marks of one step; on CUDA by events, operands cold in L2.

    `cpu_time` counts the processor's seconds of all threads: what one thread takes on a machine that is busy with other work.
    """

    def __init__(self, device: str, cpu_time: bool = False):
        self.now = time.process_time if cpu_time else time.perf_counter
        self.flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device) if device == "cuda" else None

    def __call__(self, step: Callable[[Callable], object]) -> list[float]:
        if self.flush is None:
            times = []
            step(lambda: times.append(self.now()))
            return [later - earlier for earlier, later in zip(times, times[1:], strict=False)]
        self.flush.zero_()
        events = []

        def mark():
            events.append(torch.cuda.Event(enable_timing=True))
            events[-1].record()

        step(mark)
        torch.cuda.synchronize()
        return [earlier.elapsed_time(later) / 1e3 for earlier, later in zip(events, events[1:], strict=False)]


def interleaved(
    steps: dict[str, Callable], clock: Clock, repeats: int = 7, budget_s: float = 5.0, compiling: tuple = ()
) -> dict[str, list[list[float]] | str]:
    """Times of each step, taken in turns so that a busy machine slows all alike: after warm-up, `repeats` or what fits into `budget_s` a step.

    The first call of a step in `compiling` says nothing about the next. A step that raises is in the result as its sentence.
    """
    taken: dict[str, list | str] = {}
    quota = {}
    for name, step in steps.items():
        try:
            if name in compiling:
                clock(step)
            first = clock(step)
        except Exception as broken:  # noqa: BLE001 - a peer that fails, or runs out of memory, is a result
            taken[name] = sentence(broken)
            continue
        long = sum(first) > LONG_S
        taken[name], quota[name] = [first] if long else [], 0 if long else max(1, min(repeats, int(budget_s / max(sum(first), 1e-9))))
    for turn in range(repeats):
        for name in quota:
            if turn < quota[name]:
                taken[name].append(clock(steps[name]))
    return taken


def summary(times: list[float]) -> dict[str, float]:
    """Median, interquartile range (None of a single time), best, in seconds."""
    low, median, high = statistics.quantiles(times, n=4) if len(times) > 1 else (0, times[0], None)
    return {"median_s": median, "iqr_s": high and high - low, "best_s": min(times), "repeats": len(times)}


def sentence(broken: BaseException) -> str:
    return f"{type(broken).__name__}: {(str(broken).splitlines() or [''])[0][:160]}"


def peak_mib(code: str, *arguments: object) -> float:
    """Growth of a fresh process's resident memory, MiB, while the last statement of `code` runs.

    `code` defines `prepare()`, which warms up and returns the inputs, and `work(inputs)`.
    """
    result = subprocess.run([sys.executable, "-m", "benchmarks.harness", code, *map(str, arguments)], capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(result.stderr.strip().splitlines()[-1] if result.stderr.strip() else f"exit code {result.returncode}")
    return json.loads(result.stdout.splitlines()[-1])


def cuda_peak_mib(call: Callable) -> float:
    """What the allocator's peak rises above what was allocated before, MiB; what the call returns is in it."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def free_bytes(device: str) -> int:
    """Memory that a new allocation could have."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    return int(re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())[1]) * 1024


def total_bytes(device: str) -> int:
    return torch.cuda.mem_get_info()[1] if device == "cuda" else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def ceilings(device: str, clock: Clock, scale: float = 1.0) -> dict[str, float]:
    """Rates a second of this machine, now: copied bytes (read and written), FLOP of a large product, exponentials of a tile that stays in cache."""
    if device == "cuda":
        from benchmarks.gpu.ceilings import measure
        from benchmarks.gpu.timing import Clock as GpuClock

        return measure(GpuClock(device))

    def best(call):
        call()
        return min(clock(lambda mark: (mark(), call(), mark()))[0] for _ in range(5))

    words = int(scale * (32 << 20))
    source, target = torch.zeros(words), torch.zeros(words)
    side = max(16, int(scale * 1024))
    a, b = torch.randn(2, side, side)
    c, tile, powers = torch.empty(side, side), torch.zeros(1 << 17), torch.zeros(1 << 17)
    return {
        "copy_bytes": 8 * words / best(lambda: target.copy_(source)),
        "fp32_flop": 2 * side**3 / best(lambda: torch.mm(a, b, out=c)),
        "ex2": 50 * len(tile) / best(lambda: [torch.exp(tile, out=powers) for _ in range(50)]),
        "shared_units": True,
    }


def surroundings(program: str = "") -> dict:
    """Device, platform, versions, commit and command of a measurement."""
    from pix2rep_kernels.__main__ import versions

    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()) if Path("/proc/cpuinfo").exists() else None
    return {
        "device": f"{model[1] if model else platform.processor()}, {os.cpu_count()} cores",
        "platform": platform.platform(),
        "versions": versions(),
        **commit("pix2rep_kernels", "csrc", "benchmarks/*.py"),
        "command": shlex.join(["python", "-m", program or f"benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]]),
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


def forget_peak() -> None:
    """Freed memory goes back to the system and the peak falls to what is resident, so that what the preparation took cannot hide what the work takes."""
    ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # a kernel without it: the preparation's peak stays the base
        pass


def _child() -> None:
    scope = {"arguments": sys.argv[2:]}
    exec(sys.argv[1], scope)
    inputs = scope["prepare"]()
    forget_peak()
    before = resident_peak_mib()
    scope["work"](inputs)
    print(resident_peak_mib() - before)


if __name__ == "__main__":
    _child()
