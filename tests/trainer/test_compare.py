"""`pix2rep compare`: what is written, resuming, failures, on phantoms of 32 x 32 pixels."""

import copy
import csv
import itertools
import json
import os
import shutil

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from pix2rep import compare, compare_dry, compare_jobs, compare_time, disk, downstream, training
from pix2rep.cli import app
from pix2rep.compare_jobs import run_in_processes
from pix2rep.data.phantom import write_phantoms
from pix2rep.plan import PLANS, plan_of, to_dict

SMALL = {
    "labelled": [1, 2], "tasks": ["probe"], "seeds": [0], "reference": "random",
    "methods": {"random": {"pretrain": False}, "pix2rep": {}},
}  # fmt: skip


def plan(base, out="out", **changes):
    """SMALL with `changes`, on the phantoms under `base`."""
    values = yaml.safe_load((PLANS / "smoke.yaml").read_text()) | copy.deepcopy(SMALL)
    values["options"]["pretrain"] |= {"checkpoint_every": 2}
    for key, value in changes.items():
        if key == "options":
            for section, entries in value.items():
                values["options"][section] = values["options"][section] | entries
        else:
            values[key] = value
    return plan_of(values | {"data": str(base / "data"), "out": str(base / out)})


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Phantoms under data/, SMALL finished in out/."""
    folder = tmp_path_factory.mktemp("compare")
    write_phantoms(folder / "data", patients=9, seed=0, size=32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(downstream, "SETTLING_BATCHES", 2)
        compare.run(plan(folder))
    return folder


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(downstream, "SETTLING_BATCHES", 2)


@pytest.fixture
def again(base):
    """A copy of the finished comparison, beside its data."""
    shutil.copytree(base / "out", base / "again")
    yield base
    shutil.rmtree(base / "again")


@pytest.fixture
def ran(monkeypatch):
    """Names of the jobs that are executed, in order."""
    names = []

    def note(job, execute=compare_jobs.execute):
        names.append(job.name)
        return execute(job)

    monkeypatch.setattr(compare_jobs, "execute", note)
    return names


def to_do(changed_plan):
    """{job: why} of what a plan would compute in its folder, pre-trainings and cells."""
    comparison = compare.Comparison(changed_plan, 1)
    comparison.open()
    comparison.match_times()
    why = {job.name: comparison.why_to_do(job) for job in (*comparison.pretrainings(), *comparison.cells())}
    return {name: reasons for name, reasons in why.items() if reasons}


# what is written


def test_files_hold_the_numbers_of_the_cells(base):
    out = base / "out"
    result = json.loads((out / "results.json").read_text())
    with open(out / "results.csv") as file:
        rows = list(csv.DictReader(file))
    split = result["split"]
    assert {row["patient"] for row in rows} == set(split["test"]) and not set(split["test"]) & set(split["pretrain"] + split["val"])
    assert [(e["task"], e["labelled"], e["method"]) for e in result["summary"]] == [
        ("probe", n, name) for n in (1, 2) for name in ("random", "pix2rep")
    ]  # fmt: skip
    text = (out / "table.md").read_text()
    for entry in result["summary"]:
        own = [r for r in rows if (r["task"], int(r["labelled"]), r["method"]) == (entry["task"], entry["labelled"], entry["method"])]
        assert len(own) == 2 * 3 * len(split["test"])
        by_class = [np.mean([float(r["dice"]) for r in own if r["class"] == name and r["dice"]]) for name in result["classes"]]
        assert [entry["dice"][name]["mean"] for name in result["classes"]] == pytest.approx(by_class)
        assert f"| {entry['labelled']} | {entry['method']} |" in text and f"{entry['dice']['mean']['mean']:.3f} [" in text
    for said in (", ".join(split["test"]), "4 / 2 / 3", "crossed bootstrap", "chosen by Dice on the validation patients", "pix2rep 4 x 2 images"):
        assert said in text
    assert (out / "label_efficiency.png").stat().st_size > 5000 and "<svg" in (out / "label_efficiency.svg").read_text()[:400]
    assert len(list((out / "overlays").glob("probe_*.png"))) == 1
    record = json.loads((out / "record.json").read_text())
    assert record["sessions"][0]["seconds"].keys() == {"prepare", "match_time", "pretrain", "cells", "report"}
    assert str(base) not in json.dumps(record)


def test_label_sets_are_nested_and_every_method_has_the_same(base):
    cells = json.loads((base / "out/results.json").read_text())["cells"]
    used = {(cell["method"], cell["labelled"]): set(cell["patients"]) for cell in cells}
    assert used["random", 1] < used["random", 2] and len(used["random", 2]) == 2
    assert all(used["random", n] == used["pix2rep", n] for n in (1, 2))


def test_the_plot_has_a_line_a_method_and_the_ceiling(base):
    from pix2rep.compare_plot import label_efficiency

    result = json.loads((base / "out/results.json").read_text())
    for number, entry in enumerate(result["summary"]):
        entry["labelled"] = {1: 1, 2: result["labelled_of"]}[entry["labelled"]]
        entry["dice"]["mean"] = {"mean": 0.1 * number, "low": 0.0, "high": 0.9}
    (panel,) = label_efficiency(result).axes
    lines = {line.get_label(): list(line.get_ydata()) for line in panel.get_lines()}
    assert lines == {"random": [0, pytest.approx(0.2)], "pix2rep": [0.1, pytest.approx(0.3)], "random, all labels": [pytest.approx(0.2)] * 2}
    assert [label.get_text() for label in panel.get_xticklabels()] == ["1", "all (4)"] and len(panel.collections) == 2


# resuming


def test_a_finished_comparison_computes_nothing(again, ran):
    before = {file: file.stat().st_mtime_ns for file in (again / "again").glob("*/seed0/*") if file.is_file()}
    first = (again / "again/results.json").read_bytes()
    compare.run(plan(again, "again"))
    assert ran == [] and before == {file: file.stat().st_mtime_ns for file in before}
    assert (again / "again/results.json").read_bytes() == first


def test_a_longer_plan_adds_cells_and_an_altered_one_redoes(again, capsys):
    longer = to_do(plan(again, "again", seeds=[0, 1], labelled=[1, 2, "all"], methods=SMALL["methods"] | {"other": {"seeds": [1], "labelled": [1]}}))
    new = {f"{name} probe n={n} seed {seed}" for name in ("random", "pix2rep") for n in (1, 2, 4) for seed in (0, 1) if (n, seed) not in ((1, 0), (2, 0))}
    assert set(longer) == new | {"pix2rep pretrain seed 1", "other pretrain seed 1", "other probe n=1 seed 1"}
    altered = to_do(plan(again, "again", options={"downstream": {"probe_steps": 11}}))
    assert set(altered) == {f"{name} probe n={n} seed 0" for name in ("random", "pix2rep") for n in (1, 2)}
    assert set(map(tuple, altered.values())) == {("downstream.probe_steps",)}
    assert to_do(plan(again, "again", options={"downstream": {"finetune_steps": 9, "bootstrap": 9}})) == {}
    retrained = to_do(plan(again, "again", options={"pretrain": {"steps": 5}}))
    assert retrained.pop("pix2rep pretrain seed 0") == ["pretrain.steps"]
    assert retrained == {f"pix2rep probe n={n} seed 0": ["weights"] for n in (1, 2)}
    resplit = to_do(plan(again, "again", options={"split": {"seed": 3}}))
    assert len(resplit) == 5 and all("split" in why for name, why in resplit.items() if "random" in name)
    assert "the split differs" in capsys.readouterr().err


def test_changed_volumes_redo_and_new_patients_do_not_move_the_split(again, tmp_path):
    shutil.copytree(again / "data", tmp_path / "data")
    shutil.copytree(again / "again", tmp_path / "again")
    assert to_do(plan(tmp_path, "again")) == {}, "the same volumes elsewhere"
    folder = sorted((tmp_path / "data").glob("*patient009"))[0]
    shutil.copytree(folder, folder.with_name("patient999"))
    for file in (tmp_path / "data").rglob("patient999/patient009*"):
        file.rename(file.with_name(file.name.replace("009", "999")))
    assert to_do(plan(tmp_path, "again")) == {}
    test = json.loads((tmp_path / "again/split.json").read_text())["test"][0]
    one, two = sorted((tmp_path / "data").rglob(f"{test}*_gt.nii.gz"))
    shutil.copyfile(one, two)
    assert {tuple(why) for why in to_do(plan(tmp_path, "again")).values()} == {("volumes",)}


def test_a_folder_is_one_process_s(again, ran):
    with disk.lock(again / "again/lock", "it"), pytest.raises(disk.InUse, match=f"again is being written by process {os.getpid()}"):
        compare.run(plan(again, "again", seeds=[0, 1]))
    assert not ran


def test_a_stop_keeps_what_is_finished(base, tmp_path, monkeypatch, ran):
    """In the middle of a pre-training, then in the middle of the cells; the numbers are those of a run that was not stopped."""
    shutil.copytree(base / "data", tmp_path / "data")
    whole, count = training.Training.step, itertools.count()

    def stopping(self, step, *rest, **named):
        if step == 2 and next(count) == 0:
            raise KeyboardInterrupt
        return whole(self, step, *rest, **named)

    monkeypatch.setattr(training.Training, "step", stopping)
    with pytest.raises(compare.Stopped, match="stopped by SIGINT.*continue with: again") as stopped:
        compare.run(plan(tmp_path), again="again")
    assert stopped.value.exit_code == 130 and ran == ["pix2rep pretrain seed 0"]

    train, cells = downstream.one_model, itertools.count()

    def one(*arguments):
        if next(cells) == 2:
            raise KeyboardInterrupt
        return train(*arguments)

    monkeypatch.setattr(downstream, "one_model", one)
    with pytest.raises(compare.Stopped):
        compare.run(plan(tmp_path))
    events = [json.loads(line) for line in (tmp_path / "out/pix2rep/seed0/log.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events if event["event"] == "resume"] == [2]
    finished = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").glob("*/seed0/probe_n*.json")}
    assert len(finished) == 2
    result = compare.run(plan(tmp_path))
    assert len(ran) == 1 + 1 + 3 + 2, ran
    assert finished == {file: file.stat().st_mtime_ns for file in finished}
    assert json.loads((base / "out/results.json").read_text())["cells"] == json.loads((tmp_path / "out/results.json").read_text())["cells"]
    assert not result["failed"]


def test_processes_give_the_same_cells(again):
    comparison = compare.Comparison(plan(again, "again"), 2)
    records = sorted((again / "again").glob("*/seed0/probe_n2.json"))
    before = [json.loads(file.read_text())["rows"] for file in records]
    for file in records:
        file.unlink()
    comparison.open()
    jobs = [job for job in comparison.cells() if comparison.why_to_do(job)]
    outcomes = {job.name: outcome for job, outcome in run_in_processes(jobs, 2)}
    assert outcomes.keys() == {"random probe n=2 seed 0", "pix2rep probe n=2 seed 0"} and not any(o.failed for o in outcomes.values())
    after = [json.loads(file.read_text())["rows"] for file in records]
    # The random arm's BatchNorm settles on fewer batches in this process (SETTLING_BATCHES above).
    mine, theirs = (json.dumps([row for cell in cells for row in cell if row["arm"] == "pix2rep"]) for cells in (before, after))
    assert len(mine) > 1000 and mine == theirs


# failures


def test_a_failed_cell_is_reported_and_the_rest_goes_on(again):
    file = again / "plan.yaml"
    values = to_dict(plan(again, "again", tasks=["probe", "finetune"], labelled=[1]))
    values["options"]["downstream"] |= {"finetune_lr": [1e30], "finetune_steps": 20}
    values["methods"]["diverging"] = {"options": {"pretrain": {"lr": 1e30}}, "tasks": ["probe"]}
    file.write_text(yaml.safe_dump(values))
    result = CliRunner().invoke(app, ["compare", str(file)])
    assert result.exit_code == 1, result.output
    on_disk = json.loads((again / "again/results.json").read_text())
    why = {(entry["task"], entry["method"]): entry["why"] for entry in on_disk["failed"]}
    assert why.keys() == {("finetune", "random"), ("finetune", "pix2rep"), ("probe", "diverging")}
    assert "downstream.finetune_lr must hold a rate" in why["finetune", "random"] and "pre-training: " in why["probe", "diverging"]
    assert "must be finite" in why["probe", "diverging"]
    seeds = {(entry["task"], entry["method"]): entry["seeds"]["0"] for entry in on_disk["summary"]}
    assert seeds["finetune", "random"] is None and seeds["probe", "random"] is not None
    text = (again / "again/table.md").read_text()
    assert "| - | failed |" in text and "- random finetune n=1 seed 0: downstream.finetune_lr" in text
    assert "traceback" in json.loads((again / "again/random/seed0/finetune_n1.json").read_text())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.yaml"], "error: plan must be a YAML file or one of acdc_full_gpu, acdc_pixels, acdc_small, smoke, got nowhere.yaml"),
        (["smoke", "--out", "{out}"], "error: the plan must name data, or the command must (--data), got neither"),
        (["smoke", "--data", "{data}", "--out", "{data}"], "error: out must be a new folder or that of a comparison (with plan.yaml), got"),
        (["smoke", "--data", "{data}", "--out", "{out}", "pretrain.seed=3"], "error: pretrain.seed must be left out: the plan's key 'seeds'"),
    ],
)
def test_bad_commands_end_in_one_line(base, tmp_path, arguments, message):
    result = CliRunner().invoke(app, ["compare", *(a.format(data=base / "data", out=tmp_path / "new") for a in arguments)])
    assert result.exit_code == 2 and message in result.output and not (tmp_path / "new").exists()


def test_too_many_labels_are_refused_before_any_training(base, tmp_path, ran):
    shutil.copytree(base / "data", tmp_path / "data")
    with pytest.raises(ValueError, match=r"labelled patients must number 1 to 4.*got 40"):
        compare.run(plan(tmp_path, labelled=[1, 40]))
    assert ran == []


def test_a_dry_run_counts_and_makes_nothing(base, capsys):
    counts = compare_dry.dry_run(plan(base, "never", labelled=[1, 2, "all"]))
    assert counts == {"pretrainings": 1, "cells": 6, "pretrainings_to_do": 1, "cells_to_do": 6}
    assert not (base / "never").exists() and "pre-training; a cell's time is known" in capsys.readouterr().err
    before = (base / "out/plan.yaml").read_bytes()
    counts = compare_dry.dry_run(plan(base, labelled=[1, 2, "all"]))
    assert counts == {"pretrainings": 1, "cells": 6, "pretrainings_to_do": 0, "cells_to_do": 2}
    assert (base / "out/plan.yaml").read_bytes() == before and "finished" in capsys.readouterr().out


# equal time


def test_matched_steps_fill_the_other_methods_time_and_are_kept(again, monkeypatch):
    timed = []

    def seconds(configs, source):
        timed.append([config.loss.num_samples for config in configs])
        return [0.2, 0.8]

    monkeypatch.setattr(compare_time, "seconds_a_step", seconds)
    methods = SMALL["methods"] | {"slow": {"options": {"loss": {"num_samples": 256}}, "match_time": "pix2rep"}}
    changed = plan(again, "again", methods=methods)
    for _ in range(2):
        comparison = compare.Comparison(changed, 1)
        comparison.open()
        comparison.match_times()
        assert comparison.config("slow", 0).pretrain.steps == 1 and comparison.config("pix2rep", 0).pretrain.steps == 4
    assert timed == [[64, 256]]
    kept = json.loads((again / "again/match_time.json").read_text())["slow"]
    assert (kept["steps"], kept["reference"], kept["seconds_a_step"], kept["threads"]) == (1, "pix2rep", 0.8, 1)
