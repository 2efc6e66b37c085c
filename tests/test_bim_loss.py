"""BoundaryInfoMaxLoss against the official formulas written out (regularised mutual information, boundary term, IIC's variants)."""

import math

import pytest
import torch
import torch.nn.functional as F

from loss_helpers import SPACE, assert_same, bim, bim_problem, entropy, gradient_magnitude, gradients, scaled, slope
from pix2rep_kernels import BoundaryInfoMaxLoss
from pix2rep_kernels.testing import error

VARIANTS = [  # options of the module, those of loss_helpers.bim where they are called otherwise
    ({}, {}),
    ({"alpha": 0.0}, {}),
    ({"alpha": 1.0, "lamda": 1.5}, {}),
    ({"alpha": 0.25, "lamda": 0}, {}),
    ({"boundary_weight": 0, "information_weight": 2}, {"w_cc": 0, "w_rr": 2}),
    ({"boundary_weight": 0.1, "information_weight": 0}, {"w_cc": 0.1, "w_rr": 0}),
    ({"window": 3, "power": 0.5}, {}),
    ({"symmetric": False}, {}),
    ({"radius": 1}, {}),
    ({"radius": 2, "symmetric": False}, {"detach_normalizer": True}),
    ({"radius": 1, "collapsed": False}, {}),
    ({"detach_target": True}, {}),
    ({"eps": 1e-10}, {}),
    ({"alpha": 0.0, "eps": 2.2e-16, "eps_mode": "clamp", "radius": 1}, {"clamp": True}),
    ({"eps": 0.06, "eps_mode": "clamp"}, {"clamp": True}),  # about half of P is below
    ({"wrap": False}, {}),
    ({"boundary_on": "first"}, {}),
    ({"boundary_on": "second"}, {}),
]


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("ours, theirs", VARIANTS, ids=str)
def test_is_the_official_loss(ours, theirs, dims):
    a, b, image = bim_problem(dims=dims)
    renamed = {k: v for k, v in ours.items() if k not in ("boundary_weight", "information_weight", "eps_mode")}
    assert_same(BoundaryInfoMaxLoss(**ours)(a, b, image), bim(a, b, image, **renamed, **theirs), (a, b))


def test_heads_are_averaged_and_share_the_edges():
    heads = [bim_problem(k)[:2] for k in (3, 5, 5)]
    image = torch.rand(2, 1, *SPACE[2])
    firsts, seconds = [list(maps) for maps in zip(*heads, strict=True)]
    want = sum(bim(a, b, image) for a, b in heads) / 3
    assert_same(BoundaryInfoMaxLoss()(firsts, seconds, image), want, firsts + seconds)
    assert_same(BoundaryInfoMaxLoss()(tuple(firsts[:1]), seconds[:1], image), bim(*heads[0], image), heads[0])


@pytest.mark.parametrize("dims", [2, 3])
def test_a_larger_image_is_resized(dims):
    a, b, _ = bim_problem(dims=dims)
    image = torch.rand(2, 3, *(2 * n + 1 for n in SPACE[dims]), dtype=torch.float64)
    assert_same(BoundaryInfoMaxLoss()(a, b, image), bim(a, b, image), (a, b))


def masked(a, b, image, mask, radius, collapsed):
    """With m = mask: pairs of pixels of m alone, windows that see 0 elsewhere, edges between pixels of m alone."""
    m = mask.unsqueeze(1).to(a.dtype)
    p, q = ((t.softmax(1) * m).transpose(0, 1) for t in (a, b))
    joint = F.conv2d(p, q, padding=radius).flatten(2)
    values = []
    joints = [joint.sum(2)] if collapsed else joint.unbind(2)
    for joint in joints:
        joint = joint / joint.sum()
        joint = (joint + joint.T) / 2
        target = 0.5 * torch.eye(len(joint)) / len(joint) + 0.5 * joint
        logs = (joint.sum(1) + 1e-5).log().unsqueeze(1) + (joint.sum(0) + 1e-5).log()
        values.append((joint * logs - target * (joint + 1e-5).log()).sum())
    edges = torch.zeros_like(image[:, :1])
    for n, y, x in mask.nonzero().tolist():
        for channel in image[n]:
            up = (channel[y, x] - channel[y - 1, x]) * mask[n, y - 1, x]
            left = (channel[y, x] - channel[y, x - 1]) * mask[n, y, x - 1]
            edges[n, 0, y, x] += (up**2 + left**2) ** 0.5 / len(image[n])
    kernel, total = a.new_ones(1, 1, 5, 5), 0
    for t in (a, b):
        h = entropy(t)
        unit = []
        for x in (h, edges):
            low, high = (torch.stack([f(x[n, 0][mask[n]]).detach() for n in range(len(x))]) for f in (torch.min, torch.max))
            unit.append(m * (x - low.reshape(-1, 1, 1, 1)) / (high - low + 1e-6).reshape(-1, 1, 1, 1))
        i, j = unit[0], unit[1] ** 0.75
        box = [F.conv2d(x, kernel, padding=2) for x in (i, j, i * i, j * j, i * j)]
        cross, v, w = ((x - y / 25).clamp(min=1e-5) for x, y in ((box[4], box[0] * box[1]), (box[2], box[0] ** 2), (box[3], box[1] ** 2)))
        total = total - ((cross**2 / (v * w)) * m).sum() / m.sum()
    return sum(values) / len(values) + total / 2


