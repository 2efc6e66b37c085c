"""A comparison's numbers: results.csv (a row a model, volume and class), results.json, table.md and the table on the screen."""

import csv
import math
from pathlib import Path

from pix2rep import compare_records as records
from pix2rep import config as config_file
from pix2rep import metrics
from pix2rep.checkpoint import atomic
from pix2rep.compare_stats import INTERVAL, interval, scores_of, wins
from pix2rep.plan import to_dict
from pix2rep.pretrain import versions

COLUMNS = ("task", "labelled", "seed", "method", "patient", "frame", "case", "class", "dice", "hd95", "hd95_unit", "truth_voxels", "predicted_voxels")
CHOICE = ("lr", "class_weights", "teacher_weight", "step", "validation_dice")


def write(comparison) -> dict:
    """Write results.csv, results.json and table.md of the finished cells of a `compare.Comparison`; returns what results.json holds, with
    NaN where that has null.
    """
    done, failed = comparison.finished()
    out, plan, study = comparison.out, comparison.plan, comparison.study
    rows = [record | {"task": job.task, "method": job.method} for job, record in done]
    summary, differences = summarise(
        [(job.task, job.labelled, job.method, job.seed, record["rows"]) for job, record in done],
        _groups(comparison), study.classes, plan.reference, plan.base.downstream.bootstrap,
    )  # fmt: skip
    result = {
        "version": 1,
        "data": Path(plan.data).resolve().name,
        "classes": list(study.classes),
        "labelled_of": comparison.total,
        "policy": metrics.EMPTY_POLICY,
        "interval": INTERVAL,
        "hd95_unit": ", ".join(sorted({row["hd95_unit"] for record in rows for row in record["rows"]})),
        "reference": plan.reference,
        "summary": summary,
        "differences": differences,
        "failed": [{"task": job.task, "labelled": job.labelled, "method": job.method, "seed": job.seed, "why": why} for job, why in failed],
        "methods": {name: _method(comparison, name) for name in plan.methods},
        "cells": [
            {key: record[key] for key in ("task", "labelled", "method", "seed", "patients", *CHOICE) if key in record}
            | {"dice": metrics.nanmean([row["dice"] for row in record["rows"]])}
            for record in rows
        ],
        "split": study.split,
        "skipped": [list(pair) for pair in study.prepared.skipped],
        "downstream": config_file.to_dict(plan.base)["downstream"],
        "plan": {key: value for key, value in to_dict(plan).items() if key not in ("data", "out")},
        "versions": versions(),
    }
    with atomic(out / "results.csv") as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n", extrasaction="ignore")
        writer.writeheader()
        for record in rows:
            own = {"task": record["task"], "method": record["method"]}
            writer.writerows({k: "" if isinstance(v, float) and math.isnan(v) else v for k, v in (row | own).items()} for row in record["rows"])
    records.write(out / "results.json", records.plain(result))
    with atomic(out / "table.md") as temporary:
        temporary.write_text(markdown(result), encoding="utf-8")
    return result


