"""entropy: values, gradients, properties, edges; every backend that runs here, against PyTorch in float64."""

import itertools
import math

import pytest
import torch

from entropy_helpers import FAST, both, compare, entropy, official, problem
from joint_helpers import LAYOUTS, lay
from pix2rep_kernels.testing import backends, error
from sweep import FULL

pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")  # numpy's, of NaN and inf in the interpreter
EXACT = [b for b in FAST if b != "triton"]  # those that take float64
EPS = torch.finfo(torch.float32).eps
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


# Values and gradients


@pytest.mark.parametrize("backend", FAST)
def test_values_and_gradients(backend):
    for dtype, layout, masked in itertools.product(DTYPES if backend in EXACT else DTYPES[:3], LAYOUTS, (False, True)):
        for space in ((7, 9), (3, 4, 5)):
            logits, upstream, mask = problem(17, 2, space, layout, dtype, masked)
            _, gradient = compare(backend, logits, upstream, mask)
            assert gradient.stride() == torch.empty_like(logits).stride() or layout == "strided"


@pytest.mark.parametrize("backend", EXACT)
def test_gradcheck(backend):
    for space, layout in (((3, 4), "last"), ((2, 3, 2), "first")):
        logits, _, mask = problem(3, 1, space, layout, torch.float64, True)
        assert torch.autograd.gradcheck(lambda x, m=mask: entropy(x, mask=m, backend=backend), logits.requires_grad_())


@pytest.mark.skipif("triton" not in backends("entropy"), reason="triton does not run here")
@pytest.mark.parametrize(
    "case",
    [
        {"clusters": 40, "space": (5, 7)}, {"clusters": 40, "layout": "last", "masked": True}, {"clusters": 3, "layout": "strided", "masked": True},
        {"clusters": 70, "batch": 1, "space": (3, 5), "layout": "last"}, {"clusters": 8, "space": (2, 3, 5), "layout": "last", "dtype": torch.bfloat16},
        {"clusters": 12, "space": (2, 3, 5), "dtype": torch.float16, "masked": True}, {"clusters": 2, "batch": 3, "space": (33, 35)},
        {"clusters": 1, "batch": 1, "space": (1, 1)}, {"clusters": 5000, "batch": 1, "space": (1, 3), "layout": "last"},
    ],
    ids=lambda case: "-".join(str(v) for v in case.values()).replace("torch.", ""),
)  # fmt: skip
def test_triton(case):
    compare("triton", *problem(**case))


# Properties


@pytest.mark.parametrize("backend", backends("entropy"))
def test_range_shift_and_order(backend):
    """0 to log K, at its ends; the same for logits plus a constant of each pixel, and for clusters in any order. The gradient sums to 0."""
    logits, upstream, _ = problem(6, 1, (4, 5))
    h, gradient = both(entropy, logits, upstream, backend=backend)
    assert h.min() > 0 and h.max() < math.log(6)
    moved = both(entropy, logits + torch.randn(1, 1, 4, 5).mul(8).round(), upstream, backend=backend)
    assert error(moved, (h, gradient)) < 64 * EPS  # l + 8 is rounded
    order = torch.randperm(6)
    assert error(both(entropy, logits[:, order], upstream, backend=backend), (h, gradient[:, order])) < 8 * EPS
    assert gradient.sum(1).abs().max() <= 8 * EPS * gradient.abs().max() * 6
    for value in (0.0, -1e4, 3e38):
        h, gradient = both(entropy, torch.full((1, 6, 2, 3), value), torch.randn(1, 1, 2, 3), backend=backend)
        assert torch.allclose(h, torch.tensor(math.log(6)), rtol=2 * EPS, atol=0) and gradient.count_nonzero() == 0


@pytest.mark.parametrize("backend", backends("entropy"))
def test_sure_pixels(backend):
    """exp(-d) (d + 1) to first order: no digit is lost but those of log Z near 1, as in PyTorch; then 0, and no NaN."""
    logits = torch.zeros(1, 2, 1, 4)
    logits[0, 1, 0] = -torch.tensor([5.0, 20.0, 200.0, math.inf])
    h, gradient = both(entropy, logits, torch.ones(1, 1, 1, 4), backend=backend)
    truth = both(entropy, logits.double(), torch.ones(1, 1, 1, 4), backend="reference")
    assert (h - truth[0]).abs().max() <= EPS
    torch.testing.assert_close(gradient, truth[1].float(), rtol=8 * EPS, atol=1e-30)
    assert h[..., 2:].count_nonzero() == 0 and truth[0][0, 0, 0, 1] > 0


