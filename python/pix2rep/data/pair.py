"""An image and its labels, read and checked together."""

from dataclasses import dataclass

import nibabel as nib
import numpy as np

from pix2rep.data.discover import Case
from pix2rep.data.nifti import Volume, VolumeError, read, read_label_volume, read_labels
from pix2rep.data.problems import Problem

# Beyond half a voxel a label's centre is nearest to another voxel of the image than the one it is taken for.
TOLERANCE = 0.5


@dataclass(frozen=True)
class Pair:
    """A case's image and labels on one grid (`labels` None for a case without), or what is wrong with either file."""

    image: Volume | None
    labels: Volume | None
    problems: tuple[Problem, ...]


def read_pair(case: Case, label_affine: str = "check") -> Pair:
    """Read a case. With label_affine="ignore" the labels' voxels are taken in the order of the image's, whatever their header says."""
    image = labels = None
    problems = []
    stamps = stamp(case.image), stamp(case.label)
    try:
        image = read(case.image)
    except VolumeError as error:
        problems.append(Problem.of(case.id, error))
    try:
        if case.label is not None:
            labels = read_label_volume(case.label, image.orientation if image and label_affine == "ignore" else None)
            if image:
                _compare(image, labels, label_affine)
    except VolumeError as error:
        problems.append(Problem.of(case.id, error))
    for path, before in zip((case.image, case.label), stamps, strict=True):
        if before and stamp(path) != before:
            problems.append(Problem(case.id, path, "must not change while it is read, got another size or time afterwards"))
    return Pair(None, None, tuple(problems)) if problems else Pair(image, labels, ())


def read_truth(case: Case, label_affine: str = "check") -> np.ndarray:
    """Labels of a case's own file, uint8 [Z, H, W] in canonical axes. Raises VolumeError."""
    orientation = "".join(nib.aff2axcodes(nib.load(case.image).affine)) if label_affine == "ignore" else None
    return read_labels(case.label, orientation).transpose(2, 1, 0)


def count(labels: np.ndarray) -> dict[int, int]:
    """{label: voxels} of those that occur in uint8 [X, Y, Z], in order."""
    counts = sum(np.bincount(slab.ravel(), minlength=256) for slab in labels.T)  # slabs: bincount makes 8 bytes of each
    return {int(k): int(counts[k]) for k in np.flatnonzero(counts)}


def unnamed(case: Case, found, names: tuple[str, ...]) -> Problem | None:
    """The problem of a case whose labels `found` exceed the classes that `names` gives (none: any label may occur)."""
    strange = [str(k) for k in found if k > len(names)]
    if not names or not strange:
        return None
    return Problem(
        case.id, case.label, f"labels must be 0..{len(names)} ({', '.join(names)}; data.classes or dataset.json), got {', '.join(strange)}"
    )


def stamp(path) -> tuple[int, int] | None:
    """(size, time in ns) of a file, None where there is none."""
    try:
        stat = path.stat() if path is not None else None
    except OSError:
        return None
    return stat and (stat.st_size, stat.st_mtime_ns)


def _compare(image: Volume, labels: Volume, label_affine: str) -> None:
    if labels.array.shape != image.array.shape:
        shapes = (list(volume.array.shape) for volume in (image, labels))
        raise VolumeError(labels.path, "labels must have the image's shape {} (X, Y, Z), got {}".format(*shapes))
    if label_affine == "ignore":
        return
    corners = np.array(np.meshgrid(*((0, n - 1) for n in image.array.shape))).reshape(3, -1).T
    apart = nib.affines.apply_affine(labels.affine, corners) - nib.affines.apply_affine(image.affine, corners)  # [8, 3] mm
    voxels = np.abs(apart @ np.linalg.inv(image.affine[:3, :3]).T).max()
    if not voxels <= TOLERANCE:
        away = np.linalg.norm(apart, axis=1).max()
        raise VolumeError(
            labels.path,
            f"labels must lie on the image's grid, got voxel centres up to {away:.3g} mm ({voxels:.3g} voxels) apart; "
            "where headers are lost, data.label_affine=ignore trusts the order of voxels",
        )
