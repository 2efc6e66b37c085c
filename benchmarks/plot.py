"""Figures from results files alone: `python -m benchmarks.plot [--results DIR] [--out docs/figures]`, as SVG and PNG.

Colours are Okabe and Ito's, which the colour-blind tell apart; every side has a marker and a line style of its own besides.
"""

import argparse
import statistics
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.lines import Line2D

from benchmarks.growth import curve, mebibytes, seconds
from benchmarks.harness import ROOT
from benchmarks.tables import RESULTS, load, longest, ratio, sides
from pix2rep_kernels.dispatch import OPS

STYLES = {
    "ours": ("#0072B2", "o", "-"), "ours:triton": ("#0072B2", "o", "-"), "ours:cuda": ("#009E73", "D", "-"), "eager": ("#E69F00", "s", "--"),
    "compile": ("#D55E00", "^", "-."), "chunked": ("#009E73", "v", ":"), "lightly": ("#CC79A7", "D", "--"), "MONAI": ("#000000", "P", "-."),
    "Pix2Rep's formula": ("#56B4E9", "<", "--"), "metric-learning": ("#7F7F7F", "X", ":"), "KeOps": ("#8C6D00", "*", "-"), "memeff": ("#56B4E9", ">", "-."),
    "inf-cl": ("#7F7F7F", "p", "--"), "flex": ("#CC79A7", "h", "-."), "points alone": ("#009E73", "v", ":"), "products": ("#7F7F7F", "", ":"),
}  # fmt: skip
NAMES = {"products": "its three bare products", "ours:triton": "ours, Triton", "ours:cuda": "ours, CUDA"}
OTHER = ("#7F7F7F", ".", "-")
TIMES = {"0.1 ms": 1e-4, "1 ms": 1e-3, "10 ms": 1e-2, "0.1 s": 0.1, "1 s": 1.0, "10 s": 10.0, "100 s": 100.0, "1000 s": 1000.0}
SIZES = {"1 MiB": 1, "8 MiB": 8, "64 MiB": 64, "512 MiB": 512, "4 GiB": 2**12, "32 GiB": 2**15, "256 GiB": 2**18, "2 TiB": 2**21}
WIDTH = 6.9  # inches, a page's text width
STYLE = {
    "font.size": 9.5, "axes.labelsize": 9.5, "legend.fontsize": 9, "xtick.labelsize": 9, "ytick.labelsize": 9, "axes.titlesize": 10, "svg.fonttype": "none",
    "svg.hashsalt": "pix2rep", "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#E3E3E3", "grid.linewidth": 0.6,
    "lines.linewidth": 1.4, "lines.markersize": 5, "figure.dpi": 100, "savefig.dpi": 200,
}  # fmt: skip


def drawn(axes, who, x, y, **options):
    colour, marker, line = STYLES.get(who, OTHER)
    heavy = {"linewidth": 2.4, "markersize": 6, "zorder": 5} if who.startswith("ours") else {}
    axes.plot(x, y, color=colour, marker=marker, linestyle=line, **heavy | options)


def legend(figure, names: list[str], missing: bool, total: float | None = None, columns: int = 4):
    handles = [
        Line2D([], [], color=STYLES.get(who, OTHER)[0], marker=STYLES.get(who, OTHER)[1], linestyle=STYLES.get(who, OTHER)[2], label=NAMES.get(who, who))
        for who in names
    ]
    if missing:
        cross = {"color": "#333333", "marker": "x", "linestyle": "", "markersize": 8, "markeredgewidth": 1.8}
        handles.append(Line2D([], [], **cross, label="does not fit: what it needs"))
    if total:
        handles.append(Line2D([], [], color="#333333", linewidth=0.9, label=f"this machine's {total / 1024:.0f} GiB"))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False)


