"""The op tests on a GPU: every op and backend early, many processes, because a test's time there is that of compiling its kernels."""

import json
import os
import re
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path

from benchmarks.gpu.queue import Queue, work
from benchmarks.harness import ROOT
from pix2rep_kernels.dispatch import OPS

HANG_S = 120
# What needs no GPU has run without one: threads and instruction sets of the CPU, memory of the CPU, arguments, machine code read from elsewhere.
ELSEWHERE = re.compile(r"threads|instruction_set|memory|native_op|raw_op|bad_input|_static|compile_for|fit_and_use|order_of_threads")


def files() -> list[str]:
    named = [p for op in OPS for p in sorted((ROOT / "tests").glob(f"test_{op}*.py")) if "hypothesis" not in p.name and "loss" not in p.name]
    return [str(p.relative_to(ROOT)) for p in (ROOT / "tests/test_gpu.py", ROOT / "tests/test_smoke.py", *named) if p.exists()]


def in_turn(found: list[tuple[str, str]]) -> list[str]:
    """Names of (group, name) pairs, one of each group after the other, groups in order of appearance."""
    groups = defaultdict(list)
    for group, name in found:
        groups[group].append(name)
    ordered = []
    while groups:
        for group in list(groups):
            ordered.append(groups[group].pop(0))
            if not groups[group]:
                del groups[group]
    return ordered


def group_of(nodeid: str, backend: str) -> str:
    """Tests that say much the same: of one function and backend."""
    return f"{nodeid.partition('[')[0]} {backend}"


def summary(queue: Queue, said: list[str]) -> dict:
    outcomes = queue.outcomes()
    counts = Counter(o["outcome"] for o in outcomes.values())
    by_backend = defaultdict(Counter)
    for name, o in outcomes.items():
        op = next((op for op in OPS if f"/test_{op}" in name or f"[{op}" in name), "all")
        backend = next((b for b in ("triton", "cuda") if re.search(rf"\b{b}\b|_{b}", name.partition("::")[2])), "")
        by_backend[f"{op} {backend}".strip()][o["outcome"]] += 1
    left = queue.left()
    return {
        "counts": dict(counts), "not_run": len(left), "not_run_names": left[:40],
        "by_op_and_backend": {k: dict(v) for k, v in sorted(by_backend.items())},
        "failed": [{"test": n, **{k: o[k] for k in ("outcome", "why") if k in o}} for n, o in outcomes.items() if o["outcome"] not in ("passed", "skipped")],
        "skipped": dict(Counter(o.get("why", "") for o in outcomes.values() if o["outcome"] == "skipped")),
        "slowest": sorted(((round(o.get("seconds", 0), 1), n) for n, o in outcomes.items()), reverse=True)[:10], "workers_said": said,
    }  # fmt: skip


def suite(
    folder: Path, seconds: float, workers: int, pytest: tuple[str, ...] = (), chosen: list[str] | None = None, write: Callable[..., object] | None = None
) -> dict:
    """Passed, failed, skipped and not reached tests, by op and backend; what was held by a process that died is "died"."""
    command = [sys.executable, "-m", "pytest", "-p", "benchmarks.gpu.queue_plugin", "-p", "no:cacheprovider", "-q", "--tb=short", *pytest]
    environment = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]), "OMP_NUM_THREADS": "1"}
    environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # other projects' plugins
    queue = Queue.start(folder, [])
    targets = chosen or files()
    listed = subprocess.run(
        [*command, "--collect-only", *targets], cwd=ROOT, env=os.environ | environment | {"PIX2REP_COLLECT": str(folder / "found.json")},
        capture_output=True, text=True,
    )  # fmt: skip
    if not (folder / "found.json").exists():
        return {"counts": {}, "failed": [{"test": "collection", "outcome": "died", "why": (listed.stdout + listed.stderr)[-2000:]}]}
    queue = Queue.start(folder, in_turn([(g, n) for g, n in json.loads((folder / "found.json").read_text())]))
    tick = write and (lambda: write("suite", broken="not at its end", **summary(queue, [])))
    return summary(queue, work(queue, [*command, *targets], workers, seconds, HANG_S, environment, ROOT, tick))
