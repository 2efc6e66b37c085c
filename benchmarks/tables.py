"""Tables of documents, rendered from results files alone: `python -m benchmarks.tables [README.md ...]`.

A document holds `<!-- results: NAME DEVICE -->` and `<!-- end -->`; what is between them is `TABLES[NAME](benchmarks/results/DEVICE)`. `render` does that to a
text, and a test compares, so that no number in a document can drift from its file.
"""

import argparse
import json
import re
import statistics
from collections.abc import Callable
from pathlib import Path

from benchmarks import few_shot, methods, step
from benchmarks.growth import seconds
from benchmarks.harness import ROOT
from pix2rep_kernels.dispatch import OPS

RESULTS = ROOT / "benchmarks/results"
MARKED = re.compile(r"(<!-- results: (\w+) ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
EAGER = {
    "warp": "`affine_grid`, `grid_sample`, index, `normalize`", "infonce": "matmul, cross-entropy", "crosscorr": "two `batch_norm`, matmul",
    "joint": "softmax, `einsum`, `avg_pool` or `conv2d`", "lncc": "box sums by `conv` or `avg_pool`", "pool": "`scatter_add`, `index_add` or one-hot",
    "align": "two `grid_sample`, products", "entropy": "softmax, `log`, product, sum", "losses": "each by its official formula",
}  # fmt: skip


def load(folder: Path, op: str) -> dict | None:
    """A results file of `benchmarks.run`; None where there is none."""
    path = folder / f"{op}.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    return found if "runs" in found else None


def sides(content: dict) -> dict[str, dict[str, dict]]:
    """case -> who -> row."""
    found: dict[str, dict[str, dict]] = {}
    for row in content["rows"]:
        found.setdefault(row["case"], {})[row["who"]] = row
    return found


def best(rows: dict[str, dict], ours: bool) -> dict | None:
    """The fastest of our backends, or of the peers that compute the same, forward and backward."""
    timed = [row for row in rows.values() if ("backend" in row) == ours and seconds(row) and row["errors"]]
    return min(timed, key=seconds, default=None)


def ratio(rows: dict[str, dict]) -> float | None:
    """Time of the fastest peer over ours."""
    mine, theirs = best(rows, True), best(rows, False)
    return seconds(theirs) / seconds(mine) if mine and theirs else None


def longest(content: dict, prefix: str = "") -> str | None:
    """The series with most sizes; on a tie the one with the largest, then with most sides."""
    sizes: dict[str, list] = {}
    for row in content["rows"]:
        if row.get("series", "").startswith(prefix) and "series" in row:
            sizes.setdefault(row["series"], []).append(row["n"])
    found = [series for series, n in sizes.items() if len(set(n)) >= 3]
    return max(found, key=lambda series: (len(set(sizes[series])), max(sizes[series]), len(sizes[series])), default=None)


def duration(row: dict | None) -> str:
    if row is None:
        return ""
    value = seconds(row)
    return f"{value:.1f} s" if value >= 10 else f"{value:.2f} s" if value >= 1 else f"{1e3 * value:.3g} ms"


def memory(row: dict | None) -> str:
    """Also what a peer would have needed that was not started."""
    if row is None:
        return ""
    if "needs_bytes" in row:
        return f"needs {row['needs_bytes'] / 2**30:,.0f} GiB"
    if "extra_MiB" not in row:
        return ""
    value = row["extra_MiB"]
    return f"{value / 1024:,.1f} GiB" if value >= 10 * 1024 else f"{value:,.0f} MiB"


def span(values: list[float], digits: int = 1) -> str:
    low, high = (f"{v:.{digits}f}" for v in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def clock(run: dict) -> str:
    """Threads, and what was counted where that is not the time on the wall."""
    return f"{run['threads']}, processor time" if run.get("clock") == "processor" else str(run["threads"])


def source(folder: Path, ops: list[str]) -> str:
    """Machine, versions and commands of the rows."""
    files = [content for op in ops if (content := load(folder, op))]
    runs = [content["runs"][k] for content in files for k in sorted({row["run"] for row in content["rows"]})]
    machines = " / ".join(dict.fromkeys(f"{run['device']}, torch {run['versions']['torch']}" for run in runs))
    commits = ", ".join(dict.fromkeys(run["commit"][:7] if " " not in run["commit"] else run["commit"] for run in runs))
    return f"\n{machines}; commit {commits}. `python -m benchmarks.run`, results in `benchmarks/results/{folder.name}/`.\n"


def infonce(folder: Path) -> str:
    """Every size of infonce: ours, eager, the fastest other; time and memory."""
    content = load(folder, "infonce")
    if content is None:
        return "Not measured yet.\n"
    rows = []
    order = sorted(sides(content).items(), key=lambda item: (next(iter(item[1].values()))["D"], *(next(iter(item[1].values()))[k] for k in ("negatives", "N"))))
    for _, found in order:
        mine, eager = best(found, True), found.get("eager")
        other = best({who: row for who, row in found.items() if who != "eager"}, False)
        any_row = next(iter(found.values()))
        name = f"{any_row['negatives']}, {any_row['N']:,} x {any_row['D']}" + (" (Pix2Rep's)" if any_row.get("paper") else "")
        times = f"{ratio(found):.1f}" if ratio(found) else ""
        eager_time = duration(eager) if eager and seconds(eager) else ""
        threads = clock(content["runs"][(mine or any_row)["run"]])
        rows.append([name, threads, duration(mine), eager_time, f"{duration(other)} ({other['who']})" if other else "", times, memory(mine), memory(eager)])
    header = ["negatives, pairs N x features D", "threads", "ours", "eager", "fastest other", "times faster than the best", "extra memory, ours", "eager"]
    return markdown(header, rows) + source(folder, ["infonce"])


def ops(folder: Path) -> str:
    """Each op over all of its sizes, by clock: time of the fastest peer over ours, memory, percent of the floor."""
    rows, files, grouped = [], [], {}
    for op in (*OPS, "losses"):
        content = load(folder, op)
        if content is None:
            continue
        files.append(op)
        for case in sides(content).values():
            if ratio(case):
                grouped.setdefault((op, clock(content["runs"][best(case, True)["run"]])), []).append(case)
    for (op, threads), found in grouped.items():
        ratios = [ratio(case) for case in found]
        mine = [best(case, True) for case in found]
        floors = [row["percent_of_floor"]["both"] for row in mine if "percent_of_floor" in row]
        pairs = [(best(case, False), row) for case, row in zip(found, mine, strict=True)]
        saved = [theirs["extra_MiB"] / max(row["extra_MiB"], 1) for theirs, row in pairs if "extra_MiB" in theirs and "extra_MiB" in row]
        below = sum(value < 1 for value in ratios)
        rows.append([
            f"`{op}`" if op in OPS else op, EAGER[op], threads, f"{span(ratios)} ({statistics.median(ratios):.1f})", str(below), str(len(ratios)),
            span(saved) if saved else "", f"{span(floors, 0)} %" if floors else "", f"`{op}.json`",
        ])  # fmt: skip
    if not rows:
        return "Not measured yet.\n"
    header = ["", "eager is", "threads", "times faster than the fastest peer (median)", "sizes slower", "sizes", "times less memory", "of the floor", "file"]
    return markdown(header, rows) + source(folder, files)


def growth(folder: Path) -> str:
    """How time and memory of infonce and crosscorr grow with N, on the longest series of each, and what ends each side's curve."""
    rows = []
    for op, prefix in (("infonce", "joint"), ("crosscorr", "")):
        content = load(folder, op)
        series = longest(content, prefix) if content else None
        for row in content["growth"] if series else []:
            if row["series"] != series:
                continue
            ends = [r for r in content["rows"] if (r.get("series"), r["who"]) == (row["series"], row["who"]) and r["n"] > row["to"] and "skipped" in r]
            end = min(ends, key=lambda r: r["n"]) if ends else None
            powers = [f"N^{row[name]:.2f}" if name in row else "" for name in ("time", "memory")]
            stop = f"at {end['n']:,}: {end['skipped']}" if end else ""
            rows.append([f"`{op}` {row['series']}", row["who"], f"{row['from']:,} to {row['to']:,}", *powers, stop])
    if not rows:
        return "Not measured yet.\n"
    return markdown(["series", "who", "sizes fitted", "time", "memory", "not started"], rows) + source(folder, ["infonce", "crosscorr"])


def of_file(name: str, table: Callable[[dict], str]) -> Callable[[Path], str]:
    """What `table` makes of a results file."""

    def render_it(folder: Path) -> str:
        path = folder / f"{name}.json"
        return table(json.loads(path.read_text())) if path.exists() else "Not measured yet.\n"

    return render_it


TABLES: dict[str, Callable[[Path], str]] = {"infonce": infonce, "ops": ops, "growth": growth}
TABLES |= {"methods": of_file("methods", methods.table), "step": of_file("step", step.table)}
TABLES |= {name: of_file(name, few_shot.table) for name in ("acdc_small", "acdc_pixels", "acdc_full_gpu")}


def render(text: str, results: Path = RESULTS) -> str:
    """The text with every marked table rendered anew.

    Raises:
        KeyError: a marker names no table.
    """
    return MARKED.sub(lambda match: match[1] + TABLES[match[2]](results / match[3]) + match[4], text)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tables", description=__doc__.partition("\n")[0])
    parser.add_argument("documents", nargs="*", type=Path, default=[ROOT / "README.md"])
    for path in parser.parse_args().documents:
        path.write_text(render(path.read_text()))


if __name__ == "__main__":
    main()
