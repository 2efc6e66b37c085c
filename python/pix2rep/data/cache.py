"""Prepared volumes: clipped, scaled to [0, 1], in [Z, H, W], one memory-mapped .npy a case."""

import hashlib
import json
import logging
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path

import numpy as np

from pix2rep.checkpoint import atomic
from pix2rep.config import DataConfig
from pix2rep.data.arrays import crop_or_pad, label_box, nearest, resize, scale, uncrop
from pix2rep.data.discover import Case, class_names
from pix2rep.data.nifti import VolumeError
from pix2rep.data.pair import Pair, count, read_pair, stamp, unnamed
from pix2rep.data.parallel import in_order
from pix2rep.data.problems import BadVolumes, Problem, listed

__all__ = ["Prepared", "PreparedCase", "crop_or_pad", "load", "prepare", "uncrop"]

log = logging.getLogger(__name__)

_VERSION = 2  # raise it when prepared files change meaning


@dataclass(frozen=True)
class PreparedCase:
    """One prepared volume; arrays are [Z, H, W] with H = Y and W = X of the canonical (RAS+) axes."""

    id: str
    patient: str
    frame: str | None
    source: Path  # the NIfTI it came from
    image_file: Path  # .npy [Z, H, W] float16 in [0, 1]
    label_file: Path | None  # .npy [Z, H, W] uint8
    shape: tuple[int, int, int]  # prepared
    spacing: tuple[float, float, float]  # mm along Z, H, W, prepared
    affine: tuple[tuple[float, ...], ...]  # 4x4, canonical voxel [X, Y, Z] of the whole source -> mm
    native_shape: tuple[int, int, int]  # [Z, H, W] of the whole source
    crop: tuple[tuple[int, int], ...]  # half-open ranges of Z, H, W kept from it
    classes: tuple[int, ...]  # labels > 0 that occur

    @property
    def label(self) -> Path | None:
        """As `Case.label`: None when there are no labels."""
        return self.label_file

    def image(self) -> np.ndarray:
        """[Z, H, W] float16 in [0, 1], memory-mapped read-only. Raises VolumeError for a file that is no longer what was prepared."""
        return _open(self.image_file, self.shape, np.float16)

    def labels(self) -> np.ndarray:
        """[Z, H, W] uint8, memory-mapped read-only. Raises ValueError for a case without labels, VolumeError as `image`."""
        if self.label_file is None:
            raise ValueError(f"case must have labels, got {self.id} without")
        return _open(self.label_file, self.shape, np.uint8)

    def restore(self, labels: np.ndarray) -> np.ndarray:
        """Labels [Z, H, W] of the prepared shape at the whole source's shape (nearest neighbour, 0 outside the crop)."""
        if tuple(labels.shape) != self.shape:
            raise ValueError(f"labels of {self.id} must have the prepared shape {list(self.shape)}, got {list(labels.shape)}")
        whole = np.zeros(self.native_shape, dtype=labels.dtype)
        taken = np.ix_(*(nearest(n, stop - start) for n, (start, stop) in zip(labels.shape, self.crop, strict=True)))
        whole[tuple(slice(*ends) for ends in self.crop)] = labels[taken]
        return whole


@dataclass(frozen=True)
class Prepared:
    """A data set on disk, ready to be read in slices."""

    folder: Path
    cases: list[PreparedCase]
    problems: list[Problem] = field(default_factory=list)  # files whose cases were left out

    @cached_property
    def by_id(self) -> dict[str, PreparedCase]:
        return {case.id: case for case in self.cases}

    @property
    def skipped(self) -> list[tuple[str, str]]:
        """(case id, path and reason) of every problem."""
        return [(problem.case, str(problem)) for problem in self.problems]

    @property
    def skipped_ids(self) -> list[str]:
        """Cases left out, each once, in order."""
        return list(dict.fromkeys(problem.case for problem in self.problems))

    @property
    def patients(self) -> list[str]:
        return sorted({case.patient for case in self.cases})

    @property
    def num_classes(self) -> int:
        """K: labels run over 0..K, 0 the background."""
        return max((max(case.classes, default=0) for case in self.cases), default=0)


