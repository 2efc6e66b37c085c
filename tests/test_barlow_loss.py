"""Pix2RepLoss("barlow") against Pix2Rep-v2's official formula written out, and every argument of it."""

import pytest
import torch
import torch.nn.functional as F

from loss_helpers import SPACE, affine, assert_compiles, assert_house, assert_same, gradients, graphs, kept_mib, variable
from pix2rep_kernels import Pix2RepLoss, warp
from pix2rep_kernels.testing import error, tolerance


def rows(features):
    return features.movedim(1, -1).flatten(0, -2)


def barlow(x, y, lambda_param=5e-3):
    """Of rows [N, D], as the official code: a fresh BatchNorm1d a view, then the two sums over the matrix."""
    dims = x.shape[1]
    x, y = (torch.nn.BatchNorm1d(dims, affine=False).to(t.dtype)(t) for t in (x, y))
    c = x.T @ y / len(x)
    on, off = c.new_zeros(()), c.new_zeros(())
    for i in range(dims):
        for j in range(dims):
            if i == j:
                on = on + (c[i, j] - 1) ** 2
            else:
                off = off + c[i, j] ** 2
    return on + lambda_param * off


def official(f1, f2, theta, mode="bilinear", index=None, lambda_param=5e-3):
    warped = F.grid_sample(f1, F.affine_grid(theta, f1.shape, align_corners=True), mode=mode, align_corners=True)
    x, y = rows(warped), rows(f2)
    return barlow(*((x, y) if index is None else (x[index], y[index])), lambda_param)


def views(batch=3, channels=6, dims=2, dtype=torch.float64):
    f1, f2 = (variable(batch, channels, *SPACE[dims], dtype=dtype) for _ in range(2))
    return f1, f2, affine(batch, dims).to(dtype)


@pytest.mark.parametrize("dims, mode, theirs", [(2, "bicubic", "bicubic"), (2, "linear", "bilinear"), (2, "nearest", "nearest"), (3, "linear", "bilinear")])
def test_is_the_official_loss(dims, mode, theirs):
    f1, f2, theta = views(dims=dims)
    got = Pix2RepLoss("barlow", num_samples=None, mode=mode)(f1, f2, theta)
    assert_same(got, official(f1, f2, theta, theirs), (f1, f2))


@pytest.mark.parametrize("lambda_param", [0, 0.0051, 2.0])
def test_lambda(lambda_param):
    f1, f2, theta = views()
    got = Pix2RepLoss("barlow", num_samples=None, lambda_param=lambda_param)(f1, f2, theta)
    assert_same(got, official(f1, f2, theta, lambda_param=lambda_param), (f1, f2))


def test_the_draw_is_that_of_infonce():
    f1, f2, theta = views()
    torch.manual_seed(3)
    index = torch.randperm(3 * 9 * 7)[:40]
    torch.manual_seed(3)
    assert_same(Pix2RepLoss("barlow", num_samples=40)(f1, f2, theta), official(f1, f2, theta, index=index), (f1, f2))
    assert_same(Pix2RepLoss("barlow")(f1, f2, theta, points=index), official(f1, f2, theta, index=index), (f1, f2))
    first, second = (Pix2RepLoss("barlow", num_samples=20)(f1, f2, theta, generator=torch.Generator().manual_seed(5)) for _ in range(2))
    assert first == second


def test_per_image_draws_in_each_image_and_takes_statistics_of_all():
    f1, f2, theta = views()
    points = torch.stack([torch.randperm(63)[:9] for _ in range(3)])
    index = (points + 63 * torch.arange(3).unsqueeze(1)).flatten()
    want = official(f1, f2, theta, index=index)
    assert_same(Pix2RepLoss("barlow", per_image=True)(f1, f2, theta, points=points), want, (f1, f2))
    drawn = gradients(Pix2RepLoss("barlow", per_image=True, num_samples=9)(f1, f2, theta), (f2,))[0]
    assert (drawn.abs().sum(1) > 0).flatten(1).sum(1).tolist() == [9, 9, 9]
    every = Pix2RepLoss("barlow", per_image=True, num_samples=None)(f1, f2, theta)
    assert_same(every, official(f1, f2, theta), (f1, f2))


