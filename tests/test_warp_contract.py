"""warp: registration, refusals, determinism."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pix2rep_kernels import native, warp
from pix2rep_kernels.testing import backends, error
from warp_helpers import DEVICE, FAST, GPU, both, ours, problem

# Registration


@pytest.mark.parametrize("backend", [b for b in FAST if DEVICE[b] == "cpu"])
def test_opcheck(backend):
    for layout, affine, points, normalize in itertools.product(("last", "first"), (True, False), (None, 6), (True, False)):
        features, grid, options = problem(channels=3, layout=layout, affine=affine, points=points)
        size = list(options.get("size", grid.shape[1:-1]))
        arguments = (features.requires_grad_(), grid, size, options.get("points"), "linear", True, "zeros", normalize, backend)
        torch.library.opcheck(torch.ops.pix2rep.warp.default, arguments)
        rows, _, norms = torch.ops.pix2rep.warp(*arguments)
        backward = (torch.randn_like(rows), rows.detach(), norms, *arguments[1:-1], list(features.shape), layout == "last", backend)
        torch.library.opcheck(torch.ops.pix2rep.warp_backward.default, backward)


@pytest.mark.parametrize("backend", [b for b in FAST if DEVICE[b] == "cpu"])
def test_compiles_in_one_graph(backend):
    compiled = torch.compile(lambda f, g, p: warp(f, g, points=p, normalize=True, backend=backend)[0].square().sum(), fullgraph=True, dynamic=True)
    for space, count in (((6, 8), 5), ((9, 7), 11), ((5, 5), 8)):
        features, grid, options = problem(channels=4, space=space, size=space, points=count)
        features.requires_grad_()
        (grad,) = torch.autograd.grad(compiled(features, grid, options["points"]), features)
        (plain,) = torch.autograd.grad(warp(features, grid, points=options["points"], normalize=True, backend=backend)[0].square().sum(), features)
        assert torch.equal(grad, plain)


def test_autocast_and_meta():
    features, grid, options = problem(channels=4, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert warp(features, grid, **options)[0].dtype == torch.bfloat16
    rows, inside = warp(features.to("meta"), grid.to("meta"), normalize=True, **options)
    assert rows.shape == (72, 4) and rows.device.type == "meta" and inside.shape == (72,) and inside.dtype == torch.bool


@pytest.mark.parametrize("backend", [b for b in FAST if DEVICE[b] == "cpu"])
def test_no_second_derivative_and_none_for_the_grid(backend):
    features, grid, options = problem(channels=4)
    features.requires_grad_(), grid.requires_grad_()
    rows, inside = warp(features, grid, normalize=True, backend=backend, **options)
    assert not inside.requires_grad
    grads = torch.autograd.grad(rows.square().sum(), (features, grid), create_graph=True, allow_unused=True)
    assert grads[1] is None
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(grads[0].sum(), features)


@pytest.mark.parametrize(
    "change, kind, message",
    [
        ({"features": torch.zeros(2, 3, 4)}, ValueError, r"`features` must have shape \[B, C, H, W\] or \[B, C, D, H, W\], got \(2, 3, 4\)"),
        ({"features": torch.zeros(2, 3, 4, 4, dtype=torch.int32)}, TypeError, "`features` must be float16, bfloat16, float32 or float64, got int32"),
        ({"features": torch.zeros(2, 3, 4, 0)}, ValueError, r"`features` must have no empty spatial axis, got \(2, 3, 4, 0\)"),
        ({"grid": torch.zeros(3, 2, 3)}, ValueError, r"`grid` must have shape \(2, 2, 3\) \(affine\), got \(3, 2, 3\)"),
        ({"grid": torch.zeros(2, 5, 5, 3)}, ValueError, r"`grid` must have shape \[2, 2, 3\] or \[2, \*S_out, 2\], got \(2, 5, 5, 3\)"),
        ({"grid": torch.zeros(2, 2, 3, dtype=torch.float16)}, TypeError, "`grid` must be float32 or float64, got float16"),
        ({"grid": torch.zeros(2, 5, 5, 2), "size": (4, 4)}, ValueError, r"`size` must be \(5, 5\) as the dense grid is, or None, got \(4, 4\)"),
        ({"size": (4,)}, ValueError, r"`size` must have 2 entries, got \(4,\)"),
        ({"size": (4, -1)}, ValueError, r"`size` must have no negative entry, got \(4, -1\)"),
        ({"size": (4, 2**24 + 1)}, ValueError, r"`size` must have entries of at most 2\^24, .*, got \(4, 16777217\)"),
        ({"size": (2**40, 2**40)}, ValueError, r"`size` must have entries of at most 2\^24, .*, got \(1099511627776, 1099511627776\)"),
        ({"size": (2**33, 1), "points": torch.zeros(1, dtype=torch.int64)}, ValueError, r"`size` must have entries of at most 2\^24"),
        (
            {"features": torch.zeros(2, 3, 4, 4, 4), "grid": torch.zeros(2, 3, 4), "size": (2**24, 2**24, 2**13)}, ValueError,
            r"`size` must have B \* prod\(size\) < 2\^62 points, got \(16777216, 16777216, 8192\)",
        ),
        ({"size": 4}, TypeError, "`size` must be a tuple of ints, got 4"),
        ({"size": (2.0, 3)}, TypeError, r"`size` must be a tuple of ints, got \(2.0, 3\)"),
        ({"size": (True, 3)}, TypeError, r"`size` must be a tuple of ints, got \(True, 3\)"),
        ({"points": torch.zeros(3)}, TypeError, "`points` must be int64, got float32"),
        ({"points": torch.zeros(3, 1, dtype=torch.int64)}, ValueError, r"`points` must have shape \[P\], got \(3, 1\)"),
        ({"mode": "cubic"}, ValueError, "`mode` must be one of 'linear', 'nearest', 'bicubic', got 'cubic'"),
        ({"padding_mode": "reflection"}, ValueError, "`padding_mode` must be one of 'zeros', 'border', got 'reflection'"),
        ({"backend": "fast"}, ValueError, "`backend` must be one of 'auto', .*, got 'fast'"),
        ({"features": torch.zeros(2, 3, 1, 4, 4), "grid": torch.zeros(2, 3, 4), "mode": "bicubic"}, ValueError, "with 3 spatial axes, got 'bicubic'"),
        ({"features": torch.zeros(1).expand(1, 1, 1, 2**24 + 1), "grid": torch.zeros(1, 2, 3)}, ValueError, r"`features` must have spatial axes of at most"),
    ],
)  # fmt: skip
def test_bad_input(change, kind, message):
    with pytest.raises(kind, match=message):
        warp(**{"features": torch.zeros(2, 3, 4, 4), "grid": torch.zeros(2, 2, 3), **change})


@pytest.mark.skipif("cpu" not in FAST, reason="the CPU kernels are not built")
@pytest.mark.parametrize("dims, size", [(2, (-1, 4)), (2, (4, -3)), (2, (2**24 + 1, 1)), (2, (2**62, 2**62)), (3, (2**24, 2**24, 2**14)), (2, (4,))])
def test_native_op_checks_size_itself(dims, size):
    features, grid = torch.zeros(2, 3, *[4] * dims), torch.zeros(2, dims, dims + 1)
    for points in (None, torch.zeros(1, dtype=torch.int64)):
        where = (grid, size, points, "linear", True, "zeros", False)
        with pytest.raises(RuntimeError, match="`size` must have"):
            torch.ops.pix2rep_native.warp(features, *where)
        with pytest.raises(RuntimeError, match="`size` must have"):
            rows = torch.zeros(1, 3)
            torch.ops.pix2rep_native.warp_backward(rows, rows, torch.zeros(0), *where, list(features.shape), False)


# Determinism


@pytest.mark.parametrize("channels_last", [True, False])
def test_gradients_of_rows_at_odd_addresses_and_of_points_outside_the_grid(channels_last):
    """What CUDA cannot refuse without reading it back: a point that is none adds nothing to the gradient."""
    if not native.emulated() or native.why_missing("cuda"):
        pytest.skip("build with PIX2REP_BUILD=emulate")
    for dtype in (torch.float32, torch.float16):
        grad_rows, rows, grid = torch.randn(13)[1:].view(3, 4).to(dtype), torch.randn(3, 4, dtype=dtype), torch.zeros(1, 2, 3)
        odd = torch.empty(13, dtype=dtype)[1:].view(3, 4).copy_(grad_rows)
        options = ("linear", True, "border", True, [1, 4, 3, 3], channels_last)
        for name in ("warp_backward", "warp_backward_ordered"):
            op = getattr(native.namespace("cuda"), name)
            outside = op(odd, rows, torch.ones(3), grid, [2, 2], torch.tensor([0, -1, 7]), *options)
            inside = op(grad_rows[:1], rows[:1], torch.ones(1), grid, [2, 2], torch.tensor([0]), *options)
            assert torch.equal(outside, inside)


@pytest.mark.parametrize("layout", ["last", "first"])
@pytest.mark.parametrize("points", [None, 37, 4000])
@pytest.mark.skipif("cpu" not in FAST, reason="the CPU kernels are not built")
def test_same_bits_for_any_number_of_threads(layout, points):
    features, grid, options = problem(channels=70, batch=3, layout=layout, points=points, space=(31, 33), size=(40, 20))
    upstream = torch.randn(3 * 800 if points is None else points, 70)
    threads = torch.get_num_threads()
    try:
        results = []
        for run in range(20):
            torch.set_num_threads(1 + run % 2)
            results.append(both(ours("cpu"), features, grid, upstream, normalize=True, **options))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for result in results for a, b in zip(result, results[0], strict=True))


@pytest.mark.skipif("cpu" not in FAST, reason="the CPU kernels are not built")
def test_same_values_for_every_instruction_set():
    """PIX2REP_ISA picks a lower one; taps agree exactly, sums to rounding."""
    code = """