def summarise(cells, groups, classes: tuple[str, ...], reference: str | None, resamples: int) -> tuple[list[dict], list[dict]]:
    """(summary, differences) of `cells`: (task, labelled, method, seed, rows of `evaluate.score_case`) of every finished one.

    groups: {(task, labelled, method): seeds wanted}, in the order of the table. summary: an entry a group with Dice and HD95 as {"mean",
    "low", "high"} for the mean of the classes ("mean") and each class, and each seed's mean Dice (None: no result). differences: an entry a
    group beside `reference` with the difference in mean Dice, over the seeds that both have, and how many patients are better and worse.
    """
    found = {key: {seed: rows for *own, seed, rows in cells if tuple(own) == key} for key in groups}
    patients = sorted({row["patient"] for *_, rows in cells for row in rows})
    summary, differences = [], []
    for key, wanted in groups.items():
        seeds = [seed for seed in wanted if seed in found[key]]
        rows = [row for seed in seeds for row in found[key][seed]]
        entry = dict(zip(("task", "labelled", "method"), key, strict=True))
        shown = [row for row in rows if row["truth_voxels"] or row["predicted_voxels"]]
        entry |= {"patients": len(patients), "volumes": len({row["case"] for row in rows})}
        dice = scores_of(rows, "dice", patients, seeds, classes)
        for name, scores in (("dice", dice), ("hd95", scores_of(rows, "hd95", patients, seeds, classes))):
            parts = {"mean": scores} | {label: scores.of_class(k) for k, label in enumerate(classes)}
            entry[name] = {label: interval(part, resamples) for label, part in parts.items()}
        entry |= {"hd95_undefined": sum(math.isnan(row["hd95"]) for row in shown), "hd95_of": len(shown)}
        entry["seeds"] = {seed: dice.of_seeds([seeds.index(seed)]).mean if seed in seeds else None for seed in wanted}
        summary.append(entry)
        other = found.get((*key[:2], reference), {})
        both = [seed for seed in seeds if seed in other]
        if key[2] != reference and both:
            pair = [scores_of([row for seed in both for row in rows_of[seed]], "dice", patients, both, classes) for rows_of in (found[key], other)]
            better, worse = wins(*pair)
            entry = dict(zip(("task", "labelled", "method"), key, strict=True)) | {"reference": reference, "seeds": both}
            differences.append(entry | interval(pair[0], resamples, pair[1]) | {"better": better, "worse": worse})
    return summary, differences


def _groups(comparison) -> dict[tuple[str, int, str], list[int]]:
    groups: dict[tuple[str, int, str], list[int]] = {}
    for task, n, method, seed in comparison.plan.cells(comparison.total):
        groups.setdefault((task, n, method), []).append(seed)
    return groups


def _method(comparison, name: str) -> dict:
    config, method = comparison.config(name, 0), comparison.plan.methods[name]
    found = {"pretrain": method.pretrain, "options": method.options, "seeds": list(comparison.plan.seeds_of(name))}
    if method.pretrain:
        found |= {"steps": config.pretrain.steps, "batch_size": config.pretrain.batch_size * config.pretrain.accumulate}
    if name in comparison.matched:
        found["match_time"] = {key: value for key, value in comparison.matched[name].items() if key != "inputs"}
    return found


def caption(result: dict) -> list[str]:
    """What the table's numbers are, a sentence an entry."""
    split, down = result["split"], result["downstream"]
    counts = " / ".join(str(len(split[part])) for part in ("pretrain", "val", "test"))
    arms = [
        f"{name} {entry['steps']} x {entry['batch_size']} images" + (f" (the time of {entry['match_time']['reference']})" if "match_time" in entry else "")
        for name, entry in result["methods"].items()
        if entry["pretrain"]
    ]
    random = [name for name, entry in result["methods"].items() if not entry["pretrain"]]
    taught = f", with a mean teacher too, on {down['teacher_batch_size']} unlabelled images each" if "mean_teacher" in result["plan"]["tasks"] else ""
    said = [
        f"Data: {result['data']}; patients for pre-training / validation / test: {counts}; {result['labelled_of']} of the first have labels "
        "to draw from, nested in their number for a seed.",
        f"Test patients: {', '.join(split['test'])}.",
        "Dice: absolute, 3D, on the source files' grids; mean over classes, test patients and seeds.",
        f"[ ]: {INTERVAL}; {down['bootstrap']} resamples.",
        "Settings (learning rate, class weights, step) are chosen by Dice on the validation patients, for every method alike; no test "
        "patient decides anything.",
        f"Steps: pre-training {'; '.join(arms) or 'none'}; probe {down['probe_steps']}; fine-tuning {down['finetune_steps']}{taught}."
        + (f" Random initialisation: {', '.join(random)}." if random else ""),
        f"HD95 in {result['hd95_unit'] or '-'}; (k/m): undefined in k of m. {result['policy'][0].upper()}{result['policy'][1:]}.",
    ]
    if result["reference"]:
        said.insert(4, f"Difference to {result['reference']}: the same patients and seeds paired, the same bootstrap; better / worse: patients.")
    return said


