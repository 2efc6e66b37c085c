"""What nvcc makes of infonce's CUDA kernels: no spills, and clocks a pair on interior tiles at D = 64 and 128."""

import shutil

import pytest

from benchmarks import cuda_static

pytestmark = pytest.mark.skipif(not shutil.which("nvcc"), reason="nvcc is not here")


@pytest.fixture(scope="module")
def rows():
    return cuda_static.rows()


def test_no_spills(rows):
    assert {row["kernel"] for row in rows} >= {"prepare", "sums", "online", "losses", "extremes", "weights", "products", "gradients"}
    for row in rows:
        assert row["spills"] == 0 and row["stack_bytes"] == 0, row


def test_blocks_share_a_multiprocessor(rows):
    """65,536 registers: two blocks of 256 threads of the sums, three and two of 128 of the products."""
    for row in rows:
        if row.get("form") in ("plain", "biased", "shifted") and row.get("d") in (64, 128):
            assert row["registers"] <= (128 if row["kernel"] == "sums" else 168 if row["d"] == 64 else 255), row


def test_clocks_a_pair(rows):
    """Nothing takes longer than the exponentials, 1/16 clock a pair, or the matrix products; the sums at D = 64 are at both limits at once."""
    gated = [row for row in rows if row.get("form") == "plain" and row.get("d") in (64, 128) and "clocks_a_pair" in row]
    assert {(row["kernel"], row["sm"], row["d"]) for row in gated} == {(k, sm, d) for k in ("sums", "products") for sm in ("80", "90a") for d in (64, 128)}
    for row in gated:
        clocks = row["clocks_a_pair"]
        assert clocks["issue"] <= max(clocks["mufu"], clocks["matrix"]), row
        if row["kernel"] == "sums" and row["d"] == 64:
            assert max(clocks.values()) <= 0.0625, row