@pytest.mark.parametrize("radius, collapsed", [(0, True), (1, True), (1, False)])
def test_mask(radius, collapsed):
    a, b, image = bim_problem()
    mask = torch.rand(2, *SPACE[2]) > 0.3
    loss = BoundaryInfoMaxLoss(radius=radius, collapsed=collapsed)
    want = masked(a, b, image, mask, radius, collapsed)
    assert_same(loss(a, b, image, mask=mask), want, (a, b))
    hidden = ~mask.unsqueeze(1)
    bad = [torch.where(hidden, torch.nan, t.detach()).requires_grad_() for t in (a, b)]
    got = loss(*bad, torch.where(hidden, torch.nan, image), mask=mask.unsqueeze(1))
    assert error([got], [want]) < 1e-10
    for g, w in zip(gradients(got, bad), gradients(want, (a, b)), strict=True):
        assert error([g], [w]) < 1e-10 and (g[hidden.expand_as(g)] == 0).all()
    with torch.no_grad():
        bad[0][0, 1][mask[0]] = torch.nan
    assert loss(*bad, image, mask=mask).isnan()


def test_an_image_or_a_batch_without_a_pixel_that_counts():
    a, b, image = bim_problem()
    mask = torch.ones(2, *SPACE[2], dtype=torch.bool)
    everything = BoundaryInfoMaxLoss(wrap=False)
    assert_same(everything(a, b, image, mask=mask), bim(a, b, image, wrap=False), (a, b))
    mask[1] = False
    assert_same(BoundaryInfoMaxLoss()(a, b, image, mask=mask), bim(a[:1], b[:1], image[:1]), (a, b))
    none = BoundaryInfoMaxLoss()(a, b, image, mask=torch.zeros_like(mask))
    assert none == 0 and all((g == 0).all() for g in gradients(none, (a, b)))


def test_without_target_it_is_minus_the_mutual_information():
    a, b, image = bim_problem()
    p, q = (t.softmax(1).transpose(0, 1).flatten(1) for t in (a, b))
    joint = (p @ q.T + q @ p.T) / (2 * p.shape[1])
    information = (joint * (joint / torch.outer(joint.sum(0), joint.sum(1))).log()).sum()
    assert_same(BoundaryInfoMaxLoss(alpha=0, boundary_weight=0, eps=1e-30)(a, b, image), -information, (a, b))
    one_hot = 60.0 * F.one_hot(torch.arange(64).reshape(1, 8, 8) % 4, 4).movedim(-1, 1).double()
    best = BoundaryInfoMaxLoss(alpha=0, boundary_weight=0, eps=1e-30)(one_hot, one_hot, torch.zeros(1, 1, 8, 8))
    assert best == pytest.approx(-math.log(4), rel=1e-6)  # balanced and consistent: I = log K


def test_all_target_wants_the_diagonal():
    a, b, image = bim_problem()
    p, q = (t.softmax(1).transpose(0, 1).flatten(1) for t in (a, b))
    joint = (p @ q.T + q @ p.T) / (2 * p.shape[1])
    marginal = joint.sum(0)
    want = -joint.diag().log().mean() + 2 * 0.7 * (marginal * marginal.log()).sum()
    assert_same(BoundaryInfoMaxLoss(alpha=1, lamda=0.7, boundary_weight=0, eps=1e-30)(a, b, image), want, (a, b))


