"""Metrics, probe, fine-tuning, evaluation and report, on small hand-made volumes in ACDC's layout."""

import csv
import json
import math

import nibabel
import numpy as np
import pytest
import torch
from discs import SIZE, small_config, write_patients, write_run

from pix2rep import checkpoint, downstream, evaluate, finetune, metrics, probe, report
from pix2rep import config as config_file
from pix2rep.data.cache import crop_or_pad, uncrop
from pix2rep.networks import Segmenter, build_backbone
from pix2rep.study import open_study


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(run folder, config, probe report): a run with its probe done."""
    base = tmp_path_factory.mktemp("downstream")
    write_patients(base / "data", 6)
    config = write_run(base / "data", base / "run")
    return base / "run", config, downstream.run(base / "run", config, "probe")


# metrics


def test_dice_is_monais():
    from monai.metrics import compute_dice

    rng = np.random.default_rng(0)
    prediction, truth = rng.integers(0, 4, (2, 5, 6, 7))
    one_hot = [torch.nn.functional.one_hot(torch.from_numpy(a), 4).movedim(-1, 0)[None] for a in (prediction, truth)]
    expected = compute_dice(*one_hot, include_background=False)[0].numpy()
    np.testing.assert_allclose(metrics.dice(prediction, truth, 3), expected, rtol=1e-6)


def test_a_class_without_voxels_follows_the_stated_policy():
    truth, prediction = np.zeros((2, 4, 4, 4), np.uint8)
    truth[0, 0, 0], prediction[0, 0, 1] = 1, 2
    scores = metrics.dice(prediction, truth, 3)
    assert scores[0] == 0 and scores[1] == 0 and math.isnan(scores[2])
    assert np.isnan(metrics.hd95(prediction, truth, 3, (1, 1, 1))).all()


def test_hd95_is_in_the_unit_of_the_spacing():
    truth, prediction = np.zeros((2, 12, 16, 16), np.uint8)
    truth[2:8, 4:10, 4:10] = 1
    prediction[5:11, 4:10, 4:10] = 1  # three voxels further along Z
    assert metrics.hd95(prediction, truth, 1, (1, 1, 1))[0] == pytest.approx(3)
    assert metrics.hd95(prediction, truth, 1, (8, 1.5, 1.5))[0] > metrics.hd95(prediction, truth, 1, (1, 1.5, 1.5))[0]
    with pytest.raises(ValueError, match=r"spacing must have 3 lengths.*\(1, 1\)"):
        metrics.hd95(prediction, truth, 1, (1, 1))


def test_hd95_of_a_single_slice_is_the_two_dimensional_one():
    truth, prediction = np.zeros((2, 1, 16, 16), np.uint8)
    truth[0, 4:12, 4:12], prediction[0, 2:14, 2:14] = 1, 1
    assert metrics.hd95(prediction, truth, 1, (8, 1, 1))[0] == metrics.hd95(prediction[0], truth[0], 1, (1, 1))[0] > 0


def test_shapes_that_differ_are_refused():
    with pytest.raises(ValueError, match=r"shape of truth, \(3, 3\), got \(2, 2\)"):
        metrics.dice(np.zeros((2, 2), int), np.zeros((3, 3), int), 1)


def test_bootstrap_covers_the_mean_and_needs_two_patients():
    values = np.random.default_rng(1).normal(0.6, 0.1, 30)
    mean, low, high = metrics.bootstrap([*values, math.nan], 2000)
    assert mean == pytest.approx(values.mean()) and low < mean < high
    assert high - low == pytest.approx(2 * 1.96 * values.std() / math.sqrt(30), rel=0.15)
    assert metrics.bootstrap([0.5])[0] == 0.5 and math.isnan(metrics.bootstrap([0.5])[1])


# probe


def test_probe_finds_a_direction_on_a_small_scale():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(4000, 5, generator=generator) * torch.tensor([1e-3, 1, 1, 1, 100]) + 3
    targets = (rows[:, 0] > 3.0005).long()
    config = config_file.DownstreamConfig(probe_steps=300)
    settings, weight, bias = probe.fit(rows, targets, 1, config, seed=0)
    assert len(settings) == len(weight) == len(config.probe_lr) * len(config.class_weights)
    predicted = (rows.double() @ weight[0].double().T + bias[0]).argmax(1)
    assert metrics.dice(predicted.numpy(), targets.numpy(), 1)[0] > 0.95


def test_balanced_weights_undo_the_class_frequencies():
    targets = torch.tensor([0] * 90 + [1] * 10)
    weights = probe.class_weights("balanced", targets, 2)
    assert weights[1] / weights[0] == pytest.approx(9) and weights[2] == 1
    assert probe.class_weights("sqrt", targets, 1)[1] / probe.class_weights("sqrt", targets, 1)[0] == pytest.approx(3)
    assert probe.class_weights("none", targets, 1).tolist() == [1, 1]


def test_all_settings_predict_as_a_segmenter_would():
    backbone = build_backbone(config_file.NetworkConfig(channels=(4, 4, 8, 8, 8), features=8)).eval()
    images = torch.rand(3, 1, SIZE, SIZE)
    weight, bias = torch.randn(2, 3, 8), torch.randn(2, 3)
    together = probe.predict_all(backbone, images, weight, bias)
    for g in range(2):
        model = Segmenter(backbone, 3)
        model.head.weight.data, model.head.bias.data = weight[g][..., None, None], bias[g]
        assert (finetune.predict(model, images) == together[g]).mean() > 0.999


def test_the_probe_leaves_the_backbone_as_it_was(finished):
    run, config, _ = finished
    study = open_study(run, config)
    model, _ = evaluate.load_model(run / "probe/models/n1_seed0_pretrained.safetensors", study)
    before = checkpoint.load_backbone(run)[0].state_dict()
    after = model.backbone.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_random_batchnorm_statistics_come_from_the_pretraining_images(finished):
    run, config, _ = finished
    study = open_study(run, config)
    backbone = downstream.random_backbone(study, seed=3)
    images = study.stack(study.volumes("pretrain"))[0]
    seen = []
    first = next(m for m in backbone.modules() if isinstance(m, torch.nn.BatchNorm2d))
    handle = first.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].mean((0, 2, 3))))
    with torch.no_grad():
        backbone(images)
    handle.remove()
    torch.testing.assert_close(first.running_mean, seen[0], rtol=0.05, atol=0.01)
    assert first.momentum == 0.1 and not backbone.training


# the whole way


def test_probe_writes_what_it_reports(finished):
    run, config, result = finished
    on_disk = json.loads((run / "probe/results.json").read_text())
    assert [(e["arm"], e["labelled"]) for e in on_disk["summary"]] == [("pretrained", 1), ("random", 1)]
    with open(run / "probe/results.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 4 * 3  # arms x test volumes x classes of ACDC's layout
    assert {row["class"] for row in rows} == {"RV", "MYO", "LV"} and {row["hd95_unit"] for row in rows} == {"mm"}
    for entry in on_disk["summary"]:
        own = [float(r["dice"]) for r in rows if r["arm"] == entry["arm"] and r["class"] == "RV"]
        assert entry["dice"]["RV"]["mean"] == pytest.approx(np.mean(own), abs=1e-9)
    used = [model["patients"] for model in on_disk["models"]]
    assert used[0] == used[1] and set(used[0]) <= set(on_disk["split"]["pretrain"])
    assert len(list((run / "probe/overlays").glob("*.png"))) == 2
    assert result["summary"][0]["dice"]["mean"]["mean"] > 0.3  # intensity alone finds the bright disc


def test_evaluate_repeats_the_numbers_and_writes_the_source_geometry(finished, tmp_path):
    run, config, result = finished
    again = evaluate.run(run, config, tmp_path / "predictions")
    for first, second in zip(result["summary"], again["summary"], strict=True):
        for name in ("mean", "RV", "MYO"):
            assert first["dice"][name] == pytest.approx(second["dice"][name])
    files = sorted((tmp_path / "predictions/probe/n1_seed0_pretrained").glob("*.nii.gz"))
    study = open_study(run, config)
    assert len(files) == len(study.volumes("test"))
    with open(run / "probe/results.csv") as file:
        rows = {(r["case"], r["class"]): float(r["dice"]) for r in csv.DictReader(file) if r["arm"] == "pretrained" and r["dice"]}
    for file in files:
        case = study.cases[file.name.removesuffix(".nii.gz")]
        written, source, truth = (nibabel.load(path) for path in (file, case.image, case.label))
        assert written.shape == source.shape and np.array_equal(written.affine, source.affine)
        scores = metrics.dice(np.asarray(written.dataobj).astype(int), np.asarray(truth.dataobj).astype(int), 3)
        assert scores[0] == pytest.approx(rows[case.id, "RV"])


def test_resampled_data_is_scored_on_the_source_grid(finished):
    run, config, _ = finished
    coarse = config_file.from_dict(config_file.to_dict(config))
    coarse.data.spacing = (3.7, 3.7)
    study = open_study(run, coarse)
    case = study.volumes("test")[0]
    assert case.shape[1:] == (16, 15) and study.truth(case).shape == (4, 40, 36)
    entry = {"what": "probe", "labelled": 1, "seed": 0, "arm": "random"}
    rows = evaluate.score_case(predicted := evaluate.predict_case(Oracle(case), case, study), case, study, entry)
    assert predicted.shape == study.truth(case).shape
    assert rows[0]["truth_voxels"] == int((study.truth(case) == 1).sum())
    # Better than the same labels in steps of the coarse pixels.
    stepped = metrics.dice(case.restore(np.asarray(case.labels())), study.truth(case), 3)
    assert 0.6 < stepped[0] < rows[0]["dice"] < 1 and rows[0]["hd95"] <= math.hypot(3.7, 3.7), (stepped, rows)


class Oracle(torch.nn.Module):
    """Knows the prepared truth of one case."""

    def __init__(self, case):
        super().__init__()
        self.truth = torch.from_numpy(crop_or_pad(np.asarray(case.labels()), (SIZE, SIZE))).long()

    def forward(self, x):
        return 20 * torch.nn.functional.one_hot(self.truth, 4).movedim(-1, 1).float()


@pytest.mark.parametrize("size", [(24, 28), (64, 40), (4, 24, 40), (6, 64, 24)])
def test_predictions_come_back_to_where_they_belong(finished, size):
    """An identity network whose classes are the image's own intensity, at crops and pads of 2D and 3D sizes."""
    run, config, _ = finished
    other = config_file.from_dict(config_file.to_dict(config))
    other.data.size = size
    other.network.dims = len(size)
    study = open_study(run, other)
    case = study.volumes("test")[0]
    predicted = evaluate.predict_case(Threshold(), case, study)
    image = np.asarray(case.image(), np.float32)
    expected = uncrop(crop_or_pad((image > 0.5).astype(np.uint8), size), image.shape[3 - len(size) :])
    np.testing.assert_array_equal(predicted, expected)


