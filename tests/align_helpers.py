"""Calls of align that its tests share: problems by name, PyTorch's composition, the comparison with float64."""

import torch
import torch.nn.functional as F

from pix2rep_kernels import align
from pix2rep_kernels.layout import memory_format
from pix2rep_kernels.testing import backends, error, poisoned, tolerance

FAST = [b for b in backends("align") if b != "triton" or torch.cuda.is_available()]  # interpreted kernels have a table of their own
EXACT = [b for b in FAST if b != "triton"]  # those that take float64
DEVICE = {b: "cuda" if b in ("triton", "cuda") and torch.cuda.is_available() else "cpu" for b in backends("align")}
SPACES = {2: ((5, 7), (8, 6), (4, 9)), 3: ((3, 4, 5), (2, 6, 3), (2, 5, 3))}  # S1, S2, M


def feature_map(batch, channels, space, layout="last", dtype=torch.float32):
    features = torch.randn(batch, channels, *space, dtype=torch.float64).to(dtype)
    if layout == "last":
        return features.to(memory_format=memory_format(features.ndim))
    if layout == "strided":  # channels are neither last nor in planes
        return features.transpose(-1, -2).contiguous().transpose(-1, -2)
    return features


def grid_of(batch, size, affine=True, dtype=torch.float32):
    """About a third of its points lie outside."""
    dims = len(size)
    if affine:
        return torch.eye(dims, dims + 1, dtype=dtype) + 0.3 * torch.randn(batch, dims, dims + 1, dtype=dtype)
    return torch.rand(batch, *size, dims, dtype=dtype) * 2.6 - 1.3


def problem(
    dims=2, channels=17, batch=2, layouts=("last", "last"), affine=(True, True), dtype=torch.float32, grid_dtypes=None, spaces=None, size=None, **options
):  # fmt: skip
    """f1, f2, grid1, grid2 and keyword arguments of one call."""
    spaces, size = spaces or SPACES[dims][:2], size or SPACES[dims][2]
    grid_dtypes = grid_dtypes or (torch.float64 if dtype == torch.float64 else torch.float32,) * 2
    maps = (feature_map(batch, channels, space, layout, dtype) for space, layout in zip(spaces, layouts, strict=True))
    grids = (grid_of(batch, size, kind, grid_dtype) for kind, grid_dtype in zip(affine, grid_dtypes, strict=True))
    return (*maps, *grids), {"size": size, **options}


def pytorch(f1, f2, grid1, grid2, *, size, mode="linear", align_corners=False, padding_mode="border"):
    """The composition that align replaces, in the precision of each grid."""
    rows = []
    for f, grid in ((f1, grid1), (f2, grid2)):
        if grid.ndim == 3:
            grid = F.affine_grid(grid, (len(grid), 1, *size), align_corners=align_corners)
        warped = F.grid_sample(
            f.to(grid.dtype), grid, mode={"linear": "bilinear"}.get(mode, mode), padding_mode=padding_mode, align_corners=align_corners
        )  # fmt: skip
        rows.append(warped.to(torch.float64 if f.dtype == torch.float64 else torch.float32))
    q, z = rows
    return (q * z).sum(1), (q * q).sum(1), (z * z).sum(1)


def ours(backend):
    def run(*tensors, **options):
        return tuple(t.cpu() for t in align(*(t.to(DEVICE[backend]) for t in tensors), backend=backend, **options)[:3])

    return run


def both(function, tensors, upstream, wanted=(0, 1), through=(0, 1, 2), **options):
    """dot, sq1, sq2 and the gradients of the wanted maps, upstream gradients flowing through some of the three results."""
    tensors = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(tensors)]
    results = function(*tensors, **options)
    flowing = [(results[i], upstream[i].to(results[i].dtype)) for i in through if results[i].requires_grad]
    results_of, upstream_of = zip(*flowing, strict=True)
    grads = torch.autograd.grad(results_of, [tensors[i] for i in wanted], upstream_of, allow_unused=True)
    return *(t.detach() for t in results), *(torch.zeros_like(tensors[i]) if g is None else g for i, g in zip(wanted, grads, strict=True))


def compare(backend, tensors, sorted_sums=True, wanted=(0, 1), through=(0, 1, 2), **options):
    """Results and gradients no further from float64 than twice PyTorch's own at the same precision; memory is poisoned unless atomics are asked for.

    In float64 PyTorch is the truth; its own error is then that of a coordinate, two roundings of up to a half of the largest axis either way, and twice
    that for a product of two rows.
    """
    upstream = [torch.randn(len(tensors[0]), *options["size"], dtype=torch.float64).to(torch.float32).double() for _ in range(3)]
    flow = {"wanted": wanted, "through": through}
    truth = both(pytorch, [t.double() for t in tensors], upstream, **flow, **options)
    eager = both(pytorch, tensors, upstream, **flow, **options)
    if sorted_sums:
        with poisoned():
            got = both(ours(backend), tensors, upstream, **flow, **options)
    else:
        got = both(ours(backend), tensors, upstream, **flow, **options)
    coordinate = 4 * max(*tensors[0].shape[2:], *tensors[1].shape[2:]) * torch.finfo(torch.float64).eps
    dtypes = [torch.float64 if tensors[0].dtype == torch.float64 else torch.float32] * 3 + [tensors[0].dtype] * len(wanted)
    for g, e, t, dtype in zip(got, eager, truth, dtypes, strict=True):
        assert g.dtype == dtype and g.shape == t.shape
        own = max(error([e], [t]), coordinate)
        assert error([g], [t]) <= tolerance(own, dtype), (backend, dtype, error([g], [t]), own, options)


def affine(scale, shift, batch=1):
    """Diagonal matrices [batch, d, d + 1], x first."""
    theta = torch.zeros(batch, len(scale), len(scale) + 1, dtype=torch.float64)
    theta[:, range(len(scale)), range(len(scale))] = torch.tensor(scale, dtype=torch.float64)
    theta[:, :, -1] = torch.tensor(shift, dtype=torch.float64)
    return theta
