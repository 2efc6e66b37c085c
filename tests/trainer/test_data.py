"""Volumes in every layout, damaged ones included, to batches of slices and back."""

import gzip
import json
import logging
import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from pix2rep.config import DataConfig
from pix2rep.data import cache
from pix2rep.data.cache import crop_or_pad, prepare, uncrop
from pix2rep.data.discover import Case, class_names, discover, disease_group
from pix2rep.data.nifti import VolumeError, read, read_labels, save_like
from pix2rep.data.slices import SliceSource
from volumes import dataset, labels, save, volume

REAL = Path(os.environ.get("PIX2REP_DATA", Path(__file__).parents[2] / ".." / "shared" / "data"))


def oriented(array: np.ndarray, codes: str) -> tuple[np.ndarray, np.ndarray]:
    """The same RAS volume, stored along other axes."""
    affine = np.diag([2.0, 1.5, 8.0, 1.0])
    affine[:3, 3] = 5, -7, 11
    change = nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(codes))
    stored = nib.orientations.apply_orientation(array, change)
    return stored, affine @ nib.orientations.inv_ornt_aff(change, array.shape)


class TestNifti:
    @pytest.mark.parametrize("codes", ["RAS", "LPS", "PIR", "SAL", "ILA"])
    def test_round_trip_through_any_orientation(self, tmp_path, codes):
        truth = volume(shape=(5, 6, 7))
        stored, affine = oriented(truth, codes)
        path = save(tmp_path / "v.nii.gz", stored, affine)
        found = read(path)
        assert found.orientation == codes
        np.testing.assert_array_equal(found.array, truth)
        np.testing.assert_allclose(found.affine, oriented(truth, "RAS")[1], atol=1e-4)
        assert found.spacing == pytest.approx((2.0, 1.5, 8.0))

        mark = (truth % 7).astype(np.uint8)
        out = save_like(mark.transpose(2, 1, 0), Case("v", "v", None, path, None), tmp_path / "out.nii.gz")
        written = nib.load(out)
        np.testing.assert_array_equal(np.asanyarray(written.dataobj), oriented(mark, codes)[0])
        np.testing.assert_allclose(written.affine, affine, atol=1e-4)
        assert written.get_data_dtype() == np.uint8
        np.testing.assert_array_equal(read_labels(out), mark)

    def test_save_like_refuses_another_shape(self, tmp_path):
        path = save(tmp_path / "v.nii.gz", volume())
        with pytest.raises(ValueError, match=r"labels must have shape \[Z, H, W\] = \[4, 10, 12\].*got \[4, 12, 10\]"):
            save_like(np.zeros((4, 12, 10), np.uint8), Case("v", "v", None, path, None), tmp_path / "o.nii.gz")

    def test_two_dimensional_file_is_one_slice(self, tmp_path):
        path = save(tmp_path / "flat.nii.gz", volume((12, 10)))
        assert read(path).array.shape == (12, 10, 1)
        out = save_like(np.ones((1, 10, 12), np.uint8), Case("v", "v", None, path, None), tmp_path / "o.nii.gz")
        assert nib.load(out).shape == (12, 10)

    def test_trailing_axis_of_one_is_dropped(self, tmp_path):
        assert read(save(tmp_path / "v.nii.gz", volume((12, 10, 4, 1)))).array.shape == (12, 10, 4)

    @pytest.mark.parametrize(
        ("make", "reason"),
        [
            (lambda p: save(p, volume((6, 6, 3, 5))), "must be a 3D volume, got 4D"),
            (lambda p: save(p, np.where(volume() > 490, np.nan, 1.0).astype(np.float32)), "every voxel must be finite, got"),
            (lambda p: p.write_bytes(b""), "the file is empty"),
            (lambda p: p.write_bytes(gzip.compress(b"no image" * 100)), "cannot be read as NIfTI"),
            (lambda p: p.write_bytes(save(p, volume((40, 40, 9))).read_bytes()[:9000]), "cannot be read as NIfTI"),
            (lambda p: None, r"cannot be opened \(No such file"),
        ],
        ids=["4d", "nan", "empty", "not nifti", "truncated", "missing"],
    )
    def test_bad_volume_names_file_and_reason(self, tmp_path, make, reason):
        path = tmp_path / "bad.nii.gz"
        make(path)
        with pytest.raises(VolumeError, match=reason) as error:
            read(path)
        assert str(path) in str(error.value)

    def test_labels_must_be_small_integers(self, tmp_path):
        assert read_labels(save(tmp_path / "f.nii.gz", labels().astype(np.float32))).dtype == np.uint8
        broken = {"whole numbers": (labels() + 0.5, labels() * np.nan), r"0\.\.255": (labels() + 300.0, labels() - 1.0)}
        for reason, array in [(reason, array) for reason, arrays in broken.items() for array in arrays]:
            with pytest.raises(VolumeError, match=reason):
                read_labels(save(tmp_path / "g.nii.gz", array.astype(np.float32)))


