"""joint: registration, refusals, determinism, memory."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.harness import peak_mib
from joint_helpers import DEVICE, FAST, problem, raw, three, upstream_of
from pix2rep_kernels import dispatch, joint
from pix2rep_kernels.testing import backends, error

HERE = [b for b in FAST if DEVICE[b] == "cpu"]
MODES = ((0, True), (1, True), (1, False))


# Registration


@pytest.mark.parametrize("backend", HERE)
def test_opcheck(backend):
    for (radius, collapsed), layout in itertools.product(MODES, ("first", "last")):
        a, b, mask = problem(3, space=(4, 5), masked=layout == "last", layouts=(layout, layout))
        arguments = (a.requires_grad_(), b.requires_grad_(), mask, radius, collapsed, True, backend)
        torch.library.opcheck(torch.ops.pix2rep.joint.default, arguments)
        sums = torch.ops.pix2rep.joint(*arguments).detach()
        backward = (sums, a.detach(), b.detach(), *arguments[2:-1], True, layout == "last", layout == "last", False, backend)
        torch.library.opcheck(torch.ops.pix2rep.joint_backward.default, backward)


def test_compiles_in_one_graph():
    backend = HERE[-1]
    compiled = torch.compile(lambda x, y, m: joint(x, y, mask=m, radius=1, backend=backend).square().sum(), fullgraph=True, dynamic=True)
    for space in ((6, 8), (9, 7), (5, 5)):
        a, b, mask = problem(4, space=space, masked=True)
        a.requires_grad_()
        (grad,) = torch.autograd.grad(compiled(a, b, mask), a)
        (plain,) = torch.autograd.grad(joint(a, b, mask=mask, radius=1, backend=backend).square().sum(), a)
        assert error([grad], [plain]) < 1e-5


def test_autocast_and_meta():
    a, b, mask = problem(4, dtypes=(torch.bfloat16,) * 2, masked=True)
    with torch.autocast("cpu", torch.bfloat16):
        inside = joint(a, b, mask=mask)
    assert inside.dtype == torch.float32 and torch.equal(inside, joint(a, b, mask=mask))
    meta = joint(a.to("meta"), b.to("meta"), radius=2, collapsed=False)
    assert meta.shape == (25, 4, 4) and meta.device.type == "meta"
    assert joint(a.double().to("meta"), b.to("meta")).dtype == torch.float64


@pytest.mark.parametrize("backend", HERE)
def test_no_second_derivative_and_layouts_of_gradients(backend):
    a, b, mask = problem(4, layouts=("last", "strided"), masked=True)
    a.requires_grad_(), b.requires_grad_()
    grads = torch.autograd.grad(joint(a, b, mask=mask, backend=backend).square().sum(), (a, b), create_graph=True)
    assert grads[0].is_contiguous(memory_format=torch.channels_last) and grads[1].is_contiguous()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(grads[0].sum(), a)


@pytest.mark.parametrize(
    "change, kind, message",
    [
        ({"a": torch.zeros(2, 3, 4)}, ValueError, r"`a` must have shape \[B, K, H, W\] or \[B, K, D, H, W\], got \(2, 3, 4\)"),
        ({"a": torch.zeros(2, 3, 4, 4, dtype=torch.int32)}, TypeError, "`a` must be float16, bfloat16, float32 or float64, got int32"),
        ({"a": 3}, TypeError, "`a` must be a torch.Tensor, got int"),
        ({"b": torch.zeros(2, 3, 4, 5)}, ValueError, r"`b` must have the shape of a \(2, 3, 4, 4\), got \(2, 3, 4, 5\)"),
        ({"b": torch.zeros(2, 3, 4, 4, device="meta")}, ValueError, "`b` must be on cpu as `a` is, got meta"),
        ({"radius": -1}, ValueError, "`radius` must be >= 0, got -1"),
        ({"radius": 1.0}, TypeError, "`radius` must be an int, got 1.0"),
        ({"radius": True}, TypeError, "`radius` must be an int, got True"),
        ({"mask": torch.ones(2, 4, 4)}, TypeError, "`mask` must be bool, got float32"),
        ({"mask": torch.ones(2, 3, 4, 4, dtype=torch.bool)}, ValueError, r"`mask` must have shape \(2, 1, 4, 4\) or \(2, 4, 4\), got \(2, 3, 4, 4\)"),
        ({"mask": torch.ones(1, 1, 4, 4, dtype=torch.bool)}, ValueError, r"`mask` must have shape .*, got \(1, 4, 4\)"),
        ({"backend": "fast"}, ValueError, "`backend` must be one of 'auto', .*, got 'fast'"),
    ],
)
def test_bad_input(change, kind, message):
    arguments = {"a": torch.zeros(2, 3, 4, 4), "b": torch.zeros(2, 3, 4, 4), **change}
    with pytest.raises(kind, match=message):
        joint(arguments.pop("a"), arguments.pop("b"), **arguments)


@pytest.mark.skipif("cpu" not in FAST, reason="the CPU kernels are not built")
def test_the_native_op_reads_nothing_out_of_bounds():
    native, a, flags = torch.ops.pix2rep_native, torch.zeros(2, 3, 4, 4), (True, True, False, False)
    with pytest.raises(RuntimeError, match="`b` must have the shape of a"):
        native.joint(a, a[:, :, :3], None, 0, True, True)
    with pytest.raises(RuntimeError, match="`a` must have shape"):
        native.joint(a[0], a[0], None, 0, True, True)
    with pytest.raises(RuntimeError, match=r"`mask` must have shape \[B, \*S\]"):
        native.joint(a, a, torch.ones(2, 4, 3, dtype=torch.bool), 0, True, True)
    with pytest.raises(RuntimeError, match="`mask` must be bool"):
        native.joint(a, a, torch.ones(2, 4, 4), 0, True, True)
    with pytest.raises(RuntimeError, match="`radius` must be >= 0"):
        native.joint(a, a, None, -1, True, True)
    for bad in (torch.zeros(1, 3, 2), torch.zeros(2, 3, 3), torch.zeros(3, 3)):
        with pytest.raises(RuntimeError, match=r"`grad_sums` must have shape \[displacements, K, K\]"):
            native.joint_backward(bad, a, a, None, 0, True, True, *flags)
    with pytest.raises(RuntimeError, match="`grad_sums` must have the dtype of the sums"):
        native.joint_backward(torch.zeros(1, 3, 3).double(), a, a, None, 0, True, True, *flags)


@pytest.mark.skipif("triton" not in backends("joint"), reason="triton does not run here")
def test_triton_says_what_it_does_not_take():
    device = DEVICE["triton"]
    assert "float64 maps run on" in dispatch.why_not("joint", "triton", [torch.zeros(1, 2, 3, 3, dtype=torch.float64, device=device)])
    assert "129 clusters: more than 128 run on" in dispatch.why_not("joint", "triton", [torch.zeros(1, 129, 3, 3, device=device)])
    with pytest.raises(RuntimeError, match="backend 'triton' cannot run joint: 200 clusters"):
        joint(torch.zeros(1, 200, 2, 2, device=device), torch.zeros(1, 200, 2, 2, device=device), backend="triton")


# Determinism


@pytest.mark.parametrize("radius, collapsed", MODES)
@pytest.mark.skipif("cpu" not in FAST, reason="the CPU kernels are not built")
def test_same_bits_for_any_number_of_threads(radius, collapsed):
    a, b, mask = problem(11, 3, (70, 65), masked=True)
    upstream = upstream_of(a, radius, collapsed)
    threads = torch.get_num_threads()
    try:
        results = []
        for run in range(20):
            torch.set_num_threads(1 + run % 3)
            results.append(three(raw("cpu"), a, b, upstream, mask=mask, radius=radius, collapsed=collapsed))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(x, y) for result in results for x, y in zip(result, results[0], strict=True))


@pytest.mark.skipif("triton" not in backends("joint"), reason="triton does not run here")
def test_triton_gives_the_same_bits():
    a, b, mask = problem(4, 1, (6, 7), masked=True)
    upstream = upstream_of(a)
    results = [three(raw("triton"), a, b, upstream, mask=mask, radius=1) for _ in range(3 if DEVICE["triton"] == "cpu" else 20)]
    assert all(torch.equal(x, y) for result in results for x, y in zip(result, results[0], strict=True))


@pytest.mark.skipif("cpu" not in FAST, reason="the CPU kernels are not built")
def test_same_values_for_every_instruction_set():
    code = """
