"""infonce: registration, autocast, refusals, and what a call may cost in memory."""

import math

import pytest
import torch

from benchmarks.harness import peak_mib
from infonce_helpers import FAST, rows, run
from pix2rep_kernels import infonce, why_not
from pix2rep_kernels.testing import backends, error


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


@pytest.mark.skipif("cpu" not in backends("infonce"), reason="_C is not built")
def test_the_native_op_reads_nothing_out_of_bounds():
    a, tau = torch.randn(1, 5, 4), torch.tensor(0.2)
    short, ids = torch.ones(1, 2, dtype=torch.bool), torch.zeros(1, 5, dtype=torch.int64)
    cases = [
        ((None, short, None, None, None, None), "`valid_a` must have one entry a row"),
        ((ids.int(), None, None, None, None, None), "`positive` must be bool"),
        ((None, None, None, ids, None, None), "`ids_b` must be given with ids_a"),
        ((None, None, None, None, None, torch.randn(3, 2)), "`queue` must have shape"),
    ]
    for extra, message in cases:
        with pytest.raises(RuntimeError, match=message):
            torch.ops.pix2rep_native.infonce(a, a, tau, 0.01, "joint", *extra, None)
    with pytest.raises(RuntimeError, match="`positive` must be given"):
        torch.ops.pix2rep_native.infonce(a, a[:, :3], tau, 0.01, "forward", *(None,) * 6, None)


@pytest.mark.parametrize("backend", FAST)
def test_an_infinite_temperature_is_uniform(backend):
    a = rows(8, 4, dtype=torch.float32)
    losses = infonce(a, a, temperature=torch.tensor(math.inf), backend=backend)
    assert error([losses], [torch.full((16,), math.log(15))]) < 1e-6


def test_why_not_refuses_what_is_unknown():
    x = torch.zeros(1, 2, 2)
    cases = [("warp", "gpu", [x], "`backend` must be one of"), ("foo", "cpu", [x], "`op` must be one of"), ("warp", "cpu", [], "`tensors` must hold")]
    for op, name, tensors, message in cases:
        with pytest.raises(ValueError, match=message):
            why_not(op, name, tensors)


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
    ({"temperature": 0.0}, ValueError, "`temperature` must be > 0 and finite .*, got 0.0"),
    ({"temperature": "warm"}, TypeError, "`temperature` must be a float or a 0-d tensor, got 'warm'"),
    ({"temperature": 1e39}, ValueError, "`temperature` must be > 0 and finite"),
    ({"temperature": torch.tensor(0.1), "temperature_floor": math.inf}, ValueError, "`temperature_floor` must be > 0 and finite"),
    ({"b": torch.zeros(3, 2), "negatives": "forward"}, ValueError, r"`positive` must be given where `a` has more rows \(4\) than `b` \(3\)"),
    ({"ids_b": torch.zeros(4, dtype=torch.int64)}, ValueError, "`ids_a` must be given with ids_b"),
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


MEMORY = """
import torch, torch.nn.functional as F
from pix2rep_kernels import infonce, why_not
n, negatives = int(arguments[0]), arguments[1]
torch.set_num_threads(2)
def prepare():
    work([F.normalize(torch.randn(256, 64), dim=1).requires_grad_() for _ in range(2)])
    return [F.normalize(torch.randn(n, 64), dim=1).requires_grad_() for _ in range(2)]
def work(rows):
    infonce(*rows, temperature=0.1, negatives=negatives, backend="cpu").mean().backward()
"""


@pytest.mark.skipif("cpu" not in backends("infonce"), reason="_C is not built")
@pytest.mark.parametrize("negatives", ["joint", "cross"])
def test_memory_is_linear(negatives):
    """Peak beyond the inputs: rows, panels, two gradients and their outputs, six copies of N x D at most, and 8 MiB for the threads' buffers."""
    for n in (1024, 4096):
        assert peak_mib(MEMORY, n, negatives) < 2 * 6 * n * 64 * 4 / 2**20 + 8
