"""NIfTI in and out: volumes in canonical RAS+ axes, predictions back in the file's own."""

import gzip
import math
import zlib
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np

from pix2rep.checkpoint import atomic

# What nibabel and gzip raise on damaged files; HeaderDataError and ImageFileError are nibabel's own.
_READ_ERRORS = (OSError, EOFError, ValueError, zlib.error, nib.filebasedimages.ImageFileError, nib.spatialimages.HeaderDataError)


class VolumeError(ValueError):
    """A volume that cannot be used; the message names the file and the reason."""


@dataclass(frozen=True)
class Volume:
    """One image in canonical (RAS+) axes."""

    array: np.ndarray  # [X, Y, Z] float32, finite
    affine: np.ndarray  # [4, 4] float64: voxel -> mm, of the canonical array
    spacing: tuple[float, float, float]  # mm along X, Y, Z
    path: Path
    orientation: str  # axis codes of the file itself, such as "LPS"


def read(path) -> Volume:
    """Read a 3D image (a 2D one counts as one slice; trailing axes of length 1 are dropped).

    Raises VolumeError when the file is damaged, not three-dimensional, empty, or holds a non-finite voxel.
    """
    path = Path(path)
    array, affine, orientation = _canonical(path)
    array = np.ascontiguousarray(array, dtype=np.float32)
    bad = array.size - int(np.isfinite(array).sum())
    if bad:
        raise VolumeError(f"{path}: every voxel must be finite, got {bad} non-finite of {array.size}")
    spacing = tuple(float(s) for s in nib.affines.voxel_sizes(affine))
    if not all(math.isfinite(s) and s > 0 for s in spacing):
        raise VolumeError(f"{path}: voxel sizes must be positive, got {spacing}")
    return Volume(array, affine, spacing, path, orientation)


def read_labels(path) -> np.ndarray:
    """Labels [X, Y, Z] uint8 in canonical axes. Raises VolumeError for values that are not integers in 0..255."""
    path = Path(path)
    array, _, _ = _canonical(path)
    labels = np.rint(array) if array.dtype.kind == "f" else array
    if array.dtype.kind == "f" and not np.allclose(array, labels, rtol=0, atol=1e-3):
        raise VolumeError(f"{path}: labels must be integers, got fractional or non-finite values")
    low, high = labels.min(), labels.max()
    if low < 0 or high > 255:
        raise VolumeError(f"{path}: labels must lie in 0..255, got {low:g}..{high:g}")
    return np.ascontiguousarray(labels, dtype=np.uint8)


def save_like(labels: np.ndarray, case, path) -> Path:
    """Write labels [Z, H, W] as uint8 NIfTI in the orientation, affine and shape of the case's source image.

    `case` is a Case (labels in the source's canonical shape) or a PreparedCase (labels in its prepared shape, restored here).
    The file is written atomically; `.gz` compresses.
    """
    path = Path(path)
    if hasattr(case, "restore"):
        labels = case.restore(labels)
    source = nib.load(case.source)
    native = _shape3(case.source, source.shape)
    orientation = nib.io_orientation(source.affine)
    canonical = tuple(native[int(np.flatnonzero(orientation[:, 0] == axis)[0])] for axis in range(3))
    expected = canonical[::-1]
    if tuple(labels.shape) != expected:
        raise ValueError(f"labels must have shape [Z, H, W] = {list(expected)} like {case.source}, got {list(labels.shape)}")
    back = nib.orientations.ornt_transform([[0, 1], [1, 1], [2, 1]], orientation)
    array = nib.orientations.apply_orientation(np.asarray(labels, dtype=np.uint8).transpose(2, 1, 0), back)
    header = source.header.copy()
    header.set_data_dtype(np.uint8)
    header["cal_min"] = header["cal_max"] = 0
    image = nib.Nifti1Image(array.reshape(source.shape), source.affine, header)
    write(image, path)
    return path


def write(image: nib.Nifti1Image, path: Path) -> None:
    """Write atomically, the same bytes for the same image (no time stamp in the gzip header)."""
    data = image.to_bytes()
    with atomic(path) as temporary:
        temporary.write_bytes(gzip.compress(data, compresslevel=1, mtime=0) if path.suffix == ".gz" else data)


def _canonical(path: Path) -> tuple[np.ndarray, np.ndarray, str]:
    try:
        image = nib.load(path)
        shape = _shape3(path, image.shape)
        array = np.asanyarray(image.dataobj).reshape(shape)
    except VolumeError:
        raise
    except _READ_ERRORS as error:
        raise VolumeError(f"{path}: cannot be read as NIfTI ({type(error).__name__}: {error})") from error
    if array.dtype.kind not in "iuf":
        raise VolumeError(f"{path}: voxels must be real numbers, got {array.dtype}")
    if not np.isfinite(image.affine).all():
        raise VolumeError(f"{path}: the affine must be finite")
    orientation = nib.io_orientation(image.affine)
    if np.isnan(orientation).any():
        raise VolumeError(f"{path}: the affine must be invertible, got {image.affine.tolist()}")
    affine = image.affine @ nib.orientations.inv_ornt_aff(orientation, shape)
    return nib.orientations.apply_orientation(array, orientation), affine, "".join(nib.aff2axcodes(image.affine))


def _shape3(path: Path, shape: tuple[int, ...]) -> tuple[int, int, int]:
    shape3 = tuple(shape[:3]) + (1,) * (3 - len(shape))
    if any(n != 1 for n in shape[3:]):
        hint = "write its frames or channels as files of their own"
        raise VolumeError(f"{path}: must be a 3D volume, got {len(shape)}D of shape {tuple(shape)}; {hint}")
    if min(shape3) == 0 or len(shape) < 2:
        raise VolumeError(f"{path}: must be a non-empty 3D volume, got shape {tuple(shape)}")
    return shape3
