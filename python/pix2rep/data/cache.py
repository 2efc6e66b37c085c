"""Prepared volumes: clipped, scaled to [0, 1], in [Z, H, W], one memory-mapped .npy a case."""

import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path

import numpy as np

from pix2rep.checkpoint import atomic
from pix2rep.config import DataConfig
from pix2rep.data.discover import Case
from pix2rep.data.nifti import Volume, VolumeError, read, read_labels

log = logging.getLogger(__name__)

_VERSION = 1  # raise it when prepared files change meaning


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
        """[Z, H, W] float16 in [0, 1], memory-mapped read-only."""
        return np.load(self.image_file, mmap_mode="r")

    def labels(self) -> np.ndarray:
        """[Z, H, W] uint8, memory-mapped read-only. Raises ValueError for a case without labels."""
        if self.label_file is None:
            raise ValueError(f"case must have labels, got {self.id} without")
        return np.load(self.label_file, mmap_mode="r")

    def restore(self, labels: np.ndarray) -> np.ndarray:
        """Labels [Z, H, W] of the prepared shape at the whole source's shape (nearest neighbour, 0 outside the crop)."""
        if tuple(labels.shape) != self.shape:
            raise ValueError(f"labels of {self.id} must have the prepared shape {list(self.shape)}, got {list(labels.shape)}")
        (z0, z1), (y0, y1), (x0, x1) = self.crop
        whole = np.zeros(self.native_shape, dtype=labels.dtype)
        rows, columns = _nearest(labels.shape[1], y1 - y0), _nearest(labels.shape[2], x1 - x0)
        whole[z0:z1, y0:y1, x0:x1] = labels[:, rows[:, None], columns]
        return whole


@dataclass(frozen=True)
class Prepared:
    """A data set on disk, ready to be read in slices."""

    folder: Path
    cases: list[PreparedCase]
    skipped: list[tuple[str, str]] = field(default_factory=list)  # (case id, reason)

    @cached_property
    def by_id(self) -> dict[str, PreparedCase]:
        return {case.id: case for case in self.cases}

    @property
    def patients(self) -> list[str]:
        return sorted({case.patient for case in self.cases})

    @property
    def num_classes(self) -> int:
        """K: labels run over 0..K, 0 the background."""
        return max((max(case.classes, default=0) for case in self.cases), default=0)


def prepare(cases: list[Case], config: DataConfig, folder, progress: Callable[[int, int], None] | None = None) -> Prepared:
    """Prepare every case into `folder`, reusing what is already there and still valid.

    A file is valid for the path, size and time of its sources and the options that shape it (spacing, percentiles, roi, roi_margin).
    A case that cannot be used is listed in `skipped` with its reason, logged, and written to index.json beside the others.
    `progress(done, total)` is called after every case. Raises ValueError when no case is left.
    """
    _check(config)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    prepared, skipped = [], []
    for done, case in enumerate(cases, 1):
        try:
            prepared.append(_one(case, config, folder))
        except VolumeError as error:
            skipped.append((case.id, str(error)))
            log.warning("skipped %s: %s", case.id, error)
        if progress:
            progress(done, len(cases))
    index = {"version": _VERSION, "cases": [_to_json(case) for case in prepared], "skipped": [list(pair) for pair in skipped]}
    with atomic(folder / "index.json") as temporary:
        temporary.write_text(json.dumps(index, indent=1))
    if not prepared:
        reason = f"; the first: {skipped[0][1]}" if skipped else ""
        raise ValueError(f"data.root must hold at least one usable volume, got 0 of {len(cases)}{reason}")
    return Prepared(folder, prepared, skipped)


def load(folder) -> Prepared:
    """What the last `prepare` into `folder` made, from its index.json."""
    folder = Path(folder)
    index = json.loads((folder / "index.json").read_text())
    if index["version"] != _VERSION:
        raise ValueError(f"{folder / 'index.json'} must have version {_VERSION}, got {index['version']}; prepare the data again")
    return Prepared(folder, [_from_json(entry, folder) for entry in index["cases"]], [tuple(pair) for pair in index["skipped"]])


def crop_or_pad(array: np.ndarray, size: tuple[int, ...], value: float = 0) -> np.ndarray:
    """Centre crop or pad of the last len(size) axes to `size`; odd differences leave the extra element at the end."""
    lead = array.ndim - len(size)
    if lead < 0:
        raise ValueError(f"size must have at most {array.ndim} entries, got {tuple(size)}")
    source, target = [slice(None)] * lead, [slice(None)] * lead
    for n, s in zip(array.shape[lead:], size, strict=True):
        cut, pad, kept = max(n - s, 0) // 2, max(s - n, 0) // 2, min(n, s)
        source.append(slice(cut, cut + kept))
        target.append(slice(pad, pad + kept))
    if all(n >= s for n, s in zip(array.shape[lead:], size, strict=True)):
        return array[tuple(source)]
    out = np.full(array.shape[:lead] + tuple(size), value, dtype=array.dtype)
    out[tuple(target)] = array[tuple(source)]
    return out


def uncrop(array: np.ndarray, shape: tuple[int, ...], value: float = 0) -> np.ndarray:
    """Inverse of `crop_or_pad`: back to `shape` on the last len(shape) axes, `value` where the crop had cut."""
    return crop_or_pad(array, shape, value)


