"""`python -m benchmarks.gpu` where there is no GPU: what decides about rows, tests and faults. `tests/rehearse_gpu.py` runs the rest on a pretended one."""

import argparse
import json
import sys
import time

import pytest
import torch

from benchmarks.gpu import bench, cases, profiling, sanitizer, suite, verdict
from benchmarks.gpu.queue import Queue, work
from benchmarks.gpu.run import Run
from benchmarks.gpu.spot import spot_errors
from benchmarks.gpu.timing import Clock
from benchmarks.harness import ROOT
from benchmarks.peers import eager

WORKER = """
import os, sys, time
from benchmarks.gpu.queue import Queue
queue = Queue(os.environ["PIX2REP_QUEUE"])
while (name := queue.take()) is not None:
    if name == "dies":
        sys.exit("a fault")
    if name == "hangs":
        time.sleep(60)
    queue.record(name, outcome="passed")
"""


def infonce_case(negatives="cross"):
    return next(c for c in cases.all_cases({"eager": eager}, small=True) if c.op == "infonce" and c.fields["negatives"] == negatives)


def measured(who, ms, **fields):
    return {
        "op": "infonce", "case": "c", "dtype": "bfloat16", "who": who, "median_s": ms / 1e3, "floor_s": 1e-3, "percent_of_floor": 100 / ms, "extra_MiB": 10.0,
        "error_gradient": 1e-3, **fields,
    }  # fmt: skip


def test_every_name_is_taken_once_and_a_death_or_a_hang_costs_one(tmp_path):
    names = ["a", "dies", "b", "hangs", "c", *map(str, range(10))]
    queue = Queue.start(tmp_path, names)
    begin = time.monotonic()
    work(queue, [sys.executable, "-c", WORKER], 3, seconds=30, hang_s=1.5, environment={"PYTHONPATH": str(ROOT)})
    assert time.monotonic() - begin < 20
    outcomes = queue.outcomes()
    assert {n: o["outcome"] for n, o in outcomes.items()} == {n: {"dies": "died", "hangs": "hung"}.get(n, "passed") for n in names}
    assert "a fault" in outcomes["dies"]["why"] and queue.left() == []
    assert sorted(e["held"] for e in queue.journal() if "held" in e) == sorted(names)


def test_time_that_is_up_leaves_the_rest_unnamed(tmp_path):
    queue = Queue.start(tmp_path, ["hangs", "a", "b"])
    work(queue, [sys.executable, "-c", WORKER], 1, seconds=1.0, hang_s=60, environment={"PYTHONPATH": str(ROOT)})
    assert {n: o["outcome"] for n, o in queue.outcomes().items()} == {"hangs": "out of time"} and queue.left() == ["a", "b"]


def test_a_command_that_cannot_start_is_not_started_for_ever(tmp_path):
    queue = Queue.start(tmp_path, ["a", "b"])
    said = work(queue, [sys.executable, "-c", "raise SystemExit('no such thing')"], 2, seconds=20, hang_s=5)
    assert len(said) >= 2 and "no such thing" in said[0] and queue.left() == ["a", "b"]


def test_each_group_of_tests_comes_early():
    found = [("warp triton", f"w{i}") for i in range(4)] + [("pool cuda", "p0"), ("pool cuda", "p1"), ("lncc triton", "l0")]
    assert suite.in_turn(found) == ["w0", "p0", "l0", "w1", "p1", "w2", "w3"]
    assert suite.group_of("tests/test_warp.py::test_x[triton-2-linear]", "triton") == "tests/test_warp.py::test_x triton"
    assert all(suite.ELSEWHERE.search(name) for name in ("test_bad_input[a]", "test_same_bits_for_any_number_of_threads"))
    assert not any(suite.ELSEWHERE.search(name) for name in ("test_values_and_gradients[triton-2]", "test_gpu_kernels_sort_where_determinism_is_asked_for"))


def test_what_is_wrong_gets_no_time():
    """Of a value and of a gradient alone: a gradient that is off by a hundredth under a value that is right."""
    case = infonce_case()

    class Off(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, value, gradient):
            ctx.gradient = gradient
            return x * value

        @staticmethod
        def backward(ctx, grad):
            return grad * ctx.gradient, None, None

    def run(value, gradient):
        case.peers["trial"] = lambda a, b: Off.apply(eager(a, b, "cross", cases.TEMPERATURE), value, gradient)
        bench.cases()[case.key] = case
        bench._truth.cache_clear()
        return bench.row(case, "peer:trial", "cpu", dict.fromkeys(("bf16_flop", "ex2", "copy_bytes"), 1e9))

    right = run(1.0, 1.0)
    assert right["median_s"] > 0 and right["error_gradient"] < 0.01 and "failed" not in right
    for value, gradient, named in ((1.0, 1.05, "gradient"), (1.05, 1.0, "value"), (1.0, float("nan"), "gradient")):
        refused = run(value, gradient)
        assert refused["failed"].startswith(f"wrong: error of the {named}") and "median_s" not in refused


