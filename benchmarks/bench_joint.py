"""joint on the CPU against the best eager composition: `pytest benchmarks/bench_joint.py`, or `python -m benchmarks.bench_joint` for the table.

Eager is softmax twice and, without a radius, one batched product; with one and collapsed, a box filter (`avg_pool`) and one product, or a pair of
shifted slices and an einsum a displacement; uncollapsed the slices, or IIC's own way, conv2d of one map with the other as an image-sized filter. Each row
takes the fastest of those that apply (at T = 10 the box filter alone: the others take 441 products). Sums and gradients are checked against float64 on one
image before anything is timed.
"""

import itertools

import pytest
import torch
import torch.nn.functional as F

from benchmarks import harness
from benchmarks.harness import interleaved, peak_mib
from pix2rep_kernels.layout import memory_format
from pix2rep_kernels.ops import joint as _register  # noqa: F401
from pix2rep_kernels.testing import error, tolerance

# B, K, S, radius, collapsed, layout. First the boundary-aware paper's (ACDC: 18 slices of 224 x 224, K = 20, 40, 60), then IIC's radii, a volume.
SIZES = [
    (18, 40, (224, 224), 0, True, "first"),
    (18, 20, (224, 224), 0, True, "first"),
    (18, 60, (224, 224), 0, True, "first"),
    (18, 40, (224, 224), 0, True, "last"),
    (18, 24, (128, 128), 0, True, "first"),
    (18, 24, (128, 128), 1, True, "first"),
    (18, 24, (128, 128), 1, True, "last"),
    (18, 24, (128, 128), 1, False, "first"),
    (18, 24, (128, 128), 10, True, "first"),
    (2, 10, (16, 96, 96), 0, True, "first"),
    (2, 10, (16, 96, 96), 1, True, "first"),
]


def product(p, q):
    return torch.bmm(p.flatten(2), q.flatten(2).transpose(1, 2)).sum(0, keepdim=True)


def eager_box(a, b, radius, collapsed):
    """One product, of box sums with a radius; collapsed only."""
    p, q = a.softmax(1), b.softmax(1)
    if radius:
        pool = F.avg_pool2d if a.ndim == 4 else F.avg_pool3d
        p = pool(p, 2 * radius + 1, 1, radius, divisor_override=1)
    return product(p, q)


def eager_slices(a, b, radius, collapsed):
    """One product a displacement."""
    p, q, sums = a.softmax(1), b.softmax(1), []
    for d in itertools.product(range(-radius, radius + 1), repeat=a.ndim - 2):
        there = (..., *(slice(max(x, 0), n + min(x, 0)) for x, n in zip(d, a.shape[2:], strict=True)))
        here = (..., *(slice(max(-x, 0), n - max(x, 0)) for x, n in zip(d, a.shape[2:], strict=True)))
        sums.append(torch.einsum("bkp,blp->kl", p[there].flatten(2), q[here].flatten(2)))
    return torch.stack(sums).sum(0, keepdim=True) if collapsed else torch.stack(sums)


def eager_convolution(a, b, radius, collapsed):
    """IIC's: one map is the filter of the other."""
    p, q = a.softmax(1).transpose(0, 1), b.softmax(1).transpose(0, 1)
    sums = F.conv2d(p, q, padding=radius).permute(2, 3, 0, 1).flatten(0, 1)
    return sums.sum(0, keepdim=True) if collapsed else sums


def ours(a, b, radius, collapsed):
    return torch.ops.pix2rep.joint(a, b, None, radius, collapsed, True, "cpu")


def peers(space, radius, collapsed):
    found = {"box": eager_box} if collapsed else {}
    if 0 < radius <= 2:
        found["slices"] = eager_slices
        if len(space) == 2:
            found["convolution"] = eager_convolution
    return found


def inputs(batch, clusters, space, radius, collapsed, layout, dtype=torch.float32):
    """Maps that want gradients, and an upstream gradient."""
    generator = torch.Generator().manual_seed(0)
    maps = []
    for _ in range(2):
        m = torch.empty(batch, clusters, *space)
        m = m if layout == "first" else torch.empty_like(m, memory_format=memory_format(m.ndim))
        maps.append(m.normal_(generator=generator))
    count = 1 if collapsed else (2 * radius + 1) ** len(space)
    return *(m.to(dtype).requires_grad_() for m in maps), torch.randn(count, clusters, clusters, generator=generator).to(dtype)


def step(call, a, b, upstream, radius, collapsed):
    a.grad = b.grad = None
    sums = call(a, b, radius, collapsed)
    sums.backward(upstream)
    return sums.detach(), a.grad, b.grad


