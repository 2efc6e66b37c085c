"""Downstream results: summary over patients, a table on the screen, results.csv and results.json, and the check that pre-training
helped.
"""

import csv
import json
import math
import platform
from pathlib import Path

import numpy as np

from pix2rep import config as config_file
from pix2rep import metrics

ARMS = ("pretrained", "random")
COLUMNS = (
    "what",
    "labelled",
    "seed",
    "arm",
    "patient",
    "frame",
    "case",
    "class",
    "dice",
    "hd95",
    "hd95_unit",
    "truth_voxels",
    "predicted_voxels",
)


def patient_scores(rows: list[dict], key: str) -> dict[str, float]:
    """{patient: mean of `key`}: first over a patient's volumes and seeds within a class, then over classes. Undefined values are left out
    at each stage.
    """
    values: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        values.setdefault(row["patient"], {}).setdefault(row["class"], []).append(row[key])
    return {patient: metrics.nanmean([metrics.nanmean(v) for v in classes.values()]) for patient, classes in sorted(values.items())}


def summarise(rows: list[dict], classes: tuple[str, ...], resamples: int) -> tuple[list[dict], list[dict]]:
    """(summary, differences) of rows as `evaluate.score_case` makes them.

    summary: one entry a (what, labelled, arm): Dice and HD95 as {"mean", "low", "high"} over test patients, for the mean of the classes and
    each class; `seeds`, the mean Dice of each. differences: one entry a (what, labelled): mean Dice of pretrained minus random, paired by
    patient, with its interval.
    """
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault((row["what"], row["labelled"], row["arm"]), []).append(row)
    summary, scores = [], {}
    for (what, labelled, arm), group in groups.items():
        entry = {
            "what": what,
            "labelled": labelled,
            "arm": arm,
            "patients": len({r["patient"] for r in group}),
            "volumes": len({r["case"] for r in group}),
        }
        for key in ("dice", "hd95"):
            parts = {"mean": group} | {name: [r for r in group if r["class"] == name] for name in classes}
            entry[key] = {name: _interval(part, key, resamples) for name, part in parts.items()}
        entry["hd95_undefined"] = sum(math.isnan(r["hd95"]) for r in group if r["truth_voxels"] or r["predicted_voxels"])
        entry["hd95_of"] = sum(bool(r["truth_voxels"] or r["predicted_voxels"]) for r in group)
        seeds = sorted({r["seed"] for r in group})
        entry["seeds"] = {
            seed: metrics.nanmean(list(patient_scores([r for r in group if r["seed"] == seed], "dice").values())) for seed in seeds
        }
        scores[what, labelled, arm] = patient_scores(group, "dice")
        summary.append(entry)
    differences = []
    for what, labelled in dict.fromkeys((w, n) for w, n, _ in groups):
        first, second = (scores.get((what, labelled, arm)) for arm in ARMS)
        if first and second:
            paired = metrics.bootstrap([first[p] - second[p] for p in first if p in second], resamples)
            differences.append({"what": what, "labelled": labelled} | dict(zip(("mean", "low", "high"), paired, strict=True)))
    return summary, differences


def _interval(rows: list[dict], key: str, resamples: int) -> dict[str, float]:
    return dict(zip(("mean", "low", "high"), metrics.bootstrap(list(patient_scores(rows, key).values()), resamples), strict=True))


