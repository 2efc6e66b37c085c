"""Plans of `pix2rep compare`, the timing of steps, and the statistics of its report; no training."""

import itertools
import math

import numpy as np
import pytest
import torch
import yaml

from pix2rep import compare_report, compare_stats, compare_time, training
from pix2rep.methods.base import Batch
from pix2rep.plan import PLANS, load_plan, plan_of, to_dict
from pix2rep.typed import ConfigError

SMALL = {"labelled": [1, 2], "seeds": [0], "reference": "random", "methods": {"random": {"pretrain": False}, "pix2rep": {}}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": {}}, r"unknown key 'method'; did you mean methods\?"),
        ({"split": {"val": 0.1}}, r"unknown key 'split'; did you mean options.split\?"),
        ({"seeds": "none"}, r"seeds must be an integer, got 'none'"),
        ({"seeds": []}, r"seeds must not be empty"),
        ({"labelled": [1, "most"]}, r'labelled must be a list: each a number of patients, at least 1, or "all", got \[1, \'most\'\]'),
        ({"labelled": 0}, r"labelled must be a list.*got 0"),
        ({"tasks": ["segment"]}, r"tasks must be 'probe' or 'finetune' or 'mean_teacher', got 'segment'"),
        ({"reference": "nobody"}, r"reference must be one of the methods random, pix2rep, got 'nobody'"),
        ({"options": {"loss": {"temprature": 1}}}, r"options: unknown key 'loss.temprature'; did you mean loss.temperature\?"),
        ({"options": {"pretrain": {"seed": 1}}}, r"options.pretrain.seed must be left out: the plan's key 'seeds' decides it"),
        ({"methods": {"a/b": {}}}, r"a method's name must be letters.*got 'a/b'"),
        ({"methods": {"cache": {}}}, r"none of cache, overlays, got 'cache'"),
        ({"methods": {"a": {"pixels": 5}}}, r"unknown key 'methods.a.pixels'"),
        ({"methods": {"a": {"options": {"loss": {"num_samples": "x"}}}}}, r"methods.a.options: loss.num_samples must be an integer, got 'x'"),
        ({"methods": {"a": {"options": {"data": {"size": [16, 16]}}}}}, r"methods.a.options must leave data to the plan's options"),
        ({"methods": {"a": {"seeds": [7]}}}, r"methods.a.seeds must be among the plan's \[0\], got \[7\]"),
        ({"methods": {"a": {"match_time": "a"}}}, r"methods.a.match_time must name another method that is pre-trained.*got 'a'"),
        ({"methods": {"a": {"match_time": "a", "pretrain": False}}}, r"methods.a.match_time needs a pre-training"),
    ],
)
def test_a_plan_that_cannot_be_is_refused_by_name(change, message):
    changes = {"reference": None} | change if "methods" in change else change
    with pytest.raises(ConfigError, match=message):
        plan_of(SMALL | changes)


@pytest.mark.parametrize("name", sorted(path.stem for path in PLANS.glob("*.yaml")))
def test_packaged_plans_read_and_survive_being_written(name):
    read = load_plan(name)
    written = plan_of(yaml.safe_load(yaml.safe_dump(to_dict(read))))
    assert (written.base, written.methods, written.labelled, written.tasks) == (read.base, read.methods, read.labelled, read.tasks)
    assert len(read.cells(50)) >= 6


def test_the_full_plans_step_runs_small_on_a_cpu():
    small = "data.size=32,32 network.channels=4,4,8,8,8 network.features=8 network.head_hidden=8 network.projection=8 pretrain.batch_size=2"
    read = load_plan("acdc_full_gpu", [*small.split(), "pretrain.device=cpu"])
    for name in ("pixels_1000", "pixels_all"):
        trained = training.Training(read.config_of(name), torch.device("cpu"), None)
        assert trained.amp is torch.bfloat16 and trained.config.pretrain.schedule == "cosine"
        trained.step(0, itertools.repeat(Batch(torch.rand(2, 1, 32, 32))), monitor=False)
        assert trained.collect(1) is None and trained.weights_are_finite()


# timing


def test_steps_are_timed_in_turn(monkeypatch):
    order = []

    class Fake:
        batches = type("", (), {"close": lambda self: order.append("closed")})()

        def __init__(self, config, source):
            self.config = config

        def seconds(self, steps):
            order.append(self.config)
            return {"a": 0.1, "b": 0.3}[self.config]

    monkeypatch.setattr(compare_time, "_Running", Fake)
    assert compare_time.seconds_a_step(["a", "b"], None, blocks=3) == [0.1, 0.3]
    assert order == ["a", "b"] * 4 + ["closed"] * 2


# statistics


