"""What only a GPU can show of every op: opcheck and compilation there, no wait for the device, CUDA graphs, autocast, another stream."""

import pytest
import torch
import torch.nn.functional as F

from pix2rep_kernels.dispatch import OPS
from pix2rep_kernels.testing import backends, error

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible")
GPU = [(op, backend) for op in OPS for backend in backends(op) if backend in ("triton", "cuda")]
each = pytest.mark.parametrize("op, backend", GPU or [("warp", "triton")])


def arguments(op):
    """Of the registered op, less the backend; the first one or two want gradients."""
    def draw(*shape):
        return torch.randn(*shape, device="cuda")

    theta = torch.tensor([[1.0, 0.1, 0.05], [-0.1, 0.9, 0.05]], device="cuda").repeat(2, 1, 1)
    maps, rows = [draw(2, 12, 9, 10) for _ in range(2)], [F.normalize(draw(1, 70, 24), dim=-1) for _ in range(2)]
    labels = (torch.arange(180, device="cuda").view(2, 9, 10) % 5) - 1
    found = {
        "warp": (maps[0], theta, [5, 6], None, "linear", True, "zeros", True),
        "infonce": (*rows, torch.tensor(0.2, device="cuda"), 0.01, "joint", *(None,) * 7),
        "crosscorr": (draw(70, 24), draw(70, 17), None),
        "joint": (*maps, None, 1, True, True),
        "lncc": (maps[0].sigmoid(), maps[1].sigmoid(), 5, 1e-5),
        "pool": (maps[0], labels, 5),
        "align": (*maps, theta, theta.flip(0).contiguous(), [4, 5], "linear", False, "border"),
        "entropy": (maps[0], torch.arange(180, device="cuda").view(2, 9, 10) % 3 > 0),
    }[op]
    count = 1 if op in ("warp", "pool", "entropy") else 2
    return [t.requires_grad_() if i < count else t for i, t in enumerate(found)], count


def step(op, backend, given, count):
    """Results and gradients of a sum that every floating-point result enters."""
    outs = getattr(torch.ops.pix2rep, op)(*given, backend)
    outs = [t for t in (outs if isinstance(outs, tuple) else (outs,)) if t.requires_grad]
    grads = torch.autograd.grad(sum(t.float().square().sum() for t in outs), given[:count])
    return [t.detach() for t in outs] + list(grads)


@each
def test_opcheck(op, backend):
    given, _ = arguments(op)
    torch.library.opcheck(getattr(torch.ops.pix2rep, op).default, (*given, backend))


@each
def test_compiles_in_one_graph(op, backend):
    given, count = arguments(op)
    compiled = torch.compile(lambda *t: getattr(torch.ops.pix2rep, op)(*t, *given[count:], backend), fullgraph=True)
    outs = compiled(*given[:count])
    outs = [t for t in (outs if isinstance(outs, tuple) else (outs,)) if t.requires_grad]
    grads = torch.autograd.grad(sum(t.float().square().sum() for t in outs), given[:count])
    assert error([*outs, *grads], step(op, backend, given, count)) < 1e-5


@each
def test_no_call_waits_for_the_device(op, backend):
    given, count = arguments(op)
    step(op, backend, given, count)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(op, backend, given, count)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@each
def test_a_graph_replays_on_other_inputs(op, backend):
    given, count = arguments(op)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step(op, backend, given, count)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(op, backend, given, count)
    others, _ = arguments(op)
    with torch.no_grad():
        for t, other in zip(given[:count], others[:count], strict=True):
            t.copy_(other)
    graph.replay()
    torch.cuda.synchronize()
    assert error(captured, step(op, backend, given, count)) < 1e-5


@each
def test_autocast_and_another_stream_change_nothing(op, backend):
    given, count = arguments(op)
    torch.use_deterministic_algorithms(True)
    try:
        plain = step(op, backend, given, count)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side), torch.autocast("cuda", torch.bfloat16):
            inside = step(op, backend, given, count)
        torch.cuda.current_stream().wait_stream(side)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(plain, inside, strict=True))
