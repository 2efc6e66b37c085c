"""crosscorr: what must hold of any cross-correlation and of its moments, on every backend that runs here."""

import pytest
import torch
import torch.nn.functional as F

from crosscorr_helpers import DEVICE, EVERY, NORMALIZATIONS, SMALL, both, ours, pytorch, views, weights
from pix2rep_kernels.ops.crosscorr import Moments, correlation, moments
from pix2rep_kernels.testing import error, tolerance

EPS = torch.finfo(torch.float32).eps


def size(backend):
    return (70, 5, 9) if backend in SMALL else (700, 20, 33)


@pytest.mark.parametrize("backend", EVERY)
def test_a_constant_changes_nothing(backend):
    """mean / std = 1e3 in float32: no further from float64 than twice a two-pass BatchNorm of the same numbers."""
    n, d1, d2 = size(backend)
    x, y = (torch.randn(n, d) + 1e3 for d in (d1, d2))
    upstream = torch.randn(d1, d2)

    def eager(x, y, **_):
        u, v = (F.batch_norm(t, None, None, training=True, eps=1e-5) for t in (x, y))
        return u.T @ v / len(x)

    truth = both(eager, x.double(), y.double(), upstream)
    for got, own, true in zip(both(ours(backend), x, y, upstream), both(eager, x, y, upstream), truth, strict=True):
        assert error([got], [true]) <= tolerance(error([own], [true]), torch.float32)
    near = both(ours(backend), x - 1e3, y - 1e3, upstream)  # exact differences
    assert error(both(ours(backend), x, y, upstream), near) < 1e-3


@pytest.mark.parametrize("backend", EVERY)
def test_a_masked_border_does_not_spoil_the_pivot(backend):
    """Rows of pixels whose first columns are left out: pilot rows at even distances would all lie there."""
    height, width = (16, 32) if backend in SMALL else (64, 64)
    x, y = (torch.randn(height * width, d) + 1e3 for d in (3, 4))
    inside = (torch.arange(height * width) % width) >= 3
    got = ours(backend)(x, y, weight=inside)
    truth, own = pytorch(x.double(), y.double(), inside), pytorch(x, y, inside)
    assert error([got], [truth]) <= tolerance(error([own], [truth]), torch.float32)


@pytest.mark.parametrize("backend", EVERY)
def test_a_scale_changes_nothing(backend):
    """As eps vanishes against the variance; powers of two change no rounding but that of eps."""
    x, y = views(*size(backend))
    scales = torch.ones(x.shape[1]).mul_(2.0).pow(torch.randint(12, 20, (x.shape[1],)))
    for normalization in ("batchnorm", "std"):
        plain, scaled = (ours(backend)(t, y * 2**14, normalization=normalization) for t in (x * 2**14, x * scales))
        assert error([scaled], [plain]) < 1e-6


@pytest.mark.parametrize("backend", EVERY)
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_views_swapped(backend, normalization):
    n, d1, d2 = size(backend)
    x, y = views(n, d1, d2)
    upstream, w = torch.randn(d1, d2), weights("numbers", n)
    c, grad_x, grad_y = both(ours(backend), x, y, upstream, weight=w, normalization=normalization)
    swapped = both(ours(backend), y, x, upstream.T, weight=w, normalization=normalization)
    assert error([swapped[0].T, swapped[2], swapped[1]], [c, grad_x, grad_y]) < 8e-6


@pytest.mark.parametrize("backend", EVERY)
def test_rows_permuted(backend):
    n, d1, d2 = size(backend)
    x, y = views(n, d1, d2)
    upstream, order = torch.randn(d1, d2), torch.randperm(n)
    c, grad_x, grad_y = both(ours(backend), x, y, upstream)
    permuted = both(ours(backend), x[order], y[order], upstream)
    assert error(permuted, [c, grad_x[order], grad_y[order]]) < 8e-6


