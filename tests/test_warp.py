"""warp: values, gradients, properties, edges; every backend that runs here, against F.grid_sample in float64."""

import itertools
import math

import pytest
import torch

from pix2rep_kernels import warp
from pix2rep_kernels.testing import backends, error
from sweep import some
from warp_helpers import DEVICE, FAST, GPU, MODES, both, compare, ours, problem

pytestmark = [
    pytest.mark.filterwarnings("ignore:Since version 1.3.0, affine_grid:UserWarning"),
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),  # numpy's, of NaN and inf in the interpreter
]


# Values and gradients


@pytest.mark.parametrize("mode, dims", MODES)
@pytest.mark.parametrize("backend", FAST)
def test_values_and_gradients(backend, mode, dims):
    """Every option, against F.affine_grid, F.grid_sample and F.normalize."""
    options = itertools.product((True, False), ("zeros", "border"), (True, False), ("last", "first"), (True, False), (None, 23))
    for align_corners, padding_mode, normalize, layout, affine, points in some(backend, options):
        features, grid, keywords = problem(dims, layout=layout, affine=affine, points=points, mode=mode)
        compare(backend, features, grid, align_corners=align_corners, padding_mode=padding_mode, normalize=normalize, **keywords)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("backend", FAST)
def test_precisions(backend, dtype):
    if dtype == torch.float64 and backend in GPU:
        pytest.skip("float64 runs on the backends reference and cpu only")
    for layout, points, normalize, dims in some(backend, itertools.product(("last", "first", "strided"), (None, 2), (True, False), (2, 3))):
        grid_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        features, grid, options = problem(dims, 33, layout=layout, points=points, dtype=dtype, grid_dtype=grid_dtype, space=(6,) * dims)
        compare(backend, features, grid, normalize=normalize, **options)


@pytest.mark.parametrize("backend", [b for b in FAST if b not in GPU])
def test_gradcheck(backend):
    for (mode, dims), normalize, layout in itertools.product(MODES, (True, False), ("last", "first")):
        features, grid, options = problem(dims, 3, layout=layout, points=9, dtype=torch.float64, grid_dtype=torch.float64, mode=mode)
        assert torch.autograd.gradcheck(
            lambda f, grid=grid, normalize=normalize, options=options: warp(f, grid, normalize=normalize, backend=backend, **options)[0],
            features.requires_grad_(),
        )


TRITON_CASES = [
    *({"dims": dims, "mode": mode, "points": 9, "normalize": True} for mode, dims in MODES),
    *({"dims": dims, "mode": mode, "points": 9, "layout": "first", "affine": False, "padding_mode": "border"} for mode, dims in MODES),
    *({"dims": dims, "mode": mode, "points": 9, "align_corners": False, "sorted_sums": False} for mode, dims in MODES),
    *({"layout": layout, "sorted_sums": sums} for layout in ("last", "first", "strided") for sums in (True, False)),
    *({"channels": c, "normalize": c > 1, "points": 5} for c in (1, 3, 16, 33, 100)),
    *({"channels": c, "normalize": c > 1, "points": 5, "layout": "first", "sorted_sums": False} for c in (1, 3, 16, 33, 100)),
    {"channels": 700, "normalize": True, "points": 2, "space": (2, 2), "size": (2, 2)},  # more than one block of channels
    {"channels": 150, "normalize": True, "points": 2, "space": (2, 2), "size": (2, 2), "layout": "first", "sorted_sums": False},
    {"dtype": torch.float16, "normalize": True, "points": 9},
    {"dtype": torch.bfloat16, "layout": "first", "points": 9},
    {"dtype": torch.bfloat16, "normalize": True, "sorted_sums": False, "points": 9},
    {"space": (1, 1), "size": (1, 1)},
    {"space": (1, 6), "size": (3, 1), "align_corners": False},
]  # fmt: skip


@pytest.mark.skipif("triton" not in backends("warp"), reason="triton does not run here")
@pytest.mark.parametrize("case", TRITON_CASES, ids=lambda case: "-".join(str(v) for v in case.values()).replace("torch.", ""))
def test_triton(case):
    features, grid, options = problem(**case)
    compare("triton", features, grid, **options)


# Properties


@pytest.mark.parametrize("backend", FAST)
def test_identity_grid_gathers(backend):
    features, _, _ = problem(channels=20, space=(6, 8))
    points = torch.randint(2 * 48, (30,))
    identity = torch.eye(2, 3).expand(2, -1, -1)
    for mode in ("nearest", "linear", "bicubic"):
        rows, inside = warp(features.to(DEVICE[backend]), identity.to(DEVICE[backend]), points=points.to(DEVICE[backend]), mode=mode, backend=backend)
        expected = features.movedim(1, -1).flatten(0, -2)[points]
        assert error([rows], [expected]) <= (0 if mode == "nearest" else 8 * torch.finfo(torch.float32).eps)
        assert inside.all()