import torch
from pix2rep_kernels import joint
torch.manual_seed(0)
out = []
for clusters, dtype, last in (
    (13, torch.float32, False), (29, torch.float32, True), (6, torch.float64, False), (9, torch.bfloat16, True), (9, torch.float16, False)
):
    weights = torch.randn(clusters, clusters)
    a, b = (torch.randn(2, clusters, 12, 11).to(dtype) for _ in range(2))
    a = (a.contiguous(memory_format=torch.channels_last) if last else a).requires_grad_()
    for radius, collapsed in ((0, True), (2, True), (2, False)):
        p = joint(a, b, radius=radius, collapsed=collapsed, backend="cpu")
        out += [p.detach().double(), torch.autograd.grad((p * weights).sum() * 1000, a)[0].double()]
torch.save(out, "{}")
"""
    results = {}
    for isa in ("baseline", "avx2", "avx512"):
        path = Path(os.environ.get("TMPDIR", "/tmp")) / f"joint_{os.getpid()}_{isa}.pt"
        subprocess.run([sys.executable, "-c", code.format(path)], env={**os.environ, "PIX2REP_ISA": isa}, check=True, cwd=Path(__file__).parents[1])
        results[isa] = torch.load(path)
        path.unlink()
    for isa in ("avx2", "avx512"):
        for i, (x, y) in enumerate(zip(results[isa], results["baseline"], strict=True)):
            assert error([x], [y]) <= (1e-2 if i >= 18 and i % 2 else 1e-5), (isa, i)


MEMORY = """
import torch
from pix2rep_kernels import joint
size, radius, collapsed = int(arguments[0]), int(arguments[1]), arguments[2] == "True"
torch.set_num_threads(2)
def prepare():
    work([torch.randn(1, 16, 32, 32).requires_grad_() for _ in range(2)])
    return [torch.randn(8, 16, size, size).requires_grad_() for _ in range(2)]
def work(maps):
    joint(*maps, radius=radius, collapsed=collapsed, backend="cpu").square().sum().backward()
"""


@pytest.mark.skipif("cpu" not in FAST, reason="the CPU kernels are not built")
@pytest.mark.parametrize("radius, collapsed", [(0, True), (2, False)])
def test_memory(radius, collapsed):
    """Two gradients, a scratch of 4 MiB or of one image with its margins, partial sums of a quarter of the maps, and 4 MiB for the threads' tiles."""
    for size in (128, 256):
        maps = 2 * 8 * 16 * size * size * 4 / 2**20
        scratch = 2 * max(4, maps / 16) if radius else 0
        assert peak_mib(MEMORY, size, radius, collapsed) < maps + scratch + 4
