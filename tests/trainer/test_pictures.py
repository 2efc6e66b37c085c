"""Pictures of each method: its own views and words, cluster maps, superpixels, crops, planes; numbers on maps whose answers are known."""

import io
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from pix2rep import overlay, page, pictures_bim, pictures_lrc, pictures_pgl, run_report
from pix2rep.colours import Colours, distinct
from pix2rep.config import load
from pix2rep.looks import LOOKS
from pix2rep.methods import METHODS, build_method
from pix2rep.networks import build_backbone
from pix2rep.pairs import make_pair, moved
from pix2rep.pictures import COMMON, Scene, coarsest, planes
from pix2rep.pretrain import run as pretrain
from pix2rep.views.spatial import SpatialView
from tests.trainer.volumes import dataset, prepared_case

FLAT = (
    "data.size=16,16 network.channels=4,4,4,4,4 network.features=4 network.norm=batch split.val=0.2 split.test=0 pretrain.steps=2 pretrain.batch_size=2"
    " pretrain.warmup=0 pretrain.device=cpu pretrain.threads=1"
).split()
DEEP = [*FLAT, "data.size=4,8,8", "pgl.head_hidden=4", "pgl.projection=4"]
OPTIONS = {
    "bim": [*FLAT, "bim.clusters=5", "bim.heads=2"],
    "lrc": [*FLAT, "lrc.queue=4", "lrc.global_hidden=4", "lrc.global_projection=4", "lrc.min_pixels=3", "lrc.superpixel_min_size=3"],
    "pgl": DEEP,
}
SAID = {
    "bim": ("options `bim`", "of 5 clusters used", "Sub-head 2:"),
    "lrc": ("options `photometric` and `spatial`", "kept (yellow borders;", "are most similar to themselves"),
    "pgl": ("options `pgl`", "the dashed frames hold what both show", "Planes of view 2 through the middle"),
}
UNSAID = {"bim": ("`spatial`", "projection head"), "lrc": ("`bim`", "projection head"), "pgl": ("`spatial`", "`photometric`")}


@pytest.fixture
def undrawn(monkeypatch):
    """Figures are built and not rendered, which takes seconds."""
    file = io.BytesIO()
    Image.new("RGB", (2, 2)).save(file, "png")
    monkeypatch.setattr(page, "png_of", lambda figure: file.getvalue())
    monkeypatch.setattr(page, "svg_of", lambda figure, alt: "")


def test_every_method_is_looked_at():
    assert list(LOOKS) == list(METHODS)
    assert all(set(COMMON) <= set(look.panels) for look in LOOKS.values())


@pytest.mark.parametrize("name", ["bim", "lrc", "pgl"])
def test_the_page_of_a_method_holds_its_pictures_and_words(name, tmp_path, undrawn):
    dataset(tmp_path / "data", 5)
    pretrain(tmp_path / "data", tmp_path / "run", load(name, OPTIONS[name]))
    text = run_report.write(tmp_path / "run", cases=1).read_text()
    assert "There are none" not in text
    for words in SAID[name]:
        assert words.replace("'", "&#x27;") in text
    assert not any(words in text for words in UNSAID[name])
    assert text.count("<img") == 2 * {"bim": 3, "lrc": 4, "pgl": 3}[name]
    if name == "bim":
        for file in (tmp_path / "run/checkpoints").glob("*.pt"):
            file.unlink()
        text = run_report.write(tmp_path / "run", cases=1).read_text()
        assert "clusters used" not in text
        assert "they are in checkpoints only" in text
        assert text.count("<img") == 2 * 2


@pytest.mark.parametrize("name", ["pix2rep", "bim", "lrc", "simclr"])
def test_views_of_volumes_turn_in_mm(name, tmp_path, monkeypatch):
    """Every transform of a picture is drawn with the voxel sizes of its case, as in a step."""
    config = load(None, [*OPTIONS.get(name, FLAT), f"loss.method={name}", "network.dims=3", "data.size=4,8,8"])
    method, given, drawn = build_method(config, build_backbone(config.network)), [], SpatialView.__call__

    def recorded(self, batch, size, generator, device, spacing=None):
        given.append(spacing)
        return drawn(self, batch, size, generator, device, spacing)

    monkeypatch.setattr(SpatialView, "__call__", recorded)
    case = prepared_case(tmp_path, "one", np.random.default_rng(0).random((4, 8, 8)))
    LOOKS[name].draw(method, case, torch.Generator().manual_seed(0))
    assert len(given) == (2 if name == "bim" else 1)
    torch.testing.assert_close(given[0], torch.tensor([case.spacing]))


