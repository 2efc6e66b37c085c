"""pytest-benchmark tests of an op, made from its cases: `pytest benchmarks/bench_<op>.py`."""

from collections.abc import Callable

import pytest

from benchmarks.case import step
from benchmarks.run import checked
from pix2rep_kernels import native


def microbenchmark(cases: Callable) -> Callable:
    """A test a case and side: "ours", or a peer that starts fast; forward and backward, checked against float64 first."""
    named = [(case, who) for case in cases() for who in ("ours", *(name for name, peer in case.peers.items() if not peer.slow_start))]

    @pytest.mark.parametrize("case, who", named, ids=[f"{case.name}-{who}" for case, who in named])
    def test(benchmark, case, who):
        if reason := native.why_missing("cpu"):
            pytest.skip(reason)
        found = checked(case, "cpu", "cpu", who)
        assert found.refused is None, found.refused
        benchmark.extra_info.update(errors=found.errors, eager_errors=found.eager_errors)
        benchmark.group = f"{case.op} {case.name} fwd+bwd"
        benchmark.pedantic(step, args=(found.call, case.make("cpu", case.dtype)), rounds=3, warmup_rounds=1)

    return test
