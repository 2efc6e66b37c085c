"""align: registration, refusals, determinism, and what the compiler makes of its Triton kernels for GPUs that are not here."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from align_helpers import DEVICE, FAST, both, ours, problem
from pix2rep_kernels import align
from pix2rep_kernels.testing import backends, error

ROOT = Path(__file__).parents[1]
ON_CPU = [b for b in FAST if DEVICE[b] == "cpu"]

# Registration


@pytest.mark.parametrize("backend", ON_CPU[-1:])
def test_opcheck(backend):
    for layouts, kinds in itertools.product((("last", "first"), ("first", "last")), ((True, False), (True, True))):
        tensors, keywords = problem(channels=3, layouts=layouts, affine=kinds)
        options = (list(keywords["size"]), "linear", False, "border")
        arguments = (*(f.requires_grad_() for f in tensors[:2]), *tensors[2:], *options)
        torch.library.opcheck(torch.ops.pix2rep.align.default, (*arguments, backend))
        sums = [torch.randn(2, *keywords["size"]) for _ in range(3)]
        maps = [f.detach() for f in tensors[:2]]
        for needs in ((True, True), (True, False), (False, True)):
            backward = (*sums, *maps, *tensors[2:], *options, *needs, layouts[0] == "last", layouts[1] == "last", backend)
            torch.library.opcheck(torch.ops.pix2rep.align_backward.default, backward, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("backend", ON_CPU[-1:])
def test_compiles_in_one_graph(backend):
    def cosine(f1, f2, g1, g2, size):
        dot, sq1, sq2, valid = align(f1, f2, g1, g2, size=size, backend=backend)
        return (dot * (sq1 * sq2 + 1e-6).rsqrt() * valid).sum()

    compiled = torch.compile(cosine, fullgraph=True, dynamic=True)
    for spaces, size in ((((6, 8), (4, 5)), (3, 4)), (((9, 7), (5, 6)), (4, 5)), (((5, 5), (7, 8)), (6, 3))):
        tensors, _ = problem(channels=4, spaces=spaces, size=size)
        tensors[0].requires_grad_()
        (grad,) = torch.autograd.grad(compiled(*tensors, size), tensors[0])
        (plain,) = torch.autograd.grad(cosine(*tensors, size), tensors[0])
        assert error([grad], [plain]) <= 1e-6


def test_autocast_and_meta():
    tensors, keywords = problem(channels=4, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert align(*tensors, **keywords)[0].dtype == torch.float32
    *sums, valid = align(*(t.to("meta") for t in tensors), **keywords)
    assert all(s.shape == (2, 4, 9) and s.device.type == "meta" and s.dtype == torch.float32 for s in sums) and valid.dtype == torch.bool


@pytest.mark.parametrize("backend", ON_CPU)
def test_no_second_derivative_and_none_for_the_grids(backend):
    tensors, keywords = problem(channels=4)
    tensors = [t.requires_grad_() for t in tensors]
    dot, sq1, sq2, valid = align(*tensors, backend=backend, **keywords)
    assert not valid.requires_grad and dot.requires_grad
    grads = torch.autograd.grad((dot.square() + sq1 * sq2).sum(), tensors, create_graph=True, allow_unused=True)
    assert grads[2] is None and grads[3] is None
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(grads[0].sum(), tensors[0])


@pytest.mark.parametrize(
    "change, kind, message",
    [
        ({"f1": torch.zeros(2, 3, 4)}, ValueError, r"`f1` must have shape \[B, C, H, W\] or \[B, C, D, H, W\], got \(2, 3, 4\)"),
        ({"f1": torch.zeros(2, 3, 4, 4, dtype=torch.int32)}, TypeError, "`f1` must be float16, bfloat16, float32 or float64, got int32"),
        ({"f2": torch.zeros(2, 4, 4, 4)}, ValueError, r"`f2` must have shape \[2, 3, \*S2\] with 2 spatial axes, got \(2, 4, 4, 4\)"),
        ({"f2": torch.zeros(2, 3, 4, 4, 4)}, ValueError, r"`f2` must have shape \[2, 3, \*S2\] with 2 spatial axes"),
        ({"f2": torch.zeros(2, 3, 4, 4, dtype=torch.float64)}, TypeError, "`f2` must be torch.float32 as `f1` is, got torch.float64"),
        ({"f2": torch.zeros(2, 3, 0, 4)}, ValueError, r"`f2` must have no empty spatial axis, got \(2, 3, 0, 4\)"),
        ({"f2": torch.zeros(2, 3, 4, 4, device="meta")}, ValueError, "`f2` must be on cpu as `f1` is, got meta"),
        ({"grid1": torch.zeros(3, 2, 3)}, ValueError, r"`grid1` must have shape \[2, 2, 3\] or \[2, \*M, 2\], got \(3, 2, 3\)"),
        ({"grid2": torch.zeros(2, 5, 5, 3)}, ValueError, r"`grid2` must have shape \[2, 2, 3\] or \[2, \*M, 2\], got \(2, 5, 5, 3\)"),
        ({"grid2": torch.zeros(2, 2, 3, dtype=torch.float16)}, TypeError, "`grid2` must be float32 or float64, got float16"),
        ({"grid2": torch.zeros(2, 5, 5, 2), "size": (4, 4)}, ValueError, r"`grid2` must have M = \(4, 4\) points as `size` or the other grid has, got"),
        ({"grid1": torch.zeros(2, 5, 5, 2), "grid2": torch.zeros(2, 4, 5, 2)}, ValueError, r"`grid2` must have M = \(5, 5\)"),
        ({"size": (4,)}, ValueError, r"`size` must have 2 entries of 0 to 2\^24, got \(4,\)"),
        ({"size": (4, -1)}, ValueError, r"`size` must have 2 entries of 0 to 2\^24, got \(4, -1\)"),
        ({"size": (4, 2**24 + 1)}, ValueError, r"`size` must have 2 entries of 0 to 2\^24, got \(4, 16777217\)"),
        ({"size": 4}, TypeError, "`size` must be a tuple of ints, got 4"),
        ({"size": (2.0, 3)}, TypeError, r"`size` must be a tuple of ints, got \(2.0, 3\)"),
        ({"size": (True, 3)}, TypeError, r"`size` must be a tuple of ints, got \(True, 3\)"),
        ({"mode": "bicubic"}, ValueError, "`mode` must be one of 'linear', 'nearest', got 'bicubic'"),
        ({"padding_mode": "reflection"}, ValueError, "`padding_mode` must be one of 'zeros', 'border', got 'reflection'"),
        ({"backend": "fast"}, ValueError, "`backend` must be one of 'auto', .*, got 'fast'"),
        ({"backend": "cuda"}, RuntimeError, "backend 'cuda' cannot run align: "),
    ],
)  # fmt: skip
def test_bad_input(change, kind, message):
    good = {"f1": torch.zeros(2, 3, 4, 4), "f2": torch.zeros(2, 3, 5, 4), "grid1": torch.zeros(2, 2, 3), "grid2": torch.zeros(2, 2, 3)}
    with pytest.raises(kind, match=message):
        align(**{**good, **change})


@pytest.mark.skipif("triton" not in backends("align"), reason="triton does not run here")
def test_triton_refuses_float64_maps_not_grids():
    tensors, keywords = problem(channels=3, dtype=torch.float64, size=(1, 2))
    tensors = [t.to(DEVICE["triton"]) for t in tensors]
    with pytest.raises(RuntimeError, match="float64 maps run on the backends reference and cpu only"):
        align(*tensors, backend="triton", **keywords)
    maps = [f.float().requires_grad_() for f in tensors[:2]]
    align(*maps, *tensors[2:], backend="triton", **keywords)[0].sum().backward()


NATIVE = {
    "f1": torch.zeros(2, 9, 4, 4), "f2": torch.zeros(2, 9, 5, 4), "grid1": torch.zeros(2, 2, 3), "grid2": torch.zeros(2, 2, 3), "size": [3, 4],
    "mode": "linear", "align_corners": False, "padding_mode": "border",
}  # fmt: skip
SUMS = {name: torch.zeros(2, 3, 4) for name in ("grad_dot", "grad_sq1", "grad_sq2")}
FLAGS = {"need_1": True, "need_2": True, "channels_last_1": True, "channels_last_2": False}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"f2": torch.zeros(3, 9, 5, 4)}, "`grid2` must have shape"),
        ({"f2": torch.zeros(2, 8, 5, 4)}, "`f2` must have the batch, channels and rank of f1"),
        ({"f2": torch.zeros(2, 9, 5, 4, dtype=torch.float64)}, "`f2` must have the dtype of f1"),
        ({"f1": torch.zeros(2, 9, 4)}, "`f1` must have shape"),
        ({"f2": torch.zeros(2, 9, 0, 4)}, "`f2` must have spatial axes of 1 to"),
        ({"grid1": torch.zeros(1, 2, 3)}, "`grid1` must have shape"),
        ({"grid2": torch.zeros(2, 3, 3, 2)}, "`grid2` must have shape"),
        ({"grid2": torch.zeros(2, 2, 3, dtype=torch.float16)}, "`grid2` must be float32 or float64"),
        ({"size": [3, 4, 5]}, "`size` must have one entry a spatial axis"),
        ({"size": [3, -4]}, r"`size` must have entries of 0 to 2\^24"),
        ({"mode": "bicubic"}, "`mode` must be 'linear' or 'nearest'"),
        ({"padding_mode": "none"}, "`padding_mode` must be 'zeros' or 'border'"),
        ({"grad_dot": torch.zeros(2, 3, 3)}, r"`grad_dot` must have shape \[B, \*size\]"),
        ({"grad_sq1": torch.zeros(2, 12)}, r"`grad_sq1` must have shape \[B, \*size\]"),
        ({"grad_sq2": torch.zeros(2, 3, 4, dtype=torch.float64)}, "`grad_sq2` must be float32"),
    ],
)  # fmt: skip
@pytest.mark.skipif("cpu" not in FAST, reason="the CPU kernels are not built")
def test_the_native_op_reads_nothing_out_of_bounds(change, message):
    torch.ops.pix2rep_native.align(**NATIVE)
    torch.ops.pix2rep_native.align_backward(**SUMS, **NATIVE, **FLAGS)
    if not set(change) & set(SUMS):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.pix2rep_native.align(**NATIVE | change)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.pix2rep_native.align_backward(**{**SUMS, **NATIVE, **FLAGS, **change})


# Determinism


@pytest.mark.parametrize("layouts", [("last", "last"), ("first", "first"), ("last", "first")])
@pytest.mark.parametrize("size", [(40, 20), (3, 2)])  # by rows; by columns where a map has planes
@pytest.mark.skipif("cpu" not in FAST, reason="the CPU kernels are not built")
def test_same_bits_for_any_number_of_threads(layouts, size):
    tensors, keywords = problem(channels=70, batch=3, layouts=layouts, spaces=((31, 33), (20, 21)), size=size)
    upstream = [torch.randn(3, *size) for _ in range(3)]
    threads = torch.get_num_threads()
    try:
        results = []
        for run in range(20):
            torch.set_num_threads(1 + run % 3)
            results.append(both(ours("cpu"), tensors, upstream, **keywords))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for result in results for a, b in zip(result, results[0], strict=True))


@pytest.mark.skipif("cpu" not in FAST, reason="the CPU kernels are not built")
def test_same_values_for_every_instruction_set(tmp_path):
    """PIX2REP_ISA picks a lower one; taps and `valid` agree exactly, sums to rounding."""
    code = """
