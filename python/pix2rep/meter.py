"""Time and memory of the consecutive parts of a step.

    with Meter(memory_source(device)) as meter:  # or time_source(device)
        meter("forward")
        ...
        meter("backward")
        ...
    meter.parts  # [("forward", (kept, peak)), ("backward", (kept, peak))]

A source is stamped where a part ends and the next begins; nothing else here or in `profile` knows which device it is.
"""

import os
import re
import time
from pathlib import Path

import torch

MARK = "pix2rep.meter"


class Meter:
    """Call it with a part's name where the part begins. After the block `parts` holds (name, what its source says of it) in order."""

    def __init__(self, source):
        self.source, self.names, self.parts = source, [], []

    def __enter__(self) -> "Meter":
        self.source.start()
        return self

    def __call__(self, name: str) -> None:
        self.source.stamp()
        self.names.append(name)

    def __exit__(self, *_) -> None:
        self.source.stamp()
        self.parts = list(zip(self.names, self.source.stop(), strict=True))


class CpuSeconds:
    """Seconds of a part by the wall clock (or by `time.process_time`: of the CPU, over all threads, where others keep the machine busy)."""

    clock = staticmethod(time.perf_counter)

    def start(self) -> None:
        self._at = []

    def stamp(self) -> None:
        self._at.append(self.clock())

    def stop(self) -> list[float]:
        return [after - before for before, after in zip(self._at, self._at[1:], strict=False)]


class CudaSeconds:
    """Seconds of a part on the stream: events, so that nothing waits for the device before the last part has ended."""

    def __init__(self, device: torch.device):
        self.device = device

    def start(self) -> None:
        self._at = []
        torch.cuda.synchronize(self.device)

    def stamp(self) -> None:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        self._at.append(event)

    def stop(self) -> list[float]:
        torch.cuda.synchronize(self.device)
        return [before.elapsed_time(after) / 1e3 for before, after in zip(self._at, self._at[1:], strict=False)]


class CpuMemory:
    """(kept, peak) bytes of a part: live at its end, most live within it, both beyond what was live at the start.

    The sum of all that PyTorch's allocator gave and took back, as torch.profiler records it: exact bytes of tensors. What C++ takes by
    malloc is not seen (scratch of the fused kernels and of oneDNN): `resident_bytes` is the cross-check. Nor is it seen when a tensor
    from before the start is freed; a step of training frees none.
    """

    def start(self) -> None:
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler announces itself on stderr otherwise
        self._profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
        self._profile.start()

    def stamp(self) -> None:
        with torch.profiler.record_function(MARK):
            pass

    def stop(self) -> list[tuple[int, int]]:
        self._profile.stop()
        events = [e for e in self._profile.profiler.kineto_results.events() if e.name() in ("[memory]", MARK)]
        parts, live, peak = [], 0, 0
        for event in sorted(events, key=lambda e: e.start_ns()):
            if event.name() == MARK:
                parts.append((live, peak))
                peak = live
            elif event.device_type() == torch.autograd.DeviceType.CPU:
                live += event.nbytes()
                peak = max(peak, live)
        return parts[1:]  # before the first mark there is no part


class CudaMemory:
    """(kept, peak) bytes of a part, as CpuMemory, from the caching allocator's own counters (cuDNN's and cuBLAS's workspaces included).

    Counting needs no synchronisation: the allocator counts when the CPU asks, in the order of the program.
    """

    def __init__(self, device: torch.device):
        self.device = device

    def start(self) -> None:
        self._before, self._parts = torch.cuda.memory_allocated(self.device), []
        torch.cuda.reset_peak_memory_stats(self.device)

    def stamp(self) -> None:
        live, peak = torch.cuda.memory_allocated(self.device), torch.cuda.max_memory_allocated(self.device)
        self._parts.append((live - self._before, peak - self._before))
        torch.cuda.reset_peak_memory_stats(self.device)

    def stop(self) -> list[tuple[int, int]]:
        return self._parts[1:]


def memory_source(device: torch.device) -> CpuMemory | CudaMemory:
    return CudaMemory(device) if device.type == "cuda" else CpuMemory()


def time_source(device: torch.device) -> CpuSeconds | CudaSeconds:
    return CudaSeconds(device) if device.type == "cuda" else CpuSeconds()


def allocated_bytes(device: torch.device) -> int | None:
    """All that PyTorch has given out on a CUDA device; None on the CPU, where nobody counts."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else None


def usable_bytes(device: torch.device) -> int:
    """What a measurement may take: nine tenths of a GPU's free memory, half of what the machine has available (others work there too)."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # by PyTorch, unused
        return (free + held) * 9 // 10
    available = _field("/proc/meminfo", "MemAvailable")
    return (available or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")) // 2


def resident_bytes() -> tuple[int, int] | None:
    """(now, most so far) of this process's resident memory, None but on Linux. (`ru_maxrss` would not do: a child starts with its parent's.)"""
    now, most = _field("/proc/self/status", "VmRSS"), _field("/proc/self/status", "VmHWM")
    return None if now is None or most is None else (now, most)


def _field(path: str, name: str) -> int | None:
    found = re.search(rf"^{name}:\s+(\d+) kB", Path(path).read_text(), re.MULTILINE) if Path(path).is_file() else None
    return int(found[1]) * 1024 if found else None


class Snapshot:
    """Record every allocation on a CUDA device in the block, with its Python stack, and write what pytorch.org/memory_viz opens."""

    ENTRIES = 1_000_000  # allocations and frees kept; a step has thousands

    def __init__(self, path: Path, device: torch.device):
        if device.type != "cuda":
            raise ValueError(f"--snapshot must be used on a CUDA device (PyTorch records no allocations of a CPU), got device {device}")
        self.path, self.device = path, device

    def __enter__(self) -> None:
        torch.cuda.memory._record_memory_history(max_entries=self.ENTRIES, stacks="python", device=self.device)

    def __exit__(self, kind, *_) -> None:
        from pix2rep.checkpoint import atomic

        try:
            if kind is None:
                torch.cuda.synchronize(self.device)
                with atomic(self.path) as temporary:
                    torch.cuda.memory._dump_snapshot(str(temporary))
        finally:
            torch.cuda.memory._record_memory_history(enabled=None, device=self.device)
