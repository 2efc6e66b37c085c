"""Gives back to the system what glibc's allocator keeps, and takes large blocks in large pages.

Feature maps of a few MiB come from its heap, small blocks that live longer land between them, and the holes are not filled well: a CPU run's
resident memory grows by megabytes a step although no tensor is held. Trimming returns the holes' pages.
"""

import contextlib
import ctypes
import os

HUGE = "THP_MEM_ALLOC_ENABLE"  # read by PyTorch at its first large CPU tensor
GROWTH = 256 * 2**20  # bytes over the last trim's rest at which the next one is worth its page faults


def ask_for_huge_pages() -> None:
    """Feature maps are mapped anew at every step: pages of 2 MiB (Linux, where madvise may have them) instead of 4 KiB save most of the page faults.

    For this process and those it starts, before the first large tensor; what the environment says already stays.
    """
    os.environ.setdefault(HUGE, "1")


class Heap:
    """`trim()` as often as you like: it acts when the process has grown by GROWTH. A no-op where there is no glibc."""

    def __init__(self):
        self._trim = None
        with contextlib.suppress(OSError, AttributeError, TypeError):
            self._trim = ctypes.CDLL(None).malloc_trim
        self._rest: int | None = None

    def trim(self) -> bool:
        """Whether memory was given back."""
        if self._trim is None or (now := resident()) is None:
            return False
        if self._rest is None:
            self._rest = now
        if now < self._rest + GROWTH:
            return False
        self._trim(0)
        self._rest = resident()
        return True


def resident() -> int | None:
    """Bytes of this process in memory; None where /proc does not say."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return None