@pytest.mark.parametrize("backend", [b for b in FAST if b not in GPU])
def test_linear_and_adjoint(backend):
    """W is linear, and its gradient is its transpose: <W f, g> = <f, W^T g>."""
    for (mode, dims), layout in itertools.product(MODES, ("last", "first")):
        f, grid, options = problem(dims, layout=layout, dtype=torch.float64, grid_dtype=torch.float64, mode=mode)
        h = torch.randn_like(f)
        call = ours(backend)
        w = call(f, grid, **options)
        assert error([call(2 * f - 3 * h, grid, **options)], [2 * w - 3 * call(h, grid, **options)]) < 1e-14
        g = torch.randn_like(w)
        _, transposed = both(call, f, grid, g, **options)
        left, right = (w * g).sum(), (f * transposed).sum()
        assert abs(left - right) < 1e-12 * w.norm() * g.norm()


@pytest.mark.parametrize("backend", FAST)
def test_unit_rows_and_inside(backend):
    features, grid, _ = problem(affine=False, padding_mode="border")
    grid[0, 0, 0], grid[0, 0, 1], grid[0, 0, 2] = torch.tensor([-1.0, 1.0]), torch.tensor([1.0000001, 0.0]), torch.tensor([0.0, -1.0000001])
    for align_corners in (True, False):
        rows, inside = warp(
            features.to(DEVICE[backend]), grid.to(DEVICE[backend]), padding_mode="border", normalize=True, align_corners=align_corners, backend=backend
        )
        assert torch.allclose(rows.norm(dim=1), torch.ones(1, device=rows.device), atol=4 * torch.finfo(torch.float32).eps)
        assert torch.equal(inside.cpu(), (grid.abs() <= 1).all(-1).flatten())


@pytest.mark.parametrize("backend", FAST)
def test_nearest_ties_fall_as_in_the_reference(backend):
    """Whole and half pixels, where one rounding of a coordinate moves the tap; affine grids in float32."""
    features = torch.arange(2 * 33 * 17.0).reshape(2, 1, 33, 17).expand(-1, 9, -1, -1)
    for scale, shift, align_corners in itertools.product((1.0, 0.5, 2.0, 1 / 3), (0.0, 1 / 32, 1 / 16, 0.1), (True, False)):
        theta = torch.tensor([[scale, 0.0, shift], [0.0, scale, -shift]]).repeat(2, 1, 1)
        call = {"size": (32, 16), "mode": "nearest", "align_corners": align_corners}
        assert torch.equal(ours(backend)(features, theta, **call), ours("reference")(features, theta, **call))


# Edges


@pytest.mark.parametrize("backend", FAST)
def test_channels_and_sizes(backend):
    for channels, layout, points in some(backend, itertools.product((1, 3, 16, 17, 33, 100), ("last", "first", "strided"), (None, 3, 300)), 4):
        features, grid, options = problem(channels=channels, layout=layout, points=points, space=(13, 11))
        compare(backend, features, grid, normalize=channels > 1, **options)
    for space, size in (((1, 1), (1, 1)), ((1, 9), (4, 1)), ((64, 3), (3, 64)), ((16, 16), (40, 40))):
        for align_corners, layout in itertools.product((True, False), ("last", "first")):
            features, grid, options = problem(channels=24, layout=layout, space=space, size=size)
            compare(backend, features, grid, align_corners=align_corners, **options)


@pytest.mark.parametrize("backend", FAST)
def test_strides(backend):
    """Slices, flips, expanded and overlapping tensors, an offset that no vector is aligned to, strided points, grids and gradients."""
    wide, grid, options = problem(channels=40, batch=4, space=(12, 14), layout="first")
    views = {
        "channels": wide[:, 3:30:2], "rows": wide[:, :, 1:-1], "columns": wide[:, :, :, 1:-2], "images": wide[::2].repeat(2, 1, 1, 1),
        "transposed": wide.transpose(2, 3), "one channel": wide[:, :1].expand(-1, 20, -1, -1), "one pixel": wide[:, :, :1, :1].expand(-1, -1, 5, 6),
        "one image": wide[:1].expand(4, -1, -1, -1), "offset": torch.randn(wide.numel() + 1)[1:].view_as(wide),
        "channels of last": wide.contiguous(memory_format=torch.channels_last)[:, 5:25],
    }  # fmt: skip
    for features in views.values():
        compare(backend, features, grid, **options)
    dense = torch.rand(4, 2, 6, 5).mul(2).sub(1).permute(0, 2, 3, 1)
    compare(backend, wide, dense, points=torch.randint(120, (20,))[::3])
    compare(backend, wide, grid[:1].transpose(1, 2).contiguous().transpose(1, 2).expand(4, -1, -1), size=(6, 5))
    features = wide.requires_grad_()
    device = DEVICE[backend]
    warp(features.to(device), grid.to(device), size=(6, 5), backend=backend)[0].sum().backward()  # an expanded gradient
    expanded = features.grad.clone()
    features.grad = None
    warp(features, grid, size=(6, 5), backend="reference")[0].sum().backward()
    assert error([expanded], [features.grad]) < 1e-6


