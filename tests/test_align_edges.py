"""align: sizes, strides, special values; every backend that runs here."""

import itertools
import math

import pytest
import torch

from align_helpers import DEVICE, FAST, both, compare, feature_map, grid_of, ours, problem
from benchmarks.harness import peak_mib
from pix2rep_kernels import align
from pix2rep_kernels.testing import backends, error
from sweep import FULL, some

pytestmark = [
    pytest.mark.filterwarnings("ignore:Since version 1.3.0, affine_grid:UserWarning"),
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),  # numpy's, of NaN and inf in the interpreter
]


@pytest.mark.parametrize("backend", FAST)
def test_channels(backend):
    every = (1, 2, 7, 8, 15, 16, 17, 31, 33, 64, 67, 128, 150, 512)
    for channels, layouts in some(backend, itertools.product(every, (("last", "last"), ("first", "last"), ("first", "first"))), 4):
        tensors, keywords = problem(channels=channels, layouts=layouts, size=(3, 5))
        compare(backend, tensors, **keywords)


@pytest.mark.parametrize("backend", FAST)
def test_sizes(backend):
    """Axes of 1, primes, sizes about a chunk of 64 points, maps much larger than the common frame and much smaller."""
    sizes = [
        ((1, 1), (1, 1), (1, 1)), ((1, 9), (7, 1), (4, 1)), ((64, 3), (3, 5), (3, 64)), ((16, 16), (5, 5), (40, 3)), ((40, 37), (50, 41), (3, 5)),
        ((2, 3), (40, 41), (2, 2)), ((5, 5), (5, 5), (7, 9)), ((5, 5), (5, 5), (8, 8)), ((5, 5), (5, 5), (5, 13)), ((11, 13), (5, 5), (127, 1)),
        ((1, 1, 1), (1, 2, 1), (1, 1, 2)), ((3, 1, 5), (1, 4, 1), (2, 1, 3)), ((9, 17, 16), (2, 3, 2), (2, 2, 2)), ((2, 3, 2), (2, 3, 2), (4, 5, 7)),
    ]  # fmt: skip
    cases = itertools.product(sizes, (("last", "last"), ("first", "first"), ("last", "first")), (3, 24))
    for (s1, s2, size), layouts, channels in some(backend, cases):
        for batch in (1, 3) if FULL else (2,):
            tensors, keywords = problem(len(size), channels, batch, layouts=layouts, spaces=(s1, s2), size=size)
            compare(backend, tensors, **keywords)


@pytest.mark.parametrize("backend", FAST)
def test_strides(backend):
    """Slices, flips, expanded and overlapping maps, offsets that no vector is aligned to, strided grids and gradients."""
    wide = feature_map(4, 40, (12, 14), "first")
    views = {
        "channels": wide[:, 3:30:2], "rows": wide[:, :, 1:-1], "columns": wide[:, :, :, 1:-2], "images": wide[::2].repeat(2, 1, 1, 1),
        "transposed": wide.transpose(2, 3), "one channel": wide[:, :1].expand(-1, 20, -1, -1), "one pixel": wide[:, :, :1, :1].expand(-1, -1, 5, 6),
        "one image": wide[:1].expand(4, -1, -1, -1), "offset": torch.randn(wide.numel() + 1)[1:].view_as(wide),
        "channels of last": wide.contiguous(memory_format=torch.channels_last)[:, 5:25],
    }  # fmt: skip
    size = (6, 5)
    dense = torch.rand(4, 2, 6, 5).mul(2).sub(1).permute(0, 2, 3, 1)
    turned = grid_of(1, size).transpose(1, 2).contiguous().transpose(1, 2).expand(4, -1, -1)
    for features in views.values():
        other = feature_map(4, features.shape[1], (7, 6))
        compare(backend, (features, other, turned, dense), size=size)
        compare(backend, (other, features, dense, turned), size=size)
    maps = [wide.detach().requires_grad_(), feature_map(4, 40, (7, 6)).requires_grad_()]
    grads = {}
    for name in (backend, "reference"):  # an expanded gradient
        sums = align(*(t.to(DEVICE[name]) for t in (*maps, turned, dense)), size=size, backend=name)[:3]
        grads[name] = torch.autograd.grad(sum(s.sum() for s in sums), maps)
    assert error(grads[backend], grads["reference"]) < 1e-6


@pytest.mark.parametrize("backend", backends("align"))
def test_nothing_to_do(backend):
    """No points, no images, no channels: results of that shape, gradients of 0."""
    f, grid = feature_map(2, 9, (5, 7)), grid_of(2, (3, 4))
    none, thin = f[:0], f[:, :0]
    cases = [
        (f, f, grid, grid, (0, 4)),
        (f, f, grid, torch.zeros(2, 3, 0, 2), (3, 0)),
        (none, none, grid[:0], grid[:0], (3, 4)),
        (thin, thin, grid, grid, (3, 4)),
    ]
    for f1, f2, grid1, grid2, size in cases:
        for deterministic in (False, True):
            torch.use_deterministic_algorithms(deterministic)
            try:
                maps = [t.detach().requires_grad_() for t in (f1, f2)]
                *sums, valid = align(*(t.to(DEVICE[backend]) for t in (*maps, grid1, grid2)), size=size, backend=backend)
                sum(s.sum() for s in sums).backward()
            finally:
                torch.use_deterministic_algorithms(False)
            assert valid.shape == (len(f1), *size) and all(s.shape == valid.shape and s.count_nonzero() == 0 for s in sums)
            assert all(t.grad.shape == t.shape and t.grad.count_nonzero() == 0 for t in maps)