def test_agreement_of_cluster_maps():
    first = np.array([0, 0, 1, 1, 2, 2, 3, 3])
    renamed = pictures_bim.agreement(first, (first + 1) % 4, 6)
    assert renamed["same"] == 0
    assert renamed["information"] == pytest.approx(1)  # the same clusters by other numbers
    assert renamed["chance"] == pytest.approx(1 / 4)
    assert renamed["used"] == 4
    unrelated = pictures_bim.agreement(np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1]), 6)
    assert unrelated == pytest.approx({"same": 0.5, "chance": 0.5, "information": 0, "used": 2})
    half = pictures_bim.agreement(np.array([0, 0, 0, 1]), np.array([0, 0, 1, 1]), 2)
    assert (half["same"], half["chance"]) == (0.75, 0.5)  # 3/4 * 1/2 + 1/4 * 1/2
    assert half["information"] == pytest.approx(0.3437, abs=1e-4)  # entropies 0.6931 and 0.5623, together 1.0397
    collapsed = pictures_bim.agreement(np.zeros(4, int), np.zeros(4, int), 5)
    assert collapsed["same"] == collapsed["chance"] == collapsed["used"] == 1
    assert math.isnan(collapsed["information"])
    assert math.isnan(pictures_bim.agreement(np.zeros(0, int), np.zeros(0, int), 5)["same"])


def test_forty_colours_can_be_told_apart():
    from skimage.color import rgb2lab

    colours = distinct(40)
    assert colours.shape == (40, 3) and 0 <= colours.min() and colours.max() <= 1
    lab = rgb2lab(colours)
    apart = np.linalg.norm(lab[:, None] - lab, axis=-1) + 1e3 * np.eye(40)
    assert apart.min() > 12  # 2.3 is a just noticeable difference
    np.testing.assert_array_equal(distinct(12), colours[:12])


def test_the_clusters_most_used_are_the_same_in_all_pictures():
    maps = [np.full((1, 2, 2), k) for k in (3, 3, 1)]
    pairs = [SimpleNamespace(own=pictures_bim.Clusters(5, m, m, m)) for m in maps] + [SimpleNamespace(own=None)]
    np.testing.assert_allclose(pictures_bim.usage(Scene(None, None, {}, tuple(pairs)), 0), [0, 1 / 3, 0, 2 / 3, 0])


def drawn(name, case, *options):
    config = load(name, [*OPTIONS[name], *options])
    torch.manual_seed(0)
    backbone = build_backbone(config.network)
    method = build_method(config, backbone).eval()
    return method, backbone.eval(), LOOKS[name].draw(method, case, torch.Generator().manual_seed(1))


def test_views_of_bim_correspond(tmp_path):
    case = prepared_case(tmp_path, "p0", np.random.default_rng(0).random((3, 16, 16)))
    still = "bim.jitter=1,1", "bim.gamma=1,1"
    method, backbone, views = drawn("bim", case, *still)
    assert 0.3 < views.inside.float().mean() < 1
    everywhere = torch.arange(256)
    came = moved(views.view_1, views, everywhere).view(16, 16)
    torch.testing.assert_close(came[views.inside], views.view_2[0, 0][views.inside])
    pair = make_pair(case, "val", LOOKS["bim"], method, backbone, 0)
    assert pair.own.first.shape == (2, 16, 16)
    np.testing.assert_array_equal(pair.own.moved >= 0, np.stack([pair.inside] * 2))
    row, column = np.argwhere(pair.inside)[7]
    nearest = tuple(pair.source[row, column].round().astype(int))
    assert (pair.own.moved[:, row, column] == pair.own.first[(slice(None), *nearest)]).all()


def test_crops_of_pgl_correspond(tmp_path):
    z, y, x = np.mgrid[:6, :20, :24]
    case = prepared_case(tmp_path, "v0", np.clip((x + 2 * y + 3 * z) / 100, 0, 1))
    still = [f"pgl.{key}=0" for key in ("noise_p", "blur_p", "contrast_p", "gamma_p")]
    config = load("pgl", [*OPTIONS["pgl"], "pgl.depth=free", *still])
    method, compared = build_method(config, build_backbone(config.network)), 0
    for seed in range(4):
        views = pictures_pgl.draw(method, case, torch.Generator().manual_seed(seed))
        size = torch.tensor(config.data.size)
        inner = views.inside & ((views.source > 0.5) & (views.source < size - 1.5)).all(-1)  # resizing repeats the outermost voxels
        inner[[0, -1]] = inner[:, [0, -1]] = inner[:, :, [0, -1]] = False
        came = moved(views.view_1, views, torch.arange(inner.numel())).view(inner.shape)
        torch.testing.assert_close(came[inner], views.view_2[0, 0][inner], atol=2e-3, rtol=0)
        compared += int(inner.sum())
    assert compared > 20


