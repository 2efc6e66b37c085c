"""Splits by patient, batches of slices, and the order in which they come."""

import json
import shutil

import numpy as np
import pytest
import torch

from pix2rep.config import DataConfig, SplitConfig
from pix2rep.data.cache import prepare
from pix2rep.data.discover import discover, disease_group
from pix2rep.data.slices import SliceSource, StepSampler
from pix2rep.data.splits import labelled_patients, make_split, read_split, shared_images, warn_of_shared_images, write_split
from volumes import dataset, labels, save, volume


class TestSplits:
    def test_patients_never_cross(self, tmp_path):
        cases = dataset(tmp_path, 10)
        split = make_split(cases, SplitConfig(val=0.1, test=0.2))
        assert [len(split[p]) for p in ("pretrain", "val", "test")] == [7, 1, 2]
        assert sorted(split["pretrain"] + split["val"] + split["test"]) == [f"p{k}" for k in range(10)]
        assert split == make_split(cases[::-1], SplitConfig(val=0.1, test=0.2))
        assert split != make_split(cases, SplitConfig(val=0.1, test=0.2, seed=1))
        write_split(split, tmp_path / "s.json")
        assert read_split(tmp_path / "s.json", cases) == split

    def test_disease_groups_are_spread(self, tmp_path):
        for p in range(20):
            folder = tmp_path / f"patient{p:03d}"
            save(folder / f"patient{p:03d}_frame01.nii.gz", volume((4, 4, 2)))
            save(folder / f"patient{p:03d}_frame01_gt.nii.gz", labels((8, 8, 4))[:4, :4, :2])
            (folder / "Info.cfg").write_text(f"ED: 1\nES: 2\nGroup: {'ABCD'[p % 4]}\n")
        cases = discover(tmp_path)
        group = {c.patient: disease_group(c) for c in cases}
        for seed in range(5):
            split = make_split(cases, SplitConfig(val=0.2, test=0.4, seed=seed))
            assert sorted(group[p] for p in split["test"]) == sorted("AABBCCDD")
            assert sorted(group[p] for p in split["val"]) == list("ABCD")
            assert sorted(group[p] for p in labelled_patients(split, cases, 4, seed)) == list("ABCD")

    def test_groups_of_a_file_and_of_acdc_by_number(self, tmp_path):
        for p in (1, 2, 3, 4, 21, 22, 23, 24, 81, 82, 83, 84):
            save(tmp_path / f"data/patient{p:03d}_frame01.nii.gz", volume((4, 4, 2)))
            save(tmp_path / f"data/patient{p:03d}_frame01_gt.nii.gz", labels((8, 8, 4))[:4, :4, :2])
        cases = discover(tmp_path / "data")
        rows = [f"patient{p:03d},{'odd' if p % 2 else 'even'}" for p in range(1, 85)]
        (tmp_path / "g.csv").write_text("\n".join(["patient,group", *rows]))
        for seed in range(4):
            split = make_split(cases, SplitConfig(val=0.25, test=0.25, seed=seed, groups="acdc"))
            for part in ("val", "test"):
                assert [(int(p[7:]) - 1) // 20 for p in split[part]] == [0, 1, 4]
            assert split["groups"]["patient021"] == "HCM" and split["groups"]["patient084"] == "RV"
            assert len({split["groups"][p] for p in labelled_patients(split, cases, 3, seed)}) == 3
            split = make_split(cases, SplitConfig(val=2 / 12, test=4 / 12, seed=seed, groups=str(tmp_path / "g.csv")))
            assert sorted(int(p[7:]) % 2 for p in split["test"]) == [0, 0, 1, 1]
        with pytest.raises(ValueError, match=r"split.groups must name every patient, got none for 1 of 12 .*first patient084"):
            (tmp_path / "g.csv").write_text("\n".join(["patient,group", *rows[:-1]]))
            make_split(cases, SplitConfig(groups=str(tmp_path / "g.csv")))
        with pytest.raises(ValueError, match='split.groups must be "acdc" or a CSV'):
            make_split(cases, SplitConfig(groups="nowhere.csv"))

    def test_the_excluded_are_in_no_part_and_move_nobody(self, tmp_path):
        cases = dataset(tmp_path, 10)
        whole = make_split(cases, SplitConfig(val=0.1, test=0.2))
        gone = whole["test"][0], whole["pretrain"][0]
        split = make_split(cases, SplitConfig(val=0.1, test=0.2, exclude=gone))
        assert {part: [p for p in whole[part] if p not in gone] for part in ("pretrain", "val", "test")}.items() <= split.items()
        with pytest.raises(ValueError, match="split.exclude must name patients of the data, got p77"):
            make_split(cases, SplitConfig(exclude=("p77",)))

    def test_one_image_under_two_patients_is_told_of(self, tmp_path, caplog):
        dataset(tmp_path / "data", 6)
        shutil.copy(tmp_path / "data/imagesTr/p1.nii.gz", tmp_path / "data/imagesTr/p4.nii.gz")
        shutil.copy(tmp_path / "data/imagesTr/p2.nii.gz", tmp_path / "data/imagesTr/p3.nii.gz")
        prepared = prepare(discover(tmp_path / "data"), DataConfig(), tmp_path / "cache")
        split = {"pretrain": ["p0", "p1", "p2", "p3"], "val": ["p4"], "test": ["p5"]}
        assert shared_images(prepared.cases, split) == [("p1", "p4")]
        warn_of_shared_images(prepared.cases, split)
        assert "p1 (pretrain) and p4 (val) have the same image: leave one out with split.exclude" in caplog.text

    def test_labelled_patients_are_nested_and_labelled(self, tmp_path):
        cases = dataset(tmp_path, 12)
        (tmp_path / "labelsTr/p3.nii.gz").unlink()
        cases = discover(tmp_path)
        split = make_split(cases, SplitConfig(val=0.1, test=0.1))
        most = labelled_patients(split, cases, 8, seed=4)
        assert all(labelled_patients(split, cases, n, seed=4) == most[:n] for n in range(1, 9))
        assert "p3" not in most and set(most) <= set(split["pretrain"])
        assert any(labelled_patients(split, cases, 1, seed=s) != most[:1] for s in range(5))
        available = len(set(split["pretrain"]) - {"p3"})
        with pytest.raises(ValueError, match=f"1 to {available} .*got 40"):
            labelled_patients(split, cases, 40, seed=0)

    def test_bad_splits(self, tmp_path):
        cases = dataset(tmp_path, 3)
        with pytest.raises(ValueError, match=r"needs at least 3 patients \(test 1, val 1, pretrain 1\), got 2"):
            make_split(cases[:2], SplitConfig(val=0.1, test=0.2))
        with pytest.raises(ValueError, match="sum below 1, got 0.5 and 0.5"):
            make_split(cases, SplitConfig(val=0.5, test=0.5))
        path = tmp_path / "s.json"
        good = {"version": 1, "seed": 0, "pretrain": ["p0"], "val": ["p1"], "test": ["p2"]}
        for change, reason in (
            ({"test": ["p0"]}, "one part of the split only, got p0"),
            ({"test": ["p2", "p9"]}, "unknown p9"),
            ({"version": 2}, "split.file must hold"),
            ({"val": "p1"}, "split.file must hold"),
        ):
            path.write_text(json.dumps(good | change))
            with pytest.raises(ValueError, match=reason):
                read_split(path, cases)
        path.write_text("{")
        with pytest.raises(ValueError, match="must hold JSON"):
            read_split(path, cases)
        with pytest.raises(FileNotFoundError, match="no such file"):
            read_split(tmp_path / "none.json", cases)


class TestSlices:
    def test_batches(self, tmp_path):
        prepared = prepare(dataset(tmp_path / "d", 3), DataConfig(), tmp_path / "c")
        source = SliceSource(prepared, ["p0", "p2"], (8, 16), labelled=True)
        assert len(source) == 8
        images, target = source.batch([0, 5])
        assert images.shape == (2, 1, 8, 16) and images.dtype == torch.float32
        assert target.shape == (2, 8, 16) and target.dtype == torch.int64
        np.testing.assert_array_equal(images[1, 0, :, 2:14].numpy(), prepared.by_id["p2"].image()[1, 1:9].astype(np.float32))
        assert not images[..., :2].any() and not images[..., 14:].any()
        np.testing.assert_array_equal(source.case_slices("p2"), [4, 5, 6, 7])
        assert source.patients_of([1, 2, 7]) == ["p0", "p2"]
        assert SliceSource(prepared, ["p0"], (8, 8)).batch([0])[1] is None
        with pytest.raises(ValueError, match="must be one of the source's 2, got p1"):
            source.case_slices("p1")
        with pytest.raises(ValueError, match="must have a volume among the 3 prepared"):
            SliceSource(prepared, ["nobody"], (8, 8))

    def test_volumes_when_the_size_has_three_entries(self, tmp_path):
        prepared = prepare(dataset(tmp_path / "d", 2), DataConfig(), tmp_path / "c")
        source = SliceSource(prepared, prepared.patients, (6, 8, 8), labelled=True)
        images, target = source.batch([0, 1])
        assert len(source) == 2 and images.shape == (2, 1, 6, 8, 8) and target.shape == (2, 6, 8, 8)

    def test_unlabelled_cases_stay_out_of_a_labelled_source(self, tmp_path):
        dataset(tmp_path / "d", 2)
        (tmp_path / "d/labelsTr/p0.nii.gz").unlink()
        prepared = prepare(discover(tmp_path / "d"), DataConfig(), tmp_path / "c")
        assert [c.id for c in SliceSource(prepared, prepared.patients, (8, 8), labelled=True).cases] == ["p1"]
        assert len(SliceSource(prepared, prepared.patients, (8, 8)).cases) == 2

    def test_more_cases_than_open_maps(self, tmp_path, monkeypatch):
        monkeypatch.setattr("pix2rep.data.slices._OPEN", 2)
        prepared = prepare(dataset(tmp_path / "d", 5), DataConfig(), tmp_path / "c")
        source = SliceSource(prepared, prepared.patients, (10, 12))
        for i in (0, 8, 16, 3, 19, 0):
            np.testing.assert_array_equal(source.batch([i])[0][0, 0], prepared.cases[i // 4].image()[i % 4].astype(np.float32))
        assert len(source._maps) <= 2


class TestSampler:
    def test_a_function_of_seed_and_step(self):
        forward = [StepSampler(50, 8, seed=3).indices(s) for s in range(20)]
        sampler = StepSampler(50, 8, seed=3)
        for step in (17, 3, 19, 0, 6):
            np.testing.assert_array_equal(sampler.indices(step), forward[step])
        assert any((StepSampler(50, 8, seed=4).indices(s) != forward[s]).any() for s in range(3))

    def test_an_epoch_sees_each_item_at_most_once_and_differs_from_the_next(self):
        sampler = StepSampler(50, 8, seed=0)
        epochs = [np.concatenate([sampler.indices(6 * e + s) for s in range(6)]) for e in range(40)]
        assert all(len(set(e)) == 48 for e in epochs)
        assert (epochs[0] != epochs[1]).any()
        assert np.bincount(np.concatenate(epochs), minlength=50).min() > 20  # no item is left out for good

    def test_fewer_items_than_a_batch_wrap_around(self):
        found = StepSampler(3, 8, seed=0).indices(5)
        assert len(found) == 8 and sorted(np.bincount(found)) == [2, 3, 3]
        with pytest.raises(ValueError, match="at least 1, got 0 and 8"):
            StepSampler(0, 8, seed=0)
