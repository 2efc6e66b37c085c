"""What nvcc makes of every kernel of csrc/cuda, read from the built object: nothing spills, what should be wide is, and enough is under way at once."""

import re
import shutil

import pytest

from benchmarks import cuda_static, cuda_static_pairs
from benchmarks.cuda_static_code import ARCHS, OPS, SOURCES, Code, built, launch_bound, output, tool
from sweep import FULL

CHIPS = ARCHS if FULL else ("90a",)
MATRIX = {"crosscorr", "infonce"}
# An H200 has 4.3 TB/s, 132 multiprocessors and answers in about 0.7 us: what each must have under way, of loads alone, to keep the memory busy.
UNDER_WAY = 4.3e12 * 0.7e-6 / 132

pytestmark = pytest.mark.skipif(not built() and not shutil.which("nvcc"), reason="neither _C_cuda of these sources nor nvcc is here")


@pytest.fixture(scope="module")
def rows():
    return cuda_static.rows(CHIPS)


def named(table, pattern):
    found = [row for row in table if re.fullmatch(pattern, row["kernel"])]
    assert {row["sm"] for row in found} == set(CHIPS), f"no kernel is called {pattern}"
    return found


def test_every_source_and_chip_is_read(rows):
    assert set(rows) == {source.stem.partition("_")[0] for source in SOURCES}
    for op, table in rows.items():
        assert {row["sm"] for row in table} == set(CHIPS), op


def test_nothing_spills(rows):
    for row in (row for table in rows.values() for row in table):
        assert row["spills"] == 0 and row["stack_bytes"] == 0, row


