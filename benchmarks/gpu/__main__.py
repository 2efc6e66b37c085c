"""Everything that a GPU is needed for: `python -m benchmarks.gpu` (also `make gpu`), under eight minutes.

    build      whether `_C` and `_C_cuda` load here; if not, they are compiled for this GPU
    ceilings   exponentials, multiply-adds, L2, atomics, copies, matrix products of this chip
    bench      every case: ours on each backend, peers, percent of the floor, extra memory, error against float64; what is wrong gets no time
    suite      the op tests with real Triton and CUDA, in many processes
    sanitizer  compute-sanitizer memcheck and racecheck over small calls of every op and backend
    profile    the kernels of rows that miss their target, and ncu's view of them
    tune       (only when asked) other block sizes

Each part but `build` writes <part>.json with device, versions and commit as soon as it ends, in benchmarks/results/<device>/ or under --out. A part (of `bench`
a row) that is there for this very code already is not run again. `--dry-run` rehearses on the CPU at tiny sizes: its numbers mean nothing and go elsewhere.
"""

import argparse
import json
import os
import subprocess
import sys
import time
import traceback
from pathlib import Path

if "--dry-run" in sys.argv:
    os.environ |= {"TRITON_INTERPRET": "1", "PIX2REP_EMULATE": "1", "PIX2REP_SMALL": "1"}

import torch

from benchmarks.harness import ROOT

PARTS = ("build", "ceilings", "bench", "suite", "sanitizer", "profile", "tune")
WORKERS = 12  # of the suite: each holds a CUDA context and a core


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.partition("\n")[0])
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=PARTS[:-1])
    parser.add_argument("--minutes", type=float, default=8.0, help="all of it together")
    parser.add_argument("--bench-seconds", type=float, default=150.0, help="of these at most for the timed rows")
    parser.add_argument("--out", type=Path, help="folder of the results (default benchmarks/results)")
    parser.add_argument("--again", action="store_true", help="run what this code has results of, too")
    parser.add_argument("--dry-run", action="store_true", help="rehearse on the CPU, tiny")
    asked = parser.parse_args()
    if not asked.dry_run and not torch.cuda.is_available():
        print("no CUDA device is visible; --dry-run rehearses on the CPU")
        return 1
    from benchmarks.gpu.run import Run

    run = Run(asked)
    run.bench_s = asked.bench_seconds
    os.environ.setdefault("TRITON_CACHE_DIR", str(run.scratch / "triton"))
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    failed = []
    for part in asked.parts:
        earlier = run.earlier(part) if part not in ("bench", "build") else None
        print(f"\n{part}: {run.left():.0f} s left" + (", of an earlier run of this code" if earlier else ""), flush=True)
        start = time.monotonic()
        try:
            found = earlier or globals()[part](run)
        except Exception as broken:  # noqa: BLE001 - one part's failure is no reason to lose the others
            traceback.print_exc()
            failed.append(part)
            found = {"broken": f"{type(broken).__name__}: {broken}"}
        if part == "build":
            run.facts["objects"] = found
        elif not earlier:
            run.write(part, seconds=time.monotonic() - start, **found)
        show(run, part, found)
    write_logs(run)
    return 1 if failed else 0


def build(run) -> dict:
    from benchmarks.gpu import build as module

    return {"objects": "emulated"} if run.dry else module.ensure()


def ceilings(run) -> dict:
    from benchmarks.gpu.ceilings import EXPECTED

    command = [sys.executable, "-m", "benchmarks.gpu.ceilings", *(["--small"] if run.dry else [])]
    given = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    result = subprocess.run(command, cwd=ROOT, env=given, capture_output=True, text=True, timeout=run.seconds(90))
    if result.returncode:
        return {"broken": result.stderr[-600:], "expected": EXPECTED}
    rates = json.loads(result.stdout.splitlines()[-1])
    off = {k: round(rates[k] / v, 2) for k, v in EXPECTED.items() if not 0.75 <= rates[k] / v <= 1.25}
    return rates | {"expected": EXPECTED, "off_by_more_than_a_quarter": off, "clock_by_ex2_GHz": rates["ex2"] / (16 * 132 * 1e9)}


def bench(run) -> dict:
    from benchmarks.gpu import bench as module
    from benchmarks.gpu.ceilings import EXPECTED

    measured = run.earlier("ceilings") or {}
    return module.bench(run, {k: measured.get(k, v) for k, v in EXPECTED.items()}) | {"floors_from": "ceilings" if "ex2" in measured else "expected rates"}


def suite(run) -> dict:
    from benchmarks.gpu.suite import suite as module

    if run.dry:
        return module(run.scratch / "suite", 120, 2, chosen=["tests/test_smoke.py"])
    return module(run.scratch / "suite", run.seconds(210, keep=75), min(WORKERS, max(1, (os.cpu_count() or 2) - 2)), write=run.write)


def sanitizer(run) -> dict:
    from benchmarks.gpu.sanitizer import sanitizer as module

    return module(run.seconds(75, keep=20), run.dry)


def profile(run) -> dict:
    from benchmarks.gpu.bench import cases
    from benchmarks.gpu.profiling import profile as module
    from benchmarks.gpu.verdict import verdicts

    rows = (run.earlier("bench") or {"rows": []})["rows"]
    missed = {(case.key, v["by"]): None for case in cases().values() for v in verdicts(case, rows) if v["verdict"] == "MISS"}
    return {"skipped": "no row misses its target" if rows else "no row was measured"} if run.dry or not missed else module(run, list(missed))


def tune(run) -> dict:
    from benchmarks.gpu.tune import tune as module

    return {"skipped": "needs a GPU"} if run.dry else module(run)


def show(run, part: str, found: dict) -> None:
    if part == "bench" and "rows" in found:
        from benchmarks.gpu.bench import cases
        from benchmarks.gpu.verdict import report

        text = report(list(cases().values()), found["rows"])
        (run.folder / "table.txt").write_text(text + "\n")
        print(text)
        found = {k: v for k, v in found.items() if k != "rows"}
    for key, value in found.items():
        if key not in run.facts and value not in ([], {}, None):
            text = f"{value:.4g}" if isinstance(value, float) else str(value)
            print(f"  {key}: {text[:1500]}")
    sys.stdout.flush()


def write_logs(run) -> None:
    """The ends of what the workers said, in one file."""
    logs = sorted(run.scratch.glob("*/worker*.log"))
    (run.folder / "workers.log").write_text("\n".join(f"==== {p.relative_to(run.scratch)}\n{p.read_text(errors='replace')[-30_000:]}" for p in logs))


if __name__ == "__main__":
    sys.exit(main())
