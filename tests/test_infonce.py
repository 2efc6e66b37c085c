"""infonce: values, gradients, properties, edges, registration; every backend that runs here, against float64."""

import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import infonce_cases
from infonce_cases import TRITON_CASES
from pix2rep_kernels import infonce
from pix2rep_kernels.testing import backends, error, poisoned, tolerance

FAST = [b for b in backends("infonce") if b != "triton" or torch.cuda.is_available()]  # interpreted kernels have a table of their own
NEGATIVES = ("joint", "cross", "forward")


def rows(*shape, dtype=torch.float64):
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1).to(dtype)


def options(kind, groups, n, d, negatives, dtype=torch.float64):
    """Optional arguments by name: none, masks, ids, permuted positives, a queue, all of them."""
    made = {
        "plain": {},
        "masked": {"valid_a": torch.rand(groups, n) > 0.3, "valid_b": torch.rand(groups, n) > 0.3},
        "ids": {"ids_a": torch.randint(-3, max(n // 2, 1), (groups, n)), "ids_b": torch.randint(-3, max(n // 2, 1), (groups, n))},
        "permuted": {"positive": torch.stack([torch.randperm(n) for _ in range(groups)])},
        "queue": {} if negatives == "cross" else {"queue": rows(7, d, dtype=dtype)},
    }
    return {k: v for option in made.values() for k, v in option.items()} if kind == "all" else made[kind]


def run(backend, a, b, tau, upstream, **kw):
    """losses, grad_a, grad_b, grad_temperature."""
    a, b = a.detach().clone().requires_grad_(), b.detach().clone().requires_grad_()
    compute = torch.float64 if a.dtype == torch.float64 else torch.float32
    tau = torch.tensor(tau, dtype=compute, requires_grad=True)
    with poisoned():
        losses = infonce(a, b, temperature=tau, backend=backend, **kw)
        losses.backward(upstream.to(losses.dtype))
    return losses, a.grad, b.grad, tau.grad


def check(backend, a, b, tau, negatives, dtype, narrow=False, floor=1e-4, **kw):
    """Compare one backend with the float64 reference on the same rounded inputs; the allowance is PyTorch's own error at that precision, doubled.

    Added to it is the rounding of one similarity, eps |a||b| / tau: PyTorch's own error can be luckily smaller on few rows. In float64 PyTorch is the
    truth, so there it is the bound of a dot product, D times as much. `narrow`: the similarities are float16 products and the gradients bfloat16 ones,
    so PyTorch's own error is that of rows rounded likewise.
    The temperature's gradient is -<dx, x>/tau, so Cauchy-Schwarz carries the rows' allowance over to it.
    """
    a, b = a.to(dtype), b.to(dtype)
    kw = {k: v.to(dtype) if k == "queue" else v for k, v in kw.items()}
    wide = {k: v.double() if k == "queue" else v for k, v in kw.items()}
    upstream = torch.randn(a.shape[0], a.shape[1] * (1 if negatives == "forward" else 2), dtype=torch.float64)
    fixed = {"tau": tau, "upstream": upstream, "negatives": negatives, "temperature_floor": floor}
    truth = run("reference", a.double(), b.double(), **fixed, **wide)
    eager = run("reference", a, b, **fixed, **kw)
    got = run(backend, a, b, **fixed, **kw)
    if narrow:
        half, brief = (run("reference", a.to(t).float(), b.to(t).float(), **fixed, **kw) for t in (torch.float16, torch.bfloat16))
        eager = half[0], *brief[1:]
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    largest = (a.double().norm(dim=-1).nan_to_num().max() * b.double().norm(dim=-1).nan_to_num().max()).item() / tau
    eps = torch.finfo(torch.float16 if narrow else compute).eps
    rounding = eps * (a.shape[-1] if compute == torch.float64 else 1) * largest
    worst = 0.0
    for g, e, t in zip(got[:3], eager[:3], truth[:3], strict=True):
        own = error([e], [t])
        # Where the truth itself is a rounding residue, relative errors say nothing: there the loss's scale is the measure.
        if t.norm() < 1e-9:
            assert g.double().norm() <= (tolerance(0, compute) + rounding) * a.numel() / tau
            continue
        worst = max(worst, error([g], [t]))
        assert error([g], [t]) <= tolerance(own, g.dtype) + rounding, (negatives, tau, list(kw))
    norms = [math.hypot(x[1].double().norm(), x[2].double().norm()) for x in (truth, eager)]
    rows_error = max(error(eager[1:3], truth[1:3]), error(got[1:3], truth[1:3])) if worst else 0.0
    bound = (2 * rows_error + rounding) * max(norms) * math.hypot(a.double().nan_to_num().norm(), b.double().nan_to_num().norm()) / tau
    # The rows' gradient leaves out what cancels within one anchor; sum |g| bounds that part.
    bound += rounding * upstream.abs().sum() / tau
    assert abs(got[3].double() - truth[3]) <= bound
    return worst


# ---- values and gradients


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["plain", "masked", "ids", "permuted", "queue", "all"])
@pytest.mark.parametrize("negatives", NEGATIVES)
def test_matches_float64(backend, dtype, kind, negatives):
    for groups, n, d in ((1, 33, 16), (3, 17, 5)):
        for tau in (0.53, 0.05):
            check(backend, rows(groups, n, d), rows(groups, n, d), tau, negatives, dtype, **options(kind, groups, n, d, negatives))


# 15-17, 31-33, 47-49: edges of the register tiles of every instruction set; 191-193, 385: edges of blocks; 1000: the official sample.
@pytest.mark.parametrize("n", [1, 2, 15, 16, 17, 31, 47, 48, 49, 97, 191, 193, 385, 1000])
@pytest.mark.parametrize("negatives", NEGATIVES)
def test_sizes(n, negatives):
    for backend in FAST:
        check(backend, rows(1, n, 19), rows(1, n, 19), 0.1, negatives, torch.float32)


@pytest.mark.parametrize("d", [1, 2, 3, 8, 16, 17, 31, 33, 48, 64, 65, 100, 127, 128, 200, 256, 512])
def test_features(d):
    for backend in FAST:
        check(backend, rows(1, 50, d), rows(1, 50, d), 0.2, "joint", torch.float32)
        check(backend, rows(1, 50, d), rows(1, 50, d), 0.2, "cross", torch.float32)


# 0.0229, 0.0135, 0.0075: below each a simpler shift overflows or flushes.
@pytest.mark.parametrize("tau", [10.0, 1.0, 0.07, 0.0229, 0.02, 0.0135, 0.01, 0.005, 1e-3])
@pytest.mark.parametrize("negatives", NEGATIVES)
def test_temperatures(tau, negatives):
    for backend in FAST:
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


@pytest.mark.parametrize("case", TRITON_CASES, ids=str)
def test_cases_of_the_interpreter(case):
    """Small cases with every option and every range of temperatures, for every backend but the truth."""
    a, b, kw = infonce_cases.build(case)
    floor, precision = kw.pop("temperature_floor", None), kw["precision"]
    kw.pop("temperature")
    tau = (infonce_cases.DEFAULTS | case)["temperature"]  # not read back from float32: it may lie on the floor
    narrow = precision == "fp16" or a.dtype != torch.float32
    for backend in backends("infonce"):
        if backend != "reference":
            check(backend, a, b, tau, dtype=a.dtype, narrow=narrow and backend == "triton", floor=floor or tau, **kw)


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


MEMORY = """
import resource, sys, torch, torch.nn.functional as F
import infonce_cases
from infonce_cases import TRITON_CASES
from pix2rep_kernels import infonce
torch.set_num_threads(2)
n, negatives = int(sys.argv[1]), sys.argv[2]
warm = F.normalize(torch.randn(256, 64), dim=1).requires_grad_()
infonce(warm, warm.detach(), temperature=0.1, negatives=negatives, backend="cpu").mean().backward()
a, b = (F.normalize(torch.randn(n, 64), dim=1).requires_grad_() for _ in range(2))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
infonce(a, b, temperature=0.1, negatives=negatives, backend="cpu").mean().backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


@pytest.mark.skipif("cpu" not in backends("infonce"), reason="_C is not built")
@pytest.mark.parametrize("negatives", ["joint", "cross"])
def test_memory_is_linear(negatives):
    """Peak beyond the inputs: rows, panels, two gradients and their outputs, six copies of N x D at most, and 8 MiB for the threads' buffers."""
    for n in (1024, 4096):
        result = subprocess.run([sys.executable, "-c", MEMORY, str(n), negatives], capture_output=True, text=True, check=True)
        assert float(result.stdout) < 2 * 6 * n * 64 * 4 / 2**20 + 8


# ---- registration


@pytest.mark.parametrize("backend", FAST)
def test_opcheck(backend):
    a, b = rows(2, 9, 4).requires_grad_(), rows(2, 9, 4).requires_grad_()
    tau = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    valid, ids, positive = torch.rand(2, 9) > 0.3, torch.randint(0, 4, (2, 9)), torch.stack([torch.randperm(9)] * 2)
    for extra in ((None,) * 6, (positive, valid, valid, ids, ids, rows(3, 4))):
        torch.library.opcheck(torch.ops.pix2rep.infonce.default, (a, b, tau, 0.01, "joint", *extra, None, backend))


@pytest.mark.parametrize("backend", FAST)
def test_compiles_in_one_graph(backend):
    compiled = torch.compile(lambda a, b, t: infonce(a, b, temperature=t, backend=backend).mean(), fullgraph=True, dynamic=True)
    for n in (16, 24, 40):
        a, b, tau = rows(n, 8).requires_grad_(), rows(n, 8), torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
        grads = torch.autograd.grad(compiled(a, b, tau), (a, tau))
        plain = torch.autograd.grad(infonce(a, b, temperature=tau, backend=backend).mean(), (a, tau))
        assert error(grads, plain) < 1e-12


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(backend, narrow):
    for dtype in (torch.float32, narrow):
        a, b, upstream = rows(1, 12, 4, dtype=dtype), rows(1, 12, 4, dtype=dtype), torch.randn(1, 24)
        plain = run(backend, a, b, 0.2, upstream)
        with torch.autocast("cpu", narrow):
            inside = run(backend, a, b, 0.2, upstream)
        assert inside[0].dtype == torch.float32
        assert all(torch.equal(x, y) for x, y in zip(plain, inside, strict=True))


def test_meta_and_second_derivative():
    a, b = rows(12, 4).requires_grad_(), rows(12, 4)
    meta = infonce(torch.empty(2, 9, 4, device="meta"), torch.empty(2, 9, 4, device="meta"), temperature=0.2)
    assert meta.shape == (2, 18) and meta.device.type == "meta"
    (grad,) = torch.autograd.grad(infonce(a, b, temperature=0.2).sum(), a, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()


def test_temperature_floor():
    a, b = rows(12, 4), rows(12, 4)
    low = torch.tensor(0.02, dtype=torch.float64, requires_grad=True)
    for backend in FAST:
        losses = infonce(a, b, temperature=low, temperature_floor=0.1, backend=backend)
        assert error([losses], [infonce(a, b, temperature=0.1, backend=backend)]) < 1e-13
        assert torch.autograd.grad(losses.sum(), low)[0] == 0


BAD = [
    ({"a": torch.zeros(4)}, ValueError, r"`a` must have shape \[.., N, D\]"),
    ({"b": torch.zeros(4, 3)}, ValueError, "`b` must have D = 2 features as `a` has, got 3"),
    ({"b": torch.zeros(5, 2)}, ValueError, "`b` must have N = 4 rows as `a` has"),
    ({"a": torch.zeros(4, 2, dtype=torch.int64)}, TypeError, "`a` must be float16, bfloat16, float32 or float64, got int64"),
    ({"b": torch.zeros(4, 2, device="meta")}, ValueError, "`b` must be on cpu as `a` is, got meta"),
    ({"temperature": 0.0}, ValueError, "`temperature` must be > 0 and finite, got 0.0"),
    ({"temperature": -1}, ValueError, "`temperature` must be > 0"),
    ({"temperature": math.nan}, ValueError, "`temperature` must be > 0"),
    ({"temperature": torch.ones(2)}, ValueError, "`temperature` must be a float or a 0-d tensor"),
    ({"negatives": "all"}, ValueError, "`negatives` must be one of 'joint', 'cross', 'forward', got 'all'"),
    ({"queue": torch.zeros(3, 5)}, ValueError, r"`queue` must have shape \[Q, 2\]"),
    ({"queue": torch.zeros(3, 2), "negatives": "cross"}, ValueError, "`queue` must be None"),
    ({"valid_a": torch.ones(3, dtype=torch.bool)}, ValueError, r"`valid_a` must have shape \(4,\), got \(3,\)"),
    ({"valid_a": torch.ones(4)}, TypeError, "`valid_a` must be bool, got float32"),
    ({"positive": torch.tensor([0, 1, 2, 4])}, (ValueError, RuntimeError), r"`positive` must be in \[0, "),
    ({"positive": torch.tensor([0, 1, 2, 2])}, (ValueError, RuntimeError), "`positive` must be a permutation"),
    ({"backend": "gpu"}, ValueError, "`backend` must be one of 'auto', 'reference', 'cpu', 'triton', 'cuda', got 'gpu'"),
    ({"precision": "half"}, ValueError, "`precision` must be one of"),
]


@pytest.mark.parametrize("change, kind, message", BAD)
def test_bad_input_names_argument_expectation_and_value(change, kind, message):
    for backend in FAST:
        arguments = {"a": torch.zeros(4, 2), "b": torch.zeros(4, 2), "temperature": 0.1, "backend": backend} | change
        with pytest.raises(kind, match=message):
            infonce(arguments.pop("a"), arguments.pop("b"), **arguments)
