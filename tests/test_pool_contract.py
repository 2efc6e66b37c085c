"""pool: registration, refusals, determinism, memory, and what the compiler makes of its Triton kernels for GPUs that are not here."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.harness import peak_mib
from pix2rep_kernels import pool, why_not
from pool_helpers import DEVICE, EVERY, FAST, both, ours, problem

ROOT = Path(__file__).parents[1]
HERE = [b for b in FAST if DEVICE[b] == "cpu"]
needs_cpu = pytest.mark.skipif("cpu" not in FAST, reason="the CPU kernels are not built")

# Registration


@pytest.mark.parametrize("backend", HERE)
def test_opcheck(backend):
    for layout in ("last", "first"):
        features, labels, regions = problem(channels=3, layout=layout)
        arguments = (features.requires_grad_(), labels, regions, backend)
        torch.library.opcheck(torch.ops.pix2rep.pool.default, arguments)
        means, counts = torch.ops.pix2rep.pool(*arguments)
        backward = (torch.randn_like(means), counts, labels, features.detach().new_empty(0), list(features.shape), layout == "last", backend)
        torch.library.opcheck(torch.ops.pix2rep.pool_backward.default, backward)


@pytest.mark.parametrize("backend", HERE)
def test_compiles_in_one_graph(backend):
    compiled = torch.compile(lambda f, x, r: pool(f, x, regions=r, backend=backend)[0].square().sum(), fullgraph=True, dynamic=True)
    for space, regions in (((6, 8), 5), ((9, 7), 4), ((5, 5), 8)):
        features, labels, _ = problem(channels=4, space=space)
        features.requires_grad_()
        (grad,) = torch.autograd.grad(compiled(features, labels, regions), features)
        (plain,) = torch.autograd.grad(pool(features, labels, regions=regions, backend=backend)[0].square().sum(), features)
        assert torch.equal(grad, plain)


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(narrow):
    for backend, dtype in itertools.product(HERE, (torch.float32, narrow)):
        features, labels, regions = problem(channels=4, dtype=dtype)
        upstream = torch.randn(2, regions, 4)
        plain = both(ours(backend), features, labels, regions, upstream)
        with torch.autocast("cpu", narrow):
            inside = both(ours(backend), features, labels, regions, upstream)
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(plain, inside, strict=True))


def test_meta_and_second_derivative():
    features, labels, regions = problem(channels=4)
    means, counts = pool(features.to("meta"), labels.to("meta"), regions=regions)
    assert means.shape == (2, regions, 4) and means.device.type == "meta" and counts.shape == (2, regions) and counts.dtype == torch.int64
    means, counts = pool(features.requires_grad_(), labels, regions=regions)
    assert not counts.requires_grad
    (grad,) = torch.autograd.grad(means.square().sum(), features, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(grad.sum(), features)


@pytest.mark.parametrize(
    "change, kind, message",
    [
        ({"features": torch.zeros(2, 3)}, ValueError, r"`features` must have shape \[B, C, \*S\] with 1 to 3 spatial axes, got \(2, 3\)"),
        ({"features": torch.zeros(2, 3, 4, 4, 1, 1)}, ValueError, r"`features` must have shape \[B, C, \*S\]"),
        ({"features": torch.zeros(2, 3, 4, 4, dtype=torch.int32)}, TypeError, "`features` must be float16, bfloat16, float32 or float64, got int32"),
        ({"features": None}, TypeError, "`features` must be a torch.Tensor, got NoneType"),
        ({"labels": torch.zeros(2, 4, 4)}, TypeError, "`labels` must be uint8, int8, int16, int32 or int64, got float32"),
        ({"labels": torch.zeros(2, 4, 4, dtype=torch.bool)}, TypeError, "`labels` must be uint8, int8, int16, int32 or int64, got bool"),
        ({"labels": torch.zeros(2, 4, 5, dtype=torch.int64)}, ValueError, r"`labels` must have shape \(2, 4, 4\), got \(2, 4, 5\)"),
        ({"labels": torch.zeros(2, 1, 4, 4, dtype=torch.int64)}, ValueError, r"`labels` must have shape \(2, 4, 4\), got \(2, 1, 4, 4\)"),
        ({"labels": torch.zeros(2, 4, 4, dtype=torch.int64, device="meta")}, ValueError, "`labels` must be on cpu as `features` is, got meta"),
        ({"regions": -1}, ValueError, "`regions` must be >= 0, got -1"),
        ({"regions": 2.0}, TypeError, "`regions` must be an int, got 2.0"),
        ({"regions": True}, TypeError, "`regions` must be an int, got True"),
        ({"backend": "fast"}, ValueError, "`backend` must be one of 'auto', .*, got 'fast'"),
    ],
)
def test_bad_input(change, kind, message):
    with pytest.raises(kind, match=message):
        pool(**{"features": torch.zeros(2, 3, 4, 4), "labels": torch.zeros(2, 4, 4, dtype=torch.int64), "regions": 3, **change})


@needs_cpu
def test_the_native_op_reads_nothing_out_of_bounds():
    features, labels, native = torch.zeros(2, 3, 4, 4), torch.zeros(2, 4, 4, dtype=torch.int64), torch.ops.pix2rep_native
    grad, counts = torch.zeros(2, 5, 3), torch.zeros(2, 5, dtype=torch.int64)
    for wrong in (labels[:1], labels[:, :3], labels[..., :3], labels[0], labels.unsqueeze(3)):
        with pytest.raises(RuntimeError, match="`labels` must have the shape"):
            native.pool(features, wrong, 5)
        with pytest.raises(RuntimeError, match="`labels` must have the shape"):
            native.pool_backward(grad, counts, wrong, features, [2, 3, 4, 4], False)
    with pytest.raises(RuntimeError, match="`features` must have shape"):
        native.pool(features[0, 0], labels, 5)
    with pytest.raises(RuntimeError, match="`labels` must be uint8"):
        native.pool(features, labels.float(), 5)
    with pytest.raises(RuntimeError, match="`regions` must be >= 0, got -1"):
        native.pool(features, labels, -1)
    for wrong in (grad[:1], grad[:, :4], grad[..., :2], grad[0]):
        with pytest.raises(RuntimeError, match="`grad_means` must have shape"):
            native.pool_backward(wrong, counts, labels, features, [2, 3, 4, 4], False)
    for wrong in (counts[:1], counts[0], counts.int()):
        with pytest.raises(RuntimeError, match="`counts` must be int64 of shape"):
            native.pool_backward(grad, wrong, labels, features, [2, 3, 4, 4], False)
    with pytest.raises(RuntimeError, match="`grad_means` must have the dtype of the means"):
        native.pool_backward(grad.double(), counts, labels, features, [2, 3, 4, 4], False)
    with pytest.raises(RuntimeError, match="`shape` must be"):
        native.pool_backward(grad, counts, labels, features, [2, 3], False)


@pytest.mark.skipif("triton" not in EVERY, reason="triton does not run here")
def test_limits_of_triton():
    device, labels = DEVICE["triton"], torch.zeros(1, dtype=torch.uint8, device=DEVICE["triton"])
    assert "float64" in why_not("pool", "triton", [torch.zeros(1, dtype=torch.float64, device=device), labels])
    assert "at most 2^31 - 1 of them; there are 2147483648" in why_not("pool", "triton", [torch.zeros(1, device=device), labels.expand(2**31)])
    assert why_not("pool", "triton", [torch.zeros(1, device=device), labels.expand(2**31 - 1)]) is None


# Determinism


@pytest.mark.parametrize("layout", ["last", "first"])
@needs_cpu
def test_same_bits_for_any_number_of_threads(layout):
    features, labels, regions = problem(channels=70, batch=3, layout=layout, space=(101, 103), regions=30)
    upstream = torch.randn(3, regions, 70)
    threads = torch.get_num_threads()
    try:
        results = []
        for run in range(20):
            torch.set_num_threads(1 + run % 3)
            results.append(both(ours("cpu"), features, labels, regions, upstream))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for result in results for a, b in zip(result, results[0], strict=True))


@pytest.mark.skipif("triton" not in EVERY, reason="triton does not run here")
def test_same_bits_every_time_in_triton():
    """Pixels of a region in several pieces, without and with deterministic algorithms asked for."""
    features, labels, regions = problem(channels=2, batch=1, space=(20, 15), regions=2, runs=150)
    upstream = torch.randn(1, regions, 2)
    results = []
    for run in range(2 if DEVICE["triton"] == "cpu" else 20):
        torch.use_deterministic_algorithms(run % 2 == 1)
        try:
            results.append(both(ours("triton"), features, labels, regions, upstream))
        finally:
            torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for result in results for a, b in zip(result, results[0], strict=True))


@needs_cpu
def test_same_bits_for_every_instruction_set(tmp_path):
    """PIX2REP_ISA picks a lower one; sums are in double and in the order of the pixels whatever the vectors are."""
    code = """