class Threshold(torch.nn.Module):
    def forward(self, x):
        return torch.cat([0.5 - x, x - 0.5], 1) * 1e3


def test_finetune_trains_both_arms_and_reports(finished, capsys):
    run, config, _ = finished
    result = downstream.run(run, config, "finetune")
    assert [entry["arm"] for entry in result["summary"]] == ["pretrained", "random"]
    assert all(model["step"] >= 1 for model in result["models"])
    shown = capsys.readouterr().out
    assert "pretrained - random" in shown and "finetune" in shown
    state = evaluate.load_model(run / "finetune/models/n1_seed0_pretrained.safetensors", open_study(run, config))[0].backbone.state_dict()
    before = checkpoint.load_backbone(run)[0].state_dict()
    assert any(not torch.equal(before[name], state[name]) for name in before)


def test_augmentation_moves_image_and_labels_together():
    config = small_config("")
    config.photometric = config_file.PhotometricConfig(noise_p=0, blur_p=0, gamma_p=0, bias_p=0, invert_p=0)
    config.downstream.augment_p = 1.0
    labels = torch.zeros(8, SIZE, SIZE, dtype=torch.long)
    labels[:, 8:20, 10:26] = 1
    images, warped = finetune.Augment(config)(labels[:, None].float(), labels, torch.Generator().manual_seed(0))
    assert ((images[:, 0] > 0.5) == (warped == 1)).float().mean() > 0.97
    assert not torch.equal(warped, labels)


