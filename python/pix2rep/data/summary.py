"""What a scanned folder holds, in numbers: counts, distributions with their outliers, labels, duplicates."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable

import numpy as np

from pix2rep.data.discover import disease_group

AXES = ("x", "y", "z")
FENCES = 3.0  # interquartile ranges beyond the quartiles: Tukey's "far out"
RARE = 0.05  # an orientation or type that fewer volumes share is named
MODES = 3


def summarise(scan) -> dict:
    """A `Scan` as one JSON object.

    counts: patients, volumes, frames, labelled, unlabelled, unlabelled_patients, groups (patients a disease group), voxels, unusable (cases).
    distributions: "shape x" (voxels), "spacing x" (mm), "p1", "p99" (the file's intensity units): {"min", "q1", "median", "q3", "max", "modes":
    [[value, volumes], ...], "outliers": [{"case", "value"}, ...] farthest first}.
    categories: "orientation", "dtype": {"counts": {code: volumes}, "rare": [{"case", "value"}, ...]}.
    labels: [{"value", "name", "volumes", "voxels": {"min", "median", "max"}, "ml": the same or null}], voxels and ml over the volumes that
    contain the label; the background is left out. duplicates: [[case, ...], ...], images that are the same. volumes, problems: one entry each.
    """
    volumes = scan.volumes
    lost = spacing_lost(volumes)
    return {
        "version": 1,
        "root": str(scan.root),
        "layout": layout(scan),
        "classes": list(scan.classes),
        "seconds": round(scan.seconds, 3),
        "from_cache": scan.from_cache,
        "counts": _counts(volumes) | {"unusable": len({p.case for p in scan.problems})},
        "spacing_lost": lost,
        "distributions": _distributions(volumes),
        "categories": {name: _category(volumes, name) for name in ("orientation", "dtype")},
        "labels": _labels(volumes, scan.classes, lost),
        "duplicates": [[v.case.id for v in group] for group in duplicates(volumes)],
        "volumes": [_volume(v) for v in volumes],
        "problems": [{"case": p.case, "path": str(p.path), "reason": p.reason} for p in scan.problems],
    }


def layout(scan) -> str:
    """"ACDC", "imagesTr/labelsTr" or "any folder": how `discover` read it."""
    ids = [v.case.id for v in scan.volumes] or [p.case for p in scan.problems]
    if any(name.startswith("patient") and "_frame" in name for name in ids):
        return "ACDC"
    return "imagesTr/labelsTr" if (scan.root / "imagesTr").is_dir() else "any folder"


def unit_spacing(volume) -> bool:
    """Exactly 1 x 1 x 1 mm: resampled to that, or what a converter writes that knows none."""
    return all(abs(s - 1) < 1e-6 for s in volume.spacing)


def spacing_lost(volumes) -> bool:
    """Whether every volume says 1 x 1 x 1 mm and yet is a flat stack, less than a quarter as thick as it is wide: no isotropic scan."""
    if not volumes or not all(unit_spacing(v) for v in volumes):
        return False
    return float(np.median([min(v.shape) / max(v.shape) for v in volumes])) < 0.25


def spread(values: Iterable[float]) -> dict:
    low, median, high = np.percentile(np.asarray(list(values), np.float64), [0, 50, 100])
    return {"min": number(low), "median": number(median), "max": number(high)}


def number(value: float) -> float | int:
    """At most six significant digits (headers store float32: 1.5625 reads 1.56250001), whole ones as int."""
    value = float(value) if abs(value) >= 1e6 else float(f"{value:.6g}")
    return round(value) if abs(value) >= 1e6 or value == round(value) else value


def far_out(volumes, values: np.ndarray) -> list:
    """(volume, value) of the volumes beyond Tukey's outer fences, farthest from the median first."""
    q1, median, q3 = np.percentile(values, [25, 50, 75])
    reach = FENCES * (q3 - q1) + 0.01 * abs(median)  # headers differ by roundings: with equal quartiles one per cent is not far
    out = np.flatnonzero((values < q1 - reach) | (values > q3 + reach))
    return [(volumes[i], values[i]) for i in out[np.argsort(-np.abs(values[out] - median), kind="stable")]]


def duplicates(volumes) -> list[list]:
    """Groups of volumes with one shape, one thumbnail and one intensity range: the same image under several names."""
    groups = defaultdict(list)
    for v in volumes:
        if v.low < v.high:  # of one value throughout, all would be alike
            groups[v.shape, v.low, v.high, v.p1, v.p99, v.thumbnail.tobytes()].append(v)
    return [group for group in groups.values() if len(group) > 1]


