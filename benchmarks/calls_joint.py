"""Calls of joint whose Triton kernels `benchmarks.compiled` compiles."""

import torch

from pix2rep_kernels.layout import memory_format
from pix2rep_kernels.triton import joint

CALLS = {
    "K=40, fp32": {"clusters": 40},
    "K=40, fp16": {"clusters": 40, "dtype": torch.float16, "masked": True},
    "K=40, bf16, last": {"clusters": 40, "dtype": torch.bfloat16, "layout": "last"},
    "K=128, fp32, tf32": {"clusters": 128, "precision": "high"},
    "K=128, fp32": {"clusters": 128},
    "K=128, bf16": {"clusters": 128, "dtype": torch.bfloat16},
    "K=16, fp32, strided": {"clusters": 16, "layout": "strided"},
    "K=3, last, odd": {"clusters": 3, "layout": "last", "space": (7, 11)},
    "K=24, radius 1": {"clusters": 24, "radius": 1},
    "K=24, radius 10, mask": {"clusters": 24, "radius": 10, "masked": True, "dtype": torch.bfloat16},
    "K=24, radius 1, each": {"clusters": 24, "radius": 1, "collapsed": False, "masked": True},
    "K=60, radius 2, each, fp16": {"clusters": 60, "radius": 2, "collapsed": False, "dtype": torch.float16},
    "K=10, 3D": {"clusters": 10, "space": (4, 8, 9), "masked": True},
    "K=10, 3D, radius 1, each": {"clusters": 10, "space": (4, 8, 9), "radius": 1, "collapsed": False},
    "K=128, radius 1, each": {"clusters": 128, "radius": 1, "collapsed": False},
    "K=33, probabilities": {"clusters": 33, "logits": False, "space": (7, 11)},
    "K=33, odd": {"clusters": 33, "space": (7, 11)},
    "K=128, odd": {"clusters": 127, "space": (7, 11), "masked": True},
    "K=128, probabilities": {"clusters": 127, "logits": False, "space": (7, 11)},
    "one of everything": {"clusters": 1, "batch": 1, "space": (1, 1)},
    "one of everything, 3D, mask, radius 1": {"clusters": 1, "batch": 1, "space": (1, 1, 1), "radius": 1, "collapsed": False, "masked": True},
}  # fmt: skip
MATRIX = {
    "joint_sums": {name for name in CALLS if name.startswith(("K=33", "K=40", "K=60", "K=128"))},
    "joint_gradients": {"K=40, fp32", "K=40, fp16", "K=40, bf16, last", "K=128, fp32", "K=128, fp32, tf32", "K=128, bf16", "K=33, odd"},
    "joint_side": {"K=60, radius 2, each, fp16", "K=128, radius 1, each"},
}


def call(
    clusters, batch=2, space=(16, 32), dtype=torch.float32, layout="first", radius=0, collapsed=True, masked=False, logits=True, precision="highest"
):  # fmt: skip
    """Forward, and backward of both maps."""
    a = torch.zeros(batch, clusters, *space, dtype=dtype)
    if layout == "last":
        a = a.to(memory_format=memory_format(a.ndim))
    if layout == "strided":
        a = a.transpose(-1, -2).contiguous().transpose(-1, -2)
    mask = torch.ones(batch, *space, dtype=torch.bool) if masked else None
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        sums = joint.forward(a, a, mask, radius, collapsed, logits)
        joint.backward(sums, a, a, mask, radius, collapsed, logits, True, True, layout == "last", layout == "last")
    finally:
        torch.set_float32_matmul_precision(before)