# the check


@pytest.mark.parametrize(("pretrained", "random", "above"), [(0.4, 0.1, True), (0.1, 0.1, False), (0.1, 0.4, False)])
def test_check_compares_the_fewest_labels(tmp_path, pretrained, random, above):
    (tmp_path / "probe").mkdir()
    dice = {("pretrained", 1): pretrained, ("random", 1): random, ("pretrained", 5): 0.2, ("random", 5): 0.3}
    summary = [{"arm": arm, "labelled": n, "dice": {"mean": {"mean": value}}} for (arm, n), value in dice.items()]
    (tmp_path / "probe/results.json").write_text(json.dumps({"summary": summary}))
    assert report.probe_above_random(tmp_path) is above


def test_check_without_a_probe_names_the_command(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"probe/results.json.*pix2rep probe.*got"):
        report.probe_above_random(tmp_path)


# bad input


def test_too_few_labelled_patients_are_named_before_any_training(finished):
    run, config, _ = finished
    many = config_file.from_dict(config_file.to_dict(config))
    many.downstream.labelled = (1, 9)
    with pytest.raises(ValueError, match=r"labelled patients must number 1 to 3.*got 9"):
        downstream.run(run, many, "probe")


def test_a_test_part_without_labels_is_named(tmp_path):
    write_patients(tmp_path / "data", 5, labelled=3)
    config = write_run(tmp_path / "data", tmp_path / "run")
    with pytest.raises(ValueError, match=r"'test' must hold at least one patient with labels, got 2 patients"):
        downstream.run(tmp_path / "run", config, "probe")


