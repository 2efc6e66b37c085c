"""`pix2rep inspect`: the numbers it reports, the warnings it gives and keeps to itself, exit codes, and the pixels of the contact sheet."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread
from typer.testing import CliRunner

from pix2rep import contact_sheet
from pix2rep.cli import app
from pix2rep.config import DataConfig
from pix2rep.contact_sheet import CAPTION, GAP, HEAD, LINE, MARGIN, TILE, choose, corner, grid
from pix2rep.data.advice import advice
from pix2rep.data.discover import Case
from pix2rep.data.scan import Problem, Scan, VolumeInfo
from pix2rep.data.summary import by_reason, headline, summarise
from pix2rep.overlay import COLOURS
from volumes import save

AFFINE = np.diag([1.5, 1.5, 8.0, 1.0])


def inspect(*arguments):
    return CliRunner().invoke(app, ["inspect", *map(str, arguments)])


def info(k: int, patient: str | None = None, **changes) -> VolumeInfo:
    case = Case(f"case{k}", patient or f"p{k}", None, Path(f"case{k}.nii"), Path(f"case{k}_seg.nii"))
    thumbnail = np.random.default_rng(k).integers(0, 255, (20, 20), np.uint8)
    plain = VolumeInfo(case, (140, 130, 20), (1.5, 1.5, 8.0), "RAS", "int16", 0.0, 500.0, 10.0, 400.0, {0: 900, 1: 60, 2: 40}, thumbnail, None)
    return replace(plain, **changes)


def scanned(volumes, problems=(), classes=("RV", "LV")) -> Scan:
    return Scan(Path("."), list(volumes), list(problems), classes, 0.5, 0)


def told(volumes, **data) -> list[str]:
    found = scanned(volumes)
    return [warning["message"] for warning in advice(found, summarise(found), DataConfig(**data))]


def test_a_good_folder_needs_no_advice():
    assert told(info(k) for k in range(6)) == []


FLAT, CUBE = {"spacing": (1.0, 1.0, 1.0)}, {"spacing": (1.0, 1.0, 1.0), "shape": (140, 130, 120)}
WARNED = {
    "lost spacing": ([FLAT] * 6, "the header has lost the spacing"),
    "1 mm everywhere, but a cube": ([CUBE] * 6, "every volume says exactly 1 x 1 x 1 mm"),
    "1 mm in some": ([FLAT] + [{}] * 5, "1 of 6 volumes say exactly 1 x 1 x 1 mm"),
    "spacings": ([{"spacing": (1.2, 1.2, 8.0)}] * 2 + [{}] * 4, "from 1.2 to 1.5 mm: set data.spacing=1.5,1.5 (H, W"),
    "small": ([{"shape": (90, 100, 9)}] * 6, "all 6 volumes are smaller in plane than data.size=128,128 and would be padded with zeros; data.size=112,96"),
    "one small": ([{"shape": (90, 140, 9)}] + [{}] * 5, "1 of 6 volumes are smaller in plane"),
    "large": ([{"shape": (512, 512, 9)}] * 6, "keeps 6 % of the median slice"),
    "CT": ([{"low": -1024.0}] * 6, "look like Hounsfield units"),
    "CT among MR": ([{"low": -1024.0}] + [{}] * 5, "1 of 6 volumes look like Hounsfield units (CT), unlike the rest"),
    "arbitrary": ([{"p99": 40_000.0, "high": 50_000.0}] + [{}] * 5, "the 99th percentile runs from 400 to 40,000"),
    "wrapped": ([{"low": -32_000.0, "high": 32_000.0}] + [{}] * 5, "have wrapped around"),
    "unlabelled": ([{"labels": None}] + [{}] * 5, "1 of 6 patients have no labels"),
    "no labels": ([{"labels": None}] * 6, "no volume has labels"),
    "absent": ([{"labels": {0: 990, 1: 10}}] + [{}] * 5, "labels absent from some of 6 labelled volumes: 2 LV from 1."),
    "empty": ([{"labels": {0: 1000}}] + [{}] * 5, "1 of 6 labelled volumes have background alone"),
    "never": ([{"labels": {0: 990, 1: 10}}] * 6, "named but found nowhere: 2 LV"),
    "few patients": ([{}] * 2, "2 patients (p0, p1) are too few to split"),
}


@pytest.mark.parametrize(("changes", "message"), WARNED.values(), ids=WARNED)
def test_advice(changes, message):
    found = told(info(k, **change) for k, change in enumerate(changes))
    assert sum(message in line for line in found) == 1, found
    allowed = {"absent": 1, "empty": 2, "no labels": 2}  # these come with another that says the same
    name = next(name for name, entry in WARNED.items() if entry[1] == message)
    assert len(found) <= allowed.get(name, 1), found


def test_advice_knows_the_options():
    volumes = [info(k, shape=(90, 100, 9), spacing=(1.5, 1.2 if k else 1.5, 8.0)) for k in range(6)]
    assert len(told(volumes)) == 2
    assert told(volumes, size=(64, 64), spacing=(1.5, 1.5)) == []
    (message,) = told(volumes, size=(64, 64), spacing=(4.0, 4.0))
    assert "data.size=64,64" in message and "data.size=32,48" in message  # 100 x 1.2 mm, 90 x 1.5 mm


def test_copies_of_an_image_are_told():
    volumes = [info(k) for k in range(6)]
    copy = replace(volumes[1], case=info(6).case, labels={0: 1, 1: 2, 2: 3})
    (message,) = told([*volumes, copy])
    assert "one image under several patients" in message and "case1 = case6 (with different labels)" in message
    (message,) = told([*volumes, replace(copy, case=replace(copy.case, patient="p1"))])
    assert "several times within a patient: case1 = case6" in message
    assert told([*volumes, replace(copy, p99=401.0)]) == []


def test_problems_that_differ_in_numbers_are_one_reason():
    reasons = [*(f"labels must have the image's shape [{n}, 10], got [1, 9]" for n in (4, 5)), "cannot be read (OSError: x)"]
    problems = [Problem(f"c{k}", Path(f"{k}.nii"), reason) for k, reason in enumerate(reasons)]
    groups = by_reason(problems)
    assert {heading: [p.case for p in group] for heading, group in groups.items()} == {
        "labels must have the image's shape [..., ...]": ["c0", "c1"], "cannot be read": ["c2"],
    }  # fmt: skip
    assert headline(Problem("c", Path("a.nii"), "a.nii: must be 3D, got 4D")) == "must be 3D"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Ten patients; p9's file lies on its side, p8 has no labels, p7 has seven times the slices."""
    root = tmp_path_factory.mktemp("inspected")
    for p in range(10):
        shape = (40, 30, 28 if p == 7 else 4)
        image = np.random.default_rng(p).integers(0, 100 + p, shape).astype(np.int16)
        image[0, 0, 0], image[0, 0, 1] = 0, 99 + p
        label = np.zeros(shape, np.uint8)
        label[3:7, 2:6, 1:3], label[4:6, 3:5, 1:3] = 1, 2
        affine = np.diag([-1.5, -1.5, 8.0, 1.0]) if p == 9 else AFFINE
        save(root / f"p{p}/t1.nii.gz", image, affine)
        if p != 8:
            save(root / f"p{p}/t1_seg.nii.gz", label, affine)
    return root