def test_flips_turn_a_box():
    box = torch.tensor([[0.0, 1.0, 2.0], [4.0, 5.0, 8.0]])
    found = pictures_pgl.turned(box, torch.tensor([False, True, True]), (4, 8, 8))
    assert found.tolist() == [[0, 3, 0], [4, 7, 6]]
    boxes = torch.stack([box, found])
    source, inside = pictures_pgl.correspondence(boxes, torch.tensor([False, True, True]), (4, 8, 8))
    assert source[1, 3, 0].tolist() == pytest.approx([1, 4, 7])  # the box's first row and column are the last ones
    assert inside[:, 3:7, :6].all() and inside.sum() == 4 * 4 * 6


def test_an_encoder_s_map_lies_over_the_image():
    class Halved(torch.nn.Module):
        def padded(self, size):
            return tuple(max(8, n) for n in size)

        def encode(self, x):
            p = torch.nn.functional.pad(x, (0, 0, 2, 2, 2, 2))
            return [torch.nn.functional.avg_pool3d(p, 2)]

    ramp = torch.arange(8.0).expand(1, 1, 4, 4, 8)
    found = coarsest(None, Halved(), ramp)
    assert found.shape == ramp.shape
    assert found[0, 0, 1, 1, 1:-1].tolist() == pytest.approx(list(range(1, 7)))


def test_regions_that_are_alike():
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(6, 8))
    sizes = np.array([[9, 9, 9, 9, 9, 9], [9, 9, 9, 9, 2, 0]])
    plane = np.zeros((2, 2), int)
    regions = pictures_lrc.Regions(plane, plane, plane, sizes[0], sizes, np.stack([rows, 3 * rows]), 4)
    colours = Colours.fit([rng.normal(size=(8, 5, 5))])
    colours = replace(colours, mean=np.zeros(8))
    assert regions.both.tolist() == [0, 1, 2, 3]  # the others are too small in view 2
    found = pictures_lrc.matches(regions, colours)
    assert found["found"] == 1 and found["chance"] == 0.25
    assert found["same"] == pytest.approx(1)
    unit = rows[:4] / np.linalg.norm(rows[:4], axis=1, keepdims=True)
    assert found["others"] == pytest.approx(np.mean([unit[i] @ unit[j] for i in range(4) for j in range(4) if i != j]))
    turned = replace(regions, means=np.stack([rows, rows[[1, 0, 2, 3, 4, 5]]]))
    assert pictures_lrc.matches(turned, colours)["found"] == 0.5
    assert math.isnan(pictures_lrc.matches(replace(regions, least=9, sizes=np.array([[9] * 6, [9, 0, 0, 0, 0, 0]])), colours)["others"])


def test_the_region_in_the_middle_is_the_one_compared():
    plane = np.repeat([[0, 0, 2, 2, 1, 1, 1, 1]], 8, 0)
    regions = pictures_lrc.Regions(plane, plane, plane, np.array([16, 32, 16]), np.array([[16, 32, 16]] * 2), np.zeros((2, 3, 4)), 4)
    assert pictures_lrc.query(regions) == 1
    assert pictures_lrc.query(replace(regions, second=np.where(plane == 1, -1, plane))) == 2
    assert pictures_lrc.query(replace(regions, sizes=np.array([[16, 32, 16], [9, 0, 3]]))) == 0


def test_superpixels_are_those_of_the_views(tmp_path):
    image = np.zeros((1, 16, 16))
    image[0, :, 6:], image[0, 4:9, 9:14] = 0.4, 0.9
    case = prepared_case(tmp_path, "p0", image)
    options = "lrc.superpixel_sigma=0", "lrc.superpixel_scale=1", "spatial.translation=0.3", "spatial.scale=0.9,1.1"
    method, backbone, views = drawn("lrc", case, *options)
    _, first, second = (labels[0] for labels in views.detail)
    nearest = views.source.round().long().clamp(0, 15)
    assert 0.5 < views.inside.float().mean() < 1
    assert torch.equal(second[views.inside], first[tuple(nearest[views.inside].T)])
    beyond = (views.source < -0.5) | (views.source > 15.5)
    assert beyond.any() and (second[beyond.any(-1)] == -1).all()
    regions = make_pair(case, "val", LOOKS["lrc"], method, backbone, 0).own
    assert sorted(regions.cut_sizes) == [25, 96, 135]  # the bright square, air, what is between
    assert sorted(regions.sizes[0]) == [25, 135]
    assert (regions.first[:, :6] == -1).all() and (regions.first[:, 6:] >= 0).all()
    assert regions.first[5, 10] != regions.first[0, 15]
    assert regions.sizes[1].tolist() == [int((regions.second == k).sum()) for k in range(2)]
    assert len(np.unique(regions.cut)) == 3


