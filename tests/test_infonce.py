"""infonce: values, gradients, properties, edges; every backend that runs here, against float64. `test_infonce_contract.py` has the rest."""

import math

import pytest
import torch
import torch.nn.functional as F

import infonce_cases
from infonce_cases import CUDA_CASES, SMALL_CASES
from infonce_helpers import FAST, NEGATIVES, SMALL, WIDE, check, options, rows, run
from pix2rep_kernels import infonce
from pix2rep_kernels.testing import backends, error

# ---- values and gradients


@pytest.mark.parametrize("backend", WIDE)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["plain", "masked", "ids", "permuted", "queue", "all"])
@pytest.mark.parametrize("negatives", NEGATIVES)
def test_matches_float64(backend, dtype, kind, negatives):
    if dtype == torch.float64 and backend not in FAST:
        pytest.skip("float64 runs on the backends reference and cpu only")
    for groups, n, d in ((1, 33, 16), (3, 17, 5)):
        for tau in (0.53, 0.05):
            check(backend, rows(groups, n, d), rows(groups, n, d), tau, negatives, dtype, **options(kind, groups, n, d, negatives))


# 15-17, 31-33, 47-49: edges of the register tiles of every instruction set; 191-193, 385: edges of blocks; 1000: the official sample.
@pytest.mark.parametrize("backend", WIDE)
@pytest.mark.parametrize("n", [1, 2, 15, 16, 17, 31, 47, 48, 49, 97, 191, 193, 385, 1000])
@pytest.mark.parametrize("negatives", NEGATIVES)
def test_sizes(backend, n, negatives):
    check(backend, rows(1, n, 19), rows(1, n, 19), 0.1, negatives, torch.float32)


@pytest.mark.parametrize("backend", WIDE)
@pytest.mark.parametrize("d", [1, 2, 3, 8, 16, 17, 31, 33, 48, 64, 65, 100, 127, 128, 200, 256, 512])
def test_features(backend, d):
    check(backend, rows(1, 50, d), rows(1, 50, d), 0.2, "joint", torch.float32)
    check(backend, rows(1, 50, d), rows(1, 50, d), 0.2, "cross", torch.float32)


# 0.0229, 0.0135, 0.0075: below each a simpler shift overflows or flushes.
@pytest.mark.parametrize("backend", WIDE)
@pytest.mark.parametrize("tau", [10.0, 1.0, 0.07, 0.0229, 0.02, 0.0135, 0.01, 0.005, 1e-3])
@pytest.mark.parametrize("negatives", NEGATIVES)
def test_temperatures(backend, tau, negatives):
    check(backend, rows(1, 65, 8), rows(1, 65, 8), tau, negatives, torch.float32, **options("all", 1, 65, 8, negatives))


def test_other_sizes_forward():
    for backend in FAST:
        a, b, positive = rows(2, 20, 9), rows(2, 53, 9), torch.randint(0, 53, (2, 20))
        upstream = torch.randn(2, 20, dtype=torch.float64)
        got, truth = (run(name, a, b, 0.1, upstream, negatives="forward", positive=positive) for name in (backend, "reference"))
        assert error(got, truth) < 1e-12


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("negatives", NEGATIVES)
@pytest.mark.parametrize("kind", ["plain", "all"])
def test_gradcheck(backend, negatives, kind):
    a, b = rows(2, 5, 4).requires_grad_(), rows(2, 5, 4).requires_grad_()
    tau = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    extra = options(kind, 2, 5, 4, negatives)
    assert torch.autograd.gradcheck(lambda a, b, t: infonce(a, b, temperature=t, negatives=negatives, backend=backend, **extra), (a, b, tau))


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("needs", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (0, 1, 1), (1, 1, 0)])
@pytest.mark.parametrize("negatives", NEGATIVES)
def test_subsets_of_gradients(backend, needs, negatives):
    a, b, upstream = rows(1, 40, 8), rows(1, 40, 8), torch.randn(1, 40 * (1 if negatives == "forward" else 2), dtype=torch.float64)
    full = run("reference", a, b, 0.2, upstream, negatives=negatives)[1:]
    inputs = [a, b, torch.tensor(0.2, dtype=torch.float64)]
    wanted = [x.requires_grad_() for x, need in zip(inputs, needs, strict=True) if need]
    grads = torch.autograd.grad(infonce(a, b, temperature=inputs[2], negatives=negatives, backend=backend), wanted, upstream)
    assert error(grads, [g for g, need in zip(full, needs, strict=True) if need]) < 1e-12