def test_masks_and_outside():
    f1, f2, theta = views()
    mask = torch.rand(3, 1, 9, 7) > 0.4
    inside = warp(f1, theta)[1]
    everywhere = Pix2RepLoss("barlow", num_samples=None)
    assert_same(everywhere(f1, f2, theta, mask=mask), official(f1, f2, theta, index=mask.flatten().nonzero()[:, 0]), (f1, f2))
    dropped = Pix2RepLoss("barlow", num_samples=None, outside="drop")
    assert not inside.all()
    assert_same(dropped(f1, f2, theta), official(f1, f2, theta, index=inside.nonzero()[:, 0]), (f1, f2))
    both = (inside & mask.flatten()).nonzero()[:, 0]
    assert_same(dropped(f1, f2, theta, mask=mask[:, 0]), official(f1, f2, theta, index=both), (f1, f2))
    assert_same(dropped(f1, f2), barlow(rows(f1), rows(f2)), (f1, f2))  # without a grid nothing is outside
    none = everywhere(f1, f2, theta, mask=torch.zeros_like(mask))
    assert none == 0 and all((g == 0).all() for g in gradients(none, (f1, f2)))


def test_masked_pixels_do_not_matter_whatever_they_hold():
    f1, f2, _ = views()
    mask = torch.rand(3, 9, 7) > 0.4
    loss = Pix2RepLoss("barlow", num_samples=None)
    want = loss(f1, f2, mask=mask)
    bad = [torch.where(mask.unsqueeze(1), f, torch.nan).detach().requires_grad_() for f in (f1, f2)]
    got = loss(*bad, mask=mask)
    assert got == want
    for g, w in zip(gradients(got, bad), gradients(want, (f1, f2)), strict=True):
        assert torch.equal(g, w) and (g[~mask.unsqueeze(1).expand_as(g)] == 0).all()
    assert loss(bad[0], f2).isnan()


def test_equal_views_leave_the_off_diagonal():
    f1, _, _ = views()
    x = rows(f1.detach())
    var = x.var(0, unbiased=False)
    c = torch.cov(x.T, correction=0) / torch.outer((var + 1e-5).sqrt(), (var + 1e-5).sqrt())
    diagonal = var / (var + 1e-5)
    assert error([c.diag()], [diagonal]) < 1e-12
    want = ((diagonal - 1) ** 2).sum() + 5e-3 * (c.square().sum() - diagonal.square().sum())
    assert error([Pix2RepLoss("barlow", num_samples=None)(f1, f1)], [want]) < 1e-10


def test_a_channel_may_be_scaled_and_shifted():
    f1, f2, theta = views()
    loss = Pix2RepLoss("barlow", num_samples=None)
    scaled = f2 * torch.tensor([2.0, 5, 9, 1, 30, 4]).reshape(1, -1, 1, 1) + 3
    assert error([loss(f1, scaled, theta)], [loss(f1, f2, theta)]) < 1e-4  # but for eps = 1e-5 in the root
    assert error([loss(f1.flip(0), f2.flip(0), theta.flip(0))], [loss(f1, f2, theta)]) < 1e-12


def test_a_dead_channel_is_finite():
    f1, f2, _ = views()
    with torch.no_grad():
        f1[:, 2] = 0.7
    got = Pix2RepLoss("barlow", num_samples=None)(f1, f2)
    assert_same(got, barlow(rows(f1), rows(f2)), (f1, f2), 1e-8)
    assert all(g.isfinite().all() for g in gradients(got, (f1, f2)))


