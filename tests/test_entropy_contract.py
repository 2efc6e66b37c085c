"""entropy: registration, refusals, determinism, memory."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pix2rep_kernels
from benchmarks.harness import peak_mib
from entropy_helpers import FAST, entropy, problem
from pix2rep_kernels import dispatch
from pix2rep_kernels.testing import backends, error, home
from sweep import FULL

BUILT = pytest.mark.skipif("cpu" not in FAST, reason="the CPU kernels are not built")


# Registration


@pytest.mark.parametrize("backend", [b for b in FAST if home(b) == "cpu"])
def test_opcheck_and_one_graph(backend):
    for layout, dtype in (("first", torch.float32), ("last", torch.bfloat16)):
        logits, upstream, mask = problem(3, 2, (4, 5), layout, dtype, layout == "last")
        torch.library.opcheck(torch.ops.pix2rep.entropy.default, (logits.requires_grad_(), mask, backend))
        torch.library.opcheck(torch.ops.pix2rep.entropy_backward.default, (upstream, logits.detach(), mask, layout == "last", backend))
    compiled = torch.compile(lambda x, m: entropy(x, mask=m, backend=backend).square().sum(), fullgraph=True, dynamic=True, backend="aot_eager")
    for space in ((6, 8), (9, 7), (5, 5)):
        logits, _, mask = problem(4, space=space, masked=True)
        (grad,) = torch.autograd.grad(compiled(logits.requires_grad_(), mask), logits)
        (own,) = torch.autograd.grad(entropy(logits, mask=mask, backend=backend).square().sum(), logits)
        assert error([grad], [own]) < 1e-6


def test_autocast_meta_and_no_second_derivative():
    logits, _, mask = problem(4, dtype=torch.bfloat16, masked=True)
    with torch.autocast("cpu", torch.bfloat16):
        inside = entropy(logits, mask=mask)
    assert inside.dtype == torch.float32 and torch.equal(inside, entropy(logits, mask=mask))
    meta = pix2rep_kernels.entropy(logits.double().to("meta"))
    assert meta.shape == (2, 1, 7, 9) and meta.dtype == torch.float64 and meta.device.type == "meta"
    (grad,) = torch.autograd.grad(entropy(logits.requires_grad_()).sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="entropy has no second derivative"):
        torch.autograd.grad(grad.sum(), logits)


@pytest.mark.parametrize(
    "change, kind, message",
    [
        ({"logits": torch.zeros(2, 3, 4)}, ValueError, r"`logits` must have shape \[B, K, H, W\] or \[B, K, D, H, W\] with K >= 1, got \(2, 3, 4\)"),
        ({"logits": torch.zeros(2, 0, 4, 4)}, ValueError, r"`logits` must have shape .* with K >= 1, got \(2, 0, 4, 4\)"),
        ({"logits": torch.zeros(2, 3, 4, 4, dtype=torch.int32)}, TypeError, "`logits` must be float16, bfloat16, float32 or float64, got int32"),
        ({"logits": 3}, TypeError, "`logits` must be a torch.Tensor, got int"),
        ({"mask": torch.ones(2, 4, 4)}, TypeError, "`mask` must be bool, got float32"),
        ({"mask": torch.ones(2, 4, 3, dtype=torch.bool)}, ValueError, r"`mask` must have shape \(2, 1, 4, 4\) or \(2, 4, 4\), got \(2, 4, 3\)"),
        ({"mask": torch.ones(2, 4, 4, dtype=torch.bool, device="meta")}, ValueError, "`mask` must be on cpu as `logits` is, got meta"),
        ({"backend": "fast"}, ValueError, "`backend` must be one of 'auto', .*, got 'fast'"),
        ({"backend": "cuda"}, RuntimeError, "backend 'cuda' cannot run entropy: the Triton kernel serves CUDA tensors"),
    ],
)  # fmt: skip
def test_bad_input(change, kind, message):
    arguments = {"logits": torch.zeros(2, 3, 4, 4), **change}
    with pytest.raises(kind, match=message):
        pix2rep_kernels.entropy(arguments.pop("logits"), **arguments)


@BUILT
def test_the_native_op_reads_nothing_out_of_bounds():
    native, x = torch.ops.pix2rep_native, torch.zeros(2, 3, 4, 4)
    for bad, mask, message in (
        (x[0], None, "`logits` must have shape"), (x[:, :0], None, "`logits` must have at least one cluster"), (x.int(), None, "`logits` must be float16"),
        (x, torch.ones(2, 4, 3, dtype=torch.bool), r"`mask` must have shape \[B, \*S\]"), (x, torch.ones(2, 4, 4), "`mask` must be bool"),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match=message):
            native.entropy(bad, mask)
        with pytest.raises(RuntimeError, match=message):
            native.entropy_backward(x[:, :1], bad, mask, False)
    for bad, message in ((x, r"`grad_h` must have shape \[B, 1, \*S\]"), (x[:, :1].double(), "`grad_h` must have the dtype of h")):
        with pytest.raises(RuntimeError, match=message):
            native.entropy_backward(bad, x, None, False)


@pytest.mark.skipif("triton" not in backends("entropy"), reason="triton does not run here")
def test_triton_says_what_it_does_not_take():
    assert "float64 maps run on" in dispatch.why_not("entropy", "triton", [torch.zeros(1, 2, 3, 3, dtype=torch.float64, device=home("triton"))])


# Determinism


@BUILT
def test_same_bits_for_any_number_of_threads_and_values_for_every_instruction_set(tmp_path):
    code = """
import sys, torch
from pix2rep_kernels import entropy
torch.manual_seed(0)
out = []
for clusters, dtype, last in ((13, torch.float32, False), (40, torch.float32, True), (6, torch.float64, False), (9, torch.bfloat16, True)):
    x, upstream = torch.randn(3, clusters, 70, 65), torch.randn(3, 1, 70, 65)
    x = (x.to(dtype).contiguous(memory_format=torch.channels_last) if last else x.to(dtype)).requires_grad_()
    runs = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        h = entropy(x, backend="cpu")
        runs.append((h.detach(), torch.autograd.grad(h, x, upstream.to(h.dtype))[0]))
    assert all(torch.equal(a, b) for run in runs for a, b in zip(run, runs[0]))
    out += runs[0]
torch.save(out, sys.argv[1])
"""
    results = {}
    for isa in ("baseline", "avx2", "avx512") if FULL else ("baseline", "avx2"):  # each imports torch anew
        path = tmp_path / isa
        subprocess.run([sys.executable, "-c", code, path], env={**os.environ, "PIX2REP_ISA": isa}, check=True, cwd=Path(__file__).parents[1])
        results[isa] = torch.load(path)
    for isa, found in results.items():
        for a, b in zip(found, results["baseline"], strict=True):
            assert error([a], [b]) <= 8 * torch.finfo(a.dtype).eps, (isa, a.dtype)


# Memory


MEMORY = """
import torch
from pix2rep_kernels import entropy
torch.set_num_threads(2)
def prepare():
    work(torch.randn(1, 16, 32, 32).requires_grad_())
    return torch.randn(8, 16, 128, 128).requires_grad_()
def work(logits):
    entropy(logits, backend="cpu").sum().backward()
"""


@BUILT
def test_memory_is_the_gradient_and_one_map():
    """8 MiB of gradient, 0.5 MiB of H and of its gradient made dense, and 3 MiB for the threads' tiles."""
    assert 8 <= peak_mib(MEMORY) < 8 + 2 * 0.5 + 3