@pytest.mark.parametrize("backend", SMALL)
@pytest.mark.parametrize("case", [*SMALL_CASES, *CUDA_CASES], ids=str)
def test_small_cases(case, backend):
    """Every option and every range of temperatures, for every backend but the truth; those that run interpreted or emulated have no others."""
    a, b, kw = infonce_cases.build(case)
    floor, precision = kw.pop("temperature_floor", None), kw["precision"]
    kw.pop("temperature")
    tau = (infonce_cases.DEFAULTS | case)["temperature"]  # not read back from float32: it may lie on the floor
    narrow = precision == "fp16" or a.dtype != torch.float32
    if case in CUDA_CASES and backend != "cuda":
        pytest.skip("only the CUDA kernels tell it from others")
    check(backend, a, b, tau, dtype=a.dtype, narrow=narrow and backend != "cpu", floor=floor or tau, **kw)


# ---- properties


def test_is_the_textbook_loss():
    a, b = rows(40, 8), rows(40, 8)
    z = torch.cat([a, b])
    s = (z @ z.T / 0.3).masked_fill(torch.eye(80, dtype=torch.bool), -torch.inf)
    cross = a @ b.T / 0.3
    target = torch.arange(40)
    for backend in FAST:
        joint = F.cross_entropy(s, torch.arange(80).roll(40), reduction="none")
        both = torch.cat([F.cross_entropy(cross, target, reduction="none"), F.cross_entropy(cross.T, target, reduction="none")])
        assert error([infonce(a, b, temperature=0.3, backend=backend)], [joint]) < 1e-13
        assert error([infonce(a, b, temperature=0.3, negatives="cross", backend=backend)], [both]) < 1e-13
        assert error([infonce(a, b, temperature=0.3, negatives="forward", backend=backend)], [both[:40]]) < 1e-13


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("negatives", NEGATIVES)
def test_symmetries(backend, negatives):
    a, b = rows(30, 6), rows(30, 6)
    losses = infonce(a, b, temperature=0.2, negatives=negatives, backend=backend)
    order = torch.randperm(30)
    permuted = infonce(a[order], b[order], temperature=0.2, negatives=negatives, backend=backend)
    sides = losses.unflatten(0, (-1, 30))
    assert (losses >= 0).all()
    assert error([permuted.unflatten(0, (-1, 30))], [sides[:, order]]) < 1e-13
    rotation = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))[0]
    assert error([infonce(a @ rotation, b @ rotation, temperature=0.2, negatives=negatives, backend=backend)], [losses]) < 1e-12
    shuffled = infonce(a, b[order], temperature=0.2, negatives=negatives, positive=order.argsort(), backend=backend).unflatten(0, (-1, 30))
    assert error([shuffled[0]], [sides[0]]) < 1e-13
    if negatives != "forward":
        swapped = infonce(b, a, temperature=0.2, negatives=negatives, backend=backend)
        assert error([swapped.unflatten(0, (2, 30)).flip(0)], [sides]) < 1e-13
        assert error([shuffled[1]], [sides[1][order]]) < 1e-13


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("negatives", NEGATIVES)
def test_invalid_rows_are_as_if_absent(backend, negatives):
    a, b = rows(30, 6).requires_grad_(), rows(30, 6).requires_grad_()
    valid = torch.rand(30) > 0.4
    with torch.no_grad():
        a[~valid], b[~valid] = torch.nan, torch.inf
    losses = infonce(a, b, temperature=0.2, negatives=negatives, valid_a=valid, backend=backend)
    alone = infonce(a[valid], b[valid], temperature=0.2, negatives=negatives, backend=backend)
    sides = losses.unflatten(0, (-1, 30))
    assert error([sides[:, valid].flatten()], [alone]) < 1e-13
    assert (sides[:, ~valid] == 0).all()
    losses.sum().backward()
    for row in (a, b):
        assert (row.grad[~valid] == 0).all() and row.grad[valid].isfinite().all()


@pytest.mark.parametrize("backend", FAST)
def test_queue_is_more_negatives(backend):
    a, b, queue = rows(20, 6), rows(20, 6), rows(11, 6)
    long = infonce(a, torch.cat([b, queue]), temperature=0.2, negatives="forward", backend=backend)
    assert error([infonce(a, b, temperature=0.2, negatives="forward", queue=queue, backend=backend)], [long]) < 1e-13


