"""What is wrong with a data set's files: every bad one named, none only first."""

import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from pix2rep.checkpoint import atomic
from pix2rep.data.nifti import VolumeError

_FEW = 8  # files listed one by one; more are grouped by reason


@dataclass(frozen=True)
class Problem:
    """A file that makes its case unusable."""

    case: str
    path: Path
    reason: str

    @classmethod
    def of(cls, case: str, error: VolumeError) -> "Problem":
        return cls(case, error.path, error.reason)

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


class BadVolumes(ValueError):
    """Files of a data set that cannot be used: all of them are in `problems`, and in the message."""

    def __init__(self, problems: list[Problem], cases: int):
        bad = len({problem.case for problem in problems})
        super().__init__(
            f"data.root must hold usable volumes only, got {bad} of {cases} that are not:\n{listed(problems)}\n"
            "Mend or remove these files, or go on without these cases: data.skip_bad=true (pix2rep pretrain --skip-bad)"
        )
        self.problems = problems


def listed(problems: list[Problem]) -> str:
    """A line for every file, indented; under a line for every reason where there are many."""
    if len(problems) <= _FEW:
        return "\n".join(f"  {problem}" for problem in problems)
    groups = defaultdict(list)
    for problem in problems:
        expected, cut, got = problem.reason.partition(", got ")
        groups[expected].append(f"    {problem.path}" + (f": got {got}" if cut else ""))
    return "\n".join(f"  {reason} ({len(lines)} files)\n" + "\n".join(lines) for reason, lines in groups.items())


def write_skipped(problems: list[Problem], path: Path) -> None:
    """{"version": 1, "skipped": [{"case", "path", "reason"}, ...]} as JSON, atomically."""
    rows = [{"case": problem.case, "path": str(problem.path), "reason": problem.reason} for problem in problems]
    with atomic(path) as temporary:
        temporary.write_text(json.dumps({"version": 1, "skipped": rows}, indent=1) + "\n", encoding="utf-8")
