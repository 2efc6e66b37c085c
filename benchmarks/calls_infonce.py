"""Calls of infonce whose Triton kernels `benchmarks.static` compiles; fields as `benchmarks/compiled.py` reads them."""

import torch

from pix2rep_kernels.triton import infonce

CALLS = {
    "joint, one of everything": {"negatives": "joint"},
    "cross, one of everything": {"negatives": "cross"},
    "forward, one of everything, queue": {"negatives": "forward", "queue": 1, "positive": True},
    "forward, queue": {"negatives": "forward", "n": 5, "d": 16, "queue": 1, "positive": True},
    "forward, fp16": {"negatives": "forward", "m": 5, "d": 16, "dtype": torch.float16},
    "cross, masks, ids": {"negatives": "cross", "n": 5, "m": 5, "d": 16, "positive": True, "masks": True, "ids": True},
    "joint, shifted, masks, ids, bf16": {"negatives": "joint", "n": 300, "m": 300, "d": 64, "floor": 0.01, "dtype": torch.bfloat16, "masks": True, "ids": True},
    "joint, online, tf32x3": {"negatives": "joint", "n": 5, "m": 5, "d": 64, "floor": 0.002, "precision": "tf32x3"},
    "cross, ieee, masks, ids": {"negatives": "cross", "n": 70, "m": 70, "d": 8, "masks": True, "ids": True, "precision": "ieee"},
    "joint, shifted, ieee": {"negatives": "joint", "n": 20, "m": 20, "d": 8, "floor": 0.01, "precision": "ieee"},
    "joint, wide": {"negatives": "joint", "n": 20, "m": 20, "d": 520, "dtype": torch.bfloat16},
    "forward, ieee, wide": {"negatives": "forward", "n": 20, "m": 20, "d": 520, "precision": "ieee"},
}
MATRIX = dict.fromkeys(("sums", "edges", "online", "products"), {name for name in CALLS if "ieee" not in name})


def call(negatives, n=1, m=1, d=1, queue=0, positive=False, masks=False, ids=False, floor=0.1, dtype=torch.float32, precision="fp16"):
    """Forward and backward of one group."""
    a, b = torch.zeros(1, n, d, dtype=dtype), torch.zeros(1, m, d, dtype=dtype)
    positive = torch.arange(n).clamp(max=m - 1).view(1, n) if positive else None
    valid = [torch.ones(1, count, dtype=torch.bool) if masks else None for count in (n, m)]
    ranks = [torch.zeros(1, count, dtype=torch.int64) if ids else None for count in (n, m)]
    queue = torch.zeros(queue, d, dtype=dtype) if queue else None
    arguments = (a, b, torch.tensor(0.1), floor, negatives, positive, *valid, *ranks, queue, precision)
    losses, lse = infonce.forward(*arguments)
    infonce.backward(torch.ones_like(losses), losses, lse, *arguments, True, True, True)
