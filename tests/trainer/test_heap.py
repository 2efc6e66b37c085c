"""Freed memory goes back to the system, when it is worth it."""

import sys

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