@pytest.mark.parametrize("backend", EXACT)
def test_the_official_constant_is_below_rounding(backend):
    """K 1e-16 at most in float64, which PyTorch's own K roundings of terms up to 1/e, of logarithms and of their sum exceed."""
    for clusters, scale in ((40, 1.0), (40, 12.0), (200, 3.0)):
        logits, _, _ = problem(clusters, dtype=torch.float64, scale=scale)
        difference = entropy(logits, backend=backend) - official(logits)
        assert difference.abs().max() <= clusters * (1e-16 + torch.finfo(torch.float64).eps)


@pytest.mark.parametrize("backend", backends("entropy"))
def test_nothing_leaks_from_masked_pixels(backend):
    logits, upstream, mask = problem(4, 1, (3, 5), masked=True)
    clean = both(entropy, logits, upstream, mask=mask, backend=backend)
    hidden = ~mask.unsqueeze(1)
    for value, layout in itertools.product((math.nan, math.inf, -math.inf), ("first", "last")):
        dirty = lay(torch.where(hidden, value, logits), layout)
        got = both(entropy, dirty, torch.where(hidden, math.nan, upstream), mask=mask.unsqueeze(1), backend=backend)
        assert all(torch.equal(x, y) for x, y in zip(clean, got, strict=True)), (value, layout)
    assert (clean[0][hidden] == 0).all() and (clean[1][hidden.expand_as(logits)] == 0).all()


@pytest.mark.parametrize("backend", backends("entropy"))
def test_special_values(backend):
    """NaN and +inf in a pixel that counts make NaN of it and of nothing else; a cluster at -inf takes no part; -inf alone is NaN."""
    for value in (math.nan, math.inf):
        logits, upstream, _ = problem(3, 1, (2, 4))
        logits[0, 1, 0, 2] = value
        h, gradient = both(entropy, logits, upstream, backend=backend)
        assert h[0, 0, 0, 2].isnan() and h.isnan().sum() == 1 and gradient[0, :, 0, 2].isnan().all() and gradient.isnan().sum() == 3
    logits, upstream, _ = problem(3, 1, (2, 4))
    logits[:, 1] = -math.inf
    h, gradient = both(entropy, logits, upstream, backend=backend)
    without = both(entropy, logits[:, ::2], upstream, backend=backend)
    assert error((h, gradient[:, ::2]), without) <= 4 * EPS and gradient[:, 1].count_nonzero() == 0
    logits[:] = -math.inf
    assert entropy(logits, backend=backend).isnan().all()


# Edges


@pytest.mark.parametrize("backend", FAST)
def test_sizes(backend):
    for clusters in (1, 2, 3, 15, 16, 17, 33, 64, 65, 100, *((127, 128, 300, 2000) if FULL else ())):
        for layout in ("first", "last"):
            compare(backend, *problem(clusters, 2, (5, 13), layout, masked=clusters % 2 == 1))
    for space in ((1, 1), (1, 64), (8, 8), (5, 13), (33, 31), (64, 65), (2, 1, 33)):
        for layout in LAYOUTS:
            compare(backend, *problem(7, 3, space, layout))


@pytest.mark.parametrize("backend", FAST)
def test_strides(backend):
    """Slices, expanded maps, an offset that no vector is aligned to; strided and expanded upstream gradients."""
    wide, upstream, mask = problem(12, 4, (12, 14), masked=True)
    last = lay(wide, "last")
    views = [
        wide[:, ::2], wide[:, :, 1:-1], wide[..., 1:-2], wide[..., ::2], wide[::2], wide[:1].expand(4, -1, -1, -1), wide[:, :, :1].expand(-1, -1, 5, -1),
        torch.randn(wide.numel() + 1)[1:].view_as(wide), last[:, 2:7], last[:, :, :, 1:], last.transpose(0, 2), wide.transpose(1, 3),
    ]  # fmt: skip
    for logits in views:
        batch, _, *space = logits.shape
        compare(backend, logits, torch.randn(batch, 1, *space[::-1]).transpose(2, 3))
    compare(backend, wide, torch.tensor(0.7).expand_as(upstream), mask.transpose(1, 2).contiguous().transpose(1, 2))


@pytest.mark.parametrize("backend", backends("entropy"))
def test_nothing(backend):
    for shape in ((0, 3, 4, 4), (2, 3, 0, 4), (2, 3, 2, 0, 4)):
        h, gradient = both(entropy, torch.randn(shape), torch.randn(shape[0], 1, *shape[2:]), backend=backend)
        assert h.shape == (shape[0], 1, *shape[2:]) and gradient.shape == shape