def scaling(content: dict, series: str, title: str, label: str):
    """Time and memory of every side against N, and where each does not fit."""
    rows = [row for row in content["rows"] if row.get("series") == series]
    names = list(dict.fromkeys(row["who"] for row in sorted(rows, key=lambda row: (not row["who"].startswith("ours"), row["n"]))))
    figure, (left, right) = plt.subplots(1, 2, figsize=(WIDTH, 3.7), layout="constrained")
    lost = [row for row in rows if "needs_bytes" in row]
    shown = []
    for who in names:
        curves = [curve(rows, series, who, value) for value in (seconds, mebibytes)]
        if not curves[0][0] and not any(row["who"] == who for row in lost):
            continue
        shown.append(who)
        for axes, (x, y) in zip((left, right), curves, strict=True):
            drawn(axes, who, x, y)
        ends = [row for row in lost if row["who"] == who]
        if ends:
            first = min(ends, key=lambda row: row["n"])
            needs = first["needs_bytes"] / 2**20
            colour, _, line = STYLES.get(who, OTHER)
            if curves[1][0]:
                right.plot([curves[1][0][-1], first["n"]], [curves[1][1][-1], needs], color=colour, linestyle=line, linewidth=0.8, alpha=0.7)
            right.plot(first["n"], needs, color=colour, marker="x", markersize=8, markeredgewidth=1.8, linestyle="")
    total = max((run["memory_bytes"] / 2**20 for run in content["runs"] if "memory_bytes" in run), default=None)
    if total:
        right.axhline(total, color="#333333", linewidth=0.9)
    ticks = sorted({row["n"] for row in rows})
    for axes, name, units in ((left, "time, forward and backward", TIMES), (right, "extra memory", SIZES)):
        axes.set(xscale="log", yscale="log", xlabel=label, ylabel=name)
        in_units(axes, units)
        axes.set_xticks(ticks[:: -(-len(ticks) // 5)], [short(n) for n in ticks[:: -(-len(ticks) // 5)]])
        axes.minorticks_off()
    figure.suptitle(title, fontsize=10)
    legend(figure, shown, bool(lost), total)
    return figure


def in_units(axes, units: dict[str, float]) -> None:
    low, high = axes.get_ylim()
    axes.set_yticks(*zip(*((value, text) for text, value in units.items() if low <= value <= high), strict=True))
    axes.minorticks_off()


def short(n: int) -> str:
    return f"{n / 2**20:g}M" if n >= 2**20 else f"{n / 1024:.0f}k" if n >= 1000 else str(n)


def every_op(contents: dict[str, dict]):
    """One dot a size: time of the fastest peer over ours."""
    figure, axes = plt.subplots(figsize=(WIDTH, 0.36 * len(contents) + 1.2), layout="constrained")
    colour = STYLES["ours"][0]
    for place, content in enumerate(contents.values()):
        values = sorted(value for case in sides(content).values() if (value := ratio(case)))
        spread = [place + 0.14 * ((k % 3) - 1) for k in range(len(values))]
        axes.plot(values, spread, "o", color=colour, alpha=0.75, markersize=5)
        if values:
            axes.plot([statistics.median(values)] * 2, [place - 0.32, place + 0.32], color="#000000", linewidth=1.6)
    axes.axvline(1, color="#D55E00", linewidth=1.2, linestyle="--")
    axes.set(xscale="log", xlabel="times faster than the fastest peer, forward and backward")
    marks = [("o", "", colour, "one size"), ("|", "", "#000000", "median"), ("", "--", "#D55E00", "left of it: slower")]
    handles = [Line2D([], [], marker=m, linestyle=line, color=c, label=text, markersize=9 if m == "|" else 5) for m, line, c, text in marks]
    figure.legend(handles=handles, loc="outside upper center", ncols=3, frameon=False)
    low, high = axes.get_xlim()
    ticks = [t for t in (0.5, 1, 2, 5, 10, 20, 50, 100, 200) if low <= t <= high]
    axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axes.minorticks_off()
    axes.set_yticks(range(len(contents)), list(contents))
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    return figure


def densities(content: dict):
    """warp of one map at 1 to 100 % of its points, in both layouts."""
    rows = [row for row in content["rows"] if seconds(row) and row["S"] == [128, 128] and row["C"] == 64 and row["B"] == 8]
    names = [who for who in STYLES if any(row["who"] == who for row in rows)]
    if len({row["percent"] for row in rows}) < 3:
        return None
    figure, both = plt.subplots(1, 2, figsize=(WIDTH, 3.1), layout="constrained", sharey=True)
    for axes, layout, title in zip(both, ("last", "first"), ("channels last", "channels first"), strict=True):
        for who in names:
            points = sorted((row["percent"], seconds(row)) for row in rows if (row["who"], row["layout"]) == (who, layout))
            drawn(axes, who, [p for p, _ in points], [t for _, t in points])
        axes.set(xscale="log", yscale="log", title=title, xlabel="points, % of the map")
        axes.minorticks_off()
        axes.set_xticks([1, 3, 10, 100], ["1", "3", "10", "100"])
    in_units(both[0], TIMES)
    both[0].set_ylabel("time, forward and backward")
    legend(figure, names, False)
    return figure


def figures(folder: Path) -> dict[str, object]:
    """Name -> figure of everything that the results of one device can show."""
    contents = {op: content for op in (*OPS, "losses") if (content := load(folder, op))}
    made = {}
    if "infonce" in contents and (series := longest(contents["infonce"], "joint")):
        width = series.partition("=")[2]
        made["infonce"] = scaling(contents["infonce"], series, f"InfoNCE (NT-Xent) over 2N rows, {width} features", "pairs N")
    if "crosscorr" in contents and (series := longest(contents["crosscorr"])):
        made["crosscorr"] = scaling(contents["crosscorr"], series, f"Barlow Twins, {series.partition('=')[2]} features", "rows N")
    if "warp" in contents:
        made["warp"] = densities(contents["warp"])
    if contents:
        made["ops"] = every_op(contents)
    return {name: figure for name, figure in made.items() if figure is not None}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot", description=__doc__.partition("\n")[0])
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--out", type=Path, default=ROOT / "docs/figures")
    asked = parser.parse_args(arguments)
    asked.out.mkdir(parents=True, exist_ok=True)
    with plt.rc_context(STYLE):
        for folder in sorted(path for path in asked.results.iterdir() if path.is_dir()):
            for name, figure in figures(folder).items():
                for ending, facts in (("svg", {"Date": None}), ("png", {"Software": None})):
                    path = asked.out / f"{name}_{folder.name}.{ending}"
                    figure.savefig(path, metadata=facts)
                    print(path)
                plt.close(figure)


if __name__ == "__main__":
    main()
