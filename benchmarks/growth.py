"""Rows of a results file, kept as they come, and how time and memory grow along a series of sizes."""

import json
import math
from pathlib import Path

from benchmarks.case import Case
from benchmarks.harness import write_json


def exponent(sizes: list[float], values: list[float]) -> float:
    """Slope of log value against log size, by least squares."""
    x, y = [math.log(n) for n in sizes], [math.log(v) for v in values]
    mx, my = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True)) / sum((a - mx) ** 2 for a in x)


def curve(rows: list[dict], series: str, who: str, value) -> tuple[list[int], list[float]]:
    """Sizes and values of one side along a series, in order of size."""
    points = sorted((row["n"], found) for row in rows if row.get("series") == series and row["who"] == who and (found := value(row)) is not None)
    return [n for n, _ in points], [v for _, v in points]


def seconds(row: dict) -> float | None:
    return row["both"]["median_s"] if "both" in row else None


def mebibytes(row: dict) -> float | None:
    """None where a process's resident memory grew by less than can be told from noise."""
    return row["extra_MiB"] if row.get("extra_MiB", 0) >= 1 else None


def exponents(rows: list[dict]) -> list[dict]:
    """Growth of time and memory of every side of every series of at least three sizes, fitted to its three largest."""
    found = []
    for series, who in dict.fromkeys((row["series"], row["who"]) for row in rows if "series" in row):
        row = {"series": series, "who": who}
        for name, value in (("time", seconds), ("memory", mebibytes)):
            sizes, values = (part[-3:] for part in curve(rows, series, who, value))
            if len(sizes) == 3:
                row |= {name: exponent(sizes, values), "from": sizes[0], "to": sizes[-1]}
        if len(row) > 2:
            found.append(row)
    return found


def predicted(rows: list[dict], case: Case, who: str) -> float | None:
    """Seconds that `who` would take at this size, by its last two smaller ones."""
    sizes, values = (part[-2:] for part in curve([r for r in rows if r.get("n", 0) < case.n], case.series, who, seconds))
    if not sizes:
        gone = [r for r in rows if r.get("series") == case.series and r["who"] == who and "needs_s" in r]
        return gone[-1]["needs_s"] if gone else None
    slope = exponent(sizes, values) if len(sizes) == 2 else 1.0
    return values[-1] * (case.n / sizes[-1]) ** slope


class Book:
    """A results file: `runs` say how rows came about, each row which run it is of. Written whole and atomically, after every case."""

    def __init__(self, path: Path | None, facts: dict):
        old = json.loads(path.read_text()) if path and path.exists() else {"runs": [], "rows": []}
        self.runs, self.rows = [*old.get("runs", []), facts], [row for row in old["rows"] if "run" in row]
        mine = [row for row in self.rows if not facts["changed"] and self.runs[row["run"]]["commit"] == facts["commit"]]
        self.kept = {(row["case"], row["who"]) for row in mine if "skipped" not in row and "failed" not in row}

    def has(self, case: Case, sides: list[str]) -> bool:
        """Whether all of these sides are there at this commit."""
        return all((case.name, who) in self.kept for who in sides)

    def add(self, case: Case, rows: list[dict]) -> None:
        """In place of the old rows of this case's same sides."""
        sides = {row["who"] for row in rows}
        self.rows = [row for row in self.rows if (row["op"], row["case"]) != (case.op, case.name) or row["who"] not in sides]
        for row in rows:
            row["run"] = len(self.runs) - 1
        self.rows += rows

    def write(self, path: Path) -> None:
        write_json(path, {"runs": self.runs, "growth": exponents(self.rows), "rows": self.rows})
