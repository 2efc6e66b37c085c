"""The benchmarks themselves: every case builds and passes its check at its small size, a wrong kernel gets no time, counts and fits are right."""

import dataclasses
import json
import time

import matplotlib.image
import pytest
import torch

from benchmarks import growth, harness, plot, run
from benchmarks.case import Case, Inputs, Peer, Work, doubled, leaves
from pix2rep_kernels import native

pytestmark = pytest.mark.skipif(native.why_missing("cpu") is not None, reason="the CPU kernels are not built")


@pytest.mark.parametrize("op", run.FIGURES)
def test_every_case_is_right(op):
    cases = run.module(op).cases(large=True)
    assert len({case.name for case in cases}) == len(cases)
    assert {case.name for case in run.module(op).cases()} <= {case.name for case in cases}
    for case in cases:
        found = run.checked(case, "cpu", "cpu")
        assert found.refused is None, f"{case.name}: {found.refused}"
        assert len(found.errors) == len(found.eager_errors) >= 2
        assert all(work.bytes > 0 for work in case.work.values())


@pytest.mark.parametrize("op", run.FIGURES)
def test_peers_compute_the_same(op):
    case = run.module(op).cases()[0]
    for who, peer in case.peers.items():
        if not peer.slow_start and peer.bytes < 2**30:
            found = run.checked(case, "cpu", "cpu", who)
            assert found.refused is None, f"{who}: {found.refused}"


@pytest.mark.parametrize("op", run.FIGURES)
def test_cases_of_a_gpu_build(op):
    """Their checks run here at the small size, in a GPU's dtype."""
    cases = run.module(op).cases(large=True, device="cuda")
    assert len({case.name for case in cases}) == len(cases)
    assert run.checked(cases[0], "cpu", "cpu").refused is None


def squares(n=64, ours=None, **options) -> Case:
    """A case of one product, whose answers are known."""

    def make(device, dtype):
        return Inputs([torch.arange(1.0, n + 1, device=device).to(dtype).requires_grad_()])

    def eager(x):
        return x.square().sum()

    facts = {"work": {"forward": Work(bytes=4.0 * n), "backward": Work(bytes=8.0 * n)}, "series": "s", "n": n, "peers": {"eager": Peer(eager)}}
    return Case("warp", f"N={n}", torch.float32, {"N": n}, make, make, ours or (lambda backend, x: eager(x)), **facts | options)


def measured(case, *arguments, before=()):
    asked = run.parser().parse_args(["warp", "--device", "cpu", "--backends", "cpu", "--no-memory", "--repeats", "2", *arguments])
    made = run.Run(asked)
    made.rates |= {"copy_bytes": 1e9, "fp32_flop": 1e9, "ex2": 1e9, "shared_units": True}
    return {row["who"]: row for row in made.measure(case, list(before))}


def test_a_step_is_timed_by_pass():
    rows = measured(squares())
    for row in rows.values():
        assert row["both"]["median_s"] >= max(row["forward"]["median_s"], row["backward"]["median_s"]) > 0
        assert row["percent_of_floor"]["both"] == pytest.approx(100 * 12 * 64 / 1e9 / row["both"]["median_s"])
    assert rows["ours"]["errors"].keys() == {"value", "gradient 1"}
    forward = measured(squares(), "--passes", "forward")["ours"]
    assert "forward" in forward and "backward" not in forward and "both" not in forward


@pytest.mark.parametrize(
    "wrong",
    [lambda _, x: 1.001 * x.square().sum(), lambda _, x: x.square().sum() + 0.001 * (x.sum() - x.sum().detach()), lambda _, x: x.square().sum() * torch.nan],
    ids=["value", "gradient", "nan"],
)
def test_a_wrong_kernel_gets_no_time(wrong):
    rows = measured(squares(ours=wrong))
    assert "twice eager's own" in rows["ours"]["refused"] and not {"forward", "backward", "both"} & rows["ours"].keys()
    assert "both" in rows["eager"]
    assert "refused" in run.line({"case": "N=64", **rows["ours"]}, [])


def test_a_peer_of_another_function_gets_no_time():
    case = squares()
    rows = measured(dataclasses.replace(case, peers=case.peers | {"other": Peer(lambda x: x.sum()), "broken": Peer(lambda x: x.nonsense())}))
    assert "both" not in rows["other"] and "error" in rows["other"]["refused"]
    assert rows["broken"]["failed"].startswith("AttributeError")


def test_what_cannot_fit_is_not_started():
    def never(x):
        raise AssertionError("started")

    case = squares()
    rows = measured(dataclasses.replace(case, peers=case.peers | {"huge": Peer(never, bytes=2.0**60)}))
    assert rows["huge"]["skipped"].startswith("would need 1,073,741,824.0 GiB") and rows["huge"]["needs_bytes"] == 2.0**60
    before = [{"series": "s", "who": "eager", "n": n, "both": {"median_s": n**2 / 1e2}} for n in (16, 32)]
    rows = measured(case, "--limit-s", "40", before=before)
    assert rows["eager"]["needs_s"] == pytest.approx(64**2 / 1e2) and "both" in rows["ours"]


def test_steps_are_taken_in_turns():
    order = []

    def step(name):
        def call(mark):
            mark()
            order.append(name)
            mark()

        return call

    def broken(mark):
        raise RuntimeError("out of memory\nand more")

    taken = harness.interleaved({"a": step("a"), "b": step("b"), "c": broken}, harness.Clock("cpu"), repeats=3)
    assert order == ["a", "b"] + ["a", "b"] * 3  # a warm-up each, then turns
    assert taken["c"] == "RuntimeError: out of memory" and len(taken["a"]) == 3
    assert harness.summary([1.0, 2.0, 3.0, 4.0, 5.0]) == {"median_s": 3.0, "iqr_s": 3.0, "best_s": 1.0, "repeats": 5}
    assert harness.summary([2.0])["iqr_s"] is None


