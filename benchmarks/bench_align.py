"""align against the eager composition that it replaces: `python -m benchmarks.run align`.

Eager is two F.affine_grid and F.grid_sample, three products and sums, and autograd; it has no `valid`.
"""

import torch
import torch.nn.functional as F

from benchmarks.case import Case, Inputs, Peer, Work, seeded, with_compile
from benchmarks.micro import microbenchmark
from pix2rep_kernels import align
from pix2rep_kernels.layout import memory_format

# B, C, S1, S2, M. The first two are PGL's encoder maps (its batches), the third a decoder's; then a slice, unequal maps, few points of a large map, few
# channels.
SIZES = [(20, 256, (2, 6, 6), (2, 6, 6), (2, 6, 6)), (2, 32, (16, 96, 96), (16, 96, 96), (16, 96, 96))]
LARGE = [
    (128, 256, (2, 6, 6), (2, 6, 6), (2, 6, 6)),
    (8, 64, (64, 64), (64, 64), (64, 64)),
    (4, 64, (16, 24, 24), (12, 32, 32), (12, 24, 24)),
    (2, 32, (16, 96, 96), (16, 96, 96), (4, 24, 24)),
    (8, 4, (128, 128), (128, 128), (128, 128)),
]
WANTED = ("f1", "both")  # which maps want a gradient; targets are detached as a rule


def eager(f1, f2, theta1, theta2, size):
    q, z = (
        F.grid_sample(f, F.affine_grid(theta, (len(f1), 1, *size), align_corners=False), padding_mode="border", align_corners=False)
        for f, theta in ((f1, theta1), (f2, theta2))
    )
    return (q * z).sum(1), (q * q).sum(1), (z * z).sum(1)


def inputs(batch, channels, s1, s2, size, layout, wanted, device, dtype):
    """Maps, affine grids of crops and flips, the common size, upstream gradients."""
    generator = seeded(device)
    dims = len(s1)
    maps, thetas = [], []
    for space, wants in ((s1, True), (s2, wanted == "both")):
        features = torch.randn(batch, channels, *space, generator=generator, device=device)
        if layout == "last":
            features = features.contiguous(memory_format=memory_format(dims + 2))
        maps.append(features.to(dtype).requires_grad_(wants))
        theta = torch.zeros(batch, dims, dims + 1, device=device)
        scale = 0.6 + 0.3 * torch.rand(batch, dims, generator=generator, device=device)
        theta[:, range(dims), range(dims)] = scale * torch.randn(batch, dims, generator=generator, device=device).sign()
        theta[:, :, -1] = 0.1 * torch.randn(batch, dims, generator=generator, device=device)
        thetas.append(theta.to(dtype))
    upstream = tuple(torch.randn(batch, *size, generator=generator, device=device).to(dtype) for _ in range(3))
    return Inputs([*maps, *thetas, size], upstream)


def case(batch, channels, s1, s2, size, layout, wanted):
    rest = (channels, s1, s2, size, layout, wanted)
    edges = [tuple(min(s, 24 if len(size) == 2 else 12) for s in space) for space in (s1, s2, size)]
    points = batch * torch.Size(size).numel()
    maps = [batch * channels * torch.Size(s).numel() * 4 for s in (s1, s2)]
    read = sum(min(m, 2 ** len(size) * points * channels * 4) for m in maps)
    spaces = " ".join(f"{name}={'x'.join(map(str, s))}" for name, s in (("S1", s1), ("S2", s2), ("M", size)))
    spaces = spaces if not s1 == s2 == size else f"S={'x'.join(map(str, size))}"
    return Case(
        "align", f"B={batch} C={channels} {spaces} {layout} {wanted}", torch.float32,
        {"B": batch, "C": channels, "S1": s1, "S2": s2, "M": size, "gradients": wanted},
        make=lambda device, dtype: inputs(batch, *rest, device, dtype), small=lambda device, dtype: inputs(1, channels, *edges, layout, wanted, device, dtype),
        ours=lambda backend, f1, f2, t1, t2, size: align(f1, f2, t1, t2, size=size, backend=backend)[:3],
        peers=with_compile({"eager": Peer(eager)}),
        work={"forward": Work(read + 12 * points), "backward": Work(read + 12 * points + (sum(maps) if wanted == "both" else maps[0]))},
        layout=layout, paper=len(s1) == 3 and s1 == s2 == size,
    )  # fmt: skip


def cases(large=False, device="cpu"):
    if large or device == "cuda":
        return [case(*size, layout, wanted) for size in [*SIZES, *LARGE] for layout in ("last", "first") for wanted in WANTED]
    return [case(*SIZES[0], "last", "f1"), *(case(*SIZES[1], layout, "both") for layout in ("last", "first"))]


test_align = microbenchmark(cases)
