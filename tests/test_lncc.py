"""lncc: values, gradients, properties, edges; every backend that runs here, against the paper's formula in float64."""

import itertools
import math

import pytest
import torch

from lncc_helpers import DEVICE, FAST, HERE, NEEDS, both, compare, ours, problem
from pix2rep_kernels import lncc
from pix2rep_kernels.testing import backends, error
from sweep import FULL

pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")  # numpy's, of NaN and inf in the interpreter

EPS = torch.finfo(torch.float32).eps
SHAPES = [(2, 1, 9, 11), (1, 3, 16, 17), (2, 2, 1, 33), (1, 1, 31, 2), (1, 1, 15, 129), (2, 1, 4, 6, 7), (1, 2, 3, 1, 17), (1, 1, 9, 8, 1)]
if FULL:
    SHAPES += [(1, 1, 127, 128), (1, 1, 67, 71), (3, 2, 32, 33), (1, 1, 17, 16, 31), (1, 1, 1, 1, 600), (1, 1, 2, 1300)]


# Values and gradients


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backend", FAST)
def test_values_and_gradients(backend, shape):
    for window, needs in itertools.product((3, 5, 9), NEEDS):
        compare(backend, *problem(shape), window=window, needs=needs)


@pytest.mark.parametrize("dtypes", [("float16", None), ("bfloat16", None), ("float64", None), ("float16", "float32"), ("float64", "bfloat16")], ids=str)
@pytest.mark.parametrize("backend", FAST)
def test_precisions(backend, dtypes):
    if "float64" in dtypes and backend == "triton":
        pytest.skip("float64 runs on the backends reference and cpu only")
    i_dtype, j_dtype = (name and getattr(torch, name) for name in dtypes)
    for shape, needs in itertools.product(((2, 1, 33, 20), (1, 2, 6, 7, 18)), NEEDS):
        compare(backend, *problem(shape, i_dtype, j_dtype), window=5, needs=needs)


@pytest.mark.parametrize("backend", HERE)
def test_gradcheck(backend):
    for shape, window in (((1, 2, 5, 6), 3), ((1, 1, 3, 4, 3), 3)):
        i, j, _ = problem(shape, torch.float64)
        assert torch.autograd.gradcheck(lambda i, j, k=window: lncc(i, j, window=k, backend=backend), (i.requires_grad_(), j.requires_grad_()))


TRITON_CASES = [
    *({"shape": (2, 1, 9, 11), "window": 3, "needs": needs} for needs in NEEDS),
    {"shape": (1, 3, 5, 6), "window": 5, "needs": (True, True)},
    {"shape": (1, 1, 3, 130), "window": 9, "needs": (True, False)},  # two blocks of columns
    {"shape": (1, 1, 1, 1), "window": 1, "needs": (True, True)},
    {"shape": (1, 1, 1, 7), "window": 3, "needs": (True, True)},
    {"shape": (1, 1, 11, 4, 5), "window": 3, "needs": (True, True)},  # two walks
    {"shape": (2, 2, 1, 2, 3), "window": 5, "needs": (False, True)},
    {"shape": (1, 1, 3, 4, 5), "window": 3, "needs": (True, True), "dtype": torch.bfloat16},
    {"shape": (1, 1, 6, 7), "window": 3, "needs": (True, True), "dtype": torch.float16, "j_dtype": torch.float32},
    {"shape": (1, 1, 4, 5), "window": 3, "needs": (True, True), "ring": 1},  # as windows too large for the registers are
    {"shape": (1, 1, 2, 4, 5), "window": 3, "needs": (True, False), "ring": 1},
]  # fmt: skip


@pytest.mark.skipif("triton" not in backends("lncc"), reason="triton does not run here")
@pytest.mark.parametrize("case", TRITON_CASES, ids=lambda case: "-".join(str(v) for v in case.values()).replace("torch.", ""))
def test_triton(case, monkeypatch):
    from pix2rep_kernels.triton import lncc as kernels

    case = dict(case)
    monkeypatch.setattr(kernels, "LARGEST_RING", case.pop("ring", kernels.LARGEST_RING))
    window, needs = case.pop("window"), case.pop("needs")
    compare("triton", *problem(**case), window=window, needs=needs)


@pytest.mark.parametrize("backend", [b for b in backends("lncc") if b != "reference"])
def test_a_large_mean_costs_its_ratio_to_the_deviation(backend):
    """The input's own rounding moves cc by EPS mean / deviation; PyTorch loses the square of that ratio."""
    shape, mean = (1, 1, 6, 7) if backend == "triton" else (2, 1, 40, 40), 100
    i, j, upstream = problem(shape)
    i, j = i + mean, j + mean
    truth = both(ours("reference"), i.double(), j.double(), upstream, window=3)
    keep = (slice(None),) * 2 + (slice(2, -2),) * 2  # padding is no deviation
    got = both(ours(backend), i, j, upstream, window=3)
    assert error([g[keep] for g in got], [t[keep] for t in truth]) <= 4 * EPS * mean / i.std().item()