def test_data_without_any_label_is_named(tmp_path):
    write_patients(tmp_path / "data", 4, labelled=0)
    config = write_run(tmp_path / "data", tmp_path / "run")
    with pytest.raises(ValueError, match=r"data.root must hold labels above 0, got 0 label files for 8 volumes"):
        downstream.run(tmp_path / "run", config, "probe")


def test_names_for_fewer_classes_than_labels_are_refused(finished):
    run, config, _ = finished
    short = config_file.from_dict(config_file.to_dict(config))
    short.data.classes = ("LV",)
    with pytest.raises(ValueError, match=r"labels must be 0..1 \(LV; data.classes or dataset.json\)"):
        open_study(run, short)


def test_a_run_without_weights_is_refused(finished, tmp_path):
    _, config, _ = finished
    with pytest.raises(FileNotFoundError, match="weights.safetensors"):
        downstream.run(tmp_path, config, "probe")


def test_evaluate_without_models_names_the_commands(finished, tmp_path):
    _, config, _ = finished
    with pytest.raises(FileNotFoundError, match=r"pix2rep probe.*0 found"):
        evaluate.run(tmp_path, config)


def test_another_network_than_the_pretrained_one_is_refused(finished):
    run, config, _ = finished
    other = config_file.from_dict(config_file.to_dict(config))
    other.network.features = 16
    with pytest.raises(ValueError, match=r"network must be that of the run's weights.*features=8.*got.*features=16"):
        downstream.run(run, other, "probe")


def test_an_unknown_task_is_refused(finished):
    run, config, _ = finished
    with pytest.raises(ValueError, match="one of probe, finetune, mean_teacher, got 'both'"):
        downstream.run(run, config, "both")
