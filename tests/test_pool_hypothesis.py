"""pool in C++ against the reference: shapes, layouts, label types and regions drawn at random."""

import pytest
import torch

from pix2rep_kernels.testing import error
from pool_helpers import FAST, LABELS, both, ours, problem
from sweep import EXAMPLES

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies


@pytest.mark.skipif("cpu" not in FAST, reason="the CPU kernels are not built")
@hypothesis.settings(max_examples=EXAMPLES, deadline=None, derandomize=True)
@hypothesis.given(
    space=st.one_of(st.tuples(st.integers(0, 600)), st.tuples(st.integers(0, 40), st.integers(1, 40)), st.tuples(*[st.integers(1, 12)] * 3)),
    batch=st.integers(0, 3),
    channels=st.integers(0, 140),
    regions=st.integers(0, 80),
    layout=st.sampled_from(("last", "first", "strided")),
    dtype=st.sampled_from((torch.float64, torch.float32, torch.float16, torch.bfloat16)),
    labels=st.sampled_from(LABELS),
    runs=st.integers(1, 300),
    seed=st.integers(0, 2**31),
)
def test_like_the_reference(space, batch, channels, regions, layout, dtype, labels, runs, seed):
    """Counts and gradients are equal; means differ by the order of sums in double and one rounding."""
    torch.manual_seed(seed)
    given = problem(channels=channels, batch=batch, regions=regions, layout=layout, dtype=dtype, labels=labels, space=space, runs=runs)
    upstream = torch.randn(batch, regions, channels)
    got, expected = (both(ours(backend), *given, upstream) for backend in ("cpu", "reference"))
    assert torch.equal(got[1], expected[1]) and torch.equal(got[2], expected[2])
    assert got[0].dtype == expected[0].dtype
    assert error([got[0]], [expected[0]]) <= (1e-13 if dtype == torch.float64 else torch.finfo(torch.float32).eps)