@pytest.mark.parametrize("backend", [b for b in FAST if b != "reference"])
def test_lone_pixels(backend):
    """Windows of zeros but for a bright pixel have no mean to subtract: nothing may be lost to the bright pixel either."""
    i, j, upstream = problem((1, 1, 64, 64))
    alone = torch.rand(1, 1, 64, 64) > 0.97
    for window in (5, 15):
        compare(backend, (i + 0.5) * alone, (j + 0.5) * alone, upstream, window=window)


# Properties


@pytest.mark.parametrize("backend", backends("lncc"))
def test_symmetric(backend):
    i, j, upstream = problem((1, 1, 6, 7))
    cc, di, dj = both(ours(backend), i, j, upstream, window=3)
    swapped, dj_swapped, di_swapped = both(ours(backend), j, i, upstream, window=3)
    assert error([swapped, di_swapped, dj_swapped], [cc, di, dj]) <= 8 * EPS


@pytest.mark.parametrize("backend", backends("lncc"))
def test_cauchy_schwarz(backend):
    i, j, _ = problem((1, 1, 8, 9))
    cc = ours(backend)(i, j, window=3)
    assert cc.min() >= 0 and cc.max() <= 1 + 16 * EPS
    affine = ours(backend)(i, 0.5 * i + 0.25, window=3)[..., 1:-1, 1:-1]  # with the padding the border is not affine
    assert torch.allclose(affine, torch.ones(()), atol=64 * EPS, rtol=0)


@pytest.mark.parametrize("backend", backends("lncc"))
def test_anti_correlated_windows_have_no_gradient_through_c(backend):
    """There cc is e^2 / (v w), and the gradient what is left of it through v and w."""
    i, _, upstream = problem((1, 1, 7, 8))
    i, upstream = torch.nn.functional.pad(i, (2,) * 4), torch.nn.functional.pad(upstream, (4,) * 4)[..., 2:-2, 2:-2]
    j = 1 - i  # upstream is 0 where windows reach over the border
    eps = 1e-5
    cc, di, dj = both(ours(backend), i, j, upstream, window=3, eps=eps)
    inner = cc[..., 3:-3, 3:-3]
    assert 0 < inner.max() <= 1.01 * eps**2 / 0.05**2
    assert max(di.abs().max(), dj.abs().max()) <= 1e-5


@pytest.mark.parametrize("backend", backends("lncc"))
def test_flat_windows_score_one(backend):
    for level in (0.0, 0.7, 300.1) if backend != "reference" else (0.0, 0.5):
        i, j, upstream = torch.full((1, 1, 6, 7), level), torch.full((1, 1, 6, 7), 0.5 - level), torch.zeros(1, 1, 6, 7)
        upstream[..., 1:-1, 1:-1] = torch.randn(4, 5)
        cc, di, dj = both(ours(backend), i, j, upstream, window=3)
        assert torch.all(cc[..., 1:-1, 1:-1] == 1)
        assert di.count_nonzero() == dj.count_nonzero() == 0


@pytest.mark.parametrize("backend", HERE)
def test_a_shift_commutes(backend):
    i, j, _ = problem((1, 1, 12, 13, 14), torch.float64)
    cc = ours(backend)(i, j, window=3)
    for axis in (2, 3, 4):
        shifted = ours(backend)(i.roll(1, axis), j.roll(1, axis), window=3)
        inner = (slice(None),) * 2 + (slice(2, -2),) * 3
        assert error([shifted[inner]], [cc.roll(1, axis)[inner]]) <= 1e-13


@pytest.mark.parametrize("backend", FAST)
def test_a_batch_is_its_images(backend):
    i, j, upstream = problem((3, 2, 10, 12))
    whole = both(ours(backend), i, j, upstream)
    for b, c in itertools.product(range(3), range(2)):
        part = [x[b, c][None, None] for x in (i, j, upstream)]
        for w, p in zip(whole, both(ours(backend), *part), strict=True):
            assert torch.equal(w[b, c], p[0, 0]) if backend != "reference" else error([w[b, c]], [p[0, 0]]) < 1e-5


@pytest.mark.parametrize("backend", FAST)
def test_window_one_and_windows_larger_than_the_image(backend):
    i, j, upstream = problem((2, 1, 5, 6))
    cc, di, dj = both(ours(backend), i, j, upstream, window=1)
    assert torch.all(cc == 1) and di.count_nonzero() == dj.count_nonzero() == 0
    # There all windows of an image are one and share its roundings: many images, so that the comparison is no lottery.
    for shape, window in (((100, 1, 3, 4), 7), ((100, 1, 6, 2), 31), ((100, 1, 2, 3, 4), 7)):
        compare(backend, *problem(shape), window=window)


