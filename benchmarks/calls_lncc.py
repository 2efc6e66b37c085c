"""Calls of lncc whose Triton kernels `benchmarks.compiled` compiles."""

import torch

from pix2rep_kernels.triton import lncc

CALLS = {
    "2D window 5": {"batch": 18, "space": (224, 224)},
    "2D window 9": {"batch": 18, "space": (224, 224), "window": 9},
    "2D window 11": {"batch": 18, "space": (224, 224), "window": 11},
    "2D window 21": {"batch": 2, "space": (224, 224), "window": 21},
    "2D one gradient": {"batch": 18, "space": (224, 224), "needs": (True, False)},
    "2D odd": {"batch": 3, "channels": 3, "space": (33, 77), "dtype": torch.bfloat16, "needs": (False, True)},
    "3D window 5": {"batch": 2, "space": (64, 128, 128)},
    "3D window 9": {"batch": 8, "space": (16, 96, 96), "window": 9, "dtype": torch.float16},
    "3D depth 1": {"batch": 2, "space": (1, 24, 40), "window": 3},
    "3D column": {"batch": 2, "space": (20, 1, 1), "window": 7},
    "channels last": {"batch": 2, "channels": 16, "space": (32, 32), "last": True},
    "one of everything": {"space": (1, 1), "window": 1},
    "one of everything, 3D": {"space": (1, 1, 1), "window": 1},
}


def call(space, batch=1, channels=1, window=5, dtype=torch.float32, needs=(True, True), last=False):
    """Forward and backward."""
    i = torch.zeros(batch, channels, *space, dtype=dtype)
    if last:
        i = i.to(memory_format=torch.channels_last)
    j = torch.zeros_like(i)
    cc = lncc.forward(i, j, window, 1e-5)
    lncc.backward(torch.zeros((), dtype=torch.float32).expand_as(cc), i, j, window, 1e-5, *needs)