def checked(batch, clusters, space, radius, collapsed, layout):
    """Largest relative error of sums and gradients against float64 on one image: ours, the first peer's."""
    first = next(iter(peers(space, radius, collapsed).values()))
    small = (1, clusters, space, radius, collapsed, layout)
    truth = step(first, *inputs(*small, torch.float64), radius, collapsed)
    mine, theirs = (error(step(call, *inputs(*small), radius, collapsed), truth) for call in (ours, first))
    if mine > tolerance(theirs, torch.float32):
        raise AssertionError(f"joint {small}: error {mine:.1e} is above twice PyTorch's own {theirs:.1e}; nothing is timed")
    return mine, theirs


MEMORY = """
import torch
from benchmarks.bench_joint import eager_box, eager_convolution, eager_slices, inputs, ours, step
torch.set_num_threads(2)
which, batch, clusters, space, radius, collapsed, layout = eval(arguments[0])
call = {"ours": ours, "box": eager_box, "slices": eager_slices, "convolution": eager_convolution}[which]
def prepare():
    small = (1, 4, tuple(8 for _ in space), radius, collapsed, layout)
    step(call, *inputs(*small), radius, collapsed)
    return inputs(batch, clusters, space, radius, collapsed, layout)
def work(given):
    step(call, *given, radius, collapsed)
"""


def measure(batch, clusters, space, radius, collapsed, layout, repeats=7):
    """One row of the table: seconds forward and backward, forward alone, MiB beyond the inputs (gradients counted)."""
    size = (batch, clusters, space, radius, collapsed, layout)
    mine, theirs = checked(*size)
    a, b, upstream = inputs(*size)
    calls = {"ours": ours, **peers(space, radius, collapsed)}
    both = interleaved({n: lambda f=f: step(f, a, b, upstream, radius, collapsed) for n, f in calls.items()}, repeats)
    with torch.no_grad():
        forward = interleaved({n: lambda f=f: f(a, b, radius, collapsed) for n, f in calls.items()}, repeats)
    best, best_forward = (min((n for n in t if n != "ours"), key=lambda n: t[n]["median_s"]) for t in (both, forward))
    return {
        "op": "joint", "B": batch, "K": clusters, "S": space, "radius": radius, "collapsed": collapsed, "layout": layout, "dtype": "float32",
        "error": mine, "eager_error": theirs, "forward_backward": both, "forward": forward, "eager": best,
        "ratio": both[best]["median_s"] / both["ours"]["median_s"],
        "forward_ratio": forward[best_forward]["median_s"] / forward["ours"]["median_s"],
        "extra_MiB": peak_mib(MEMORY, repr(("ours", *size))), "eager_extra_MiB": peak_mib(MEMORY, repr((best, *size))),
    }  # fmt: skip


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("which", ["ours", "eager"])
def test_joint(benchmark, which, size):
    benchmark.extra_info["error"], benchmark.extra_info["eager_error"] = checked(*size)
    benchmark.group = f"joint {size} fwd+bwd"
    call = ours if which == "ours" else next(iter(peers(*size[2:5]).values()))
    benchmark.pedantic(step, args=(call, *inputs(*size), *size[3:5]), rounds=3, warmup_rounds=1)


HEADER = f"{'':52}{'ours ms':>9}{'eager ms':>10}{'ratio':>7}{'forward':>9}{'MiB':>7}{'eager':>7}{'error':>10}{'eager':>9}"


def line(r):
    mine, theirs = (1e3 * r["forward_backward"][side]["median_s"] for side in ("ours", r["eager"]))
    kind = "" if r["radius"] == 0 else " sum" if r["collapsed"] else " each"
    name = f"B={r['B']} K={r['K']} S={'x'.join(map(str, r['S']))} T={r['radius']}{kind} {r['layout']} ({r['eager']})"
    times = f"{mine:9.1f}{theirs:10.1f}{r['ratio']:7.1f}{r['forward_ratio']:9.1f}"
    return f"{name:52}{times}{r['extra_MiB']:7.0f}{r['eager_extra_MiB']:7.0f}{r['error']:10.1e}{r['eager_error']:9.1e}"


def main():
    parser = harness.parser(__doc__)
    parser.add_argument("--only", type=int, nargs="*", help="indices of sizes")
    asked = harness.start(parser)
    sizes = [SIZES[i] for i in asked.only] if asked.only else SIZES
    harness.tabulate(asked, HEADER, (measure(*size, repeats=asked.repeats) for size in sizes), line)


if __name__ == "__main__":
    main()
