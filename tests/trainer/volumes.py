"""Small NIfTI sets that the tests write."""

from pathlib import Path

import nibabel as nib
import numpy as np

from pix2rep.data.discover import Case, discover


def save(path: Path, array: np.ndarray, affine=None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, np.diag([2.0, 1.5, 8.0, 1.0]) if affine is None else affine), path)
    return path


def volume(shape=(12, 10, 4), seed=0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 500, shape).astype(np.int16)


def labels(shape=(12, 10, 4)) -> np.ndarray:
    array = np.zeros(shape, np.uint8)
    array[3:7, 2:6, 1:3], array[4:6, 3:5, 1:3] = 1, 2
    return array


def dataset(root: Path, patients: int = 10) -> list[Case]:
    for p in range(patients):
        save(root / f"imagesTr/p{p}.nii.gz", volume(seed=p))
        save(root / f"labelsTr/p{p}.nii.gz", labels())
    return discover(root)
