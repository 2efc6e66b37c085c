"""crosscorr on the CPU against the eager Barlow Twins composition: `pytest benchmarks/bench_crosscorr.py`, or `python -m benchmarks.bench_crosscorr`.

Eager is F.batch_norm twice, one product and autograd; both sides end in the same loss. The floor is the three bare products that no implementation can do
without, X^T Y, Y G^T and X G. C and gradients of both are checked against float64 at N = 2048 before anything is timed, and against each other at the
size that is timed.
"""

import pytest
import torch
import torch.nn.functional as F

from benchmarks import harness
from benchmarks.harness import interleaved, peak_mib
from pix2rep_kernels import crosscorr
from pix2rep_kernels.testing import error, tolerance

LAMBDA = 5e-3  # Pix2Rep-v2's
SIZES = [(n, d) for n in (8_192, 32_768, 131_072) for d in (32, 64, 128, 256)]
LARGE = (786_432, 256)  # one batch of Pix2Rep-v2


def barlow(c):
    diagonal = c.diagonal()
    return (diagonal - 1).square().sum() + LAMBDA * (c.square().sum() - diagonal.square().sum())


def standardised(x):
    return F.batch_norm(x, None, None, training=True, eps=1e-5)


def eager_c(x, y):
    return standardised(x).T @ standardised(y) / len(x)


def ours_c(x, y):
    return crosscorr(x, y, backend="cpu")


def step(correlate, x, y):
    """C, and the gradients of the loss."""
    x.grad = y.grad = None
    c = correlate(x, y)
    barlow(c).backward()
    return c.detach(), x.grad, y.grad


def floor(x, y, g):
    with torch.no_grad():
        return x.T @ y, y @ g.T, x @ g


def views(n, d, dtype=torch.float32):
    """Two views with half of their variance in common, and means off zero."""
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(n, d, generator=generator)
    return [(common + torch.randn(n, d, generator=generator)).add_(1).to(dtype).requires_grad_() for _ in range(2)]


def checked(d):
    """Largest relative error of C and gradients against float64 at N = 2048: ours, eager's."""
    truth = step(eager_c, *views(2048, d, torch.float64))
    mine, theirs = (error(step(f, *views(2048, d)), truth) for f in (ours_c, eager_c))
    if mine > tolerance(theirs, torch.float32):
        raise AssertionError(f"crosscorr D={d}: error {mine:.1e} is above twice PyTorch's own {theirs:.1e}; nothing is timed")
    return mine, theirs


MEMORY = """
import torch
from benchmarks.bench_crosscorr import eager_c, ours_c, step
which, n, d = {"ours": ours_c, "eager": eager_c}[arguments[0]], int(arguments[1]), int(arguments[2])
torch.set_num_threads(2)
def views(n):
    return [torch.empty(n, d).normal_().requires_grad_() for _ in range(2)]
def prepare():
    step(which, *views(256))
    return views(n)
def work(inputs):
    step(which, *inputs)
"""


def measure(n, d, repeats=5):
    """One row of the table: seconds forward and backward, MiB beyond the inputs (both gradients counted)."""
    mine, theirs = checked(d)
    x, y = views(n, d)
    g = torch.randn(d, d)
    apart = error(step(ours_c, x, y), [t.clone() for t in step(eager_c, x, y)])
    if apart > 1e-3:
        raise AssertionError(f"crosscorr N={n} D={d}: the two sides are {apart:.1e} apart")
    calls = {"ours": lambda: step(ours_c, x, y), "eager": lambda: step(eager_c, x, y), "floor": lambda: floor(x, y, g)}
    times = interleaved(calls, repeats)
    medians = {name: taken["median_s"] for name, taken in times.items()}
    return {
        "op": "crosscorr", "N": n, "D": d, "dtype": "float32", "error": mine, "eager_error": theirs, "apart": apart, **times,
        "ratio": medians["eager"] / medians["ours"], "of_floor": medians["ours"] / medians["floor"],
        "extra_MiB": peak_mib(MEMORY, "ours", n, d), "eager_extra_MiB": peak_mib(MEMORY, "eager", n, d), "gradients_MiB": 2 * n * d * 4 / 2**20,
    }  # fmt: skip


@pytest.mark.parametrize("size", [(8_192, 32), (32_768, 64), (32_768, 256), (131_072, 64)], ids=str)
@pytest.mark.parametrize("which", ["ours", "eager", "floor"])
def test_crosscorr(benchmark, which, size):
    n, d = size
    benchmark.extra_info["error"], benchmark.extra_info["eager_error"] = checked(d)
    benchmark.group = f"crosscorr N={n} D={d} fwd+bwd"
    x, y = views(n, d)
    call, arguments = (floor, (x, y, torch.randn(d, d))) if which == "floor" else (step, ({"ours": ours_c, "eager": eager_c}[which], x, y))
    benchmark.pedantic(call, args=arguments, rounds=3, warmup_rounds=1)


HEADER = " " * 20 + "".join(f"{name:>10}" for name in ("ours ms", "eager ms", "ratio", "of floor", "MiB", "eager MiB", "gradients", "error", "eager"))


def line(r):
    mine, theirs = (1e3 * r[name]["median_s"] for name in ("ours", "eager"))
    memory = f"{r['extra_MiB']:10.0f}{r['eager_extra_MiB']:10.0f}{r['gradients_MiB']:10.0f}"
    name = f"N={r['N']} D={r['D']}"
    return f"{name:20}{mine:10.2f}{theirs:10.2f}{r['ratio']:10.2f}{r['of_floor']:10.2f}{memory}{r['error']:10.1e}{r['eager_error']:10.1e}"


def main():
    parser = harness.parser(__doc__)
    parser.add_argument("--large", action="store_true", help=f"N = {LARGE[0]:,} too: 13 GB of memory for eager")
    asked = harness.start(parser)
    harness.tabulate(asked, HEADER, (measure(*size, asked.repeats) for size in [*SIZES, *([LARGE] if asked.large else [])]), line)


if __name__ == "__main__":
    main()
