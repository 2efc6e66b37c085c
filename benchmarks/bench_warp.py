"""warp with L2 normalisation against the eager compositions that it replaces: `python -m benchmarks.run warp`.

Eager is F.affine_grid, F.grid_sample of the whole map, permute, index and F.normalize; "points alone" samples each image at its own points only, which is
the better way where they are few. Sizes: Pix2Rep's, then 1, 3, 10 and 100 % of the points of one map, and a volume; both layouts.
"""

import torch
import torch.nn.functional as F

from benchmarks.case import Case, Inputs, Peer, Work, seeded, with_compile
from benchmarks.micro import microbenchmark
from pix2rep_kernels import warp
from pix2rep_kernels.layout import memory_format

# B, C, S, points (None: all)
SIZES = [(8, 256, (128, 128), 1000), (8, 64, (64, 64), None)]
DENSITIES = [(8, 64, (128, 128), 8 * 128 * 128 * percent // 100 if percent < 100 else None) for percent in (1, 3, 10, 100)]
LARGE = [*DENSITIES, (8, 256, (64, 64), None), (8, 16, (128, 128), None), (1, 64, (128, 128), None), (2, 32, (16, 32, 32), None)]
CUDA = [(8, 128, (128, 128), 65_536), (8, 256, (128, 128), 1000), (8, 256, (128, 128), None)]
CUDA_LARGE = [(48, 256, (128, 128), None), *((48, 256, (128, 128), 48 * 128 * 128 * percent // 100) for percent in (1, 3, 10)), (2, 32, (64, 128, 128), None)]


def sampled(features, grid):
    """[B, P.., C]; half precision goes through float32, as autocast sends it: a grid in bfloat16 misses its pixels."""
    features = features.float() if features.dtype.itemsize == 2 else features
    return F.grid_sample(features, grid.to(features.dtype), align_corners=True).movedim(1, -1)


def eager(features, theta, points):
    grid = F.affine_grid(theta, (len(features), 1, *features.shape[2:]), align_corners=True)
    rows = sampled(features, grid).flatten(0, -2)
    return F.normalize(rows if points is None else rows[points]).to(features.dtype)


def points_alone(features, theta, points):
    """Each image at its own points; the rows go back into the order in which the points were given."""
    space = features.shape[2:]
    grid = F.affine_grid(theta, (len(features), 1, *space), align_corners=True).flatten(1, -2)
    order = points.argsort()
    counts = torch.bincount(points // space.numel(), minlength=len(features)).tolist()
    parts = []
    for image, at, own in zip(features.split(1), grid, (points[order] % space.numel()).split(counts), strict=True):  # one gradient map, not one an image
        where = at[own].view(1, *(1,) * (len(space) - 1), -1, len(space))
        parts.append(sampled(image, where).flatten(0, -2))
    return F.normalize(torch.cat(parts)[order.argsort()]).to(features.dtype)


def inputs(batch, channels, space, points, layout, device, dtype):
    """Features that want a gradient, affine grids near the identity, points without repeats, an upstream gradient."""
    generator = seeded(device)
    dims, pixels = len(space), batch * torch.Size(space).numel()
    features = torch.randn(batch, channels, *space, generator=generator, device=device)
    theta = torch.eye(dims, dims + 1, device=device) + 0.1 * torch.randn(batch, dims, dims + 1, generator=generator, device=device)
    drawn = None if points is None else torch.randperm(pixels, generator=generator, device=device)[:points]
    upstream = torch.randn(pixels if points is None else points, channels, generator=generator, device=device)
    if layout == "last":
        features = features.contiguous(memory_format=memory_format(dims + 2))
    return Inputs([features.to(dtype).requires_grad_(), theta, drawn], (upstream.to(dtype),))


def case(batch, channels, space, points, layout, device, dtype):
    pixels = batch * torch.Size(space).numel()
    whole, rows = (count * channels * dtype.itemsize for count in (pixels, pixels if points is None else points))
    found = {"eager": Peer(eager)}
    if points is not None:
        found["points alone"] = Peer(points_alone)
    edge = tuple(min(s, 32) for s in space)
    few = None if points is None else max(1, points * torch.Size(edge).numel() // pixels)
    share = "all" if points is None else points
    return Case(
        "warp", f"B={batch} C={channels} S={'x'.join(map(str, space))} P={share} {layout}", dtype,
        {"B": batch, "C": channels, "S": space, "points": points, "percent": 100 if points is None else round(100 * points / pixels, 2)},
        make=lambda device, dtype: inputs(batch, channels, space, points, layout, device, dtype),
        small=lambda device, dtype: inputs(1, channels, edge, few, layout, device, dtype),
        ours=lambda backend, f, theta, p: warp(f, theta, points=p, normalize=True, backend=backend)[0],
        peers=with_compile(found),
        work={"forward": Work(min(whole, 2 ** len(space) * rows) + rows), "backward": Work(2 * rows + whole)}, layout=layout, paper=points == 1000,
        target="2x floor, 4x eager" if device == "cuda" and layout == "last" else "",
    )  # fmt: skip


def cases(large=False, device="cpu"):
    default, more = (CUDA, CUDA_LARGE) if device == "cuda" else (SIZES, LARGE)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    sizes = dict.fromkeys([*default, *(more if large else [])])
    return [case(*size, layout, device, dtype) for size in sizes for layout in ("last", "first")]


test_warp = microbenchmark(cases)
