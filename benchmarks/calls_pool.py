"""Calls of pool whose Triton kernels `benchmarks.compiled` compiles."""

import torch

from pix2rep_kernels.layout import memory_format
from pix2rep_kernels.triton import pool

CALLS = {
    "2D last": {"channels": 64, "space": (128, 128), "regions": 200},
    "2D first": {"channels": 64, "space": (128, 128), "regions": 200, "layout": "first"},
    "2D last, bfloat16": {"channels": 256, "dtype": torch.bfloat16, "space": (64, 64), "regions": 50, "labels": torch.int32},
    "2D first, float16": {"channels": 32, "dtype": torch.float16, "space": (224, 224), "layout": "first", "labels": torch.uint8},
    "3D last": {"channels": 32, "space": (16, 32, 32), "regions": 300},
    "3D first": {"channels": 32, "space": (16, 32, 32), "regions": 300, "layout": "first", "labels": torch.int16},
    "many channels, many regions": {"channels": 600, "space": (16, 16), "regions": 40000, "batch": 2},
    "odd": {"channels": 37, "space": (13, 17), "regions": 11, "batch": 3},
    "odd, first": {"channels": 37, "dtype": torch.bfloat16, "space": (13, 17), "regions": 11, "batch": 3, "layout": "first", "labels": torch.int8},
    "1D": {"channels": 16, "space": (4096,), "regions": 16, "layout": "first"},
    "3D depth 1": {"channels": 16, "space": (1, 8, 1)},
    "one of everything": {"batch": 1, "channels": 1, "space": (1, 1), "regions": 1},
    "one of everything, 3D": {"batch": 1, "channels": 1, "space": (1, 1, 1), "regions": 1, "layout": "first"},
}  # fmt: skip


def call(channels, batch=8, space=(8, 8), regions=100, dtype=torch.float32, layout="last", labels=torch.int64):
    """Forward and backward."""
    features = torch.zeros(batch, channels, *space, dtype=dtype)
    if layout == "last":
        features = features.to(memory_format=memory_format(features.ndim))
    where = torch.zeros(batch, *space, dtype=labels)
    means, counts = pool.forward(features, where, regions)
    pool.backward(means, counts, where, features, list(features.shape), layout == "last")
