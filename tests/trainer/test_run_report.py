"""The page of a run: whole and self-contained, true to the log; points correspond; one PCA; runs of every state."""

import base64
import io
import json
import math
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from scipy.ndimage import map_coordinates
from typer.testing import CliRunner

from pix2rep import curves, page, pictures, run_report
from pix2rep.cli import app
from pix2rep.colours import Colours, agreement
from pix2rep.config import load
from pix2rep.log import read_log
from pix2rep.looks import LOOKS
from pix2rep.methods import build_method
from pix2rep.pairs import choose_points, make_pair, pixels_of
from pix2rep.pretrain import run as pretrain
from pix2rep.views.spatial import dense
from tests.trainer.volumes import dataset

TINY = (
    "data.size=16,16 network.channels=4,4,4,4,4 network.features=4 network.head_hidden=4 network.projection=4 loss.num_samples=32 split.val=0.2"
    " pretrain.steps=6 pretrain.batch_size=2 pretrain.checkpoint_every=4 pretrain.log_every=1 pretrain.device=cpu pretrain.threads=1"
).split()
PLAIN = [f"photometric.{name}=0" for name in ("noise_p", "blur_p", "gamma_p", "bias_p", "invert_p")]
VOID = {"meta", "img"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    root = tmp_path_factory.mktemp("report")
    dataset(root / "data", 5)
    pretrain(root / "data", root / "run", load(None, TINY))
    return root / "run"


@pytest.fixture
def copied(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "copy")


@pytest.fixture
def unpictured(monkeypatch):
    """Drawing is slow, and another test looks at what is drawn."""
    monkeypatch.setitem(LOOKS, "pix2rep", replace(LOOKS["pix2rep"], panels=()))
    monkeypatch.setattr(page, "svg_of", lambda figure, alt: "")


class Checked(HTMLParser):
    """Text and pictures of a page; fails on a tag that is not closed, a picture without words, anything from elsewhere."""

    def __init__(self, text):
        super().__init__()
        self.open, self.text, self.images, self.ids = [], "", [], []
        self.feed(text)
        self.close()
        assert not self.open
        assert len(self.ids) == len(set(self.ids))

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        assert tag not in ("script", "link", "iframe", "object", "base")
        for name, value in attributes:
            if not name.startswith("xmlns"):
                assert not re.search(r"https?:|(?<!:)//", value.split("base64,")[0]), (tag, name)
        if "id" in found:
            self.ids.append(found["id"])
        if tag == "img":
            assert found["alt"]
            head, data = found["src"].split("base64,")
            assert head == "data:image/png;"
            self.images.append(Image.open(io.BytesIO(base64.b64decode(data))))
            assert self.images[-1].size == (int(found["width"]), int(found["height"]))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] == ["style"]:
            assert not re.search(r"url\((?!#)|@import", data)
        self.text += data + " "


def test_a_page_that_needs_nothing_else(finished, tmp_path):
    out = tmp_path / "page.html"
    result = CliRunner().invoke(app, ["report", str(finished), "--out", str(out), "--cases", "1"])
    assert result.exit_code == 0, result.output
    assert str(out) in result.output
    text = out.read_text()
    assert text.startswith("<!DOCTYPE html>")
    assert "default-src 'none'" in text
    found = Checked(text)
    steps = [row for row in read_log(finished / "log.jsonl") if row["event"] == "step"]
    for name in ("loss", "alignment", "uniformity", "images_per_s", "peak_memory_mib"):
        for value in (steps[0][name], steps[-1][name], min(row[name] for row in steps)):
            assert f"{value:.4g}" in found.text
    split = json.loads((finished / "split.json").read_text())
    assert f"{len(split['pretrain'])} pretrain, {len(split['val'])} val" in found.text
    assert "6 of 6, 2 x 1 images each" in found.text
    assert f"torch {torch.__version__}" in found.text
    assert re.search(r"network\.features\s+4\s+32", found.text)
    assert "step 6, from weights.safetensors" in found.text
    assert "Downstream" not in found.text
    assert len(found.images) == 2 * 2  # a pre-training and a validation patient; no planes of slices
    assert all(image.width <= page.WIDEST and image.height > 300 for image in found.images)
    assert "pre-training patient: slice 3 of 4" in found.text
    assert "validation patient" in found.text
    assert len(text) < 1_000_000


