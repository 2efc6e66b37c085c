"""joint against the eager compositions: `python -m benchmarks.run joint`.

Eager is softmax twice and, without a radius, one batched product; with one and collapsed, a box filter (`avg_pool`) and one product ("box"), or a pair of
shifted slices and an einsum a displacement ("slices"); uncollapsed the slices, or IIC's own way, conv2d of one map with the other as an image-sized filter.
At T = 10 the box filter stands alone: the others take 441 products.
"""

import itertools

import torch
import torch.nn.functional as F

from benchmarks.case import Case, Inputs, Peer, Work, seeded, with_compile
from benchmarks.micro import microbenchmark
from pix2rep_kernels.layout import memory_format
from pix2rep_kernels.ops import joint as _register  # noqa: F401

# B, K, S, radius, collapsed, layout. The boundary-aware paper's (ACDC: 18 slices of 224 x 224, K = 20, 40, 60), then IIC's radii, a volume.
SIZES = [
    (18, 40, (224, 224), 0, True, "first"),
    (18, 24, (128, 128), 1, True, "first"),
    (2, 10, (16, 96, 96), 0, True, "first"),
]
LARGE = [
    (18, 20, (224, 224), 0, True, "first"),
    (18, 60, (224, 224), 0, True, "first"),
    (18, 40, (224, 224), 0, True, "last"),
    (18, 24, (128, 128), 0, True, "first"),
    (18, 24, (128, 128), 1, True, "last"),
    (18, 24, (128, 128), 1, False, "first"),
    (18, 24, (128, 128), 10, True, "first"),
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


def peers(space, radius, collapsed):
    found = {"box": eager_box} if collapsed else {}
    if 0 < radius <= 2:
        found["slices"] = eager_slices
        if len(space) == 2:
            found["convolution"] = eager_convolution
    return with_compile({name: Peer(call) for name, call in found.items()})


def inputs(batch, clusters, space, radius, collapsed, layout, device, dtype):
    """Maps that want gradients, and an upstream gradient."""
    generator = seeded(device)
    maps = []
    for _ in range(2):
        m = torch.empty(batch, clusters, *space, device=device)
        m = m if layout == "first" else torch.empty_like(m, memory_format=memory_format(m.ndim))
        maps.append(m.normal_(generator=generator).to(dtype).requires_grad_())
    count = 1 if collapsed else (2 * radius + 1) ** len(space)
    return Inputs([*maps, radius, collapsed], (torch.randn(count, clusters, clusters, generator=generator, device=device).to(dtype),))


def case(batch, clusters, space, radius, collapsed, layout):
    size = (clusters, space, radius, collapsed, layout)
    pixels = batch * torch.Size(space).numel()
    maps = 2 * pixels * clusters * 4
    sums = 1 if collapsed else (2 * radius + 1) ** len(space)
    flop, exps = 2 * pixels * clusters**2 * sums, 2 * pixels * clusters
    edge = tuple(min(s, 48) for s in space) if len(space) == 2 else tuple(min(s, 16) for s in space)
    kind = "" if radius == 0 else " sum" if collapsed else " each"
    return Case(
        "joint", f"B={batch} K={clusters} S={'x'.join(map(str, space))} T={radius}{kind} {layout}", torch.float32,
        {"B": batch, "K": clusters, "S": space, "radius": radius, "collapsed": collapsed},
        make=lambda device, dtype: inputs(batch, *size, device, dtype), small=lambda device, dtype: inputs(1, clusters, edge, *size[2:], device, dtype),
        ours=lambda backend, a, b, radius, collapsed: torch.ops.pix2rep.joint(a, b, None, radius, collapsed, True, backend),
        peers=peers(space, radius, collapsed), work={"forward": Work(maps, flop, exps), "backward": Work(2 * maps, 2 * flop, exps)},
        layout=layout, paper=space == (224, 224),
    )  # fmt: skip


def cases(large=False, device="cpu"):
    return [case(*size) for size in [*SIZES, *(LARGE if large or device == "cuda" else [])]]


test_joint = microbenchmark(cases)
