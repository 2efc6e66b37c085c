"""What the compiler makes of every op's Triton kernels for GPUs that are not here: no spills, matrix instructions, wide loads, what a pair costs.

The calls of benchmarks/calls_<op>.py run without being launched, in processes of their own, because this one interprets. All of them are compiled for
sm_90, the first for sm_80; all for both with PIX2REP_TEST=full.
"""

import ast
import functools
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pix2rep_kernels.dispatch import OPS
from sweep import FULL

pytest.importorskip("triton", reason="triton is not installed")
ROOT = Path(__file__).parents[1]
TRITON = ROOT / "pix2rep_kernels" / "triton"


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """What `benchmarks.static` writes for one op. Triton's own cache keeps what has not changed."""
    out = tmp_path_factory.mktemp("static")

    @functools.cache
    def run(op):
        assert (ROOT / f"benchmarks/calls_{op}.py").exists(), f"benchmarks/calls_{op}.py is missing: nothing of {op} is compiled"
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        environment |= {"TRITON_CACHE_DIR": str(ROOT / "build" / "triton"), "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "benchmarks.static", op, "--out", str(out), *([] if FULL else ["--sample"])]
        result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return json.loads((out / f"{op}.json").read_text())

    return run


def jitted(path: Path) -> tuple[set, set]:
    """Names of a file's @triton.jit functions, and the names that they use."""
    functions = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)]
    functions = [node for node in functions if any("triton.jit" in ast.unparse(decorator) for decorator in node.decorator_list)]
    used = {name.id for function in functions for part in function.body for name in ast.walk(part) if isinstance(name, ast.Name)}
    return {function.name for function in functions}, used


def files(op: str) -> list[Path]:
    return sorted({*TRITON.glob(f"{op}.py"), *TRITON.glob(f"{op}_*.py")})


def entries(op: str) -> set:
    """Kernels of an op that the host launches: no other kernel uses them."""
    used = set().union(*(jitted(path)[1] for path in TRITON.glob("*.py")))
    return set().union(*(jitted(path)[0] for path in files(op))) - used


@pytest.mark.parametrize("op", OPS)
def test_every_kernel_compiles(op, compiled):
    calls = compiled(op)["calls"]
    assert entries(op), f"{op} has no Triton kernel"
    assert {row["kernel"] for row in calls if row["sm"] == 90} >= entries(op)
    assert {row["sm"] for row in calls} == {80, 90}


@pytest.mark.parametrize("op", OPS)
def test_nothing_spills_and_everything_fits(op, compiled):
    """Two words are borne on sm_80, in kernels whose operands fill its registers."""
    for row in compiled(op)["calls"] + compiled(op).get("rows", []):
        assert row["fits"] and (row["stack_bytes"] == 0 and row["spills"] == 0 or row["sm"] == 80 and row["stack_bytes"] <= 8), row


@pytest.mark.parametrize("op", OPS)
def test_large_products_take_matrix_instructions(op, compiled):
    rows, wanted = compiled(op)["calls"], getattr(importlib.import_module(f"benchmarks.calls_{op}"), "MATRIX", {})
    assert bool(wanted) == any(row["matrix"] for row in rows), f"benchmarks/calls_{op}.py must say in MATRIX which products are large"
    assert set(wanted) <= {row["kernel"] for row in rows}, "MATRIX names a kernel that no call launches"
    for row in rows:
        if row["call"] in wanted.get(row["kernel"], ()):
            assert any(name.startswith("HGMMA" if row["sm"] == 90 else "HMMA") for name in row["matrix"]), row


@pytest.mark.parametrize("op", OPS)
def test_aligned_rows_are_read_16_bytes_at_a_time(op, compiled):
    rows, wanted = compiled(op)["calls"], getattr(importlib.import_module(f"benchmarks.calls_{op}"), "WIDE", {})
    assert set(wanted) <= {row["kernel"] for row in rows}, "WIDE names a kernel that no call launches"
    for row in rows:
        if row["call"] in wanted.get(row["kernel"], ()):
            assert row["widest_load_bits"] == 128, row


# infonce's gate: D = 64 and 128, "joint" and "cross", forward and each backward pass.


@pytest.fixture(scope="module")
def gate(compiled):
    return [row for row in compiled("infonce")["rows"] if row["gate"] and row["sm"] == 90]


def test_every_gated_kernel_is_there(gate):
    names = [f"{kernel} {negatives}" for kernel in ("sums", "products") for negatives in ("cross", "joint")]
    assert {(row["kernel"], row["d"]) for row in gate} == {(name, d) for name in names for d in (64, 128)}


def test_clocks_a_pair(gate):
    """16 exponentials and 128 lanes a clock: one exponential a pair is 0.0625 clocks, and nothing else may take longer."""
    for row in gate:
        assert row["mufu_a_pair"] / 16 <= 0.0625, row
        assert row["instructions_a_pair"] / 128 <= 0.0625, row
        assert any(name.startswith("HGMMA") for name in row["matrix"]), row


def test_programs_share_a_multiprocessor(gate):
    """65,536 registers: the sums keep 16 warps resident, and so do the products at D = 64."""
    for row in gate:
        if row["kernel"].startswith("sums") or row["d"] == 64:
            assert row["registers"] <= 128, row