@pytest.mark.parametrize("negatives", ["cross", "joint"])
def test_some_anchors_say_what_all_would(negatives):
    case = infonce_case(negatives)
    inputs = case.make("cpu")
    found = spot_errors(case, "reference", inputs)
    assert max(found.values()) < 5e-3  # gradients are bfloat16
    grad = inputs[0].grad.double()
    (exact,) = torch.autograd.grad(eager(*(wide := cases.in_float64(inputs)), negatives, cases.TEMPERATURE), wide[:1])
    assert ((grad - exact).norm() / exact.norm()).item() == pytest.approx(found["spot_error_gradient"], rel=0.05)  # 48 rows: all are asked


def test_lines_and_targets():
    target = cases.Target(ms=6.0, over={"memeff": 3.0, "eager": 6.0}, extra_MiB=5.0)
    case = cases.Case("infonce", "c", torch.bfloat16, None, None, {}, None, None, target=target)
    rows = [measured("triton", 5.0), measured("cuda", 7.0), measured("peer:eager", 29.0), {**measured("peer:memeff", 1.0), "failed": "wrong: x"}]
    del rows[3]["median_s"]
    bench.compare(rows)
    assert rows[0]["times_best_peer"] == pytest.approx(5.8) and rows[0]["best_peer"] == "eager"
    found = {v["what"]: v["verdict"] for v in verdict.verdicts(case, rows)}
    assert found == {"ms": "PASS", "extra_MiB": "MISS", "times memeff": "unknown: wrong: x", "times eager": "MISS"}
    assert verdict.line(rows[0]).split() == ["infonce", "c", "bfloat16", "triton", "5.000", "20.0", "5.80", "10", "1.0e-03"]
    assert verdict.line(rows[3]).endswith("wrong: x")
    assert verdict.winners(rows)["infonce"].startswith("triton: cuda faster in 0 of 1")
    assert "MISS" in verdict.report([case], rows)


def test_the_design_s_rows_are_cases():
    every = {c.key: c.target for c in cases.all_cases({"eager": eager})}
    asked = {key: target for key, target in every.items() if target is not None}
    for d, ms, memeff in ((64, 6.24, 3), (128, 11.2, 2), (256, 22.2, 1.5)):
        target = asked[f"infonce|cross N=65536 D={d}|bfloat16"]
        assert (target.ms, target.over, target.extra_MiB) == (ms, {"memeff": memeff, "eager": 6.0}, 6 * 65536 * d * 4 / 2**20)
    assert asked["infonce|joint N=131072 D=256|bfloat16"] == cases.Target(300.0, extra_MiB=1024.0)
    assert asked["crosscorr|N=1048576 D=256|bfloat16"].ms == 1.12 and len(asked) == 14
    assert len({tuple(p.split("|")) for p in bench.pieces(cases.all_cases({"eager": eager}))}) == len(bench.pieces(cases.all_cases({"eager": eager})))


def test_results_of_this_very_code_are_taken_again(tmp_path, monkeypatch):
    def run(again=False):
        return Run(argparse.Namespace(dry_run=True, again=again, minutes=1, out=tmp_path))

    assert run().earlier("bench") is None
    run().write("bench", rows=[{"x": 1}])
    assert run().earlier("bench")["rows"] == [{"x": 1}] and run(again=True).earlier("bench") is None
    path = tmp_path / "rehearsal/bench.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sources": "other"}))
    assert run().earlier("bench") is None
    monkeypatch.setattr("benchmarks.gpu.run.ROOT", tmp_path)  # no git, as on a machine that got a copy
    monkeypatch.setenv("PIX2REP_COMMIT", "abc")
    assert run().facts["commit"] == "abc"


def test_what_the_tools_say():
    clean = "========= COMPUTE-SANITIZER\nran pool triton\n========= ERROR SUMMARY: 0 errors\n"
    assert sanitizer.judged(0, clean, True) == {"verdict": "clean"}
    assert "0 errors" not in sanitizer.judged(0, clean.replace("ran pool triton", ""), True)["verdict"]
    found = sanitizer.judged(0, "ran x\n========= Invalid __global__ read of size 4\n========= ERROR SUMMARY: 2 errors\n", True)
    assert found["verdict"] == "ERROR SUMMARY: 2 errors" and found["said"][0].startswith("Invalid")
    text = '==PROF==\n"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"\n"0","sums","Duration","us","12"\n"0","sums","Other","","1"\n'
    assert profiling.kernels(text) == [{"kernel": "sums", "Duration": "12 us"}] and profiling.kernels("nothing") == []


def test_a_call_is_timed():
    assert Clock("cpu")(lambda: time.sleep(0.01))["median_s"] >= 0.01


def test_objects_are_asked_whether_they_load():
    from benchmarks.gpu import build

    assert set(build.missing()) <= {"cpu", "cuda"}
