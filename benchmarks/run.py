"""Every measurement: `python -m benchmarks.run [op ...]`; ops are the eight words and `losses`, by default all.

Forward, backward and both of one training step: median and interquartile range after warm-up, ours and the peers in turns. Peak memory beyond the inputs,
gradients counted (CPU: a fresh process; CUDA: the allocator). Error of value and gradients against float64 beside eager's own; a size whose error is above
twice eager's and one rounding is refused: it gets no time. Percent of the floor: bytes, FLOP and exponentials counted from the shapes, at this machine's
own rates. A peer that would need more memory than is free, or longer than --limit-s by its growth so far, is not started; the row says what it would need.
"""

import argparse
import functools
import importlib
import math
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import growth, harness
from benchmarks.case import GIB, Case, Peer, doubled, errors, step
from benchmarks.harness import Clock, interleaved, summary
from pix2rep_kernels.dispatch import OPS
from pix2rep_kernels.testing import backends, tolerance

PASSES = ("forward", "backward", "both")
FREE = 0.8  # of the free memory a peer may take
UNLIKE = {2: 5e-2, 4: 1e-3, 8: 1e-6}  # bytes of the dtype -> error above which a peer computes something else
FIGURES = ("infonce", "crosscorr", "warp", "joint", "lncc", "pool", "align", "entropy", "losses")
MEMORY = """
from benchmarks.run import prepared, take
def prepare():
    return prepared(*arguments)
def work(made):
    take(*made)
"""


def module(op: str):
    return importlib.import_module("benchmarks.losses" if op == "losses" else f"benchmarks.bench_{op}")


@dataclass
class Checked:
    """A side of a case after its check: errors by output, eager's own, and why it gets no time."""

    call: Callable
    errors: dict[str, float]
    eager_errors: dict[str, float]
    refused: str | None


def call_of(case: Case, who: str, backend: str) -> Callable:
    return functools.partial(case.ours, backend) if who == "ours" else case.peers[who].call


def checked(case: Case, device: str, backend: str, who: str = "ours") -> Checked:
    """The error of `who` at the small size; ours may err twice as much as eager and one rounding, a peer as far as rounding can take it."""
    small = case.small(device, case.dtype)
    first = next(iter(case.peers.values()))
    peer = case.peers.get(who, first)
    eager = peer.truth or first.call
    truth = step(eager, doubled(small))
    outputs = 1 if small.upstream is None else len(small.upstream)
    own = errors(step(eager, small), truth, outputs)
    call = call_of(case, who, backend)
    if peer.unlike and who != "ours":
        return Checked(call, {}, own, None)
    found = errors(step(call, small), truth, outputs)
    worst = max(found.values(), key=lambda e: math.inf if math.isnan(e) else e)
    bound = tolerance(max(own.values()), case.dtype) if who == "ours" else UNLIKE[case.dtype.itemsize]
    reason = None if worst <= bound else f"error {worst:.1e} above {bound:.1e}" + (", twice eager's own and one rounding" if who == "ours" else "")
    return Checked(call, found, own, reason)


def prepared(op: str, name: str, who: str, backend: str, device: str, threads: str):
    """For the process that memory is measured in: the call, warm, and its inputs."""
    torch.set_num_threads(int(threads))
    case = next(c for c in module(op).cases(True, device) if c.name == name)
    call = call_of(case, who, backend)
    slow = case.peers.get(who, Peer(call)).slow_start  # compiles for a shape
    made = case.make(device, case.dtype) if slow else None
    take(call, made or case.small(device, case.dtype))
    return call, made or case.make(device, case.dtype)


def take(call, inputs) -> None:
    step(call, inputs)