def test_numbers(folder, tmp_path):
    result = inspect(folder, "--json", tmp_path / "all.json", "--cache", tmp_path / "cache")
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "all.json").read_text())
    assert found["layout"] == "any folder" and found["problems"] == [] and found["from_cache"] == 0
    assert found["counts"] == {
        "patients": 10, "volumes": 10, "frames": {}, "labelled": 9, "unlabelled": 1, "unlabelled_patients": ["p8"], "groups": {},
        "unusable": 0,        "voxels": 40 * 30 * (9 * 4 + 28),
    }  # fmt: skip
    z = found["distributions"]["shape z"]
    assert [z[key] for key in ("min", "median", "max")] == [4, 4, 28]
    assert z["modes"] == [[4, 9], [28, 1]] and z["outliers"] == [{"case": "p7_t1", "value": 28}]
    assert found["distributions"]["spacing y"]["median"] == 1.5 and found["distributions"]["spacing z"]["max"] == 8
    assert found["categories"]["orientation"]["counts"] == {"RAS": 9, "LPS": 1}
    assert found["categories"]["dtype"] == {"counts": {"int16": 10}, "rare": []}
    one, two = found["labels"]
    assert one["volumes"] == two["volumes"] == 9 and one["voxels"] == {"min": 24, "median": 24, "max": 24}
    assert two["ml"]["median"] == pytest.approx(8 * 1.5 * 1.5 * 8 / 1000)
    last = found["volumes"][9]
    assert (last["patient"], last["high"], last["low"], last["labels"]) == ("p9", 108, 0, {"0": 4768, "1": 24, "2": 8})
    assert {warning["about"] for warning in found["warnings"]} == {"size", "patients"}

    again = inspect(folder, "--json", tmp_path / "all.json", "--cache", tmp_path / "cache")
    assert "10 from the cache" in again.output
    assert json.loads((tmp_path / "all.json").read_text())["volumes"] == found["volumes"]


