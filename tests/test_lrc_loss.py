"""LocalRegionContrastLoss against its formula written out, region by region, and every argument of it."""

import pytest
import torch
import torch.nn.functional as F

from loss_helpers import SPACE, assert_compiles, assert_house, assert_same, gradients, graphs, kept_mib, variable
from pix2rep_kernels import LocalRegionContrastLoss
from pix2rep_kernels.testing import error, tolerance

REGIONS = 7


def means(features, labels, regions, normalize_first):
    """{(image, region): unit mean} over the pixels of each region that has any."""
    found = {}
    for n, (image, label) in enumerate(zip(features, labels, strict=True)):
        for r in range(regions):
            pixels = image[:, label == r].T  # [pixels, C]
            if len(pixels):
                pixels = F.normalize(pixels, dim=1) if normalize_first else pixels
                found[n, r] = F.normalize(pixels.mean(0), dim=0)
    return found


def written_out(
    features_q, features_k, labels_q, labels_k=None, *, temperature=0.1, max_regions=REGIONS, normalize_first=False, negatives="image", symmetric=False,
    min_pixels=1, detach_keys=True, sizes=None,
):  # fmt: skip
    """Mean over the regions of both views of -log( exp(<q, k>/tau) / sum_m exp(<q, k_m>/tau) ). `sizes`: labels that decide about min_pixels."""
    labels_k = labels_q if labels_k is None else labels_k
    q = means(features_q, labels_q, max_regions, normalize_first)
    k = means(features_k.detach() if detach_keys else features_k, labels_k, max_regions, normalize_first)
    whole_q, whole_k = (labels_q, labels_k) if sizes is None else sizes
    both = [x for x in q if x in k and min(int((whole[x[0]] == x[1]).sum()) for whole in (whole_q, whole_k)) >= min_pixels]
    losses = []
    for anchors, candidates in ((q, k), (k, q))[: 2 if symmetric else 1]:
        for x in both:
            others = [y for y in both if negatives == "batch" or y[0] == x[0]]
            s = torch.stack([anchors[x] @ candidates[y] for y in others]) / temperature
            losses.append(torch.logsumexp(s, 0) - s[others.index(x)])
    return torch.stack(losses).mean()


def problem(dims=2, batch=3, channels=5, dtype=torch.float64):
    q, k = (variable(batch, channels, *SPACE[dims], dtype=dtype) for _ in range(2))
    return q, k, torch.randint(-2, REGIONS + 2, (batch, *SPACE[dims]))


VARIANTS = [
    {},
    {"temperature": 0.5},
    {"normalize_first": True},
    {"negatives": "batch"},
    {"detach_keys": False},
    {"symmetric": True, "detach_keys": False, "negatives": "batch"},
    {"symmetric": True},
    {"min_pixels": 8},
]


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_is_the_formula(options, dims):
    q, k, labels = problem(dims)
    loss = LocalRegionContrastLoss(max_regions=REGIONS, **options)
    assert_same(loss(q, k, labels), written_out(q, k, labels, **options), (q, k))
    other = torch.where(torch.rand(labels.shape) < 0.3, torch.randint(-1, REGIONS, labels.shape), labels)
    other[1][other[1] == 3] = -1  # a region of one view only
    labels[2].flatten()[:12], other[2].flatten()[:9] = 5, -1  # and one that is large in one view, small in the other
    assert_same(loss(q, k, labels, other), written_out(q, k, labels, other, **options), (q, k))


def test_views_of_different_size():
    q, k, labels = problem()
    larger, labels_k = variable(3, 5, 12, 11), torch.randint(-1, REGIONS, (3, 12, 11))
    assert_same(LocalRegionContrastLoss(max_regions=REGIONS)(q, larger, labels, labels_k), written_out(q, larger, labels, labels_k), (q, larger))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_integer_labels(dtype):
    q, k, labels = problem()
    labels = labels.clamp(min=0)
    for samples in (None, 100):
        got = LocalRegionContrastLoss(max_regions=REGIONS, num_samples=samples)(q, k, labels.to(dtype))
        assert_same(got, written_out(q, k, labels), (q, k))


