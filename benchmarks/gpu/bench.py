"""Every case on every backend and peer: checked against float64, timed only if right, percent of the floor, extra memory. One row at a time.

`python -m benchmarks.gpu.bench` is the process that measures; it takes rows from a queue ("warm": compiles and checks only, eight at a time).
"""

import functools
import gc
import json
import os
import sys
import traceback
from pathlib import Path

import torch

from benchmarks import peers as peer_module
from benchmarks.gpu import cases as case_module
from benchmarks.gpu.queue import Queue, work
from benchmarks.gpu.queue_plugin import FAULT, cuda_fault
from benchmarks.gpu.spot import spot_errors
from benchmarks.gpu.timing import Clock
from benchmarks.harness import ROOT
from pix2rep_kernels.testing import backends, error, tolerance

GPU = ("triton", "cuda")
HANG_S = {"warm": 90, "time": 90}
LONG = 200_000  # rows beyond which one call takes seconds


SMALL = bool(os.environ.get("PIX2REP_SMALL"))


class Wrong(Exception):
    """A result outside of what is allowed; it gets no time."""


def pieces(cases: list) -> list[str]:
    """Names of all rows, those that decide first: ours, then the peers that the targets name, then the rest; calls of seconds last."""
    found = []
    for order, case in enumerate(cases):
        for who in [*GPU, *(f"peer:{name}" for name in case.peers)]:
            if who in GPU and who not in backends(case.op):
                continue
            named = who.removeprefix("peer:") in (*GPU, "eager", *(case.target.over if case.target else ()))
            long = case.fields.get("N", 0) > LONG and case.op == "infonce"
            found.append((long, who not in GPU and not named, who not in GPU, order, f"{case.key}|{who}"))
    return [name for *_, name in sorted(found)]


@functools.lru_cache(maxsize=1)
def _truth(key: str, device: str):
    """Small inputs, float64's value and gradients, and the errors that eager makes in the case's own dtype: the same for everyone."""
    case = cases()[key]
    torch.manual_seed(0)
    small = case.small(device)
    reference = case.peers["eager"] if "eager" in case.peers else case_module.EAGER[case.op](case)
    truth = case_module.gradients(reference, case_module.in_float64(small))
    eager = case_module.gradients(reference, small)
    return small, truth, errors(eager, truth)


def errors(got: list, truth: list) -> dict[str, float]:
    """Relative error of the value, and the largest of a gradient: a sum can be right by luck, a gradient hardly."""
    return {"error_value": error(got[:1], truth[:1]), "error_gradient": error(got[1:], truth[1:])}


def check(case, who: str, call, device: str) -> dict:
    """Errors on the small inputs.

    Raises:
        Wrong: above twice eager's at the same precision and one rounding. That of the value is one number's, small by luck: eager's gradient says more.
    """
    small, truth, own = _truth(case.key, device)
    found = errors(case_module.gradients(call, small), truth)
    for name, value in found.items():
        allowed = tolerance(max(own[name], own["error_gradient"]), case.dtype)
        if not value <= allowed:
            raise Wrong(f"{name.replace('_', ' of the ')} {value:.2e}, allowed {allowed:.2e}: twice eager's and a rounding of {case.dtype}")
    return found | {"eager_error_value": own["error_value"], "eager_error_gradient": own["error_gradient"]}


def row(case, who: str, device: str, rates: dict, warm: bool = False) -> dict:
    """One row. `warm`: only what compiles."""
    call = functools.partial(case.ours, who) if who in GPU else case.peers[who.removeprefix("peer:")]
    found = {"op": case.op, "case": case.name, "dtype": str(case.dtype).removeprefix("torch."), "who": who, **case.fields}
    needs = case.eager_bytes if who in ("peer:eager", "peer:compile") else 0
    if needs > case_module.LIMIT_BYTES and not SMALL:
        return found | {"skipped": f"needs {needs / 1e9:.0f} GB"}
    inputs = None
    try:
        found |= check(case, who, call, device)
        long = case.fields.get("N", 0) > LONG and case.op == "infonce"
        if warm and (long or who not in GPU):
            return found
        torch.manual_seed(1)
        inputs = case.make(device)
        step = functools.partial(case_module.gradients, call, inputs)
        if warm:
            step()
            return found
        found |= Clock(device, 0.3 if who in GPU else 0.2)(step)
        found["floor_s"] = case.floor_s(rates)
        found["percent_of_floor"] = 100 * found["floor_s"] / found["median_s"] if found["median_s"] else None
        if case.op == "infonce" and who in GPU:
            found |= spot_errors(case, who, inputs)
            bound = max(tolerance(found["eager_error_gradient"], case.dtype), tolerance(found["eager_error_value"], case.dtype))
            if not max(found["spot_error_value"], found["spot_error_gradient"]) <= bound:
                raise Wrong(f"at full size: losses {found['spot_error_value']:.2e}, gradient {found['spot_error_gradient']:.2e}, allowed {bound:.2e}")
    except torch.OutOfMemoryError:
        found = _untimed(found, "out of memory")
    except Wrong as wrong:
        found = _untimed(found, f"wrong: {wrong}")
    except Exception as broken:  # noqa: BLE001 - a peer that fails is a result
        traceback.print_exc()
        found = _untimed(found, f"{type(broken).__name__}: {(str(broken).splitlines() or [''])[0][:200]}")
    finally:
        step = call = inputs = None
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
    return found


