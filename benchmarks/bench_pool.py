"""pool against the eager compositions that it replaces: `python -m benchmarks.run pool`.

Eager is four ways with autograd: scatter_add of rows, scatter_add of planes, index_add of rows with bincount, and a product with a one-hot matrix.
"""

import torch

from benchmarks.case import Case, Inputs, Peer, Work, seeded, with_compile
from benchmarks.micro import microbenchmark
from pix2rep_kernels import pool
from pix2rep_kernels.layout import memory_format

# B, C, S, regions, what the labels are. Superpixels as in Localized Region Contrast, at several resolutions; a volume; the extremes of locality; small.
SIZES = [(8, 64, (128, 128), 200, "superpixels")]
LARGE = [
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
    slot = (slot + regions * torch.arange(batch, device=slot.device).unsqueeze(1)).flatten()
    sums = rows.new_zeros(batch * regions, channels).index_add(0, slot, rows.reshape(-1, channels))
    counts = torch.bincount(slot, minlength=batch * regions)
    return (sums / counts.clamp(min=1).unsqueeze(1)).view(batch, regions, channels)


def one_hot(features, labels, regions):
    rows, slot = _flat(features, labels)
    hot = rows.new_zeros(len(rows), regions, rows.shape[1]).scatter_(1, slot.unsqueeze(1), 1)
    return hot @ rows / hot.sum(2, keepdim=True).clamp(min=1)


EAGER = {"scatter rows": scatter_rows, "scatter planes": scatter_planes, "index rows": index_rows, "one-hot": one_hot}


def superpixels(batch, space, regions, generator, device):
    """Cells of seeds thrown at random: compact, of about equal size, numbered along the image."""
    seeds = torch.stack([torch.rand(batch, regions, generator=generator, device=device) * size for size in space], 2)
    seeds = torch.stack([s[s[:, 0].argsort()] for s in seeds])
    places = torch.stack(torch.meshgrid(*(torch.arange(size, dtype=torch.float32, device=device) for size in space), indexing="ij"), -1).flatten(0, -2)
    return torch.stack([torch.cat([torch.cdist(p, s).argmin(1) for p in places.split(8192)]) for s in seeds]).view(batch, *space)


def inputs(batch, channels, space, regions, kind, layout, device, dtype):
    """Features that want a gradient, int64 labels of which each has a region, an upstream gradient."""
    generator = seeded(device)
    features = torch.randn(batch, channels, *space, generator=generator, device=device)
    if layout == "last":
        features = features.contiguous(memory_format=memory_format(features.ndim))
    if kind == "random":
        labels = torch.randint(regions, (batch, *space), generator=generator, device=device)
    else:
        labels = superpixels(batch, space, regions, generator, device)
    if kind == "background":  # one region outside a disc
        middle = torch.stack(torch.meshgrid(*(torch.linspace(-1, 1, size, device=device) for size in space), indexing="ij")).square().sum(0) < 0.2
        labels = torch.where(middle, labels, 0)
    upstream = torch.randn(batch, regions, channels, generator=generator, device=device)
    return Inputs([features.to(dtype).requires_grad_(), labels, regions], (upstream.to(dtype),))


def case(batch, channels, space, regions, kind, layout, dtype):
    rest = (channels, space, regions, kind, layout)
    edge = tuple(min(s, 48 if len(space) == 2 else 16) for s in space)
    moved = batch * channels * torch.Size(space).numel() * dtype.itemsize
    hot = 4.0 * batch * torch.Size(space).numel() * regions * 2
    found = {name: Peer(call, bytes=hot if call is one_hot else 0.0) for name, call in EAGER.items()}
    return Case(
        "pool", f"B={batch} C={channels} S={'x'.join(map(str, space))} R={regions} {kind} {layout}", dtype,
        {"B": batch, "C": channels, "S": space, "R": regions, "labels": kind},
        make=lambda device, dtype: inputs(batch, *rest, device, dtype),
        small=lambda device, dtype: inputs(min(batch, 2), channels, edge, *rest[2:], device, dtype),
        ours=lambda backend, features, labels, regions: pool(features, labels, regions=regions, backend=backend)[0],
        peers=with_compile(found), work={"forward": Work(moved), "backward": Work(moved)}, layout=layout, paper=kind == "superpixels" and len(space) == 2,
    )  # fmt: skip


def cases(large=False, device="cpu"):
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    sizes = [*SIZES, *(LARGE if large or device == "cuda" else [])]
    return [case(*size, layout, dtype) for size in sizes for layout in ("last", "first")]


test_pool = microbenchmark(cases)
