"""Small NIfTI sets that the tests write, and every way in which a volume can be broken."""

import gzip
from pathlib import Path

import nibabel as nib
import numpy as np

from pix2rep.data.cache import PreparedCase
from pix2rep.data.discover import Case, discover

SHAPE = (12, 10, 4)
AFFINE = np.diag([2.0, 1.5, 8.0, 1.0])


def save(path: Path, array: np.ndarray, affine=None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, AFFINE if affine is None else affine), path)
    return path


def volume(shape=SHAPE, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 500, shape).astype(np.int16)


def labels(shape=SHAPE) -> np.ndarray:
    array = np.zeros(shape, np.uint8)
    array[3:7, 2:6, 1:3], array[4:6, 3:5, 1:3] = 1, 2
    return array


def dataset(root: Path, patients: int = 10) -> list[Case]:
    for p in range(patients):
        save(root / f"imagesTr/p{p}.nii.gz", volume(seed=p))
        save(root / f"labelsTr/p{p}.nii.gz", labels())
    return discover(root)


def prepared_case(folder: Path, name: str, image: np.ndarray, labels: np.ndarray | None = None, **fields) -> PreparedCase:
    """A case as `prepare` leaves it, of arrays [Z, H, W]; `fields` replace those of PreparedCase."""
    np.save(folder / f"{name}.npy", image.astype(np.float16))
    if labels is not None:
        np.save(folder / f"{name}_label.npy", labels.astype(np.uint8))
    values = {"spacing": (3.0, 1.0, 1.0), "native_shape": image.shape, "crop": tuple((0, n) for n in image.shape), "affine": np.eye(4).tolist()}
    values |= {"classes": (1,), "frame": None, "source": folder / name, "patient": name} | fields
    return PreparedCase(
        id=name, image_file=folder / f"{name}.npy", label_file=None if labels is None else folder / f"{name}_label.npy", shape=image.shape, **values
    )


def patch(path: Path, **fields) -> None:
    """Overwrite fields of an uncompressed file's header, past all that nibabel would mend."""
    raw = bytearray(path.read_bytes())
    header = np.frombuffer(raw, nib.nifti1.header_dtype, 1)
    for name, value in fields.items():
        header[name][0] = value
    path.write_bytes(raw)


def image_with(**fields):
    return lambda folder: patch(save(folder / "t1.nii", volume()), **fields)


def image_of(array):
    return lambda folder: save(folder / "t1.nii.gz", array)


def image_bytes(change):
    return lambda folder: (folder / "t1.nii.gz").write_bytes(change(gzip.compress(nib.Nifti1Image(volume(), AFFINE).to_bytes())))


def labels_of(array, affine=None):
    def make(folder):
        save(folder / "t1.nii.gz", volume())
        save(folder / "t1_seg.nii.gz", array, affine)

    return make


def link_to(name):
    return lambda folder: (folder / "t1.nii.gz").symlink_to(name)


def flipped(raw: bytes, at: int) -> bytes:
    return raw[:at] + bytes([raw[at] ^ 255]) + raw[at + 1 :]


def replaced(value, dtype=np.float32):
    array = volume().astype(dtype)
    array[1:3, 2, 3] = value
    return array


def moved(*shift):
    affine = AFFINE.copy()
    affine[:3, 3] += shift
    return affine


