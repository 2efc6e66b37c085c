"""lncc against the eager compositions that it replaces: `python -m benchmarks.run lncc`.

Eager is five box sums, products, clamps and autograd; the box sums are one F.conv with ones, one F.avg_pool, or one axis after the other by either.
"""

import torch
import torch.nn.functional as F

from benchmarks.case import Case, Inputs, Peer, Work, seeded, with_compile
from benchmarks.micro import microbenchmark
from pix2rep_kernels import lncc

# B, C, S, window, gradients. The boundary term's maps, both ways of registration volumes, one small map.
SIZES = [(18, 1, (224, 224), 5, 2), (2, 1, (64, 128, 128), 5, 2)]
LARGE = [
    (18, 1, (224, 224), 5, 1), (18, 1, (224, 224), 9, 2), (18, 1, (224, 224), 9, 1), (2, 1, (64, 128, 128), 5, 1), (8, 1, (16, 96, 96), 9, 2),
    (8, 1, (16, 96, 96), 9, 1), (1, 1, (64, 64), 5, 2), (1, 1, (64, 64), 5, 1),
]  # fmt: skip
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


BOXES = {"conv": convolved, "pool": pooled, "pool by axis": by_axis(pooled_axis), "conv by axis": by_axis(convolved_axis)}


def eager(box):
    def run(i, j, window):
        n = window ** (i.ndim - 2)
        s_i, s_j, s_ii, s_jj, s_ij = box(torch.cat((i, j, i * i, j * j, i * j)), window).chunk(5)
        c, v, w = ((s - a * b / n).clamp(min=EPS) for s, a, b in ((s_ij, s_i, s_j), (s_ii, s_i, s_i), (s_jj, s_j, s_j)))
        return (c * c / (v * w)).mean()

    return run


def inputs(batch, channels, space, window, gradients, device, dtype):
    """Two maps in [0, 1] that correlate in places."""
    generator = seeded(device)
    i, noise, mix = (torch.rand(batch, channels, *space, generator=generator, device=device) for _ in range(3))
    j = mix * i + (1 - mix) * noise
    return Inputs([i.to(dtype).requires_grad_(), j.to(dtype).requires_grad_(gradients == 2), window])


def case(batch, channels, space, window, gradients):
    size = (window, gradients)
    one = batch * channels * torch.Size(space).numel() * 4
    small = tuple(min(s, 64 if len(space) == 2 else 16) for s in space)
    return Case(
        "lncc", f"B={batch} S={'x'.join(map(str, space))} window {window} {'di dj' if gradients == 2 else 'di'}", torch.float32,
        {"B": batch, "C": channels, "S": space, "window": window, "gradients": gradients},
        make=lambda device, dtype: inputs(batch, channels, space, *size, device, dtype),
        small=lambda device, dtype: inputs(1, channels, small, *size, device, dtype),
        ours=lambda backend, i, j, window: lncc(i, j, window=window, eps=EPS, backend=backend).mean(),
        peers=with_compile({name: Peer(eager(box)) for name, box in BOXES.items()}),
        work={"forward": Work(3 * one), "backward": Work((3 + gradients) * one)}, paper=space == (224, 224) and window == 5,
    )  # fmt: skip


def cases(large=False, device="cpu"):
    return [case(*size) for size in [*SIZES, *(LARGE if large or device == "cuda" else [])]]


test_lncc = microbenchmark(cases)
