"""entropy: values, gradients, properties, edges, registration; every backend that runs here, against PyTorch in float64."""

import itertools
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pix2rep_kernels
from benchmarks.harness import peak_mib
from joint_helpers import LAYOUTS, lay
from pix2rep_kernels import dispatch
from pix2rep_kernels.testing import backends, error, home, placed, poisoned, tolerance
from sweep import FULL

pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")  # numpy's, of NaN and inf in the interpreter
FAST = [b for b in backends("entropy") if b != "triton" or home(b) == "cuda"]  # interpreted kernels have a table of their own
EXACT = [b for b in FAST if b != "triton"]  # those that take float64
BUILT = pytest.mark.skipif("cpu" not in FAST, reason="the CPU kernels are not built")
EPS = torch.finfo(torch.float32).eps
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
entropy = placed(pix2rep_kernels.entropy)


def problem(clusters=5, batch=2, space=(7, 9), layout="first", dtype=torch.float32, masked=False, scale=3.0):
    """Logits, an upstream gradient and a mask."""
    logits = lay((scale * torch.randn(batch, clusters, *space, dtype=torch.float64)).to(dtype), layout)
    return logits, torch.randn(batch, 1, *space), torch.rand(batch, *space) > 0.3 if masked else None


def official(logits, mask=None):
    """As the boundary-aware paper's code writes it."""
    c = logits.softmax(1)
    h = -(c * (c + 1e-16).log()).sum(1, keepdim=True)
    return h if mask is None else torch.where(mask.unsqueeze(1), h, 0)


def plain(logits, mask=None):
    h = torch.special.entr(logits.softmax(1)).sum(1, keepdim=True)
    return h if mask is None else torch.where(mask.unsqueeze(1), h, 0)


def both(function, logits, upstream, **options):
    """H and the gradient."""
    logits = logits.detach().requires_grad_()
    h = function(logits, **options)
    h.backward(upstream.to(h.dtype))
    return h.detach(), logits.grad


def compare(backend, logits, upstream, mask=None):
    """H and gradient no further from float64 than twice PyTorch's own at the same precision; 16-bit maps are float32 to PyTorch.

    In float64 PyTorch is the truth; its own error is then a rounding a cluster and a few more. Where (entropy.3) cancels, PyTorch's error on few pixels
    may be luckily small: added is the rounding of what is subtracted, eps |dH| c (|l - m| + <c, |l - m|>).
    """
    compute = torch.float64 if logits.dtype == torch.float64 else torch.float32
    truth = both(plain, logits.double(), upstream, mask=mask)
    eager = [t.to(dtype) for t, dtype in zip(both(official, logits.to(compute), upstream, mask=mask), (compute, logits.dtype), strict=True)]
    with poisoned():
        got = both(entropy, logits, upstream, mask=mask, backend=backend)
    x = logits.double()
    c, far = x.softmax(1), x.amax(1, keepdim=True) - x
    cancelled = (upstream.double() * c * (far + (c * far).sum(1, keepdim=True))).norm()
    for g, e, t, more in zip(got, eager, truth, (0.0, cancelled), strict=True):
        assert g.dtype == e.dtype and g.shape == t.shape
        own = error([e], [t]) if compute == torch.float32 else (logits.shape[1] + 4) * torch.finfo(compute).eps
        norm = t.norm() if t.norm() > 0 else 1
        assert error([g], [t]) * norm <= tolerance(own, g.dtype) * norm + torch.finfo(compute).eps * more, (backend, logits.shape, error([g], [t]), own)
    return got


# Values and gradients


@pytest.mark.parametrize("backend", FAST)
def test_values_and_gradients(backend):
    for dtype, layout, masked in itertools.product(DTYPES if backend in EXACT else DTYPES[:3], LAYOUTS, (False, True)):
        for space in ((7, 9), (3, 4, 5)):
            logits, upstream, mask = problem(17, 2, space, layout, dtype, masked)
            _, gradient = compare(backend, logits, upstream, mask)
            assert gradient.stride() == torch.empty_like(logits).stride() or layout == "strided"


