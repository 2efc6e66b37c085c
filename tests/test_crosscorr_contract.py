"""crosscorr: registration, refusals, determinism, memory, and what the compiler makes of its Triton kernels for GPUs that are not here."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.harness import peak_mib
from crosscorr_helpers import CPU, EVERY, FAST, both, ours, refuses_what_does_not_fit, views, weights
from pix2rep_kernels import crosscorr
from pix2rep_kernels.ops.crosscorr import moments
from pix2rep_kernels.testing import error, placed

ROOT = Path(__file__).parents[1]
built = pytest.mark.skipif("cpu" not in FAST, reason="the CPU kernels are not built")

# Registration


@pytest.mark.parametrize("backend", CPU)
def test_opcheck(backend):
    for dtype, weight, needs in ((torch.float32, torch.rand(12).round(), (True, True)), (torch.float16, None, (True, False))):
        x, y = (t.requires_grad_() for t in views(12, 5, 3, dtype))
        torch.library.opcheck(torch.ops.pix2rep.crosscorr.default, (x, y, weight, backend))
        _, pivot_x, pivot_y, *found = (t.detach() for t in torch.ops.pix2rep.crosscorr(x, y, weight, backend))
        upstream = [torch.randn_like(t) for t in found]
        backward = (*upstream, x.detach(), y.detach(), weight, pivot_x, pivot_y, *needs, backend)
        torch.library.opcheck(torch.ops.pix2rep.crosscorr_backward.default, backward)


@pytest.mark.parametrize("backend", CPU)
def test_compiles_in_one_graph(backend):
    def loss(x, y, w):
        return (crosscorr(x, y, weight=w, backend=backend) - torch.eye(4)).square().sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True)
    for n in (6, 9, 40):
        x, y = (t.requires_grad_() for t in views(n, 4, 4))
        w = torch.rand(n)
        got, plain = (torch.autograd.grad(f(x, y, w), (x, y)) for f in (compiled, loss))
        assert error(got, plain) < 1e-5


def test_autocast_and_meta():
    x, y = views(12, 4, 5, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert crosscorr(x, y).dtype == torch.float32
    c = crosscorr(x.to("meta"), y.to("meta"))
    assert c.shape == (4, 5) and c.device.type == "meta"


@pytest.mark.parametrize("backend", CPU)
def test_no_second_derivative_and_none_for_the_weights(backend):
    x, y = (t.requires_grad_() for t in views(12, 4, 5))
    w = torch.rand(12, requires_grad=True)
    c = crosscorr(x, y, weight=w, backend=backend)
    grads = torch.autograd.grad(c.square().sum(), (x, y, w), create_graph=True, allow_unused=True)
    assert grads[2] is None
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(grads[0].sum(), x)
    m = moments(x, y, backend=backend)
    assert not m.count.requires_grad and not m.pivot_x.requires_grad and m.product.requires_grad


@pytest.mark.parametrize(
    "change, kind, message",
    [
        ({"x": torch.zeros(5)}, ValueError, r"`x` must have shape \[N, D1\], got \(5,\)"),
        ({"x": torch.zeros(5, 3, dtype=torch.int32)}, TypeError, "`x` must be float16, bfloat16, float32 or float64, got int32"),
        ({"y": torch.zeros(6, 4)}, ValueError, r"`y` must have shape \[5, D2\], got \(6, 4\)"),
        ({"y": torch.zeros(5, 4, 1)}, ValueError, r"`y` must have shape \[5, D2\], got \(5, 4, 1\)"),
        ({"y": torch.zeros(5, 4, device="meta")}, ValueError, "`y` must"),
        ({"weight": torch.zeros(4)}, ValueError, r"`weight` must have shape \(5,\), got \(4,\)"),
        ({"weight": torch.zeros(5, dtype=torch.int64)}, TypeError, "`weight` must be .*, got int64"),
        ({"weight": [1.0] * 5}, TypeError, "`weight` must be"),
        ({"normalization": "layer"}, ValueError, "`normalization` must be one of 'batchnorm', 'std', 'none', got 'layer'"),
        ({"backend": "fast"}, ValueError, "`backend` must be one of 'auto', .*, got 'fast'"),
    ],
)
def test_bad_input(change, kind, message):
    with pytest.raises(kind, match=message):
        crosscorr(**{"x": torch.zeros(5, 3), "y": torch.zeros(5, 4), **change})


@pytest.mark.parametrize("backend", [b for b in EVERY if b in ("triton", "cuda")])
def test_gpu_kernels_refuse_float64(backend):
    with pytest.raises(RuntimeError, match="float64 features run on the backends reference and cpu only"):
        placed(crosscorr)(torch.zeros(5, 3, dtype=torch.float64), torch.zeros(5, 3), backend=backend)


@built
def test_the_native_op_reads_nothing_out_of_bounds():
    x, y = views(5, 3, 4)
    refuses_what_does_not_fit(torch.ops.pix2rep_native, (x, y.double(), torch.ones(5)), (x.int(), y, None))


# Determinism


@built
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_same_bits_for_any_number_of_threads(dtype):
    x, y = views(3011, 37, 50, dtype)
    w, upstream = weights("numbers", 3011), torch.randn(37, 50)
    threads = torch.get_num_threads()
    try:
        results = []
        for run in range(20):
            torch.set_num_threads(1 + run % 3)
            results.append([*moments(x, y, weight=w, backend="cpu"), *both(ours("cpu"), x, y, upstream, weight=w)])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for result in results for a, b in zip(result, results[0], strict=True))


@pytest.mark.skipif("triton" not in EVERY, reason="triton does not run here")
def test_same_bits_on_every_run_of_triton():
    x, y = views(300, 17, 4)
    results = [both(ours("triton"), x, y, torch.ones(17, 4)) for _ in range(20 if "triton" in FAST else 2)]
    assert all(torch.equal(a, b) for result in results for a, b in zip(result, results[0], strict=True))


@built
def test_same_values_for_every_instruction_set(tmp_path):
    """PIX2REP_ISA picks a lower one; results agree to rounding."""
    code = """