def prepare(
    cases: list[Case], config: DataConfig, folder, progress: Callable[[int, int], None] | None = None, workers: int | None = None
) -> Prepared:
    """Prepare every case into `folder`, by `workers` threads (default: one a processor, at most 8), reusing what is there and still valid.

    A file is valid for the path, size and time of its sources and the options that shape it (spacing, percentiles, window, roi, roi_margin,
    label_affine). `progress(done, total)` is called after every case.

    Raises BadVolumes, a ValueError, that names every file that cannot be used. With data.skip_bad their cases are left out instead: they
    are logged and stand in `problems` and index.json. Raises ValueError when no case is left.
    """
    _check(config)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    names = tuple(config.classes) or (class_names(config.root) if config.root else ())
    prepared, problems = [], []
    for done, (case, made) in enumerate(zip(cases, in_order(lambda case: _one(case, config, folder), cases, workers), strict=True), 1):
        if isinstance(made, PreparedCase):
            strange = unnamed(case, made.classes, names)
            made = (strange,) if strange else made
        if isinstance(made, PreparedCase):
            prepared.append(made)
        else:
            problems += made
        if progress:
            progress(done, len(cases))
    if problems and not config.skip_bad:
        raise BadVolumes(problems, len(cases))
    for problem in problems:
        log.warning("skipped %s: %s", problem.case, problem)
    if not prepared:
        raise ValueError(f"data.root must hold at least one usable volume, got 0 of {len(cases)}\n{listed(problems)}".rstrip())
    rows = [[problem.case, str(problem.path), problem.reason] for problem in problems]
    with atomic(folder / "index.json") as temporary:
        temporary.write_text(json.dumps({"version": _VERSION, "cases": [_to_json(case) for case in prepared], "skipped": rows}, indent=1))
    return Prepared(folder, prepared, problems)


def load(folder) -> Prepared:
    """What the last `prepare` into `folder` made, from its index.json."""
    folder = Path(folder)
    index = json.loads((folder / "index.json").read_text())
    if index["version"] != _VERSION:
        raise ValueError(f"{folder / 'index.json'} must have version {_VERSION}, got {index['version']}; prepare the data again")
    problems = [Problem(case, Path(path), reason) for case, path, reason in index["skipped"]]
    return Prepared(folder, [_from_json(entry, folder) for entry in index["cases"]], problems)


def _one(case: Case, config: DataConfig, folder: Path) -> PreparedCase | tuple[Problem, ...]:
    name = f"{case.id}-{_key(case, config)}"
    meta = folder / f"{name}.json"
    found = _kept(meta, folder)
    if found:
        return found
    pair = read_pair(case, config.label_affine)
    if pair.problems:
        return pair.problems
    try:
        found = _shape(case, pair, config, folder / name)
    except VolumeError as error:
        return (Problem.of(case.id, error),)
    with atomic(meta) as temporary:  # last: it marks the case as complete
        temporary.write_text(json.dumps(_to_json(found)))
    return found


def _kept(meta: Path, folder: Path) -> PreparedCase | None:
    """What `meta` describes, if its arrays are there and as it says; None for what must be made again."""
    if not meta.is_file():
        return None
    try:
        found = _from_json(json.loads(meta.read_text()), folder)
        found.image()
        if found.label_file is not None:
            found.labels()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        log.info("%s is prepared again: %s", meta, error)
        return None
    return found