@pytest.mark.parametrize("backend", EXACT)
def test_gradcheck(backend):
    for space, layout in (((3, 4), "last"), ((2, 3, 2), "first")):
        logits, _, mask = problem(3, 1, space, layout, torch.float64, True)
        assert torch.autograd.gradcheck(lambda x, m=mask: entropy(x, mask=m, backend=backend), logits.requires_grad_())


@pytest.mark.skipif("triton" not in backends("entropy"), reason="triton does not run here")
@pytest.mark.parametrize(
    "case",
    [
        {"clusters": 40, "space": (5, 7)}, {"clusters": 40, "layout": "last", "masked": True}, {"clusters": 3, "layout": "strided", "masked": True},
        {"clusters": 70, "batch": 1, "space": (3, 5), "layout": "last"}, {"clusters": 8, "space": (2, 3, 5), "layout": "last", "dtype": torch.bfloat16},
        {"clusters": 12, "space": (2, 3, 5), "dtype": torch.float16, "masked": True}, {"clusters": 2, "batch": 3, "space": (33, 35)},
        {"clusters": 1, "batch": 1, "space": (1, 1)}, {"clusters": 5000, "batch": 1, "space": (1, 3), "layout": "last"},
    ],
    ids=lambda case: "-".join(str(v) for v in case.values()).replace("torch.", ""),
)  # fmt: skip
def test_triton(case):
    compare("triton", *problem(**case))


# Properties


@pytest.mark.parametrize("backend", backends("entropy"))
def test_range_shift_and_order(backend):
    """0 to log K, at its ends; the same for logits plus a constant of each pixel, and for clusters in any order. The gradient sums to 0."""
    logits, upstream, _ = problem(6, 1, (4, 5))
    h, gradient = both(entropy, logits, upstream, backend=backend)
    assert h.min() > 0 and h.max() < math.log(6)
    moved = both(entropy, logits + torch.randn(1, 1, 4, 5).mul(8).round(), upstream, backend=backend)
    assert error(moved, (h, gradient)) < 64 * EPS  # l + 8 is rounded
    order = torch.randperm(6)
    assert error(both(entropy, logits[:, order], upstream, backend=backend), (h, gradient[:, order])) < 8 * EPS
    assert gradient.sum(1).abs().max() <= 8 * EPS * gradient.abs().max() * 6
    for value in (0.0, -1e4, 3e38):
        h, gradient = both(entropy, torch.full((1, 6, 2, 3), value), torch.randn(1, 1, 2, 3), backend=backend)
        assert torch.allclose(h, torch.tensor(math.log(6)), rtol=2 * EPS, atol=0) and gradient.count_nonzero() == 0


@pytest.mark.parametrize("backend", backends("entropy"))
def test_sure_pixels(backend):
    """exp(-d) (d + 1) to first order: no digit is lost but those of log Z near 1, as in PyTorch; then 0, and no NaN."""
    logits = torch.zeros(1, 2, 1, 4)
    logits[0, 1, 0] = -torch.tensor([5.0, 20.0, 200.0, math.inf])
    h, gradient = both(entropy, logits, torch.ones(1, 1, 1, 4), backend=backend)
    truth = both(entropy, logits.double(), torch.ones(1, 1, 1, 4), backend="reference")
    assert (h - truth[0]).abs().max() <= EPS
    torch.testing.assert_close(gradient, truth[1].float(), rtol=8 * EPS, atol=1e-30)
    assert h[..., 2:].count_nonzero() == 0 and truth[0][0, 0, 0, 1] > 0


@pytest.mark.parametrize("backend", EXACT)
def test_the_official_constant_is_below_rounding(backend):
    """K 1e-16 at most in float64, which PyTorch's own K roundings of terms up to 1/e, of logarithms and of their sum exceed."""
    for clusters, scale in ((40, 1.0), (40, 12.0), (200, 3.0)):
        logits, _, _ = problem(clusters, dtype=torch.float64, scale=scale)
        difference = entropy(logits, backend=backend) - official(logits)
        assert difference.abs().max() <= clusters * (1e-16 + torch.finfo(torch.float64).eps)


