"""A look at every volume of a data set: what it is, what is wrong with it, and a thumbnail. Remembered, so that the next look is quick."""

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import numpy as np

from pix2rep.checkpoint import atomic
from pix2rep.data.discover import Case, class_names, discover
from pix2rep.data.pair import Pair, count, read_pair, stamp, unnamed
from pix2rep.data.parallel import in_order
from pix2rep.data.problems import Problem

__all__ = ["Problem", "Scan", "VolumeInfo", "scan"]

log = logging.getLogger(__name__)

_VERSION = 1  # raise it when what is remembered changes meaning
_THUMBNAIL = 96  # pixels, the longer side at most
_PICTURES = ("thumbnail", "thumbnail_labels")


@dataclass(frozen=True)
class VolumeInfo:
    """One usable case."""

    case: Case
    shape: tuple[int, int, int]  # X, Y, Z of the canonical (RAS+) axes
    spacing: tuple[float, float, float]  # mm along them
    orientation: str  # axis codes of the file itself, such as "LPS"
    dtype: str  # on disk, such as "int16"
    low: float  # intensities: smallest, largest
    high: float
    p1: float  # percentiles
    p99: float
    labels: dict[int, int] | None  # {label: voxels}, 0 included; None without labels
    thumbnail: np.ndarray = field(repr=False, compare=False)  # uint8 [h, w]: an axial slice, p1 black, p99 white, anterior up, right on the right
    thumbnail_labels: np.ndarray | None = field(repr=False, compare=False)  # uint8 [h, w] of the same slice


@dataclass
class Scan:
    """What `scan` found, in order of case ids."""

    root: Path
    volumes: list[VolumeInfo]
    problems: list[Problem]
    classes: tuple[str, ...]  # names of labels 1..K, where the data set gives any
    seconds: float
    from_cache: int  # cases that were not read again


def scan(
    root, cache: Path | None = None, workers: int | None = None, progress: Callable[[int, int], None] | None = None,
    *, classes: tuple[str, ...] = (), label_affine: str = "check",
) -> Scan:  # fmt: skip
    """Read every image and label below `root` once, by `workers` threads (default: one a processor, at most 8).

    cache: folder of what earlier scans found, valid for a case while path, size and time of its files stay; default: the user's cache folder
    (XDG_CACHE_HOME). progress(done, total) is called after every case. classes: names of labels, default those of the data set.
    label_affine: as data.label_affine.

    Raises what `discover` raises. A file that cannot be used is no error here: it is in `problems`.
    """
    began = time.perf_counter()
    root = Path(root)
    cases = discover(root)
    names = tuple(classes) or class_names(root)
    file = _cache_file(root, cache, label_affine)
    known = _remembered(file)

    def look(case: Case) -> tuple[str, VolumeInfo | tuple[Problem, ...]]:
        key = _key(case)  # before the file is read: should it change meanwhile, what is remembered does not fit it
        return key, replace(known[key], case=case) if key in known else _look(case, label_affine)

    found: dict[str, VolumeInfo] = {}
    problems: list[Problem] = []
    for done, (key, seen) in enumerate(in_order(look, cases, workers), 1):
        if isinstance(seen, VolumeInfo):
            found[key] = seen
        else:
            problems += seen
        if progress:
            progress(done, len(cases))
    if found.keys() != known.keys():
        _remember(file, found)
    volumes = []
    for info in found.values():
        strange = unnamed(info.case, info.labels or (), names)
        if strange:
            problems.append(strange)
        else:
            volumes.append(info)
    problems.sort(key=lambda problem: problem.case)
    return Scan(root, volumes, problems, names, time.perf_counter() - began, len(found.keys() & known.keys()))


