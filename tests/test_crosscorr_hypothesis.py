"""crosscorr in C++ against the reference in float64, on problems that nobody chose."""

import pytest
import torch

from crosscorr_helpers import FAST, NORMALIZATIONS, compare, views, weights
from sweep import EXAMPLES

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies

if "cpu" not in FAST:
    pytest.skip("the CPU kernels are not built", allow_module_level=True)

DTYPES = st.sampled_from((torch.float16, torch.bfloat16, torch.float32, torch.float64))
LAYOUTS = st.sampled_from(("rows", "planes", "wide", "offset", "backwards"))


@hypothesis.settings(max_examples=EXAMPLES, deadline=None, derandomize=True)
@hypothesis.given(
    n=st.integers(4, 700), d1=st.integers(1, 140), d2=st.integers(1, 140), dtypes=st.tuples(DTYPES, DTYPES), layout=LAYOUTS,
    weight=st.sampled_from(("none", "mask", "numbers")), normalization=st.sampled_from(NORMALIZATIONS), seed=st.integers(0, 1000),
)  # fmt: skip
def test_any_problem(n, d1, d2, dtypes, layout, weight, normalization, seed):
    torch.manual_seed(seed)
    w = weights(weight, n)
    if w is not None:
        w[:2] = 1  # "std" needs two rows
    compare("cpu", *views(n, d1, d2, *dtypes, layout), w, normalization)
