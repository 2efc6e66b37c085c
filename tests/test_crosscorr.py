"""crosscorr: values, gradients, edges; every backend that runs here, against two passes of PyTorch in float64."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from crosscorr_helpers import CPU, DEVICE, EVERY, FAST, NORMALIZATIONS, SMALL, both, compare, laid_out, ours, pytorch, views, weights
from pix2rep_kernels import crosscorr
from pix2rep_kernels.ops.crosscorr import moments
from pix2rep_kernels.testing import error
from sweep import FULL

pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy's, of NaN and inf in the interpreter
SIZES = (2, 15, 16, 17, 31, 32, 33, 127, 128, 129, 521, 1031) if FULL else (2, 15, 17, 33, 127, 128, 129, 1031)
WIDTHS = (1, 3, 8, 15, 16, 17, 31, 33, 48, 64, 65, 100, 128, 200, 256, 257, 384, 512)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("backend", FAST)
def test_values_and_gradients(backend, normalization):
    for weight, layout, needs in itertools.product(("none", "mask", "numbers"), ("rows", "wide"), ((True, True), (True, False), (False, True))):
        compare(backend, *views(300, 20, 37, layout=layout), weights(weight, 300), normalization, needs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("backend", FAST)
def test_precisions(backend, dtype):
    if dtype == torch.float64 and backend in ("triton", "cuda"):
        pytest.skip("float64 runs on the backends reference and cpu only")
    for layout, weight, d1, other in itertools.product(("rows", "planes"), ("none", "numbers"), (9, 32), (dtype, torch.float32)):
        compare(backend, *views(200, d1, 64, dtype, other, layout), weights(weight, 200))
        compare(backend, *views(200, d1, 64, other, dtype, layout), weights(weight, 200))


@pytest.mark.parametrize("backend", CPU)
def test_gradcheck(backend):
    for normalization, weight in itertools.product(NORMALIZATIONS, ("none", "mask", "numbers")):
        x, y = (t.requires_grad_() for t in views(7, 3, 4, torch.float64))
        w = weights(weight, 7)
        assert torch.autograd.gradcheck(lambda x, y, w=w, n=normalization: crosscorr(x, y, weight=w, normalization=n, backend=backend), (x, y))


@pytest.mark.parametrize("backend", FAST)
def test_sizes(backend):
    for n, (d1, d2) in itertools.product(SIZES, ((1, 1), (5, 17), (33, 16))):
        compare(backend, *views(n, d1, d2))
        compare(backend, *views(n, d1, d2), weights("numbers", n) + 0.1)
    for d in WIDTHS if FULL else WIDTHS[:12]:
        compare(backend, *views(150, d, 40))
        compare(backend, *views(150, 40, d), weights("mask", 150))
    for d in (256, 512):
        compare(backend, *views(140, d, d - 1))


@pytest.mark.parametrize("backend", FAST)
def test_strides(backend):
    for layout in ("planes", "wide", "offset", "backwards"):
        for d in (16, 19):
            compare(backend, *views(140, d, 32, layout=layout), weights("mask", 140))
    x, y = views(140, 16, 32)
    pixels = views(2 * 7 * 10, 16, 1)[0].view(2, 7, 10, 16).movedim(-1, 1).contiguous()  # a map in planes: rows of no single stride
    compare(backend, pixels.movedim(1, -1).flatten(0, -2), y)
    compare(backend, x, y, torch.rand(280)[::2])
    row, column = x[:1].expand(140, -1), x[:, :1].expand(-1, 12)
    for expanded in (row, column):
        compare(backend, y, expanded.requires_grad_(False) + torch.randn(140, 1) * 0)
        got, truth = (ours(b)(y, expanded) for b in (backend, "reference"))
        assert error([got], [truth]) <= 1e-5 if truth.norm() > 1e-3 else got.abs().max() < 1e-5
    # An expanded upstream gradient.
    got, truth = (both(ours(b), x, y, torch.ones(1, 1).expand(16, 32)) for b in (backend, "reference"))
    assert error(got, truth) < 1e-5


SMALL_CASES = [
    *({"shape": (40, 5, 33), "weight": w, "normalization": n} for w in ("none", "mask", "numbers") for n in NORMALIZATIONS),
    *({"shape": (70, 17, 40), "dtype": t, "weight": w} for t in (torch.float16, torch.bfloat16) for w in ("none", "numbers")),
    *({"shape": (70, 17, 20), "layout": layout, "weight": "mask"} for layout in ("planes", "wide", "offset")),
    *({"shape": (70, 33, 20), "needs": needs} for needs in ((True, False), (False, True))),
    {"shape": (33, 20, 9), "dtype": torch.float16, "dtype_y": torch.float32, "weight": "mask"},
    {"shape": (33, 20, 9), "dtype": torch.float16, "dtype_y": torch.bfloat16},
    {"shape": (40, 257, 5)},
    {"shape": (40, 5, 300), "dtype": torch.bfloat16, "weight": "mask"},  # features of the other view in several blocks
    {"shape": (20, 130, 260), "dtype": torch.float16},
    {"shape": (700, 3, 2), "weight": "mask"},  # several ranges of rows
    {"shape": (515, 17, 4), "dtype": torch.bfloat16},
    *({"shape": shape} for shape in ((2, 1, 1), (15, 16, 16), (32, 16, 32), (129, 2, 3))),
]  # fmt: skip


@pytest.mark.parametrize("backend", SMALL)
@pytest.mark.parametrize("case", SMALL_CASES, ids=lambda case: "-".join(str(v) for v in case.values()).replace("torch.", ""))
def test_small(backend, case):
    n, d1, d2 = case["shape"]
    x, y = views(n, d1, d2, case.get("dtype", torch.float32), case.get("dtype_y"), case.get("layout", "rows"))
    compare(backend, x, y, weights(case.get("weight", "none"), n), case.get("normalization", "batchnorm"), case.get("needs", (True, True)))


# Edges


@pytest.mark.parametrize("backend", EVERY)
def test_nothing_counts(backend):
    """No rows, no features, or every row of weight 0, whatever it holds: zeros, and gradients of zeros."""
    for n, d1, d2 in ((0, 3, 4), (5, 0, 4), (5, 3, 0), (0, 0, 0), (5, 3, 4)):
        x, y = views(n, d1, d2)
        weight = None if min(n, d1, d2) == 0 else torch.zeros(n, dtype=torch.bool)
        if weight is not None:
            x[1], y[2] = math.nan, math.inf
        c, *grads = both(ours(backend), x, y, torch.randn(d1, d2), weight=weight)
        assert c.shape == (d1, d2) and c.count_nonzero() == 0
        for g, t in zip(grads, (x, y), strict=True):
            assert g.shape == t.shape and (n > 0 and weight is None or g.count_nonzero() == 0) and g.isfinite().all()


@pytest.mark.parametrize("backend", EVERY)
def test_one_row(backend):
    c, *grads = both(ours(backend), *views(1, 3, 4), torch.randn(3, 4))
    assert c.abs().max() == 0 and all(g.abs().max() == 0 for g in grads)


@pytest.mark.parametrize("backend", EVERY)
def test_special_values(backend):
    """NaN and inf of a row that counts reach its row and column of C and every gradient that depends on it; those of a row left out reach nothing."""
    for bad, weight in itertools.product((math.nan, math.inf, -math.inf), ("none", "mask")):
        x, y = views(40, 5, 6)
        w = weights(weight, 40)
        rows = range(40) if w is None else w.nonzero().flatten().tolist()
        clean = both(ours(backend), x, y, torch.ones(5, 6), weight=w)
        spoilt = x.clone()
        spoilt[rows[7], 3] = bad
        c, grad_x, grad_y = both(ours(backend), spoilt, y, torch.ones(5, 6), weight=w)
        assert c[3].isnan().all() and torch.equal(c[[0, 1, 2, 4]], clean[0][[0, 1, 2, 4]])
        assert grad_x[rows, 3].isnan().all() and grad_y[rows].isnan().all()
        kept = [0, 1, 2, 4]
        assert error([grad_x[:, kept]], [clean[1][:, kept]]) < 1e-5
        if w is not None:
            left_out = (~w).nonzero().flatten()
            spoilt = x.clone()
            spoilt[left_out[0]], spoilt[left_out[1], 2] = bad, -bad
            got = both(ours(backend), spoilt, y, torch.ones(5, 6), weight=w)
            assert all(torch.equal(g, t) for g, t in zip(got, clean, strict=True))
            assert all(g[~w].count_nonzero() == 0 and g.isfinite().all() for g in got[1:])


@pytest.mark.parametrize("backend", EVERY)
def test_dead_columns(backend):
    """Variance 0: the row of C is 0 within eps, the gradient finite, as in PyTorch."""
    x, y = views(33, 4, 5)
    x[:, 2] = 7.25
    upstream = torch.randn(4, 5)
    for normalization in NORMALIZATIONS:
        c, grad_x, grad_y = both(ours(backend), x, y, upstream, normalization=normalization)
        assert c[2].abs().max() <= 1e-5 and grad_x.isfinite().all() and grad_y.isfinite().all()
        if normalization == "batchnorm":
            truth = both(pytorch, x.double(), y.double(), upstream.double())
            assert error([c, grad_x, grad_y], truth) < 1e-5


@pytest.mark.parametrize("backend", FAST)
def test_equals_batch_norm(backend):
    """F.batch_norm of both views and a product; and the standard deviation plus 1e-6 that MONAI divides by."""
    x, y = views(513, 20, 33, torch.float64)
    x, y, device = x.float(), y.float(), DEVICE[backend]
    standard = [F.batch_norm(t.double(), None, None, training=True, eps=1e-5) for t in (x, y)]
    deviated = [(t.double() - t.double().mean(0)) / (t.double().std(0) + 1e-6) for t in (x, y)]
    for normalization, (u, v) in (("batchnorm", standard), ("std", deviated)):
        got = crosscorr(x.to(device), y.to(device), normalization=normalization, backend=backend)
        assert error([got], [u.T @ v / 513]) < 8 * torch.finfo(torch.float32).eps
    assert error([pytorch(x.double(), y.double())], [standard[0].T @ standard[1] / 513]) < 1e-14


@pytest.mark.parametrize("backend", EVERY)
def test_one_view_twice(backend):
    """C_ii = var_i / (var_i + eps)."""
    x, _ = views(100, 6, 1)
    x[:, 1] *= 1e-3
    variance = x.double().var(0, correction=0)
    c = ours(backend)(laid_out(x, "planes"), x)
    assert error([c.diagonal()], [variance / (variance + 1e-5)]) < 8 * torch.finfo(torch.float32).eps
    m = moments(x.to(DEVICE[backend]), x.to(DEVICE[backend]), backend=backend)
    assert error([m.product.diagonal()], [m.square_x]) < 1e-6