class Run:
    """One invocation: what was asked, where results go, what is there already."""

    def __init__(self, asked: argparse.Namespace):
        self.asked, self.device = asked, asked.device
        self.clock = Clock(asked.device, asked.cpu_time)
        self.facts = harness.surroundings("benchmarks.run") | {"threads": torch.get_num_threads(), "clock": "processor" if asked.cpu_time else "wall"}
        if self.device == "cuda":
            self.facts["device"] = torch.cuda.get_device_name()
        self.facts["memory_bytes"] = harness.total_bytes(self.device)
        self.slug = "cpu" if self.device == "cpu" else re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
        self.rates: dict[str, float] = {}
        self.timed_rows: list[tuple[Case, dict]] = []

    def path(self, op: str) -> Path | None:
        where = self.asked.json
        return where if where is None or where.suffix == ".json" else where / self.slug / f"{op}.json"

    def ours(self, case: Case) -> list[str]:
        ops = (case.op,) if case.op in OPS else case.fields["ops"]
        here = [b for b in ("cpu", "triton", "cuda", "reference") if all(b in backends(op, self.device) for op in ops)]
        wanted = self.asked.backends or [b for b in here if b != "reference"]
        return [b for b in wanted if b in here or b == "auto"]

    def peers(self, case: Case) -> dict[str, Peer]:
        wanted = self.asked.peers
        if wanted is None or wanted == ["all"]:
            slow = wanted is not None or self.asked.large
            return {name: peer for name, peer in case.peers.items() if slow or not peer.slow_start}
        return {name: peer for name, peer in case.peers.items() if name in wanted}

    def sides(self, case: Case) -> dict[str, dict]:
        """Names of our backends and of the peers, and the beginning of each one's row."""
        ours = {"ours" if b == "cpu" else f"ours:{b}": {"backend": b} for b in self.ours(case)}
        return ours | {name: {} for name in self.peers(case)}

    def measure(self, case: Case, before: list[dict]) -> list[dict]:
        """A row for each of our backends and each peer."""
        rows = self.sides(case)
        steps, inputs = {}, []

        def given():
            inputs or inputs.append(case.make(self.device, case.dtype))
            return inputs[0]

        for who, row in rows.items():
            mine = "backend" in row
            peer = None if mine else case.peers[who]
            if reason := self.too_much(case, who, peer, before):
                row |= reason
                continue
            try:
                found = checked(case, self.device, row.get("backend", ""), "ours" if mine else who)
                row |= {"errors": found.errors, "eager_errors": found.eager_errors}
                if found.refused:
                    row["refused"] = found.refused
                    continue
                if not self.asked.no_memory and "both" in self.asked.passes:
                    row["extra_MiB"] = self.memory(case, "ours" if mine else who, row.get("backend", ""), found.call, given)
            except Exception as broken:  # noqa: BLE001 - a peer that fails is a result
                row["failed"] = harness.sentence(broken)
                continue
            steps[who] = functools.partial(self.passes, found.call, given())
        compiling = tuple(who for who in steps if self.device == "cuda" or who in case.peers and case.peers[who].slow_start)
        taken = interleaved(steps, self.clock, self.asked.repeats, self.asked.budget_s, compiling)
        for who, times in taken.items():
            if isinstance(times, str):
                rows[who]["failed"] = times
            else:
                rows[who] |= self.timed(times)
                self.floors(case, rows[who])
        about = {"op": case.op, "case": case.name, **case.fields, "dtype": str(case.dtype).removeprefix("torch.")}
        about |= {k: v for k, v in (("layout", case.layout), ("series", case.series), ("n", case.n), ("paper", case.paper), ("target", case.target)) if v}
        made = [about | {"who": who} | row for who, row in rows.items()]
        self.timed_rows += [(case, row) for row in made if "floor_s" in row]
        return made

    def passes(self, call: Callable, inputs, mark: Callable) -> None:
        if self.asked.passes == ["forward"]:
            with torch.no_grad():
                mark()
                call(*inputs.arguments)
                mark()
        else:
            step(call, inputs, mark)

    def timed(self, times: list[list[float]]) -> dict:
        columns = {"forward": [t[0] for t in times]}
        if len(times[0]) == 2:
            columns |= {"backward": [t[1] for t in times], "both": [sum(t) for t in times]}
        return {name: summary(column) for name, column in columns.items() if name in self.asked.passes}

    def floors(self, case: Case, row: dict) -> None:
        row["floor_s"] = {name: case.floor_s(self.rates, name) for name in PASSES if name in row}
        row["percent_of_floor"] = {name: 100 * floor / row[name]["median_s"] for name, floor in row["floor_s"].items()}

    def measure_ceilings(self) -> None:
        """The best of each rate in this run counts, for the rows that are there already too: a busy machine must not lower the floor."""
        if self.device == "cpu" or not self.rates:
            for name, rate in harness.ceilings(self.device, self.clock).items():
                self.rates[name] = max(rate, self.rates.get(name, 0))
        for case, row in self.timed_rows:
            self.floors(case, row)

    def memory(self, case: Case, who: str, backend: str, call: Callable, given: Callable) -> float:
        if self.device == "cuda":
            inputs = given()
            step(call, inputs)
            return harness.cuda_peak_mib(lambda: step(call, inputs))
        op = case.op if case.op in OPS else "losses"
        return harness.peak_mib(MEMORY, op, case.name, who, backend, self.device, torch.get_num_threads())

    def too_much(self, case: Case, who: str, peer: Peer | None, before: list[dict]) -> dict | None:
        """Why this side is not started: memory, or time by its growth at smaller sizes."""
        free = harness.free_bytes(self.device)
        if peer and peer.bytes > FREE * free:
            return {"skipped": f"would need {peer.bytes / GIB:,.1f} GiB, {free / GIB:.1f} are free", "needs_bytes": peer.bytes}
        seconds = growth.predicted(before, case, who)
        if seconds and seconds > self.asked.limit_s:
            return {"skipped": f"would take {seconds:,.0f} s", "needs_s": seconds}
        return None

    def op(self, op: str) -> None:
        wanted = self.asked.sizes
        every = [c for c in module(op).cases(self.asked.large, self.device) if not wanted or any(w == c.name or f"{w} " in f"{c.name} " for w in wanted)]
        if not every:
            raise SystemExit(f"{op}: no size is named {wanted}; --large has more")
        every.sort(key=lambda c: (c.series, c.n))
        self.timed_rows = []
        self.measure_ceilings()
        path = self.path(op)
        book = growth.Book(path if self.asked.resume else None, self.facts | {"ceilings": self.rates})
        print(header(op, self.rates))
        for case in every:
            if book.has(case, list(self.sides(case))):
                continue
            self.measure_ceilings()
            rows = self.measure(case, book.rows)
            book.add(case, rows)
            for row in rows:
                print(line(row, rows), flush=True)
            if path:
                book.write(path)
        for name, reason in {k: v for c in every for k, v in c.absent.items()}.items():
            print(f"  without {name}: {reason}")
        for row in growth.exponents(book.rows):
            print(growth_line(row))


