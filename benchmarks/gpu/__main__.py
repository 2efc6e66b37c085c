"""Everything that a GPU is needed for: `python -m benchmarks.gpu` (also `make gpu`), under eight minutes.

    suite      the op tests with real Triton and CUDA
    sanitizer  compute-sanitizer memcheck and racecheck over one small call of every op and backend
    ceilings   exponentials, multiply-adds, L2, atomics, copies, matrix products of this chip
    bench      every case: ours on each backend, peers, percent of the floor, extra memory, error against float64

Each part writes benchmarks/results/<device>/<part>.json with device, versions, commit and command as soon as it ends; a part (of `bench` a row) that is there
for this commit already is not run again. `--dry-run` rehearses everything on the CPU at tiny sizes: its numbers mean nothing and are written elsewhere.
"""

import argparse
import functools
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

if "--dry-run" in sys.argv:
    os.environ |= {"TRITON_INTERPRET": "1", "PIX2REP_EMULATE": "1"}

import torch

from benchmarks import peers as peer_module
from benchmarks.gpu import cases as case_module
from benchmarks.gpu.timing import Clock, extra_mib
from benchmarks.harness import ROOT, surroundings, write_json
from pix2rep_kernels.dispatch import OPS
from pix2rep_kernels.testing import backends, error

PARTS = ("suite", "sanitizer", "ceilings", "bench")
SANITIZED = "from benchmarks.gpu.small import run; run()"


class Run:
    """One run of the command: where results go, what is there already."""

    def __init__(self, asked: argparse.Namespace):
        self.dry, self.again, self.deadline = asked.dry_run, asked.again, time.monotonic() + asked.minutes * 60
        self.device = "cpu" if asked.dry_run else "cuda"
        name = "rehearsal" if asked.dry_run else re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
        self.folder = (asked.out or (ROOT / "build" if asked.dry_run else ROOT / "benchmarks/results")) / name
        self.facts = surroundings()
        self.facts["device"] = name if asked.dry_run else torch.cuda.get_device_name()
        self.facts["command"] = "python -m benchmarks.gpu " + " ".join(sys.argv[1:])

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def earlier(self, part: str) -> dict | None:
        """The result of `part` for this very commit."""
        path = self.folder / f"{part}.json"
        if self.again or not path.exists():
            return None
        found = json.loads(path.read_text())
        same = found.get("commit") == self.facts["commit"] and not self.facts["changed"]
        return found if same else None

    def write(self, part: str, **content) -> None:
        write_json(self.folder / f"{part}.json", self.facts | content)


def suite(run: Run) -> dict:
    """Passed, failed and skipped op tests, and the reasons."""
    files = [str(p) for op in OPS for p in sorted((ROOT / "tests").glob(f"test_{op}*.py")) if "hypothesis" not in p.name]
    command = [sys.executable, "-m", "pytest", "-q", "-rfs", "--tb=short", "-p", "no:cacheprovider"]
    command += [*files[:1], "--collect-only"] if run.dry else files
    try:
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=max(30, min(run.left() - 60, 240)))
        text = result.stdout
    except subprocess.TimeoutExpired as late:
        text = (late.stdout or b"").decode() + "\nstopped at the time limit"
    (run.folder / "suite.log").parent.mkdir(parents=True, exist_ok=True)
    (run.folder / "suite.log").write_text(text)
    return {"summary": text.strip().splitlines()[-1], "failed": re.findall(r"^FAILED (.*)", text, re.MULTILINE)}


def sanitizer(run: Run) -> dict:
    """What compute-sanitizer says of one small call of every op and backend."""
    tool = shutil.which("compute-sanitizer")
    found = {}
    for check in ("memcheck", "racecheck"):
        if tool is None and not run.dry:
            found[check] = "skipped: compute-sanitizer is not on PATH"
            continue
        prefix = [] if run.dry else [tool, "--tool", check, "--error-exitcode", "9"]
        limit = max(20, min(run.left() - 60, 90))
        try:
            result = subprocess.run([*prefix, sys.executable, "-c", SANITIZED], cwd=ROOT, capture_output=True, text=True, timeout=limit)
            said = [line.strip("= ") for line in (result.stdout + result.stderr).splitlines() if "SUMMARY" in line]
            found[check] = {"exit": result.returncode, "summary": said[-1] if said else result.stderr.strip()[-300:], "ran": result.stdout.split()[-60:]}
        except subprocess.TimeoutExpired:
            found[check] = "stopped at the time limit"
    return found


def ceilings(run: Run) -> dict:
    """Rates of this chip, a second."""
    from benchmarks.gpu.ceilings import measure

    return measure(Clock(run.device), small=run.dry)