def test_one_pca_and_seeded_patients(finished, tmp_path, unpictured, monkeypatch):
    seen = []

    def panel(pair, scene):
        seen.append((pair, scene))
        return pictures.Picture(Figure((1, 1)), "seen", "seen")

    monkeypatch.setitem(LOOKS, "pix2rep", replace(LOOKS["pix2rep"], panels=(panel,)))
    for name in ("a.html", "b.html"):
        run_report.write(finished, tmp_path / name, cases=2)
    for (one, _), (other, _) in zip(seen[:3], seen[3:], strict=True):
        assert one.case == other.case
        np.testing.assert_array_equal(one.view_2, other.view_2)
        np.testing.assert_array_equal(one.points, other.points)
    assert len({id(scene.colours) for _, scene in seen[:3]}) == 1
    assert len({pair.patient for pair, _ in seen[:3]}) == 3
    assert [pair.part for pair, _ in seen[:3]] == ["pretrain", "pretrain", "val"]
    pair, scene = seen[0]
    assert scene.others[pair.case].patient != pair.patient


def test_a_colour_means_the_same_everywhere():
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(2, 5, 6, 7))
    second[:, 2, 3] = first[:, 1, 1]
    colours = Colours.fit([first, second])
    np.testing.assert_array_equal(colours(first)[1, 1], colours(second)[2, 3])
    assert colours(first).shape == (6, 7, 3)
    assert 0 <= colours(first).min() < colours(first).max() <= 1
    assert sum(colours.explained) < 1
    turned = Colours.fit([second, first])
    np.testing.assert_allclose(turned.components, colours.components, atol=1e-9)
    single = Colours.fit([first[:1]])
    assert len(np.unique(single(first[:1]).reshape(-1, 3), axis=0)) > 10
    assert single.explained[0] == pytest.approx(1)


def a_case(array, spacing=(8.0, 1.5, 1.0)):
    return SimpleNamespace(id="p0", patient="p0", spacing=spacing, image=lambda: array.astype(np.float16))


def pair_of(case, config, network, index):
    method = build_method(config, SimpleNamespace(out_channels=3))
    return make_pair(case, "val", LOOKS["pix2rep"], method, network, index)


def powers(x):
    return torch.cat([x, x**2, x**3], 1)


def test_points_of_a_quarter_turn_show_the_same_pixels():
    image = np.arange(49.0).reshape(7, 7)
    theta = torch.tensor([[[0.0, -1.0, 0.0], [1.0, 0.0, 0.0]]])  # x comes from -y, y from x
    source = pixels_of(dense(theta, (7, 7)), (7, 7)).numpy()
    np.testing.assert_allclose(source[1, 2], [2, 5], atol=1e-5)  # row 1, column 2 comes from row 2, column 6 - 1
    turned = torch.nn.functional.grid_sample(torch.from_numpy(image)[None, None].float(), dense(theta, (7, 7)), align_corners=True)
    row, column = source.round().astype(int).transpose(2, 0, 1)
    np.testing.assert_allclose(turned[0, 0].numpy(), image[row, column], atol=1e-4)


@pytest.mark.parametrize("elastic", [0, 1])
def test_points_correspond(elastic):
    rng = np.random.default_rng(1)
    config = load(None, ["data.size=24,20", "spatial.scale=0.6,0.9", "spatial.translation=0.3", f"spatial.elastic={elastic}", *PLAIN])
    pair = pair_of(a_case(rng.random((3, 24, 20))), config, powers, 3)
    assert pair.aspect == 1.5
    at_home = [tuple(p) for p in pair.points if pair.inside[tuple(p)]]
    assert len(at_home) == 7
    for point in at_home:
        assert map_coordinates(pair.view_1, pair.source[point][:, None], order=1)[0] == pytest.approx(pair.view_2[point], abs=1e-4)
    away = [tuple(p) for p in pair.points if not pair.inside[tuple(p)]]
    assert away
    for row, column in (pair.source[p] for p in away):
        assert not (0 <= row <= 23 and 0 <= column <= 19)
    np.testing.assert_allclose(pair.warped[0][pair.inside], pair.view_2[pair.inside], atol=1e-4)
    np.testing.assert_allclose(pair.features_2, powers(torch.from_numpy(pair.view_2)[None, None])[0].numpy(), atol=1e-6)
    again = pair_of(a_case(np.random.default_rng(1).random((3, 24, 20))), config, powers, 3)
    np.testing.assert_array_equal(again.points, pair.points)


