"""warp in C++ against the reference in float64: Hypothesis draws ranks, shapes, layouts, dtypes, modes, paddings, points."""

import pytest
import torch

from pix2rep_kernels.testing import poisoned
from sweep import EXAMPLES
from warp_helpers import FAST, problem

pytest.importorskip("hypothesis", reason="hypothesis is not installed")
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

pytestmark = pytest.mark.skipif("cpu" not in FAST, reason="the CPU kernels are not built")


@st.composite
def problems(draw):
    dims = draw(st.sampled_from([2, 3]))
    axis = st.integers(1, 40 if dims == 2 else 11)
    options = {
        "mode": draw(st.sampled_from(["linear", "nearest", "bicubic"][: 3 if dims == 2 else 2])),
        "padding_mode": draw(st.sampled_from(["zeros", "border"])),
        "align_corners": draw(st.booleans()),
    }
    # "nearest" jumps half-way between centres, where a float32 coordinate may fall to the other side.
    grids = [torch.float64] if options["mode"] == "nearest" else [torch.float32, torch.float64]
    torch.manual_seed(draw(st.integers(0, 2**31)))
    features, grid, given_by = problem(
        dims=dims, channels=draw(st.one_of(st.integers(1, 20), st.integers(60, 70))), batch=draw(st.integers(1, 3)),
        layout=draw(st.sampled_from(["last", "first", "strided"])), affine=draw(st.booleans()), points=draw(st.sampled_from([None, 0, 1, 50, 700])),
        dtype=draw(st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16])), grid_dtype=draw(st.sampled_from(grids)),
        space=tuple(draw(axis) for _ in range(dims)), size=tuple(draw(axis) for _ in range(dims)),
    )  # fmt: skip
    return features, grid, {**options, **given_by}


def run(backend, features, grid, upstream, normalize, points=None, size=None, **options):
    """rows, inside, norms and the gradient of the features."""
    features = features.detach().requires_grad_()
    size = list(size or grid.shape[1:-1])
    rows, inside, norms = torch.ops.pix2rep.warp(features, grid, size, points, normalize=normalize, backend=backend, **options)
    (grad,) = torch.autograd.grad(rows, features, upstream.to(rows.dtype))
    return rows.detach().double(), inside, norms.double(), grad.double()


@settings(max_examples=EXAMPLES, deadline=None, derandomize=True)
@given(problems(), st.booleans())
def test_matches_float64(drawn, normalize):
    """Bounds to first order. A coordinate errs by a few eps of the grid's type times the axis, a weight and a sum of taps by a few eps of the arithmetic:
    together `tap`, times 16 taps and the largest pixel of the features, is the error of f. A row divides that by |f| and is rounded; a gradient is as far
    off as its row, and then the tap's weight.
    """
    features, grid, options = drawn
    count = len(options["points"]) if "points" in options else features.shape[0] * torch.Size(options.get("size") or grid.shape[1:-1]).numel()
    upstream = torch.randn(count, features.shape[1], dtype=torch.float64).to(features.dtype)
    with poisoned():
        rows, inside, norms, grad = run("cpu", features, grid, upstream, normalize, **options)
    true_rows, true_inside, true_norms, true_grad = run("reference", features.double(), grid.double(), upstream, normalize, **options)
    if grid.dtype == torch.float64:
        assert torch.equal(inside, true_inside)
    compute = torch.float64 if features.dtype == torch.float64 else torch.float32
    stored, arithmetic, coordinate = (torch.finfo(dtype).eps for dtype in (features.dtype, compute, grid.dtype))
    tap = 8 * max(features.shape[2:]) * coordinate + 8 * arithmetic
    f_error = 16 * tap * features.double().norm(dim=1).max()
    size, up = true_rows.norm(dim=1), upstream.double().norm(dim=1)
    if normalize:
        assert ((norms - true_norms).abs() <= f_error).all()
        length = true_norms.clamp_min(1e-12)
        row_error = f_error / length + (stored + features.shape[1] * arithmetic) * size
        grad_error = up / length * (3 * row_error + 2 * f_error / length + features.shape[1] * arithmetic + 16 * tap)
    else:
        row_error = f_error + stored * size
        grad_error = 16 * up * tap
    assert ((rows - true_rows).norm(dim=1) <= row_error).all()
    assert (grad - true_grad).norm() <= grad_error.sum() + (stored + arithmetic * count) * true_grad.norm()
