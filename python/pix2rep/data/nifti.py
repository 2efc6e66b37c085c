"""NIfTI in and out: volumes in canonical RAS+ axes, predictions back in the file's own."""

import gzip
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.volumeutils import array_from_file

from pix2rep.checkpoint import atomic

# What nibabel and gzip raise on damaged files; HeaderDataError and ImageFileError are nibabel's own. A header may promise more than memory.
_READ_ERRORS = (
    *(OSError, EOFError, ValueError, OverflowError, MemoryError, zlib.error),
    *(nib.filebasedimages.ImageFileError, nib.spatialimages.HeaderDataError),
)


class VolumeError(ValueError):
    """A file that cannot be used: its `path` and the `reason`; the message is both."""

    def __init__(self, path, reason: str):
        super().__init__(f"{path}: {reason}")
        self.path, self.reason = Path(path), reason


@dataclass(frozen=True)
class Volume:
    """One file in canonical (RAS+) axes."""

    array: np.ndarray  # [X, Y, Z]: an image float32 and finite, labels uint8; its transpose is contiguous
    affine: np.ndarray  # [4, 4] float64: voxel -> mm, of the canonical array
    spacing: tuple[float, float, float]  # mm along X, Y, Z
    path: Path
    orientation: str  # axis codes of the file itself, such as "LPS"
    dtype: str  # of the voxels on disk


@dataclass(frozen=True)
class _Stored:
    """A file as it is: `array` unscaled and, after `_turn`, in canonical axes."""

    path: Path
    array: np.ndarray
    affine: np.ndarray
    orientation: str
    slope: float
    inter: float

    def slabs(self):
        """(z, [Y, X] voxels) of every canonical z. Scaled ones are float64, as nibabel's `get_fdata` has them, but never a whole volume."""
        scaled = (self.slope, self.inter) != (1, 0)
        for z in range(self.array.shape[2]):
            slab = self.array[:, :, z].T
            yield z, slab.astype(np.float64) * self.slope + self.inter if scaled else slab

    def volume(self, dtype) -> Volume:
        array = np.empty(self.array.shape[::-1], dtype).T
        spacing = tuple(float(s) for s in nib.affines.voxel_sizes(self.affine))
        return Volume(array, self.affine, spacing, self.path, self.orientation, str(self.array.dtype.newbyteorder("=")))


def read(path) -> Volume:
    """Read a 3D image (a 2D one counts as one slice; trailing axes of length 1 are dropped).

    Raises VolumeError when the file is damaged, not three-dimensional or empty, has no usable geometry, or holds a non-finite voxel or one
    value only.
    """
    stored = _turn(_load(Path(path)))
    volume = stored.volume(np.float32)
    bad = overflow = 0
    with np.errstate(over="ignore", invalid="ignore"):
        for z, slab in stored.slabs():
            volume.array[:, :, z] = slab.T
            if slab.dtype.kind == "f":
                bad += slab.size - int(np.isfinite(stored.array[:, :, z]).sum())
                overflow += slab.size - int(np.isfinite(volume.array[:, :, z]).sum())
    if bad:
        raise VolumeError(path, f"every voxel must be finite, got {bad} non-finite of {volume.array.size}")
    if overflow:
        given = f"(scl_slope {stored.slope:g}, scl_inter {stored.inter:g}, {volume.dtype} on disk)"
        raise VolumeError(path, f"voxels must fit into float32, got {overflow} of {volume.array.size} that overflow {given}")
    low, high = volume.array.min(), volume.array.max()
    if low == high:
        raise VolumeError(path, f"intensities must vary, got {low:g} in every voxel")
    return volume


def read_labels(path, orientation: str | None = None) -> np.ndarray:
    """The array of `read_label_volume`: uint8 [X, Y, Z]."""
    return read_label_volume(path, orientation).array


def read_label_volume(path, orientation: str | None = None) -> Volume:
    """Read labels, uint8. With `orientation`, axis codes such as "LPS", the file's own affine is not asked how its axes lie.

    Raises VolumeError as `read` does, and for values that are not whole numbers (to 0.001) in 0..255.
    """
    stored = _turn(_load(Path(path)), orientation)
    volume = stored.volume(np.uint8)
    low, high = np.inf, -np.inf
    for z, slab in stored.slabs():
        if slab.dtype.kind == "f":
            whole = np.rint(slab)
            with np.errstate(invalid="ignore"):
                wrong = ~(np.abs(slab - whole) <= 1e-3)
            if wrong.any():
                raise VolumeError(path, f"labels must be whole numbers, got {slab[wrong][0]:g}")
            slab = whole
        low, high = min(low, slab.min()), max(high, slab.max())
        if 0 <= low and high <= 255:
            volume.array[:, :, z] = slab.T
    if low < 0 or high > 255:
        raise VolumeError(path, f"labels must lie in 0..255, got {low:g}..{high:g}")
    return volume


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


