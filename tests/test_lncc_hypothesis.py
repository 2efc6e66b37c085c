"""lncc in C++ against the reference in float64, over shapes, layouts, dtypes and options that nobody chose."""

import pytest
import torch

from lncc_helpers import HERE, both, ours
from pix2rep_kernels.testing import error
from sweep import EXAMPLES

hypothesis = pytest.importorskip("hypothesis", reason="hypothesis is not installed")
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

LAYOUTS = ("contiguous", "last", "transposed", "sliced", "expanded")
TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@st.composite
def maps(draw, shape, dtype):
    """A map of that shape and dtype in some layout."""
    layout = draw(st.sampled_from(LAYOUTS))
    x = torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(draw(st.integers(0, 1000)))).to(dtype)
    if layout == "last":
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "transposed":
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "sliced":
        return torch.cat((x, x), -1)[..., ::2] if shape[-1] > 1 else torch.cat((x, x), 0)[: shape[0]]
    return x[:, :, :1].expand(shape) if layout == "expanded" else x


@st.composite
def calls(draw):
    dims = draw(st.sampled_from((2, 3)))
    largest = 40 if dims == 2 else 14
    shape = (draw(st.integers(1, 3)), draw(st.integers(1, 3)), *(draw(st.integers(1, largest)) for _ in range(dims)))
    types = draw(st.sampled_from(TYPES)), torch.float64  # one float64 map: all arithmetic is float64
    i, j = (draw(maps(shape, dtype)) for dtype in (types if draw(st.booleans()) else types[::-1]))
    options = {"window": draw(st.sampled_from((1, 3, 5, 7, 13))), "eps": draw(st.sampled_from((1e-5, 1e-2, 1.0)))}
    return i, j, options, draw(st.sampled_from(((True, True), (True, False), (False, True))))


@pytest.mark.skipif("cpu" not in HERE, reason="the CPU kernels are not built")
@given(call=calls())
@settings(max_examples=EXAMPLES, deadline=None, derandomize=True)
def test_cpp_is_the_reference(call):
    i, j, options, needs = call
    upstream = torch.randn(i.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = both(ours("reference"), i, j, upstream, needs=needs, **options)
    got = both(ours("cpu"), i, j, upstream, needs=needs, **options)
    for g, e in zip(got, expected, strict=True):
        assert g.dtype == e.dtype and g.shape == e.shape
        # Gradients may cancel to nothing: an error is one of what they cancel from, 2 |g| / e^(1/2) at most a window that is open.
        largest = 2 * upstream.abs().max() / options["eps"] ** 0.5 * min(options["window"] ** (i.ndim - 2), i[0, 0].numel())
        scale = e.double().norm() if g is got[0] else e.double().norm() + 1e-6 * largest * g.numel() ** 0.5
        assert error([g], [e]) == 0 or (g.double() - e.double()).norm() <= (1e-10 if e.dtype == torch.float64 else 2 * torch.finfo(e.dtype).eps) * scale
