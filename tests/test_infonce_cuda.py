"""infonce's CUDA kernels beyond the cases that all backends share: bits, layouts, what is not finite, arguments. Emulated where there is no GPU."""

import math

import pytest
import torch

from infonce_helpers import GPU, NEGATIVES, SMALL, rows, run
from pix2rep_kernels import infonce
from pix2rep_kernels.testing import error

pytestmark = pytest.mark.skipif("cuda" not in SMALL, reason="neither _C_cuda on a GPU nor _C_emulated (PIX2REP_BUILD=emulate) is here")
DEVICE = "cuda" if GPU else "cpu"


def upstream(n, negatives, groups=1):
    return torch.randn(groups, n * (1 if negatives == "forward" else 2))


@pytest.mark.parametrize("negatives", NEGATIVES)
def test_same_bits_every_time(negatives):
    a, b, g = rows(1, 150, 24, dtype=torch.float16), rows(1, 150, 24, dtype=torch.float16), upstream(150, negatives)
    first, *others = (run("cuda", a, b, 0.01, g, negatives=negatives) for _ in range(20 if GPU else 2))
    for other in others:
        assert all(torch.equal(x, y) for x, y in zip(first, other, strict=True))


@pytest.mark.skipif(GPU, reason="the emulation chooses the order")
@pytest.mark.parametrize("precision, temperature", [("fp16", 0.2), ("fp16", 0.01), ("fp16", 0.002), ("tf32x3", 0.2)])
def test_the_order_of_threads_and_blocks_changes_no_bit(monkeypatch, precision, temperature):
    """A missing barrier shows where threads run in another order."""
    for negatives in NEGATIVES:
        a, b, g = rows(1, 140, 72, dtype=torch.float32), rows(1, 140, 72, dtype=torch.float32), upstream(140, negatives)
        options = {"negatives": negatives, "precision": precision, "valid_a": torch.rand(1, 140) > 0.2}
        monkeypatch.delenv("PIX2REP_EMULATE_ORDER", raising=False)
        first = run("cuda", a, b, temperature, g, **options)
        for order in ("1", "2"):
            monkeypatch.setenv("PIX2REP_EMULATE_ORDER", order)
            assert all(torch.equal(x, y) for x, y in zip(first, run("cuda", a, b, temperature, g, **options), strict=True))


def test_layouts_and_groups_give_the_same_bits():
    wide = rows(2, 40, 24, dtype=torch.float32)
    layouts = [wide[:, ::2, 1::3], rows(2, 8, 20, dtype=torch.float32).transpose(1, 2), rows(2, 21, 8, dtype=torch.float32)[:, 1:]]
    layouts.append(rows(1, 20, 8, dtype=torch.float32).expand(2, -1, -1))
    g = upstream(20, "joint", 2)
    for view, other in zip(layouts, reversed(layouts), strict=True):
        got = run("cuda", view, other, 0.3, g, precision="fp16")
        dense = run("cuda", view.contiguous(), other.contiguous(), 0.3, g, precision="fp16")
        assert all(torch.equal(x, y) for x, y in zip(got, dense, strict=True))
        for k in range(2):
            alone = run("cuda", view[k : k + 1], other[k : k + 1], 0.3, g[k : k + 1], precision="fp16")
            assert torch.equal(got[0][k : k + 1], alone[0]) and torch.equal(got[1][k : k + 1], alone[1])


@pytest.mark.parametrize("negatives, n", [("joint", 1500), ("cross", 4200)])
def test_parts_of_several_blocks(negatives, n):
    """Where the parts of the sums hold more than one block of rows each, whose sums add up in the same place."""
    a, b = rows(n, 8, dtype=torch.float16), rows(n, 8, dtype=torch.float16)
    losses = infonce(a.to(DEVICE), b.to(DEVICE), temperature=0.2, negatives=negatives, backend="cuda").cpu()
    assert error([losses], [infonce(a.float(), b.float(), temperature=0.2, negatives=negatives, backend="reference")]) < 1e-3


@pytest.mark.parametrize("needs", [(1, 0, 0), (0, 1, 0), (0, 0, 1)])
@pytest.mark.parametrize("negatives", NEGATIVES)
def test_subsets_of_gradients(needs, negatives):
    a, b, g = rows(1, 30, 8, dtype=torch.float32), rows(1, 30, 8, dtype=torch.float32), upstream(30, negatives)
    queue = None if negatives == "cross" else rows(3, 8, dtype=torch.float32)
    full = run("cuda", a, b, 0.2, g, negatives=negatives, queue=queue)[1:]
    inputs = [x.to(DEVICE) for x in (a, b, torch.tensor(0.2))]
    wanted = [x.requires_grad_() for x, need in zip(inputs, needs, strict=True) if need]
    queue = None if queue is None else queue.to(DEVICE)
    grads = torch.autograd.grad(infonce(*inputs[:2], temperature=inputs[2], negatives=negatives, queue=queue, backend="cuda"), wanted, g.to(DEVICE))
    assert all(torch.equal(x.cpu(), y) for x, y in zip(grads, [y for y, need in zip(full, needs, strict=True) if need], strict=True))


