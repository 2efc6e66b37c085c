"""Pix2RepLoss against the official formula written out, and every argument of it."""

import math

import pytest
import torch
import torch.nn.functional as F

from pix2rep_kernels import Pix2RepLoss, infonce, warp
from pix2rep_kernels.testing import backends, error

BACKENDS = [b for b in backends("infonce") if b not in ("triton", "cuda")]


def official(features_1, features_2, theta, num_samples, temperature, index=None):
    """arXiv 2407.20395's loss, step by step: warp, flatten, normalise, sample, NT-Xent by cross-entropy."""
    grid = F.affine_grid(theta, features_1.shape, align_corners=True)
    warped = F.grid_sample(features_1, grid, align_corners=True)
    flat_1, flat_2 = (F.normalize(f.movedim(1, -1).flatten(0, -2), dim=1) for f in (warped, features_2))
    index = torch.randperm(len(flat_1))[:num_samples] if index is None else index
    z = torch.cat([flat_1[index], flat_2[index]])
    s = (z @ z.T).masked_fill(torch.eye(len(z), dtype=torch.bool), -torch.inf) / temperature
    return F.cross_entropy(s, torch.arange(len(z)).roll(len(index)))


def views(batch=3, channels=8, size=(16, 12), dtype=torch.float64):
    f1, f2 = (torch.randn(batch, channels, *size, dtype=dtype, requires_grad=True) for _ in range(2))
    dims = len(size)
    theta = torch.eye(dims, dims + 1) * 0.8 + 0.2 * torch.randn(batch, dims, dims + 1)
    return f1, f2, theta


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("samples", [50, 10_000])
@pytest.mark.parametrize("dims", [2, 3])
def test_is_the_official_loss_with_the_official_draw(backend, samples, dims):
    f1, f2, theta = views(size=(16, 12) if dims == 2 else (6, 5, 8))
    loss = Pix2RepLoss(num_samples=samples, backend=backend)
    torch.manual_seed(3)
    got = loss(f1, f2, theta.double())
    torch.manual_seed(3)
    want = official(f1, f2, theta.double(), samples, 0.53)
    assert error([got], [want]) < 1e-12
    assert error(torch.autograd.grad(got, (f1, f2)), torch.autograd.grad(want, (f1, f2))) < 1e-10


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_pixel(backend):
    f1, f2, theta = views(dtype=torch.float32)
    got = Pix2RepLoss(num_samples=None, backend=backend)(f1, f2, theta)
    assert got.dtype == torch.float32
    want = official(f1.double(), f2.double(), theta.double(), None, 0.53)
    assert error([got], [want]) < 1e-5  # float32 coordinates and rows


def test_points_replace_the_draw_and_order_does_not_matter():
    f1, f2, theta = views()
    points = torch.randperm(3 * 16 * 12)[:70]
    got = Pix2RepLoss()(f1, f2, theta, points=points)
    assert error([got], [official(f1, f2, theta.double(), None, 0.53, points)]) < 1e-6  # theta is float32 here
    assert error([Pix2RepLoss()(f1, f2, theta, points=points.flip(0))], [got]) < 1e-12
    generator = torch.Generator().manual_seed(5)
    first = Pix2RepLoss(num_samples=20)(f1, f2, theta, generator=generator)
    assert first == Pix2RepLoss(num_samples=20)(f1, f2, theta, generator=torch.Generator().manual_seed(5))


def test_dense_grid_is_the_affine_one():
    f1, f2, theta = views()
    points = torch.arange(0, 500, 7)
    grid = F.affine_grid(theta.double(), f1.shape, align_corners=True)
    assert error([Pix2RepLoss()(f1, f2, grid, points=points)], [Pix2RepLoss()(f1, f2, theta.double(), points=points)]) < 1e-12


def test_equal_views_without_a_warp():
    f1, _, _ = views()
    got = Pix2RepLoss(num_samples=None)(f1, f1)
    rows = F.normalize(f1.movedim(1, -1).flatten(0, -2), dim=1)
    assert error([got], [infonce(rows, rows, temperature=0.53, backend="reference").mean()]) < 1e-12


def test_per_image_keeps_negatives_inside():
    f1, f2, theta = views()
    each = [Pix2RepLoss(num_samples=None)(f1[i : i + 1], f2[i : i + 1], theta[i : i + 1]) for i in range(3)]
    assert error([Pix2RepLoss(num_samples=None, per_image=True)(f1, f2, theta)], [torch.stack(each).mean()]) < 1e-12
    points = torch.stack([torch.randperm(16 * 12)[:9] for _ in range(3)])
    each = [Pix2RepLoss()(f1[i : i + 1], f2[i : i + 1], theta[i : i + 1], points=points[i]) for i in range(3)]
    assert error([Pix2RepLoss(per_image=True)(f1, f2, theta, points=points)], [torch.stack(each).mean()]) < 1e-12
    assert Pix2RepLoss(per_image=True, num_samples=9)(f1, f2, theta).isfinite()


