"""joint: values, gradients, properties, edges; every backend that runs here, against PyTorch in float64."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

import pix2rep_kernels
from joint_helpers import DEVICE, FAST, LAYOUTS, cancellation, compare, problem, pytorch, raw, three, upstream_of
from pix2rep_kernels.testing import backends, error, placed, poisoned
from sweep import FULL, some

pytestmark = [  # numpy's, of NaN and huge logits in the interpreter
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
]
EPS = torch.finfo(torch.float32).eps
EXACT = [b for b in FAST if b != "triton"]  # those that take float64
joint = placed(pix2rep_kernels.joint)


# Values and gradients


@pytest.mark.parametrize("radius, collapsed", [(0, True), (1, True), (1, False), (3, True), (3, False)])
@pytest.mark.parametrize("backend", FAST)
def test_values_and_gradients(backend, radius, collapsed):
    for logits, masked, layouts in itertools.product((True, False), (True, False), (("first", "first"), ("last", "last"), ("strided", "first"))):
        a, b, mask = problem(masked=masked, layouts=layouts, logits=logits)
        compare(backend, a, b, mask=mask, radius=radius, collapsed=collapsed, logits=logits)
    for needs in ((True, False), (False, True), (False, False)):
        a, b, mask = problem(masked=True)
        compare(backend, a, b, needs, mask=mask, radius=radius, collapsed=collapsed)


@pytest.mark.parametrize("radius, collapsed", [(0, True), (1, True), (1, False)])
@pytest.mark.parametrize("backend", FAST)
def test_three_axes(backend, radius, collapsed):
    for layout, masked in itertools.product(LAYOUTS, (True, False)):
        a, b, mask = problem(space=(3, 4, 5), layouts=(layout, layout), masked=masked)
        compare(backend, a, b, mask=mask, radius=radius, collapsed=collapsed)


@pytest.mark.parametrize(
    "dtypes",
    [*((t, t) for t in (torch.float16, torch.bfloat16, torch.float64)), (torch.float16, torch.float32), (torch.float64, torch.bfloat16)],
)
@pytest.mark.parametrize("backend", EXACT)
def test_precisions(backend, dtypes):
    for layout, (radius, collapsed), logits in itertools.product(LAYOUTS, ((0, True), (1, True), (1, False)), (True, False)):
        a, b, mask = problem(17, layouts=(layout, layout), dtypes=dtypes, masked=True, logits=logits)
        compare(backend, a, b, mask=mask, radius=radius, collapsed=collapsed, logits=logits)


@pytest.mark.parametrize("backend", EXACT)
def test_gradcheck(backend):
    cases = ((0, True, True, True, False), (1, True, False, False, False), (1, False, True, True, False), (0, True, True, True, True))
    for radius, collapsed, logits, symmetric, detach in cases:
        a, b, mask = problem(3, 1, (3, 4), dtypes=(torch.float64,) * 2, masked=True, logits=logits)
        options = {"radius": radius, "collapsed": collapsed, "logits": logits, "symmetric": symmetric, "detach_normalizer": detach}
        assert torch.autograd.gradcheck(lambda x, y, o=options, m=mask: joint(x, y, mask=m, backend=backend, **o), (a.requires_grad_(), b.requires_grad_()))


CASES = [
    {"clusters": 40, "space": (5, 7)},
    {"clusters": 3, "space": (9, 15), "masked": True, "layouts": ("last", "strided")},
    {"clusters": 70, "batch": 1, "space": (1, 5), "layouts": ("last", "last")},
    {"clusters": 17, "space": (2, 3, 5), "logits": False, "masked": True},
    {"radius": 1, "masked": True},
    {"radius": 1, "collapsed": False, "batch": 1, "space": (4, 5), "layouts": ("last", "strided"), "masked": True},
    {"radius": 2, "space": (3, 1, 4), "batch": 1, "logits": False},
    {"radius": 1, "collapsed": False, "batch": 1, "clusters": 2, "space": (2, 1, 2)},
    {"clusters": 1, "batch": 1, "space": (1, 1), "logits": False},
    {"clusters": 6, "space": (16, 40), "batch": 1},
    {"clusters": 5, "dtypes": (torch.float16, torch.float32), "masked": True},
]  # fmt: skip


@pytest.mark.skipif("triton" not in backends("joint"), reason="triton does not run here")
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(str(v) for v in case.values()).replace("torch.", ""))
def test_triton(case):
    options = {k: case[k] for k in ("radius", "collapsed", "logits") if k in case}
    a, b, mask = problem(**{k: v for k, v in case.items() if k not in ("radius", "collapsed")})
    compare("triton", a, b, mask=mask, **options)


@pytest.mark.skipif("triton" not in backends("joint"), reason="triton does not run here")
@pytest.mark.parametrize("dtype, radius", [(torch.float16, 0), (torch.bfloat16, 0), (torch.float16, 2), (torch.bfloat16, 1)])
def test_triton_with_16_bits(dtype, radius):
    """Operands are float16: 2^-11 of each factor, 2^-10 of each product, then (joint.7) and a rounding of the gradient, or two where bfloat16 is cut."""
    a, b, mask = problem(20, 1, (6, 7), dtypes=(dtype,) * 2, masked=True)
    upstream = upstream_of(a)
    truth = three(pytorch, a.double(), b.double(), upstream, mask=mask, radius=radius)
    with poisoned():
        got = three(raw("triton"), a, b, upstream, mask=mask, radius=radius)
    assert error(got[:1], truth[:1]) <= 2**-10 + 4 * EPS
    for g, t, c in zip(got[1:], truth[1:], cancellation(a, b, upstream, mask=mask, radius=radius), strict=True):
        assert (g.double() - t).norm() <= (2**-10 + 4 * EPS) * c + torch.finfo(dtype).eps * t.norm()


@pytest.mark.skipif("triton" not in backends("joint"), reason="triton does not run here")
def test_triton_keeps_tiny_probabilities():
    """Scaled by 2^15, a probability above 2^-29 keeps 11 bits in float16 and errs by 2^-40 below; unscaled, half of these would be lost."""
    a, b = torch.zeros(1, 4, 3, 5), torch.zeros(1, 4, 3, 5)
    a[:, 1], b[:, 2], b[:, 3] = -17.0, -9.0, -19.0
    truth = pytorch(a.half().double(), b.half().double())
    got = raw("triton")(a.half(), b.half())
    marginals = truth.sum(2, keepdim=True) + truth.sum(1, keepdim=True)
    assert ((got - truth).abs() <= (2**-10 + 4 * EPS) * truth + 2**-40 * marginals).all()
    assert truth[0, 1, 3] < 1e-15 and got[0, 1, 3] > 0.99 * truth[0, 1, 3]


# Properties


@pytest.mark.parametrize("backend", FAST)
def test_a_distribution(backend):
    for radius, collapsed, masked in itertools.product((0, 2), (True, False), (True, False)):
        a, b, mask = problem(masked=masked)
        p = joint(a, b, radius=radius, collapsed=collapsed, mask=mask, backend=backend)
        assert (p >= 0).all() and torch.allclose(p.sum((-2, -1)), torch.ones(()), atol=10 * EPS)
        assert torch.equal(p, p.transpose(-2, -1))
        p = joint(a, b, radius=radius, collapsed=collapsed, mask=mask, symmetric=False, backend=backend)
        assert not torch.allclose(p, p.transpose(-2, -1))
    p = joint(a, b, symmetric=False, backend=backend)
    assert error([p.sum(1), p.sum(0)], [a.softmax(1).mean((0, 2, 3)), b.softmax(1).mean((0, 2, 3))]) < 4 * EPS


@pytest.mark.parametrize("backend", FAST)
def test_permutations(backend):
    a, b, _ = problem(6, dtypes=(torch.float32,) * 2)
    p = joint(a, b, symmetric=False, backend=backend)
    pixels, clusters = torch.randperm(63), torch.randperm(6)
    shuffled = [t.flatten(2)[..., pixels].view_as(t) for t in (a, b)]
    assert error([joint(*shuffled, symmetric=False, backend=backend)], [p]) < 4 * EPS
    assert error([joint(a[:, clusters], b[:, clusters], symmetric=False, backend=backend)], [p[clusters][:, clusters]]) < 4 * EPS


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("space", [(7, 9), (3, 4, 5)])
def test_displacements(backend, space):
    """Collapsed by a box filter is the sum over displacements; swapping the maps transposes each and mirrors their order."""
    for masked, radius in itertools.product((True, False), (1, 2, 3)[: 4 - len(space) + 1]):
        a, b, mask = problem(4, space=space, masked=masked)
        each = raw(backend)(a, b, mask, radius, False)
        assert error([raw(backend)(a, b, mask, radius, True)], [each.sum(0, keepdim=True)]) < 4 * EPS
        assert error([raw(backend)(b, a, mask, radius, False)], [each.flip(0).transpose(1, 2)]) < 4 * EPS


@pytest.mark.parametrize("backend", FAST)
def test_a_constant_on_all_logits_of_a_pixel(backend):
    a, b, mask = problem(masked=True)
    for radius in (0, 1):
        moved = a + torch.randn(2, 1, 7, 9).mul(8).round()
        p = [joint(x, b, mask=mask, radius=radius, backend=backend) for x in (a, moved)]
        assert error(p[1:], p[:1]) < 32 * EPS  # a + 8 is rounded


@pytest.mark.parametrize("backend", FAST)
def test_a_mask_removes_pixels(backend):
    a, b, mask = problem(batch=1, masked=True)
    left = [t[:, :, mask[0]].unsqueeze(2) for t in (a, b)]
    assert error([joint(a, b, mask=mask, backend=backend)], [joint(*left, backend=backend)]) < 4 * EPS
    assert torch.equal(joint(a, b, mask=mask.unsqueeze(1), backend=backend), joint(a, b, mask=mask, backend=backend))


@pytest.mark.parametrize("backend", backends("joint"))
def test_nothing_leaks_from_masked_pixels(backend):
    slow = backend == "triton" and DEVICE[backend] == "cpu"
    for (radius, collapsed), logits in itertools.product(((0, True), (1, True), (1, False)), (True, False)):
        if slow and not (collapsed or logits):
            continue
        a, b, mask = problem(4, 1, (2, 3) if slow else (4, 6), masked=True, logits=logits)
        options = {"mask": mask, "radius": radius, "collapsed": collapsed, "logits": logits}
        upstream = upstream_of(a, **options)
        clean = three(raw(backend), a, b, upstream, **options)
        for value in (math.nan, math.inf, -math.inf):
            dirty = three(raw(backend), *(torch.where(mask.unsqueeze(1), t, value) for t in (a, b)), upstream, **options)
            assert all(torch.equal(x, y) for x, y in zip(clean, dirty, strict=True)), (options, value)
            if slow:
                break
        assert all((g.movedim(1, -1)[~mask] == 0).all() for g in clean[1:])


@pytest.mark.parametrize("backend", backends("joint"))
def test_nothing_counts(backend):
    for radius, collapsed in ((0, True), (1, True), (1, False)):
        a, b, _ = problem(3, 1, (3, 4))
        a.requires_grad_(), b.requires_grad_()
        p = joint(a, b, mask=torch.zeros(1, 3, 4, dtype=torch.bool), radius=radius, collapsed=collapsed, backend=backend)
        p.sum().backward()
        assert p.count_nonzero() == 0 and a.grad.count_nonzero() == 0 and b.grad.count_nonzero() == 0


@pytest.mark.parametrize("backend", FAST)
def test_a_radius_larger_than_the_image(backend):
    for space, radius, layout in itertools.product(((2, 3), (1, 5), (3, 1), (1, 1), (2, 1, 2)), (1, 4), ("first", "last")):
        if len(space) == 3 and radius > 2:
            continue
        a, b, mask = problem(3, space=space, masked=True, layouts=(layout, layout))
        for collapsed in (True, False):
            compare(backend, a, b, mask=mask, radius=radius, collapsed=collapsed)


@pytest.mark.parametrize("backend", FAST)
def test_detached_normaliser(backend):
    """Of probabilities it changes the gradient; the sum of joint over softmax maps is constant, so there it does not."""
    weights = torch.randn(5, 5)
    for logits in (False, True):
        a, b, _ = problem(logits=logits)
        grads = []
        for detach in (True, False):
            x = a.clone().requires_grad_()
            (joint(x, b, logits=logits, detach_normalizer=detach, symmetric=False, backend=backend) * weights).sum().backward()
            grads.append(x.grad)
        sums = a.double().requires_grad_()
        expected = torch.autograd.grad((pytorch(sums, b.double(), logits=logits)[0] * weights).sum(), sums)[0]
        total = pytorch(a.double(), b.double(), logits=logits).sum()
        assert error(grads[:1], [expected / total]) < 1e-6
        assert (error(grads[:1], grads[1:]) < 1e-5) == logits


def iic(a, b, mask, radius):
    """IIC's joint in its own words: class maps times the mask, conv2d of one with the other as its filter, padded by the radius."""
    p, q = (t.softmax(1) * mask.unsqueeze(1) for t in (a, b))
    p_i_j = F.conv2d(p.permute(1, 0, 2, 3), weight=q.permute(1, 0, 2, 3), padding=(radius, radius))  # [K, K, 2T + 1, 2T + 1]
    return p_i_j.permute(2, 3, 0, 1).flatten(0, 1)