@pytest.mark.parametrize("options", [{}, {"symmetric": False}, {"radius": 1, "collapsed": False, "symmetric": False}], ids=str)
def test_order_of_views_and_of_pixels(options):
    a, b, image = bim_problem()
    loss = BoundaryInfoMaxLoss(**options)
    assert_same(loss(a, b, image), loss(b, a, image), (a, b))
    if "radius" not in options:
        order = torch.randperm(63)
        shuffled = [t.flatten(2)[:, :, order].reshape(t.shape) for t in (a, b)]
        plain = BoundaryInfoMaxLoss(boundary_weight=0, **options)
        assert_same(plain(*shuffled, image), plain(a, b, image), (a, b))


def entropy_map(target):
    """Logits [B, 2, *S] whose entropy is an increasing affine function of `target` in [0, 1], to first order."""
    x = 1 - 1e-3 * target
    return torch.cat([x, torch.zeros_like(x)], 1).requires_grad_()


def test_boundary_term_at_its_ends():
    image = F.avg_pool2d(torch.rand(2, 1, 16, 16, dtype=torch.float64), 3, 1)
    edges = scaled(gradient_magnitude(image)) ** 0.75
    loss = BoundaryInfoMaxLoss(information_weight=0)
    ridge, against = entropy_map(edges), entropy_map(1 - edges)
    assert loss(ridge, ridge, image) < -0.99  # uncertain exactly where the edges are
    gradient = gradients(loss(against, against, image), (against,))[0]
    # Every window that does not see the zero padding is anti-correlated: its covariance is clamped, the variance alone still gives about eps^2.
    assert gradient[:, :, 4:-4, 4:-4].abs().max() < 1e-6 * gradient.abs().max()


def test_a_constant_image_has_no_edges():
    a, b, image = bim_problem()
    value = BoundaryInfoMaxLoss()(a, b, torch.full_like(image, 0.3))
    assert value.isfinite() and all(g.isfinite().all() for g in gradients(value, (a, b)))
    assert_same(value, bim(a, b, torch.full_like(image, 0.3)), (a, b))
    flat = torch.zeros_like(a).requires_grad_()  # and uniform clusters: no range either
    value = BoundaryInfoMaxLoss()(flat, flat, torch.zeros_like(image))
    assert value.isfinite() and gradients(value, (flat,))[0].isfinite().all()


def test_range_and_target_are_constants_of_the_gradient():
    a, b, image = (t.detach() for t in bim_problem())
    directions = [torch.randn_like(t) for t in (a, b)]
    ranges = {a.shape: None}
    free = slope(lambda x, y: bim(x, y, image), (a, b), directions)
    inputs = [t.clone().requires_grad_() for t in (a, b)]

    def ours(**options):
        return sum((g * d).sum() for g, d in zip(gradients(BoundaryInfoMaxLoss(**options)(*inputs, image), inputs), directions, strict=True))

    # One map at a time, so that its range is known by its shape.
    ranges[a.shape] = [(h.min(), h.max()) for h in entropy(a)]
    joint = torch.einsum("bkp,blp->kl", a.softmax(1).flatten(2), b.softmax(1).flatten(2)) / (2 * 63)
    target = 0.5 * torch.eye(4) / 4 + 0.25 * (joint + joint.T)
    only = slope(lambda x, y: bim(x, y, image, boundary_on="first", frozen={"ranges": ranges, "target": target}), (a, b), directions)
    assert ours(boundary_on="first", detach_target=True).item() == pytest.approx(only, rel=1e-7)
    assert abs(ours().item() - free) > 1e-4 * abs(free)  # the true slope is another: min and max move
    plain = slope(lambda x, y: bim(x, y, image, w_cc=0), (a, b), directions)
    assert ours(boundary_weight=0).item() == pytest.approx(plain, rel=1e-7)  # T does carry gradient


def test_no_gradient_to_the_image_and_nan_reaches_the_loss():
    a, b, image = bim_problem()
    image.requires_grad_()
    assert torch.autograd.grad(BoundaryInfoMaxLoss()(a, b, image), image, allow_unused=True) == (None,)
    for k in range(3):
        given = [t.detach().clone() for t in (a, b, image)]
        given[k][1, 0, 3, 2] = torch.nan
        assert BoundaryInfoMaxLoss()(*given).isnan()
        with pytest.raises(ValueError, match=f"`{('logits_1', 'logits_2', 'image')[k]}` must be finite, got 1 NaN or inf"):
            BoundaryInfoMaxLoss(check_finite=True)(*given)


def test_a_cluster_may_be_forbidden():
    a, b, image = bim_problem()
    with torch.no_grad():
        a[:, 1] = b[:, 1] = -torch.inf
    value = BoundaryInfoMaxLoss()(a, b, image)
    assert value.isfinite() and all(g.isfinite().all() for g in gradients(value, (a, b)))
