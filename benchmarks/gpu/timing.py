"""Time, peak memory and floors of a call on a device; on the CPU the same code runs once, as a rehearsal whose numbers mean nothing."""

import statistics
import time
from collections.abc import Callable

import torch

FLUSH_BYTES = 256 << 20  # several times an L2 cache


class Clock:
    """Median and interquartile range of a call in seconds, its operands cold in L2."""

    def __init__(self, device: str, budget_s: float = 0.4):
        self.device, self.budget_s = device, budget_s
        self.flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device) if device == "cuda" else None

    def once(self, call: Callable) -> float:
        if self.device != "cuda":
            start = time.perf_counter()
            call()
            return time.perf_counter() - start
        self.flush.zero_()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    def __call__(self, call: Callable) -> dict[str, float]:
        first = self.once(call)  # compiles
        if self.device != "cuda":
            return {"median_s": first, "iqr_s": 0.0, "best_s": first, "repeats": 1}
        self.once(call)
        warm = self.once(call)
        repeats = int(min(50, max(3, self.budget_s / max(warm, 1e-6))))
        times = [self.once(call) for _ in range(repeats)]
        low, median, high = statistics.quantiles(times, n=4)
        return {"median_s": median, "iqr_s": high - low, "best_s": min(times), "repeats": repeats}


def extra_mib(call: Callable, device: str) -> float | None:
    """Peak allocation of a call beyond what was there before it, MiB, what it returns included; None on the CPU."""
    if device != "cuda":
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20