def synthetic(seed=0, patients=5, seeds=3, classes=("x", "y"), volumes=2):
    """Rows with some undefined values, as `evaluate.score_case` makes them."""
    rng = np.random.default_rng(seed)
    return [
        {"patient": f"p{p}", "seed": s, "class": name, "case": f"p{p}_{v}", "dice": math.nan if rng.random() < 0.15 else rng.random(),
         "hd95": 1.0, "truth_voxels": 1, "predicted_voxels": 1, "hd95_unit": "mm"}
        for p in range(patients) for s in range(seeds) for v in range(volumes) for name in classes
    ]  # fmt: skip


def test_the_mean_is_the_reports():
    from pix2rep.report import patient_scores

    rows = synthetic()
    scores = compare_stats.scores_of(rows, "dice", [f"p{p}" for p in range(5)], [0, 1, 2], ("x", "y"))
    expected = patient_scores(rows, "dice")
    np.testing.assert_allclose(scores.patients()[0], list(expected.values()))
    assert scores.mean == pytest.approx(np.nanmean(list(expected.values())))


def slow_mean(rows, patients, seeds, minus=()):
    """Mean over `patients` of their score with `seeds` (both may repeat), or of the difference to that in `minus`."""

    def score(rows, patient):
        own = [[r["dice"] for s in seeds for r in rows if (r["patient"], r["seed"], r["class"]) == (patient, s, name)] for name in ("x", "y")]
        means = [np.nanmean(v) for v in own if not np.isnan(v).all()]
        return np.mean(means) if means else math.nan

    return np.nanmean([score(rows, p) - (score(minus, p) if minus else 0) for p in patients])


@pytest.mark.parametrize("paired", [False, True])
def test_the_bootstrap_is_that_of_a_plain_loop(paired):
    rows, other, resamples = synthetic(1), synthetic(2), 60
    names = [f"p{p}" for p in range(5)]
    of = [compare_stats.scores_of(part, "dice", names, [0, 1, 2], ("x", "y")) for part in (rows, other)]
    found = compare_stats.interval(of[0], resamples, of[1] if paired else None, seed=4)
    values = []
    for patients, seeds in zip(*compare_stats.draws(5, 3, resamples, 4), strict=True):
        drawn = [name for name, n in zip(names, patients, strict=True) for _ in range(int(n))]
        values.append(slow_mean(rows, drawn, [s for s, n in enumerate(seeds) for _ in range(int(n))], other if paired else ()))
    assert found["mean"] == pytest.approx(slow_mean(rows, names, [0, 1, 2], other if paired else ()))
    assert [found["low"], found["high"]] == pytest.approx(np.quantile(values, [0.025, 0.975]))


def test_the_interval_covers_seeds_as_well_as_patients():
    spread = np.array([[0.0, 0.0, 0.0], [0.0, 0.5, 1.0]])  # the same for every patient: only the seeds differ
    flat, seeded = (compare_stats.Scores(np.tile(row, (8, 1))[..., None], np.ones((8, 3, 1))) for row in spread)
    assert compare_stats.interval(flat, 500)["high"] == 0
    of_seeds = compare_stats.interval(seeded, 500)
    assert of_seeds["low"] == 0 and of_seeds["high"] == 1 and of_seeds["mean"] == 0.5
    alone = compare_stats.interval(compare_stats.Scores(np.ones((1, 3, 1)), np.ones((1, 3, 1))), 500)
    assert alone["mean"] == 1 and math.isnan(alone["low"])


def test_differences_pair_patients_and_the_seeds_that_both_have():
    def rows(dice):
        return [
            {"patient": p, "seed": 0, "class": "x", "case": p, "dice": v, "hd95": 1.0, "truth_voxels": 1, "predicted_voxels": 1}
            for p, v in zip("abc", dice, strict=True)
        ]

    def with_seed(made, seed):
        return [row | {"seed": seed} for row in made]

    cells = [
        ("probe", 1, "random", 0, rows([0.1, 0.5, 0.9])), ("probe", 1, "random", 1, with_seed(rows([0, 0, 0]), 1)),
        ("probe", 1, "ours", 0, rows([0.2, 0.6, 0.8])),
    ]  # fmt: skip
    groups = {("probe", 1, "random"): [0, 1], ("probe", 1, "ours"): [0, 1]}
    summary, (difference,) = compare_report.summarise(cells, groups, ("x",), "random", 300)
    assert difference["mean"] == pytest.approx(0.1 / 3) and (difference["better"], difference["worse"]) == (2, 1)
    assert difference["seeds"] == [0] and difference["low"] == pytest.approx(-0.1) and difference["high"] == pytest.approx(0.1)
    assert summary[0]["dice"]["mean"]["mean"] == pytest.approx(0.25) and summary[0]["seeds"] == {0: 0.5, 1: 0.0}
    assert summary[1]["seeds"] == {0: pytest.approx(1.6 / 3), 1: None}
