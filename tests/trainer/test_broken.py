"""Broken volumes among good ones: all are named at once, and nothing trains on them unless told to go on without."""

import json
import os
import re

import nibabel as nib
import numpy as np
import pytest
from typer.testing import CliRunner

from pix2rep.cli import app
from pix2rep.config import DataConfig, load
from pix2rep.data.cache import prepare
from pix2rep.data.discover import class_names, discover
from pix2rep.data.nifti import VolumeError, read
from pix2rep.data.problems import BadVolumes
from pix2rep.data.scan import scan
from pix2rep.study import open_study
from volumes import AFFINE, BROKEN, SHAPE, labels, patch, save, volume

CLASSES = {"labels": {"background": 0, "wall": 1, "core": 2}}


def good_volumes(root):
    """Orientations, spacings, shapes, types and scalings mixed."""
    save(root / "good0/t1.nii.gz", volume())
    save(root / "good0/t1_seg.nii.gz", labels())
    turned = np.diag([-1.0, -1.0, 3.0, 1.0])[[2, 0, 1, 3]]
    save(root / "good1/t1.nii.gz", volume((7, 14, 9)).astype(np.float64), turned)
    save(root / "good1/t1_seg.nii.gz", labels((7, 14, 9)).astype(np.float32), turned + 1e-4)
    oblique = np.eye(4)
    oblique[:2, :2] = [[0.9, -0.4], [0.4, 0.9]]
    save(root / "good2/t1.nii", volume((9, 9, 3)), oblique)
    patch(root / "good2/t1.nii", scl_slope=0.37, scl_inter=-1024.5)
    save(root / "good3/flat.nii.gz", volume((12, 10)).astype(np.uint8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("broken") / "data"
    good_volumes(root)
    for name, (make, _, _) in BROKEN.items():
        (root / name).mkdir()
        make(root / name)
    (root / "dataset.json").write_text(json.dumps(CLASSES))
    return root


@pytest.fixture(scope="module")
def refused(folder, tmp_path_factory):
    with pytest.raises(BadVolumes) as error:
        prepare(discover(folder), DataConfig(root=str(folder)), tmp_path_factory.mktemp("cache"))
    return error.value


def test_all_are_reported_at_once(refused, folder):
    assert {problem.path.parent.name for problem in refused.problems} == set(BROKEN)
    assert len(refused.problems) == len(BROKEN)
    text = str(refused)
    assert text.startswith(f"data.root must hold usable volumes only, got {len(BROKEN)} of {len(BROKEN) + 4} that are not:\n")
    assert "data.skip_bad=true (pix2rep pretrain --skip-bad)" in text
    assert all(str(folder / name / file) in text for name, (_, file, _) in BROKEN.items())
    assert re.search(r"every voxel must be finite \(2 files\)\n    .*/inf/t1.nii.gz: got 2 non-finite of 480\n    .*/nan/t1", text)


@pytest.mark.parametrize("name", BROKEN)
def test_file_and_reason_are_named(refused, folder, name):
    _, file, words = BROKEN[name]
    (problem,) = (problem for problem in refused.problems if problem.path.parent.name == name)
    assert problem.path == folder / name / file
    assert words in problem.reason
    assert "\n" not in problem.reason and str(problem.path) not in problem.reason


def test_scan_finds_what_prepare_refuses(refused, folder, tmp_path):
    found = scan(folder, tmp_path)
    assert found.problems == refused.problems
    assert [info.case.patient for info in found.volumes] == ["good0", "good1", "good2", "good3"]


def test_skip_bad_goes_on_with_the_good_ones(refused, folder, tmp_path):
    prepared = prepare(discover(folder), DataConfig(root=str(folder), skip_bad=True), tmp_path, workers=1)
    assert prepared.patients == ["good0", "good1", "good2", "good3"]
    assert prepared.problems == refused.problems  # by one thread or several
    for case in prepared.cases:
        expected = nib.as_closest_canonical(nib.load(case.source)).get_fdata().reshape(case.native_shape[::-1])
        np.testing.assert_array_equal(read(case.source).array, expected.astype(np.float32))


def test_image_and_label_are_both_named(tmp_path):
    save(tmp_path / "a/t1.nii.gz", np.ones(SHAPE, np.int16))
    save(tmp_path / "a/t1_seg.nii.gz", labels() - 0.5)
    with pytest.raises(BadVolumes, match=r"got 1 of 1(?s:.*)intensities must vary(?s:.*)labels must be whole numbers"):
        prepare(discover(tmp_path), DataConfig(), tmp_path / "c")


def test_a_file_without_permission(tmp_path):
    path = save(tmp_path / "t1.nii.gz", volume())
    path.chmod(0)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)  # root may read everything
    try:
        with pytest.raises(VolumeError, match=r"t1.nii.gz: cannot be opened \(Permission denied\)"):
            read(path)
    finally:
        os.seteuid(user)


def test_lost_label_headers_may_be_ignored(tmp_path):
    """The label's voxels then lie as the image's: here both are stored from right to left, and only the image's header says so."""
    affine = np.diag([-2.0, 1.5, 8.0, 1.0])
    save(tmp_path / "d/t1.nii.gz", volume(), affine)
    save(tmp_path / "d/t1_seg.nii.gz", labels(), np.eye(4))
    with pytest.raises(BadVolumes, match="labels must lie on the image's grid"):
        prepare(discover(tmp_path / "d"), DataConfig(), tmp_path / "c")
    (case,) = prepare(discover(tmp_path / "d"), DataConfig(label_affine="ignore"), tmp_path / "c").cases
    np.testing.assert_array_equal(case.labels(), labels()[::-1].T)
    assert scan(tmp_path / "d", tmp_path / "s", label_affine="ignore").problems == []


@pytest.mark.parametrize(("share", "good"), [(0.49, True), (0.51, False)])
@pytest.mark.parametrize("axis", range(3))
def test_grids_may_differ_by_half_a_voxel(tmp_path, axis, share, good):
    affine = AFFINE.copy()
    affine[axis, 3] += share * AFFINE[axis, axis]
    save(tmp_path / "t1.nii.gz", volume())
    save(tmp_path / "t1_seg.nii.gz", labels(), affine)
    assert (not scan(tmp_path, tmp_path / "s").problems) == good


def test_regions_name_as_many_labels_as_they_hold(tmp_path):
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "whole": [1, 2, 3], "core": [3], "edge": 1}}))
    assert class_names(tmp_path) == ("edge", "2", "3")
    for text in ('{"labels": [1]}', "[]", "{", '{"labels": "\xff'):
        (tmp_path / "dataset.json").write_text(text, encoding="latin-1")
        with pytest.raises(ValueError, match="dataset.json must hold a JSON object, labels one too, got"):
            class_names(tmp_path)


