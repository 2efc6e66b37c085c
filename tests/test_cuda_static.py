"""What nvcc makes of infonce's CUDA kernels: no spills, and clocks a pair on interior tiles at D = 64 and 128."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from benchmarks import cuda_static
from sweep import FULL

OBJECTS = list((Path(__file__).parents[1] / "pix2rep_kernels").glob("_C_cuda.*"))
ARCHS = cuda_static.ARCHS if FULL else ("90a",)


@pytest.fixture(scope="module")
def rows():
    if not shutil.which("nvcc"):
        pytest.skip("nvcc is not here")
    return cuda_static.rows(ARCHS, ("infonce_sums.cu", "infonce_products.cu"))


@pytest.mark.skipif(not OBJECTS, reason="_C_cuda is not built: no nvcc")
def test_no_kernel_of_the_object_has_a_stack():
    usage = subprocess.run([cuda_static.tool("cuobjdump"), "-res-usage", str(OBJECTS[0])], capture_output=True, text=True, check=True).stdout
    stacks = re.findall(r"Function (\S+):\s+REG:\d+ STACK:(\d+)", usage)
    assert any("infonce" in name for name, _ in stacks)
    for name, stack in stacks:
        assert int(stack) == 0, name


def test_no_spills(rows):
    assert {row["kernel"] for row in rows} == {"sums", "online", "products"}
    for row in rows:
        assert row["spills"] == 0 and row["stack_bytes"] == 0, row


def test_blocks_share_a_multiprocessor(rows):
    """65,536 registers: two blocks of 256 threads of the sums, three and two of 128 of the products."""
    for row in rows:
        if row.get("form") in ("plain", "biased", "shifted") and row.get("d") in (64, 128):
            assert row["registers"] <= (128 if row["kernel"] == "sums" else 168 if row["d"] == 64 else 255), row


def test_clocks_a_pair(rows):
    """Nothing takes longer than the exponentials, 1/16 clock a pair, or the matrix products; the sums at D = 64 are at both limits at once."""
    gated = [row for row in rows if row.get("form") == "plain" and row.get("d") in (64, 128)]
    assert {(row["kernel"], row["sm"], row["d"]) for row in gated} == {(k, sm, d) for k in ("sums", "products") for sm in ARCHS for d in (64, 128)}
    for row in gated:
        clocks = row["clocks_a_pair"]
        assert clocks["issue"] <= max(clocks["mufu"], clocks["matrix"]), row
        if row["kernel"] == "sums" and row["d"] == 64:
            assert max(clocks.values()) <= 0.0625, row
