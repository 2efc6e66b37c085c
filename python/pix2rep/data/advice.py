"""What in a scanned folder would go wrong in training, in words that say what to do."""

import numpy as np

from pix2rep.config import DataConfig
from pix2rep.data.summary import duplicates, unit_spacing

SPREAD = 1.1  # in-plane spacings that differ by more are worth resampling
CROPPED = 0.25  # the share of a slice below which the default crop is called small
HOUNSFIELD = (-4096, -500)  # where the least intensity of a CT lies: air, or a scanner's padding
UNITS = 3.0  # times that the volumes' 99th percentiles may differ before their units are called arbitrary
WRAPPED = 2**14  # int16 voxels beyond this on both sides of 0 were unsigned once
LISTED = 8  # labels that one line names
PARTS = 3  # a split needs a patient for each: pretrain, val, test


def advice(scan, summary: dict, data: DataConfig) -> list[dict]:
    """[{"about", "message", "cases"}]: what a person should know before training on a `Scan` with the options `data`; `summary` is that of
    `summarise`.
    """
    if not scan.volumes:
        return []
    found = []
    for check in (_spacing, _size, _intensity, _patients, _labels, _duplicates):
        for message, cases in check(scan.volumes, summary, data):
            found.append({"about": check.__name__[1:], "message": message, "cases": [v.case.id for v in cases]})
    return found


def _spacing(volumes, summary, data):
    bare = [v for v in volumes if unit_spacing(v)]
    if summary["spacing_lost"]:
        shape = " x ".join(str(round(float(n))) for n in np.median([v.shape for v in volumes], axis=0))
        yield (
            f"every volume says 1 x 1 x 1 mm and has about {shape} voxels: the header has lost the spacing. Nothing can be said in mm or ml,"
            " and HD95 will count voxels; restore it from the source if you can, and leave data.spacing at null", (),
        )  # fmt: skip
        return
    if len(bare) == len(volumes):
        yield "every volume says exactly 1 x 1 x 1 mm: resampled to that, or lost from the header; if lost, mm and ml mean nothing", ()
        return
    if bare:
        yield f"{len(bare)} of {len(volumes)} volumes say exactly 1 x 1 x 1 mm, the others do not: lost from these headers?", bare
    known = [v for v in volumes if not unit_spacing(v)]
    in_plane = np.array([v.spacing[:2] for v in known])
    if data.spacing is None and in_plane.max() > SPREAD * in_plane.min():
        height, width = np.median(in_plane[:, 1]), np.median(in_plane[:, 0])
        yield (
            f"in-plane spacing runs from {in_plane.min():.3g} to {in_plane.max():.3g} mm: set data.spacing={height:.3g},{width:.3g}"
            " (H, W; the medians), or one organ comes in many sizes", (),
        )  # fmt: skip