@pytest.mark.parametrize("precision", ["fp16", "tf32x3"])
def test_what_is_not_finite(precision):
    for negatives in NEGATIVES:
        for bad in (math.nan, math.inf):
            a, b = rows(60, 6, dtype=torch.float32).to(DEVICE), rows(60, 6, dtype=torch.float32).to(DEVICE)
            a[17, 2] = bad
            losses = infonce(a, b, temperature=0.2, negatives=negatives, precision=precision, backend="cuda")
            assert not losses[17].isfinite()
            if negatives == "forward":
                assert losses[:17].isfinite().all() and losses[18:].isfinite().all()
            elif math.isnan(bad):
                assert losses[60:].isnan().all()  # every anchor of b meets the row
    # An invalid row may hold anything, and a gradient that is not finite reaches the rows of its anchor alone.
    a, b = rows(60, 6, dtype=torch.float32).to(DEVICE), rows(60, 6, dtype=torch.float32).to(DEVICE)
    a[3], b[5], valid = math.nan, math.inf, torch.ones(60, dtype=torch.bool, device=DEVICE)
    valid[[3, 5]] = False
    a.requires_grad_()
    losses = infonce(a, b, temperature=0.2, valid_a=valid, precision=precision, backend="cuda")
    losses.sum().backward()
    assert losses.isfinite().all() and a.grad.isfinite().all() and (a.grad[[3, 5]] == 0).all() and (losses[[3, 5, 63, 65]] == 0).all()


def test_ids_are_compared_whole():
    a, b = rows(1, 40, 8, dtype=torch.float32), rows(1, 40, 8, dtype=torch.float32)
    g, high = upstream(40, "joint"), torch.arange(40).unsqueeze(0) << 32
    plain = run("cuda", a, b, 0.2, g)
    apart = run("cuda", a, b, 0.2, g, ids_a=high, ids_b=high)
    assert error(apart, plain) < 1e-6  # only a row and its positive share an id, and those are no negatives anyway


@pytest.mark.parametrize("outside", [-1, 30, 2**40])
def test_a_positive_outside_is_nan(outside):
    a, b, positive = rows(1, 30, 6, dtype=torch.float32), rows(1, 30, 6, dtype=torch.float32), torch.arange(30).unsqueeze(0).clone()
    positive[0, 4] = outside
    for negatives in NEGATIVES:
        losses, _, grad_b, _ = run("cuda", a, b, 0.2, upstream(30, negatives), negatives=negatives, positive=positive)
        assert losses[0, 4].isnan()
        if negatives == "forward":
            assert losses.isnan().sum() == 1
        else:
            assert losses[0, 34].isnan() and grad_b[0, 4].isnan().all()  # the row of b that no anchor names


def test_empty():
    for n, m, negatives in ((0, 0, "joint"), (0, 0, "cross"), (0, 3, "forward")):
        a, b = torch.zeros(2, n, 4, requires_grad=True, device=DEVICE), torch.zeros(2, m, 4, requires_grad=True, device=DEVICE)
        losses = infonce(a, b, temperature=0.1, negatives=negatives, backend="cuda")
        assert losses.shape == (2, n if negatives == "forward" else 2 * n)
        losses.sum().backward()
        assert a.grad.shape == a.shape and (b.grad == 0).all()
    one, none = rows(5, 4, dtype=torch.float32).to(DEVICE), torch.zeros(5, dtype=torch.bool, device=DEVICE)
    nobody = infonce(one, one, temperature=0.1, valid_a=none, backend="cuda")
    assert (nobody == 0).all()


def test_arguments():
    if GPU:
        pytest.skip("the emulated op is asked")
    op, a, tau = torch.ops.pix2rep_emulated.infonce, torch.randn(1, 5, 4), torch.tensor(0.2)
    ids = torch.zeros(1, 5, dtype=torch.int64)
    cases = [
        ((None, torch.ones(1, 2, dtype=torch.bool), None, None, None, None), "`valid_a` must have one entry a row"),
        ((ids.int(), None, None, None, None, None), "`positive` must be bool"),
        ((None, None, None, ids, None, None), "`ids_b` must be given with ids_a"),
        ((None, None, None, None, None, torch.randn(3, 2)), "`queue` must have shape"),
    ]
    for extra, message in cases:
        with pytest.raises(RuntimeError, match=message):
            op(a, a, tau, 0.01, "joint", *extra, None)
    for bad, message in (((a.double(), a, tau), "`a` must be float16, bfloat16 or float32"), ((a, a, tau.double()), "`temperature` must be float32")):
        with pytest.raises(RuntimeError, match=message):
            op(*bad, 0.01, "joint", *(None,) * 7)
    backward, saved = torch.ops.pix2rep_emulated.infonce_backward, (torch.ones(1, 10), torch.ones(1, 10), torch.ones(1, 9))
    with pytest.raises(RuntimeError, match="`lse` must have shape"):
        backward(*saved, a, a, tau, 0.01, "joint", *(None,) * 7, *(True,) * 3)


def test_precision_follows_the_setting():
    a, b, g = rows(1, 30, 8, dtype=torch.float32), rows(1, 30, 8, dtype=torch.float32), upstream(30, "joint")
    named = {precision: run("cuda", a, b, 0.2, g, precision=precision) for precision in ("fp16", "tf32x3")}
    before = torch.get_float32_matmul_precision()
    try:
        for setting, precision in (("highest", "tf32x3"), ("high", "fp16"), ("medium", "fp16")):
            torch.set_float32_matmul_precision(setting)
            assert all(torch.equal(x, y) for x, y in zip(run("cuda", a, b, 0.2, g), named[precision], strict=True))
    finally:
        torch.set_float32_matmul_precision(before)
    assert not torch.equal(named["fp16"][0], named["tf32x3"][0])