def header(op: str, rates: dict) -> str:
    ceilings = ", ".join(f"{name} {rate:.3g}/s" for name, rate in rates.items() if name != "shared_units")
    names = "".join(f"{name:>11}" for name in ("forward ms", "backward ms", "both ms", "iqr ms", "% floor", "ratio", "MiB", "error", "eager's"))
    return f"\n{op}: ceilings {ceilings}\n{'':58}{names}"


def line(row: dict, rows: list[dict]) -> str:
    """One side of a case; the ratio is its time over ours."""
    start = f"{row['case'][:40]:42}{row['who'][:15]:16}"
    for word in ("refused", "skipped", "failed"):
        if word in row:
            return f"{start}{word}: {row[word]}"
    which = next(name for name in ("both", "backward", "forward") if name in row)
    mine = next((r[which]["median_s"] for r in rows if "backend" in r and which in r), None)
    cells = [f"{1e3 * row[name]['median_s']:.3f}" if name in row else "" for name in ("forward", "backward", "both")]
    cells += ["" if row[which]["iqr_s"] is None else f"{1e3 * row[which]['iqr_s']:.3f}", f"{row['percent_of_floor'][which]:.1f}"]
    cells += ["" if mine is None else f"{row[which]['median_s'] / mine:.2f}", f"{row['extra_MiB']:.1f}" if "extra_MiB" in row else ""]
    cells += [f"{max(found.values()):.1e}" if found else "" for found in (row["errors"], row["eager_errors"])]
    return start + "".join(f"{cell:>11}" for cell in cells)


def growth_line(row: dict) -> str:
    powers = ", ".join(f"{name} N^{row[name]:.2f}" for name in ("time", "memory") if name in row)
    return f"  growth of {row['who']} on {row['series']}, {row['from']} to {row['to']}: {powers}"


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__.partition("\n")[0])
    made.add_argument("ops", nargs="*", choices=[*FIGURES, []], metavar="op", help=f"of {', '.join(FIGURES)}; default all")
    made.add_argument("--sizes", nargs="+", help="names of cases, or words of them (N=4096)")
    made.add_argument("--backends", nargs="+", choices=("auto", "cpu", "triton", "cuda", "reference"), help="ours; default all but reference")
    made.add_argument("--peers", nargs="*", help="names, or all; default all that start fast, none without a name")
    made.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    made.add_argument("--passes", nargs="+", choices=PASSES, default=list(PASSES), help="forward alone runs without a graph")
    made.add_argument("--json", type=Path, help="a file, or the folder that gets <device>/<op>.json")
    made.add_argument("--resume", action="store_true", help="rows of that file stay; those of this commit are not measured again")
    made.add_argument("--threads", type=int, default=2)
    made.add_argument("--cpu-time", action="store_true", help="processor seconds, for a busy machine; with --threads 1")
    made.add_argument("--repeats", type=int, default=7)
    made.add_argument("--budget-s", type=float, default=2.0, help="repeat one side of a case at most this long")
    made.add_argument("--limit-s", type=float, default=20.0, help="do not start a side that would take longer, by its smaller sizes")
    made.add_argument("--no-memory", action="store_true")
    made.add_argument("--large", action="store_true", help="every size and the peers that compile: hours")
    return made


def main(arguments: list[str] | None = None) -> int:
    asked = parser().parse_args(arguments)
    if asked.cpu_time and (asked.threads, asked.device) != (1, "cpu"):
        raise SystemExit(f"--cpu-time is for --threads 1 and --device cpu, got {asked.threads} and {asked.device}")
    torch.set_num_threads(asked.threads)
    run = Run(asked)
    for op in asked.ops or FIGURES:
        run.op(op)
    return 0


if __name__ == "__main__":
    sys.exit(main())
