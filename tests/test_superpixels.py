"""felzenszwalb: the partition of scikit-image in the plane, of plain Python in space, whatever layout, thread or tie."""

import itertools
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from pix2rep_kernels import felzenszwalb, native

if reason := native.why_missing("cpu"):
    pytest.skip(reason, allow_module_level=True)

OPTIONS = [
    {}, {"scale": 50, "sigma": 0.5, "min_size": 5}, {"scale": 200, "sigma": 0, "min_size": 0}, {"scale": 30, "sigma": 2.5, "min_size": 30},
    {"scale": 1e4, "min_size": 1},
]  # fmt: skip


def noise(shape, seed=0, levels=None):
    """Values in [0, 1); with `levels`, so few of them that most edges tie."""
    values = torch.from_numpy(np.random.default_rng(seed).random(shape))
    return values if levels is None else (values * levels).floor() / levels


def plainly(image, k, least):
    """The algorithm with a list of edges, sets of voxels, and no thought of time. Labels in scan order."""
    points = list(itertools.product(*map(range, image.shape)))
    place = {p: i for i, p in enumerate(points)}
    steps = [s for s in itertools.product((-1, 0, 1), repeat=image.ndim) if s > (0,) * image.ndim]
    edges = [(p, q) for p in points for s in steps if (q := tuple(a + b for a, b in zip(p, s, strict=True))) in place]
    edges = sorted((abs(image[p] - image[q]), place[p], place[q]) for p, q in edges)
    home = {i: frozenset([i]) for i in range(len(points))}
    inner = {home[i]: 0.0 for i in home}

    def merge(a, b, cost):
        inner[a | b] = cost
        home.update(dict.fromkeys(a | b, a | b))

    for cost, u, v in edges:
        a, b = home[u], home[v]
        if a != b and cost < min(np.float32(inner[a] + k / len(a)), np.float32(inner[b] + k / len(b))):
            merge(a, b, cost)
    for _, u, v in edges:
        a, b = home[u], home[v]
        if a != b and min(len(a), len(b)) < least:
            merge(a, b, 0.0)
    first = sorted({min(s) for s in home.values()})
    return np.array([first.index(min(home[i])) for i in range(len(points))]).reshape(image.shape)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (7, 1), (5, 8), (64, 64), (97, 50)], ids=str)
def test_a_plane_is_cut_as_scikit_image_cuts_it(shape, options):
    theirs = pytest.importorskip("skimage.segmentation").felzenszwalb
    image = noise(shape, seed=sum(shape))
    assert np.array_equal(felzenszwalb(image, **options), theirs(image.numpy(), channel_axis=None, **options))


@pytest.mark.parametrize("levels", [None, 8])
@pytest.mark.parametrize("shape", [(2, 2, 2), (3, 5, 4), (6, 2, 7), (9, 1, 5)], ids=str)
def test_a_volume_is_cut_as_plain_python_cuts_it(shape, levels):
    image = noise(shape, levels=levels)
    counts = set()
    for scale, least in ((60, 0), (150, 0), (150, 6), (400, 3)):
        labels = felzenszwalb(image, scale=scale, sigma=0, min_size=least)
        assert np.array_equal(labels, plainly(image.numpy(), scale / 255, least))
        counts.add(int(labels.max()))
    assert len(counts) > 1  # else the options would not be tested


@pytest.mark.parametrize("levels", [None, 4])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_plane_is_a_volume_of_depth_1(options, levels):
    image = noise((33, 20), levels=levels)
    labels = felzenszwalb(image, **options)
    for axis in range(3):
        assert torch.equal(felzenszwalb(image.unsqueeze(axis), **options).squeeze(axis), labels)


def test_the_blur_is_gaussian_and_follows_the_spacing():
    blurred = pytest.importorskip("scipy.ndimage").gaussian_filter
    image = noise((6, 17, 12))
    for spacing, sigma in ((None, (1.3, 1.3, 1.3)), ((8.0, 2.0, 1.0), (1.3 / 8, 1.3 / 2, 1.3)), ((3, 3, 3), (1.3, 1.3, 1.3))):
        ours = felzenszwalb(image, scale=5, sigma=1.3, min_size=3, spacing=spacing)
        theirs = torch.from_numpy(blurred(image.numpy(), sigma, mode="reflect"))
        assert torch.equal(ours, felzenszwalb(theirs, scale=5, sigma=0, min_size=3))
        assert 2 < ours.max() < 200