@pytest.mark.parametrize("backend", EVERY)
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_weights_are_numbers_of_rows(backend, normalization):
    """A mask selects, whole numbers repeat."""
    n, d1, d2 = size(backend)
    x, y = views(n, d1, d2)
    upstream, kept, times = torch.randn(d1, d2), torch.rand(n) > 0.4, torch.randint(4, (n,))
    c, grad_x, grad_y = both(ours(backend), x, y, upstream, weight=kept, normalization=normalization)
    selected = both(ours(backend), x[kept], y[kept], upstream, normalization=normalization)
    assert error([c, grad_x[kept], grad_y[kept]], selected) < 8e-6
    assert grad_x[~kept].count_nonzero() == grad_y[~kept].count_nonzero() == 0
    c, grad_x, grad_y = both(ours(backend), x, y, upstream, weight=times.float(), normalization=normalization)
    rows = torch.arange(n).repeat_interleave(times)
    repeated = both(ours(backend), x[rows], y[rows], upstream, normalization=normalization)
    summed = [torch.zeros(n, d).index_add_(0, rows, g) for d, g in zip((d1, d2), repeated[1:], strict=True)]
    assert error([c, grad_x, grad_y], [repeated[0], *summed]) < 8e-6


@pytest.mark.parametrize("backend", EVERY)
def test_weights_of_any_size(backend):
    """C does not depend on the weights' scale, nor does a 16-bit product overflow by them."""
    n, d1, d2 = size(backend)
    for dtype in (torch.float32, torch.float16):
        x, y = views(n, d1, d2, dtype)
        w = weights("numbers", n)
        plain = ours(backend)(x, y, weight=w)
        for scale in (2.0**-40, 2.0**40):
            assert error([ours(backend)(x, y, weight=w * scale)], [plain]) < 1e-6


@pytest.mark.parametrize("backend", EVERY)
def test_gradients_of_any_size(backend):
    """16-bit operands neither overflow nor vanish, whatever the size of the loss; the gradients themselves are float16, and so may."""
    n, d1, d2 = size(backend)
    x, y = views(n, d1, d2, torch.bfloat16)
    upstream = torch.randn(d1, d2)
    for dtype in (torch.bfloat16, torch.float16):
        u, v = x.to(dtype), y.to(dtype)
        plain = both(ours(backend), u, v, upstream * 16)
        for scale in (2.0**-60, 2.0**60) if dtype == torch.bfloat16 else (2.0**-2, 2.0**12):
            scaled = both(ours(backend), u, v, upstream * 16 * scale)
            assert error([g.double() / scale for g in scaled[1:]], plain[1:]) < (1e-6 if dtype == torch.bfloat16 else 2e-2)


@pytest.mark.parametrize("backend", EVERY)
def test_moments_about_another_pivot(backend):
    n, d1, d2 = size(backend)
    x, y = (t.to(DEVICE[backend]) for t in views(n, d1, d2))
    w = weights("numbers", n).to(DEVICE[backend])
    m = moments(x, y, weight=w, backend=backend)
    pivots = m.pivot_x + torch.randn_like(m.pivot_x), m.pivot_y - torch.randn_like(m.pivot_y)
    moved = m.about(*pivots)
    u, v, column = x.double() - pivots[0], y.double() - pivots[1], w.double()[:, None]
    truth = (column.sum(), *pivots, (column * u).sum(0), (column * v).sum(0), (column * u * u).sum(0), (column * v * v).sum(0), (column * u).T @ v)
    assert error(moved, truth) < 1e-5
    for normalization in NORMALIZATIONS:
        assert error([correlation(moved, normalization)], [correlation(m, normalization)]) < 2e-5


@pytest.mark.parametrize("backend", EVERY)
def test_moments_of_halves_add(backend):
    n, d1, d2 = size(backend)
    x, y = (t.to(DEVICE[backend]).requires_grad_() for t in views(n, d1, d2))
    whole = moments(x, y, backend=backend)
    parts = [moments(x[rows], y[rows], backend=backend).about(*whole[1:3]) for rows in (slice(0, n // 3), slice(n // 3, n))]
    added = Moments(parts[0].count + parts[1].count, *whole[1:3], *(a + b for a, b in zip(parts[0][3:], parts[1][3:], strict=True)))
    scale = whole.count.sqrt()
    for a, b, norm in zip(added[3:5], whole[3:5], (whole.square_x, whole.square_y), strict=True):
        assert ((a - b).abs() <= 64 * EPS * scale * norm.sqrt()).all()
    assert error(added[5:], whole[5:]) < 1e-5
    upstream = torch.randn(d1, d2, device=x.device)
    c = [correlation(m) for m in (added, whole)]
    grads = [torch.autograd.grad(each, (x, y), upstream) for each in c]
    assert error([c[0], *grads[0]], [c[1], *grads[1]]) < 2e-5
