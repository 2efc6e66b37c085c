"""lncc: registration, refusals, determinism, memory, and what the compiler makes of its Triton kernels for GPUs that are not here."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.harness import peak_mib
from lncc_helpers import HERE, NEEDS, both, ours, problem
from pix2rep_kernels import lncc
from pix2rep_kernels.testing import backends, error, placed

ROOT = Path(__file__).parents[1]
BUILT = pytest.mark.skipif("cpu" not in HERE, reason="the CPU kernels are not built")


# Registration


@pytest.mark.parametrize("backend", HERE)
def test_opcheck(backend):
    for shape, dtype in (((2, 1, 5, 6), torch.float32), ((1, 2, 3, 4, 5), torch.bfloat16)):
        i, j, upstream = problem(shape, dtype)
        torch.library.opcheck(torch.ops.pix2rep.lncc.default, (i.requires_grad_(), j.requires_grad_(), 3, 1e-5, backend))
        for needs in NEEDS:
            torch.library.opcheck(torch.ops.pix2rep.lncc_backward.default, (upstream, i.detach(), j.detach(), 3, 1e-5, *needs, backend))


@pytest.mark.parametrize("backend", HERE)
def test_compiles_in_one_graph(backend):
    compiled = torch.compile(lambda i, j: lncc(i, j, backend=backend).square().mean(), fullgraph=True, dynamic=True, backend="aot_eager")
    for shape in ((2, 1, 6, 8), (3, 1, 9, 7), (1, 2, 5, 5)):
        i, j, _ = problem(shape)
        i.requires_grad_()
        (grad,) = torch.autograd.grad(compiled(i, j), i)
        (plain,) = torch.autograd.grad(lncc(i, j, backend=backend).square().mean(), i)
        assert error([grad], [plain]) <= 1e-6


def test_autocast_and_meta():
    i, j, _ = problem((2, 1, 5, 6), torch.bfloat16)
    plain = lncc(i, j)
    with torch.autocast("cpu", torch.bfloat16):
        cc = lncc(i, j)
    assert cc.dtype == torch.float32 and torch.equal(cc, plain)
    meta = lncc(i.to("meta"), j.double().to("meta"))
    assert meta.shape == i.shape and meta.dtype == torch.float64 and meta.device.type == "meta"


@pytest.mark.parametrize("backend", HERE)
def test_no_second_derivative(backend):
    i, j, _ = problem()
    (grad,) = torch.autograd.grad(lncc(i.requires_grad_(), j, backend=backend).sum(), i, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(grad.sum(), i)


@pytest.mark.parametrize(
    "change, kind, message",
    [
        ({"i": torch.zeros(2, 3, 4)}, ValueError, r"`i` must have shape \[B, C, H, W\] or \[B, C, D, H, W\], got \(2, 3, 4\)"),
        ({"i": torch.zeros(2, 1, 4, 4, dtype=torch.int32)}, TypeError, "`i` must be float16, bfloat16, float32 or float64, got int32"),
        ({"i": 3}, TypeError, "`i` must be a torch.Tensor, got int"),
        ({"j": torch.zeros(2, 1, 4, 5)}, ValueError, r"`j` must have the shape of i \(2, 1, 4, 4\), got \(2, 1, 4, 5\)"),
        ({"j": torch.zeros(2, 1, 4, 4, dtype=torch.bool)}, TypeError, "`j` must be float16, bfloat16, float32 or float64, got bool"),
        ({"j": torch.zeros(2, 1, 4, 4, device="meta")}, ValueError, "`j` must be on cpu as `i` is, got meta"),
        ({"window": 4}, ValueError, "`window` must be odd and > 0, got 4"),
        ({"window": -3}, ValueError, "`window` must be odd and > 0, got -3"),
        ({"window": 5.0}, TypeError, "`window` must be an int, got 5.0"),
        ({"window": True}, TypeError, "`window` must be an int, got True"),
        ({"eps": 0.0}, ValueError, r"`eps` must be > 0 and finite \(1e-30 at least\), got 0.0"),
        ({"eps": float("nan")}, ValueError, r"`eps` must be > 0 and finite \(1e-30 at least\), got nan"),
        ({"eps": "small"}, TypeError, "`eps` must be a float, got 'small'"),
        ({"backend": "fast"}, ValueError, "`backend` must be one of 'auto', .*, got 'fast'"),
        ({"backend": "cuda"}, RuntimeError, "backend 'cuda' cannot run lncc: "),
    ],
)  # fmt: skip
def test_bad_input(change, kind, message):
    with pytest.raises(kind, match=message):
        lncc(**{"i": torch.zeros(2, 1, 4, 4), "j": torch.zeros(2, 1, 4, 4), **change})


def test_triton_refuses_float64():
    if "triton" not in backends("lncc"):
        pytest.skip("triton does not run here")
    with pytest.raises(RuntimeError, match="backend 'triton' cannot run lncc: float64 maps run on the backends reference and cpu only"):
        placed(lncc)(torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2, dtype=torch.float64), backend="triton")


@BUILT
def test_the_raw_op_reads_nothing_out_of_bounds():
    forward, backward = torch.ops.pix2rep_native.lncc, torch.ops.pix2rep_native.lncc_backward
    i = torch.zeros(2, 1, 4, 5)
    for bad, message in (((i[0], i[0], 3, 1e-5), "`i` must have shape"), ((i, i[..., :-1], 3, 1e-5), "`j` must have the shape of i"),
                         ((i, i[0], 3, 1e-5), "`j` must have the shape of i"), ((i, i, 4, 1e-5), "`window` must be odd"),
                         ((i, i, -1, 1e-5), "`window` must be odd"), ((i, i, 3, 0.0), "`eps` must be"),
                         ((i.int(), i.int(), 3, 1e-5), "`i` must be float16")):  # fmt: skip
        with pytest.raises(RuntimeError, match=message):
            forward(*bad)
        with pytest.raises(RuntimeError, match=message):
            backward(i, *bad, True, True)
    for grad in (i[:, :, :2], i[0], torch.zeros(2, 1, 4, 5, 1)):
        with pytest.raises(RuntimeError, match="`grad_cc` must have the shape of i"):
            backward(grad, i, i, 3, 1e-5, True, True)


# Determinism


@BUILT
@pytest.mark.parametrize("shape, window", [((3, 2, 61, 90), 5), ((1, 1, 200, 600), 9), ((1, 1, 30, 41, 37), 5)], ids=str)
def test_same_bits_for_any_number_of_threads(shape, window):
    """Three threads cut the map in other boxes than one does."""
    i, j, upstream = problem(shape)
    threads = torch.get_num_threads()
    try:
        results = []
        for run in range(20 if shape[0] == 3 else 6):
            torch.set_num_threads(1 + run % 3)
            results.append(both(ours("cpu"), i, j, upstream, window=window))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for result in results for a, b in zip(result, results[0], strict=True))


@BUILT
def test_same_values_for_every_instruction_set(tmp_path):
    """PIX2REP_ISA picks a lower one; 16-bit storage agrees to its last bit's width."""
    code = """
import sys, torch
from pix2rep_kernels import lncc
torch.manual_seed(0)
out = []
for shape in ((2, 1, 12, 37), (1, 1, 5, 6, 19)):
    i, j, upstream = torch.rand(shape), torch.rand(shape), torch.randn(shape)
    i[..., 0] *= 1e-6
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        x, y = i.to(dtype).requires_grad_(), j.to(dtype).requires_grad_()
        cc = lncc(x, y, window=3, backend="cpu")
        out += [cc.detach(), *torch.autograd.grad(cc, (x, y), upstream.to(cc.dtype))]
torch.save(out, sys.argv[1])
"""
    results = {}
    for isa in ("baseline", "avx2", "avx512"):
        path = tmp_path / isa
        subprocess.run([sys.executable, "-c", code, path], env={**os.environ, "PIX2REP_ISA": isa}, check=True, cwd=ROOT)
        results[isa] = torch.load(path)
    for isa in ("avx2", "avx512"):
        for a, b in zip(results[isa], results["baseline"], strict=True):
            assert error([a], [b]) <= 16 * torch.finfo(a.dtype).eps, (isa, a.dtype)


# Memory

MEMORY = """
import sys, torch
torch.set_num_threads(2)
from pix2rep_kernels import lncc
def step(maps):
    cc = lncc(*maps, window=9, backend="cpu")
    cc.backward(torch.ones(()).expand_as(cc))
def prepare():
    step([torch.rand(1, 1, 64, 64, requires_grad=True) for _ in range(2)])
    return [torch.rand(int(arguments[0]), 1, 512, 512, requires_grad=True) for _ in range(2)]
def work(maps):
    step(maps)
"""


@BUILT
def test_memory_is_the_results_and_a_few_lines():
    """A MiB an image: cc and two gradients, whatever the window; less than 2 MiB of buffers in each thread."""
    for images in (8, 16):
        assert 3 * images <= peak_mib(MEMORY, images) <= 3 * images + 2 * 2 + 4