class TestDiscover:
    def test_acdc(self, tmp_path, caplog):
        for frame in ("frame01", "frame12"):
            save(tmp_path / f"training/patient007/patient007_{frame}.nii.gz", volume())
            save(tmp_path / f"training/patient007/patient007_{frame}_gt.nii.gz", labels())
        save(tmp_path / "training/patient007/patient007_4d.nii.gz", volume((4, 4, 2, 3)))
        (tmp_path / "training/patient007/Info.cfg").write_text("ED: 12\nES: 1\nGroup: HCM\n")
        save(tmp_path / "testing/patient101/patient101_frame04.nii", volume())
        save(tmp_path / "testing/patient101/patient101_frame11.nii", volume())
        with caplog.at_level(logging.INFO):
            cases = discover(tmp_path)
        assert [(c.id, c.patient, c.frame, c.label is not None) for c in cases] == [
            ("patient007_frame01", "patient007", "ES", True),
            ("patient007_frame12", "patient007", "ED", True),
            ("patient101_frame04", "patient101", "ED", False),
            ("patient101_frame11", "patient101", "ES", False),
        ]
        assert "1 4D cine files ignored" in caplog.text
        assert class_names(tmp_path) == ("RV", "MYO", "LV")
        assert [disease_group(c) for c in cases[1:3]] == ["HCM", None]

    def test_decathlon(self, tmp_path):
        dataset(tmp_path, 2)
        save(tmp_path / "imagesTr/._p0.nii.gz", volume())  # left behind by macOS
        (tmp_path / "dataset.json").write_text(json.dumps({"labels": {"0": "background", "1": "wall", "2": "core"}}))
        assert [(c.id, c.label.name) for c in discover(tmp_path)] == [("p0", "p0.nii.gz"), ("p1", "p1.nii.gz")]
        assert class_names(tmp_path) == ("wall", "core")

    def test_nnunet_channels(self, tmp_path, caplog):
        for name in ("a_0000", "a_0001", "b_0000", "b_0001"):
            save(tmp_path / f"imagesTr/{name}.nii.gz", volume())
        save(tmp_path / "labelsTr/a.nii.gz", labels())
        (tmp_path / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "core": 2, "whole": [1, 2]}}))
        cases = discover(tmp_path)
        assert [(c.id, c.image.name, c.label is not None) for c in cases] == [("a", "a_0000.nii.gz", True), ("b", "b_0000.nii.gz", False)]
        assert "2 files of further channels ignored" in caplog.text
        assert class_names(tmp_path) == ("1", "core")

    def test_names_ending_in_digits_are_no_channels(self, tmp_path):
        for name in ("scan_2019", "scan_2020"):
            save(tmp_path / f"imagesTr/{name}.nii.gz", volume())
            save(tmp_path / f"labelsTr/{name}.nii.gz", labels())
        assert [c.id for c in discover(tmp_path)] == ["scan_2019", "scan_2020"]

    def test_any_folder(self, tmp_path):
        for visit in ("v1", "v2"):
            save(tmp_path / f"set/sub-1/{visit}/heart.nii.gz", volume())
        save(tmp_path / "set/sub-1/v1/heart_seg.nii.gz", labels())
        save(tmp_path / "set/sub-2/v1/heart.nii", volume())
        save(tmp_path / "set/loose_gt.nii.gz", volume())  # nothing that it could label: an image
        assert [(c.id, c.patient, c.label is not None) for c in discover(tmp_path)] == [
            ("loose_gt", "loose_gt", False),
            ("sub-1_v1_heart", "sub-1", True),
            ("sub-1_v2_heart", "sub-1", False),
            ("sub-2_v1_heart", "sub-2", False),
        ]
        assert class_names(tmp_path) == ()

    def test_errors(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"data.root must be a folder.*no such folder"):
            discover(tmp_path / "absent")
        with pytest.raises(FileNotFoundError, match=r"data.root must be a folder.*\(0 found\)"):
            discover(tmp_path)
        save(tmp_path / "a.nii", volume())
        save(tmp_path / "a.nii.gz", volume())
        with pytest.raises(ValueError, match=r"ids must be unique, got 'a' from both .*a\.nii and .*a\.nii\.gz"):
            discover(tmp_path)


