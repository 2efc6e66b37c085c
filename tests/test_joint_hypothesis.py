"""joint: shapes, layouts, dtypes and options drawn at random, C++ against the reference in float64."""

import pytest
import torch

from joint_helpers import LAYOUTS, lay, raw, three, upstream_of
from pix2rep_kernels.testing import backends, error, poisoned
from sweep import EXAMPLES

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@pytest.mark.skipif("cpu" not in backends("joint"), reason="the CPU kernels are not built")
@hypothesis.settings(max_examples=EXAMPLES, deadline=None, derandomize=True)
@hypothesis.given(st.data())
def test_cpu_equals_the_reference(data):
    draw = data.draw
    space = draw(st.lists(st.integers(1, 20), min_size=2, max_size=2) | st.lists(st.integers(1, 7), min_size=3, max_size=3))
    batch, clusters = draw(st.integers(0, 3)), draw(st.integers(1, 40))
    maps = []
    for _ in range(2):
        other = draw(st.sampled_from(DTYPES))
        dtype = draw(st.sampled_from((torch.float64, other)))
        maps.append(lay(torch.randn(batch, clusters, *space, dtype=torch.float64).to(dtype), draw(st.sampled_from(LAYOUTS))))
    maps[0] = maps[0].double()  # one double makes the arithmetic double
    if draw(st.booleans()):
        maps.reverse()
    options = {
        "radius": draw(st.integers(0, 3 if len(space) == 2 else 1)),
        "collapsed": draw(st.booleans()),
        "logits": draw(st.booleans()),
        "mask": torch.rand(batch, *space) > draw(st.floats(0, 1)) if draw(st.booleans()) else None,
    }
    needs = draw(st.sampled_from(((True, True), (True, False), (False, True))))
    upstream = upstream_of(maps[0], **options)
    with poisoned():
        got = three(raw("cpu"), *maps, upstream, needs, **options)
        expected = three(raw("reference"), *maps, upstream, needs, **options)
    for g, e in zip(got, expected, strict=True):
        rounding = torch.finfo(g.dtype).eps if g.dtype != torch.float64 else 0
        assert error([g], [e]) <= 1e-12 + rounding, (options, maps[0].shape)