@pytest.mark.parametrize("backend", FAST)
def test_groups_are_a_loop(backend):
    a, b = rows(2, 3, 25, 6), rows(2, 3, 25, 6)
    losses = infonce(a, b, temperature=0.2, backend=backend)
    assert losses.shape == (2, 3, 50)
    for i in range(2):
        for j in range(3):
            assert error([losses[i, j]], [infonce(a[i, j], b[i, j], temperature=0.2, backend=backend)]) < 1e-13


@pytest.mark.parametrize("backend", FAST)
def test_small_losses_keep_their_digits(backend):
    a = torch.eye(40, dtype=torch.float32)  # each row meets itself, all others are orthogonal
    losses = infonce(a, a, temperature=0.05, backend=backend).double()
    assert error([losses], [torch.full((80,), math.log1p(78 * math.exp(-20)), dtype=torch.float64)]) < 4 * torch.finfo(torch.float32).eps
    same = torch.ones(64, 4) / 2
    assert error([infonce(same, same, temperature=0.07, backend=backend)], [torch.full((128,), math.log(127))]) < 1e-6


# ---- edges


@pytest.mark.parametrize("backend", FAST)
def test_empty_and_alone(backend):
    for negatives in NEGATIVES:
        a = torch.zeros(2, 0, 4, requires_grad=True)
        losses = infonce(a, torch.zeros(2, 0, 4), temperature=0.1, negatives=negatives, backend=backend)
        assert losses.shape == (2, 0)
        losses.sum().backward()
        assert a.grad.shape == a.shape
    one = rows(1, 4).requires_grad_()
    losses = infonce(one, rows(1, 4), temperature=0.1, negatives="cross", backend=backend)
    losses.sum().backward()
    assert (losses == 0).all() and (one.grad == 0).all()
    nobody = infonce(rows(5, 4), rows(5, 4), temperature=0.1, valid_a=torch.zeros(5, dtype=torch.bool), backend=backend)
    assert (nobody == 0).all()
    same = torch.zeros(5, dtype=torch.int64)
    assert (infonce(rows(5, 4), rows(5, 4), temperature=0.1, ids_a=same, backend=backend) == 0).all()


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_reaches_the_loss(backend, bad):
    for negatives in NEGATIVES:
        a, b = rows(60, 6, dtype=torch.float32), rows(60, 6, dtype=torch.float32)
        a[17, 2] = bad
        losses = infonce(a, b, temperature=0.2, negatives=negatives, backend=backend)
        assert not losses[17].isfinite()
        if negatives != "forward" and math.isnan(bad):
            assert losses[60:].isnan().all()  # every anchor of b meets the row
        assert not infonce(a, b, temperature=0.2, negatives=negatives, backend=backend).mean().isfinite()


@pytest.mark.parametrize("backend", FAST)
def test_layouts(backend):
    wide = rows(2, 40, 24)
    layouts = {
        "strided": wide[:, ::2, 1::3],
        "transposed": rows(2, 8, 20).transpose(1, 2),
        "offset": rows(2, 21, 8)[:, 1:],
        "expanded": rows(1, 20, 8).expand(2, -1, -1),
    }
    for name, view in layouts.items():
        for other in layouts.values():
            upstream = torch.randn(2, 40, dtype=torch.float64)
            got = run(backend, view, other, 0.5, upstream)
            truth = run("reference", view.contiguous(), other.contiguous(), 0.5, upstream)
            assert error(got, truth) < 1e-11, name


@pytest.mark.parametrize("backend", FAST)
def test_mixed_dtypes_and_long_rows(backend):
    a, b = rows(30, 6, dtype=torch.float16), rows(30, 6, dtype=torch.float32)
    a.requires_grad_(), b.requires_grad_()
    infonce(a, b, temperature=0.2, backend=backend).mean().backward()
    assert a.grad.dtype == torch.float16 and b.grad.dtype == torch.float32
    # Rows far from unit length: the CPU kernel sees their norms and shifts.
    check(backend, 30 * rows(1, 40, 6), 20 * rows(1, 40, 6), 1.0, "joint", torch.float64)


@pytest.mark.skipif("cpu" not in backends("infonce"), reason="_C is not built")
@pytest.mark.parametrize("negatives", NEGATIVES)
def test_same_bits_for_any_number_of_threads(negatives):
    a, b = rows(700, 24, dtype=torch.float32), rows(700, 24, dtype=torch.float32)
    upstream = torch.randn(1, 700 * (1 if negatives == "forward" else 2))
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3) * 7:
            torch.set_num_threads(threads)
            results.append(run("cpu", a.unsqueeze(0), b.unsqueeze(0), 0.1, upstream, negatives=negatives))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))
