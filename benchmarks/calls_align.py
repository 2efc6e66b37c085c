"""Calls of align whose Triton kernels `benchmarks.compiled` compiles."""

import torch

from pix2rep_kernels.layout import memory_format
from pix2rep_kernels.triton import align

CALLS = {
    "3D encoder": {"channels": 256, "dtype": torch.bfloat16, "space": (2, 6, 6)},
    "3D decoder": {"channels": 32, "space": (16, 16, 16), "need_2": True},
    "3D decoder, planes": {"channels": 32, "space": (16, 16, 16), "layout": "first", "need_2": True},
    "3D unequal, odd": {"channels": 100, "dtype": torch.float16, "space": (3, 5, 7), "space_2": (4, 8, 9), "size": (2, 3, 5), "need_2": True},
    "2D last": {"channels": 64, "need_2": True},
    "2D odd rows": {"channels": 17, "space": (5, 7), "size": (3, 5), "affine": (False, True), "need_2": True},
    "2D last, many channels, dense": {"channels": 600, "dtype": torch.bfloat16, "affine": (True, False)},
    "2D planes": {"channels": 64, "layout": "first", "dtype": torch.bfloat16, "affine": (False, False), "need_2": True},
    "2D nearest": {"channels": 33, "mode": "nearest", "padding_mode": "zeros", "align_corners": True, "need_2": True},
    "3D depth 1": {"channels": 16, "space": (1, 8, 8), "space_2": (4, 8, 1), "size": (1, 8, 8), "padding_mode": "zeros", "need_2": True},
    "2D column to row": {"channels": 33, "space": (8, 1), "size": (1, 8), "layout": "first", "need_2": True},
    "one of everything": {"batch": 1, "channels": 1, "space": (1, 1), "need_2": True},
    "one of everything, 3D": {"batch": 1, "channels": 1, "space": (1, 1, 1), "align_corners": True, "affine": (True, False), "need_2": True},
}  # fmt: skip


def call(
    channels, batch=2, space=(8, 8), space_2=None, size=None, dtype=torch.float32, layout="last", mode="linear", affine=(True, True),
    align_corners=False, padding_mode="border", need_2=False,
):  # fmt: skip
    """Forward, and backward by atomics and in order."""
    dims, size = len(space), list(size or space)
    maps = [torch.zeros(batch, channels, *s, dtype=dtype) for s in (space, space_2 or space)]
    if layout == "last":
        maps = [f.to(memory_format=memory_format(dims + 2)) for f in maps]
    grids = [torch.zeros(batch, dims, dims + 1) if is_affine else torch.zeros(batch, *size, dims) for is_affine in affine]
    options = (size, mode, align_corners, padding_mode)
    sums = align.forward(*maps, *grids, *options)[:3]
    for deterministic in (False, True):
        torch.use_deterministic_algorithms(deterministic)
        align.backward(*sums, *maps, *grids, *options, True, need_2, layout == "last", layout == "last")
    torch.use_deterministic_algorithms(False)