@pytest.mark.parametrize("backend", FAST)
def test_no_points(backend):
    features, grid, _ = problem(channels=9)
    none = torch.empty(0, dtype=torch.int64)
    cases = [
        (features, grid, {"points": none}),
        (features, grid, {"size": (0, 4)}),
        (features[:0], grid[:0], {}),
        (features[:0], grid[:0], {"points": none}),
        (features[:, :0], grid, {}),
    ]
    for f, g, options in cases:
        for normalize in (True, False):
            f = f.detach().requires_grad_()
            device = DEVICE[backend]
            options = {k: v.to(device) if k == "points" else v for k, v in options.items()}
            rows, inside = warp(f.to(device), g.to(device), normalize=normalize, backend=backend, **options)
            rows.sum().backward()
            assert rows.shape == (len(inside), f.shape[1]) and f.grad.shape == f.shape and f.grad.count_nonzero() == 0


@pytest.mark.parametrize("backend", backends("warp"))
def test_repeated_points(backend):
    features, grid, options = problem(channels=5)
    compare(backend, features, grid, **options, points=torch.tensor([3, 40, 3, 3, 71, 40]))


@pytest.mark.parametrize("backend", backends("warp"))
def test_special_values(backend):
    """NaN, inf and huge coordinates, NaN and inf pixels and zero vectors do as in the reference, in both layouts; nothing is lost, nothing leaks."""
    nan, inf = math.nan, math.inf
    special = [[nan, 0], [0, nan], [inf, 0], [0, -inf], [-inf, inf], [nan, 5], [1e30, 0], [-1e30, -1e30], [3e9, 0.1], [0.1, 0.2], [-1, -1], [1, 1]]
    grid = torch.tensor(special).view(1, 3, 4, 2)
    for layout, mode, padding_mode in itertools.product(("last", "first"), ("linear", "nearest", "bicubic"), ("zeros", "border")):
        features, _, _ = problem(channels=10, batch=1, layout=layout)
        features[0, :, 2, 3], features[0, 4, 0, 0], features[0, :, 4, 6] = nan, inf, 0
        upstream = torch.randn(12, 10)
        for normalize in (True, False) if backend != "triton" else (True,):
            results = [both(ours(b), features, grid, upstream, mode=mode, padding_mode=padding_mode, normalize=normalize) for b in (backend, "reference")]
            for got, expected in zip(*results, strict=True):
                torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5, equal_nan=True)
            rows = results[0][0]
            assert rows[[0, 1, 5]].isnan().all()
            assert mode == "bicubic" or rows[6:9].isfinite().any()


@pytest.mark.parametrize("backend", backends("warp"))
def test_zero_vectors_normalise_as_in_pytorch(backend):
    features = torch.zeros(1, 4, 2, 3)
    features[0, :, 0, 0] = 1e-14
    features[0, :, 1, 1] = 1.0
    compare(backend, features, torch.eye(2, 3)[None], size=(2, 3), normalize=True)


@pytest.mark.parametrize("backend", backends("warp"))
def test_one_channel_normalised_is_a_sign(backend):
    """Its gradient is 0 up to the rounding of (warp.5)."""
    features = torch.randn(1, 1, 5, 6).sign() * (1 + torch.rand(1, 1, 5, 6))
    rows, grad = both(ours(backend), features, torch.eye(2, 3)[None], torch.randn(30, 1), mode="nearest", normalize=True)
    assert error([rows], [features.sign().view(30, 1)]) <= torch.finfo(torch.float32).eps
    assert grad.abs().max() <= 8 * torch.finfo(torch.float32).eps


def test_points_out_of_range():
    features, grid, _ = problem(channels=4, space=(3, 4))
    for bad in (-1, 24):
        for backend in [b for b in FAST if b not in GPU]:
            with pytest.raises((ValueError, RuntimeError), match=rf"`points` must be in \[0, 24\), got values from {min(bad, 2)} to {max(bad, 2)}"):
                warp(features, grid, points=torch.tensor([2, bad]), backend=backend)
        for backend in [b for b in backends("warp") if b in GPU]:
            device = DEVICE[backend]
            leaf = features.to(device).requires_grad_()
            rows, inside = warp(leaf, torch.eye(2, 3, device=device).expand(2, -1, -1), points=torch.tensor([2, bad], device=device), backend=backend)
            assert rows[1].isnan().all() and not inside[1] and rows[0].isfinite().all() and inside[0]
            rows.sum().backward()
            assert leaf.grad.isfinite().all()
