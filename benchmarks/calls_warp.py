"""Calls of warp whose Triton kernels `benchmarks.static` compiles; fields as `benchmarks/compiled.py` reads them."""

import torch

from pix2rep_kernels.layout import memory_format
from pix2rep_kernels.triton import warp

CALLS = {
    "2D last": {"channels": 256, "dtype": torch.bfloat16, "points": 20},
    "2D first": {"channels": 64, "layout": "first", "normalize": False},
    "2D last, odd rows": {"channels": 33, "space": (5, 7), "dtype": torch.bfloat16},
    "2D last, odd rows, as they are": {"channels": 17, "space": (5, 7), "normalize": False},
    "2D bicubic, many channels": {"channels": 600, "dtype": torch.float16, "mode": "bicubic", "points": 20},
    "3D last": {"channels": 100, "dtype": torch.bfloat16, "space": (4, 8, 8), "points": 20},
    "3D first": {"channels": 100, "dtype": torch.bfloat16, "space": (4, 8, 8), "layout": "first", "points": 20},
    "2D nearest, dense": {"channels": 64, "mode": "nearest", "affine": False, "padding_mode": "border", "points": 20},
    "3D depth 1": {"channels": 16, "space": (1, 8, 8), "padding_mode": "border"},
    "3D to depth 1": {"channels": 16, "space": (4, 8, 8), "size": (1, 8, 8), "align_corners": False},
    "2D column to row": {"channels": 33, "space": (8, 1), "size": (1, 8)},
    "one of everything": {"batch": 1, "channels": 1, "space": (1, 1), "points": 1},
    "one of everything, 3D": {"batch": 1, "channels": 1, "space": (1, 1, 1), "align_corners": False},
}  # fmt: skip
WIDE = dict.fromkeys(
    ("warp_forward_kernel", "warp_backward_atomic_kernel", "warp_backward_records_kernel", "warp_backward_sum_kernel"),
    {name for name, options in CALLS.items() if options.get("layout") != "first" and options["channels"] % 64 == 0},
)
ONE_OFF = {"3D to depth 1", "2D column to row", "one of everything", "one of everything, 3D"}


def call(
    channels, batch=2, space=(8, 8), size=None, dtype=torch.float32, layout="last", mode="linear", affine=True, points=None, align_corners=True,
    padding_mode="zeros", normalize=True,
):  # fmt: skip
    """Forward, and backward by atomics and in order."""
    dims, size = len(space), list(size or space)
    features = torch.zeros(batch, channels, *space, dtype=dtype)
    if layout == "last":
        features = features.to(memory_format=memory_format(dims + 2))
    grid = torch.zeros(batch, dims, dims + 1) if affine else torch.zeros(batch, *size, dims)
    points = None if points is None else torch.zeros(points, dtype=torch.int64)
    where = (grid, size, points, mode, align_corners, padding_mode, normalize)
    rows, _, norms = warp.forward(features, *where)
    for deterministic in (False, True):
        torch.use_deterministic_algorithms(deterministic)
        warp.backward(torch.zeros_like(rows), rows, norms, *where, list(features.shape), layout == "last")
    torch.use_deterministic_algorithms(False)