def test_one_pixel_a_region_is_pixel_contrast():
    q, k, _ = problem(batch=1)
    labels = torch.arange(63).reshape(1, 9, 7)
    rows_q, rows_k = (F.normalize(f.flatten(2)[0].T, dim=1) for f in (q, k.detach()))
    want = F.cross_entropy(rows_q @ rows_k.T / 0.1, torch.arange(63))
    for options in ({}, {"normalize_first": True}, {"num_samples": 1}, {"max_regions": 63}):
        assert_same(LocalRegionContrastLoss(**options)(q, k, labels), want, (q, k))


def drawn(gradient, labels, r):
    """Which pixels of region r have a gradient, [B, *S]."""
    return (gradient.abs().sum(1) > 0) & (labels == r)


@pytest.mark.parametrize("normalize_first", [False, True])
@pytest.mark.parametrize("same", [False, True])
def test_draw(same, normalize_first):
    q, k, labels = problem()
    options = dict(detach_keys=False, normalize_first=normalize_first)
    loss = LocalRegionContrastLoss(max_regions=REGIONS, num_samples=4, same_samples=same, **options)
    value = loss(q, k, labels)
    grads = gradients(value, (q, k))
    for r in range(REGIONS):
        for g in grads:
            want = (labels == r).flatten(1).sum(1).clamp(max=4)
            assert torch.equal(drawn(g, labels, r).flatten(1).sum(1), want)
    taken = [torch.where(g.abs().sum(1) > 0, labels, -1) for g in grads]
    assert torch.equal(*taken) == same
    assert_same(value, written_out(q, k, *taken, **options), (q, k))
    everything = LocalRegionContrastLoss(max_regions=REGIONS, num_samples=63, same_samples=same, **options)
    assert_same(everything(q, k, labels), written_out(q, k, labels, **options), (q, k))


def test_draw_is_uniform_and_follows_the_generator():
    q, k, _ = problem(batch=2)
    labels = torch.full((2, 9, 7), -1)
    labels[0, 2, 1:6], labels[1, :5, 3], labels[1, 5:, 3] = 4, 4, 2
    loss = LocalRegionContrastLoss(max_regions=REGIONS, num_samples=2, negatives="batch")
    counts = torch.zeros(2, 9, 7)
    for _ in range(300):
        counts += drawn(gradients(loss(q, k, labels), (q,))[0], labels, 4)
    assert counts.sum() == 2 * 2 * 300
    five = counts[labels == 4]  # each of the five pixels with probability 2/5
    assert ((five - 120).abs() < 5 * (300 * 0.4 * 0.6) ** 0.5).all()
    first, second, other = (loss(q, k, labels, generator=torch.Generator().manual_seed(s)) for s in (7, 7, 8))
    assert first == second != other


def test_small_regions_are_left_out_by_their_size_not_by_the_draw():
    q, k, labels = problem()
    loss = LocalRegionContrastLoss(max_regions=REGIONS, num_samples=2, min_pixels=6, detach_keys=False)
    value = loss(q, k, labels)
    grads = gradients(value, (q, k))
    taken = [torch.where(g.abs().sum(1) > 0, labels, -1) for g in grads]
    assert_same(value, written_out(q, k, *taken, min_pixels=6, sizes=(labels, labels), detach_keys=False), (q, k))
    sizes = torch.stack([(labels == r).flatten(1).sum(1) for r in range(REGIONS)], 1)
    assert (sizes < 6).any() and (sizes >= 6).any()
    for r in range(REGIONS):
        assert torch.equal(drawn(grads[0], labels, r).flatten(1).any(1), sizes[:, r] >= 6)