def test_what_is_said_on_the_screen(folder, tmp_path):
    output = inspect(folder, "--cache", tmp_path).output
    assert "10 patients, 10 volumes, 0 not usable; 9 labelled, 1 unlabelled" in output
    assert "p7_t1 (28)" in output and "p8_t1" in output and "LPS: 1" in output
    assert "--sheet FILE.png" in output and not list(tmp_path.glob("*.png"))


def test_problems_end_in_1_and_unusable_input_in_2(folder, tmp_path):
    bad = tmp_path / "bad"
    for k in range(3):
        save(bad / f"good{k}/a.nii.gz", np.random.default_rng(k).integers(0, 9, (8, 8, 3)).astype(np.int16))
    for k in range(23):
        (bad / f"bad{k:02d}").mkdir()
        (bad / f"bad{k:02d}/[red]a.nii").write_bytes(b"nothing")
    Path(os.fsdecode(os.fsencode(bad) + b"/\xff.nii")).write_bytes(b"nothing")  # a name that is no UTF-8
    result = inspect(bad, "--json", tmp_path / "bad.json", "--sheet", tmp_path / "bad.png", "--cache", tmp_path / "cache")
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit), result.output
    assert imread(tmp_path / "bad.png").shape[1] == 2 * MARGIN + 7 * (TILE + GAP) - GAP
    assert "24 not usable: " in result.output and "and 4 more" in result.output
    assert "bad19/[red]a.nii" in result.output and "bad20/[red]a.nii" not in result.output
    assert len(json.loads((tmp_path / "bad.json").read_text())["problems"]) == 24

    for arguments, message in (
        ([tmp_path / "nowhere"], "no such folder"), ([folder, "--sheet", tmp_path / "sheet.jpg"], "--sheet must name a .png file"),
    ):  # fmt: skip
        result = inspect(*arguments)
        assert result.exit_code == 2 and message in result.output
    assert not (tmp_path / "sheet.jpg").exists()


