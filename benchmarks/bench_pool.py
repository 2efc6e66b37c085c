"""pool on the CPU against the eager compositions it replaces: `pytest benchmarks/bench_pool.py`, or `python -m benchmarks.bench_pool` for the table.

Eager is the fastest of four ways with autograd, found in the run itself: scatter_add of rows, scatter_add of planes, index_add of rows with bincount,
and a product with a one-hot matrix. Means and gradients are checked against float64 before anything is timed.
"""


import pytest
import torch

from benchmarks import harness
from benchmarks.harness import interleaved
from pix2rep_kernels import pool
from pix2rep_kernels.layout import memory_format
from pix2rep_kernels.testing import error, tolerance

# B, C, S, regions, what the labels are. Superpixels as in Localized Region Contrast, at several resolutions; a volume; the extremes of locality; small.
SIZES = [
    (8, 64, (128, 128), 200, "superpixels"),
    (8, 64, (128, 128), 512, "superpixels"),
    (16, 32, (224, 224), 100, "superpixels"),
    (8, 256, (64, 64), 50, "superpixels"),
    (2, 32, (32, 64, 64), 300, "superpixels"),
    (8, 64, (128, 128), 200, "background"),
    (8, 64, (128, 128), 200, "random"),
    (4, 256, (64, 64), 50, "superpixels"),
    (2, 64, (64, 64), 100, "superpixels"),
    (4, 3, (224, 224), 200, "superpixels"),
]
LAYOUTS = ("last", "first")


def _flat(features, labels):
    return features.flatten(2).transpose(1, 2), labels.flatten(1)


def scatter_rows(features, labels, regions):
    rows, slot = _flat(features, labels)
    sums = rows.new_zeros(len(rows), regions, rows.shape[2]).scatter_add(1, slot.unsqueeze(2).expand(-1, -1, rows.shape[2]), rows)
    counts = slot.new_zeros(len(rows), regions).scatter_add(1, slot, torch.ones_like(slot))
    return sums / counts.clamp(min=1).unsqueeze(2)


def scatter_planes(features, labels, regions):
    planes, slot = features.flatten(2), labels.flatten(1)
    sums = planes.new_zeros(*planes.shape[:2], regions).scatter_add(2, slot.unsqueeze(1).expand(-1, planes.shape[1], -1), planes)
    counts = slot.new_zeros(len(planes), regions).scatter_add(1, slot, torch.ones_like(slot))
    return (sums / counts.clamp(min=1).unsqueeze(1)).transpose(1, 2)


def index_rows(features, labels, regions):
    rows, slot = _flat(features, labels)
    batch, _, channels = rows.shape
    slot = (slot + regions * torch.arange(batch).unsqueeze(1)).flatten()
    sums = rows.new_zeros(batch * regions, channels).index_add(0, slot, rows.reshape(-1, channels))
    counts = torch.bincount(slot, minlength=batch * regions)
    return (sums / counts.clamp(min=1).unsqueeze(1)).view(batch, regions, channels)


def one_hot(features, labels, regions):
    rows, slot = _flat(features, labels)
    hot = rows.new_zeros(len(rows), regions, rows.shape[1]).scatter_(1, slot.unsqueeze(1), 1)
    return hot @ rows / hot.sum(2, keepdim=True).clamp(min=1)


EAGER = {"scatter rows": scatter_rows, "scatter planes": scatter_planes, "index rows": index_rows, "one-hot": one_hot}


def ours(features, labels, regions):
    return pool(features, labels, regions=regions, backend="cpu")[0]


def superpixels(batch, space, regions, generator):
    """Cells of seeds thrown at random: compact, of about equal size, numbered along the image."""
    seeds = torch.stack([torch.rand(batch, regions, generator=generator) * size for size in space], 2)
    seeds = torch.stack([s[s[:, 0].argsort()] for s in seeds])
    places = torch.stack(torch.meshgrid(*(torch.arange(size, dtype=torch.float32) for size in space), indexing="ij"), -1).flatten(0, -2)
    return torch.stack([torch.cat([torch.cdist(p, s).argmin(1) for p in places.split(8192)]) for s in seeds]).view(batch, *space)