def write(folder: Path, rows: list[dict], models: list[dict], study) -> dict:
    """Write results.csv (one row a model, volume and class) and results.json into `folder`, both atomically; returns what the latter holds
    (NaN is null there).
    """
    from pix2rep.checkpoint import atomic

    summary, differences = summarise(rows, study.classes, study.config.downstream.bootstrap)
    result = {
        "version": 1,
        "run": str(study.run),
        "classes": list(study.classes),
        "policy": metrics.EMPTY_POLICY,
        "interval": "95 % percentile bootstrap over test patients; each patient is first averaged over volumes and seeds",
        "hd95_unit": ", ".join(sorted({row["hd95_unit"] for row in rows})),
        "summary": summary,
        "differences": differences,
        "models": models,
        "split": study.split,
        "skipped": [list(pair) for pair in study.prepared.skipped],
        "config": config_file.to_dict(study.config),
        "versions": _versions(),
    }
    with atomic(folder / "results.csv") as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: "" if isinstance(v, float) and math.isnan(v) else v for key, v in row.items()} for row in rows)
    with atomic(folder / "results.json") as temporary:
        temporary.write_text(json.dumps(_plain(result), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return result


def show(result: dict) -> None:
    """Print the table of `write`'s result."""
    from rich.table import Table
    from rich.text import Text

    from pix2rep.log import table_console

    classes = result["classes"]
    patients = max(entry["patients"] for entry in result["summary"])
    caption = (
        f"3D Dice over {patients} test patients, mean [95 % interval over patients]; seeds: mean Dice of each; "
        f"HD95 in {result['hd95_unit']}, (k/m): undefined in k of m because one side is empty.\n{metrics.EMPTY_POLICY}"
    )
    table = Table(title=f"{result['run']}: downstream", caption=Text(caption), caption_justify="left", title_justify="left")
    for name in ("task", "labelled", "weights"):
        table.add_column(name)
    for name in (*classes, "Dice", "seeds", "HD95"):
        table.add_column(name, justify="right", no_wrap=name != "seeds")
    previous = None
    for entry in result["summary"]:
        group = entry["what"], entry["labelled"]
        if previous not in (None, group):
            table.add_section()
        dice, undefined = entry["dice"], entry["hd95_undefined"]
        hd95 = entry["hd95"]["mean"]["mean"]
        distance = ("-" if math.isnan(hd95) else f"{hd95:.1f}") + (f" ({undefined}/{entry['hd95_of']})" if undefined else "")
        cells = ["-" if math.isnan(dice[name]["mean"]) else f"{dice[name]['mean']:.3f}" for name in classes]
        seeds = " ".join(f"{v:.3f}" for v in entry["seeds"].values())
        table.add_row(entry["what"], str(entry["labelled"]), entry["arm"], *cells, _shown(dice["mean"]), seeds, distance)
        previous = group
    console = table_console()
    console.print(table)
    for d in result["differences"]:
        console.print(
            f"{d['what']}, {d['labelled']} labelled: pretrained - random = {_shown(d, sign=True)} Dice (paired by patient)",
            markup=False,
            soft_wrap=True,
        )


def _shown(interval: dict, sign: bool = False) -> str:
    form = "+.3f" if sign else ".3f"
    mean, low, high = (interval[key] for key in ("mean", "low", "high"))
    if math.isnan(mean):
        return "-"
    return f"{mean:{form}}" if math.isnan(low) else f"{mean:{form}} [{low:{form}}, {high:{form}}]"


def say_model(entry: dict, dice: float) -> None:
    """One line for a trained or re-evaluated model."""
    from pix2rep.log import say

    chosen = ", ".join(f"{key} {entry[key]}" for key in ("lr", "class_weights", "teacher_weight", "step") if key in entry)
    time = f", {entry['seconds']} s" if "seconds" in entry else ""
    name = f"{entry['what']} n={entry['labelled']} seed={entry['seed']} {entry['arm']}"
    say(f"{name}: test Dice {dice:.3f} (validation {entry['validation_dice']:.3f}; {chosen}{time})")


def probe_above_random(run: Path) -> bool:
    """Whether the probe with the fewest labelled patients has a higher mean test Dice from pre-training than from random weights. Says
    both.

    Raises FileNotFoundError when RUN/probe/results.json is missing, ValueError when it lacks an arm.
    """
    from pix2rep.log import say

    file = Path(run) / "probe" / "results.json"
    if not file.is_file():
        raise FileNotFoundError(f"run must hold probe/results.json, written by `pix2rep probe`, got {run}")
    summary = json.loads(file.read_text(encoding="utf-8"))["summary"]
    fewest = min(entry["labelled"] for entry in summary)
    dice = {entry["arm"]: entry["dice"]["mean"]["mean"] for entry in summary if entry["labelled"] == fewest}
    if any(dice.get(arm) is None for arm in ARMS):
        raise ValueError(f"{file} must hold a mean Dice for each of {', '.join(ARMS)}, got {dice}")
    above = dice["pretrained"] > dice["random"]
    word = "above" if above else "not above"
    say(f"probe, {fewest} labelled: pretrained {dice['pretrained']:.3f} is {word} random {dice['random']:.3f}")
    return above


def _plain(value):
    if isinstance(value, dict):
        return {str(key): _plain(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else None
    return value


def _versions() -> dict[str, str]:
    import monai
    import torch

    return {"python": platform.python_version(), "torch": torch.__version__, "monai": monai.__version__, "numpy": np.__version__}
