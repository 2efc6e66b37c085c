"""Where no GPU is visible Triton kernels run interpreted, which must be decided before triton is imported."""

import os
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)  # small problems: threads cost more than they give, most of all on a shared machine
if torch.cuda.is_available():
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it deterministic algorithms refuse every matrix product
else:
    os.environ.setdefault("TRITON_INTERPRET", "1")
    if list((Path(__file__).parents[1] / "pix2rep_kernels").glob("_C_emulated.*")):
        os.environ.setdefault("PIX2REP_EMULATE", "1")  # the CUDA kernels, on the CPU


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
