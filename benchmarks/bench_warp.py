"""warp on the CPU against the eager composition it replaces: `pytest benchmarks/bench_warp.py`, or `python -m benchmarks.bench_warp` for the table.

Eager is F.affine_grid, F.grid_sample, permute, index, F.normalize and autograd. Rows and gradients of both are checked against float64 on one image
before anything is timed, and against each other at the size that is timed.
"""

import pytest
import torch
import torch.nn.functional as F

from benchmarks import harness
from benchmarks.harness import interleaved
from pix2rep_kernels import warp
from pix2rep_kernels.layout import memory_format
from pix2rep_kernels.testing import error, tolerance

# B, C, S, points (None: all). The first two are Pix2Rep's; then more channels, fewer, one image, a volume.
SIZES = [
    (8, 256, (128, 128), 1000),
    (8, 64, (64, 64), None),
    (8, 256, (64, 64), None),
    (8, 16, (128, 128), None),
    (1, 64, (128, 128), None),
    (2, 32, (16, 32, 32), None),
]
LAYOUTS = ("last", "first")


def eager(features, theta, points):
    grid = F.affine_grid(theta, (len(features), 1, *features.shape[2:]), align_corners=True)
    warped = F.grid_sample(features, grid, align_corners=True)
    rows = warped.movedim(1, -1).flatten(0, -2)
    return F.normalize(rows if points is None else rows[points])


def ours(features, theta, points):
    return warp(features, theta, points=points, normalize=True, backend="cpu")[0]


def inputs(batch, channels, space, points, layout, dtype=torch.float32):
    """Features that want a gradient, affine grids near the identity, points without repeats, an upstream gradient."""
    generator = torch.Generator().manual_seed(0)
    dims, pixels = len(space), batch * torch.Size(space).numel()
    features = torch.randn(batch, channels, *space, generator=generator)
    theta = torch.eye(dims, dims + 1) + 0.1 * torch.randn(batch, dims, dims + 1, generator=generator)
    drawn = None if points is None else torch.randperm(pixels, generator=generator)[:points]
    upstream = torch.randn(pixels if points is None else points, channels, generator=generator)
    if layout == "last":
        features = features.contiguous(memory_format=memory_format(dims + 2))
    return features.to(dtype).requires_grad_(), theta.to(dtype), drawn, upstream.to(dtype)


def step(call, features, theta, points, upstream):
    features.grad = None
    rows = call(features, theta, points)
    rows.backward(upstream)
    return rows.detach(), features.grad


def checked(batch, channels, space, points, layout):
    """Largest relative error of rows and gradients against float64 on one image: ours, eager's."""
    small = (1, channels, space, None if points is None else points // batch, layout)
    truth = step(eager, *inputs(*small, torch.float64))
    mine, theirs = (error(step(call, *inputs(*small)), truth) for call in (ours, eager))
    if mine > tolerance(theirs, torch.float32):
        raise AssertionError(f"warp {small}: error {mine:.1e} is above twice PyTorch's own {theirs:.1e}; nothing is timed")
    return mine, theirs


def measure(batch, channels, space, points, layout, repeats=7):
    """One row of the table: seconds forward and backward, forward alone."""
    mine, theirs = checked(batch, channels, space, points, layout)
    given = inputs(batch, channels, space, points, layout)
    apart = error(step(ours, *given), [x.clone() for x in step(eager, *given)])
    both = interleaved({name: lambda call=call: step(call, *given) for name, call in (("ours", ours), ("eager", eager))}, repeats)
    with torch.no_grad():
        forward = interleaved({name: lambda call=call: call(*given[:3]) for name, call in (("ours", ours), ("eager", eager))}, repeats)
    return {
        "op": "warp", "B": batch, "C": channels, "S": space, "points": points, "layout": layout, "dtype": "float32",
        "error": mine, "eager_error": theirs, "apart": apart, "forward_backward": both, "forward": forward,
        "ratio": both["eager"]["median_s"] / both["ours"]["median_s"], "forward_ratio": forward["eager"]["median_s"] / forward["ours"]["median_s"],
    }  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("which", ["ours", "eager"])
def test_warp(benchmark, which, size, layout):
    benchmark.extra_info["error"], benchmark.extra_info["eager_error"] = checked(*size, layout)
    benchmark.group = f"warp {size} channels {layout} fwd+bwd"
    benchmark.pedantic(step, args=({"ours": ours, "eager": eager}[which], *inputs(*size, layout)), rounds=3, warmup_rounds=1)


HEADER = f"{'':38}{'ours ms':>9}{'eager ms':>10}{'ratio':>7}{'forward':>9}{'error':>10}{'eager':>9}"


def line(r):
    name = f"B={r['B']} C={r['C']} S={'x'.join(map(str, r['S']))} P={r['points'] or 'all'} {r['layout']}"
    mine, theirs = (1e3 * r["forward_backward"][side]["median_s"] for side in ("ours", "eager"))
    return f"{name:38}{mine:9.2f}{theirs:10.2f}{r['ratio']:7.1f}{r['forward_ratio']:9.1f}{r['error']:10.1e}{r['eager_error']:9.1e}"


def main():
    asked = harness.start(harness.parser(__doc__))
    harness.tabulate(asked, HEADER, (measure(*size, layout, asked.repeats) for size in SIZES for layout in LAYOUTS), line)


if __name__ == "__main__":
    main()