@pytest.mark.parametrize("backend", backends("align"))
def test_special_coordinates_and_pixels(backend):
    """NaN, inf and huge coordinates, NaN and inf pixels do as in the reference, in both layouts; nothing is lost, nothing leaks."""
    nan, inf = math.nan, math.inf
    special = [[nan, 0], [0, nan], [inf, 0], [0, -inf], [-inf, inf], [nan, 5], [1e30, 0], [-1e30, -1e30], [3e9, 0.1], [0.1, 0.2], [-1, -1], [1, 1]]
    grid1 = torch.tensor(special).view(1, 3, 4, 2)
    grid2 = torch.rand(1, 3, 4, 2) * 2 - 1
    few = backend == "triton" and DEVICE[backend] == "cpu"
    for layout, mode, padding_mode in itertools.product(("last", "first"), ("linear",) if few else ("linear", "nearest"), ("zeros", "border")):
        f1, f2 = (feature_map(1, 10, (5, 7), layout) for _ in range(2))
        f1[0, :, 2, 3], f1[0, 4, 0, 0], f1[0, :, 4, 6] = nan, inf, 0
        upstream = [torch.randn(1, 3, 4) for _ in range(3)]
        options = {"size": (3, 4), "mode": mode, "padding_mode": padding_mode}
        got, expected = (both(ours(b), (f1, f2, grid1, grid2), upstream, **options) for b in (backend, "reference"))
        for g, e in zip(got, expected, strict=True):
            torch.testing.assert_close(g, e, rtol=1e-5, atol=1e-5, equal_nan=True)
        assert got[0].flatten()[[0, 1, 5]].isnan().all() and got[0].flatten()[6:9].isfinite().any() and got[2].isfinite().all()


@pytest.mark.parametrize("backend", FAST)
def test_nan_reaches_exactly_the_points_that_tap_it(backend):
    """A NaN pixel of f2 reaches dot and sq2 of the points with a weight there, and no other; of 16-bit maps too."""
    for layout, channels, dtype in itertools.product(("last", "first"), (3, 20), (torch.float32, torch.bfloat16)):
        f1, f2 = (feature_map(1, channels, (6, 8), layout, dtype) for _ in range(2))
        f2[0, channels // 2, 2, 3] = math.nan
        identity = torch.eye(2, 3)[None]
        shift = torch.tensor([[[1.0, 0, 0.125], [0, 1, 0]]])  # half a pixel along x: columns 2 and 3
        for theta, columns in ((identity, [3]), (shift, [2, 3])):
            dot, sq1, sq2 = ours(backend)(f1, f2, identity, theta, size=(6, 8), padding_mode="zeros")
            expected = torch.zeros(6, 8, dtype=torch.bool)
            expected[2, columns] = True
            assert torch.equal(dot[0].isnan(), expected) and torch.equal(sq2[0].isnan(), expected) and sq1.isfinite().all()


@pytest.mark.parametrize("backend", FAST)
def test_zero_maps_have_zero_gradients(backend):
    tensors, keywords = problem(layouts=("last", "first"))
    zero = (torch.zeros_like(tensors[0]), torch.zeros_like(tensors[1]), *tensors[2:])
    assert all(t.count_nonzero() == 0 for t in both(ours(backend), zero, [torch.randn(2, *keywords["size"])] * 3, **keywords))


MEMORY = """
import torch
from pix2rep_kernels import align
torch.set_num_threads(1)
n, last = int(arguments[0]), arguments[1] == "last"
def prepare():
    f = torch.randn(1, 32, n, 64, 64)
    f = (f.contiguous(memory_format=torch.channels_last_3d) if last else f).requires_grad_()
    theta = torch.eye(3, 4)[None] * 0.9
    small = torch.randn(1, 32, 2, 4, 4, requires_grad=True)
    align(small, small.detach(), theta, theta, backend="cpu")[0].sum().backward()
    return f, torch.rand_like(f), theta
def work(inputs):
    f1, f2, theta = inputs
    align(f1, f2, theta, theta, backend="cpu")[0].sum().backward()
"""


@pytest.mark.skipif("cpu" not in FAST, reason="the CPU kernels are not built")
@pytest.mark.parametrize("layout", ["last", "first"])
def test_peak_memory(layout):
    """Beyond the gradient: the sums and their gradients, and for planes copies, never the warped maps; linear in the map."""
    used = []
    for n in (8, 16):
        points = n * 64 * 64
        gradient, sums = points * 32 * 4 / 2**20, points * (6 * 4 + 1) / 2**20
        # Planes: both maps copied in the forward; in the backward three blocks of 16 of the 32 channels beside the gradient, which is larger.
        copies = 0 if layout == "last" else 1.5 * gradient
        used.append(peak_mib(MEMORY, n, layout))
        assert used[-1] <= gradient + sums + copies + 6, (n, used, gradient)
    assert used[1] <= 2.2 * used[0] + 4
