"""Where the time of rows that miss their target goes: by kernel, and what ncu says of each where it works. `... profiling CASE WHO` is the profiled process."""

import csv
import functools
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.gpu import cases as case_module
from benchmarks.gpu.bench import cases
from benchmarks.harness import ROOT

SECTIONS = ("SpeedOfLight", "Occupancy", "LaunchStats", "ComputeWorkloadAnalysis")
KEPT = {
    "Duration", "Compute (SM) Throughput", "Memory Throughput", "DRAM Throughput", "L2 Cache Throughput", "Registers Per Thread", "Achieved Occupancy",
    "Theoretical Occupancy", "Executed Ipc Active", "Issue Slots Busy", "SM Frequency", "Grid Size", "Dynamic Shared Memory Per Block",
}  # fmt: skip
LIMIT_S = 60


def ncu_path() -> str | None:
    found = shutil.which("ncu") or next(map(str, Path("/usr/local").glob("cuda*/bin/ncu")), None)
    return found or next(map(str, Path("/opt/nvidia").glob("nsight-compute/*/ncu")), None)


def kernels(text: str) -> list[dict]:
    """ncu's CSV, a row a metric, as a row a kernel."""
    start = text.find('"ID"')
    found: dict[str, dict] = {}
    for entry in csv.DictReader(io.StringIO(text[start:] if start >= 0 else "")):
        if entry.get("Metric Name") in KEPT:
            kernel = found.setdefault(entry["ID"], {"kernel": entry["Kernel Name"][:80]})
            kernel[entry["Metric Name"]] = f"{entry['Metric Value']} {entry['Metric Unit']}".strip()
    return list(found.values())


def profile(run, rows: list[tuple[str, str]]) -> dict:
    """For each (case, backend): its kernels by time, and ncu's view of them or why there is none."""
    given = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    found, ncu = {}, ncu_path()

    def limit() -> float:
        return max(10.0, min(LIMIT_S, run.left()))

    for case, who in rows:
        if run.left() < 15:
            found[f"{case} {who}"] = {"skipped": "time is up"}
            continue
        command = [sys.executable, "-m", "benchmarks.gpu.profiling", case, who]
        entry = {}
        try:
            plain = subprocess.run(command, cwd=ROOT, env=given, capture_output=True, text=True, timeout=limit())
            entry["kernels"] = json.loads(plain.stdout.splitlines()[-1]) if plain.returncode == 0 else plain.stderr[-300:]
            if ncu is None:
                entry["ncu"] = "skipped: ncu is not here"
            else:
                options = ["--clock-control", "none", "--profile-from-start", "off", "--target-processes", "application-only", "--csv", "--page", "details"]
                options += [word for name in SECTIONS for word in ("--section", name)]
                seen = subprocess.run([ncu, *options, *command, "--once"], cwd=ROOT, env=given, capture_output=True, text=True, timeout=limit())
                entry["ncu"] = kernels(seen.stdout) or f"no answer, exit code {seen.returncode}: {(seen.stdout + seen.stderr)[-300:]}"
        except subprocess.TimeoutExpired:
            entry["stopped"] = "at its time limit"
        found[f"{case} {who}"] = entry
    return {"profiles": found}


def main(key: str, who: str, once: bool) -> None:
    case = cases()[key]
    step = functools.partial(case_module.gradients, functools.partial(case.ours, who), case.make("cuda"))
    step()
    torch.cuda.synchronize()
    if once:
        torch.cuda.profiler.start()
        step()
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()
        return
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        for _ in range(3):
            step()
        torch.cuda.synchronize()
    events = sorted(seen.key_averages(), key=lambda e: -e.device_time_total)[:12]
    print(json.dumps([{"kernel": e.key[:80], "ms": e.device_time_total / 3e3, "launches": e.count / 3} for e in events]))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], "--once" in sys.argv)