def _size(volumes, _, data):
    height, width = data.size[-2:]
    sizes = np.array([v.shape[1::-1] for v in volumes], np.float64)
    if data.spacing is not None:
        sizes = np.maximum(1, np.round(sizes * [v.spacing[1::-1] for v in volumes] / np.array(data.spacing[-2:])))
    small = [v for v, size in zip(volumes, sizes, strict=True) if (size < (height, width)).any()]
    given = ",".join(map(str, data.size))
    better = ",".join(str(int(-(-n // 16) * 16)) for n in np.median(sizes, axis=0))
    if small:
        many = f"{len(small)} of {len(volumes)}" if len(small) < len(volumes) else f"all {len(volumes)}"
        yield (
            f"{many} volumes are smaller in plane than data.size={given} and would be padded with zeros;"
            f" data.size={better} is the median's, in whole sixteens", small if len(small) < len(volumes) else (),
        )  # fmt: skip
    kept = np.median(np.minimum(sizes, (height, width)).prod(1) / sizes.prod(1))
    if kept < CROPPED and len(data.size) == 2:  # in 3D patches go everywhere
        yield f"the crop data.size={given} keeps {100 * kept:.0f} % of the median slice: enlarge it, or coarsen with data.spacing", ()


def _intensity(volumes, summary, _):
    low, high = HOUNSFIELD
    ct = [v for v in volumes if low <= v.low <= high]
    other = [v for v in volumes if not low <= v.low <= high]
    if ct and other:
        fewer, what = (ct, "look like") if len(ct) <= len(other) else (other, "do not look like")
        yield f"{len(fewer)} of {len(volumes)} volumes {what} Hounsfield units (CT), unlike the rest: two modalities in one folder?", fewer
    elif ct:
        yield "intensities look like Hounsfield units (CT); data.percentiles scales them volume by volume nevertheless", ()
    else:
        p99 = summary["distributions"]["p99"]
        if p99["min"] > 0 and p99["max"] > UNITS * p99["min"]:
            yield (
                f"intensities are in arbitrary units: the 99th percentile runs from {p99['min']:,.6g} to {p99['max']:,.6g}; pix2rep scales volume"
                " by volume, other programs must be told to", (),
            )  # fmt: skip
    wrapped = [v for v in volumes if str(v.dtype) == "int16" and v.low < -WRAPPED and v.high > WRAPPED]
    if wrapped:
        yield f"{len(wrapped)} of {len(volumes)} int16 volumes reach far to both sides of 0: unsigned numbers have wrapped around", wrapped


def _patients(volumes, summary, _):
    counts = summary["counts"]
    if counts["patients"] < PARTS:
        names = ", ".join(sorted({v.case.patient for v in volumes}))
        yield f"{counts['patients']} patients ({names}) are too few to split: {PARTS} are needed; one folder a patient tells them apart", ()
    if not counts["labelled"]:
        yield "no volume has labels: enough to pre-train on; probe and finetune need some", ()
    elif counts["unlabelled_patients"]:
        without = set(counts["unlabelled_patients"])
        first = {v.case.patient: v for v in reversed(volumes) if v.case.patient in without}
        yield f"{len(without)} of {counts['patients']} patients have no labels: they serve pre-training only", [first[p] for p in sorted(first)]


def _labels(volumes, summary, _):
    labelled = [v for v in volumes if v.labels is not None]
    empty = [v for v in labelled if not any(count for k, count in v.labels.items() if k)]
    if empty:
        yield f"{len(empty)} of {len(labelled)} labelled volumes have background alone", empty
    rows = summary["labels"]
    absent = [row for row in rows if 0 < row["volumes"] < len(labelled)]
    if absent:
        rarest = sorted(absent, key=lambda row: row["volumes"])
        counts = ", ".join(f"{_named(row)} from {len(labelled) - row['volumes']}" for row in rarest[:LISTED]) + _more(absent)
        lacking = [v for v in labelled if v not in empty and not all(v.labels.get(row["value"]) for row in absent)]
        yield (
            f"labels absent from some of {len(labelled)} labelled volumes: {counts}. Where an organ is in the image but was not contoured,"
            " training and Dice take it for background", lacking,
        )  # fmt: skip
    if never := [row for row in rows if not row["volumes"]]:
        yield f"labels named but found nowhere: {', '.join(map(_named, never[:LISTED]))}{_more(never)}", ()


def _duplicates(volumes, *_):
    across, within = [], []
    for group in duplicates(volumes):
        (across if len({v.case.patient for v in group}) > 1 else within).append(group)
    if across:
        pairs = "; ".join(" = ".join(v.case.id for v in group) for group in across[:3])
        differ = any(v.labels != group[0].labels for group in across for v in group)
        yield (
            f"one image under several patients would be in training and test at once: {pairs}{_more(across, 3)}"
            f"{' (with different labels)' if differ else ''}. Keep one of each, or join the patients", [v for group in across for v in group],
        )  # fmt: skip
    if within:
        pairs = "; ".join(" = ".join(v.case.id for v in group) for group in within[:3])
        yield f"one image several times within a patient: {pairs}{_more(within, 3)}", [v for group in within for v in group]


def _more(items: list, listed: int = LISTED) -> str:
    return f" and {len(items) - listed} more" if len(items) > listed else ""


def _named(row: dict) -> str:
    return f"{row['value']}" if row["name"] == str(row["value"]) else f"{row['value']} {row['name']}"
