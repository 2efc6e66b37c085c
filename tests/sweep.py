"""How far a run goes: `make test` takes a sample, `make test-full` (PIX2REP_TEST=full) the wide sweep."""

import os
import random
from collections.abc import Iterable

from pix2rep_kernels.testing import home

FULL = os.environ.get("PIX2REP_TEST") == "full"
EXAMPLES = 400 if FULL else 25  # of each Hypothesis test


def some(backend: str, cases: Iterable, share: int = 8) -> list:
    """Every case; for Triton on a GPU, which compiles most of them anew, one in `share` at random, the same ones every time."""
    cases = list(cases)
    if FULL or backend != "triton" or home(backend) == "cpu":
        return cases
    return random.Random(0).sample(cases, -(-len(cases) // share))