@pytest.mark.skipif(not built(), reason="_C_cuda is not built, or older than its sources")
def test_no_kernel_of_either_chip_has_a_stack_or_local_memory():
    usage = output(tool("cuobjdump"), "-res-usage", built())
    found = re.findall(r"Function (\S+):\s+REG:\d+ STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert usage.count("arch = sm_80") >= len(SOURCES) and usage.count("arch = sm_90a") == len(SOURCES)
    assert all(any(op in name for name, _, _ in found) for op in OPS)
    for name, stack, local in found:
        assert (stack, local) == ("0", "0"), name


def test_products_are_the_matrix_units_own(rows):
    for op in MATRIX & set(rows):
        assert any(row["hmma"] for row in rows[op]), op
    for row in named(rows["infonce"], r"(sums|online|products)\b.*"):
        assert row["hmma"] >= 32 and row["copy_async"] and row["ldmatrix"], row


def test_blocks_share_a_multiprocessor(rows):
    """infonce: two blocks of the sums of what is neither listed nor wide, three and two of the products of 64 and 128 features: what their latencies need."""
    for row in named(rows["infonce"], r"sums<(true|false), false, (true|false)>"):
        assert row["blocks"] >= 2, row
    for features, blocks in ((64, 3), (128, 2)):
        for row in named(rows["infonce"], rf"products<{features}, [01], false, false>"):
            assert row["blocks"] >= blocks, row


def taps(row):
    count, dims = map(int, re.findall(r"\d+", row["kernel"])[-2:])
    return count**dims


def test_warp_reads_and_writes_rows_sixteen_bytes_at_a_time(rows):
    for row in named(rows["warp"], r"warp_rows<\w+, [48], .*"):
        assert row["load"]["128"] and row["store"]["128"] and row["store"].get("64", 0) == 0, row
        assert row["store"]["32"] == 1 and row["store"]["8"] == 1 and "16" not in row["store"], row  # a norm; whether the point is inside
        assert row["widest_in_flight"] >= min(taps(row), 8), row
        assert row["blocks"] * row["threads"] * row["widest_in_flight"] * 16 >= UNDER_WAY, row
    for row in named(rows["warp"], r"warp_planes<.*"):
        assert row["store"]["128"] and row["blocks"] >= 3, row
        assert taps(row) == 1 or row["in_flight"] >= 16, row
    for row in named(rows["warp"], r"warp_convert<.*"):
        assert row["load"]["128"] == 2 and row["store"]["128"] == 1, row


def test_warp_adds_four_values_at_a_time_on_hopper(rows):
    for row in named(rows["warp"], r"warp_scatter_rows<\w+, 4, .*"):
        width, count = ("128", taps(row)) if row["sm"] == "90a" else ("32", 4 * taps(row))
        assert set(row["reduce"]) == {width} and row["reduce"][width] % count == 0, row  # a loop may be unrolled
    for row in named(rows["warp"], r"warp_scatter_planes<\w+, [48], .*"):
        assert row["load"]["128"] and row["widest_in_flight"] >= 2, row


def test_pool_reads_and_writes_sixteen_bytes_at_a_time(rows):
    for row in named(rows["pool"], r"pool_rows<\w+, [48]>"):
        assert row["load"]["128"] and row["widest_in_flight"] >= 8, row
        assert row["blocks"] * row["threads"] * row["widest_in_flight"] * 16 >= UNDER_WAY, row
    for row in named(rows["pool"], r"pool_spread_(rows|planes)<\w+, [\w ]+, [48]>"):
        assert set(row["store"]) == {"128"} and row["store"]["128"] == 4, row
    for row in named(rows["pool"], r"pool_spread_rows<\w+, [\w ]+, [48]>"):
        assert row["widest_in_flight"] >= 4, row


@pytest.mark.skipif(not shutil.which("nvcc"), reason="nvcc is not here")
def test_clocks_a_pair():
    """Nothing takes longer than the exponentials, 1/16 clock a pair, or the matrix products; the sums at D = 64 are at both limits at once."""
    gated = [row for row in cuda_static_pairs.rows(CHIPS) if row["form"] == "plain" and row["d"] in (64, 128)]
    assert {(row["kernel"], row["sm"], row["d"]) for row in gated} == {(k, sm, d) for k in ("sums", "products") for sm in CHIPS for d in (64, 128)}
    for row in gated:
        clocks = row["clocks_a_pair"]
        assert clocks["issue"] <= max(clocks["mufu"], clocks["matrix"]), row
        if row["kernel"] == "sums" and row["d"] == 64:
            assert max(clocks.values()) <= 0.0625, row


def test_loads_under_way():
    """Counted until the first use, of a register that is read or written again, and not across the end of a path."""
    load = [f"LDG.E.128 R{r}, desc[UR4][R2.64]" for r in (4, 8, 12)]

    def most(*texts):
        return cuda_static.in_flight(Code("k", list(enumerate(texts)), 0, 0, 0, 0), 128)

    assert most(*load) == 3
    assert most(load[0], "FADD R20, R7, R7", *load[1:]) == 2
    assert most(load[0], load[1], "@P0 MOV R5, R30", load[2]) == 2
    assert most(load[0], "EXIT", load[1], "@P0 BRA 0x10", load[2]) == 2
    assert most("LDG.E R4, desc[UR4][R2.64]") == 0


def test_widths_of_instructions():
    for name, bits in (("LDG.E.128.CONSTANT", 128), ("LDG.E", 32), ("STG.E.U16", 16), ("LDG.E.S8", 8), ("STG.E.64", 64),
                       ("RED.E.ADD.F32.FTZ.RN", 32), ("REDG.E.ADD.F32x4.FTZ.RN.STRONG.GPU", 128)):  # fmt: skip
        assert cuda_static.width(name) == bits


def test_launch_bounds(rows):
    assert launch_bound(bytes([3, 27, 255, 0, 4, 5, 12, 0, 0, 1, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0])) == 256
    assert launch_bound(bytes([4, 23, 4, 0, 5, 5, 5, 5])) == 0
    assert all(row["threads"] == 256 for op in ("pool", "warp") for row in rows[op])
