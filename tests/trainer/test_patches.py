"""3D data: patches of memory-mapped volumes, resampling along every axis, windows that slide over a volume."""

from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pix2rep import evaluate, metrics
from pix2rep.config import Config, ConfigError, DataConfig, SpatialConfig, load
from pix2rep.data.cache import Prepared, crop_or_pad, prepare
from pix2rep.data.discover import discover
from pix2rep.data.patches import CANDIDATES, PatchSource, crop_boxes, open_source, read_patch, tiles
from pix2rep.data.slices import SliceSource
from pix2rep.method_config import PglConfig
from pix2rep.study import Study
from pix2rep.views import SpatialView
from pix2rep_kernels import align, box_grid
from volumes import prepared_case

SHAPES = [(20, 24, 31), (9, 40, 18), (16, 16, 16)]
SIZE = (12, 16, 16)


@pytest.fixture
def prepared(tmp_path):
    rng = np.random.default_rng(0)
    cases = [prepared_case(tmp_path, f"p{k}", rng.random(shape), rng.integers(0, 3, shape)) for k, shape in enumerate(SHAPES)]
    return Prepared(tmp_path, cases)


def test_a_patch_batch_is_cut_from_the_whole_volumes(prepared):
    source = PatchSource(prepared, prepared.patients, SIZE, seed=3, labelled=True)
    seen = set()
    for step in range(20):
        now, indices = source.at(step), [0, 1, 2, 0]
        images, labels = now.batch(indices)
        assert images.shape == (4, 1, *SIZE) and images.dtype == torch.float32 and labels.shape == (4, *SIZE) and labels.dtype == torch.int64
        for image, label, index, low in zip(images, labels, indices, now.positions(indices), strict=True):
            case = prepared.cases[index]
            pads = [(max(s - n, 0) // 2, s) for n, s in zip(case.shape, SIZE, strict=True)]
            cut = tuple(slice(a + before, a + before + s) for a, (before, _), s in zip(low, pads, SIZE, strict=True))
            np.testing.assert_array_equal(image[0], np.pad(case.image(), pads)[cut])
            np.testing.assert_array_equal(label, np.pad(case.labels(), pads)[cut])
            seen.add((index, *low))
    assert len({place for place in seen if place[0] == 0}) > 20
    assert {place for place in seen if place[0] == 2} == {(2, a, 0, 0) for a in range(5)}  # room along z alone


def test_positions_follow_seed_and_step_alone(prepared):
    make = lambda seed: PatchSource(prepared, prepared.patients, SIZE, seed=seed)  # noqa: E731
    first, again = make(1), make(1)
    again.at(7).batch([1])
    np.testing.assert_array_equal(first.at(5).positions([0, 0]), again.at(5).positions([0, 0]))
    places = {tuple(make(seed).at(step).positions([0, 0]).ravel()) for seed, step in ((1, 5), (1, 6), (2, 5))}
    assert len(places) == 3
    config = load(None, ["network.dims=3", "data.size=12,16,16", "pretrain.seed=1"])
    np.testing.assert_array_equal(open_source(prepared, ["p0"], config).at(5).positions([0]), first.at(5).positions([0]))


def test_a_volume_no_larger_than_the_patch_is_its_centre_crop(prepared):
    size = (24, 40, 32)
    expected = SliceSource(prepared, prepared.patients, size).batch([0, 1])[0]
    torch.testing.assert_close(PatchSource(prepared, prepared.patients, size).at(9).batch([0, 1])[0], expected, rtol=0, atol=0)


def test_bad_sizes(prepared):
    with pytest.raises(ValueError, match=r"data.size must be three numbers of voxels for patches, got \(8, 8\)"):
        PatchSource(prepared, prepared.patients, (8, 8))


class Asked:
    """An array that notes how many of its elements are asked for."""

    def __init__(self, array):
        self.array, self.shape, self.elements = array, array.shape, 0

    def __getitem__(self, where):
        part = self.array[where]
        self.elements += part.size
        return part


def test_only_the_slab_of_a_large_file_is_read(tmp_path):
    shape = (400, 2048, 2048)  # 3.1 GiB, sparse
    np.lib.format.open_memmap(tmp_path / "big.npy", "w+", np.float16, shape)[200, 1000, 1000:1010] = 1
    case = replace(prepared_case(tmp_path, "small", np.zeros((2, 2, 2))), shape=shape, image_file=tmp_path / "big.npy")
    source = PatchSource(Prepared(tmp_path, [case]), ["small"], (16, 96, 96))
    volume = Asked(source._map(0, "image"))
    source._maps[0, "image"] = volume
    source.batch([0])
    assert volume.elements == 16 * 96 * 96
    volume.elements = 0
    _, low, sides = next(source._crop_boxes([0]))
    source.crops([0])
    assert volume.elements == ((low + sides).max(0) - low.min(0)).prod() < 16 * (2 * 1.4 * 96) ** 2
    assert read_patch(volume, (200, 1000, 990), (1, 1, 30)).sum() == 10


@pytest.mark.parametrize(("shape", "overlap"), [((20, 24, 31), 0.0), ((20, 24, 31), 0.5), ((5, 16, 33), 0.25)])
def test_tiles_cover_a_volume_once_each(shape, overlap):
    starts, count = tiles(shape, SIZE, overlap), np.zeros([max(n, s) for n, s in zip(shape, SIZE, strict=True)], int)
    before = [max(s - n, 0) // 2 for n, s in zip(shape, SIZE, strict=True)]
    for low in starts:
        count[tuple(slice(a + b, a + b + s) for a, b, s in zip(low, before, SIZE, strict=True))] += 1
    assert count.min() == 1 and len(set(starts)) == len(starts) and starts == tiles(shape, SIZE, overlap)
    assert count.sum() == len(starts) * np.prod(SIZE)  # none reaches beyond the volume


@pytest.mark.parametrize("depth", ["same", "free"])
@pytest.mark.parametrize("of", ["union", "smaller"])
def test_two_crops_overlap_and_lie_inside(depth, of):
    shape, size, config = np.array((40, 60, 70)), (16, 24, 24), PglConfig(depth=depth, overlap_of=of, min_overlap=0.2)
    rng, found = np.random.default_rng(0), []
    for _ in range(200):
        lows, sides = crop_boxes(shape, size, rng.random((2 + 2 * CANDIDATES, 3)), config)
        assert (lows >= 0).all() and (lows + sides <= shape).all()
        common = np.clip((lows + sides).min(0) - lows.max(0), 0, None).prod()
        share = common / (sides.prod(1).sum() - common if of == "union" else sides.prod(1).min())
        assert share >= 0.2
        found.append((share, *(sides / size).ravel(), *lows.ravel()))
    shares, scales = np.array(found)[:, 0], np.array(found)[:, 1:7].reshape(-1, 2, 3)
    assert shares.min() < 0.35 and shares.max() > 0.6
    scaled = scales if depth == "free" else scales[..., 1:]
    assert scaled.min() >= 1.1 - 0.5 / 16 and scaled.max() <= 1.4 + 0.5 / 16 and scaled.std() > 0.05
    if depth == "same":
        lows = np.array(found)[:, 7:].reshape(-1, 2, 3)
        assert (scales[..., 0] == 1).all() and (lows[:, 0, 0] == lows[:, 1, 0]).all()


def test_crops_that_no_draw_brings_together_are_centred():
    config = PglConfig(min_overlap=0.6, crop_scale=(1.2, 1.2))
    lows, sides = crop_boxes((40, 4000, 4000), (16, 20, 20), np.random.default_rng(0).random((2 + 2 * CANDIDATES, 3)), config)
    np.testing.assert_array_equal(*lows)
    assert sides.tolist() == [[16, 24, 24]] * 2
    lows, _ = crop_boxes((8, 20, 4000), (16, 20, 20), np.random.default_rng(0).random((2 + 2 * CANDIDATES, 3)), config)
    assert lows[:, :2].tolist() == [[-4, 0]] * 2  # shorter than the patch, as long as it


def test_crops_are_resized_cuts_and_boxes_say_what_both_see(prepared):
    shape = (24, 40, 44)
    z, y, x = np.meshgrid(*(np.arange(n) / 64 for n in shape), indexing="ij")
    case = prepared_case(prepared.folder, "ramp", z + y * 0.5 + x * 0.25)  # exact in float16, and linear: interpolation keeps it
    source = PatchSource(Prepared(prepared.folder, [case]), ["ramp"], SIZE, seed=4, crops=PglConfig(depth="free", crop_scale=(1.1, 1.4)))
    for step in range(4):
        now = source.at(step)
        crops, (low, high) = now.crops([0, 0]), now.boxes([0, 0])
        assert crops.shape == (2, 2, 1, *SIZE) and low.shape == high.shape == (2, 2, 3)
        for item, (_, lows, sides) in enumerate(now._crop_boxes([0, 0])):
            for view in range(2):
                cut = torch.from_numpy(np.ascontiguousarray(read_patch(case.image(), lows[view], sides[view]))).float()
                torch.testing.assert_close(crops[view, item], F.interpolate(cut[None, None], SIZE, mode="trilinear")[0])
        inner_low, inner_high = low + 0.2 * (high - low), high - 0.2 * (high - low)  # away from where interpolation repeats the border
        grids = [box_grid(a, b, SIZE) for a, b in zip(inner_low, inner_high, strict=True)]
        dot, sq1, sq2, _ = align(*crops, *grids, size=(5, 5, 5))
        assert (sq1 + sq2 - 2 * dot).abs().max() < 1e-5
        grids[1] = box_grid(inner_low[1] + 1, inner_high[1] + 1, SIZE)
        dot, sq1, sq2, _ = align(*crops, *grids, size=(5, 5, 5))
        assert (sq1 + sq2 - 2 * dot).min() > 1e-4  # one voxel off shows


# resampling along every axis


@pytest.fixture
def smooth(tmp_path):
    """A data set of one smooth volume, 40 x 36 x 15 voxels of 1.5 x 1.5 x 6 mm, labelled where it is bright."""
    x, y, z = np.meshgrid(*(np.arange(n) for n in (40, 36, 15)), indexing="ij")
    image = 1000 * np.exp(-(((x - 16) / 9) ** 2 + ((y - 14) / 8) ** 2 + ((z - 5) / 3) ** 2))
    for folder, array in (("imagesTr", image.astype(np.int16)), ("labelsTr", (image > 500).astype(np.uint8))):
        (tmp_path / "data" / folder).mkdir(parents=True)
        nib.save(nib.Nifti1Image(array, np.diag([-1.5, -1.5, 6.0, 1.0])), tmp_path / "data" / folder / "a.nii.gz")
    return tmp_path / "data"


class Bright(torch.nn.Module):
    """Logits of label 1: how far a voxel lies above half the range."""

    def forward(self, x):
        return torch.cat([torch.zeros_like(x), 40 * (x - 0.5)], 1)


def centroid(array, spacing) -> list[float]:
    """Where the intensities lie on average, mm from the first face along each axis."""
    weights = np.asarray(array, np.float64) / np.sum(array, dtype=np.float64)
    return [np.tensordot(weights.sum(tuple({0, 1, 2} - {axis})), (np.arange(n) + 0.5) * spacing[axis], 1) for axis, n in enumerate(array.shape)]


def study_of(root, config: Config) -> Study:
    cases = discover(root)
    config = replace(config, data=replace(config.data, root=str(root)))
    found = prepare(cases, config.data, root.parent / "cache")
    return Study(root, config, found, {c.id: c for c in cases}, {}, ("bright",), torch.device("cpu"))


@pytest.mark.parametrize("spacing", [(3, 2, 2), (6, 1.5, 1.5), (9, 3, 3), (4.5, 1.5, 3)], ids=str)
def test_resampling_along_every_axis_and_back(smooth, spacing):
    case = prepare(discover(smooth), DataConfig(root=str(smooth), size=SIZE, spacing=spacing, percentiles=(0, 100)), smooth.parent / "c").cases[0]
    extent = np.array((15 * 6.0, 36 * 1.5, 40 * 1.5))
    assert case.shape == case.labels().shape == tuple(np.round(extent / spacing).astype(int))
    np.testing.assert_allclose(np.array(case.shape) * case.spacing, extent)
    assert case.native_shape == (15, 36, 40)
    native = nib.as_closest_canonical(nib.load(smooth / "imagesTr/a.nii.gz")).get_fdata().T
    np.testing.assert_allclose(centroid(case.image(), case.spacing), centroid(native, (6, 1.5, 1.5)), atol=0.15)  # mm
    bright = case.image() > 0.5
    assert metrics.dice(bright.astype(np.uint8), np.asarray(case.labels()), 1)[0] > 0.85  # labels went along
    truth = nib.as_closest_canonical(nib.load(smooth / "labelsTr/a.nii.gz")).get_fdata().T.astype(np.uint8)
    assert metrics.dice(case.restore(np.asarray(case.labels())), truth, 1)[0] > (0.9 if max(spacing) <= 6 else 0.75)


@pytest.mark.parametrize("options", [["network.dims=3", "data.size=12,16,16"], ["data.size=36,40"]], ids=["3D", "2D"])
@pytest.mark.parametrize("spacing", ["3,2,2", "4,1.5,1.5", "null"])
def test_predictions_come_back_to_the_source_grid(smooth, options, spacing):
    study = study_of(smooth, load(None, [*options, f"data.spacing={spacing}", "data.percentiles=0,100"]))
    case = study.prepared.cases[0]
    found = evaluate.predict_case(Bright(), case, study)
    assert found.shape == case.native_shape == (15, 36, 40)
    assert metrics.dice(found, study.truth(case), 1)[0] > (0.93 if spacing != "null" else 0.999)


def test_options(smooth):
    with pytest.raises(ValueError, match=r"data.spacing must be two positive numbers \(mm along H, W\), three \(Z, H, W\) or null, got \(1,\)"):
        prepare(discover(smooth), DataConfig(spacing=(1,)), smooth.parent / "c")
    with pytest.raises(ValueError, match="data.window must be LOW,HIGH"):
        prepare(discover(smooth), DataConfig(window=(5, 5)), smooth.parent / "c")
    with pytest.raises(ConfigError, match="downstream.sliding_overlap must be at least 0 and under 1, got 1"):
        load(None, ["downstream.sliding_overlap=1"])


def test_a_window_of_intensities(smooth):
    case = prepare(discover(smooth), DataConfig(window=(100, 500)), smooth.parent / "c").cases[0]
    raw = nib.as_closest_canonical(nib.load(smooth / "imagesTr/a.nii.gz")).get_fdata().T
    np.testing.assert_allclose(case.image(), ((raw - 100) / 400).clip(0, 1), atol=5e-4)
    with pytest.raises(ValueError, match="intensities must vary within data.window=2000,3000, got 0 to"):
        prepare(discover(smooth), DataConfig(window=(2000, 3000)), smooth.parent / "c")


# windows


def test_a_sliding_window_is_the_whole_volume_for_a_network_that_sees_single_voxels(prepared):
    torch.manual_seed(0)
    model = torch.nn.Conv3d(1, 4, 1)
    config = load(None, ["network.dims=3", "data.size=12,16,16"])
    study = Study(prepared.folder, config, prepared, {}, {}, ("a", "b", "c"), torch.device("cpu"))
    for case in prepared.cases:
        whole = model(torch.from_numpy(np.asarray(case.image(), np.float32))[None, None])[0].softmax(0)[1:].transpose(0, 1)
        torch.testing.assert_close(torch.cat(list(evaluate.probabilities(model, case, study))), whole.detach(), atol=1e-6, rtol=0)
    cropped = replace(study, config=replace(config, downstream=replace(config.downstream, sliding_window=False)))
    found = torch.cat(list(evaluate.probabilities(model, prepared.cases[0], cropped)))
    assert found[:4].abs().max() == 0 and found[4:16, :, 4:20, 7:23].min() > 0  # the centre alone


def test_items_are_tiles_where_windows_slide(prepared):
    config = load(None, ["network.dims=3", "data.size=12,16,16"])
    study = Study(prepared.folder, config, prepared, {}, {}, ("a", "b"), torch.device("cpu"))
    images, labels = study.stack(prepared.cases)
    assert len(images) == sum(len(tiles(shape, SIZE)) for shape in SHAPES) == len(labels)
    np.testing.assert_array_equal(labels[0], prepared.cases[0].labels()[:12, :16, :16])
    config = replace(config, downstream=replace(config.downstream, sliding_window=False))
    centres = replace(study, config=config).stack(prepared.cases)[0]
    np.testing.assert_array_equal(centres[:, 0], np.stack([crop_or_pad(case.image(), SIZE) for case in prepared.cases]))


def test_turns_keep_millimetres_for_each_image():
    """A quarter turn about z maps mm to mm: with pixels of 1 x 2 mm the off-diagonal entries are the ratio of extents."""
    view = SpatialView(SpatialConfig(rotation=90.0, scale=(1, 1), flip=()), 3)
    spacing = torch.tensor([[3.0, 1.0, 1.0], [5.0, 1.0, 2.0]])
    size = (8, 16, 16)
    grids = view(2, size, torch.Generator().manual_seed(0), spacing=spacing)
    for grid, voxel in zip(grids, spacing, strict=True):
        extent = torch.tensor([(n - 1) * s for n, s in zip(size, voxel, strict=True)]).flip(0)
        turned = extent[:, None] * grid[:, :3] / extent[None]  # in mm
        torch.testing.assert_close(turned @ turned.T, torch.eye(3), atol=1e-5, rtol=0)
    alone = [SpatialView(view.config, 3, tuple(s.tolist()))(2, size, torch.Generator().manual_seed(0))[k] for k, s in enumerate(spacing)]
    torch.testing.assert_close(grids, torch.stack(alone))
    with pytest.raises(ValueError, match=r"spacing must have shape \[2, 3\], got \[1, 3\]"):
        view(2, size, spacing=spacing[:1])


def test_voxel_sizes_of_items(prepared):
    assert PatchSource(prepared, ["p0"], SIZE).spacing([0, 0]).tolist() == [[3, 1, 1]] * 2
    assert SliceSource(prepared, ["p0"], (8, 8)).spacing([5]).tolist() == [[1, 1]]