import sys, torch
from pix2rep_kernels import pool
torch.manual_seed(0)
out = []
for channels in (1, 7, 37, 150):
    features = torch.randn(2, channels, 12, 10, dtype=torch.float64)
    labels = torch.randint(-1, 6, (2, 12, 5)).repeat_interleave(2, 2)
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        f = features.to(dtype)
        f.view(-1)[:4] = torch.tensor([float("inf"), float("nan"), 3e-6, -0.0])
        for g in (f, f.contiguous(memory_format=torch.channels_last)):
            g.requires_grad_()
            means, counts = pool(g, labels, regions=5, backend="cpu")
            out += [means.nan_to_num(7, 8, 9), counts, torch.autograd.grad(means, g, torch.randn_like(means))[0]]
torch.save(out, sys.argv[1])
"""
    results = {}
    for isa in ("baseline", "avx2", "avx512"):
        subprocess.run([sys.executable, "-c", code, str(tmp_path / isa)], env={**os.environ, "PIX2REP_ISA": isa}, check=True, cwd=ROOT)
        results[isa] = torch.load(tmp_path / isa)
    for isa in ("avx2", "avx512"):
        assert all(torch.equal(a.detach(), b.detach()) for a, b in zip(results[isa], results["baseline"], strict=True)), isa


# Memory


MEMORY = """
import torch
from pix2rep_kernels import pool, why_not
side, layout = int(arguments[0]), arguments[1]
def prepare():
    work(inputs(32))
    return inputs(side)
def inputs(side):
    features = torch.randn(2, side, side, 48).permute(0, 3, 1, 2) if layout == "last" else torch.randn(2, 48, side, side)
    return features.requires_grad_(), torch.arange(side * side).floor_divide(side).view(1, side, side).expand(2, -1, -1)
def work(given):
    pool(*given, regions=200, backend="cpu")[0].square().sum().backward()
"""


@needs_cpu
@pytest.mark.parametrize("layout, side", [("last", 128), ("last", 256), ("first", 256)])
def test_memory_is_the_gradient(layout, side):
    """Beyond the inputs: the gradient, and sums of R x C in double a chunk, under 5 MiB here; whatever the size of the image."""
    gradient = 2 * 48 * side * side * 4 / 2**20
    assert gradient - 2 < peak_mib(MEMORY, side, layout) < gradient + 6




STATIC = """
import json, sys
from benchmarks import calls_pool, compiled
calls_pool.CALLS = {name: calls_pool.CALLS[name] for name in json.loads(sys.argv[1])}
for row in compiled.rows("pool", json.loads(sys.argv[2])):
    print(json.dumps(row))
"""