def test_looking_does_not_wait_for_torch(folder, tmp_path):
    code = (
        "import sys; from typer.testing import CliRunner; from pix2rep.cli import app;"
        "result = CliRunner().invoke(app, ['inspect', sys.argv[1], '--cache', sys.argv[2]]); assert result.exit_code == 0, result.output;"
        "heavy = {'torch', 'monai', 'matplotlib', 'skimage'} & set(sys.modules); assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder), str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_choose_takes_outliers_first_and_the_rest_evenly():
    volumes = [info(3 * p + k, patient=f"p{p}") for p in range(20) for k in range(3)]
    volumes[33] = replace(volumes[33], shape=(140, 130, 99))
    problems = [Problem(f"bad{k}", Path("a.nii"), "cannot be read" if k < 28 else "must be 3D, got 4D") for k in range(30)]
    found = scanned(volumes, problems)
    tiles = choose(found, summarise(found), 24)
    assert len(tiles) == 24
    assert [item.case for item, _ in tiles[:6]] == ["bad0", "bad28", "bad1", "bad29", "bad2", "bad3"]
    assert (tiles[6][0].case.id, tiles[6][1]) == ("case33", "far off: 99 voxels in z")
    rest = [item.case.patient for item, _ in tiles[7:]]
    assert len(set(rest)) == len(rest) == 17 and {"p0", "p19"} <= set(rest)

    alone = choose(scanned(volumes), summarise(scanned(volumes)), 500)
    assert sorted(item.case.id for item, _ in alone) == sorted(v.case.id for v in volumes)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        choose(found, summarise(found), 0)


@pytest.mark.parametrize(("tiles", "shape"), [(1, (1, 4)), (4, (1, 4)), (5, (2, 4)), (20, (4, 6)), (48, (6, 8)), (49, (7, 8))])
def test_grid(tiles, shape):
    assert grid(tiles) == shape


def test_pixels_of_the_sheet(tmp_path):
    """Three files of one scene, each stored in another orientation, and one that is damaged."""
    image = np.full((20, 20, 5), 10, np.int16)  # X, Y, Z; 20 x 40 mm
    image[:, :, 3] = 50
    image[:10, 10:, 3] = 90  # left, anterior
    image[:, :, 0] = 0
    label = np.zeros(image.shape, np.uint8)
    label[13:18, 3:8, 3] = 2  # right, posterior
    affine = np.diag([1.0, 2.0, 5.0, 1.0])
    turned = np.diag([-1.0, -2.0, 5.0, 1.0])
    for name, flip, axes in (("a", 1, affine), ("b", -1, turned)):
        save(tmp_path / f"data/{name}/t.nii", np.ascontiguousarray(image[::flip, ::flip]), axes)
        save(tmp_path / f"data/{name}/t_seg.nii", np.ascontiguousarray(label[::flip, ::flip]), axes)
    (tmp_path / "data/c").mkdir()
    (tmp_path / "data/c/t.nii").write_bytes(b"nothing")
    result = inspect(tmp_path / "data", "--sheet", tmp_path / "sheet.png", "--cache", tmp_path / "cache")
    assert result.exit_code == 1 and "3 tiles in" in result.output, result.output
    png = imread(tmp_path / "sheet.png")[..., :3]
    assert png.shape[:2] == (HEAD + TILE + CAPTION + GAP + LINE + MARGIN // 2, 2 * MARGIN + 4 * (TILE + GAP) - GAP)
    tiles = [png[y : y + TILE, x : x + TILE] for x, y in (corner(k, 4) for k in range(4))]
    half, quarter = TILE // 2, TILE // 4

    damaged, *shown, empty = tiles
    assert damaged[2, 2] == pytest.approx(to_rgb(contact_sheet.DARK), abs=0.01) and (damaged > 0.9).any()
    assert empty.reshape(-1, 3) == pytest.approx(np.broadcast_to(to_rgb(contact_sheet.PAGE), (TILE * TILE, 3)), abs=0.01)
    for tile in shown:
        assert (tile[half, : quarter - 2] == 0).all() and (tile[half, -quarter + 2 :] == 0).all()  # half as wide as high, in mm
        left_anterior, right_anterior, left_posterior = tile[20, quarter + 20], tile[20, -quarter - 20], tile[-20, quarter + 20]
        assert (left_anterior > 0.9).all()
        assert right_anterior == pytest.approx(left_posterior) and (0.3 < right_anterior).all() and (right_anterior < 0.8).all()
        outline = np.abs(tile - to_rgb(COLOURS[1])).max(-1) < 0.1
        rows, columns = np.nonzero(outline)
        where = [rows.min(), rows.max(), columns.min() - quarter, columns.max() - quarter]
        assert where == pytest.approx([12 * 8, 17 * 8, 13 * 4, 18 * 4], abs=3)
    assert (np.abs(shown[0] - shown[1]) < 0.01).all()
