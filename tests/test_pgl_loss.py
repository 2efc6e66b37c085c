"""PriorGuidedLocalLoss against its formulas written out, box_grid against its coordinates, and every argument of both."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from loss_helpers import SPACE, affine, assert_compiles, assert_house, assert_same, gradients, graphs, kept_mib, slope, variable
from pix2rep_kernels import PriorGuidedLocalLoss, box_grid
from pix2rep_kernels.testing import error, tolerance

FRAME = {2: (3, 5), 3: (2, 3, 4)}


def written_out(
    p, z, grid1, grid2, size, norm="channel", *, mode="linear", detach_targets=True, outside="keep", normalize_first=False, align_corners=False,
    padding_mode="border",
):  # fmt: skip
    """grid_sample, then the distance point by point."""
    z = z.detach() if detach_targets else z
    sampled, inside = [], True
    for features, grid in ((p, grid1), (z, grid2)):
        if grid.ndim == 3:
            grid = F.affine_grid(grid, (*features.shape[:2], *size), align_corners=align_corners)
        features = F.normalize(features, dim=1) if normalize_first else features
        how = "bilinear" if mode == "linear" else mode
        sampled.append(F.grid_sample(features, grid.to(features.dtype), mode=how, align_corners=align_corners, padding_mode=padding_mode))
        inside = inside & (grid.abs() <= 1).all(-1)
    inside = torch.ones_like(inside) if outside == "keep" else inside
    distances = []
    for q, z, use in zip(*sampled, inside, strict=True):  # a sample
        q, z = q[:, use].T, z[:, use].T  # [points, C]
        if len(q) == 0:
            continue
        if norm == "flat":
            q, z = q.reshape(1, -1), z.reshape(1, -1)
        distances += list((q - z).square().mean(1)) if norm == "none" else list((F.normalize(q, dim=1) - F.normalize(z, dim=1)).square().sum(1))
    return torch.stack(distances).mean()


def problem(dims=2, batch=2, channels=4, dtype=torch.float64):
    p, z = variable(batch, channels, *SPACE[dims], dtype=dtype), variable(batch, channels, *(n + 2 for n in SPACE[dims]), dtype=dtype)
    return p, z, affine(batch, dims), affine(batch, dims)


VARIANTS = [
    {},
    {"detach_targets": False},
    {"outside": "drop"},
    {"normalize_first": True, "detach_targets": False},
    {"mode": "nearest"},
    {"align_corners": True},
    {"padding_mode": "zeros", "outside": "drop", "detach_targets": False},
]


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("norm", ["channel", "flat", "none"])
@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_is_the_formula(options, norm, dims):
    p, z, grid1, grid2 = problem(dims)
    loss = PriorGuidedLocalLoss(norm, **options)
    size = FRAME[dims]
    assert_same(loss(p, z, grid1, grid2, size=size), written_out(p, z, grid1, grid2, size, norm, **options), (p, z))
    dense = 2.4 * torch.rand(2, *size, dims, dtype=torch.float64) - 1.2  # a seventh of the coordinates lies outside
    assert_same(loss(p, z, grid1, dense), written_out(p, z, grid1, dense, size, norm, **options), (p, z))


@pytest.mark.parametrize("norm", ["channel", "flat", "none"])
def test_the_frame_is_the_first_map_by_default(norm):
    p, z, grid1, grid2 = problem()
    assert_same(PriorGuidedLocalLoss(norm)(p, z, grid1, grid2), written_out(p, z, grid1, grid2, SPACE[2], norm), (p, z))


@pytest.mark.parametrize("norm", ["channel", "flat", "none"])
def test_equal_maps_and_grids_have_no_distance(norm):
    p, _, grid, _ = problem()
    value = PriorGuidedLocalLoss(norm)(p, p.detach(), grid, grid)
    assert abs(value) < 1e-14 and gradients(value, (p,))[0].abs().max() < 1e-14
    opposite = PriorGuidedLocalLoss(norm)(p, -p, grid, grid)
    assert norm == "none" or opposite.item() == pytest.approx(4)
    scaled = PriorGuidedLocalLoss(norm)(p, 3 * p.detach(), grid, grid)
    assert norm == "none" or abs(scaled) < 1e-14


def test_voxel_norms_weigh_voxels_alike_and_one_norm_by_length():
    p, z, grid, _ = problem()
    louder = torch.where(torch.rand(2, 1, *SPACE[2]) < 0.5, 7.0, 1.0) * p
    here = torch.eye(2, 3, dtype=torch.float64).expand(2, -1, -1)
    channel, flat = PriorGuidedLocalLoss("channel"), PriorGuidedLocalLoss("flat")
    assert error([channel(louder, p + 1, here, here)], [channel(p, p + 1, here, here)]) < 1e-12
    assert abs(flat(louder, p + 1, here, here) - flat(p, p + 1, here, here)) > 1e-3


def test_targets_are_constants_of_the_gradient():
    p, z, grid1, grid2 = problem()
    p, z = p.detach(), z.detach()
    directions = [torch.randn_like(t) for t in (p, z)]
    inputs = [t.clone().requires_grad_() for t in (p, z)]
    for norm in ("channel", "flat", "none"):
        for detach in (True, False):
            loss = PriorGuidedLocalLoss(norm, detach_targets=detach)
            grads = gradients(loss(*inputs, grid1, grid2, size=(3, 4)), inputs)
            moving = [directions[0], torch.zeros_like(z)] if detach else directions
            want = slope(lambda a, b, norm=norm: written_out(a, b, grid1, grid2, (3, 4), norm), (p, z), moving)
            assert sum((g * d).sum() for g, d in zip(grads, directions, strict=True)).item() == pytest.approx(want, rel=1e-7)


@pytest.mark.parametrize("norm", ["channel", "flat", "none"])
def test_dropped_points_do_not_matter(norm):
    p, z, _, grid2 = problem()
    grid1 = torch.eye(2, 3, dtype=torch.float64).repeat(2, 1, 1)
    grid1[:, 0, 2] = 1.0  # the right half of the frame is outside the first map, whose left half is not looked at
    loss = PriorGuidedLocalLoss(norm, outside="drop", mode="nearest", padding_mode="zeros")
    grad = gradients(loss(p, z, grid1, grid2), (p,))[0]
    assert (grad[..., :3] == 0).all() and (grad[..., 4:] != 0).any()
    away = grid1 + torch.tensor([0.0, 0, 9])
    value = loss(p, z, away, grid2)
    assert value == 0 and (gradients(value, (p,))[0] == 0).all()
    one = grid1.clone()
    one[1] += torch.tensor([0.0, 0, 9])  # a sample without a point does not count
    assert_same(loss(p, z, one, grid2), loss(p[:1], z[:1], grid1[:1], grid2[:1]), (p,))


@pytest.mark.parametrize("norm", ["channel", "flat", "none"])
@pytest.mark.parametrize("first", [False, True])
def test_zero_vectors_are_finite(norm, first):
    p, z, grid1, grid2 = problem(dtype=torch.float32)
    with torch.no_grad():
        p.zero_()
        z[0].zero_()
    loss = PriorGuidedLocalLoss(norm, detach_targets=False, normalize_first=first)
    value = loss(p, z, grid1, grid2)
    assert value.isfinite() and all(g.isfinite().all() for g in gradients(value, (p, z)))
    if norm != "none":
        assert value == 2  # a vector without a direction is at right angles to all


def test_nan_reaches_the_loss():
    for k in range(2):
        p, z, grid1, grid2 = problem()
        with torch.no_grad():
            (p, z)[k][1, 0, 4, 3] = torch.nan
        for norm in ("channel", "flat", "none"):
            assert PriorGuidedLocalLoss(norm)(p, z, grid1, grid2).isnan()
        name = ("predictions_1", "targets_2")[k]
        with pytest.raises(ValueError, match=f"`{name}` must be finite, got 1 NaN or inf values of {(p, z)[k].numel()}"):
            PriorGuidedLocalLoss(check_finite=True)(p, z, grid1, grid2)


@pytest.mark.parametrize("norm", ["channel", "flat", "none"])
def test_float32_is_as_exact_as_pytorch(norm):
    p, z, grid1, grid2 = problem(dims=3, channels=32, dtype=torch.float32)
    exact = [t.detach().double().requires_grad_() for t in (p, z)]
    want = written_out(*exact, grid1.float().double(), grid2.float().double(), FRAME[3], norm, detach_targets=False)
    truth = [want, *gradients(want, exact)]
    loss = PriorGuidedLocalLoss(norm, detach_targets=False)
    for last in (False, True):
        if last:
            p, z = (t.detach().contiguous(memory_format=torch.channels_last_3d).requires_grad_() for t in (p, z))
        ours = loss(p, z, grid1.float(), grid2.float(), size=FRAME[3])
        theirs = written_out(p, z, grid1.float(), grid2.float(), FRAME[3], norm, detach_targets=False)
        assert ours.dtype == torch.float32
        assert error([ours, *gradients(ours, (p, z))], truth) < tolerance(error([theirs, *gradients(theirs, (p, z))], truth), torch.float32)


def test_half_precision_is_the_loss_of_the_rounded_maps():
    p, z, grid1, grid2 = problem(dtype=torch.float32)
    low = [t.detach().bfloat16().requires_grad_() for t in (p, z)]
    for options in ({}, {"normalize_first": True}, {"norm": "flat"}, {"norm": "none"}):
        got = PriorGuidedLocalLoss(**options)(*low, grid1, grid2)
        want = written_out(*(t.double() for t in low), grid1, grid2, SPACE[2], **options)
        assert got.dtype == torch.float32 and error([got], [want]) < 1e-5
        assert error(gradients(got, low[:1]), gradients(want, low[:1])) < torch.finfo(torch.bfloat16).eps


def test_no_warped_map_is_kept():
    p, z, grid1, grid2 = problem(channels=64, dtype=torch.float32)
    for norm in ("channel", "flat", "none"):
        loss = PriorGuidedLocalLoss(norm, detach_targets=False, outside="drop")
        kept = kept_mib(lambda loss=loss: loss(p, z, grid1, grid2, size=(32, 32)), p, z)
        assert 0 < kept < 0.2  # a few numbers a point; the two warped maps would take 1 MiB


def test_house():
    p, z, grid1, grid2 = problem(dtype=torch.float32)
    for options in ({}, {"norm": "flat", "outside": "drop", "normalize_first": True}):
        assert_house(PriorGuidedLocalLoss(**options), p, z, grid1, grid2, size=(4, 4))
    assert "norm='flat'" in repr(PriorGuidedLocalLoss("flat"))
    assert_compiles(PriorGuidedLocalLoss(outside="drop", normalize_first=True), (p,), p, z, grid1, grid2, size=(4, 4))


@pytest.mark.parametrize("options", [{}, {"norm": "flat", "outside": "drop", "normalize_first": True}])
def test_one_graph_serves_every_size(options):
    def problems():
        for height in range(20, 30):
            p, z = (torch.randn(2, 4, height + n, 17, requires_grad=True) for n in (0, 3))
            yield (p, z, affine(2, 2), affine(2, 2)), {}

    assert graphs(PriorGuidedLocalLoss(**options), problems()) <= 2


BAD = [
    (dict(norm="l2"), ValueError, "`norm` must be one of 'channel', 'flat', 'none', got 'l2'"),
    (dict(mode="bicubic"), ValueError, "`mode` must be one of"),
    (dict(outside="mask"), ValueError, "`outside` must be one of 'keep', 'drop'"),
    (dict(padding_mode="reflection"), ValueError, "`padding_mode` must be one of"),
    (dict(align_corners=1), TypeError, "`align_corners` must be a bool, got 1"),
    (dict(detach_targets="no"), TypeError, "`detach_targets` must be a bool, got 'no'"),
    (dict(backend="gpu"), ValueError, "`backend` must be one of"),
]


@pytest.mark.parametrize("options, kind, message", BAD)
def test_bad_options(options, kind, message):
    with pytest.raises(kind, match=message):
        PriorGuidedLocalLoss(**options)


def test_bad_input():
    p, z, grid1, grid2 = problem()
    cases = [
        ((p[0], z, grid1, grid2), {}, ValueError, r"`predictions_1` must have shape \[B, C, H, W\]"),
        ((p, z[:, :3], grid1, grid2), {}, ValueError, "`targets_2` must have the batch, channels and number of axes of predictions_1"),
        ((p, z.float(), grid1, grid2), {}, TypeError, "`targets_2` must be torch.float64"),
        ((p, z, grid1[:1], grid2), {}, ValueError, r"`grid1` must have shape \[2, 2, 3\]"),
        ((p, z, grid1, grid2.half()), {}, TypeError, "`grid2` must be float32 or float64"),
        ((p, z, grid1, grid2), {"size": (3, 3, 3)}, ValueError, "`size` must have 2 entries"),
    ]
    for arguments, extra, kind, message in cases:
        with pytest.raises(kind, match=message):
            PriorGuidedLocalLoss()(*arguments, **extra)


@pytest.mark.parametrize("shape, frame", [((7, 9), (3, 4)), ((4, 6, 5), (2, 5, 3))])
def test_box_grid_lands_on_the_stated_coordinates(shape, frame):
    dims = len(shape)
    low = torch.rand(4, dims, dtype=torch.float64) * torch.tensor(shape) / 2
    high = low + 1 + torch.rand(4, dims, dtype=torch.float64) * torch.tensor(shape) / 2
    flip = torch.rand(4, dims) < 0.5
    for flips in (None, flip):
        theta = box_grid(low, high, shape, flips)
        assert theta.dtype == torch.float64 and theta.shape == (4, dims, dims + 1)
        g = F.affine_grid(theta, (4, 1, *frame), align_corners=False)
        for n, axis in itertools.product(range(4), range(dims)):
            for point in itertools.product(*map(range, frame)):
                m = point[axis]
                u = low[n, axis] + (m + 0.5) / frame[axis] * (high[n, axis] - low[n, axis]) - 0.5
                u = shape[axis] - 1 - u if flips is not None and flips[n, axis] else u
                got = ((g[(n, *point)][dims - 1 - axis] + 1) * shape[axis] - 1) / 2
                assert got.item() == pytest.approx(u.item(), abs=1e-12)


@pytest.mark.parametrize("stride", [1, 2])
def test_two_crops_of_one_volume_have_no_distance(stride):
    volume = torch.randn(1, 3, 12, 16, 20, dtype=torch.float64)
    corners = torch.tensor([[0, 2, 4], [4, 6, 0]])  # of crops of 8 x 8 x 12
    flips = torch.tensor([[False, True, True], [True, False, True]])
    shape = (8, 8, 12)
    maps, grids = [], []
    low, high = corners.amax(0), (corners + torch.tensor(shape)).amin(0)  # what both see
    for corner, flip in zip(corners, flips, strict=True):
        crop = volume[(..., *(slice(c, c + n) for c, n in zip(corner.tolist(), shape, strict=True)))]
        crop = crop.flip([2 + axis for axis in range(3) if flip[axis]])
        maps.append(F.avg_pool3d(crop, stride))
        grids.append(box_grid((low - corner).double()[None], (high - corner).double()[None], shape, flip[None], features=maps[-1].shape[2:]))
    size = tuple(((high - low) // stride).tolist())
    for norm in ("channel", "flat", "none"):
        assert abs(PriorGuidedLocalLoss(norm)(*maps, *grids, size=size)) < 1e-12
        assert PriorGuidedLocalLoss(norm)(*maps, *grids[::-1], size=size) > 0.1


def test_thin_boxes_are_widened_to_a_voxel_of_the_map():
    low, high = torch.tensor([[2.0, 3.0]]), torch.tensor([[10.0, 4.0]])
    theta = box_grid(low, high, (16, 16), features=(4, 4))
    assert torch.equal(theta, box_grid(torch.tensor([[2.0, 1.5]]), torch.tensor([[10.0, 5.5]]), (16, 16)))
    assert torch.equal(box_grid(low, low, (16, 16)), box_grid(low - 0.5, low + 0.5, (16, 16)))
    assert theta.dtype == torch.float32 and box_grid(low.half(), high.half(), (16, 16)).dtype == torch.float32
    whole = box_grid(torch.zeros(2, 3), torch.tensor([[4.0, 5, 6]]).expand(2, 3), (4, 5, 6))
    assert torch.equal(whole, torch.eye(3, 4).expand(2, 3, 4))


def test_bad_boxes():
    low, high = torch.zeros(2, 3), torch.ones(2, 3)
    for arguments, extra, kind, message in (
        ((low.long(), high, (4, 4, 4)), {}, TypeError, "`low` must be floating, got int64"),
        ((low, high, (4, 4)), {}, ValueError, r"`low` must have shape \[B, 2\] for the 2 or 3 axes of shape \(4, 4\), got \(2, 3\)"),
        ((low, high[:1], (4, 4, 4)), {}, ValueError, r"`high` must have shape \(2, 3\) as `low` has, got \(1, 3\)"),
        ((low, high, (4, 4, 0)), {}, ValueError, r"`shape` must have 3 entries >= 1, got \(4, 4, 0\)"),
        ((low, high, (4, 4, 4)), {"features": (2, 2)}, ValueError, r"`features` must have 3 entries >= 1, got \(2, 2\)"),
        ((low, high, (4, 4, 4), low), {}, TypeError, "`flip` must be bool, got float32"),
        ((low, high, (4, 4, 4), low[:1] > 0), {}, ValueError, r"`flip` must have shape \(2, 3\)"),
    ):
        with pytest.raises(kind, match=message):
            box_grid(*arguments, **extra)
