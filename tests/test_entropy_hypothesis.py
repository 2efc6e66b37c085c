"""entropy: shapes, layouts, dtypes and masks drawn at random, C++ against the reference."""

import pytest
import torch

from joint_helpers import LAYOUTS, lay
from pix2rep_kernels.testing import backends, poisoned
from sweep import EXAMPLES

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@pytest.mark.skipif("cpu" not in backends("entropy"), reason="the CPU kernels are not built")
@hypothesis.settings(max_examples=EXAMPLES, deadline=None, derandomize=True)
@hypothesis.given(st.data())
def test_cpu_equals_the_reference(data):
    draw = data.draw
    space = draw(st.lists(st.integers(1, 20), min_size=2, max_size=2) | st.lists(st.integers(1, 7), min_size=3, max_size=3))
    batch, clusters, dtype = draw(st.integers(0, 3)), draw(st.integers(1, 70)), draw(st.sampled_from(DTYPES))
    scale = draw(st.sampled_from((0.1, 1.0, 10.0)))
    logits = lay((scale * torch.randn(batch, clusters, *space, dtype=torch.float64)).to(dtype), draw(st.sampled_from(LAYOUTS)))
    mask = torch.rand(batch, *space) > draw(st.floats(0, 1)) if draw(st.booleans()) else None
    last = draw(st.booleans())
    forward, backward = torch.ops.pix2rep.entropy, torch.ops.pix2rep.entropy_backward
    with poisoned():
        h = [forward(logits, mask, backend) for backend in ("cpu", "reference")]
        upstream = torch.randn_like(h[0])
        gradients = [backward(upstream, logits, mask, last, backend) for backend in ("cpu", "reference")]
    # Each side is a few roundings of its K terms from the truth; the gradient of a 16-bit map is then rounded.
    rounding = (clusters + 8) * torch.finfo(h[0].dtype).eps
    assert ((h[0] - h[1]).abs() <= 4 * rounding).all()
    assert gradients[0].stride() == gradients[1].stride()
    difference, length = (gradients[0].double() - gradients[1].double()).norm(), gradients[1].double().norm()
    assert difference <= rounding * max(scale, 1) * upstream.norm() + torch.finfo(dtype).eps * length