def test_a_volume_is_shown_in_the_plane_of_its_first_point():
    config = load(None, ["network.dims=3", "data.size=6,12,10", "spatial.scale=1,1", "spatial.rotation=0", "spatial.flip=0,0,1", *PLAIN])
    array = np.random.default_rng(2).random((6, 12, 10))
    pair = pair_of(a_case(array), config, powers, 0)
    assert pair.plane == "slice 3 of view 1, 4 of view 2, of 6"  # z is flipped: 3 from 0 is 2
    np.testing.assert_allclose(pair.view_1, array[2].astype(np.float16), atol=1e-6)
    np.testing.assert_allclose(pair.view_2, pair.view_1, atol=1e-5)
    np.testing.assert_allclose(pair.warped, pair.features_1, atol=1e-5)
    assert pair.in_plane.all()


def test_points_are_found_in_any_view():
    generator = torch.Generator().manual_seed(0)
    flat = np.zeros((8, 8), np.float32)
    for inside in (np.ones((8, 8), bool), np.zeros((8, 8), bool), np.eye(8, dtype=bool)):
        points = choose_points(flat, inside, generator)
        assert 1 <= len(points) <= 9
        assert len({tuple(p) for p in points}) == len(points)


def test_agreement_of_features_that_follow_and_that_do_not():
    config = load(None, ["data.size=20,20", "spatial.scale=1,1", "spatial.rotation=0", "spatial.flip=0,0", *PLAIN])
    maps = torch.randn(1, 16, 20, 20, generator=torch.Generator().manual_seed(0))
    noise = iter(torch.randn(2, 1, 16, 20, 20, generator=torch.Generator().manual_seed(1)))
    image = a_case(np.random.default_rng(0).random((1, 20, 20)))
    follows, does_not = (pair_of(image, config, network, 0) for network in (lambda x: maps, lambda x: next(noise)))
    found, lost = (agreement(pair, Colours.fit([pair.features_1, pair.features_2])) for pair in (follows, does_not))
    assert found["corresponding"] == pytest.approx(1, abs=1e-5)
    assert found["found"] == 1
    assert abs(found["unrelated"]) < 0.1
    assert abs(lost["corresponding"]) < 0.1
    assert lost["found"] < 0.2
    assert 0.03 < found["chance"] < 29 / 400  # 29 pixels lie within 3 of one far from the border
    nowhere = SimpleNamespace(**{**vars(follows), "in_plane": np.zeros((20, 20), bool)})
    assert math.isnan(agreement(nowhere, Colours.fit([follows.features_1]))["found"])


def test_a_torn_and_resumed_log(copied, unpictured, tmp_path):
    rows = (copied / "log.jsonl").read_text().splitlines()
    rows = [row for row in rows if json.loads(row)["event"] != "end"]
    resume = json.dumps({"event": "resume", "time": 0, "step": 4, "device": "cpu", "slices": 12, "versions": {"torch": "9.9"}})
    skipped = json.dumps({"event": "skipped", "case": "p<7>", "reason": "the file is empty"})
    bad = json.dumps({"event": "step", "time": 1e9, "step": 5, "loss": "nan", "lr": 1e-3, "images_per_s": 2.0})
    (copied / "log.jsonl").write_text("\n".join([*rows, skipped, skipped, resume, bad, '{"event": "step", "step": 6, "lo']))
    found = Checked(run_report.write(copied, tmp_path / "a.html").read_text()).text
    assert "not ended" in found
    assert "5 of 6" in found
    assert "resumed 1 times" in found
    assert "torch 9.9" in found
    assert "p<7>" in found and "1 skipped volumes" in found
    assert "The loss is not a number from step 5" in found


def test_a_run_without_weights(copied, unpictured, tmp_path):
    (copied / "weights.safetensors").unlink()
    found = Checked(run_report.write(copied, tmp_path / "a.html").read_text()).text
    assert "at step 6, from last.pt: the run has not ended" in found
    weights = run_report.load_trained(copied).backbone.state_dict()
    shutil.rmtree(copied / "checkpoints")
    result = CliRunner().invoke(app, ["report", str(copied)])
    assert result.exit_code == 0
    found = Checked((copied / "report.html").read_text())
    assert "There are none: run must hold weights.safetensors or a checkpoint" in found.text
    assert "no pictures: run must hold" in result.output
    assert not found.images
    assert weights and all(value.isfinite().all() for value in weights.values())
    (copied / "log.jsonl").unlink()
    result = CliRunner().invoke(app, ["report", str(copied)])
    assert result.exit_code == 2
    assert "run must be a folder written by pix2rep pretrain (with log.jsonl)" in result.output


def test_volumes_that_are_gone(copied, unpictured, tmp_path):
    text = (copied / "config.yaml").read_text()
    (copied / "config.yaml").write_text(re.sub(r"root: \S+", "root: /nowhere", text))
    found = Checked(run_report.write(copied, tmp_path / "a.html").read_text())
    assert "There are none: data.root must be a folder" in found.text
    assert "Curves" in found.text


