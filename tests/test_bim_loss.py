"""BoundaryInfoMaxLoss against the official formulas written out (regularised mutual information, boundary term, IIC's variants)."""

import math

import pytest
import torch
import torch.nn.functional as F

from loss_helpers import SPACE, assert_compiles, assert_house, assert_same, gradients, graphs, slope, variable
from pix2rep_kernels import BoundaryInfoMaxLoss
from pix2rep_kernels.testing import error, tolerance


def official(a, b, image, *, alpha=0.5, lamda=1.0, w_rr=1.0, w_cc=1.0, power=0.75, boundary_on="both", wrap=True, window=5, frozen=None, **information):
    """One head: w_rr RR + w_cc CC."""
    total = w_rr * redundancy(a, b, alpha, lamda, frozen=frozen, **information)
    image = image.to(a.dtype)
    if image.shape[2:] != a.shape[2:]:
        image = F.interpolate(image, size=a.shape[2:], mode="bilinear" if a.ndim == 4 else "trilinear", align_corners=False)
    edges = scaled(gradient_magnitude(image, wrap)) ** power
    maps = {"both": (a, b), "first": (a,), "second": (b,)}[boundary_on]
    terms = [correlation(scaled(entropy(x), None if frozen is None else frozen["ranges"][x.shape]), edges, window) for x in maps]
    return total + w_cc * sum(terms) / len(terms)


def redundancy(a, b, alpha, lamda, radius=0, collapsed=True, symmetric=True, detach_target=False, detach_normalizer=False, eps=1e-5, clamp=False, frozen=None):
    """RR. The joint of every displacement at once by a convolution of the class maps, as in IIC's code."""
    k = a.shape[1]
    p, q = (t.softmax(1).transpose(0, 1) for t in (a, b))  # [K, B, *S]: classes are the batch, images the channels
    joint = (F.conv2d if a.ndim == 4 else F.conv3d)(p, q, padding=radius).flatten(2)  # [K, K, displacements]
    joints = [joint.sum(2)] if collapsed else list(joint.unbind(2))
    values = []
    for joint in joints:
        normaliser = joint.sum()
        joint = joint / (normaliser.detach() if detach_normalizer else normaliser)
        joint = (joint + joint.T) / 2 if symmetric else joint
        rows, columns = joint.sum(1), joint.sum(0)
        added = 0 if clamp else eps
        if clamp:
            joint, rows, columns = (torch.where(t < eps, eps, t) for t in (joint, rows, columns))
        value = 0
        for i in range(k):
            for j in range(k):
                target = alpha / k * (i == j) + (1 - alpha) * joint[i, j]
                if detach_target:
                    target = target.detach()
                if frozen is not None:
                    target = frozen["target"][i, j]
                value = value - target * (joint[i, j] + added).log()
                value = value + lamda * joint[i, j] * ((rows[i] + added).log() + (columns[j] + added).log())
        values.append(value)
    return sum(values) / len(values)


def entropy(x):
    c = x.softmax(1)
    return -(c * (c + 1e-16).log()).sum(1, keepdim=True)


def gradient_magnitude(image, wrap=True):
    squares = 0
    for axis in range(2, image.ndim):
        difference = image - image.roll(1, axis)
        if not wrap:
            difference.select(axis, 0).zero_()
        squares = squares + difference**2
    return squares.sqrt().mean(1, keepdim=True)


def scaled(x, ranges=None):
    found = []
    for n, one in enumerate(x):
        low, high = (one.min().detach(), one.max().detach()) if ranges is None else ranges[n]
        found.append((one - low) / (high - low + 1e-6))
    return torch.stack(found)


