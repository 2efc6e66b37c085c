"""infonce in C++ against the reference: Hypothesis draws shapes, groups, layouts, dtypes, masks, ids, queues, positives, negatives, temperatures."""

import pytest
import torch

from infonce_helpers import FAST, rows, run
from sweep import EXAMPLES

pytest.importorskip("hypothesis", reason="hypothesis is not installed")
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

pytestmark = pytest.mark.skipif("cpu" not in FAST, reason="the CPU kernels are not built")
FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
COUNTS = st.one_of(st.integers(1, 70), st.sampled_from([127, 191, 192, 193, 200]))  # past one block too


def laid_out(x, layout):
    """The same values in other memory."""
    if layout == "columns":
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "offset":
        return torch.cat([torch.full_like(x[..., :1], torch.nan), x], -1)[..., 1:]
    if layout == "strided":
        return torch.stack([x, torch.full_like(x, torch.nan)], -1)[..., 0]
    return x


@st.composite
def problems(draw):
    negatives = draw(st.sampled_from(["joint", "cross", "forward"]))
    groups, n, d = draw(st.integers(1, 3)), draw(COUNTS), draw(st.integers(1, 70))
    m = draw(COUNTS) if negatives == "forward" else n
    torch.manual_seed(draw(st.integers(0, 2**31)))
    options = {}
    if negatives == "forward" and (n > m or draw(st.booleans())):
        options["positive"] = torch.randint(m, (groups, n))
    elif negatives != "forward" and draw(st.booleans()):
        options["positive"] = torch.stack([torch.randperm(n) for _ in range(groups)])
    if draw(st.booleans()):
        options |= {"valid_a": torch.rand(groups, n) > 0.3, "valid_b": torch.rand(groups, m) > 0.3}
    if draw(st.booleans()):
        kinds = draw(st.integers(1, 2 * n))
        options |= {"ids_a": torch.randint(-kinds, kinds, (groups, n)) * 2**40, "ids_b": torch.randint(-kinds, kinds, (groups, m)) * 2**40}
    queue = 0 if negatives == "cross" else draw(st.sampled_from([0, 0, 1, 7, 50, 300]))
    if queue:
        options["queue"] = rows(queue, d)
    return negatives, rows(groups, n, d), rows(groups, m, d), options


TEMPERATURES = st.floats(0.002, 10.0)


@settings(max_examples=EXAMPLES, deadline=None, derandomize=True)
@given(problems(), TEMPERATURES, st.sampled_from(FLOATS[:2]))
def test_matches_float64(problem, temperature, dtype):
    """Bounds to first order. A similarity is a dot product of D terms over tau, so its error is (D + 4) eps |a||b| / tau; a softmax weight has twice that
    as relative error, and one eps a term of its sum. A loss errs as much in absolute terms; an anchor's weights, the positive's apart, sum to one.
    """
    negatives, a, b, options = problem
    a, b, plain = a.to(dtype), b.to(dtype), {k: v.to(dtype) if k == "queue" else v for k, v in options.items()}
    tau = float(torch.tensor(temperature, dtype=dtype))
    upstream = torch.randn(a.shape[0], a.shape[1] * (1 if negatives == "forward" else 2), dtype=torch.float64).to(dtype)
    fixed = {"negatives": negatives, "upstream": upstream, "temperature_floor": 1e-4}
    wide = {k: v.double() if k == "queue" else v for k, v in plain.items()}
    truth = run("reference", a.double(), b.double(), tau, **fixed, **wide)
    got = run("cpu", a, b, tau, **fixed, **plain)
    eps, terms = torch.finfo(dtype).eps, a.shape[1] + b.shape[1] + (len(options["queue"]) if "queue" in options else 0)
    relative = eps * (2 * (a.shape[2] + 4) / tau + terms + 16)
    bounds = relative + 2 * eps * truth[0].max(), *[4 * relative * upstream.double().abs().sum() / tau**power for power in (1, 1, 2)]
    for g, t, bound in zip(got, truth, bounds, strict=True):
        difference = (g.double() - t).abs() if g is got[0] else (g.double() - t).norm()
        assert (difference <= bound).all(), (difference.max(), bound)


@settings(max_examples=EXAMPLES, deadline=None, derandomize=True)
@given(problems(), TEMPERATURES, st.tuples(*[st.sampled_from(FLOATS)] * 3), st.tuples(*[st.sampled_from(["columns", "offset", "strided", "rows"])] * 3))
def test_storage_changes_nothing(problem, temperature, dtypes, layouts):
    """Rows of any dtype and strides give the bits of the same values in rows of the widest dtype; gradients are rounded to the rows' own."""
    negatives, a, b, options = problem
    wide = torch.float64 if torch.float64 in dtypes[:2] else torch.float32
    a, b = laid_out(a.to(dtypes[0]), layouts[0]), laid_out(b.to(dtypes[1]), layouts[1])
    stored, plain = dict(options), dict(options)
    if "queue" in options:
        stored["queue"] = laid_out(options["queue"].to(dtypes[2]), layouts[2])
        plain["queue"] = stored["queue"].to(wide)
    upstream = torch.randn(a.shape[0], a.shape[1] * (1 if negatives == "forward" else 2), dtype=torch.float64)
    fixed = {"negatives": negatives, "upstream": upstream, "temperature_floor": 1e-4}
    tau = float(torch.tensor(temperature, dtype=torch.float32))
    got = run("cpu", a, b, tau, **fixed, **stored)
    truth = run("cpu", a.to(wide).contiguous(), b.to(wide).contiguous(), tau, **fixed, **plain)
    for g, t, dtype in zip(got, truth, (wide, *dtypes[:2], wide), strict=True):
        assert g.dtype == dtype or g.ndim == 0
        assert torch.equal(g, t.to(g.dtype))