def test_downstream_results(copied, unpictured, tmp_path):
    interval = {"mean": 0.4321, "low": 0.3, "high": 0.5}
    entry = {"labelled": 1, "arm": "pretrained", "patients": 3, "dice": {"mean": interval, "core": {"mean": None, "low": None, "high": None}}}
    result = {"classes": ["core"], "summary": [entry | {"seeds": {"0": 0.41, "1": None}}], "differences": [{"labelled": 1, **interval}]}
    for what, names in (("probe", ("p0", "p1")), ("finetune", ("p1", "p2"))):
        (copied / what / "overlays").mkdir(parents=True)
        (copied / what / "results.json").write_text(json.dumps(result))
        for name in names:
            Image.new("RGB", (2200, 400 if what == "probe" else 200), "red").save(copied / what / "overlays" / f"{name}.png")
    found = Checked(run_report.write(copied, tmp_path / "a.html").read_text())
    assert re.search(r"pre-trained\s+-\s+0\.432 \[0\.300, 0\.500\]\s+0\.410 -\s+3", found.text)
    assert "pre-trained minus random +0.432 [+0.300, +0.500]" in found.text
    assert [image.size for image in found.images] == [(1100, 200), (1100, 100)]  # the volume that both have, probe above fine-tuning
    assert "p1, finetune." in found.text
    (copied / "finetune" / "results.json").write_text('{"classes": [')
    (copied / "probe" / "overlays" / "p0.png").write_text("no picture")
    found = Checked(run_report.write(copied, tmp_path / "b.html").read_text())
    assert [image.size for image in found.images] == [(1100, 200)]
    assert "finetune/results.json cannot be read" in found.text
    assert "overlays/p0.png cannot be read" in found.text


def log_of(count=20, **values):
    return [{"event": "step", "time": 0.0, "step": k + 1, "lr": 1e-3, **values} for k in range(count)]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"loss": 3.0, "uniformity": -2.5, "alignment": 0.3, "dead_dimensions": 2}, "No sign of collapse"),
        ({"loss": 3.0, "uniformity": -0.1, "alignment": 0.0, "dead_dimensions": 2}, "Collapsed: uniformity -0.10 is above -0.5"),
        ({"loss": 3.0, "uniformity": -0.8, "alignment": 0.3, "dead_dimensions": 2}, "Near collapse"),
        ({"loss": 3.0, "uniformity": -2.5, "alignment": 1.95, "dead_dimensions": 2}, "Alignment 1.95 is above 1.8"),
        ({"loss": 3.0, "uniformity": -2.5, "alignment": 0.3, "dead_dimensions": 64}, "Some of the 256 dimensions of the projection are dead (25%"),
        ({"loss": 3.0, "uniformity": -2.5, "alignment": 0.3, "dead_dimensions": 200}, "Most of the 256"),
        ({"loss": math.log(1999), "uniformity": -2.5, "alignment": 0.3, "dead_dimensions": 0}, "its value when all similarities are alike"),
    ],
)
def test_words_on_the_monitors(values, words):
    findings = curves.judge(curves.series(log_of(**values)), load(None))
    assert len(findings) == 1
    assert words in findings[0].text
    assert findings[0].good == words.startswith("No sign")


def test_few_rows_are_not_judged():
    assert "too few to judge" in curves.judge(curves.series(log_of(4, loss=1.0, uniformity=0.0)), load(None))[0].text


def test_curves_are_the_log_with_any_monitor():
    found = curves.series([*log_of(6, loss=2.0, entropy=1.0, uniformity=-1.5), {"event": "checkpoint", "step": 6}, {"event": "step", "step": 7, "loss": "inf"}])
    assert list(found) == ["loss", "lr", "uniformity", "entropy"]
    assert found["loss"][:6] == [(k, 2.0) for k in range(1, 7)]
    assert math.isnan(found["loss"][6][1])
    axes = curves.figure(found, load(None), [3]).axes
    drawn = {axis.get_title(loc="left"): axis for axis in axes}
    np.testing.assert_array_equal(drawn["loss"].lines[0].get_ydata()[:6], 2)
    np.testing.assert_array_equal(drawn["entropy"].lines[0].get_xdata(), range(1, 7))
    low, high = drawn["uniformity"].get_ylim()
    assert low <= -4 and high >= 0


def test_names_are_escaped():
    text = page.document("<b>&", [page.table([("<i>", 'x"')], ("a<b", "c")), page.paragraph("1 < 2", "warn")])
    assert "<i>" not in text and "<b>&" not in text
    assert "1 < 2" in Checked(text).text