def headline(problem) -> str:
    """The reason without its path and its values: what problems have in common."""
    return re.split(r", got | \(", bare(problem), maxsplit=1)[0]


def bare(problem) -> str:
    """The reason without its path."""
    return problem.reason.removeprefix(f"{problem.path}: ")


def legible(text: str) -> str:
    """Text with what is no UTF-8 in the name of a file replaced."""
    return text.encode(errors="surrogateescape").decode(errors="replace")


def by_reason(problems) -> dict[str, list]:
    """Problems by `headline`, the most frequent first. Those that differ in numbers alone are one, the numbers given as ellipses."""
    groups = defaultdict(list)
    for problem in problems:
        groups[re.sub(r"\d[\d.]*", "...", headline(problem))].append(problem)
    ordered = sorted(groups.items(), key=lambda item: -len(item[1]))
    return {headings.pop() if len(headings := {headline(p) for p in group}) == 1 else common: group for common, group in ordered}


def _counts(volumes) -> dict:
    first = {}
    for v in volumes:
        first.setdefault(v.case.patient, v.case)
    labelled = {v.case.patient for v in volumes if v.labels is not None}
    groups = Counter(group for group in map(disease_group, first.values()) if group)
    return {
        "patients": len(first),
        "volumes": len(volumes),
        "frames": dict(sorted(Counter(v.case.frame for v in volumes if v.case.frame).items())),
        "labelled": sum(v.labels is not None for v in volumes),
        "unlabelled": sum(v.labels is None for v in volumes),
        "unlabelled_patients": sorted(first.keys() - labelled),
        "groups": dict(sorted(groups.items())),
        "voxels": sum(int(np.prod(v.shape, dtype=np.int64)) for v in volumes),
    }


def _distributions(volumes) -> dict:
    if not volumes:
        return {}
    columns = {f"shape {a}": [v.shape[k] for v in volumes] for k, a in enumerate(AXES)}
    columns |= {f"spacing {a}": [v.spacing[k] for v in volumes] for k, a in enumerate(AXES)}
    columns |= {name: [getattr(v, name) for v in volumes] for name in ("p1", "p99")}
    return {name: _distribution(volumes, np.asarray(values, np.float64)) for name, values in columns.items()}


def _distribution(volumes, values: np.ndarray) -> dict:
    quartiles = dict(zip(("min", "q1", "median", "q3", "max"), map(number, np.percentile(values, [0, 25, 50, 75, 100])), strict=True))
    modes = Counter(float(f"{value:.4g}") for value in values).most_common(MODES)
    outliers = [{"case": v.case.id, "value": number(value)} for v, value in far_out(volumes, values)]
    return quartiles | {"modes": [[number(value), count] for value, count in modes], "outliers": outliers}


def _category(volumes, name: str) -> dict:
    counts = Counter(getattr(v, name) for v in volumes)
    scarce = {value for value, count in counts.items() if count < RARE * len(volumes)}
    rare = [{"case": v.case.id, "value": getattr(v, name)} for v in volumes if getattr(v, name) in scarce]
    return {"counts": dict(counts.most_common()), "rare": rare}


def _labels(volumes, classes: tuple[str, ...], lost: bool) -> list[dict]:
    labelled = [v for v in volumes if v.labels is not None]
    unit = {v.case.id: float(np.prod(v.spacing)) / 1000 for v in labelled}  # ml of a voxel
    values = {k for v in labelled for k, count in v.labels.items() if k and count}
    rows = []
    for k in sorted(values | set(range(1, len(classes) + 1)) if labelled else ()):
        having = [v for v in labelled if v.labels.get(k)]
        voxels = [v.labels[k] for v in having]
        ml = [n * unit[v.case.id] for n, v in zip(voxels, having, strict=True)]
        rows.append({
            "value": k,
            "name": classes[k - 1] if k <= len(classes) else str(k),
            "volumes": len(having),
            "voxels": spread(voxels) if having else None,
            "ml": spread(ml) if having and not lost else None,
        })  # fmt: skip
    return rows


def _volume(v) -> dict:
    return {
        "case": v.case.id,
        "patient": v.case.patient,
        "frame": v.case.frame,
        "image": str(v.case.image),
        "label": None if v.case.label is None else str(v.case.label),
        "shape": [int(n) for n in v.shape],
        "spacing": [number(s) for s in v.spacing],
        "orientation": v.orientation,
        "dtype": str(v.dtype),
        **{name: number(getattr(v, name)) for name in ("low", "high", "p1", "p99")},
        "labels": None if v.labels is None else {str(k): int(n) for k, n in sorted(v.labels.items())},
    }
