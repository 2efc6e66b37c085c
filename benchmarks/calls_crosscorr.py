"""Calls of crosscorr whose Triton kernels `benchmarks.compiled` compiles."""

import torch

from pix2rep_kernels.triton import crosscorr

CALLS = {
    "256, bf16": {"d1": 256, "dtype": torch.bfloat16},
    "64, fp16": {"d1": 64, "dtype": torch.float16},
    "512, bf16, weights": {"d1": 512, "dtype": torch.bfloat16, "weighted": True},
    "256, tf32": {"d1": 256, "precision": "high"},
    "256, tf32x3": {"d1": 256, "weighted": True},
    "128, tf32": {"d1": 128, "precision": "high", "weighted": True},
    "100 and 36, bf16, planes": {"d1": 100, "d2": 36, "dtype": torch.bfloat16, "planes": True, "weighted": True},
    "3 and 500, mixed": {"n": 4097, "d1": 3, "d2": 500, "dtype": torch.float16, "dtype_y": torch.float32},
    "5 and 300, bf16, odd rows": {"n": 1001, "d1": 5, "d2": 300, "dtype": torch.bfloat16, "weighted": True},
    "500, tf32x3, planes": {"n": 1001, "d1": 500, "weighted": True, "planes": True},
    "200, fp16, odd rows": {"n": 1001, "d1": 200, "dtype": torch.float16},
    "257 and 129, tf32, planes": {"n": 1001, "d1": 257, "d2": 129, "precision": "high", "planes": True},
    "one of everything": {"n": 1, "d1": 1},
    "one of everything, fp16, weights": {"n": 1, "d1": 1, "dtype": torch.float16, "weighted": True},
}
LARGE = {name for name in CALLS if "one of everything" not in name}
MATRIX = {"crosscorr_gradients_kernel": LARGE, "crosscorr_moments_kernel": LARGE - {"3 and 500, mixed", "5 and 300, bf16, odd rows"}}


def call(d1, n=65_536, d2=None, dtype=torch.float32, dtype_y=None, weighted=False, planes=False, precision="highest"):
    """Forward, and backward to both views."""

    def view(d, dtype):
        return torch.empty(d, n, dtype=dtype).T if planes else torch.empty(n, d, dtype=dtype)

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        x, y = view(d1, dtype), view(d2 or d1, dtype_y or dtype)
        weight = torch.ones(n) if weighted else None
        _, pivot_x, pivot_y, *moments = crosscorr.forward(x, y, weight)
        crosscorr.backward(*moments, x, y, weight, pivot_x, pivot_y, True, True)
    finally:
        torch.set_float32_matmul_precision(before)