@pytest.mark.parametrize("options", [{}, {"normalize_first": True}, {"num_samples": 3}, {"num_samples": 3, "normalize_first": True}], ids=str)
def test_pixels_that_belong_nowhere_do_not_matter(options):
    q, k, labels = problem()
    other = labels.clone()
    other[0][other[0] == 2] = -1  # region 2 of image 0 is in one view only
    nowhere = [(x < 0) | (x >= REGIONS) for x in (labels, other)]
    nowhere[0][0] |= labels[0] == 2
    bad = [torch.where(n.unsqueeze(1), torch.nan, f.detach()).requires_grad_() for n, f in zip(nowhere, (q, k), strict=True)]
    loss = LocalRegionContrastLoss(max_regions=REGIONS, detach_keys=False, **options)
    found = []
    for inputs in ((q, k), bad):
        torch.manual_seed(2)
        value = loss(*inputs, labels, other)
        found.append([value, *gradients(value, inputs)])
    assert all(map(torch.equal, *found))
    for g, n in zip(found[1][1:], nowhere, strict=True):
        assert (g[n.unsqueeze(1).expand_as(g)] == 0).all()
    with torch.no_grad():
        bad[0][1, 0][labels[1] == 0] = torch.nan
    assert loss(*bad, labels, other).isnan()


def test_no_region_at_all():
    q, k, labels = problem()
    for options in ({}, {"negatives": "batch"}, {"symmetric": True}, {"num_samples": 3}):
        value = LocalRegionContrastLoss(max_regions=REGIONS, detach_keys=False, **options)(q, k, torch.full_like(labels, -1))
        assert value == 0 and all((g == 0).all() for g in gradients(value, (q, k)))
    assert LocalRegionContrastLoss(max_regions=REGIONS)(q, k, torch.zeros_like(labels)) == 0  # one region an image: no negatives


def test_zero_features_are_finite():
    q, k, labels = problem(dtype=torch.float32)
    with torch.no_grad():
        q.zero_()
        k[1].zero_()
    for options in ({}, {"normalize_first": True}):
        loss = LocalRegionContrastLoss(max_regions=REGIONS, detach_keys=False, **options)
        value = loss(q, k, labels)
        assert value.isfinite() and all(g.isfinite().all() for g in gradients(value, (q, k)))
        assert_same(value, written_out(q, k, labels, detach_keys=False, **options), (q, k), 1e-5)


def test_keys_without_gradient():
    q, k, labels = problem()
    assert (gradients(LocalRegionContrastLoss(max_regions=REGIONS)(q, k, labels), (k,))[0] == 0).all()
    assert (gradients(LocalRegionContrastLoss(max_regions=REGIONS, detach_keys=False)(q, k, labels), (k,))[0] != 0).any()


@pytest.mark.parametrize("last", [False, True])
def test_float32_is_as_exact_as_pytorch(last):
    q, k, labels = problem(dtype=torch.float32)
    if last:
        q, k = (f.detach().contiguous(memory_format=torch.channels_last).requires_grad_() for f in (q, k))
    exact = [f.detach().double().requires_grad_() for f in (q, k)]
    want = written_out(*exact, labels, detach_keys=False)
    truth = [want, *gradients(want, exact)]
    ours, theirs = LocalRegionContrastLoss(max_regions=REGIONS, detach_keys=False)(q, k, labels), written_out(q, k, labels, detach_keys=False)
    assert ours.dtype == torch.float32
    assert error([ours, *gradients(ours, (q, k))], truth) < tolerance(error([theirs, *gradients(theirs, (q, k))], truth), torch.float32)


def test_half_precision_is_the_loss_of_the_rounded_features():
    q, k, labels = problem(dtype=torch.float32)
    low = [f.detach().bfloat16().requires_grad_() for f in (q, k)]
    for options in ({}, {"normalize_first": True}):
        got = LocalRegionContrastLoss(max_regions=REGIONS, **options)(*low, labels)
        want = written_out(*(f.double() for f in low), labels, **options)
        assert got.dtype == torch.float32 and error([got], [want]) < 1e-5
        assert error(gradients(got, low), gradients(want, low)) < torch.finfo(torch.bfloat16).eps


def test_only_the_regions_are_kept():
    q, k = (variable(2, 32, 64, 64, dtype=torch.float32) for _ in range(2))  # 1 MiB
    labels = torch.randint(0, 20, (2, 64, 64))
    for samples in (None, 10):
        loss = LocalRegionContrastLoss(max_regions=20, num_samples=samples, detach_keys=False)
        assert 0 < kept_mib(lambda loss=loss: loss(q, k, labels), q, k, labels) < 0.25  # two drawn label maps of int64, rows [B, R, C]


