"""The CUDA object where there is no GPU, and the emulation that its kernels are tested in."""

import ctypes
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from pix2rep_kernels import dispatch

ROOT = Path(__file__).parents[1]

LOADED = """
import torch
from pix2rep_kernels import dispatch, infonce, native
assert native.why_missing("cuda") is None, native.why_missing("cuda")
for op in dispatch.OPS:
    if (op, "cuda") not in dispatch.ABSENT:
        for name in (op, op + "_backward"):
            assert torch._C._dispatch_has_kernel_for_dispatch_key("pix2rep_native::" + name, "CUDA"), name
        assert dispatch.why_not(op, "cuda", [torch.zeros(2)]) == "the tensors are on cpu, this backend needs cuda"
try:
    infonce(torch.randn(4, 2), torch.randn(4, 2), temperature=0.1, backend="cuda")
except RuntimeError as error:
    print(error)
"""


@pytest.mark.skipif(not list((ROOT / "pix2rep_kernels").glob("_C_cuda.*")), reason="_C_cuda is not built: no nvcc")
def test_the_object_loads_without_a_gpu_and_refuses_cpu_tensors():
    environment = {k: v for k, v in os.environ.items() if k != "PIX2REP_EMULATE"}
    result = subprocess.run([sys.executable, "-c", LOADED], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "the tensors are on cpu" in result.stdout


@pytest.mark.skipif(not list((ROOT / "pix2rep_kernels").glob("_C_emulated.*")), reason="build with PIX2REP_BUILD=emulate")
def test_the_emulation_serves_every_op():
    environment = os.environ | {"PIX2REP_EMULATE": "1"}
    asked = [op for op in dispatch.OPS if (op, "cuda") not in dispatch.ABSENT]
    code = f"import torch, pix2rep_kernels; from pix2rep_kernels import dispatch; print([dispatch.why_unavailable(op, 'cuda') for op in {asked}])"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.stdout.strip() == str([None] * len(asked)), result.stdout + result.stderr


@pytest.fixture(scope="module")
def probe(tmp_path_factory):
    compiler = os.environ.get("CXX") or shutil.which("c++") or pytest.skip("no C++ compiler")
    target = tmp_path_factory.mktemp("probe") / "probe.so"
    include = [f"-I{Path(torch.__file__).parent / 'include'}", f"-I{ROOT / 'csrc'}"]
    source = ROOT / "tests" / "emulate" / "probe.cpp"
    subprocess.run([compiler, "-std=c++17", "-O1", "-fPIC", "-shared", "-DPIX2REP_EMULATE", *include, str(source), "-o", str(target)], check=True)
    return ctypes.CDLL(str(target))


def pointer(array):
    return array.ctypes.data_as(ctypes.c_void_p)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_tiles_and_their_product(probe, dtype, transposed):
    x, y = torch.randn(16, 16).to(dtype), torch.randn(8, 16).to(dtype)
    given = [t.contiguous().view(torch.int16).numpy() for t in (x, y.T if transposed else y)]
    out, early = np.zeros((16, 8), np.float32), np.zeros(1, np.float32)
    probe.product(pointer(given[0]), pointer(given[1]), pointer(out), pointer(early), int(dtype == torch.float16), int(transposed))
    assert np.allclose(out, 1 + x.double().numpy() @ y.double().numpy().T, atol=1e-5)
    assert np.isnan(early[0])  # the copies land when they are waited for, and what they replace is poison


def test_tf32(probe):
    x, y = torch.randn(16, 8), torch.randn(8, 8)
    x[0, :2] = torch.tensor([1 + 2**-11, -1 - 2**-11 - 2**-23])  # a tie, which goes away from 0, and one past it
    x[1, :3] = torch.tensor([math.inf, -math.inf, math.nan])
    out, rounded = np.zeros((16, 8), np.float32), np.zeros((16, 8), np.float32)
    probe.tf32(pointer(x.numpy()), pointer(y.numpy()), pointer(out), pointer(rounded))
    kept = torch.from_numpy(rounded)
    assert torch.equal(kept[0, :2], torch.tensor([1 + 2**-10, -1 - 2**-10])) and torch.equal(kept[1, :2], x[1, :2]) and kept[1, 2].isnan()
    finite = kept.isfinite()
    assert ((kept - x)[finite].abs() <= 2**-11 * x[finite].abs()).all() and (kept.view(torch.int32)[finite] & 0x1FFF == 0).all()
    cut = (y.view(torch.int32) & ~0x1FFF).view(torch.float32)
    rows = finite.all(1)
    assert np.allclose(out[rows], 1 + kept[rows].double() @ cut.double(), atol=1e-6) and np.isnan(out[1]).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_pairs(probe, dtype):
    x, y = torch.randn(64) * 3, torch.randn(64)
    difference, packed = np.zeros(32, np.uint32), np.zeros(32, np.uint32)
    probe.pairs(pointer(x.numpy()), pointer(y.numpy()), pointer(difference), pointer(packed), int(dtype == torch.float16))
    got, rounded = (torch.from_numpy(t.view(np.int16)).view(dtype) for t in (difference, packed))
    assert torch.equal(rounded, x.to(dtype)) and torch.equal(got, x.to(dtype) - y.to(dtype))


def test_warps_and_barriers(probe):
    votes, sums = np.zeros(64, np.uint32), np.zeros(64, np.float32)
    probe.vote(pointer(votes), pointer(sums))
    lanes = np.arange(64)
    for warp in range(2):
        assert (votes[32 * warp : 32 * warp + 32] == sum(1 << lane for lane in range(32) if lanes[32 * warp + lane] % 3 == 0)).all()
        assert (sums[32 * warp : 32 * warp + 32] == lanes[32 * warp : 32 * warp + 32].sum()).all()
    code = f"import ctypes; ctypes.CDLL({probe._name!r}).miss_a_barrier()"
    missed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert missed.returncode and "a thread left before a barrier" in missed.stderr


def test_functions(probe):
    x = np.concatenate([np.logspace(-30, 0, 500), np.linspace(0, 1, 500)]).astype(np.float32)
    out = np.zeros((3, len(x)), np.float32)
    probe.functions(pointer(x), len(x), pointer(out))
    wide = x.astype(np.float64)
    argument = (x * np.float32(40) - np.float32(20)).astype(np.float64)
    for got, truth in zip(out, (np.log1p(wide), -np.expm1(-wide), np.log1p(np.exp2(argument))), strict=True):
        assert (np.abs(got - truth) <= 4 * np.finfo(np.float32).eps * truth).all()