def inputs(batch, channels, space, regions, kind, layout, dtype=torch.float32):
    """Features that want a gradient, int64 labels of which each has a region, an upstream gradient."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(batch, channels, *space, generator=generator)
    if layout == "last":
        features = features.contiguous(memory_format=memory_format(features.ndim))
    if kind == "random":
        labels = torch.randint(regions, (batch, *space), generator=generator)
    else:
        labels = superpixels(batch, space, regions, generator)
    if kind == "background":  # one region outside a disc
        middle = torch.stack(torch.meshgrid(*(torch.linspace(-1, 1, size) for size in space), indexing="ij")).square().sum(0) < 0.2
        labels = torch.where(middle, labels, 0)
    upstream = torch.randn(batch, regions, channels, generator=generator)
    return features.to(dtype).requires_grad_(), labels, regions, upstream.to(dtype)


def step(call, features, labels, regions, upstream):
    features.grad = None
    means = call(features, labels, regions)
    means.backward(upstream)
    return means.detach(), features.grad


def checked(size, layout):
    """Largest relative error of means and gradients against float64: ours, that of scatter_add."""
    truth = step(scatter_rows, *inputs(*size, layout, torch.float64))
    mine, theirs = (error(step(call, *inputs(*size, layout)), truth) for call in (ours, scatter_rows))
    if not mine <= tolerance(theirs, torch.float32):
        raise AssertionError(f"pool {size} {layout}: error {mine:.1e} is above twice PyTorch's own {theirs:.1e}; nothing is timed")
    return mine, theirs


def best_eager(given):
    """Name of the fastest composition, from two runs of each."""
    times = interleaved({name: lambda call=call: step(call, *given) for name, call in EAGER.items()}, 2)
    return min(times, key=lambda name: times[name]["best_s"])


def measure(size, layout, repeats=9):
    """One row of the table: seconds forward and backward, forward alone."""
    mine, theirs = checked(size, layout)
    given = inputs(*size, layout)
    name = best_eager(given)
    calls = {"ours": ours, "eager": EAGER[name]}
    both = interleaved({which: lambda call=call: step(call, *given) for which, call in calls.items()}, repeats)
    with torch.no_grad():
        forward = interleaved({which: lambda call=call: call(*given[:3]) for which, call in calls.items()}, repeats)
    batch, channels, space, regions, kind = size
    return {
        "op": "pool", "B": batch, "C": channels, "S": space, "R": regions, "labels": kind, "layout": layout, "dtype": "float32",
        "error": mine, "eager_error": theirs, "eager": name, "forward_backward": both, "forward": forward,
        "ratio": both["eager"]["median_s"] / both["ours"]["median_s"], "best_ratio": both["eager"]["best_s"] / both["ours"]["best_s"],
        "forward_ratio": forward["eager"]["median_s"] / forward["ours"]["median_s"],
    }  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", SIZES[:5], ids=str)
@pytest.mark.parametrize("which", ["ours", *EAGER])
def test_pool(benchmark, which, size, layout):
    benchmark.extra_info["error"], benchmark.extra_info["eager_error"] = checked(size, layout)
    benchmark.group = f"pool {size} channels {layout} fwd+bwd"
    benchmark.pedantic(step, args=({"ours": ours, **EAGER}[which], *inputs(*size, layout)), rounds=3, warmup_rounds=1)


HEADER = f"{'':52}{'ours ms':>9}{'eager ms':>10}{'ratio':>7}{'of best':>9}{'forward':>9}{'error':>10}{'eager':>9}"


def line(r):
    mine, theirs = (1e3 * r["forward_backward"][side]["median_s"] for side in ("ours", "eager"))
    name = f"B={r['B']} C={r['C']} S={'x'.join(map(str, r['S']))} R={r['R']} {r['labels']} {r['layout']}"
    times = f"{mine:9.2f}{theirs:10.2f}{r['ratio']:7.1f}{r['best_ratio']:9.1f}{r['forward_ratio']:9.1f}"
    return f"{name:52}{times}{r['error']:10.1e}{r['eager_error']:9.1e}  {r['eager']}"


def main():
    asked = harness.start(harness.parser(__doc__))
    harness.tabulate(asked, HEADER, (measure(size, layout, asked.repeats) for size in SIZES for layout in LAYOUTS), line)


if __name__ == "__main__":
    main()