def bench(run: Run, rates: dict) -> None:
    """Every case, one row a backend, written row by row."""
    peers, absent = peer_module.available(run.device)
    before = run.earlier("bench")
    rows = before["rows"] if before else []
    done = {(r["op"], r["case"], r["dtype"]) for r in rows}
    print(HEADER)
    for case in case_module.all_cases(peers, small=run.dry):
        key = (case.op, case.name, str(case.dtype).removeprefix("torch."))
        if key in done:
            continue
        if run.left() < 20:
            print("  (time is up: run again to go on)")
            break
        for row in measure(run, case, rates):
            rows.append({"op": key[0], "case": key[1], "dtype": key[2], **case.fields, **row})
            print(line(rows[-1]), flush=True)
        run.write("bench", peers_absent=absent, ceilings=rates, rows=rows)


def measure(run: Run, case, rates: dict):
    """One row for each of our backends and each peer, forward and backward."""
    clock = Clock(run.device)
    small = case.small(run.device)
    truth = case_module.gradients(case.peers.get("eager", next(iter(case.peers.values()), None)), case_module.in_float64(small)) if case.peers else None
    floor = case.floor_s(rates)
    eager_fits = run.dry or case.eager_bytes < case_module.LIMIT_BYTES
    calls = {b: (lambda *inputs, b=b: case.ours(b, *inputs)) for b in ("triton", "cuda") if b in backends(case.op, run.device)}
    calls |= {f"peer:{name}": peer for name, peer in case.peers.items() if eager_fits or name not in ("eager", "compile")}
    inputs = []
    best_peer = None
    found = []
    for name, call in calls.items():
        row = {"who": name, "floor_s": floor, "target": case.target}
        try:
            row["error"] = error(case_module.gradients(call, small), truth) if truth else None
            inputs = inputs or case.make(run.device)
            step = functools.partial(case_module.gradients, call, inputs)
            row |= clock(step)
            row["extra_MiB"] = extra_mib(step, run.device)
            row["percent_of_floor"] = case_module.share(row["median_s"], floor)
            if name.startswith("peer:"):
                best_peer = min(best_peer or row["median_s"], row["median_s"])
        except Exception as broken:  # noqa: BLE001 - a peer that fails, or runs out of memory, is a result
            row["failed"] = f"{type(broken).__name__}: {str(broken).splitlines()[0][:160]}"
            if run.device == "cuda":
                torch.cuda.empty_cache()
        found.append(row)
    for row in found:
        if best_peer and "median_s" in row and not row["who"].startswith("peer:"):
            row["ratio_to_best_peer"] = best_peer / row["median_s"]
        yield row


HEADER = f"{'op':10}{'case':32}{'dtype':10}{'who':14}{'ms':>10}{'% floor':>9}{'x peer':>8}{'MiB':>9}{'error':>10}  target"


def line(row: dict) -> str:
    start = f"{row['op']:10}{row['case']:32}{row['dtype']:10}{row['who']:14}"
    if "failed" in row:
        return start + row["failed"]
    mib = "" if row["extra_MiB"] is None else f"{row['extra_MiB']:.0f}"
    ratio = f"{row['ratio_to_best_peer']:.2f}" if "ratio_to_best_peer" in row else ""
    wrong = "" if row.get("error") is None else f"{row['error']:.1e}"
    return f"{start}{1e3 * row['median_s']:10.3f}{row['percent_of_floor']:9.1f}{ratio:>8}{mib:>9}{wrong:>10}  {row['target']}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.partition("\n")[0])
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=PARTS)
    parser.add_argument("--minutes", type=float, default=8.0, help="stop starting new work after this long")
    parser.add_argument("--out", type=Path, help="folder of the results (default benchmarks/results)")
    parser.add_argument("--again", action="store_true", help="run what this commit has results of, too")
    parser.add_argument("--dry-run", action="store_true", help="rehearse on the CPU, tiny")
    asked = parser.parse_args()
    if not asked.dry_run and not torch.cuda.is_available():
        print("no CUDA device is visible; --dry-run rehearses on the CPU")
        return 1
    run = Run(asked)
    rates = None
    for part in asked.parts:
        found = run.earlier(part)
        print(f"\n{part}" + (" (of an earlier run of this commit)" if found and part != "bench" else ""), flush=True)
        if part == "bench":
            rates = rates or run.earlier("ceilings") or ceilings(run)
            bench(run, rates)
            continue
        if found is None:
            start = time.monotonic()
            found = {"suite": suite, "sanitizer": sanitizer, "ceilings": ceilings}[part](run)
            run.write(part, seconds=time.monotonic() - start, **found)
        if part == "ceilings":
            rates = found
        for key, value in found.items():
            if key not in run.facts:
                print(f"  {key}: {value:.4g}" if isinstance(value, float) else f"  {key}: {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
