"""A contact sheet: one slice of many volumes on one page, with the outlines of their labels, outliers first."""

import math
import textwrap
import warnings
from collections import defaultdict
from pathlib import Path

import numpy as np

from pix2rep.checkpoint import atomic
from pix2rep.data.summary import bare, by_reason, headline, legible

TILE, GAP, CAPTION = 160, 12, 30  # pixels: side of a picture, space between, height of two lines of text
HEAD, LINE, MARGIN = 40, 20, 16  # of the title, of a line of the legend, around everything
COLUMNS = (4, 8)  # fewest, most
PAGE, DARK, LIGHT, QUIET, STRIKING = "#202020", "#303030", "#f0f0f0", "#b0b0b0", "#F0E442"
FAR = {
    "shape": "far off: {value} voxels in {axis}", "spacing": "far off: {value} mm in {axis}",
    "p1": "1st percentile {value}", "p99": "99th percentile {value}",
}  # fmt: skip
NAMED = 24  # labels that the legend names


def choose(scan, summary: dict, count: int) -> list[tuple]:
    """At most `count` of (VolumeInfo | Problem, why): problems and outliers first, a quarter each where not all fit; then the rest, evenly over
    patients. `why` is the outlier's distinction, such as "far off: 3 voxels in z", None for the rest. Raises ValueError for a count below 1.
    """
    if count < 1:
        raise ValueError(f"the number of tiles must be at least 1, got {count}")
    turns = [(turn, problem) for group in by_reason(scan.problems).values() for turn, problem in enumerate(group)]  # every reason once, then again
    problems = list({problem.case: problem for _, problem in sorted(turns, key=lambda item: item[0])}.values())
    cases = len(scan.volumes) + len(problems)
    share = cases if cases <= count else max(1, count // 4)
    known = {v.case.id: v for v in scan.volumes}
    chosen = [(problem, None) for problem in problems[:share]]
    odd = dict(list(_distinctions(summary).items())[: min(share, count - len(chosen))])
    chosen += [(known[name], why) for name, why in odd.items()]
    rest = [v for v in scan.volumes if v.case.id not in odd]
    return chosen + [(v, None) for v in _evenly(rest, count - len(chosen))]


def write(path: str | Path, scan, summary: dict, count: int) -> int:
    """Draw `choose(scan, summary, count)` and write it as PNG, atomically. Returns how many tiles there are."""
    chosen = choose(scan, summary, count)
    figure = draw(chosen, summary)
    with atomic(path) as temporary, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # names of cases in scripts that the font lacks
        figure.savefig(temporary, format="png", dpi=72, facecolor=PAGE)
    return len(chosen)


def grid(tiles: int) -> tuple[int, int]:
    """(rows, columns) of so many tiles."""
    columns = min(COLUMNS[1], max(COLUMNS[0], math.ceil(math.sqrt(1.4 * tiles))))
    return max(1, math.ceil(tiles / columns)), columns


def corner(index: int, columns: int) -> tuple[int, int]:
    """(x, y) of a tile's upper left pixel."""
    row, column = divmod(index, columns)
    return MARGIN + column * (TILE + GAP), HEAD + row * (TILE + CAPTION + GAP)


def draw(chosen: list[tuple], summary: dict):
    """A matplotlib Figure of (VolumeInfo | Problem, why) tiles; one of its units is one pixel."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows, columns = grid(len(chosen))
    names = [(row["value"], row["name"]) for row in summary["labels"] if row["volumes"]]
    width = 2 * MARGIN + columns * (TILE + GAP) - GAP
    per_line = max(1, (width - 2 * MARGIN) // TILE)
    lines = math.ceil(min(len(names), NAMED + 1) / per_line)
    height = corner(rows * columns, columns)[1] + lines * LINE + MARGIN // 2
    figure = Figure(figsize=(width / 72, height / 72), dpi=72)  # a point is a pixel
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    counts = summary["counts"]
    title = f"{Path(summary['root']).resolve().name}: {len(chosen)} of {counts['volumes'] + counts['unusable']} cases"
    _text(axes, MARGIN, HEAD / 2, title, 14, LIGHT)
    _text(axes, width - MARGIN, HEAD / 2, "anterior up, the patient's left on the left, as the headers say; black margins cut off", 11, QUIET, ha="right")
    for k, (item, why) in enumerate(chosen):
        x, y = corner(k, columns)
        if hasattr(item, "thumbnail"):
            _picture(axes, x, y, item, why, summary["spacing_lost"])
        else:
            _reason(axes, x, y, item)
    _legend(axes, names, corner(rows * columns, columns)[1] + LINE / 2, per_line)
    axes.set(xlim=(0, width), ylim=(height, 0))
    return figure


def _picture(axes, x: int, y: int, volume, why: str | None, spacing_lost: bool) -> None:
    image, labels = volume.thumbnail, volume.thumbnail_labels
    side = [n * s / cells for n, s, cells in zip(volume.shape[1::-1], volume.spacing[1::-1], image.shape, strict=True)]  # mm, of a cell
    window = _content(image if labels is None else np.maximum(image, labels))
    image = image[window]
    up, across = (cells * mm for cells, mm in zip(image.shape, side, strict=True))
    height, width = (max(1, round(TILE * mm / max(up, across))) for mm in (up, across))
    left, top = x + (TILE - width) // 2, y + (TILE - height) // 2
    _box(axes, x, y, "black", STRIKING if why else "black")
    extent = (left, left + width, top + height, top)
    axes.imshow(image, cmap="gray", vmin=0, vmax=255, extent=extent, interpolation="bilinear", aspect="auto", zorder=2)
    if labels is not None:
        _outlines(axes, labels[window], left, top, width, height)
    _text(axes, x, y + TILE + 9, shorten(volume.case.id, 25), 11, LIGHT)
    shape, spacing = ("x".join(f"{n:.3g}" for n in values) for values in (volume.shape, volume.spacing))
    text = why or (shape if spacing_lost else f"{shape}, {spacing} mm")
    _text(axes, x, y + TILE + 22, shorten(text, 28), 10, STRIKING if why else QUIET)


def _content(image: np.ndarray) -> tuple[slice, slice]:
    """The box of what is not 0, of air around a patient; the whole image where that is nothing."""
    if not image.any():
        return slice(None), slice(None)
    first, last = np.argwhere(image).min(0), np.argwhere(image).max(0)
    return tuple(slice(int(a), int(b) + 1) for a, b in zip(first, last, strict=True))


def _outlines(axes, labels: np.ndarray, left: int, top: int, width: int, height: int) -> None:
    from pix2rep.overlay import COLOURS

    rows, columns = labels.shape
    xs, ys = left + (np.arange(-1, columns + 1) + 0.5) * width / columns, top + (np.arange(-1, rows + 1) + 0.5) * height / rows
    for k in np.unique(labels[labels > 0]):
        region = np.pad(labels == k, 1)  # closes the outline of a label that touches the border
        axes.contour(xs, ys, region, levels=[0.5], colors=[COLOURS[(int(k) - 1) % len(COLOURS)]], linewidths=1.5, zorder=3)


def _reason(axes, x: int, y: int, problem) -> None:
    _box(axes, x, y, DARK, QUIET)
    _, cut, found = bare(problem).partition(", got ")
    lines = textwrap.wrap(headline(problem) + cut + found, 24, max_lines=7, placeholder=" ...")
    _text(axes, x + TILE / 2, y + TILE / 2, "\n".join(["not usable", "", *lines]), 11, LIGHT, ha="center")
    _text(axes, x, y + TILE + 9, shorten(problem.case, 25), 11, LIGHT)


def _legend(axes, names: list[tuple[int, str]], y: float, per_line: int) -> None:
    from matplotlib.patches import Rectangle

    from pix2rep.overlay import COLOURS

    for k, (value, name) in enumerate(names[:NAMED]):
        line, place = divmod(k, per_line)
        x = MARGIN + place * TILE
        axes.add_patch(Rectangle((x, y + line * LINE - 6), 12, 12, color=COLOURS[(value - 1) % len(COLOURS)], linewidth=0))
        _text(axes, x + 18, y + line * LINE, shorten(f"{value} {name}" if name != str(value) else name, 21), 11, LIGHT)
    if len(names) > NAMED:
        line, place = divmod(NAMED, per_line)
        _text(axes, MARGIN + place * TILE, y + line * LINE, f"and {len(names) - NAMED} more", 11, QUIET)


def _box(axes, x: int, y: int, face: str, edge: str) -> None:
    from matplotlib.patches import Rectangle

    axes.add_patch(Rectangle((x - 1.5, y - 1.5), TILE + 3, TILE + 3, facecolor=face, edgecolor=edge, linewidth=1))


def _text(axes, x: float, y: float, text: str, size: int, colour: str, ha: str = "left") -> None:
    axes.text(x, y, legible(text), fontsize=size, color=colour, ha=ha, va="center_baseline", parse_math=False)


def shorten(text: str, length: int) -> str:
    """The middle gives way: ids differ at their ends."""
    if len(text) <= length:
        return text
    tail = (length - 2) // 2
    return f"{text[: length - 2 - tail]}..{text[-tail:]}"


def _distinctions(summary: dict) -> dict[str, str]:
    """Case id -> what sets it apart: copies of another case, then the farthest of every quantity before the second of any."""
    why = {name: f"same image: {other}" for first, *others in summary["duplicates"] for name, other in ((first, others[0]), *((o, first) for o in others))}
    lists = [(name, column["outliers"]) for name, column in summary["distributions"].items()]
    lists += [(name, column["rare"]) for name, column in summary["categories"].items()]
    ranked = [(rank, name, entry) for name, found in lists for rank, entry in enumerate(found)]
    for _, name, entry in sorted(ranked, key=lambda item: item[0]):
        why.setdefault(entry["case"], FAR.get(name.split()[0], "{what}: {value}").format(what=name, axis=name[-1], value=entry["value"]))
    return why


def _evenly(volumes: list, count: int) -> list:
    """One of every patient, then a second, and so on; a round that does not fit is thinned evenly. In the order of their ids."""
    patients = defaultdict(list)
    for v in volumes:
        patients[v.case.patient].append(v)
    taken, turn = [], 0
    while len(taken) < count and (members := [group[turn] for group in patients.values() if len(group) > turn]):
        room = min(count - len(taken), len(members))
        taken += [members[i] for i in np.linspace(0, len(members) - 1, room).round().astype(int)]
        turn += 1
    return sorted(taken, key=lambda v: v.case.id)
