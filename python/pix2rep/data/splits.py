"""Who trains and who tests: splits by patient, balanced over disease groups, written to a file that later commands read."""

import json
from collections import defaultdict
from pathlib import Path

import numpy as np

from pix2rep.checkpoint import atomic
from pix2rep.config import SplitConfig
from pix2rep.data.discover import Case, disease_group

PARTS = ("pretrain", "val", "test")


def make_split(cases: list[Case], config: SplitConfig) -> dict:
    """{"version": 1, "seed": s, "pretrain": [...], "val": [...], "test": [...]}, sorted patient names.

    `cases` are Case or PreparedCase. "pretrain" is also the pool of the labelled patients: pre-training sees its images only.
    Disease groups (Info.cfg) are spread evenly.
    Raises ValueError for shares that leave nobody to pre-train on, or when there are too few patients for the parts asked for.
    """
    if not (0 <= config.val < 1 and 0 <= config.test < 1 and config.val + config.test < 1):
        raise ValueError(f"split.val and split.test must be shares in [0, 1) with a sum below 1, got {config.val} and {config.test}")
    order = _balanced_order(_groups(cases), config.seed)
    test, val = (max(1, round(share * len(order))) if share else 0 for share in (config.test, config.val))
    if len(order) < test + val + 1:
        raise ValueError(f"the split needs at least {test + val + 1} patients (test {test}, val {val}, pretrain 1), got {len(order)}")
    parts = {"pretrain": order[test + val :], "val": order[test : test + val], "test": order[:test]}
    return {"version": 1, "seed": config.seed} | {part: sorted(parts[part]) for part in PARTS}


def write_split(split: dict, path) -> None:
    """Write as JSON, atomically."""
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(split, indent=1) + "\n")


def read_split(path, cases: list[Case]) -> dict:
    """A split from its file. Raises ValueError naming the patients that are in two parts, twice in one, or not among `cases`."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"split.file must be a split written by this program, got {path} (no such file)")
    try:
        split = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"split.file must hold JSON, got {path}: {error}") from error
    if not isinstance(split, dict) or split.get("version") != 1 or any(not isinstance(split.get(part), list) for part in PARTS):
        raise ValueError(f'split.file must hold {{"version": 1, "pretrain": [...], "val": [...], "test": [...]}}, got {path}')
    everyone = [patient for part in PARTS for patient in split[part]]
    twice = sorted({p for p in everyone if everyone.count(p) > 1})
    if twice:
        raise ValueError(f"a patient must be in one part of the split only, got {', '.join(twice)} more than once in {path}")
    unknown = sorted(set(everyone) - {case.patient for case in cases})
    if unknown:
        raise ValueError(f"patients of the split must be in the data, got unknown {', '.join(unknown)} in {path}")
    return split


def labelled_patients(split: dict, cases: list[Case], n: int, seed: int) -> list[str]:
    """The n patients of "pretrain" whose labels may be used: one of each disease group first, nested in n for one seed.

    Raises ValueError when fewer than n patients have labels.
    """
    with_labels = {case.patient for case in cases if case.label is not None}
    pool = [case for case in cases if case.patient in with_labels & set(split["pretrain"])]
    order = _balanced_order(_groups(pool), seed)
    if not 1 <= n <= len(order):
        raise ValueError(f"labelled patients must number 1 to {len(order)} (those with labels in the split's pretrain part), got {n}")
    return order[:n]


def _groups(cases: list[Case]) -> dict[str, str]:
    first = {}
    for case in cases:
        first.setdefault(case.patient, case)
    return {patient: disease_group(case) or "" for patient, case in first.items()}


def _balanced_order(groups: dict[str, str], seed: int) -> list[str]:
    """Patients in an order of which every prefix holds the groups in about their share of the whole."""
    rng = np.random.default_rng(seed)
    members = defaultdict(list)
    for patient in sorted(groups):
        members[groups[patient]].append(patient)
    place = {}
    for group in sorted(members):
        for rank, index in enumerate(rng.permutation(len(members[group]))):
            place[members[group][index]] = ((rank + 0.5) / len(members[group]), rng.random())
    return sorted(place, key=place.get)
