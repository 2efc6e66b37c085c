"""Freed memory goes back to the system, when it is worth it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pix2rep import heap


def test_acts_only_after_growth(monkeypatch):
    sizes = iter([1000, 1100, 1000 + heap.GROWTH, 1010, 1020])
    monkeypatch.setattr(heap, "resident", lambda: next(sizes))
    own, calls = heap.Heap(), []
    own._trim = calls.append
    assert [own.trim() for _ in range(4)] == [False, False, True, False]
    assert calls == [0]


@pytest.mark.skipif(sys.platform != "linux" or heap.Heap()._trim is None, reason="needs glibc")
def test_holes_between_live_blocks_are_returned():
    own = heap.Heap()
    own._trim(0)  # earlier tests leave holes, which these blocks would fill
    own.trim()
    before, kept = heap.resident(), []
    big = []
    for _ in range(1200):  # under the size from which glibc asks the system for each block
        big.append(torch.ones(25_000))
        kept.append(torch.ones(3))
    full = heap.resident()
    del big
    held = heap.resident()
    own._rest = held - heap.GROWTH
    assert own.trim()
    assert full - before > 100 * 2**20
    assert heap.resident() < before + 0.3 * (full - before), (before, full, held, heap.resident())
    assert len(kept) == 1200


def test_without_glibc_nothing_happens(monkeypatch):
    own = heap.Heap()
    own._trim = None
    assert own.trim() is False


@pytest.mark.skipif(sys.platform != "linux", reason="counts page faults as Linux does")
def test_commands_take_large_tensors_in_huge_pages(tmp_path):
    """As many page faults as pages of 2 MiB, not of 4 KiB, unless the environment says otherwise."""
    switch = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not switch.is_file() or "[never]" in switch.read_text():
        pytest.skip("this kernel has no transparent huge pages")
    code = """if True:
        import resource, sys
        from typer.testing import CliRunner
        from pix2rep.cli import app
        CliRunner().invoke(app, ["info"])
        import torch
        torch.empty(2**22)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.zeros(2**26)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    """
    faults = {}
    for asked in ("0", None):
        environment = {key: value for key, value in os.environ.items() if key != heap.HUGE} | ({heap.HUGE: asked} if asked else {})
        faults[asked] = int(subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True).stdout)
    if faults["0"] < 2**26 * 4 // 4096 // 2:
        pytest.skip("pages are large here without asking")
    assert faults[None] < faults["0"] / 10
