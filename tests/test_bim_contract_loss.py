"""BoundaryInfoMaxLoss beyond its formula: precision, memory, compilation, refusals."""

import pytest
import torch

from loss_helpers import SPACE, assert_compiles, assert_house, bim, bim_problem, gradients, graphs, kept_mib, variable
from pix2rep_kernels import BoundaryInfoMaxLoss
from pix2rep_kernels.testing import error, tolerance


@pytest.mark.parametrize("last", [False, True])
def test_float32_is_as_exact_as_pytorch(last):
    a, b, image = bim_problem(k=12, dtype=torch.float32)
    if last:
        a, b = (t.detach().contiguous(memory_format=torch.channels_last).requires_grad_() for t in (a, b))
    exact = [t.detach().double().requires_grad_() for t in (a, b)]
    want = bim(*exact, image.double())
    truth = [want, *gradients(want, exact)]
    ours, theirs = (f(a, b, image) for f in (BoundaryInfoMaxLoss(), bim))
    assert ours.dtype == torch.float32
    assert error([ours, *gradients(ours, (a, b))], truth) < tolerance(error([theirs, *gradients(theirs, (a, b))], truth), torch.float32)


def test_half_precision_is_the_loss_of_the_rounded_logits():
    a, b, image = bim_problem(dtype=torch.float32)
    low = [t.detach().bfloat16().requires_grad_() for t in (a, b)]
    got, want = BoundaryInfoMaxLoss()(*low, image), bim(*(t.float() for t in low), image)
    assert got.dtype == torch.float32 and error([got], [want]) < 1e-5
    assert error(gradients(got, low), gradients(want, low)) < torch.finfo(torch.bfloat16).eps


def test_no_probabilities_are_kept():
    heads = [[variable(2, 40, 32, 32, dtype=torch.float32) for _ in range(3)] for _ in range(2)]  # 0.31 MiB a map
    image = torch.rand(2, 1, 32, 32)
    pixels = 2 * 32 * 32 * 4 / 2**20
    kept = kept_mib(lambda: BoundaryInfoMaxLoss()(*heads, image), *heads[0], *heads[1])
    assert 0 < kept < 6 * 4 * pixels + pixels + 0.2  # entropy, twice its range, cc a map; the edges; K x K


def test_without_the_boundary_term_no_image_is_needed():
    a, b, image = bim_problem()
    loss = BoundaryInfoMaxLoss(alpha=0, boundary_weight=0)
    assert torch.equal(loss(a, b), loss(a, b, image))
    with pytest.raises(TypeError, match="`image` must be a torch.Tensor, got NoneType"):
        BoundaryInfoMaxLoss()(a, b)


def test_house():
    a, b, image = bim_problem(dtype=torch.float32)
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
    a, b, image = bim_problem()
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