import sys
import torch
from crosscorr_helpers import both, ours, views, weights
out = []
for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
    for d1, d2 in ((3, 50), (64, 33), (128, 16)):
        torch.manual_seed(0)
        x, y = views(333, d1, d2, dtype)
        out += [t.double() for t in both(ours("cpu"), x, y, torch.randn(d1, d2), weight=weights("numbers", 333))]
torch.save(out, sys.argv[1])
"""
    results = {}
    for isa in ("baseline", "avx2", "avx512"):
        path = tmp_path / f"{isa}.pt"
        environment = {**os.environ, "PIX2REP_ISA": isa, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
        subprocess.run([sys.executable, "-c", code, str(path)], env=environment, check=True, cwd=ROOT)
        results[isa] = torch.load(path)
    for isa in ("baseline", "avx2"):
        for k, (got, best) in enumerate(zip(results[isa], results["avx512"], strict=True)):
            narrow = torch.float16 if k < 9 else torch.bfloat16
            bound = 1e-13 if k >= 27 else 3e-6 if k >= 18 or k % 3 == 0 else torch.finfo(narrow).eps
            assert error([got], [best]) < bound, (isa, k)


# Memory

MEMORY = """
import torch
from pix2rep_kernels import crosscorr
torch.set_num_threads(1)
n = int(arguments[0])
def step(n):
    x, y = (torch.zeros(n, 64).normal_().requires_grad_() for _ in range(2))
    def run():
        crosscorr(x, y, backend="cpu").square().sum().backward()
    return run
def prepare():
    step(256)()
    return step(n)
def work(run):
    run()
"""


@built
def test_memory():
    """Beyond the two gradients at most 32 partial products, and no copy of a view: 32 MiB a view and 64 MiB a view."""
    for n in (131_072, 262_144):
        gradients = 2 * n * 64 * 4 / 2**20
        assert peak_mib(MEMORY, n) < gradients + 6