def _look(case: Case, label_affine: str) -> VolumeInfo | tuple[Problem, ...]:
    pair: Pair = read_pair(case, label_affine)
    if pair.problems:
        return pair.problems
    image, labels = pair.image, pair.labels and pair.labels.array
    p1, p99 = (float(level) for level in np.percentile(image.array, (1, 99)))
    low, high = float(image.array.min()), float(image.array.max())
    middle = image.array.shape[2] // 2
    if labels is not None and labels.any():
        middle = int(np.argmax(np.count_nonzero(labels, axis=(0, 1))))
    black, white = (p1, p99) if p99 > p1 else (low, high)
    shown = ((_means(image.array[:, :, middle].T[::-1]) - black) / (white - black)).clip(0, 1)
    return VolumeInfo(
        case, image.array.shape, image.spacing, image.orientation, image.dtype, low, high, p1, p99,
        None if labels is None else count(labels),
        np.rint(255 * shown).astype(np.uint8),
        None if labels is None else _centres(labels[:, :, middle].T[::-1]),
    )  # fmt: skip


def _bounds(shape: tuple[int, int]) -> list[np.ndarray]:
    """For each axis the bounds of the cells, whole pixels, that a picture shows."""
    shrink = min(1, _THUMBNAIL / max(shape))
    cells = (max(1, round(n * shrink)) for n in shape)
    return [np.arange(m + 1) * n // m for n, m in zip(shape, cells, strict=True)]


def _means(image: np.ndarray) -> np.ndarray:
    """[H, W] as at most 96 x 96 means over cells."""
    rows, columns = _bounds(image.shape)
    sums = np.add.reduceat(np.add.reduceat(image.astype(np.float64), rows[:-1], 0), columns[:-1], 1)
    return sums / np.outer(np.diff(rows), np.diff(columns))


def _centres(labels: np.ndarray) -> np.ndarray:
    """[H, W] by the label at the centre of each of the cells of `_means`."""
    rows, columns = ((bounds[:-1] + bounds[1:]) // 2 for bounds in _bounds(labels.shape))
    return labels[np.ix_(rows, columns)]


def _key(case: Case) -> str:
    return json.dumps([(os.path.realpath(path), stamp(path)) for path in (case.image, case.label) if path is not None])


def _cache_file(root: Path, folder: Path | None, label_affine: str) -> Path:
    if folder is None:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pix2rep"
    name = hashlib.sha256(json.dumps([_VERSION, str(root.resolve()), label_affine]).encode()).hexdigest()[:16]
    return Path(folder) / f"scan-{name}.npz"


def _remember(file: Path, found: dict[str, VolumeInfo]) -> None:
    """One .npz: "entries", JSON as bytes, and "pixels", all pictures one after the other."""
    entries, pixels = [], [np.empty(0, np.uint8)]
    for key, info in found.items():
        pictures = [getattr(info, name) for name in _PICTURES]
        pixels += [picture.ravel() for picture in pictures if picture is not None]
        plain = {f.name: getattr(info, f.name) for f in fields(info) if f.name not in ("case", *_PICTURES)}
        entries.append([key, plain, [None if picture is None else picture.shape for picture in pictures]])
    try:
        with atomic(file) as temporary:
            text = np.frombuffer(json.dumps(entries).encode(), np.uint8)
            np.savez_compressed(temporary, entries=text, pixels=np.concatenate(pixels))
    except OSError as error:
        log.info("this scan is not remembered: %s", error)


def _remembered(file: Path) -> dict[str, VolumeInfo]:
    if not file.is_file():
        return {}
    try:
        with np.load(file, allow_pickle=False) as stored:
            entries, pixels = json.loads(stored["entries"].tobytes()), stored["pixels"]
        return dict(_entries(entries, pixels))
    except Exception as error:  # whatever is wrong with it, it can be made again
        log.info("%s is made again: %s", file, error)
        return {}


def _entries(entries: list, pixels: np.ndarray) -> Iterator[tuple[str, VolumeInfo]]:
    start = 0
    for key, plain, shapes in entries:
        pictures = []
        for shape in shapes:
            end = start + (0 if shape is None else shape[0] * shape[1])
            pictures.append(None if shape is None else pixels[start:end].reshape(shape))
            start = end
        labels = plain["labels"] and {int(k): n for k, n in plain["labels"].items()}
        whole = plain | {"shape": tuple(plain["shape"]), "spacing": tuple(plain["spacing"]), "labels": labels}
        yield key, VolumeInfo(case=None, **whole, **dict(zip(_PICTURES, pictures, strict=True)))