def test_house():
    q, k, labels = problem(dtype=torch.float32)
    for options in ({}, {"num_samples": 3, "normalize_first": True, "symmetric": True}):
        assert_house(LocalRegionContrastLoss(max_regions=REGIONS, detach_keys=False, **options), q, k, labels)
    assert "num_samples=50" in repr(LocalRegionContrastLoss(num_samples=50))
    # The compiler draws otherwise: three pixels of regions that have three, so that the value does not depend on it.
    labels = torch.arange(63).reshape(1, 9, 7).expand(3, -1, -1) // 3
    assert_compiles(LocalRegionContrastLoss(max_regions=30, num_samples=3), (q,), q, k, labels)


@pytest.mark.parametrize("options", [{}, {"num_samples": 3, "negatives": "batch", "normalize_first": True}])
def test_one_graph_serves_every_size(options):
    def problems():
        for height in range(20, 30):
            q, k = (torch.randn(2, 4, height, 17, requires_grad=True) for _ in range(2))
            yield (q, k, torch.randint(-1, REGIONS, (2, height, 17))), {}

    assert graphs(LocalRegionContrastLoss(max_regions=REGIONS, **options), problems()) <= 2


BAD = [
    (dict(temperature=0), ValueError, "`temperature` must be > 0"),
    (dict(max_regions=0), ValueError, "`max_regions` must be >= 1, got 0"),
    (dict(max_regions=2**22), ValueError, r"`max_regions` must be < 2\^22"),
    (dict(max_regions=1.5), TypeError, "`max_regions` must be an int, got 1.5"),
    (dict(negatives="all"), ValueError, "`negatives` must be one of 'image', 'batch', got 'all'"),
    (dict(num_samples=0), ValueError, "`num_samples` must be >= 1, got 0"),
    (dict(min_pixels=0), ValueError, "`min_pixels` must be >= 1, got 0"),
    (dict(symmetric=None), TypeError, "`symmetric` must be a bool, got None"),
    (dict(backend="gpu"), ValueError, "`backend` must be one of"),
]


@pytest.mark.parametrize("options, kind, message", BAD)
def test_bad_options(options, kind, message):
    with pytest.raises(kind, match=message):
        LocalRegionContrastLoss(**options)


def test_bad_input():
    q, k, labels = problem()
    cases = [
        ((q.long(), k, labels), TypeError, "`features_q` must be float16"),
        ((q[0, 0], k, labels), ValueError, r"`features_q` must have shape \[B, C, L\] or"),
        ((q, k[:, :3], labels), ValueError, "`features_k` must have the shape of features_q"),
        ((q, k[:, :3], labels, labels + 0), ValueError, "`features_k` must have the batch, channels and number of axes of features_q"),
        ((q, k.float(), labels), TypeError, "`features_k` must be torch.float64"),
        ((q, k, labels.float()), TypeError, "`labels_q` must be uint8, .*, got float32"),
        ((q, k, labels[:, 1:]), ValueError, r"`labels_q` must have shape \(3, 9, 7\), got \(3, 8, 7\)"),
        ((q, k, labels, labels[:, 1:]), ValueError, r"`labels_k` must have shape \(3, 9, 7\), got \(3, 8, 7\)"),
    ]
    for arguments, kind, message in cases:
        with pytest.raises(kind, match=message):
            LocalRegionContrastLoss(max_regions=REGIONS)(*arguments)
    same = LocalRegionContrastLoss(num_samples=3, same_samples=True)
    assert same(q, k, labels, labels).isfinite()
    with pytest.raises(ValueError, match="`labels_k` must be None with same_samples=True"):
        same(q, k, labels, labels.clone())
    with torch.no_grad():
        k[0, 0, 0, 0] = torch.inf
    with pytest.raises(ValueError, match="`features_k` must be finite, got 1 NaN or inf"):
        LocalRegionContrastLoss(check_finite=True)(q, k, labels)
