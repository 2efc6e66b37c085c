"""Who trains and who tests: splits by patient, balanced over disease groups, written to a file that later commands read."""

import csv
import hashlib
import itertools
import json
import logging
import re
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np

from pix2rep.checkpoint import atomic
from pix2rep.config import SplitConfig
from pix2rep.data.cache import PreparedCase
from pix2rep.data.discover import Case, disease_group

log = logging.getLogger(__name__)

PARTS = ("pretrain", "val", "test")
# Of the official 100 training patients of ACDC (Bernard et al. 2018), twenty a group in this order; copies often lack the Info.cfg that says so.
ACDC_GROUPS = ("DCM", "HCM", "MINF", "NOR", "RV")


def make_split(cases: list[Case], config: SplitConfig) -> dict:
    """{"version": 1, "seed": s, "pretrain": [...], "val": [...], "test": [...]}, sorted patient names.

    `cases` are Case or PreparedCase. "pretrain" is also the pool of the labelled patients: pre-training sees its images only.
    Disease groups are spread evenly: those of `config.groups`, else of Info.cfg. Patients of `config.exclude` are left out at the end.
    Raises ValueError for shares that leave nobody to pre-train on, or when there are too few patients for the parts asked for.
    """
    if not (0 <= config.val < 1 and 0 <= config.test < 1 and config.val + config.test < 1):
        raise ValueError(f"split.val and split.test must be shares in [0, 1) with a sum below 1, got {config.val} and {config.test}")
    groups = _groups(cases, config.groups)
    order = _balanced_order(groups, config.seed)
    test, val = (max(1, round(share * len(order))) if share else 0 for share in (config.test, config.val))
    if len(order) < test + val + 1:
        raise ValueError(f"the split needs at least {test + val + 1} patients (test {test}, val {val}, pretrain 1), got {len(order)}")
    if unknown := sorted(set(config.exclude) - set(order)):
        raise ValueError(f"split.exclude must name patients of the data, got {', '.join(unknown)}")
    parts = {"pretrain": order[test + val :], "val": order[test : test + val], "test": order[:test]}
    parts = {part: [patient for patient in own if patient not in config.exclude] for part, own in parts.items()}
    if not parts["pretrain"]:
        raise ValueError(f"split.exclude must leave a patient to pre-train on, got {', '.join(config.exclude)}")
    known = {patient: group for patient, group in sorted(groups.items()) if group}
    return {"version": 1, "seed": config.seed} | {part: sorted(parts[part]) for part in PARTS} | ({"groups": known} if known else {})


def shared_images(cases: list[PreparedCase], split: dict) -> list[tuple[str, str]]:
    """Pairs of patients in different parts of the split who have an image in common: what one part learns, the other is tested on.

    Images are one when their shapes and middle slices are, bit for bit.
    """
    part_of = {patient: part for part in PARTS for patient in split[part]}
    owners = defaultdict(set)
    for case in cases:
        if case.patient in part_of:
            image = case.image()
            owners[image.shape, hashlib.blake2b(image[len(image) // 2].tobytes()).digest()].add(case.patient)
    pairs = {pair for own in owners.values() for pair in itertools.combinations(sorted(own), 2)}
    return sorted((a, b) for a, b in pairs if part_of[a] != part_of[b])


def warn_of_shared_images(cases: list[PreparedCase], split: dict) -> None:
    """Log a warning for every pair of `shared_images`."""
    part_of = {patient: part for part in PARTS for patient in split[part]}
    for a, b in shared_images(cases, split):
        log.warning("%s (%s) and %s (%s) have the same image: leave one out with split.exclude", a, part_of[a], b, part_of[b])


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
    twice = sorted(patient for patient, times in Counter(everyone).items() if times > 1)
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
    groups = _groups(pool)
    order = _balanced_order(groups | {p: group for p, group in split.get("groups", {}).items() if p in groups}, seed)
    if not 1 <= n <= len(order):
        raise ValueError(f"labelled patients must number 1 to {len(order)} (those with labels in the split's pretrain part), got {n}")
    return order[:n]


def _groups(cases: list[Case], source: str | None = None) -> dict[str, str]:
    first = {}
    for case in cases:
        first.setdefault(case.patient, case)
    if source is None:
        return {patient: disease_group(case) or "" for patient, case in first.items()}
    listed = _acdc_groups(first) if source == "acdc" else _read_groups(source)
    missing = sorted(first.keys() - listed.keys())
    if missing:
        raise ValueError(f"split.groups must name every patient, got none for {len(missing)} of {len(first)} in {source}, first {missing[0]}")
    return {patient: listed[patient] for patient in first}


def _acdc_groups(patients) -> dict[str, str]:
    numbers = {patient: int(found[1]) for patient in patients if (found := re.fullmatch(r"patient(\d+)", patient))}
    return {patient: ACDC_GROUPS[(number - 1) // 20] for patient, number in numbers.items() if 1 <= number <= 100}


def _read_groups(file: str) -> dict[str, str]:
    try:
        with open(file, newline="", encoding="utf-8") as lines:
            rows = list(csv.DictReader(lines))
    except OSError as error:
        raise ValueError(f'split.groups must be "acdc" or a CSV file with the columns patient and group, got {file} ({error})') from error
    if not rows or not {"patient", "group"} <= rows[0].keys():
        raise ValueError(f"split.groups must be a CSV file with the columns patient and group, got {file}")
    return {row["patient"]: row["group"] for row in rows}


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