import sys
import torch
from pix2rep_kernels import align
torch.manual_seed(0)
out = []
for channels in (5, 37):
    f = torch.randn(2, channels, 12, 10, requires_grad=True)
    theta = torch.eye(2, 3) + 0.3 * torch.randn(2, 2, 3, 3)[0, :, :2]
    for g in (f, f.contiguous(memory_format=torch.channels_last), f.half(), f.bfloat16()):
        for mode in ("nearest", "linear"):
            dot, sq1, sq2, valid = align(g, g.flip(2), theta, theta.double() * 0.9, size=(9, 11), mode=mode, backend="cpu")
            out.append([dot, sq1, sq2, valid, torch.autograd.grad(dot.sum() + sq1.square().sum() - sq2.sum(), f)[0]])
torch.save(out, sys.argv[1])
"""
    results = {}
    for isa in ("baseline", "avx2", "avx512"):
        path = tmp_path / f"{isa}.pt"
        subprocess.run([sys.executable, "-c", code, path], env={**os.environ, "PIX2REP_ISA": isa}, check=True, cwd=ROOT)
        results[isa] = torch.load(path)
    for isa in ("avx2", "avx512"):
        for i, (got, base) in enumerate(zip(results[isa], results["baseline"], strict=True)):
            assert torch.equal(got[3], base[3]) and error(got[1:3], base[1:3]) <= 1e-6, (isa, i)
            # The gradient of a 16-bit map is rounded to it; dot cancels.
            assert error([got[0], got[4]], [base[0], base[4]]) <= (1e-3 if i % 8 >= 4 else 5e-6), (isa, i)


@pytest.mark.skipif("triton" not in backends("align"), reason="triton does not run here")
def test_triton_sorts_where_determinism_is_asked_for():
    tensors, keywords = problem(channels=3, batch=1, size=(3, 4))
    tensors = (*tensors[:2], tensors[2] * 0, tensors[3] * 0)  # every point on the same pixels
    upstream = [torch.randn(1, 3, 4)] * 3
    torch.use_deterministic_algorithms(True)
    try:
        results = [both(ours("triton"), tensors, upstream, **keywords) for _ in range(2 if DEVICE["triton"] == "cpu" else 20)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for result in results for a, b in zip(result, results[0], strict=True))
