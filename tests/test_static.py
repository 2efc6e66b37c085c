"""What the compiler makes of the infonce kernels for sm_90 without a GPU: cost a pair, Hopper's matrix instructions, no spills.

The gate: D = 64 and 128, "joint" and "cross", forward and each backward pass. A process of its own compiles, because this one interprets.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def compiled(cache: Path, *command: str) -> str:
    """What Python prints that does not interpret kernels."""
    pytest.importorskip("triton", reason="triton is not installed")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    out = tmp_path_factory.mktemp("static") / "gate.json"
    compiled(out.parent / "cache", "-m", "benchmarks.static", "--gate", "--out", str(out))
    return json.loads(out.read_text())["rows"]


def test_every_gated_kernel_is_there(rows):
    names = [f"{kernel} {negatives}" for kernel in ("sums", "products") for negatives in ("cross", "joint")]
    assert {(row["kernel"], row["d"]) for row in rows} == {(name, d) for name in names for d in (64, 128)}


def test_clocks_a_pair(rows):
    """16 exponentials and 128 lanes a clock: one exponential a pair is 0.0625 clocks, and nothing else may take longer."""
    for row in rows:
        assert row["mufu_a_pair"] / 16 <= 0.0625, row
        assert row["instructions_a_pair"] / 128 <= 0.0625, row


def test_hopper_instructions_and_no_spills(rows):
    for row in rows:
        assert any(name.startswith("HGMMA") for name in row["matrix"]), row
        assert row["spills"] == 0 and row["stack_bytes"] == 0 and row["fits"], row


def test_programs_share_a_multiprocessor(rows):
    """65,536 registers: the sums keep 16 warps resident, and so do the products at D = 64."""
    for row in rows:
        if row["kernel"].startswith("sums") or row["d"] == 64:
            assert row["registers"] <= 128, row


def test_every_kernel_compiles_as_calls_specialise_it(tmp_path):
    """Sizes of 1, sizes divisible by 16 and absent tensors are constants and attributes to the JIT."""
    kernels = compiled(tmp_path, str(ROOT / "tests" / "infonce_static.py")).split()
    assert kernels == ["edges", "gradients", "losses", "online", "prepare", "products", "sums", "weights"]