def test_masks_and_outside():
    f1, f2, theta = views()
    mask = torch.rand(3, 1, 16, 12) > 0.5
    chosen = mask.flatten().nonzero().squeeze(1)
    want = Pix2RepLoss()(f1, f2, theta, points=chosen)
    assert error([Pix2RepLoss(num_samples=None)(f1, f2, theta, mask=mask)], [want]) < 1e-12
    assert error([Pix2RepLoss(num_samples=10_000)(f1, f2, theta, mask=mask[:, 0])], [want]) < 1e-12
    inside = warp(f1, theta)[1]
    want = Pix2RepLoss()(f1, f2, theta, points=(inside & mask.flatten()).nonzero().squeeze(1))
    assert error([Pix2RepLoss(num_samples=None, outside="drop")(f1, f2, theta, mask=mask)], [want]) < 1e-12
    none = Pix2RepLoss(num_samples=20)(f1, f2, theta, mask=torch.zeros_like(mask))
    assert none == 0 and (torch.autograd.grad(none, f1)[0] == 0).all()


def test_masked_pixels_are_drawn_last():
    f1, f2, theta = views()
    mask = torch.zeros(3, 16, 12, dtype=torch.bool)
    mask[1, 4:9, 3:7] = True
    with torch.no_grad():
        f2 = torch.where(mask.unsqueeze(1), f2, torch.nan)
    assert Pix2RepLoss(num_samples=20)(f1, f2, theta, mask=mask).isfinite()  # 20 pixels are inside: none else is looked at


def test_layouts_and_mixed_precision():
    f1, f2, theta = views(dtype=torch.float32)
    points = torch.arange(0, 500, 3)
    want = Pix2RepLoss()(f1, f2, theta, points=points)
    last = [f.detach().to(memory_format=torch.channels_last).requires_grad_() for f in (f1, f2)]
    got = Pix2RepLoss()(*last, theta, points=points)
    assert error([got], [want]) < 1e-6
    assert torch.autograd.grad(got, last[0])[0].is_contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = Pix2RepLoss()(f1.bfloat16(), f2.bfloat16(), theta, points=points)
    assert mixed.dtype == torch.float32
    assert abs(mixed - want) < 4 * torch.finfo(torch.bfloat16).eps / 0.53