def cells_of(result: dict) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table, as text."""
    classes, reference = result["classes"], result["reference"]
    header = ["task", "labelled", "method", *classes, "Dice", "seeds", *([f"minus {reference}", "better / worse"] if reference else []), "HD95"]
    paired = {(d["task"], d["labelled"], d["method"]): d for d in result["differences"]}
    rows = []
    for entry in result["summary"]:
        n = entry["labelled"]
        difference = paired.get((entry["task"], n, entry["method"]))
        undefined = f" ({entry['hd95_undefined']}/{entry['hd95_of']})" if entry["hd95_undefined"] else ""
        row = [entry["task"], f"all ({n})" if n == result["labelled_of"] else str(n), entry["method"]]
        row += [_number(entry["dice"][name]["mean"]) for name in classes]
        row += [shown(entry["dice"]["mean"]), " ".join("failed" if v is None else _number(v) for v in entry["seeds"].values())]
        if reference:
            row += [shown(difference, "+.3f"), f"{difference['better']} / {difference['worse']}"] if difference else ["", ""]
        rows.append([*row, _number(entry["hd95"]["mean"]["mean"], ".1f") + undefined])
    return header, rows


def markdown(result: dict) -> str:
    """table.md: a GitHub table, its caption, and the failures."""
    header, rows = cells_of(result)
    lines = [" | ".join(row) for row in (header, ["---"] * len(header), *rows)]
    text = [f"# {result['data']}: methods and labels", "", *(f"| {line} |" for line in lines), "", *(f"- {line}" for line in caption(result))]
    if result["failed"]:
        text += ["", "Failed:", "", *(f"- {_failure(entry)}" for entry in result["failed"])]
    return "\n".join(text) + "\n"


def show(result: dict) -> None:
    """Print the table."""
    from rich.table import Table
    from rich.text import Text

    from pix2rep.log import say, table_console

    header, rows = cells_of(result)
    table = Table(caption=Text("\n".join(caption(result))), caption_justify="left")
    for index, name in enumerate(header):
        table.add_column(name, justify="left" if index < 3 else "right", no_wrap=name not in ("seeds", "better / worse", "HD95"))
    for index, row in enumerate(rows):
        if index and row[:2] != rows[index - 1][:2]:
            table.add_section()
        table.add_row(*row)
    table_console().print(table)
    for entry in result["failed"]:
        say(f"failed: {_failure(entry)}")


def show_jobs(why: dict) -> None:
    """Print {job: why it is to be done, or nothing} as a table, a column a seed."""
    from rich.table import Table

    from pix2rep.log import table_console

    groups: dict[tuple, dict[int, str]] = {}
    for job, reasons in why.items():
        state = "finished" if not reasons else "new" if reasons == ["new"] else "redo"
        groups.setdefault((job.task, str(job.labelled or "-"), job.method), {})[job.seed] = state
    seeds = sorted({seed for states in groups.values() for seed in states})
    table = Table(*("task", "labelled", "method"), *(f"seed {seed}" for seed in seeds))
    for key, states in groups.items():
        table.add_row(*key, *(states.get(seed, "") for seed in seeds))
    table_console().print(table)


def _failure(entry: dict) -> str:
    return f"{entry['method']} {entry['task']} n={entry['labelled']} seed {entry['seed']}: {entry['why'].splitlines()[0]}"


def shown(value: dict, form: str = ".3f") -> str:
    """Mean and interval."""
    mean, low, high = (value[key] for key in ("mean", "low", "high"))
    return _number(mean, form) + ("" if math.isnan(low) else f" [{low:{form}}, {high:{form}}]")


def _number(value: float, form: str = ".3f") -> str:
    return "-" if math.isnan(value) else f"{value:{form}}"