def test_segments_are_numbered_in_scan_order_and_are_large_enough():
    labels = felzenszwalb(noise((9, 20, 20)), scale=20, min_size=40)
    assert labels.dtype == torch.int32
    found, first, sizes = np.unique(labels, return_index=True, return_counts=True)
    assert len(found) > 3 and np.array_equal(found, np.arange(len(found))) and np.all(np.diff(first) > 0)
    assert sizes.min() >= 40


def test_one_image_has_one_segmentation():
    image = noise((12, 24, 24), levels=16).float()
    labels = felzenszwalb(image, scale=80)
    spread = torch.zeros(24, 24, 24)[..., ::2]
    spread.copy_(image.movedim(0, 2))
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda x: felzenszwalb(x, scale=80), [image, spread.movedim(2, 0), image.double(), image.bfloat16(), image]))
    assert all(torch.equal(other, labels) for other in found)


def test_extreme_values():
    image = torch.tensor([[1e300, -1e300, 0.0, 1e-300], [1.0, 1e39, -1e39, 5e-324]], dtype=torch.double)  # beyond float32, and below it
    assert felzenszwalb(image, scale=1, sigma=0, min_size=0).tolist() == [[0, 1, 2, 2], [3, 4, 5, 2]]
    assert felzenszwalb(image, scale=1, sigma=1e-200, min_size=99).max() == 0


def test_what_is_empty_or_flat():
    assert felzenszwalb(torch.zeros(0, 4)).shape == (0, 4)
    assert felzenszwalb(torch.full((3, 4, 5), 0.5)).max() == 0
    assert felzenszwalb(torch.full((3, 3), 0.5), scale=0, min_size=0).tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]


@pytest.mark.parametrize(
    ("image", "options", "error", "words"),
    [
        (np.zeros((3, 3)), {}, TypeError, "`image` must be a torch.Tensor, got ndarray"),
        (torch.zeros(3, 3, dtype=torch.uint8), {}, TypeError, "`image` must be float16, bfloat16, float32 or float64, got uint8"),
        (torch.zeros(3), {}, ValueError, r"`image` must have shape \[H, W\] or \[D, H, W\], got \(3,\)"),
        (torch.zeros(1).expand(2**12, 2**12, 2**12), {}, ValueError, "`image` must have at most 330382099 voxels, got 68719476736"),
        (torch.tensor([[0.0, torch.nan]]), {}, ValueError, "`image` must be finite, got 1 of 2 values that are not"),
        (torch.zeros(3, 3), {"scale": -1}, ValueError, "`scale` must be a finite number >= 0, got -1"),
        (torch.zeros(3, 3), {"sigma": float("inf")}, ValueError, "`sigma` must be a finite number >= 0, got inf"),
        (torch.zeros(3, 3), {"min_size": 2.5}, ValueError, "`min_size` must be a whole number >= 0, got 2.5"),
        (torch.zeros(3, 3), {"spacing": (1, 2, 3)}, ValueError, r"`spacing` must be 2 finite numbers > 0, got \(1, 2, 3\)"),
        (torch.zeros(3, 3), {"spacing": (1, 0)}, ValueError, r"`spacing` must be 2 finite numbers > 0, got \(1, 0\)"),
    ],
)
def test_refusals(image, options, error, words):
    with pytest.raises(error, match=words):
        felzenszwalb(image, **options)


def test_the_op_itself_refuses_what_it_cannot_read():
    op = torch.ops.pix2rep_native.felzenszwalb
    good = torch.zeros(3, 3, dtype=torch.double)
    for argument, call in {
        "image": (good.float(), 0.1, [0, 0], 3), "sigma": (good, 0.1, [0.0], 3), "scale": (good, -0.1, [0, 0], 3), "min_size": (good, 0.1, [0, 0], -3),
    }.items():  # fmt: skip
        with pytest.raises(RuntimeError, match=f"`{argument}` must .*, got "):
            op(*call)
    for image in (good[None, None], good + torch.nan, good - torch.inf, good + 1.7e308):
        with pytest.raises(RuntimeError, match="`image` must .*, got "):
            op(image, 0.1, [0, 0], 3)