@pytest.mark.parametrize("objective", ["infonce", "barlow"])
@pytest.mark.parametrize("samples", [20, None])
def test_a_linear_head_on_rows_is_the_head_on_maps(objective, samples):
    """Interpolation and a linear head commute; with a bias too, inside the map."""
    maps, weight = [torch.randn(2, 5, 6, 6) for _ in range(2)], torch.randn(4, 5)
    theta = 0.5 * torch.eye(2, 3).repeat(2, 1, 1)
    loss = Pix2RepLoss(objective, num_samples=samples)
    on_rows = loss(*maps, theta, head=lambda rows: rows @ weight.T + 0.3, generator=torch.Generator().manual_seed(0))
    on_maps = loss(*(torch.einsum("dc,bchw->bdhw", weight, m) + 0.3 for m in maps), theta, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(on_rows, on_maps)
    with pytest.raises(ValueError, match=r"`head` must give rows \[P, D\] for rows \[P, C\] = \("):
        loss(*maps, theta, head=lambda rows: rows.T[:3])


@pytest.mark.parametrize("kw", [{}, {"num_samples": None}, {"num_samples": 40, "outside": "drop"}, {"num_samples": 40, "per_image": True}])
def test_compiles_in_one_graph(kw):
    torch._dynamo.reset()  # the graphs of other tests count
    f1, f2, theta = views(dtype=torch.float32)
    loss = Pix2RepLoss(**kw)
    compiled = torch.compile(loss, fullgraph=True)
    mask = torch.rand(3, 16, 12) > 0.2
    for extra in ({}, {"mask": mask}):
        compiled(f1, f2, theta, **extra).backward()
    assert f1.grad.isfinite().all()


@pytest.mark.parametrize("kw", [{}, {"num_samples": None}, {"num_samples": 40, "per_image": True}])
def test_one_graph_serves_every_size(kw):
    counter = torch._dynamo.testing.CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(Pix2RepLoss(**kw), fullgraph=True, dynamic=True, backend=counter)
    for height in range(40, 52):  # more than the recompile limit of 8
        f1, f2, theta = views(size=(height, 33), dtype=torch.float32)
        compiled(f1, f2, theta, mask=torch.rand(3, height, 33) > 0.2)
    assert counter.frame_count <= 2


def test_learns():
    """Two hundred steps on a toy: features of a pixel and of its warped self come together."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(1, 16, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(16, 8, 3, padding=1))
    optimiser = torch.optim.Adam(net.parameters(), 1e-2)
    loss = Pix2RepLoss(temperature=0.2, num_samples=128)
    image = F.interpolate(torch.rand(4, 1, 8, 8), size=(32, 32), mode="bilinear")
    history = []
    for _ in range(200):
        angle = torch.rand(4) * math.pi
        theta = torch.stack([torch.stack([angle.cos(), -angle.sin(), 0 * angle], 1), torch.stack([angle.sin(), angle.cos(), 0 * angle], 1)], 1)
        warped = F.grid_sample(image, F.affine_grid(theta, image.shape, align_corners=True), align_corners=True)
        value = loss(net(image), net(warped), theta)
        optimiser.zero_grad()
        value.backward()
        optimiser.step()
        history.append(value.item())
    assert sum(history[-20:]) / 20 < history[0] - 0.5, history[::40]


BAD = [
    (dict(objective="simclr"), ValueError, "`objective` must be one of 'infonce', 'barlow', got 'simclr'"),
    (dict(temperature=0), ValueError, r"`temperature` must be > 0 and finite .*, got 0"),
    (dict(temperature=None), TypeError, "`temperature` must be a float or a 0-d tensor, got None"),
    (dict(temperature=True), TypeError, "`temperature` must be a float or a 0-d tensor, got True"),
    (dict(temperature=-0.1), ValueError, "`temperature` must be > 0"),
    (dict(num_samples=0), ValueError, "`num_samples` must be None or an integer > 0, got 0"),
    (dict(num_samples=1.5), ValueError, "`num_samples` must be None or an integer > 0, got 1.5"),
    (dict(outside="mask"), ValueError, "`outside` must be one of 'keep', 'drop', got 'mask'"),
    (dict(backend="gpu"), ValueError, "`backend` must be one of"),
]


@pytest.mark.parametrize("options, kind, message", BAD)
def test_bad_options(options, kind, message):
    with pytest.raises(kind, match=message):
        Pix2RepLoss(**options)


def test_bad_input():
    f1, f2, theta = views()
    loss = Pix2RepLoss()
    cases = [
        ((f1[0], f2[0], theta), {}, ValueError, r"`features_1` must have shape \[B, C, H, W\]"),
        ((f1[:0], f2[:0], theta[:0]), {}, ValueError, "`features_1` must have at least one pixel"),
        ((f1, f2[:, :4], theta), {}, ValueError, "`features_2` must have the shape of features_1"),
        ((f1, f2.float(), theta), {}, TypeError, "`features_2` must be torch.float64"),
        ((f1.long(), f2.long(), theta), {}, TypeError, "`features_1` must be float16"),
        ((f1, f2.to("meta"), theta), {}, ValueError, "`features_2` must be on cpu as `features_1` is, got meta"),
        ((f1, f2, theta[:2]), {}, ValueError, "`grid` must have shape"),
        ((f1, f2, torch.zeros(3, 32, 24, 2)), {}, ValueError, r"`grid` must have shape .*\(3, 16, 12, 2\), got \(3, 32, 24, 2\)"),
        ((f1.detach().numpy(), f2, theta), {}, TypeError, "`features_1` must be a torch.Tensor, got ndarray"),
        ((f1, f2, theta.half()), {}, TypeError, "`grid` must be float32 or float64, got float16"),
        ((f1, f2, theta), {"mask": torch.ones(3, 4, 4, dtype=torch.bool)}, ValueError, "`mask` must have shape"),
        ((f1, f2, theta), {"mask": torch.ones(3, 16, 12)}, TypeError, "`mask` must be bool"),
        ((f1, f2, theta), {"points": torch.zeros(0, dtype=torch.int64)}, ValueError, "`points` must name at least one pixel"),
        ((f1, f2, theta), {"points": torch.tensor([9999])}, (ValueError, RuntimeError), "`points` must be in"),
    ]
    for arguments, extra, kind, message in cases:
        with pytest.raises(kind, match=message):
            loss(*arguments, **extra)
    with pytest.raises(ValueError, match=r"`points` must be in \[0, 192\), got values from 0 to 192"):
        Pix2RepLoss(per_image=True)(f1, f2, theta, points=torch.tensor([[0, 192], [0, 1], [0, 1]]))
    with torch.no_grad():
        f2[0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="`features_2` must be finite, got 1 NaN or inf"):
        Pix2RepLoss(check_finite=True)(f1, f2, theta)
    assert loss(f1, f2, theta, points=torch.arange(1000) % 576).isnan()
