"""What is remembered of volumes (prepared arrays, scans) is trusted only while it is what was written, and the files what they were."""

import json
import os

import numpy as np
import pytest

from pix2rep.config import DataConfig
from pix2rep.data import pair
from pix2rep.data.cache import prepare
from pix2rep.data.nifti import VolumeError
from pix2rep.data.parallel import in_order
from pix2rep.data.problems import BadVolumes
from pix2rep.data.scan import scan
from pix2rep.data.slices import SliceSource
from volumes import AFFINE, dataset, labels, save, volume


def cut(path):
    path.write_bytes(path.read_bytes()[:-8])


DAMAGE = {
    "image-cut": ("*.image.npy", cut),
    "image-empty": ("*.image.npy", lambda path: path.write_bytes(b"")),
    "image-foreign": ("*.image.npy", lambda path: path.write_bytes(b"not an array")),
    "image-type": ("*.image.npy", lambda path: np.save(path, np.load(path).astype(np.float32))),
    "image-shape": ("*.image.npy", lambda path: np.save(path, np.load(path)[:-1])),
    "label-gone": ("*.label.npy", lambda path: path.unlink()),
    "label-shape": ("*.label.npy", lambda path: np.save(path, np.load(path)[..., :-1])),
    "entry-cut": ("p0-*.json", cut),
    "entry-foreign": ("p0-*.json", lambda path: path.write_text('{"id": "p0"}')),
    "entry-list": ("p0-*.json", lambda path: path.write_text("[]")),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_cache_is_made_again(tmp_path, name):
    pattern, damage = DAMAGE[name]
    cases = dataset(tmp_path / "d", 1)
    prepare(cases, DataConfig(), tmp_path / "c")
    (file,) = (tmp_path / "c").glob(pattern)
    damage(file)
    (case,) = prepare(cases, DataConfig(), tmp_path / "c").cases
    np.testing.assert_array_equal(case.labels(), labels().T)
    assert case.image().shape == case.labels().shape and case.image().dtype == np.float16


@pytest.mark.parametrize("damage", [cut, lambda path: path.unlink()], ids=["cut", "gone"])
def test_a_prepared_volume_that_changes_during_the_run_is_named(tmp_path, damage):
    prepared = prepare(dataset(tmp_path / "d", 2), DataConfig(), tmp_path / "c")
    source = SliceSource(prepared, prepared.patients, (8, 8), labelled=True)
    damage(prepared.cases[1].image_file)
    source.batch([0])
    with pytest.raises(VolumeError, match=r"p1-.*\.image\.npy: must be a prepared volume, float16 \[4, 10, 12\], got"):
        source.batch([5])


@pytest.mark.parametrize("change", [lambda path: save(path, volume(seed=9)), lambda path: path.unlink()], ids=["changes", "vanishes"])
def test_a_source_that_does_not_stay_while_it_is_read_is_named(tmp_path, monkeypatch, change):
    case = dataset(tmp_path / "d", 1)[0]
    real = pair.read

    def read(path):
        found = real(path)
        change(path)
        return found

    monkeypatch.setattr(pair, "read", read)
    with pytest.raises(BadVolumes, match=r"imagesTr/p0.nii.gz: must not change while it is read"):
        prepare([case], DataConfig(), tmp_path / "c")


def test_names_are_checked_of_what_was_prepared_before(tmp_path):
    cases = dataset(tmp_path / "d", 1)
    prepare(cases, DataConfig(), tmp_path / "c")
    with pytest.raises(BadVolumes, match=r"labelsTr/p0.nii.gz: labels must be 0..1 \(wall; data.classes or dataset.json\), got 2"):
        prepare(cases, DataConfig(classes=("wall",)), tmp_path / "c")


def test_workers_change_neither_order_nor_bytes(tmp_path):
    cases = dataset(tmp_path / "d", 7)
    cases[3].image.write_bytes(b"")
    options, told = DataConfig(skip_bad=True, spacing=(1.0, 1.0)), []
    one = prepare(cases, options, tmp_path / "1", workers=1)
    three = prepare(cases, options, tmp_path / "3", lambda *done: told.append(done), workers=3)
    assert told == [(k, 7) for k in range(1, 8)]
    assert one.problems == three.problems and one.patients == ["p0", "p1", "p2", "p4", "p5", "p6"] == [case.id for case in three.cases]
    for a, b in zip(one.cases, three.cases, strict=True):
        assert a.image_file.read_bytes() == b.image_file.read_bytes() and a.label_file.read_bytes() == b.label_file.read_bytes()


def test_few_items_are_in_flight():
    taken = []

    def items():
        for k in range(100):
            taken.append(k)
            yield k

    results = in_order(lambda k: k * k, items(), workers=3)
    for k in range(100):
        assert next(results) == k * k
        assert len(taken) - k <= 6
    with pytest.raises(ZeroDivisionError):
        list(in_order(lambda k: 1 / (k - 50), iter(range(100)), workers=3))


class TestScan:
    def test_facts(self, tmp_path):
        turned = np.diag([-3.0, -1.0, 2.0, 1.0])[[2, 0, 1, 3]]  # stored along (up to sign) Y, Z, X
        array = volume((6, 8, 9)).astype(np.float32)
        save(tmp_path / "d/a.nii.gz", array, turned)
        save(tmp_path / "d/a_seg.nii.gz", labels((6, 8, 9)), turned)
        save(tmp_path / "d/b.nii", volume((300, 200, 2)))
        found = scan(tmp_path / "d", tmp_path / "s")
        assert (found.root, found.problems, found.classes, found.from_cache) == (tmp_path / "d", [], (), 0)
        a, b = found.volumes
        assert (a.case.id, a.shape, a.orientation, a.dtype) == ("a", (9, 6, 8), "PIR", "float32")
        assert a.spacing == pytest.approx((2.0, 3.0, 1.0))
        assert (a.low, a.high) == (array.min(), array.max()) and [a.p1, a.p99] == pytest.approx(np.percentile(array, (1, 99)))
        assert a.labels == {0: 408, 1: 16, 2: 8}
        assert b.labels is None and b.thumbnail_labels is None
        assert b.thumbnail.shape == (64, 96) and b.thumbnail.dtype == np.uint8 and b.dtype == "int16"

    def test_thumbnail_has_anterior_up_and_right_on_the_right(self, tmp_path):
        array, mark = np.zeros((200, 100, 5), np.int16), np.zeros((200, 100, 5), np.uint8)
        array[150:, 75:, 1], mark[150:, 75:, 1], mark[0, 0, 3] = 1000, 1, 1  # right, anterior; slice 3 has less
        save(tmp_path / "d/a.nii.gz", array, AFFINE)
        save(tmp_path / "d/a_seg.nii.gz", mark, AFFINE)
        (info,) = scan(tmp_path / "d", tmp_path / "s").volumes
        expected = np.zeros((48, 96), np.uint8)
        expected[:12, 72:] = 1
        np.testing.assert_array_equal(info.thumbnail_labels, expected)
        np.testing.assert_array_equal(info.thumbnail, 255 * expected)

    def test_remembers_until_a_file_changes(self, tmp_path):
        cases = dataset(tmp_path / "d", 3)
        first = scan(tmp_path / "d", tmp_path / "s", workers=1)
        again = scan(tmp_path / "d", tmp_path / "s", workers=2)
        assert (first.from_cache, again.from_cache) == (0, 3) and again.volumes == first.volumes
        for a, b in zip(first.volumes, again.volumes, strict=True):
            np.testing.assert_array_equal(a.thumbnail, b.thumbnail)
            np.testing.assert_array_equal(a.thumbnail_labels, b.thumbnail_labels)
        save(cases[0].image, 2 * volume(seed=0))
        os.utime(cases[1].label, ns=(1, 1))
        changed = scan(tmp_path / "d", tmp_path / "s")
        assert changed.from_cache == 1 and changed.volumes[0].high == 2 * first.volumes[0].high and changed.volumes[1:] == first.volumes[1:]
        cases[2].image.write_bytes(b"")
        assert [problem.case for problem in scan(tmp_path / "d", tmp_path / "s").problems] == ["p2"]

    def test_names_count_though_remembered(self, tmp_path):
        dataset(tmp_path / "d", 1)
        assert not scan(tmp_path / "d", tmp_path / "s").problems
        (tmp_path / "d/dataset.json").write_text(json.dumps({"labels": {"0": "background", "1": "wall"}}))
        found = scan(tmp_path / "d", tmp_path / "s")
        assert found.from_cache == 1 and found.classes == ("wall",) and not found.volumes
        assert "labels must be 0..1 (wall; data.classes or dataset.json), got 2" in found.problems[0].reason
        assert not scan(tmp_path / "d", tmp_path / "s", classes=("wall", "core")).problems

    @pytest.mark.parametrize(
        "damage",
        [cut, lambda path: path.write_bytes(b""), lambda path: path.write_text("x"), lambda path: np.savez(path, entries=np.zeros(3, np.uint8))],
        ids=["cut", "empty", "text", "foreign"],
    )
    def test_a_damaged_memory_is_made_again(self, tmp_path, damage):
        dataset(tmp_path / "d", 1)
        first = scan(tmp_path / "d", tmp_path / "s")
        (file,) = (tmp_path / "s").iterdir()
        damage(file)
        again = scan(tmp_path / "d", tmp_path / "s")
        assert again.from_cache == 0 and again.volumes == first.volumes
        assert scan(tmp_path / "d", tmp_path / "s").from_cache == 1

    def test_lies_in_the_users_cache_and_may_be_refused_there(self, tmp_path, monkeypatch, caplog):
        dataset(tmp_path / "d", 1)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
        scan(tmp_path / "d")
        assert len(list((tmp_path / "x/pix2rep").glob("scan-*.npz"))) == 1
        (tmp_path / "file").touch()
        with caplog.at_level("INFO"):
            assert len(scan(tmp_path / "d", tmp_path / "file").volumes) == 1
        assert "this scan is not remembered" in caplog.text