# Edges


@pytest.mark.parametrize("backend", FAST)
def test_one_pixel(backend):
    """cc is 1 and the two parts of the gradient, 2 g / I each, cancel."""
    i, j, upstream = problem((2, 1, 1, 1))
    cc, di, dj = both(ours(backend), i, j, upstream, window=3)
    assert torch.allclose(cc, torch.ones(()), atol=16 * EPS, rtol=0)
    for grad, x in ((di, i), (dj, j)):
        assert torch.all(grad.abs() <= 32 * EPS * (upstream / x).abs())


@pytest.mark.parametrize("backend", backends("lncc"))
def test_nothing(backend):
    for shape in ((0, 1, 4, 5), (2, 0, 4, 5), (2, 1, 0, 5), (1, 1, 3, 4, 0)):
        cc, di, dj = both(ours(backend), *problem(shape))
        assert cc.shape == di.shape == dj.shape == shape


@pytest.mark.parametrize("backend", FAST)
def test_strides(backend):
    """Slices, flips of axes, expanded maps, an offset that no vector is aligned to, channels-last, strided and expanded gradients."""
    wide, other, _ = problem((4, 6, 12, 14))
    last = wide.contiguous(memory_format=torch.channels_last)
    views = [
        wide[:, 1:4], wide[:, :, 1:-1], wide[:, :, :, 1:-2], wide[..., ::2], wide.transpose(2, 3), wide[:1].expand(4, -1, -1, -1),
        wide[:, :1].expand(-1, 3, -1, -1), torch.rand(wide.numel() + 1)[1:].view_as(wide), last, last[:, 2:5],
        wide[:, :, 0:1, :].expand(-1, -1, 5, -1), wide.view(4, 2, 3, 12, 14).transpose(2, 4),
    ]  # fmt: skip
    for i in views:
        j = (0.5 * i + 0.5 * torch.rand(i.shape)).transpose(-1, -2).contiguous().transpose(-1, -2)
        compare(backend, i, j, torch.randn(i.shape).transpose(-1, -2).contiguous().transpose(-1, -2), window=3)
    compare(backend, wide, other, torch.tensor(1.0).expand_as(wide), window=3)


@pytest.mark.parametrize("backend", [b for b in backends("lncc") if b != "reference"])
def test_special_values(backend):
    """NaN and inf make NaN of every window that holds them and of the gradients there, and touch nothing else: as in the reference."""
    shape = (1, 1, 5, 12) if backend == "triton" else (1, 1, 12, 40)
    for value, needs in itertools.product((math.nan, math.inf, -math.inf), NEEDS if backend != "triton" else NEEDS[:1]):
        for y, x in ((0, 0), (2, 5), (shape[2] - 1, shape[3] - 1)):
            i, j, upstream = problem(shape)
            (i if value != -math.inf else j)[0, 0, y, x] = value
            got, expected = (both(ours(b), i, j, upstream, window=3, needs=needs) for b in (backend, "reference"))
            for g, e in zip(got, expected, strict=True):
                assert torch.equal(g.isnan(), e.isnan()) and e.isnan().any() and not e.isnan().all()
                torch.testing.assert_close(g, e, rtol=1e-4, atol=1e-4, equal_nan=True)
            if backend == "triton":
                break


@pytest.mark.parametrize("backend", [b for b in FAST if b != "reference"])
def test_lost_squares_are_nan(backend):
    i, j, upstream = problem((1, 1, 9, 30))
    i[0, 0, 4, 20] = 1e25
    cc, di, dj = both(ours(backend), i, j, upstream, window=3)
    assert cc[0, 0, 3:6, 19:22].isnan().all() and cc.isnan().sum() == 9
    assert di.isnan().sum() == dj.isnan().sum() == 25


@pytest.mark.parametrize("backend", FAST)
def test_a_nan_upstream_reaches_its_window(backend):
    i, _, upstream = problem((1, 1, 9, 30))
    upstream[0, 0, 4, 20] = math.nan
    _, di, _ = both(ours(backend), i, 0.5 * i + 0.1, upstream, window=3)
    assert di[0, 0, 3:6, 19:22].isnan().all() and di.isnan().sum() == 9


@pytest.mark.parametrize("backend", backends("lncc"))
def test_the_least_eps(backend):
    """e^2 is 0 in float32; the ratio does not show it."""
    flat = torch.zeros(1, 1, 3, 4, device=DEVICE[backend])
    assert torch.all(lncc(flat, flat, window=3, eps=1e-30, backend=backend) == 1)