def information(p):
    """Mutual information of each distribution [.., K, K], negative and without a clamp, averaged."""
    rows, columns = p.sum(-1, keepdim=True), p.sum(-2, keepdim=True)
    return -(p * (p.log() - rows.log() - columns.log())).sum((-2, -1)).mean()


@pytest.mark.parametrize("backend", EXACT)
@pytest.mark.parametrize("collapsed", [True, False])
def test_official_iic(backend, collapsed):
    a, b, mask = problem(4, space=(8, 7), dtypes=(torch.float64,) * 2, masked=True)
    for radius in (0, 1, 3):
        grads = []
        for own in (True, False):
            x, y = a.clone().requires_grad_(), b.clone().requires_grad_()
            if own:
                p = joint(x, y, mask=mask, radius=radius, collapsed=collapsed, backend=backend)
            else:
                p = iic(x, y, mask, radius)
                p = p.sum(0) if collapsed else p
                p = p / p.sum((-2, -1), keepdim=True)
                p = (p + p.transpose(-2, -1)) / 2
            grads.append([p.detach(), *torch.autograd.grad(information(p), (x, y))])
        assert error(*grads) < 1e-12


# Edges


@pytest.mark.parametrize("backend", FAST)
def test_sizes(backend):
    for clusters in (1, 2, 3, 15, 16, 17, 31, 33, 100, *((127, 128, 129, 300, 512) if FULL else (129,))):
        if backend == "triton" and clusters > 128:
            continue  # refused
        for layout in ("first", "last"):
            a, b, mask = problem(clusters, space=(5, 13), layouts=(layout, layout), masked=clusters % 2 == 1, logits=clusters > 1)
            compare(backend, a, b, mask=mask, logits=clusters > 1)
    for space in ((1, 1), (1, 2), (15, 1), (8, 8), (3, 43), (127, 1), (16, 8), (33, 31), (64, 65)):
        for radius, layout in some(backend, itertools.product((0, 1), LAYOUTS), 3):
            a, b, mask = problem(7, 1, space, (layout, layout), masked=space[1] % 2 == 0)
            compare(backend, a, b, mask=mask, radius=radius)