class TestCache:
    def test_scaled_to_the_unit_interval_in_zhw(self, tmp_path):
        case = dataset(tmp_path / "d", 1)[0]
        prepared = prepare([case], DataConfig(percentiles=(5, 95)), tmp_path / "c")
        found, raw = prepared.cases[0], volume().transpose(2, 1, 0)
        low, high = np.percentile(raw, (5, 95))
        np.testing.assert_allclose(found.image(), (raw.clip(low, high) - low) / (high - low), atol=1e-3)
        np.testing.assert_array_equal(found.labels(), labels().transpose(2, 1, 0))
        assert isinstance(found.image(), np.memmap)
        assert found.spacing == pytest.approx((8.0, 1.5, 2.0))
        assert found.classes == (1, 2) and prepared.num_classes == 2

    def test_reused_until_source_or_options_change(self, tmp_path):
        cases = dataset(tmp_path / "d", 2)
        first = prepare(cases, DataConfig(), tmp_path / "c")
        before = [c.image_file.stat().st_mtime_ns for c in first.cases]
        again = prepare(cases, DataConfig(size=(8, 8)), tmp_path / "c")  # size acts on batches only
        assert again.cases == first.cases and [c.image_file.stat().st_mtime_ns for c in again.cases] == before
        assert cache.load(tmp_path / "c").cases == first.cases
        assert prepare(cases, DataConfig(percentiles=(0, 100)), tmp_path / "c").cases[0].image_file != first.cases[0].image_file
        save(cases[0].image, volume(seed=9))
        changed = prepare(cases, DataConfig(), tmp_path / "c")
        assert changed.cases[0].image_file != first.cases[0].image_file and changed.cases[1] == first.cases[1]
        os.utime(cases[1].label, ns=(1, 1))  # same size, another time
        assert prepare(cases, DataConfig(), tmp_path / "c").cases[1].image_file != first.cases[1].image_file
        assert not [p.name for p in (tmp_path / "c").iterdir() if p.name.startswith(".")]

    def test_broken_volumes_are_skipped_aloud(self, tmp_path, caplog):
        cases = dataset(tmp_path / "d", 5)
        cases[0].image.write_bytes(cases[0].image.read_bytes()[:200])
        save(cases[1].image, np.full((12, 10, 4), 7, np.int16))
        save(cases[2].label, labels((12, 10, 5)))
        cases[3].label.unlink()
        prepared = prepare(cases, DataConfig(skip_bad=True), tmp_path / "c")
        assert [c.id for c in prepared.cases] == ["p4"]
        reasons = dict(prepared.skipped)
        assert "cannot be read" in reasons["p0"]
        assert "intensities must vary, got 7" in reasons["p1"]
        assert "image's shape [12, 10, 4] (X, Y, Z), got [12, 10, 5]" in reasons["p2"]
        assert "cannot be opened" in reasons["p3"]
        assert all(f"skipped {name}" in caplog.text for name in reasons)
        assert cache.load(tmp_path / "c").skipped == prepared.skipped

    def test_nothing_usable_is_an_error_with_the_reasons(self, tmp_path):
        save(tmp_path / "d/a.nii.gz", np.ones((4, 4, 4), np.int16))
        with pytest.raises(ValueError, match=r"at least one usable volume, got 0 of 1\n  .*intensities must vary"):
            prepare(discover(tmp_path / "d"), DataConfig(skip_bad=True), tmp_path / "c")

    def test_mostly_one_value_still_has_a_range(self, tmp_path):
        array = np.zeros((20, 20, 4), np.int16)
        array[3, 3, 1] = 900
        prepared = prepare(discover(save(tmp_path / "d/a.nii.gz", array).parent), DataConfig(), tmp_path / "c")
        assert prepared.cases[0].image().max() == 1

    def test_label_box_and_resampling_are_undone(self, tmp_path):
        stored, affine = oriented(volume((30, 40, 6)), "LPS")
        truth = np.zeros((30, 40, 6), np.uint8)
        truth[8:20, 12:30, 2:5] = 1
        save(tmp_path / "d/a.nii.gz", stored, affine)
        save(tmp_path / "d/a_gt.nii.gz", oriented(truth, "LPS")[0], affine)
        prepared = prepare(discover(tmp_path / "d"), DataConfig(roi="gt", roi_margin=3, spacing=(1.0, 1.0)), tmp_path / "c")
        case = prepared.cases[0]
        assert case.crop == ((2, 5), (9, 33), (5, 23))
        assert case.shape == (3, 36, 36) and case.spacing == pytest.approx((8.0, 1.0, 1.0))
        np.testing.assert_array_equal(case.restore(case.labels()), truth.transpose(2, 1, 0))
        save_like(case.labels(), case, tmp_path / "o.nii.gz")
        np.testing.assert_array_equal(read_labels(tmp_path / "o.nii.gz"), truth)
        with pytest.raises(ValueError, match="prepared shape"):
            case.restore(np.zeros((6, 40, 30), np.uint8))

    @pytest.mark.parametrize(
        "bad", [{"percentiles": (99, 1)}, {"roi": "box"}, {"roi_margin": -1}, {"spacing": (1.0,)}, {"spacing": (1.0, 0.0)}], ids=str
    )
    def test_bad_options(self, tmp_path, bad):
        with pytest.raises(ValueError, match=f"data.{next(iter(bad))} must be"):
            prepare([], DataConfig(**bad), tmp_path)

    @pytest.mark.parametrize("shape", [(7, 9), (8, 4), (5, 12)])
    @pytest.mark.parametrize("size", [(6, 6), (7, 10), (12, 3)])
    def test_uncrop_inverts_crop_or_pad(self, shape, size):
        array = np.arange(2 * np.prod(shape)).reshape(2, *shape) + 1
        there = crop_or_pad(array, size)
        back = uncrop(there, shape)
        assert there.shape == (2, *size) and back.shape == array.shape
        kept = back != 0
        np.testing.assert_array_equal(back[kept], array[kept])
        assert kept.sum() == 2 * min(shape[0], size[0]) * min(shape[1], size[1])


@pytest.mark.parametrize(("name", "classes"), [("acdc", 3), ("hippocampus", 2), ("openkbp", 7)])
def test_real_data_prepares_whole(tmp_path, name, classes):
    root = REAL / name
    if not root.is_dir():
        pytest.skip(f"no real data at {root} (set PIX2REP_DATA)")
    cases = discover(root)[:12]
    prepared = prepare(cases, DataConfig(), tmp_path)
    assert not prepared.skipped and prepared.num_classes == classes
    for case in prepared.cases:
        image = case.image()
        assert 0 <= image.min() < image.max() <= 1 and image.shape == case.labels().shape
    first = prepared.cases[0]
    save_like(first.labels(), first, tmp_path / "o.nii.gz")
    np.testing.assert_array_equal(np.asanyarray(nib.load(tmp_path / "o.nii.gz").dataobj), np.asanyarray(nib.load(cases[0].label).dataobj))
    images, _ = SliceSource(prepared, prepared.patients, (24, 32, 32)).batch([0, 1])
    assert images.shape == (2, 1, 24, 32, 32)
