"""Calls of warp that its tests share: problems by name, PyTorch's composition, the comparison with float64."""

import math

import torch
import torch.nn.functional as F

from pix2rep_kernels import warp
from pix2rep_kernels.layout import memory_format
from pix2rep_kernels.testing import backends, error, poisoned, tolerance

FAST = [b for b in backends("warp") if b != "triton" or torch.cuda.is_available()]  # interpreted kernels have a table of their own
GPU = ("triton", "cuda")  # no float64, and no check of values
DEVICE = {b: "cuda" if b in ("triton", "cuda") and torch.cuda.is_available() else "cpu" for b in backends("warp")}
SPACES = {2: ((5, 7), (4, 9)), 3: ((3, 4, 5), (2, 5, 3))}  # S, S_out
MODES = (("linear", 2), ("nearest", 2), ("bicubic", 2), ("linear", 3), ("nearest", 3))


def problem(dims=2, channels=17, batch=2, layout="last", affine=True, points=None, dtype=torch.float32, grid_dtype=torch.float32, **options):
    """Features, grid and keyword arguments of one call; about a third of the points lie outside."""
    space, size = options.pop("space", SPACES[dims][0]), options.pop("size", SPACES[dims][1])
    features = torch.randn(batch, channels, *space, dtype=torch.float64).to(dtype)
    if layout == "last":
        features = features.to(memory_format=memory_format(dims + 2))
    if layout == "strided":  # channels are neither last nor in planes
        features = features.transpose(-1, -2).contiguous().transpose(-1, -2)
    if affine:
        grid = torch.eye(dims, dims + 1, dtype=grid_dtype) + 0.3 * torch.randn(batch, dims, dims + 1, dtype=grid_dtype)
        options["size"] = size
    else:
        grid = torch.rand(batch, *size, dims, dtype=grid_dtype) * 2.6 - 1.3
    if points is not None:
        options["points"] = torch.randint(batch * math.prod(size), (points,))
    return features, grid, options


def pytorch(features, grid, *, size=None, points=None, mode="linear", align_corners=True, padding_mode="zeros", normalize=False):
    """The composition that warp replaces, in the grid's precision."""
    if grid.ndim == 3:
        grid = F.affine_grid(grid, (len(grid), 1, *(size or features.shape[2:])), align_corners=align_corners)
    mode = {"linear": "bilinear"}.get(mode, mode)
    warped = F.grid_sample(features.to(grid.dtype), grid, mode=mode, padding_mode=padding_mode, align_corners=align_corners)
    rows = warped.movedim(1, -1).flatten(0, -2)
    rows = rows if points is None else rows[points]
    return (F.normalize(rows) if normalize else rows).to(features.dtype)


def ours(backend):
    def run(features, grid, *, points=None, **options):
        device = DEVICE[backend]
        points = None if points is None else points.to(device)
        return warp(features.to(device), grid.to(device), points=points, backend=backend, **options)[0].cpu()

    return run


def both(function, features, grid, upstream, **options):
    """rows and the gradient of the features."""
    features = features.detach().requires_grad_()
    rows = function(features, grid, **options)
    rows.backward(upstream.to(rows.dtype))
    return rows.detach(), features.grad


def compare(backend, features, grid, sorted_sums=True, **options):
    """Rows and gradient no further from float64 than twice PyTorch's own at the same precision; memory is poisoned unless atomics are asked for.

    In float64 PyTorch is the truth; its own error is then that of a coordinate, two roundings of up to a half of the largest axis either way.
    """
    count = len(features) * math.prod(options.get("size") or grid.shape[1:-1]) if options.get("points") is None else len(options["points"])
    upstream = torch.randn(count, features.shape[1], dtype=torch.float64)
    truth = both(pytorch, features.double(), grid.double(), upstream.to(features.dtype), **options)
    eager = both(pytorch, features, grid, upstream, **options)
    if sorted_sums:
        with poisoned():
            got = both(ours(backend), features, grid, upstream, **options)
    else:
        got = both(ours(backend), features, grid, upstream, **options)
    coordinate = 2 * max(features.shape[2:]) * torch.finfo(torch.float64).eps
    for g, e, t in zip(got, eager, truth, strict=True):
        assert g.dtype == features.dtype and g.shape == t.shape
        own = max(error([e], [t]), coordinate)
        assert error([g], [t]) <= tolerance(own, g.dtype), (backend, features.dtype, options)