@pytest.mark.parametrize("backend", FAST)
def test_nothing_at_all(backend):
    for shape in ((0, 3, 4, 4), (2, 0, 4, 4), (2, 3, 0, 4), (2, 3, 2, 0, 4)):
        for radius, collapsed in ((0, True), (1, False)):
            a, b = torch.randn(shape, requires_grad=True), torch.randn(shape, requires_grad=True)
            p = joint(a, b, radius=radius, collapsed=collapsed, backend=backend)
            p.sum().backward()
            assert p.shape[-2:] == (shape[1], shape[1]) and p.count_nonzero() == 0 and a.grad.shape == shape


@pytest.mark.parametrize("backend", FAST)
def test_strides(backend):
    wide = torch.randn(4, 12, 12, 14)
    views = {
        "clusters": wide[:, ::2], "rows": wide[:, :6, 1:-1], "columns": wide[:, :6, :, 1:-2], "images": wide[::2, :6],
        "transposed": wide[:, :6].transpose(2, 3), "one cluster": wide[:, :1].expand(-1, 6, -1, -1),
        "one pixel": wide[:, :6, :1, :1].expand(-1, -1, 5, 6), "one image": wide[:1, :6].expand(4, -1, -1, -1),
        "offset": torch.randn(4 * 6 * 9 + 1)[1:].view(4, 6, 3, 3), "clusters of last": wide.contiguous(memory_format=torch.channels_last)[:, 3:9],
    }  # fmt: skip
    for (name, a), (radius, collapsed) in itertools.product(views.items(), ((0, True), (1, True), (1, False))):
        compare(backend, a, torch.randn(a.shape), radius=radius, collapsed=collapsed)
        compare(backend, torch.randn(a.shape), a, mask=(torch.rand(a.shape[3], a.shape[2], len(a)) > 0.5).permute(2, 1, 0), radius=radius, collapsed=collapsed)
        assert name
    a, b, _ = problem(5)
    a.requires_grad_()
    (expanded,) = torch.autograd.grad(raw(backend)(a, b).sum(), a)  # an expanded upstream gradient
    assert expanded.norm() < 63 * 10 * EPS  # the sum over softmax is constant


