"""Calls of entropy whose Triton kernels `benchmarks.compiled` compiles."""

import torch

from pix2rep_kernels.layout import memory_format
from pix2rep_kernels.triton import entropy

CALLS = {
    "K=40": {"clusters": 40},
    "K=40, last": {"clusters": 40, "layout": "last"},
    "K=40, bf16, last, mask": {"clusters": 40, "dtype": torch.bfloat16, "layout": "last", "masked": True},
    "K=60, fp16, mask": {"clusters": 60, "dtype": torch.float16, "masked": True},
    "K=16, strided": {"clusters": 16, "layout": "strided"},
    "K=2": {"clusters": 2},
    "K=10, 3D": {"clusters": 10, "space": (4, 8, 9), "masked": True},
    "K=200, odd": {"clusters": 200, "space": (7, 11)},
    "K=5000": {"clusters": 5000, "space": (3, 5), "layout": "last"},
    "one of everything": {"clusters": 1, "batch": 1, "space": (1, 1)},
    "one of everything, 3D, mask": {"clusters": 1, "batch": 1, "space": (1, 1, 1), "masked": True},
}  # fmt: skip
WIDE = {kernel: {"K=40", "K=40, last", "K=40, bf16, last, mask"} for kernel in ("entropy_forward_kernel", "entropy_backward_kernel")}


def call(clusters, batch=2, space=(16, 32), dtype=torch.float32, layout="first", masked=False):
    """Forward and backward."""
    logits = torch.zeros(batch, clusters, *space, dtype=dtype)
    if layout == "last":
        logits = logits.to(memory_format=memory_format(logits.ndim))
    if layout == "strided":
        logits = logits.transpose(-1, -2).contiguous().transpose(-1, -2)
    mask = torch.ones(batch, *space, dtype=torch.bool) if masked else None
    entropy.backward(entropy.forward(logits, mask), logits, mask, layout == "last")
