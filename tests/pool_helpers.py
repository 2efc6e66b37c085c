"""Calls of pool that its tests share: problems by name, PyTorch's composition, the comparison with float64."""

import math

import torch

from pix2rep_kernels import pool
from pix2rep_kernels.layout import memory_format
from pix2rep_kernels.testing import backends, error, poisoned, tolerance

FAST = [b for b in backends("pool") if b != "triton" or torch.cuda.is_available()]  # interpreted kernels have a table of their own
EVERY = backends("pool")
DEVICE = {b: "cuda" if b in ("triton", "cuda") and torch.cuda.is_available() else "cpu" for b in EVERY}
SPACES = {1: (37,), 2: (5, 7), 3: (3, 4, 5)}
LABELS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def problem(dims=2, channels=17, batch=2, regions=4, layout="last", dtype=torch.float32, labels=torch.int64, space=None, runs=3):
    """Features, labels in runs of up to about `runs` pixels, some of no region, and the number of regions, of which some are empty."""
    space = space or SPACES[dims]
    features = torch.randn(batch, channels, *space, dtype=torch.float64).to(dtype)
    if layout == "last" and len(space) > 1:
        features = features.to(memory_format=memory_format(len(space) + 2))
    if layout == "strided":  # channels are neither last nor in planes
        features = features.repeat_interleave(2, -1)[..., ::2]
    pixels = math.prod(space)
    drawn = torch.randint(-1, regions + 2, (batch, pixels))
    where = drawn.gather(1, torch.arange(pixels).floor_divide(runs).expand(batch, -1)).view(batch, *space)
    if regions > 2:
        where = torch.where(where == 1, 0, where)
    return features, where.to(labels), regions


def pytorch(features, labels, regions):
    """The composition that pool replaces, in float32 at least."""
    batch, channels = features.shape[:2]
    slot = labels.flatten(1).long()
    slot = torch.where((slot >= 0) & (slot < regions), slot, regions)
    rows = features.flatten(2).transpose(1, 2).to(torch.promote_types(features.dtype, torch.float32))
    sums = rows.new_zeros(batch, regions + 1, channels).scatter_add(1, slot.unsqueeze(2).expand(-1, -1, channels), rows)
    counts = slot.new_zeros(batch, regions + 1).scatter_add(1, slot, torch.ones_like(slot))
    return (sums / counts.clamp(min=1).unsqueeze(2))[:, :regions], counts[:, :regions]


def ours(backend):
    def run(features, labels, regions):
        device = DEVICE[backend]
        return tuple(out.cpu() for out in pool(features.to(device), labels.to(device), regions=regions, backend=backend))

    return run


def both(function, features, labels, regions, upstream):
    """means, counts and the gradient of the features."""
    features = features.detach().requires_grad_()
    means, counts = function(features, labels, regions)
    (grad,) = torch.autograd.grad(means, features, upstream.to(means.dtype))
    return means.detach(), counts, grad


def none_of(labels, regions):
    """[B, 1, *S]: pixels of no region."""
    labels = labels.long()
    return ((labels < 0) | (labels >= regions)).unsqueeze(1)


def compare(backend, features, labels, regions):
    """Means and gradient no further from float64 than twice PyTorch's own at the same precision, counts exact; memory is poisoned.

    In float64 PyTorch is the truth; its own error is then that of a sum of as many terms as the largest region has, one rounding each.
    """
    upstream = torch.randn(len(features), regions, features.shape[1], dtype=torch.float64)
    narrow = upstream.to(torch.promote_types(features.dtype, torch.float32))
    truth = both(pytorch, features.double(), labels, regions, narrow)
    eager = both(pytorch, features, labels, regions, narrow)
    with poisoned():
        got = both(ours(backend), features, labels, regions, narrow)
    assert got[0].dtype == narrow.dtype and got[2].dtype == features.dtype
    assert got[1].dtype == torch.int64 and torch.equal(got[1], truth[1])
    for g, e, t in zip((got[0], got[2]), (eager[0], eager[2]), (truth[0], truth[2]), strict=True):
        own = error([e], [t])
        if features.dtype == torch.float64:
            own = max(own, max(truth[1].flatten().tolist(), default=0) * torch.finfo(torch.float64).eps)
        assert g.shape == t.shape
        assert error([g], [t]) <= tolerance(own, g.dtype), (backend, features.dtype, labels.dtype, regions)
    assert got[2][none_of(labels, regions).expand_as(got[2])].count_nonzero() == 0