@pytest.mark.parametrize("backend", backends("entropy"))
def test_nothing_leaks_from_masked_pixels(backend):
    logits, upstream, mask = problem(4, 1, (3, 5), masked=True)
    clean = both(entropy, logits, upstream, mask=mask, backend=backend)
    hidden = ~mask.unsqueeze(1)
    for value, layout in itertools.product((math.nan, math.inf, -math.inf), ("first", "last")):
        dirty = lay(torch.where(hidden, value, logits), layout)
        got = both(entropy, dirty, torch.where(hidden, math.nan, upstream), mask=mask.unsqueeze(1), backend=backend)
        assert all(torch.equal(x, y) for x, y in zip(clean, got, strict=True)), (value, layout)
    assert (clean[0][hidden] == 0).all() and (clean[1][hidden.expand_as(logits)] == 0).all()


@pytest.mark.parametrize("backend", backends("entropy"))
def test_special_values(backend):
    """NaN and +inf in a pixel that counts make NaN of it and of nothing else; a cluster at -inf takes no part; -inf alone is NaN."""
    for value in (math.nan, math.inf):
        logits, upstream, _ = problem(3, 1, (2, 4))
        logits[0, 1, 0, 2] = value
        h, gradient = both(entropy, logits, upstream, backend=backend)
        assert h[0, 0, 0, 2].isnan() and h.isnan().sum() == 1 and gradient[0, :, 0, 2].isnan().all() and gradient.isnan().sum() == 3
    logits, upstream, _ = problem(3, 1, (2, 4))
    logits[:, 1] = -math.inf
    h, gradient = both(entropy, logits, upstream, backend=backend)
    without = both(entropy, logits[:, ::2], upstream, backend=backend)
    assert error((h, gradient[:, ::2]), without) <= 4 * EPS and gradient[:, 1].count_nonzero() == 0
    logits[:] = -math.inf
    assert entropy(logits, backend=backend).isnan().all()


# Edges


@pytest.mark.parametrize("backend", FAST)
def test_sizes(backend):
    for clusters in (1, 2, 3, 15, 16, 17, 33, 64, 65, 100, *((127, 128, 300, 2000) if FULL else ())):
        for layout in ("first", "last"):
            compare(backend, *problem(clusters, 2, (5, 13), layout, masked=clusters % 2 == 1))
    for space in ((1, 1), (1, 64), (8, 8), (5, 13), (33, 31), (64, 65), (2, 1, 33)):
        for layout in LAYOUTS:
            compare(backend, *problem(7, 3, space, layout))


@pytest.mark.parametrize("backend", FAST)
def test_strides(backend):
    """Slices, expanded maps, an offset that no vector is aligned to; strided and expanded upstream gradients."""
    wide, upstream, mask = problem(12, 4, (12, 14), masked=True)
    last = lay(wide, "last")
    views = [
        wide[:, ::2], wide[:, :, 1:-1], wide[..., 1:-2], wide[..., ::2], wide[::2], wide[:1].expand(4, -1, -1, -1), wide[:, :, :1].expand(-1, -1, 5, -1),
        torch.randn(wide.numel() + 1)[1:].view_as(wide), last[:, 2:7], last[:, :, :, 1:], last.transpose(0, 2), wide.transpose(1, 3),
    ]  # fmt: skip
    for logits in views:
        batch, _, *space = logits.shape
        compare(backend, logits, torch.randn(batch, 1, *space[::-1]).transpose(2, 3))
    compare(backend, wide, torch.tensor(0.7).expand_as(upstream), mask.transpose(1, 2).contiguous().transpose(1, 2))


@pytest.mark.parametrize("backend", backends("entropy"))
def test_nothing(backend):
    for shape in ((0, 3, 4, 4), (2, 3, 0, 4), (2, 3, 2, 0, 4)):
        h, gradient = both(entropy, torch.randn(shape), torch.randn(shape[0], 1, *shape[2:]), backend=backend)
        assert h.shape == (shape[0], 1, *shape[2:]) and gradient.shape == shape


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
