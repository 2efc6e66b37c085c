"""Mean teacher: its loss against plain float64, the moving average, what it never reads, and a whole run, compared and reported."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from discs import write_patients, write_run
from typer.testing import CliRunner

from pix2rep import compare, compare_records, downstream, evaluate, finetune, run_report
from pix2rep import config as config_file
from pix2rep.cli import app
from pix2rep.data.splits import labelled_patients
from pix2rep.mean_teacher import MeanTeacher, consistency, ramp
from pix2rep.networks import Segmenter, build_backbone
from pix2rep.plan import PLANS, load_plan
from pix2rep.study import open_study

FAST = (
    "downstream.finetune_steps=2 downstream.finetune_batch_size=2 downstream.teacher_batch_size=2 downstream.overlays=1 downstream.bootstrap=20"
    " downstream.teacher_weight=1,10"
).split()
SOLID = "network.dims=3 data.size=4,24,24".split()
STILL = [f"photometric.{key}=0" for key in ("noise_p", "blur_p", "gamma_p", "bias_p", "invert_p")]


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(downstream, "SETTLING_BATCHES", 2)


@pytest.fixture(scope="module")
def ready(tmp_path_factory):
    """(run folder, its config): weights, and no downstream results yet."""
    base = tmp_path_factory.mktemp("teacher")
    write_patients(base / "data", 6)
    return base / "run", write_run(base / "data", base / "run")


def changed(config, *overrides):
    config = config_file.from_dict(config_file.to_dict(config))
    for text in (*FAST, *overrides):
        config_file.override(config, text)
    return config


def taught(ready, *overrides, weight=3.0):
    """(study, student, its teacher), the teacher a little off the student."""
    run, config = ready
    study = open_study(run, changed(config, *overrides))
    torch.manual_seed(0)
    student = Segmenter(build_backbone(study.config.network), 4, study.config.network.dims)
    teacher = MeanTeacher(student, study, weight, seed=0)
    with torch.no_grad():
        for p in teacher.network.parameters():
            p.add_(0.05 * torch.randn(p.shape))
    return study, student, teacher


def test_consistency_is_the_mean_squared_difference_of_probabilities():
    torch.manual_seed(0)
    logits, target = torch.randn(2, 2, 3, 4, 5, dtype=torch.float64)
    logits.requires_grad_()
    loss = consistency(logits, target)
    (gradient,) = torch.autograd.grad(loss, logits)
    p, q = (np.exp(x.detach().numpy()) / np.exp(x.detach().numpy()).sum(1, keepdims=True) for x in (logits, target))
    assert loss.item() == pytest.approx(((p - q) ** 2).sum() / p.size, rel=1e-12)
    upstream = 2 * (p - q) / p.size
    np.testing.assert_allclose(gradient.numpy(), p * (upstream - (p * upstream).sum(1, keepdims=True)), rtol=1e-9)


def test_the_ramp_is_the_papers():
    assert [ramp(step, 10) for step in (0, 5, 10, 11)] == pytest.approx([math.exp(-5), math.exp(-1.25), 1, 1])


@pytest.mark.parametrize("extra", [(), SOLID], ids=["2d", "3d"])
def test_one_loss_is_the_formula(ready, extra):
    study, student, teacher = taught(ready, "downstream.finetune_steps=10", *extra)
    twin, other = copy.deepcopy((student, teacher.network))
    augment = finetune.Augment(study.config, (2.0, 1.0, 1.0) if extra else None)
    first, second = teacher.views(1, augment)
    assert first.shape == (2, 1, *study.config.data.size) and not torch.equal(first, second)
    teacher.views = lambda step, given: (first, second)
    loss = teacher.loss(student.train(), 1, augment)
    loss.backward()
    with torch.no_grad():
        q = other.train()(second).softmax(1)
    expected = 3 * math.exp(-5 * (1 - 1 / 4) ** 2) * ((twin.train()(first).softmax(1) - q) ** 2).mean()
    expected.backward()
    torch.testing.assert_close(loss, expected)
    for ours, theirs in zip(student.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
    assert all(p.grad is None for p in teacher.network.parameters())


def test_pixels_of_both_views_correspond(ready):
    study, _, teacher = taught(ready, *STILL, "downstream.augment_p=1")
    seen = torch.from_numpy(np.concatenate([study.items(case, "image") for case in study.prepared.cases])).float()
    first, second = teacher.views(0, finetune.Augment(study.config))
    assert torch.equal(first, second) and all((image - seen).flatten(1).abs().amax(1).min() > 0.1 for image in first[:, 0])
    first, second = teacher.views(0, None)
    assert torch.equal(first, second) and all((image == seen).flatten(1).all(1).any() for image in first[:, 0])


def test_the_teacher_is_the_mean_of_all_so_far_then_a_moving_average(ready):
    _, student, teacher = taught(ready, "downstream.teacher_decay=0.6")
    mine, theirs = next(teacher.network.parameters()), next(student.parameters())
    values = [mine.clone()]
    for step in range(3):
        with torch.no_grad():
            theirs.fill_(float(step))
        teacher.follow(student, step)
        values.append(mine.clone())
    torch.testing.assert_close(values[1], values[0] / 2)
    torch.testing.assert_close(values[2], 0.6 * values[1] + 0.4)
    torch.testing.assert_close(values[3], 0.6 * values[2] + 0.8)


def test_without_weight_and_memory_it_is_fine_tuning_and_the_teacher_is_kept(ready):
    study, student, _ = taught(ready, "downstream.teacher_decay=0")
    images, labels = study.stack(study.volumes("val"))
    validated = []
    fitted = [copy.deepcopy(student) for _ in range(2)]
    for model, teacher in zip(fitted, (None, MeanTeacher(student, study, 0.0, seed=0)), strict=True):

        def validate(network):
            validated.append(network)
            return float(len(validated))

        finetune.fit(model, images, labels, 1e-3, study.config, 0, validate, teacher=teacher)
    assert all(torch.equal(plain, own) for plain, own in zip(*(model.parameters() for model in fitted), strict=True))
    assert not torch.equal(fitted[0].head.weight, student.head.weight)
    assert validated[0] is fitted[0] and validated[-1] is teacher.network
    kept, of_teacher = fitted[1].state_dict(), teacher.network.state_dict()
    assert all(torch.equal(kept[name], of_teacher[name]) for name in kept)


def test_labels_of_the_unlabelled_patients_change_nothing(ready):
    run, config = ready
    study = open_study(run, changed(config, "downstream.teacher_weight=10"))
    drawn = labelled_patients(study.split, study.volumes("pretrain"), 1, 0)
    entry = {"what": "mean_teacher", "labelled": 1, "seed": 0, "arm": "random", "patients": drawn}
    found, kept = [], {}
    for _ in range(2):
        backbone = downstream.random_backbone(study, 0)
        model, *_ = downstream.one_model(backbone, study, entry, study.volumes("val"), study.volumes("test")[:1])
        found.append(model.state_dict())
        for case in study.volumes("pretrain"):
            if case.patient not in drawn:
                kept[case.label_file] = case.label_file.read_bytes()
                np.save(case.label_file, np.array(case.labels())[::-1])
    for file, content in kept.items():
        file.write_bytes(content)
    assert len(kept) == 4 and all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_a_whole_run_leaves_the_fine_tuned_alone_and_is_read_again(ready, tmp_path, monkeypatch):
    run, config = ready
    (run / "finetune").mkdir()
    (run / "finetune/results.json").write_text("{}")
    config_file.save(changed(config, "downstream.labelled=all,3"), run / "config.yaml")
    result = CliRunner().invoke(app, ["finetune", str(run), "--mean-teacher"])
    assert result.exit_code == 0, (result.output, result.exception)
    assert (run / "finetune/results.json").read_text() == "{}" and [path.name for path in (run / "finetune").iterdir()] == ["results.json"]
    written = json.loads((run / "mean_teacher/results.json").read_text())
    summary = [(row["what"], row["labelled"], row["arm"]) for row in written["summary"]]
    assert summary == [("mean_teacher", 3, "pretrained"), ("mean_teacher", 3, "random")]  # "all" is 3 patients, and they are trained once
    assert {model["teacher_weight"] for model in written["models"]} <= {1, 10} and "teacher_weight" in result.output
    beside = tmp_path / "run"
    beside.mkdir()
    for name in ("split.json", "mean_teacher"):
        (beside / name).symlink_to(run / name)
    again = evaluate.run(beside, config_file.load(run / "config.yaml"))
    scores = [[row["dice"]["mean"]["mean"] for row in result["summary"]] for result in (written, again)]
    assert scores[0] == pytest.approx(scores[1])
    (run / "log.jsonl").touch()
    monkeypatch.setattr(run_report, "_pictures", lambda *_: [])
    assert "Downstream: mean_teacher" in run_report.write(run, tmp_path / "report.html", 1).read_text()


def test_it_is_a_task_of_comparisons(ready, tmp_path):
    run, config = ready
    file = tmp_path / "plan.yaml"
    own = "methods: {random: {pretrain: false}}\nreference: random\nlabelled: [1]\ntasks: [mean_teacher]\nseeds: [0]\n"
    file.write_text((PLANS / "smoke.yaml").read_text().split("methods:")[0] + own)
    plan = load_plan(file, ["downstream.teacher_batch_size=2", "downstream.teacher_weight=10", "split.val=0.17"], config.data.root, tmp_path / "out")
    result = compare.run(plan)
    assert result["failed"] == [] and [row["task"] for row in result["summary"]] == ["mean_teacher"]
    (cell,) = result["cells"]
    assert cell["teacher_weight"] == 10 and "with a mean teacher too" in (tmp_path / "out/table.md").read_text()
    before = {task: compare_records.inputs_of_cell(plan.base, task, [], "", "", {}, ()) for task in ("probe", "finetune", "mean_teacher")}
    decided = {task for task, inputs in before.items() if "downstream.teacher_weight" in inputs}
    assert decided == {"mean_teacher"} and before["finetune"].keys() < before["mean_teacher"].keys()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("downstream.teacher_decay=1", "downstream.teacher_decay must be at least 0 and under 1, got 1"),
        ("downstream.teacher_ramp=0", "downstream.teacher_ramp must be a share of the steps, above 0, got 0"),
        ("downstream.teacher_weight=-1", r"downstream.teacher_weight must be at least 0, got \[-1"),
        ("downstream.teacher_weight=()", r"downstream.teacher_weight must be a list of at least one number, got \[\]"),
        ("downstream.labelled=1,some", "downstream.labelled must be an integer or 'all', got 'some'"),
        ("downstream.labelled=0,all", r"downstream.labelled must be at least 1, got \[0, 'all'\]"),
    ],
)
def test_options_refused(text, message):
    with pytest.raises(config_file.ConfigError, match=message):
        config_file.load(None, [text])
