"""align on the CPU against the eager composition it replaces: `pytest benchmarks/bench_align.py`, or `python -m benchmarks.bench_align` for the table.

Eager is two F.affine_grid and F.grid_sample, three products and sums, and autograd; it has no `valid`. Results and gradients of both are checked against
float64 on one image before anything is timed, and against each other at the size that is timed.
"""


import pytest
import torch
import torch.nn.functional as F

from benchmarks import harness
from benchmarks.harness import interleaved
from pix2rep_kernels import align
from pix2rep_kernels.layout import memory_format
from pix2rep_kernels.testing import error, tolerance

# B, C, S1, S2, M. The first two are PGL's encoder maps (its batches), the third a decoder's; then a slice, unequal maps, few points of a large map, few
# channels.
SIZES = [
    (20, 256, (2, 6, 6), (2, 6, 6), (2, 6, 6)),
    (128, 256, (2, 6, 6), (2, 6, 6), (2, 6, 6)),
    (2, 32, (16, 96, 96), (16, 96, 96), (16, 96, 96)),
    (8, 64, (64, 64), (64, 64), (64, 64)),
    (4, 64, (16, 24, 24), (12, 32, 32), (12, 24, 24)),
    (2, 32, (16, 96, 96), (16, 96, 96), (4, 24, 24)),
    (8, 4, (128, 128), (128, 128), (128, 128)),
]
LAYOUTS = ("last", "first")
WANTED = ("f1", "both")  # which maps want a gradient; targets are detached as a rule


def eager(f1, f2, theta1, theta2, size):
    q, z = (
        F.grid_sample(f, F.affine_grid(theta, (len(f), 1, *size), align_corners=False), padding_mode="border", align_corners=False)
        for f, theta in ((f1, theta1), (f2, theta2))
    )
    return (q * z).sum(1), (q * q).sum(1), (z * z).sum(1)


def ours(f1, f2, theta1, theta2, size):
    return align(f1, f2, theta1, theta2, size=size, backend="cpu")[:3]


def inputs(batch, channels, s1, s2, size, layout, wanted, dtype=torch.float32):
    """Maps, affine grids of crops and flips, the common size, upstream gradients."""
    generator = torch.Generator().manual_seed(0)
    dims = len(s1)
    maps, thetas = [], []
    for space, wants in ((s1, True), (s2, wanted == "both")):
        features = torch.randn(batch, channels, *space, generator=generator)
        if layout == "last":
            features = features.contiguous(memory_format=memory_format(dims + 2))
        maps.append(features.to(dtype).requires_grad_(wants))
        theta = torch.zeros(batch, dims, dims + 1)
        theta[:, range(dims), range(dims)] = (0.6 + 0.3 * torch.rand(batch, dims, generator=generator)) * torch.randn(batch, dims, generator=generator).sign()
        theta[:, :, -1] = 0.1 * torch.randn(batch, dims, generator=generator)
        thetas.append(theta.to(dtype))
    return *maps, *thetas, size, [torch.randn(batch, *size, generator=generator).to(dtype) for _ in range(3)]


def step(call, *given):
    *arguments, upstream = given
    leaves = [f for f in arguments[:2] if f.requires_grad]
    results = call(*arguments)
    follow = [(t, g) for t, g in zip(results, upstream, strict=True) if t.requires_grad]  # eager's sq2 of a detached target does not
    return *(t.detach() for t in results), *torch.autograd.grad([t for t, _ in follow], leaves, [g for _, g in follow])


def checked(batch, *case):
    """Largest relative error of results and gradients against float64 on one image: ours, eager's."""
    truth = step(eager, *inputs(1, *case, torch.float64))
    mine, theirs = (error(step(call, *inputs(1, *case)), truth) for call in (ours, eager))
    if mine > tolerance(theirs, torch.float32):
        raise AssertionError(f"align {case}: error {mine:.1e} is above twice PyTorch's own {theirs:.1e}; nothing is timed")
    return mine, theirs


def measure(size, layout, wanted, repeats=7):
    """One row of the table: seconds forward and backward, forward alone."""
    mine, theirs = checked(*size, layout, wanted)
    given = inputs(*size, layout, wanted)
    apart = error(step(ours, *given), step(eager, *given))
    both = interleaved({name: lambda call=call: step(call, *given) for name, call in (("ours", ours), ("eager", eager))}, repeats)
    with torch.no_grad():
        forward = interleaved({name: lambda call=call: call(*given[:5]) for name, call in (("ours", ours), ("eager", eager))}, repeats)
    batch, channels, s1, s2, m = size
    return {
        "op": "align", "B": batch, "C": channels, "S1": s1, "S2": s2, "M": m, "layout": layout, "gradients": wanted, "dtype": "float32",
        "error": mine, "eager_error": theirs, "apart": apart, "forward_backward": both, "forward": forward,
        "ratio": both["eager"]["median_s"] / both["ours"]["median_s"], "forward_ratio": forward["eager"]["median_s"] / forward["ours"]["median_s"],
    }  # fmt: skip


@pytest.mark.parametrize("wanted", WANTED)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("which", ["ours", "eager"])
def test_align(benchmark, which, size, layout, wanted):
    benchmark.extra_info["error"], benchmark.extra_info["eager_error"] = checked(*size, layout, wanted)
    benchmark.group = f"align {size} channels {layout} gradients {wanted} fwd+bwd"
    benchmark.pedantic(step, args=({"ours": ours, "eager": eager}[which], *inputs(*size, layout, wanted)), rounds=3, warmup_rounds=1)


HEADER = f"{'':66}{'ours ms':>9}{'eager ms':>10}{'ratio':>7}{'forward':>9}{'error':>10}{'eager':>9}"


def line(r):
    mine, theirs = (1e3 * r["forward_backward"][side]["median_s"] for side in ("ours", "eager"))
    spaces = " ".join(f"{name}={'x'.join(map(str, r[name]))}" for name in ("S1", "S2", "M"))
    name = f"B={r['B']} C={r['C']} {spaces} {r['layout']} {r['gradients']}"
    return f"{name:66}{mine:9.2f}{theirs:10.2f}{r['ratio']:7.1f}{r['forward_ratio']:9.1f}{r['error']:10.1e}{r['eager_error']:9.1e}"


def main():
    asked = harness.start(harness.parser(__doc__))
    every = ((size, layout, wanted) for size in SIZES for layout in LAYOUTS for wanted in WANTED)
    harness.tabulate(asked, HEADER, (measure(*given, asked.repeats) for given in every), line)


if __name__ == "__main__":
    main()
