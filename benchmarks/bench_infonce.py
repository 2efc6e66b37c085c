"""infonce on the CPU against eager PyTorch at its best setting: `pytest benchmarks/bench_infonce.py`, or `python -m benchmarks.bench_infonce` for the table.

Eager is matmul, logsumexp (inside cross-entropy) and autograd. Each row is checked in the same run: losses and gradients of both sides against float64
at N = 1024, and against each other at the size that is timed.
"""

import pytest
import torch
import torch.nn.functional as F

from benchmarks import harness
from benchmarks.harness import interleaved, peak_mib
from pix2rep_kernels import infonce
from pix2rep_kernels.testing import error

TEMPERATURE = 0.1
SIZES = [("cross", 8192, 64), ("joint", 8192, 64), ("cross", 4096, 128), ("joint", 1000, 256), ("joint", 4096, 256)]


def eager(a, b, negatives):
    """Mean loss; the boolean diagonal mask is the cheapest way to leave an anchor out."""
    n = len(a)
    if negatives == "cross":
        s, target = a @ b.T / TEMPERATURE, torch.arange(n)
        return (F.cross_entropy(s, target) + F.cross_entropy(s.T, target)) / 2
    z = torch.cat([a, b])
    s = z @ z.T / TEMPERATURE
    s.fill_diagonal_(-torch.inf)
    return F.cross_entropy(s, torch.arange(2 * n).roll(n))


def ours(a, b, negatives):
    return infonce(a, b, temperature=TEMPERATURE, negatives=negatives, backend="cpu").mean()


def step(loss, a, b, negatives):
    a.grad = b.grad = None
    value = loss(a, b, negatives)
    value.backward()
    return value.detach(), a.grad, b.grad


def rows(n, d, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [F.normalize(torch.randn(n, d, generator=generator, dtype=torch.float64), dim=1).to(dtype).requires_grad_() for _ in range(2)]


def checked(negatives, d):
    """Largest relative error of losses and gradients against float64 at N = 1024: ours, eager's."""
    truth = step(eager, *rows(1024, d, torch.float64), negatives)
    return tuple(error(step(f, *rows(1024, d), negatives), truth) for f in (ours, eager))


MEMORY = """
import torch
from benchmarks.bench_infonce import eager, ours, rows, step
torch.set_num_threads(2)
which, negatives, n, d = arguments[0], arguments[1], int(arguments[2]), int(arguments[3])
loss = {"ours": ours, "eager": eager}[which]
def prepare():
    step(loss, *rows(256, d), negatives)
    return rows(n, d)
def work(inputs):
    step(loss, *inputs, negatives)
"""


def measure(negatives, n, d, repeats=7, peers=True):
    """One row of the table as a dict; seconds forward and backward, MiB beyond the inputs (gradients counted)."""
    ours_error, eager_error = checked(negatives, d)
    if ours_error > 2 * eager_error + torch.finfo(torch.float32).eps:
        raise AssertionError(f"infonce {negatives} D={d}: error {ours_error:.1e} is above twice PyTorch's own {eager_error:.1e}; nothing is timed")
    a, b = rows(n, d)
    calls = {"ours": lambda: step(ours, a, b, negatives)}
    if peers:
        calls["eager"] = lambda: step(eager, a, b, negatives)
    times = interleaved(calls, repeats)
    row = {"op": "infonce", "negatives": negatives, "N": n, "D": d, "dtype": "float32", "error": ours_error, "eager_error": eager_error, **times}
    row["extra_MiB"] = peak_mib(MEMORY, "ours", negatives, n, d)
    if peers:
        row["ratio"] = times["eager"]["median_s"] / times["ours"]["median_s"]
        row["eager_extra_MiB"] = peak_mib(MEMORY, "eager", negatives, n, d)
    return row


@pytest.mark.parametrize("negatives, n, d", SIZES[:4])
@pytest.mark.parametrize("which", ["ours", "eager"])
def test_infonce(benchmark, which, negatives, n, d):
    ours_error, eager_error = checked(negatives, d)
    assert ours_error <= 2 * eager_error + torch.finfo(torch.float32).eps
    a, b = rows(n, d)
    benchmark.group = f"infonce {negatives} N={n} D={d} fwd+bwd"
    benchmark.extra_info["extra_MiB"] = peak_mib(MEMORY, which, negatives, n, d)
    benchmark.pedantic(step, args=({"ours": ours, "eager": eager}[which], a, b, negatives), rounds=3, warmup_rounds=1)


HEADER = f"{'':22}{'ours s':>9}{'eager s':>9}{'ratio':>7}{'MiB':>8}{'eager MiB':>11}{'error':>10}{'eager':>9}"


def line(r):
    eager_s, ratio, eager_mib = (r["eager"]["median_s"], r["ratio"], r["eager_extra_MiB"]) if "eager" in r else (float("nan"),) * 3
    name = f"{r['negatives']} N={r['N']} D={r['D']}"
    times = f"{r['ours']['median_s']:9.3f}{eager_s:9.3f}{ratio:7.1f}"
    return f"{name:22}{times}{r['extra_MiB']:8.1f}{eager_mib:11.0f}{r['error']:10.1e}{r['eager_error']:9.1e}"


def main():
    parser = harness.parser(__doc__)
    parser.add_argument("--large", action="store_true", help="N = 65,536 too, without eager (17 GB a copy)")
    asked = harness.start(parser)
    sizes = [(*size, asked.repeats) for size in SIZES] + ([("cross", 65_536, 64, 2, False)] if asked.large else [])
    harness.tabulate(asked, HEADER, (measure(*size) for size in sizes), line)


if __name__ == "__main__":
    main()