def test_planes_of_a_volume_show_the_same_place(tmp_path):
    case = prepared_case(tmp_path, "v0", np.random.default_rng(0).random((6, 20, 24)))
    config = load("pgl", DEEP)
    torch.manual_seed(0)
    backbone = build_backbone(config.network).eval()
    pair = make_pair(case, "val", LOOKS["pgl"], build_method(config, backbone), backbone, 0)
    axial, coronal, sagittal = pair.planes
    assert [p.view.shape for p in pair.planes] == [(8, 8), (4, 8), (4, 8)]
    np.testing.assert_array_equal(axial.view, pair.view_2)
    np.testing.assert_array_equal(axial.inside, pair.inside)
    assert axial.inside.any() and coronal.inside.any() and sagittal.inside.any()
    assert (axial.aspect, coronal.aspect, sagittal.aspect) == (1, 3, 3)  # 3 mm slices, pixels of 1 mm
    scene = Scene(Colours.fit([pair.features_1, pair.features_2]), None, {})
    assert len(planes(pair, scene).figure.axes) == 12
    assert planes(replace(pair, planes=()), scene) is None


@pytest.mark.parametrize("name", ["bim", "lrc"])
def test_every_panel_of_volumes_and_of_nothing(name, tmp_path):
    case, empty = (prepared_case(tmp_path, n, image) for n, image in (("v0", np.random.default_rng(0).random((6, 10, 12))), ("v1", np.zeros((6, 10, 12)))))
    config = load(name, [*OPTIONS[name], "network.dims=3", "data.size=4,8,8"])
    torch.manual_seed(0)
    backbone = build_backbone(config.network).eval()
    method = build_method(config, backbone)
    pairs = [make_pair(c, "val", LOOKS[name], method, backbone, k) for k, c in enumerate((case, empty))]
    colours = Colours.fit([pair.features_1 for pair in pairs])
    scene = Scene(colours, None, dict(zip(("v0", "v1"), pairs[::-1], strict=True)), tuple(pairs))
    made = [[panel(pair, scene) for panel in LOOKS[name].panels] for pair in pairs]
    assert all(made[0])
    assert [picture is None for picture in made[1]] == [False] * (len(made[1]) - 1) + [name == "lrc"]  # no region is like another where there is none
    if name == "lrc":
        assert made[0][-2].caption.startswith("2 supervoxels, 1 kept") and ", 0 kept" in made[1][-2].caption


def test_a_picture_made_smaller_keeps_its_colours(tmp_path):
    array = np.repeat(np.linspace(0, 255, 2200)[None, :, None], 400, 0).repeat(3, 2)
    fills = ((230, 159, 0), (86, 180, 233), (204, 121, 167), (240, 228, 66), (0, 158, 115), (213, 94, 0))
    for k, colour in enumerate(fills):  # a little of each class over many greys, as in an overlay
        array[60 * k : 60 * k + 12, ::40] = colour
        array[60 * k + 20 : 60 * k + 40, 1000:1200] = 0.65 * array[60 * k + 20 : 60 * k + 40, 1000:1200] + 0.35 * np.array(colour)
        array[60 * k + 42 : 60 * k + 50, 100:110] = colour
    Image.fromarray(array.astype(np.uint8)).save(tmp_path / "a.png")
    with Image.open(io.BytesIO(page.png_from(tmp_path / "a.png"))) as small:
        assert small.size == (1100, 200)
        pixels = np.array(small.convert("RGB")).astype(int)
    for k, colour in enumerate(fills):
        assert np.abs(pixels[30 * k + 23, 52] - colour).max() < 40  # by the median cut, Pillow's default, 99


def test_predictions_are_drawn_beside_the_truth():
    truth = np.zeros((10, 12), int)
    truth[2:6, 2:6], truth[6:9, 6:9] = 1, 2
    wrong = np.roll(truth, 2, 1)
    row = overlay.Row("slice 3", 1.0, np.zeros((10, 12)), truth, {"random": wrong, "pretrained": truth})
    figure = overlay.draw([row, replace(row, name="coronal")], ("wall", "core"), "title")
    assert len(figure.axes) == 8
    bare, shown, predicted, _ = figure.axes[:4]
    assert [len(axis.collections) for axis in (bare, shown, predicted)] == [0, 4, 6]  # a fill and a line a class; the truth's lines on predictions
    assert [axis.get_title() for axis in figure.axes[:4]] == ["image", "truth", "random", "pretrained"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["wall", "core", "truth, on predictions"]