@pytest.mark.parametrize("backend", backends("joint"))
def test_special_values(backend):
    """NaN and inf in a pixel that counts reach every entry; -inf is a cluster that cannot be; far logits leave one cluster."""
    for value, (radius, collapsed) in itertools.product((math.nan, math.inf), ((0, True), (1, True), (1, False))):
        a, b, _ = problem(4, 1, (4, 5))
        a[0, 1, 2, 2] = value
        p = joint(a, b, radius=radius, collapsed=collapsed, backend=backend)
        assert p.isnan().all()
        if backend == "triton" and value == math.nan:
            break
    a, b, _ = problem(4, 1, (4, 5))
    a[:, 1], a[0, :, 0, 0], b[0, 2, 1, 1] = -math.inf, torch.tensor([3e38, -3e38, 0, -math.inf]), 1e4
    p = joint(a, b, symmetric=False, backend=backend)
    assert error([p], [pytorch(a.double(), b.double())[0] / 20]) < 8 * EPS
    assert p[1].count_nonzero() == 0


@pytest.mark.parametrize("backend", [b for b in FAST if b != "reference"])
def test_many_pixels(backend):
    """A million pixels: the error does not grow."""
    a, b = torch.randn(4, 3, 512, 512), torch.randn(4, 3, 512, 512)
    truth = pytorch(a.double(), b.double())
    assert error([raw(backend)(a, b)], [truth]) <= 2 * error([pytorch(a, b)], [truth]) + EPS
