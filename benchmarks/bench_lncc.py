"""lncc on the CPU against the eager compositions it replaces: `pytest benchmarks/bench_lncc.py`, or `python -m benchmarks.bench_lncc` for the table.

Eager is five box sums, products, clamps and autograd; the box sums are one F.avg_pool, one F.conv with ones, or one axis after the other by either. Every
size is measured against the fastest of them. Values and gradients of all are checked against float64 before anything is timed.
"""


import pytest
import torch
import torch.nn.functional as F

from benchmarks import harness
from benchmarks.harness import interleaved
from pix2rep_kernels import lncc
from pix2rep_kernels.testing import error, tolerance

# B, C, S, window. The boundary term's maps, both ways of registration volumes, one small map.
SIZES = [
    (18, 1, (224, 224), 5),
    (18, 1, (224, 224), 9),
    (2, 1, (64, 128, 128), 5),
    (8, 1, (16, 96, 96), 9),
    (1, 1, (64, 64), 5),
]
EPS = 1e-5


def pooled(x, window):
    pool = F.avg_pool2d if x.ndim == 4 else F.avg_pool3d
    return pool(x, window, 1, window // 2) * window ** (x.ndim - 2)


def convolved(x, window):
    convolve = F.conv2d if x.ndim == 4 else F.conv3d
    return convolve(x, x.new_ones(1, 1, *(window,) * (x.ndim - 2)), padding=window // 2)


def by_axis(box):
    """`box` of one axis after the other."""

    def sums(x, window):
        for axis in range(x.ndim - 2):
            x = box(x, tuple(window if a == axis else 1 for a in range(x.ndim - 2)))
        return x

    return sums


def pooled_axis(x, window):
    pool = F.avg_pool2d if x.ndim == 4 else F.avg_pool3d
    return pool(x, window, 1, tuple(k // 2 for k in window)) * max(window)


def convolved_axis(x, window):
    convolve = F.conv2d if x.ndim == 4 else F.conv3d
    return convolve(x, x.new_ones(1, 1, *window), padding=tuple(k // 2 for k in window))


BOXES = {"pool": pooled, "conv": convolved, "pool by axis": by_axis(pooled_axis), "conv by axis": by_axis(convolved_axis)}


def eager(box):
    def run(i, j, window):
        n = window ** (i.ndim - 2)
        s_i, s_j, s_ii, s_jj, s_ij = box(torch.cat((i, j, i * i, j * j, i * j)), window).chunk(5)
        c, v, w = ((s - a * b / n).clamp(min=EPS) for s, a, b in ((s_ij, s_i, s_j), (s_ii, s_i, s_i), (s_jj, s_j, s_j)))
        return c * c / (v * w)

    return run


def ours(i, j, window):
    return lncc(i, j, window=window, eps=EPS, backend="cpu")


CALLS = {"ours": ours, **{name: eager(box) for name, box in BOXES.items()}}


def inputs(batch, channels, space, window, dtype=torch.float32, both=True):
    """Two maps in [0, 1] that correlate in places and want gradients, and the gradient of a mean."""
    generator = torch.Generator().manual_seed(0)
    i, noise, mix = (torch.rand(batch, channels, *space, generator=generator) for _ in range(3))
    j = mix * i + (1 - mix) * noise
    return i.to(dtype).requires_grad_(), j.to(dtype).requires_grad_(both), window


def step(call, i, j, window):
    i.grad = j.grad = None
    cc = call(i, j, window)
    cc.mean().backward()
    return [t for t in (cc.detach(), i.grad, j.grad) if t is not None]


def checked(batch, channels, space, window, both=True):
    """Largest relative error against float64, on one image of at most 64 a side: ours, eager's."""
    small = (1, channels, tuple(min(s, 64 if len(space) == 2 else 24) for s in space), window)
    truth = step(CALLS["conv"], *inputs(*small, torch.float64, both))
    mine, *theirs = (error(step(call, *inputs(*small, both=both)), truth) for call in CALLS.values())
    if mine > tolerance(min(theirs), torch.float32):
        raise AssertionError(f"lncc {small}: error {mine:.1e} is above twice PyTorch's own {min(theirs):.1e}; nothing is timed")
    return mine, min(theirs)


def measure(batch, channels, space, window, both=True, repeats=7):
    """One row of the table: seconds forward and backward, forward alone; only the fastest eager is timed to the end."""
    mine, theirs = checked(batch, channels, space, window, both)
    given = inputs(batch, channels, space, window, both=both)
    first = interleaved({name: lambda call=call: step(call, *given) for name, call in CALLS.items() if name != "ours"}, 2)
    best = min(first, key=lambda name: first[name]["best_s"])
    pair = {"ours": ours, "eager": CALLS[best]}
    timed = interleaved({name: lambda call=call: step(call, *given) for name, call in pair.items()}, repeats)
    with torch.no_grad():
        forward = interleaved({name: lambda call=call: call(*given) for name, call in pair.items()}, repeats)
    return {
        "op": "lncc", "B": batch, "C": channels, "S": space, "window": window, "dtype": "float32", "gradients": 2 if both else 1, "eager": best,
        "error": mine, "eager_error": theirs, "forward_backward": timed, "forward": forward,
        "ratio": timed["eager"]["median_s"] / timed["ours"]["median_s"], "forward_ratio": forward["eager"]["median_s"] / forward["ours"]["median_s"],
    }  # fmt: skip


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("which", CALLS)
def test_lncc(benchmark, which, size):
    benchmark.extra_info["error"], benchmark.extra_info["eager_error"] = checked(*size)
    benchmark.group = f"lncc {size} fwd+bwd"
    benchmark.pedantic(step, args=(CALLS[which], *inputs(*size)), rounds=3, warmup_rounds=1)


HEADER = f"{'':38}{'ours ms':>9}{'eager ms':>10}{'ratio':>7}{'forward':>9}{'error':>10}{'eager':>9}  fastest eager"


def line(r):
    mine, theirs = (1e3 * r["forward_backward"][side]["median_s"] for side in ("ours", "eager"))
    name = f"B={r['B']} S={'x'.join(map(str, r['S']))} window {r['window']} {'di dj' if r['gradients'] == 2 else 'di'}"
    times = f"{mine:9.2f}{theirs:10.2f}{r['ratio']:7.1f}{r['forward_ratio']:9.1f}"
    return f"{name:38}{times}{r['error']:10.1e}{r['eager_error']:9.1e}  {r['eager']}"


def main():
    asked = harness.start(harness.parser(__doc__))
    harness.tabulate(asked, HEADER, (measure(*size, both, asked.repeats) for size in SIZES for both in (True, False)), line)


if __name__ == "__main__":
    main()
