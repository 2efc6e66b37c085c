"""align: the C++ kernels against the reference in float64, over drawn shapes, layouts, dtypes and options."""

import pytest
import torch

from align_helpers import FAST, both, feature_map, grid_of, ours
from pix2rep_kernels.testing import error, poisoned
from sweep import EXAMPLES

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@st.composite
def problems(draw):
    dims = draw(st.sampled_from((2, 3)))
    axis = st.integers(1, 9 if dims == 3 else 17)
    s1, s2, size = (tuple(draw(axis) for _ in range(dims)) for _ in range(3))
    return {
        "spaces": (s1, s2), "size": size, "batch": draw(st.integers(1, 3)), "channels": draw(st.integers(1, 40) | st.integers(41, 200)),
        "layouts": tuple(draw(st.sampled_from(("last", "first", "strided"))) for _ in range(2)),
        "affine": tuple(draw(st.booleans()) for _ in range(2)), "dtype": draw(st.sampled_from(DTYPES)),
        "mode": draw(st.sampled_from(("linear", "nearest"))), "padding_mode": draw(st.sampled_from(("zeros", "border"))),
        "align_corners": draw(st.booleans()), "wanted": draw(st.sampled_from(((0,), (1,), (0, 1)))), "seed": draw(st.integers(0, 2**20)),
    }  # fmt: skip


@pytest.mark.skipif("cpu" not in FAST, reason="the CPU kernels are not built")
@hypothesis.settings(max_examples=EXAMPLES, deadline=None, derandomize=True)
@hypothesis.given(problems())
def test_against_the_reference(case):
    """The same grids in float64 for both, so that taps agree; sums then differ by roundings of the compute dtype, gradients by one of the maps' dtype."""
    torch.manual_seed(case["seed"])
    batch, channels, size, dtype = (case[name] for name in ("batch", "channels", "size", "dtype"))
    maps = [feature_map(batch, channels, space, layout, dtype) for space, layout in zip(case["spaces"], case["layouts"], strict=True)]
    grids = [grid_of(batch, size, kind, torch.float64) for kind in case["affine"]]
    upstream = [torch.randn(batch, *size) for _ in range(3)]
    flow = {name: case[name] for name in ("size", "wanted", "mode", "padding_mode", "align_corners")}
    with poisoned():
        got = both(ours("cpu"), (*maps, *grids), upstream, **flow)
    truth = both(ours("reference"), (*(f.double() for f in maps), *grids), upstream, **flow)
    compute = 8 * torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    # A sum of C products that cancel: its error is relative to the norms, which bound dot.
    scale = (truth[1].norm() * truth[2].norm()).sqrt() + 1e-30
    assert (got[0].double() - truth[0]).norm() <= 4 * compute * scale.clamp(min=truth[0].norm()) + compute
    assert error(got[1:3], truth[1:3]) <= 4 * compute
    for g, t in zip(got[3:], truth[3:], strict=True):
        assert g.dtype == dtype and error([g], [t]) <= 4 * compute + (torch.finfo(dtype).eps if dtype.itemsize == 2 else 0)