# name: (make(folder), the file that is named, words of its reason)
BROKEN = {
    "link-nowhere": (link_to("gone"), "t1.nii.gz", "cannot be opened (No such file or directory)"),
    "link-loop": (link_to("t1.nii.gz"), "t1.nii.gz", "cannot be opened (Too many levels of symbolic links)"),
    "empty": (image_bytes(lambda raw: b""), "t1.nii.gz", "cannot be read as NIfTI (the file is empty)"),
    "text": (image_bytes(lambda raw: gzip.compress(b"no image" * 99)), "t1.nii.gz", "cannot be read as NIfTI (no NIfTI header)"),
    "truncated": (image_bytes(lambda raw: raw[: len(raw) // 2]), "t1.nii.gz", "cannot be read as NIfTI (EOFError: Compressed file ended"),
    "trailer-cut": (image_bytes(lambda raw: raw[:-4]), "t1.nii.gz", "cannot be read as NIfTI (EOFError: Compressed file ended"),
    "bit-rot": (image_bytes(lambda raw: flipped(raw, len(raw) - 6)), "t1.nii.gz", "cannot be read as NIfTI (BadGzipFile: CRC check failed"),
    "not-zipped": (image_bytes(gzip.decompress), "t1.nii.gz", "cannot be read as NIfTI (the file is not gzip-compressed, unlike its name)"),
    "promises": (image_with(dim=[3, 32000, 32000, 32000, 1, 1, 1, 1]), "t1.nii", "cannot be read as NIfTI ("),
    "4d": (image_of(volume((6, 6, 3, 5))), "t1.nii.gz", "must be a 3D volume, got 4D of shape (6, 6, 3, 5)"),
    "zero-axis": (image_with(dim=[3, 12, 10, 0, 1, 1, 1, 1]), "t1.nii", "must be a non-empty 3D volume, got shape (12, 10, 0)"),
    "nan": (image_of(replaced(np.nan)), "t1.nii.gz", "every voxel must be finite, got 2 non-finite of 480"),
    "inf": (image_of(replaced(-np.inf)), "t1.nii.gz", "every voxel must be finite, got 2 non-finite of 480"),
    "too-large": (image_of(replaced(1e39, np.float64)), "t1.nii.gz", "voxels must fit into float32, got 2 of 480 that overflow"),
    "constant": (image_of(np.full(SHAPE, 7, np.int16)), "t1.nii.gz", "intensities must vary, got 7 in every voxel"),
    "scale-overflow": (image_with(scl_slope=3e38), "t1.nii", "that overflow (scl_slope 3e+38, scl_inter 0, int16 on disk)"),
    "scale-inf": (image_with(scl_slope=np.inf), "t1.nii", "scl_slope and scl_inter must be finite, got inf and 0"),
    "inter-nan": (image_with(scl_slope=2, scl_inter=np.nan), "t1.nii", "Valid slope but invalid intercept nan"),
    "complex": (image_of(volume().astype(np.complex64)), "t1.nii.gz", "voxels must be real numbers, got complex64"),
    "rgb": (image_of(np.zeros(SHAPE, [("R", "u1"), ("G", "u1"), ("B", "u1")])), "t1.nii.gz", "voxels must be real numbers, got RGB"),
    "singular": (image_with(srow_x=[2, 2, 0, 0], srow_y=[1, 1, 0, 0]), "t1.nii", "the affine must be invertible, got [["),
    "affine-nan": (image_with(srow_x=[np.nan, 0, 0, 0]), "t1.nii", "the affine must be finite, got [["),
    "no-column": (image_with(srow_y=[0, 0, 0, 0]), "t1.nii", "voxel sizes must be positive, got 2, 0, 8"),
    "size-0": (image_with(pixdim=[1, 0, 1.5, 8, 1, 1, 1, 1]), "t1.nii", "voxel sizes must be positive, got pixdim 0, 1.5, 8"),
    "size-negative": (image_with(pixdim=[1, 2, -1.5, 8, 1, 1, 1, 1]), "t1.nii", "voxel sizes must be positive, got pixdim 2, -1.5, 8"),
    "size-nan": (image_with(pixdim=[1, 2, 1.5, np.nan, 1, 1, 1, 1]), "t1.nii", "voxel sizes must be positive, got pixdim 2, 1.5, nan"),
    "label-shape": (labels_of(labels((12, 10, 5))), "t1_seg.nii.gz", "labels must have the image's shape [12, 10, 4] (X, Y, Z), got [12, 10, 5]"),
    "label-moved": (labels_of(labels(), moved(0, 0, 5)), "t1_seg.nii.gz", "got voxel centres up to 5 mm (0.625 voxels) apart"),
    "label-sized": (labels_of(labels(), AFFINE * 1.1), "t1_seg.nii.gz", "labels must lie on the image's grid, got voxel centres up to"),
    "label-stripped": (labels_of(labels(), np.diag([-2.0, -1.5, 8.0, 1.0])), "t1_seg.nii.gz", "data.label_affine=ignore trusts the order of voxels"),
    "label-unnamed": (labels_of(labels() * np.uint8(3) + 1), "t1_seg.nii.gz", "labels must be 0..2 (wall, core; data.classes or dataset.json), got 4, 7"),
    "label-fraction": (labels_of(labels() * np.float32(0.5)), "t1_seg.nii.gz", "labels must be whole numbers, got 0.5"),
    "label-nan": (labels_of(labels() * np.float32(np.nan)), "t1_seg.nii.gz", "labels must be whole numbers, got nan"),
    "label-negative": (labels_of(labels().astype(np.int16) - 1), "t1_seg.nii.gz", "labels must lie in 0..255, got -1..1"),
    "label-large": (labels_of(labels().astype(np.int16) * 150), "t1_seg.nii.gz", "labels must lie in 0..255, got 0..300"),
    "label-empty-file": (
        lambda folder: (save(folder / "t1.nii.gz", volume()), (folder / "t1_seg.nii.gz").touch()), "t1_seg.nii.gz", "the file is empty",
    ),
}  # fmt: skip