def _load(path: Path) -> _Stored:
    """Header, then voxels, as they are in the file. Everything that the header alone shows is refused before voxels are read."""
    try:
        if not path.is_file():
            path.stat()  # says what is wrong with a name that leads nowhere
            raise VolumeError(path, "cannot be opened (not a file)")
        if path.stat().st_size == 0:
            raise VolumeError(path, "cannot be read as NIfTI (the file is empty)")
        image = nib.load(path)
        if not isinstance(image, nib.Nifti1Image):
            raise VolumeError(path, f"cannot be read as NIfTI (it is a {type(image).__name__})")
        shape, dtype = _shape3(path, image.shape), image.dataobj.dtype
        if dtype.kind not in "iuf":
            raise VolumeError(path, f"voxels must be real numbers, got {image.header.get_value_label('datatype')}")
        _check_affine(path, image.affine)
        # nib.load leaves neither sizes of 0 nor the scaling in the header that it gives, and no read of its own reaches the checksum.
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            slope, inter = _scaling(path, image.header_class.from_fileobj(file, check=False), shape)
            array = array_from_file(shape, dtype, file, image.dataobj.offset, order="F", mmap=False)
            while file.read(2**20):
                pass
    except VolumeError:
        raise
    except _READ_ERRORS as error:
        raise VolumeError(path, _why(path, error)) from error
    return _Stored(path, array, image.affine, "".join(nib.aff2axcodes(image.affine)), slope, inter)


def _scaling(path: Path, header, shape: tuple[int, ...]) -> tuple[float, float]:
    """(slope, inter) of a header as stored; (1, 0) for a slope of 0 or NaN, which mean none."""
    sizes = [float(s) for s, n in zip(header["pixdim"][1:4], shape, strict=True) if n > 1]
    if not all(0 < s < np.inf for s in sizes):
        raise VolumeError(path, f"voxel sizes must be positive, got pixdim {', '.join(f'{s:g}' for s in sizes)}")
    slope, inter = float(header["scl_slope"]), float(header["scl_inter"])
    if slope == 0 or np.isnan(slope):
        return 1.0, 0.0
    if not np.isfinite([slope, inter]).all():
        raise VolumeError(path, f"scl_slope and scl_inter must be finite, got {slope:g} and {inter:g}")
    return slope, inter


def _why(path: Path, error: Exception) -> str:
    if isinstance(error, OSError) and error.errno is not None:
        return f"cannot be opened ({error.strerror})"
    reason = f"{type(error).__name__}: {error}".splitlines()[0]
    try:
        with open(path, "rb") as file:
            zipped = file.read(2) == b"\x1f\x8b"
        if zipped != (path.suffix == ".gz"):
            reason = f"the file is {'' if zipped else 'not '}gzip-compressed, unlike its name"
        elif isinstance(error, nib.filebasedimages.ImageFileError):  # so it says of a file that is cut within its header, too
            reason = "no NIfTI header"
            with gzip.open(path) if zipped else open(path, "rb") as file:
                file.read(1024)  # as much as nibabel looks at
    except (OSError, EOFError, zlib.error) as cause:
        reason = f"{type(cause).__name__}: {cause}"
    return f"cannot be read as NIfTI ({reason})"


def _check_affine(path: Path, affine: np.ndarray) -> None:
    if not np.isfinite(affine).all():
        raise VolumeError(path, f"the affine must be finite, got {affine.tolist()}")
    sizes = nib.affines.voxel_sizes(affine)
    if not (sizes > 0).all():
        raise VolumeError(path, f"voxel sizes must be positive, got {', '.join(f'{s:g}' for s in sizes)}")
    if abs(np.linalg.det(affine[:3, :3] / sizes)) < 1e-6:
        raise VolumeError(path, f"the affine must be invertible, got {affine.tolist()}")


def _turn(stored: _Stored, orientation: str | None = None) -> _Stored:
    """`stored` in canonical axes (a view), turned as its own affine says, or as axis codes `orientation` say."""
    codes = stored.orientation if orientation is None else orientation
    turn = nib.orientations.axcodes2ornt(codes)
    affine = stored.affine @ nib.orientations.inv_ornt_aff(turn, stored.array.shape)
    return replace(stored, array=nib.orientations.apply_orientation(stored.array, turn), affine=affine)


def _shape3(path: Path, shape: tuple[int, ...]) -> tuple[int, int, int]:
    shape3 = tuple(shape[:3]) + (1,) * (3 - len(shape))
    if any(n != 1 for n in shape[3:]):
        hint = "write its frames or channels as files of their own"
        raise VolumeError(path, f"must be a 3D volume, got {len(shape)}D of shape {tuple(shape)}; {hint}")
    if min(shape3) <= 0 or len(shape) < 2:
        raise VolumeError(path, f"must be a non-empty 3D volume, got shape {tuple(shape)}")
    return shape3
