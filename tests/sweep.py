"""How far a run goes: `make test` takes a sample, `make test-full` (PIX2REP_TEST=full) the wide sweep."""

import os

FULL = os.environ.get("PIX2REP_TEST") == "full"
EXAMPLES = 400 if FULL else 25  # of each Hypothesis test
