"""Time and peak memory of a call; on the CPU the same code runs once, as a rehearsal whose numbers mean nothing."""

import statistics
import time
from collections.abc import Callable

import torch

FLUSH_BYTES = 256 << 20  # several times an L2 cache
LONG_S = 0.5  # a call of this length is repeated little


class Clock:
    """Median and interquartile range of a call in seconds, its operands cold in L2, and what it allocates at most."""

    def __init__(self, device: str, budget_s: float = 0.3):
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
        """median_s, iqr_s, best_s, repeats; extra_MiB, the peak beyond what was there, what the call returns included (None on the CPU)."""
        first = self.once(call)  # compiles
        if self.device != "cuda":
            return {"median_s": first, "iqr_s": 0.0, "best_s": first, "repeats": 1, "extra_MiB": None}
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        warm = self.once(call)
        extra = (torch.cuda.max_memory_allocated() - before) / 2**20
        if warm > LONG_S:
            times = [self.once(call), warm] if warm < 2 else [warm]
        else:
            times = [self.once(call) for _ in range(int(min(50, max(5, self.budget_s / max(warm, 1e-6)))))]
        low, median, high = statistics.quantiles(times, n=4) if len(times) > 1 else times * 3
        return {"median_s": median, "iqr_s": high - low, "best_s": min(times), "repeats": len(times), "extra_MiB": extra}