def _untimed(found: dict, why: str) -> dict:
    return {k: v for k, v in found.items() if k not in ("median_s", "best_s", "iqr_s", "percent_of_floor")} | {"failed": why}


@functools.cache
def cases() -> dict:
    """Key -> case; tiny ones where PIX2REP_SMALL is set."""
    peers, _ = peer_module.available("cuda" if torch.cuda.is_available() else "cpu")
    return {case.key: case for case in case_module.all_cases(peers, small=SMALL)}


def worker() -> None:
    queue, mode = Queue(os.environ["PIX2REP_QUEUE"]), os.environ["PIX2REP_MODE"]
    rates = json.loads(Path(os.environ["PIX2REP_RATES"]).read_text())
    device = "cuda" if torch.cuda.is_available() else "cpu"
    while (name := queue.take()) is not None:
        key, _, who = name.rpartition("|")
        torch._dynamo.reset()  # its limit of recompilations would silently leave a compiled peer eager
        found = row(cases()[key], who, device, rates, mode == "warm")
        fault = "failed" in found and cuda_fault()
        queue.record(name, outcome="row", row=found | ({"failed": f"{fault}: {found['failed']}"} if fault else {}))
        if fault:
            os._exit(FAULT)


def bench(run, rates: dict) -> dict:
    """All rows that this code has no result of yet; written as they come."""
    environment = {"PIX2REP_RATES": str(run.scratch / "rates.json")}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    (run.scratch / "rates.json").write_text(json.dumps(rates))
    _, absent = peer_module.available(run.device)
    before = run.earlier("bench") or {"rows": []}
    rows = {_name(r): r for r in before["rows"] if "failed" not in r and "skipped" not in r}
    every = pieces(list(cases().values()))
    wanted = [name for name in every if name not in rows]
    command = [sys.executable, "-m", "benchmarks.gpu.bench"]
    said = []
    if not run.dry:
        compiled = [n for n in wanted if n.rpartition("|")[2] not in ("peer:eager", "peer:chunked", "peer:compile")]
        queue = Queue.start(run.scratch / "warm", compiled)
        said += work(queue, command, 8, run.seconds(75), HANG_S["warm"], environment | {"PIX2REP_MODE": "warm"}, ROOT)
        faults = {n: o for n, o in queue.outcomes().items() if o["outcome"] in ("died", "hung")}
        rows |= {n: _shell(n) | {"failed": f"{o['outcome']}: {o['why']}"} for n, o in faults.items()}
        wanted = [n for n in wanted if n not in faults]
    queue = Queue.start(run.scratch / "bench", wanted)

    def so_far() -> dict:
        for name, outcome in queue.outcomes().items():
            rows[name] = outcome.get("row") or _shell(name) | {"failed": f"{outcome['outcome']}: {outcome['why']}"}
        order = {key: i for i, key in enumerate(cases())}
        ordered = [rows[n] for n in sorted((n for n in rows if n in every), key=lambda n: (order[n.rpartition("|")[0]], every.index(n)))]
        compare(ordered)
        return {"rows": ordered, "not_reached": queue.left(), "peers_absent": absent, "workers_said": said}

    given = environment | {"PIX2REP_MODE": "time"}
    said += work(queue, command, 1, run.seconds(run.bench_s), HANG_S["time"], given, ROOT, lambda: run.write("bench", **so_far()))
    return so_far()


def _name(found: dict) -> str:
    return f"{found['op']}|{found['case']}|{found['dtype']}|{found['who']}"


def _shell(name: str) -> dict:
    return dict(zip(("op", "case", "dtype", "who"), name.split("|"), strict=True))


def compare(rows: list[dict]) -> None:
    """Into each row of ours, how many times faster it is than the fastest peer that is right."""
    for ours in rows:
        same = [r for r in rows if r["who"].startswith("peer:") and all(r[k] == ours[k] for k in ("op", "case", "dtype")) and "median_s" in r]
        if same and "median_s" in ours and ours["who"] in GPU and ours["median_s"]:
            best = min(same, key=lambda r: r["median_s"])
            ours |= {"times_best_peer": best["median_s"] / ours["median_s"], "best_peer": best["who"].removeprefix("peer:")}


if __name__ == "__main__":
    worker()