def _one(case: Case, config: DataConfig, folder: Path) -> PreparedCase:
    name = f"{case.id}-{_key(case, config)}"
    meta = folder / f"{name}.json"
    if meta.is_file():
        entry = json.loads(meta.read_text())
        found = _from_json(entry, folder)
        if all(file is None or file.is_file() for file in (found.image_file, found.label_file)):
            return found
    volume = read(case.image)
    image = np.ascontiguousarray(volume.array.transpose(2, 1, 0))  # [Z, H, W]
    labels = None if case.label is None else np.ascontiguousarray(read_labels(case.label).transpose(2, 1, 0))
    if labels is not None and labels.shape != image.shape:
        raise VolumeError(f"{case.label}: labels must have the image's shape {list(image.shape)} (Z, H, W), got {list(labels.shape)}")
    found = _shape(case, volume, image, labels, config, folder / name)
    with atomic(meta) as temporary:  # last: it marks the case as complete
        temporary.write_text(json.dumps(_to_json(found)))
    return found


def _shape(case: Case, volume: Volume, image: np.ndarray, labels: np.ndarray | None, config: DataConfig, stem: Path) -> PreparedCase:
    native = image.shape
    crop = tuple((0, n) for n in native)
    if config.roi == "gt":
        crop = _label_box(case, labels, config.roi_margin)
        window = tuple(slice(*pair) for pair in crop)
        image, labels = image[window], labels[window]
    image = _scale(case, image, config.percentiles)
    spacing = volume.spacing[::-1]
    if config.spacing is not None:
        height, width = (max(1, round(n * s / t)) for n, s, t in zip(image.shape[1:], spacing[1:], config.spacing, strict=True))
        spacing = (spacing[0], spacing[1] * image.shape[1] / height, spacing[2] * image.shape[2] / width)
        image = _resize(image, (height, width))
        if labels is not None:
            labels = labels[:, _nearest(labels.shape[1], height)[:, None], _nearest(labels.shape[2], width)]
    image_file, label_file = Path(f"{stem}.image.npy"), None
    _save(image.astype(np.float16), image_file)
    classes = ()
    if labels is not None:
        label_file = Path(f"{stem}.label.npy")
        _save(labels, label_file)
        classes = tuple(int(k) for k in np.flatnonzero(np.bincount(labels.ravel(), minlength=1)) if k)
    affine = tuple(tuple(float(x) for x in row) for row in volume.affine)
    return PreparedCase(
        case.id, case.patient, case.frame, case.image, image_file, label_file, image.shape, spacing, affine, native, crop, classes
    )


def _scale(case: Case, image: np.ndarray, percentiles: tuple[float, float]) -> np.ndarray:
    low, high = np.percentile(image, percentiles)
    if not high > low:  # more than 98 % of one value, such as a small organ in air
        low, high = image.min(), image.max()
    if not high > low:
        raise VolumeError(f"{case.image}: intensities must vary, got {low:g} in every voxel")
    low, high = np.float64(low), np.float64(high)
    return ((np.clip(image, low, high) - low) / (high - low)).astype(np.float32)


def _label_box(case: Case, labels: np.ndarray | None, margin: int) -> tuple[tuple[int, int], ...]:
    if labels is None or not labels.any():
        raise VolumeError(f"{case.image}: data.roi=gt needs a label with foreground, got {case.label}")
    box = []
    for axis, extra in enumerate((0, margin, margin)):  # slices without foreground are dropped
        hit = np.flatnonzero(labels.any(axis=tuple(a for a in range(3) if a != axis)))
        box.append((max(0, int(hit[0]) - extra), min(labels.shape[axis], int(hit[-1]) + 1 + extra)))
    return tuple(box)


def _resize(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    import torch

    resized = torch.nn.functional.interpolate(torch.from_numpy(image)[:, None], size, mode="bilinear", align_corners=False, antialias=True)
    return resized[:, 0].numpy()


def _nearest(n: int, m: int) -> np.ndarray:
    """For each of m cells that cover n, the one whose centre is nearest."""
    return np.minimum(((np.arange(m) + 0.5) * n / m).astype(np.int64), n - 1)


def _check(config: DataConfig) -> None:
    low, high = config.percentiles
    if not 0 <= low < high <= 100:
        raise ValueError(f"data.percentiles must be 0 <= low < high <= 100, got {tuple(config.percentiles)}")
    if config.roi not in ("centre", "gt"):
        raise ValueError(f'data.roi must be "centre" or "gt", got {config.roi!r}')
    if config.roi_margin < 0:
        raise ValueError(f"data.roi_margin must be at least 0 pixels, got {config.roi_margin}")
    if config.spacing is not None and (len(config.spacing) != 2 or min(config.spacing) <= 0):
        raise ValueError(f"data.spacing must be two positive numbers (mm along H, W) or null, got {config.spacing}")


def _key(case: Case, config: DataConfig) -> str:
    files = []
    for path in (case.image, case.label):
        if path is not None:
            try:
                stat = path.stat()
            except OSError as error:
                raise VolumeError(f"{path}: cannot be read ({error})") from error
            files.append((str(path.resolve()), stat.st_size, stat.st_mtime_ns))
    options = {name: asdict(config)[name] for name in ("spacing", "percentiles", "roi", "roi_margin")}
    identity = json.dumps([_VERSION, case.patient, case.frame, files, options], default=list)
    return hashlib.sha256(identity.encode()).hexdigest()[:12]


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
