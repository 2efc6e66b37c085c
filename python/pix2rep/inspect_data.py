"""`pix2rep inspect`: what a folder of volumes holds and what in it would go wrong, on a screen, as JSON and as a picture."""

import json
import shlex
import sys
from pathlib import Path

from rich.table import Table

from pix2rep.checkpoint import atomic
from pix2rep.config import DataConfig
from pix2rep.data.advice import advice
from pix2rep.data.summary import bare, by_reason, legible, summarise
from pix2rep.log import console, table_console

SHOWN = 20  # files of one reason on the screen; --json has all
NAMED = 3  # cases that a warning or a row names


def inspect(root, data: DataConfig, json_file=None, sheet=None, sheet_cases: int = 48, cache=None, workers: int | None = None) -> dict:
    """Scan `root`, print what is found, write `json_file` (all of it) and `sheet` (PNG) where given. Returns what the JSON holds: `summarise`'s
    object with "warnings", which are those of training with the options `data` (its `root` is not looked at).

    Raises FileNotFoundError when there is no such folder or no volume in it, ValueError for a `sheet` that is no .png.
    """
    if sheet is not None and Path(sheet).suffix.lower() != ".png":
        raise ValueError(f"--sheet must name a .png file, got {sheet}")
    from pix2rep.data.scan import scan

    with _progress() as progress:
        found = scan(Path(root), cache, workers, progress, classes=tuple(data.classes), label_affine=data.label_affine)
    summary = summarise(found)
    summary["warnings"] = advice(found, summary, data)
    show(found, summary)
    screen = table_console()
    if json_file is not None:
        with atomic(json_file) as temporary:
            temporary.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    if sheet is None:
        screen.print(_plain(f"to look at them: pix2rep inspect {shlex.quote(str(root))} --sheet FILE.png"), markup=False, soft_wrap=True)
    else:
        from pix2rep import contact_sheet

        tiles = contact_sheet.write(sheet, found, summary, sheet_cases)
        screen.print(_plain(f"{tiles} tile{'s' * (tiles != 1)} in {sheet}"), markup=False, soft_wrap=True)
    return summary


def show(found, summary: dict) -> None:
    """Print a summary with warnings; unencodable names are printed with replacements."""
    screen = table_console()
    for line in _header(summary):
        screen.print(_plain(line), markup=False)
    for table in (_distributions(summary), _labels(summary)):
        if table.row_count:
            screen.print(table, markup=False)
    for warning in summary["warnings"]:
        names = [] if warning["about"] == "duplicates" else warning["cases"]
        screen.print(_plain(f"! {warning['message']}{_some(names)}"), markup=False)
    for heading, problems in by_reason(found.problems).items():
        screen.print(_plain(f"\n{len(problems)} not usable: {heading}"), markup=False)
        for problem in problems[:SHOWN]:
            detail = bare(problem).removeprefix(heading).strip(" ,")
            screen.print(_plain(f"  {problem.path}{': ' if detail else ''}{detail}"), markup=False, soft_wrap=True)
        if len(problems) > SHOWN:
            screen.print(f"  and {len(problems) - SHOWN} more (--json FILE has all)")


def _header(summary: dict) -> list[str]:
    counts = summary["counts"]
    kind = {"any folder": "any folder of NIfTI files"}.get(summary["layout"], f"{summary['layout']} layout")
    frames = ", ".join(f"{count} {name}" for name, count in counts["frames"].items())
    lines = [
        f"{summary['root']}: {kind}",
        f"{counts['patients']} patients, {counts['volumes']} volumes{f' ({frames})' if frames else ''}, {summary['counts']['unusable']} not usable;"
        f" {counts['labelled']} labelled, {counts['unlabelled']} unlabelled; {counts['voxels'] / 1e6:,.1f} million voxels;"
        f" {summary['seconds']:.1f} s, {summary['from_cache']} from the cache",
    ]
    if counts["groups"]:
        lines.append("disease groups: " + ", ".join(f"{name} {count}" for name, count in counts["groups"].items()))
    return lines


def _distributions(summary: dict) -> Table:
    table = Table(title="volumes, axes turned to RAS")
    for name in ("", "min", "median", "max"):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    table.add_column("most frequent", overflow="fold")
    table.add_column("far off", overflow="fold")
    for name, column in summary["distributions"].items():
        unit = ", voxels" if name.startswith("shape") else ", mm" if name.startswith("spacing") else ""
        modes = f"half in {_short(column['q1'])} to {_short(column['q3'])}" if name in ("p1", "p99") else _frequent(column["modes"], summary)
        row = [_short(column[key]) for key in ("min", "median", "max")]
        label = {"p1": "1st percentile", "p99": "99th percentile"}.get(name, name + unit)
        table.add_row(label, *row, modes, _plain(_far(column["outliers"])))
    for name, column in summary["categories"].items():
        counts = ", ".join(f"{value}: {count}" for value, count in column["counts"].items())
        if counts:
            table.add_row(name, "", "", "", counts, _plain(_far(column["rare"])))
    return table


def _labels(summary: dict) -> Table:
    table = Table(title=f"labels of {summary['counts']['labelled']} volumes")
    units = {"voxels": "{:,.0f}"} if summary["spacing_lost"] else {"voxels": "{:,.0f}", "ml": "{:,.3g}"}
    for name in ("label", "name", "volumes", *(title for unit in units for title in (f"{unit}, median", "min..max"))):
        table.add_column(name, justify="left" if name == "name" else "right", overflow="fold")
    for row in summary["labels"]:
        cells = []
        for unit, form in units.items():
            spread = row[unit]
            cells += ["-", "-"] if spread is None else [form.format(spread["median"]), "..".join(form.format(spread[k]) for k in ("min", "max"))]
        table.add_row(str(row["value"]), _plain(row["name"]), str(row["volumes"]), *cells)
    return table


def _frequent(modes: list, summary: dict) -> str:
    return ", ".join(f"{_short(value)} ({100 * count / summary['counts']['volumes']:.0f} %)" for value, count in modes)


def _far(entries: list[dict]) -> str:
    more = f", and {len(entries) - NAMED} more" if len(entries) > NAMED else ""
    return ", ".join(f"{entry['case']} ({_short(entry['value'])})" for entry in entries[:NAMED]) + more


def _some(cases: list[str]) -> str:
    more = f" and {len(cases) - NAMED} more" if len(cases) > NAMED else ""
    return f": {', '.join(cases[:NAMED])}{more}" if cases else ""


def _short(value) -> str:
    if isinstance(value, str):
        return value
    return f"{value:,.0f}" if value == round(value) or abs(value) >= 1e4 else f"{value:.4g}"


def _plain(text: str) -> str:
    """Printable where a file's name is no UTF-8, or the screen knows less than UTF-8."""
    coding = sys.stdout.encoding or "utf-8"
    return legible(text).encode(coding, errors="replace").decode(coding)


class _progress:
    """A bar on a terminal, nothing elsewhere; called with (done, total)."""

    def __enter__(self):
        from rich.progress import Progress

        self._bar = Progress(console=console, transient=True, disable=not console.is_terminal)
        self._bar.start()
        self._task = self._bar.add_task("reading", total=None)
        return lambda done, total: self._bar.update(self._task, completed=done, total=total)

    def __exit__(self, *_):
        self._bar.stop()