def test_floors():
    gpu = {"copy_bytes": 1e12, "bf16_flop": 1e15, "tf32_flop": 5e14, "ex2": 4e12}
    cpu = {"copy_bytes": 1e10, "fp32_flop": 1e11, "ex2": 4e9, "shared_units": True}
    work = Work(bytes=1e9, flop=1e12, exps=1e10)
    assert work.seconds(gpu, torch.bfloat16) == pytest.approx(2.5e-3)  # exponentials
    assert work.seconds(gpu, torch.float32) == pytest.approx(2.5e-3)
    assert Work(flop=1e13).seconds(gpu, torch.float32) == pytest.approx(0.02)
    assert work.seconds(cpu, torch.float32) == pytest.approx(10 + 2.5)  # the same units do both
    case = squares()
    assert case.floor_s(cpu) == pytest.approx(case.floor_s(cpu, "forward") + case.floor_s(cpu, "backward")) == pytest.approx(12 * 64 / 1e10)


def test_processor_time_leaves_waiting_out():
    def waits(mark):
        mark()
        time.sleep(0.05)
        mark()

    assert harness.Clock("cpu", cpu_time=True)(waits)[0] < 0.03 <= 0.05 <= harness.Clock("cpu")(waits)[0]
    with pytest.raises(SystemExit, match="--threads 1"):
        run.main(["warp", "--cpu-time", "--threads", "2"])


def test_ceilings_are_rates():
    found = harness.ceilings("cpu", harness.Clock("cpu"), scale=1 / 64)
    assert found["shared_units"] and all(found[name] > 1e6 for name in ("copy_bytes", "fp32_flop", "ex2"))


def rows_of(who, power, sizes=(1024, 2048, 4096, 8192), **more):
    return [
        {"op": "infonce", "case": f"joint N={n} D=64", "negatives": "joint", "N": n, "D": 64, "series": "joint D=64", "n": n, "who": who, "run": 0,
         "both": {"median_s": 1e-9 * n**power, "iqr_s": 0.0}, "errors": {"value": 1e-7}, "eager_errors": {"value": 1e-7},
         "percent_of_floor": {"both": 50.0}, "extra_MiB": 1e-3 * n ** (power - 1), **more}
        for n in sizes
    ]  # fmt: skip


def test_exponents():
    assert growth.exponent([1, 2, 4], [3.0, 12.0, 48.0]) == pytest.approx(2)
    (row,) = growth.exponents(rows_of("eager", 1.7))
    assert row["time"] == pytest.approx(1.7) and (row["from"], row["to"]) == (2048, 8192)
    assert growth.exponents(rows_of("eager", 1.7, sizes=(1024, 2048))) == []


def test_results_are_kept_and_replaced(tmp_path):
    path, facts = tmp_path / "cpu/warp.json", {"commit": "c1", "changed": False}
    book = growth.Book(path, facts)
    case, other = squares(64), squares(128)
    for c in (case, other):
        book.add(c, [{"op": "warp", "case": c.name, "who": "ours", "value": 1}])
    book.write(path)
    again = growth.Book(path, facts)
    assert again.has(case, ["ours"]) and not again.has(case, ["ours", "eager"])
    assert not any(growth.Book(path, facts | other).has(case, ["ours"]) for other in ({"commit": "c2"}, {"changed": True}))
    again.add(case, [{"op": "warp", "case": case.name, "who": "ours", "value": 2}])
    again.write(path)
    found = json.loads(path.read_text())
    assert [(r["case"], r["value"], r["run"]) for r in found["rows"]] == [("N=128", 1, 0), ("N=64", 2, 1)] and len(found["runs"]) == 2
    assert not list(tmp_path.rglob("*.tmp"))


def test_figures_from_results_alone(tmp_path):
    rows = rows_of("ours", 1.9, backend="cpu") + rows_of("eager", 2.1)
    rows[-1] = {k: v for k, v in rows[-1].items() if k not in ("both", "extra_MiB")} | {"skipped": "would need 99 GiB", "needs_bytes": 99 * 2.0**30}
    facts = {"device": "d", "memory_bytes": 24 * 2**30, "threads": 2, "versions": {"torch": "2"}, "commit": "c"}
    harness.write_json(tmp_path / "results/cpu/infonce.json", {"runs": [facts], "rows": rows, "growth": []})
    plot.main(["--results", str(tmp_path / "results"), "--out", str(tmp_path / "out")])
    assert {path.name for path in (tmp_path / "out").iterdir()} == {f"{name}_cpu.{end}" for name in ("infonce", "ops") for end in ("svg", "png")}
    image = matplotlib.image.imread(tmp_path / "out/infonce_cpu.png")
    assert image.shape[1] >= 1200 and image[..., :3].min() < 0.5
    assert "does not fit" in (tmp_path / "out/infonce_cpu.svg").read_text()


def test_doubled_inputs_are_the_same_numbers():
    given = Inputs([[torch.randn(3).requires_grad_(), torch.randn(3)], torch.arange(3), None, 5], (torch.randn(2),))
    wide = doubled(given)
    assert len(list(leaves(wide.arguments))) == 1 and wide.arguments[0][0].dtype == wide.upstream[0].dtype == torch.float64
    assert torch.equal(wide.arguments[0][0].float(), given.arguments[0][0]) and wide.arguments[1] is given.arguments[1]