import torch
from pix2rep_kernels import warp
torch.manual_seed(0)
features = torch.randn(2, 37, 12, 10, requires_grad=True)
theta = torch.eye(2, 3) + 0.3 * torch.randn(2, 2, 3)
out = []
for f in (features, features.contiguous(memory_format=torch.channels_last), features.half(), features.bfloat16()):
    for mode in ("nearest", "linear", "bicubic"):
        rows, inside = warp(f, theta, mode=mode, normalize=True, backend="cpu")
        out += [rows.double(), inside.double(), torch.autograd.grad(rows.double().square().sum() + rows.double().sum(), features)[0].double()]
torch.save(out, "{}")
"""
    results = {}
    for isa in ("baseline", "avx2", "avx512"):
        path = Path(os.environ.get("TMPDIR", "/tmp")) / f"warp_{os.getpid()}_{isa}.pt"
        subprocess.run([sys.executable, "-c", code.format(path)], env={**os.environ, "PIX2REP_ISA": isa}, check=True, cwd=Path(__file__).parents[1])
        results[isa] = torch.load(path)
        path.unlink()
    for isa in ("avx2", "avx512"):
        for i, (a, b) in enumerate(zip(results[isa], results["baseline"], strict=True)):
            assert error([a], [b]) <= (1e-6 if i < 18 else 1e-3), (isa, i)


@pytest.mark.parametrize("backend", [b for b in backends("warp") if b in GPU])
def test_gpu_kernels_sort_where_determinism_is_asked_for(backend):
    features, grid, options = problem(channels=5, points=12)
    options["points"][:] = 7
    upstream = torch.randn(12, 5)
    torch.use_deterministic_algorithms(True)
    try:
        results = [both(ours(backend), features, grid, upstream, **options)[1] for _ in range(2 if DEVICE[backend] == "cpu" else 20)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(result, results[0]) for result in results)
