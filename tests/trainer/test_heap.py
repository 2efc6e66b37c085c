"""Freed memory goes back to the system, when it is worth it."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from pix2rep import heap


def test_acts_only_after_growth(monkeypatch):
    sizes = iter([1000, 1100, 1000 + heap.GROWTH, 1010, 1020])
    monkeypatch.setattr(heap, "resident", lambda: next(sizes))
    own, calls = heap.Heap(), []
    own._trim = calls.append
    assert [own.trim() for _ in range(4)] == [False, False, True, False]
    assert calls == [0]


def printed(code: str, **environment: str) -> list[int]:
    """Numbers that a fresh process prints: what earlier tests left in this one's heap is not there."""
    own = {key: value for key, value in os.environ.items() if key != heap.HUGE} | environment
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], env=own, capture_output=True, text=True, check=True)
    return [int(word) for word in done.stdout.split()]


@pytest.mark.skipif(sys.platform != "linux" or heap.Heap()._trim is None, reason="needs glibc")
def test_holes_between_live_blocks_are_returned():
    before, full, held, after = printed(
        """
        import torch
        from pix2rep import heap

        own = heap.Heap()
        own.trim()
        sizes, kept, big = [heap.resident()], [], []
        for _ in range(1200):  # under the size from which glibc asks the system for each block
            big.append(torch.ones(25_000))
            kept.append(torch.ones(3))
        sizes.append(heap.resident())
        del big
        sizes.append(heap.resident())
        own._rest = sizes[-1] - heap.GROWTH
        assert own.trim() and len(kept) == 1200
        print(*sizes, heap.resident())
        """
    )
    assert full - before > 100 * 2**20
    assert after < before + 0.3 * (full - before), (before, full, held, after)


def test_without_glibc_nothing_happens(monkeypatch):
    own = heap.Heap()
    own._trim = None
    assert own.trim() is False


@pytest.mark.skipif(sys.platform != "linux", reason="counts page faults as Linux does")
def test_commands_take_large_tensors_in_huge_pages():
    """As many page faults as pages of 2 MiB, not of 4 KiB, unless the environment says otherwise."""
    switch = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not switch.is_file() or "[never]" in switch.read_text():
        pytest.skip("this kernel has no transparent huge pages")
    code = """
        import resource
        from typer.testing import CliRunner
        from pix2rep.cli import app

        CliRunner().invoke(app, ["info"])
        import torch

        torch.empty(2**22)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.zeros(2**26)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    """
    small, large = printed(code, **{heap.HUGE: "0"})[0], printed(code)[0]
    if small < 2**26 * 4 // 4096 // 2:
        pytest.skip("pages are large here without asking")
    assert large < small / 10