def _shape(case: Case, pair: Pair, config: DataConfig, stem: Path) -> PreparedCase:
    image = pair.image.array.transpose(2, 1, 0)  # [Z, H, W]
    labels = pair.labels and pair.labels.array.transpose(2, 1, 0)
    native = image.shape
    crop = tuple((0, n) for n in native)
    if config.roi == "gt":
        crop = label_box(case, labels, config.roi_margin)
        window = tuple(slice(*pair) for pair in crop)
        image, labels = image[window], labels[window]
    image = scale(case.image, image, config.percentiles, config.window)
    spacing = pair.image.spacing[::-1]
    if config.spacing is not None:
        kept = 3 - len(config.spacing)  # two entries leave the distance of slices
        before = image.shape
        after = before[:kept] + tuple(max(1, round(n * s / t)) for n, s, t in zip(before[kept:], spacing[kept:], config.spacing, strict=True))
        spacing = spacing[:kept] + tuple(s * n / m for s, n, m in zip(spacing[kept:], before[kept:], after[kept:], strict=True))
        image = resize(image, after)
        if labels is not None:
            labels = labels[np.ix_(*map(nearest, before, after))]
    image_file, label_file = Path(f"{stem}.image.npy"), None
    _save(image.astype(np.float16), image_file)
    classes = ()
    if labels is not None:
        label_file = Path(f"{stem}.label.npy")
        _save(labels, label_file)
        classes = tuple(k for k in count(labels.transpose(2, 1, 0)) if k)
    affine = tuple(tuple(float(x) for x in row) for row in pair.image.affine)
    return PreparedCase(
        case.id, case.patient, case.frame, case.image, image_file, label_file, image.shape, spacing, affine, native, crop, classes
    )


def _check(config: DataConfig) -> None:
    low, high = config.percentiles
    if not 0 <= low < high <= 100:
        raise ValueError(f"data.percentiles must be 0 <= low < high <= 100, got {tuple(config.percentiles)}")
    if config.roi not in ("centre", "gt"):
        raise ValueError(f'data.roi must be "centre" or "gt", got {config.roi!r}')
    if config.roi_margin < 0:
        raise ValueError(f"data.roi_margin must be at least 0 pixels, got {config.roi_margin}")
    if config.window is not None and not config.window[0] < config.window[1]:
        raise ValueError(f"data.window must be LOW,HIGH with LOW < HIGH or null, got {tuple(config.window)}")
    if config.spacing is not None and (len(config.spacing) not in (2, 3) or min(config.spacing) <= 0):
        raise ValueError(f"data.spacing must be two positive numbers (mm along H, W), three (Z, H, W) or null, got {config.spacing}")


def _key(case: Case, config: DataConfig) -> str:
    files = [(os.path.realpath(path), stamp(path)) for path in (case.image, case.label) if path is not None]
    options = {name: asdict(config)[name] for name in ("spacing", "percentiles", "roi", "roi_margin", "label_affine")}
    if config.window is not None:  # files prepared before it existed stay valid
        options["window"] = config.window
    identity = json.dumps([_VERSION, case.patient, case.frame, files, options], default=list)
    return hashlib.sha256(identity.encode()).hexdigest()[:12]


def _open(path: Path, shape: tuple[int, ...], dtype) -> np.ndarray:
    """A prepared array, memory-mapped read-only, if it is what was written."""
    try:
        array = np.load(path, mmap_mode="r")
        got = f"{array.dtype} {list(array.shape)}"
        if array.dtype == dtype and array.shape == shape:
            return array
    except (OSError, ValueError, EOFError, AttributeError) as error:  # an .npz or nothing that NumPy knows has neither dtype nor shape
        got = str(error)
    raise VolumeError(path, f"must be a prepared volume, {np.dtype(dtype)} {list(shape)}, got {got}; start the command again to prepare it anew")


def _save(array: np.ndarray, path: Path) -> None:
    with atomic(path) as temporary:
        np.save(temporary, np.ascontiguousarray(array))


def _to_json(case: PreparedCase) -> dict:
    entry = asdict(case) | {"source": str(case.source), "image_file": case.image_file.name}
    return entry | {"label_file": None if case.label_file is None else case.label_file.name}


def _from_json(entry: dict, folder: Path) -> PreparedCase:
    entry = {f.name: _tuple(entry[f.name]) for f in fields(PreparedCase)}
    files = {"source": Path(entry["source"]), "image_file": folder / entry["image_file"]}
    files["label_file"] = None if entry["label_file"] is None else folder / entry["label_file"]
    return PreparedCase(**entry | files)


def _tuple(value):
    return tuple(_tuple(v) for v in value) if isinstance(value, list) else value