def test_what_discovery_leaves_out_is_said(tmp_path, caplog):
    save(tmp_path / "d/anna/t1.nii", volume())
    save(tmp_path / "d/anna/t1_mask.nii", labels())
    save(tmp_path / "d/anna/t1_seg.nii", labels())
    (tmp_path / "d/ben").symlink_to(tmp_path / "d/anna")
    assert [(case.id, case.label.name) for case in discover(tmp_path / "d")] == [("t1", "t1_seg.nii")]
    assert "1 images have several label files; the last by name is taken, such as" in caplog.text
    assert f"{tmp_path / 'd/ben'} is a link to a folder: its volumes are not seen" in caplog.text


def test_pretrain_refuses_or_skips(tmp_path):
    for k in range(5):
        save(tmp_path / f"d/p{k}/t1.nii.gz", volume((32, 32, 2), k))
        save(tmp_path / f"d/p{k}/t1_seg.nii.gz", labels((32, 32, 2)))
    save(tmp_path / "d/p5/t1.nii.gz", volume((32, 32, 2)))
    bad = save(tmp_path / "d/p5/t1_seg.nii.gz", labels((32, 32, 3)))  # never a label dropped in silence: its image goes too
    run = tmp_path / "run"
    command = ["pretrain", str(tmp_path / "d"), str(run)]
    tiny = (
        "data.size=32,32 network.channels=4,4,8,8,8 network.features=8 network.head_hidden=8 network.projection=8 loss.num_samples=64"
        " split.val=0.2 split.test=0.2 pretrain.steps=1 pretrain.batch_size=2 pretrain.device=cpu pretrain.threads=1"
    ).split()
    result = CliRunner().invoke(app, [*command, *tiny])
    assert result.exit_code == 2 and f"{bad}: labels must have the image's shape" in result.output
    assert not (run / "checkpoints").exists() and not (run / "skipped.json").exists()

    result = CliRunner().invoke(app, [*command, *tiny, "--skip-bad"])
    assert result.exit_code == 0, result.output
    reason = "labels must have the image's shape [32, 32, 2] (X, Y, Z), got [32, 32, 3]"
    assert json.loads((run / "skipped.json").read_text()) == {"version": 1, "skipped": [{"case": "p5_t1", "path": str(bad), "reason": reason}]}
    start = json.loads((run / "log.jsonl").read_text().splitlines()[1])
    assert (start["event"], start["skipped"]) == ("start", ["p5_t1"])
    assert "skipped 1 of 6 volumes" in result.output

    config = load(run / "config.yaml")
    assert config.data.skip_bad
    assert open_study(run, config).prepared.skipped == [("p5_t1", f"{bad}: {reason}")]
    config.data.skip_bad = False
    with pytest.raises(BadVolumes, match="p5/t1_seg"):
        open_study(run, config)