@pytest.mark.parametrize("layout", ["first", "last"])
def test_float32_is_as_exact_as_pytorch(layout):
    f1, f2, theta = views(dtype=torch.float32)
    exact = [t.detach().double().requires_grad_() for t in (f1, f2)]
    want = official(*exact, theta.double())
    truth = [want, *gradients(want, exact)]
    if layout == "last":
        f1, f2 = (f.detach().contiguous(memory_format=torch.channels_last).requires_grad_() for f in (f1, f2))
    theirs = official(f1, f2, theta)
    ours = Pix2RepLoss("barlow", num_samples=None)(f1, f2, theta)
    assert ours.dtype == torch.float32
    bound = tolerance(error([theirs, *gradients(theirs, (f1, f2))], truth), torch.float32)
    assert error([ours, *gradients(ours, (f1, f2))], truth) < bound


def test_half_precision_is_the_loss_of_the_rounded_features():
    f1, f2, _ = views(dtype=torch.float32)
    low = [f.detach().bfloat16().requires_grad_() for f in (f1, f2)]
    got = Pix2RepLoss("barlow", num_samples=None)(*low)
    want = barlow(*(rows(f.double()) for f in low))
    assert got.dtype == torch.float32 and error([got], [want]) < 1e-5  # sums of float32
    assert error(gradients(got, low), gradients(want, low)) < torch.finfo(torch.bfloat16).eps


def test_no_standardised_copy_is_kept():
    f1, f2 = (variable(2, 32, 64, 64, dtype=torch.float32).detach().contiguous(memory_format=torch.channels_last).requires_grad_() for _ in range(2))
    kept = kept_mib(lambda: Pix2RepLoss("barlow", num_samples=None)(f1, f2), f1, f2)
    assert 0 < kept < 0.1  # 32 x 32 matrices; the rows of channels-last maps are views of them, 1 MiB each
    theta = affine(2, 2).float()
    assert kept_mib(lambda: Pix2RepLoss("barlow", num_samples=None)(f1, f2, theta), f1, f2) < 1.1 + 0.1  # the warped rows


def test_house():
    f1, f2, theta = views(dtype=torch.float32)
    for options in ({"num_samples": None}, {"num_samples": 30, "outside": "drop", "per_image": True}):
        assert_house(Pix2RepLoss("barlow", **options), f1, f2, theta, mask=torch.rand(3, 9, 7) > 0.2)
    assert "objective='barlow'" in repr(Pix2RepLoss("barlow")) and "lambda_param=0.005" in repr(Pix2RepLoss("barlow"))
    assert_compiles(Pix2RepLoss("barlow", num_samples=None, outside="drop"), (f1, f2), f1, f2, theta)


@pytest.mark.parametrize("options", [{"num_samples": None}, {"num_samples": 40, "per_image": True, "outside": "drop"}])
def test_one_graph_serves_every_size(options):
    def problems():
        for height in range(20, 30):  # more than the recompile limit of 8
            f1, f2 = (torch.randn(3, 6, height, 17, requires_grad=True) for _ in range(2))
            yield (f1, f2, affine(3, 2).float()), {"mask": torch.rand(3, height, 17) > 0.2}

    assert graphs(Pix2RepLoss("barlow", **options), problems()) <= 2


def test_bad_options():
    for options, kind, message in (
        (dict(lambda_param=-1), ValueError, "`lambda_param` must be >= 0 and finite, got -1"),
        (dict(lambda_param=float("nan")), ValueError, "`lambda_param` must be >= 0 and finite, got nan"),
        (dict(lambda_param="1"), TypeError, "`lambda_param` must be a float, got '1'"),
    ):
        with pytest.raises(kind, match=message):
            Pix2RepLoss("barlow", **options)
    f1, f2, theta = views(dims=3)
    with pytest.raises(ValueError, match="`mode` must be"):
        Pix2RepLoss("barlow", mode="bicubic")(f1, f2, theta)
