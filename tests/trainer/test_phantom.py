"""Phantoms: reproducible, in ACDC's layout, with hearts that obey anatomy."""

import json

import nibabel as nib
import numpy as np
import pytest

from pix2rep.config import DataConfig
from pix2rep.data.anatomy import GROUPS, LV, MYO, RV, Body, spline_basis
from pix2rep.data.cache import prepare
from pix2rep.data.discover import class_names, discover, disease_group
from pix2rep.data.phantom import write_phantoms

SIZE = 64


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("phantoms")
    write_phantoms(folder, patients=10, seed=5, size=SIZE)
    return folder


@pytest.fixture(scope="module")
def prepared(root, tmp_path_factory):
    return prepare(discover(root), DataConfig(), tmp_path_factory.mktemp("cache"))


def test_layout(root):
    cases = discover(root)
    assert len(cases) == 20 and {c.frame for c in cases} == {"ED", "ES"} and all(c.label for c in cases)
    assert class_names(root) == ("RV", "MYO", "LV")
    assert sorted(disease_group(c) for c in cases if c.frame == "ED") == sorted(GROUPS * 2)
    for case in cases:
        image, labels = nib.load(case.image), nib.load(case.label)
        assert image.get_data_dtype() == np.int16 and labels.get_data_dtype() == np.uint8
        assert image.shape == labels.shape and image.shape[:2] == (SIZE, SIZE)
        np.testing.assert_array_equal(image.affine, labels.affine)
        x, y, z = image.header.get_zooms()
        assert x == pytest.approx(y) and 190 / SIZE <= x <= 250 / SIZE and 5 <= z <= 10
        assert np.asanyarray(image.dataobj).min() >= 0
        assert set(np.unique(np.asanyarray(labels.dataobj))) == {0, RV, MYO, LV}
    assert {nib.aff2axcodes(nib.load(c.image).affine) for c in cases} == {("R", "A", "S"), ("L", "P", "S")}


def test_same_arguments_same_bytes_and_a_patient_is_independent_of_their_number(root, tmp_path):
    files = write_phantoms(tmp_path / "again", patients=2, seed=5, size=SIZE)
    assert [f.name.split("_")[0] for f in files] == ["patient001"] * 2 + ["patient002"] * 2
    for path in sorted((tmp_path / "again").rglob("patient*/*")):
        assert path.read_bytes() == (root / path.relative_to(tmp_path / "again")).read_bytes()
    other = write_phantoms(tmp_path / "other", patients=1, seed=6, size=SIZE)
    assert other[0].read_bytes() != files[0].read_bytes()


def test_never_writes_into_other_data(root, tmp_path):
    (tmp_path / "patient001").mkdir()
    kept = tmp_path / "patient001" / "patient001_frame01.nii.gz"
    kept.write_bytes(b"somebody's scan")
    with pytest.raises(FileExistsError, match="out must be a new or empty folder"):
        write_phantoms(tmp_path, patients=1, size=SIZE)
    assert kept.read_bytes() == b"somebody's scan"
    with pytest.raises(FileExistsError, match="hold the same phantoms"):
        write_phantoms(root, patients=3, seed=5, size=SIZE)
    assert json.loads((root / "phantom.json").read_text())["patients"] == 10


@pytest.mark.parametrize("bad", [{"patients": 0}, {"size": 16}, {"fov": (250, 190)}, {"snr": (0, 10)}], ids=str)
def test_bad_arguments(tmp_path, bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        write_phantoms(tmp_path / "p", **bad)


def test_the_myocardium_encloses_the_lv(prepared):
    touching = total = 0
    for case in prepared.cases:
        labels = case.labels()
        lv, outside = labels == LV, (labels == 0) | (labels == RV)
        for axis in (1, 2):
            for shift in (1, -1):
                touching += (lv & np.roll(outside, shift, axis)).sum()
        total += lv.sum()
    assert touching < 0.01 * total


def test_the_lv_contracts_and_tapers(prepared):
    by_patient = {}
    for case in prepared.cases:
        by_patient.setdefault(case.patient, {})[case.frame] = (case.labels() == LV).sum(axis=(1, 2))
    ejection = {}
    for patient, frames in by_patient.items():
        ejection[patient] = 1 - frames["ES"].sum() / frames["ED"].sum()
        areas = frames["ED"][frames["ED"] > 0]
        assert areas[-1] < 0.6 * areas.max()  # apex
    assert all(0.02 < e < 0.95 for e in ejection.values())
    groups = {c.patient: disease_group(c) for c in prepared.cases}
    mean = {g: np.mean([e for p, e in ejection.items() if groups[p] == g]) for g in GROUPS}
    assert mean["DCM"] < mean["NOR"] and mean["DCM"] < mean["HCM"]


def test_blood_is_brighter_than_muscle_but_not_all_that_is_bright_is_heart(prepared):
    for case in prepared.cases:
        image, labels = case.image().astype(np.float32), case.labels()
        assert image[labels == LV].mean() > 1.3 * image[labels == MYO].mean()
        assert image[labels == RV].mean() > 1.2 * image[labels == MYO].mean()
        assert (image[labels == 0] > image[labels == LV].mean()).sum() > 0.2 * (labels == LV).sum()


def test_hearts_lie_apart_from_each_other_and_inside(prepared):
    centres = []
    for case in prepared.cases:
        heart = case.labels() > 0
        edge = np.concatenate([heart[:, 0], heart[:, -1], heart[:, :, 0], heart[:, :, -1]], axis=None)
        assert edge.mean() < 0.02
        centres.append([np.average(np.arange(SIZE), weights=heart.sum(axis=axes)) for axes in ((0, 2), (0, 1))])
    assert np.std(centres, axis=0).min() > 2  # pixels


def test_systole_keeps_the_muscle():
    body = Body(np.random.default_rng(0), "NOR", 220.0)
    (inner_d, outer_d, _), (inner_s, outer_s, _) = body._contours(0.4, False), body._contours(0.4, True)
    area_d, area_s = (outer_d**2 - inner_d**2).sum(), (outer_s**2 - inner_s**2).sum()
    assert area_s == pytest.approx(1.05 * area_d / (1 - body.shortening))
    assert (inner_s < inner_d).all()


def test_spline_basis_is_a_partition_of_unity_and_reproduces_lines():
    t = np.linspace(0, 1, 50)
    basis = spline_basis(t, 8)
    np.testing.assert_allclose(basis.sum(axis=1), 1)
    np.testing.assert_allclose(basis @ (np.arange(8) - 1), 5 * t, atol=1e-12)