def correlation(i, j, window=5):
    dims = i.ndim - 2
    kernel, n = i.new_ones(1, 1, *[window] * dims), window**dims

    def box(t):
        return (F.conv2d if dims == 2 else F.conv3d)(t, kernel, padding=window // 2)

    def at_least(t):
        return torch.maximum(t, torch.full_like(t, 1e-5))

    s_i, s_j = box(i), box(j)
    cross = at_least(box(i * j) - s_i * s_j / n)
    return -(cross**2 / (at_least(box(i * i) - s_i**2 / n) * at_least(box(j * j) - s_j**2 / n))).mean()


def problem(k=4, dims=2, batch=2, channels=2, dtype=torch.float64):
    a, b = (variable(batch, k, *SPACE[dims], dtype=dtype) for _ in range(2))
    return a, b, torch.rand(batch, channels, *SPACE[dims], dtype=dtype)


VARIANTS = [  # options of the module, those of the formula above where they are called otherwise
    ({}, {}),
    ({"alpha": 0.0}, {}),
    ({"alpha": 1.0, "lamda": 1.5}, {}),
    ({"alpha": 0.25, "lamda": 0}, {}),
    ({"boundary_weight": 0, "information_weight": 2}, {"w_cc": 0, "w_rr": 2}),
    ({"boundary_weight": 0.1, "information_weight": 0}, {"w_cc": 0.1, "w_rr": 0}),
    ({"window": 3, "power": 0.5}, {}),
    ({"symmetric": False}, {}),
    ({"radius": 1}, {}),
    ({"radius": 2, "detach_normalizer": True, "symmetric": False}, {}),
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
    a, b, image = problem(dims=dims)
    renamed = {k: v for k, v in ours.items() if k not in ("boundary_weight", "information_weight", "eps_mode")}
    assert_same(BoundaryInfoMaxLoss(**ours)(a, b, image), official(a, b, image, **renamed, **theirs), (a, b))


def test_heads_are_averaged_and_share_the_edges():
    heads = [problem(k)[:2] for k in (3, 5, 5)]
    image = torch.rand(2, 1, *SPACE[2])
    firsts, seconds = [list(maps) for maps in zip(*heads, strict=True)]
    want = sum(official(a, b, image) for a, b in heads) / 3
    assert_same(BoundaryInfoMaxLoss()(firsts, seconds, image), want, firsts + seconds)
    assert_same(BoundaryInfoMaxLoss()(tuple(firsts[:1]), seconds[:1], image), official(*heads[0], image), heads[0])


@pytest.mark.parametrize("dims", [2, 3])
def test_a_larger_image_is_resized(dims):
    a, b, _ = problem(dims=dims)
    image = torch.rand(2, 3, *(2 * n + 1 for n in SPACE[dims]), dtype=torch.float64)
    assert_same(BoundaryInfoMaxLoss()(a, b, image), official(a, b, image), (a, b))


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
    a, b, image = problem()
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
    a, b, image = problem()
    mask = torch.ones(2, *SPACE[2], dtype=torch.bool)
    everything = BoundaryInfoMaxLoss(wrap=False)
    assert_same(everything(a, b, image, mask=mask), official(a, b, image, wrap=False), (a, b))
    mask[1] = False
    assert_same(BoundaryInfoMaxLoss()(a, b, image, mask=mask), official(a[:1], b[:1], image[:1]), (a, b))
    none = BoundaryInfoMaxLoss()(a, b, image, mask=torch.zeros_like(mask))
    assert none == 0 and all((g == 0).all() for g in gradients(none, (a, b)))


def test_without_target_it_is_minus_the_mutual_information():
    a, b, image = problem()
    p, q = (t.softmax(1).transpose(0, 1).flatten(1) for t in (a, b))
    joint = (p @ q.T + q @ p.T) / (2 * p.shape[1])
    information = (joint * (joint / torch.outer(joint.sum(0), joint.sum(1))).log()).sum()
    assert_same(BoundaryInfoMaxLoss(alpha=0, boundary_weight=0, eps=1e-30)(a, b, image), -information, (a, b))
    one_hot = 60.0 * F.one_hot(torch.arange(64).reshape(1, 8, 8) % 4, 4).movedim(-1, 1).double()
    best = BoundaryInfoMaxLoss(alpha=0, boundary_weight=0, eps=1e-30)(one_hot, one_hot, torch.zeros(1, 1, 8, 8))
    assert best == pytest.approx(-math.log(4), rel=1e-6)  # balanced and consistent: I = log K


def test_all_target_wants_the_diagonal():
    a, b, image = problem()
    p, q = (t.softmax(1).transpose(0, 1).flatten(1) for t in (a, b))
    joint = (p @ q.T + q @ p.T) / (2 * p.shape[1])
    marginal = joint.sum(0)
    want = -joint.diag().log().mean() + 2 * 0.7 * (marginal * marginal.log()).sum()
    assert_same(BoundaryInfoMaxLoss(alpha=1, lamda=0.7, boundary_weight=0, eps=1e-30)(a, b, image), want, (a, b))


@pytest.mark.parametrize("options", [{}, {"symmetric": False}, {"radius": 1, "collapsed": False, "symmetric": False}], ids=str)
def test_order_of_views_and_of_pixels(options):
    a, b, image = problem()
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
    a, b, image = problem()
    value = BoundaryInfoMaxLoss()(a, b, torch.full_like(image, 0.3))
    assert value.isfinite() and all(g.isfinite().all() for g in gradients(value, (a, b)))
    assert_same(value, official(a, b, torch.full_like(image, 0.3)), (a, b))
    flat = torch.zeros_like(a).requires_grad_()  # and uniform clusters: no range either
    value = BoundaryInfoMaxLoss()(flat, flat, torch.zeros_like(image))
    assert value.isfinite() and gradients(value, (flat,))[0].isfinite().all()


def test_range_and_target_are_constants_of_the_gradient():
    a, b, image = (t.detach() for t in problem())
    directions = [torch.randn_like(t) for t in (a, b)]
    ranges = {a.shape: None}
    free = slope(lambda x, y: official(x, y, image), (a, b), directions)
    inputs = [t.clone().requires_grad_() for t in (a, b)]

    def ours(**options):
        return sum((g * d).sum() for g, d in zip(gradients(BoundaryInfoMaxLoss(**options)(*inputs, image), inputs), directions, strict=True))

    # One map at a time, so that its range is known by its shape.
    ranges[a.shape] = [(h.min(), h.max()) for h in entropy(a)]
    joint = torch.einsum("bkp,blp->kl", a.softmax(1).flatten(2), b.softmax(1).flatten(2)) / (2 * 63)
    target = 0.5 * torch.eye(4) / 4 + 0.25 * (joint + joint.T)
    only = slope(lambda x, y: official(x, y, image, boundary_on="first", frozen={"ranges": ranges, "target": target}), (a, b), directions)
    assert ours(boundary_on="first", detach_target=True).item() == pytest.approx(only, rel=1e-7)
    assert abs(ours().item() - free) > 1e-4 * abs(free)  # the true slope is another: min and max move
    plain = slope(lambda x, y: official(x, y, image, w_cc=0), (a, b), directions)
    assert ours(boundary_weight=0).item() == pytest.approx(plain, rel=1e-7)  # T does carry gradient


def test_no_gradient_to_the_image_and_nan_reaches_the_loss():
    a, b, image = problem()
    image.requires_grad_()
    assert torch.autograd.grad(BoundaryInfoMaxLoss()(a, b, image), image, allow_unused=True) == (None,)
    for k in range(3):
        given = [t.detach().clone() for t in (a, b, image)]
        given[k][1, 0, 3, 2] = torch.nan
        assert BoundaryInfoMaxLoss()(*given).isnan()
        with pytest.raises(ValueError, match=f"`{('logits_1', 'logits_2', 'image')[k]}` must be finite, got 1 NaN or inf"):
            BoundaryInfoMaxLoss(check_finite=True)(*given)


def test_a_cluster_may_be_forbidden():
    a, b, image = problem()
    with torch.no_grad():
        a[:, 1] = b[:, 1] = -torch.inf
    value = BoundaryInfoMaxLoss()(a, b, image)
    assert value.isfinite() and all(g.isfinite().all() for g in gradients(value, (a, b)))


@pytest.mark.parametrize("last", [False, True])
def test_float32_is_as_exact_as_pytorch(last):
    a, b, image = problem(k=12, dtype=torch.float32)
    if last:
        a, b = (t.detach().contiguous(memory_format=torch.channels_last).requires_grad_() for t in (a, b))
    exact = [t.detach().double().requires_grad_() for t in (a, b)]
    want = official(*exact, image.double())
    truth = [want, *gradients(want, exact)]
    ours, theirs = (f(a, b, image) for f in (BoundaryInfoMaxLoss(), official))
    assert ours.dtype == torch.float32
    assert error([ours, *gradients(ours, (a, b))], truth) < tolerance(error([theirs, *gradients(theirs, (a, b))], truth), torch.float32)


def test_half_precision_is_the_loss_of_the_rounded_logits():
    a, b, image = problem(dtype=torch.float32)
    low = [t.detach().bfloat16().requires_grad_() for t in (a, b)]
    got, want = BoundaryInfoMaxLoss()(*low, image), official(*(t.float() for t in low), image)
    assert got.dtype == torch.float32 and error([got], [want]) < 1e-5
    assert error(gradients(got, low), gradients(want, low)) < torch.finfo(torch.bfloat16).eps


def test_house():
    a, b, image = problem(dtype=torch.float32)
    mask = torch.rand(2, *SPACE[2]) > 0.2
    for options in ({}, {"radius": 1, "collapsed": False, "wrap": False, "eps_mode": "clamp"}):
        assert_house(BoundaryInfoMaxLoss(**options), [a, b], [b, a], image, mask=mask)
    assert "alpha=0.25" in repr(BoundaryInfoMaxLoss(0.25))
    assert_compiles(BoundaryInfoMaxLoss(radius=1), (a, b), [a, b], [b, a], image, mask=mask)


@pytest.mark.parametrize("larger", [0, 5])
def test_one_graph_serves_every_size(larger):
    def problems():
        for height in range(20, 30):
            a, b = (torch.randn(2, 4, height, 17, requires_grad=True) for _ in range(2))
            yield (a, b, torch.rand(2, 1, height + larger, 17 + larger)), {"mask": torch.rand(2, height, 17) > 0.2}

    assert graphs(BoundaryInfoMaxLoss(), problems()) <= 2


BAD = [
    (dict(alpha=1.5), ValueError, r"`alpha` must be in \[0, 1\], got 1.5"),
    (dict(alpha=None), TypeError, "`alpha` must be a float, got None"),
    (dict(lamda=-1), ValueError, "`lamda` must be >= 0 and finite, got -1"),
    (dict(window=4), ValueError, "`window` must be odd and > 0, got 4"),
    (dict(power=0), ValueError, "`power` must be > 0 and finite, got 0"),
    (dict(eps=0), ValueError, "`eps` must be in .*, got 0"),
    (dict(eps_mode="max"), ValueError, "`eps_mode` must be one of 'add', 'clamp', got 'max'"),
    (dict(radius=1.0), TypeError, "`radius` must be an int, got 1.0"),
    (dict(radius=-1), ValueError, "`radius` must be >= 0, got -1"),
    (dict(collapsed=1), TypeError, "`collapsed` must be a bool, got 1"),
    (dict(boundary_on="none"), ValueError, "`boundary_on` must be one of 'both', 'first', 'second'"),
    (dict(backend="gpu"), ValueError, "`backend` must be one of"),
]


@pytest.mark.parametrize("options, kind, message", BAD)
def test_bad_options(options, kind, message):
    with pytest.raises(kind, match=message):
        BoundaryInfoMaxLoss(**options)


def test_bad_input():
    a, b, image = problem()
    cases = [
        ((a[0], b[0], image), {}, ValueError, r"`logits_1` must have shape \[B, C, H, W\]"),
        ((a, b[:, :3], image), {}, ValueError, "`logits_2` must have the shape of logits_1"),
        ((a, b.float(), image), {}, TypeError, "`logits_2` must be torch.float64"),
        ((a, [b], image), {}, ValueError, "`logits_2` must be a tensor or a list as `logits_1` is, got list"),
        (([a, a], [b], image), {}, ValueError, "`logits_2` must hold 2 heads as `logits_1` does, got 1"),
        (([], [], image), {}, ValueError, "`logits_1` must hold at least one head"),
        (([a, a[:, :, 1:]], [b, b[:, :, 1:]], image), {}, ValueError, r"`logits_1\[1\]` must have the batch and space of logits_1\[0\]"),
        (([a, a], [b, b.float()], image), {}, TypeError, r"`logits_2\[1\]` must be torch.float64"),
        ((a, "b", image), {}, TypeError, "`logits_2` must be a torch.Tensor or a list of them, got str"),
        ((a, b, image[:1]), {}, ValueError, r"`image` must have shape \[2, channels, \*S'\]"),
        ((a, b, image.long()), {}, TypeError, "`image` must be float16"),
        ((a, b, image), {"mask": torch.ones(2, 3, 3, dtype=torch.bool)}, ValueError, "`mask` must have shape"),
        ((a, b, image), {"mask": torch.ones(2, *SPACE[2])}, TypeError, "`mask` must be bool"),
    ]
    for arguments, extra, kind, message in cases:
        with pytest.raises(kind, match=message):
            BoundaryInfoMaxLoss()(*arguments, **extra)
