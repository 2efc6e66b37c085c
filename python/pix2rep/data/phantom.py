"""Labelled phantoms of cardiac cine MR in short axis, written in ACDC's folder layout.

The anatomy (anatomy.py) is rendered at twice the resolution and acquired as a scanner would: fat in opposite phase (dark lines where it
meets water), coil shading, a truncated k-space, complex noise and hence Rician magnitudes, integers of an arbitrary gain.
"""

import json
from pathlib import Path

import nibabel as nib
import numpy as np

from pix2rep.checkpoint import atomic
from pix2rep.data import anatomy
from pix2rep.data.anatomy import GROUPS, Body, Plane
from pix2rep.data.nifti import write

_VERSION = 1
_MARK = "phantom.json"


def write_phantoms(
    out,
    patients: int = 40,
    seed: int = 0,
    size: int = 96,
    fov: tuple[float, float] = (190.0, 250.0),
    snr: tuple[float, float] = (12.0, 35.0),
) -> list[Path]:
    """Write `patients` phantoms under `out` and return their image files (ED and ES of each, labels beside them as `_gt`).

    size: pixels a side; fov: range of the field of view, mm (in-plane spacing = fov / size); snr: range of blood signal over noise.
    Slices lie 5 to 10 mm apart. Labels: 1 right ventricle, 2 myocardium, 3 left ventricle with its papillary muscles.
    The files depend on the arguments alone, byte for byte, and a patient on all of them but `patients`.
    Raises ValueError for sizes out of range, FileExistsError when `out` holds anything but the same phantoms.
    """
    if patients < 1 or size < 32:
        raise ValueError(f"patients must be at least 1 and size at least 32 pixels, got {patients} and {size}")
    for name, (low, high), least in (("fov", fov, 100.0), ("snr", snr, 1.0)):
        if not least <= low <= high:
            raise ValueError(f"{name} must be a range {least:g} <= low <= high, got {(low, high)}")
    out = Path(out)
    claim(out, {"version": _VERSION, "patients": patients, "seed": seed, "size": size, "fov": list(fov), "snr": list(snr)})
    images = []
    for number in range(1, patients + 1):
        rng, group = np.random.default_rng([seed, number]), GROUPS[number % len(GROUPS)]
        images += _write_patient(out / f"patient{number:03d}", rng, group, size, fov, snr)
    return images


def claim(out: Path, settings: dict) -> None:
    mark = out / _MARK
    if mark.is_file():
        found = json.loads(mark.read_text())
        if found != settings:
            raise FileExistsError(f"out must be a new folder or hold the same phantoms, got {out} with {found}")
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"out must be a new or empty folder, got {out}")
    with atomic(mark) as temporary:
        temporary.write_text(json.dumps(settings) + "\n")


def _write_patient(folder: Path, rng: np.random.Generator, group: str, size: int, fov, snr) -> list[Path]:
    view = rng.uniform(*fov)
    body = Body(rng, group, view)
    scanner = _Scanner(rng, body, size, view, rng.uniform(*snr))
    gap = 10 - 5 * rng.random() ** 1.5
    start, stop = -gap * rng.uniform(0.0, 1.4), body.length + gap * rng.uniform(-0.6, 0.8)
    positions = np.arange(start, stop, gap)
    frames = {"ED": 1, "ES": int(rng.integers(8, 15))}
    affine = _affine(rng, view / size, gap)
    flip = rng.random() < 0.5  # half of the files are stored as LPS
    nudges = rng.normal(0, 1.3, (len(positions), 2))
    images = []
    for name, number in frames.items():
        slices = [scanner.acquire(z, name == "ES", nudge, rng) for z, nudge in zip(positions, nudges, strict=True)]
        image, labels = (np.stack(arrays, axis=-1).transpose(1, 0, 2) for arrays in zip(*slices, strict=True))  # [X, Y, Z]
        stem = folder / f"{folder.name}_frame{number:02d}"
        for array, path in ((image, f"{stem}.nii.gz"), (labels, f"{stem}_gt.nii.gz")):
            write(nifti(array, affine, flip), Path(path))
        images.append(Path(f"{stem}.nii.gz"))
    with atomic(folder / "Info.cfg") as temporary:
        temporary.write_text(f"ED: {frames['ED']}\nES: {frames['ES']}\nGroup: {group}\nNbFrame: 30\n")
    return images


class _Scanner:
    """Tissue maps to magnitude images, one set of tissue signals, coil and gain a patient."""

    def __init__(self, rng, body: Body, size: int, fov: float, snr: float):
        self.body, self.size, self.plane = body, size, Plane.of(2 * size, fov)
        self.noise = 1 / snr
        self.gain = rng.uniform(150, 800)
        self.signal = np.zeros(anatomy.TISSUES, np.float32)
        self.texture = np.full(anatomy.TISSUES, 0.04, np.float32)
        u = rng.uniform
        muscle = u(0.30, 0.52)  # of the heart, blood = 1
        for tissue, value, texture in (
            (anatomy.AIR, 0.0, 0.0), (anatomy.LUNG, u(0.04, 0.12), 0.03), (anatomy.VESSEL, u(0.35, 0.8), 0.1),
            (anatomy.FAT, -u(0.7, 1.2), 0.12), (anatomy.MUSCLE, u(0.6, 0.9) * muscle, 0.05), (anatomy.MARROW, u(0.3, 0.6), 0.08),
            (anatomy.LIVER, muscle * u(0.6, 1.3), 0.05), (anatomy.SPLEEN, muscle * u(0.9, 1.5), 0.05),
            (anatomy.WALL, muscle * u(0.85, 1.15), 0.05), (anatomy.CONTENT_1, u(0.75, 1.05), 0.12), (anatomy.CONTENT_2, u(0.3, 0.6), 0.15),
            (anatomy.GAS, 0.02, 0.02), (anatomy.ATRIUM, u(0.85, 1.05), 0.1), (anatomy.AORTA, u(0.8, 1.1), 0.08),
            (anatomy.RV_WALL, muscle * u(0.9, 1.15), 0.05), (anatomy.RV_BLOOD, u(0.82, 1.08), 0.08), (anatomy.MYOCARDIUM, muscle, 0.045),
            (anatomy.LV_BLOOD, 1.0, 0.07), (anatomy.PAPILLARY, muscle * u(1.0, 1.25), 0.05),
        ):  # fmt: skip
            self.signal[tissue], self.texture[tissue] = value, texture
        top = body.middle[1] - body.half[1]
        reach = np.exp(-np.clip(self.plane.y - top, 0, None) / u(35, 80))
        self.coil = (u(0.5, 0.8) + u(0.3, 1.4) * reach) * np.exp(self.plane.field(rng.normal(0, 0.35, (5, 5))))
        # Off resonance grows away from the shimmed heart: a dark band where the phase between pulses reaches its stop band.
        cx, cy = (body.centre + rng.normal(0, 10, 2)).astype(np.float32)
        phase = ((self.plane.x - cx) ** 2 + (self.plane.y - cy) ** 2) / u(110, 230) ** 2 + self.plane.field(rng.normal(0, 0.25, (8, 8)))
        self.coil *= 1 - 0.8 * np.exp(-(((phase % 1 - 0.5) / 0.07) ** 2))
        self.window = _k_window(size, u(0.85, 1.0)), _k_window(size, u(0.68, 0.9))

    def acquire(self, z: float, systole: bool, nudge: np.ndarray, rng) -> tuple[np.ndarray, np.ndarray]:
        """Image [H, W] int16 and labels [H, W] uint8."""
        n, plane = self.size, self.plane
        tissue, fine_labels = self.body.slice(plane, z, systole, nudge, rng)
        texture = plane.field(rng.normal(0, 1, (24, 24))) + 1.4 * plane.field(rng.normal(0, 1, (64, 64)))
        signal = (self.signal[tissue] + self.texture[tissue] * texture) * self.coil
        k_space = np.fft.fftshift(np.fft.fft2(signal))[n // 2 : n // 2 + n, n // 2 : n // 2 + n]
        # Half a fine pixel to the right and down: the centres of the coarse grid.
        ramp = np.exp(1j * np.pi * (np.arange(n) - n // 2) / (2 * n)).astype(np.complex64)
        # The factor 4 undoes the change of grid; n turns white noise in k-space into noise of the same spread in the image.
        noise = rng.standard_normal((n, n, 2), dtype=np.float32).view(np.complex64)[..., 0] * np.float32(self.noise * n)
        k_space = (k_space * np.outer(ramp / 4, ramp) + noise) * np.outer(self.window[1], self.window[0])
        magnitude = np.abs(np.fft.ifft2(np.fft.ifftshift(k_space))) * self.gain * rng.uniform(0.92, 1.08)
        return np.rint(np.minimum(magnitude, 32767)).astype(np.int16), _majority(fine_labels)


def _k_window(n: int, share: float) -> np.ndarray:
    """Kept share of k-space with a cosine roll-off over its outer quarter."""
    k = np.abs(np.arange(n) - n // 2) / (n / 2) / share
    return np.where(k < 0.75, 1.0, np.cos(np.clip((k - 0.75) / 0.25, 0, 1) * np.pi / 2) ** 2).astype(np.float32)


def _majority(labels: np.ndarray) -> np.ndarray:
    """Most frequent label of every 2 x 2 block, the higher of two equals."""
    corners = [labels[i::2, j::2] for i in (0, 1) for j in (0, 1)]
    votes = np.stack([sum((c == k).view(np.uint8) for c in corners) for k in (3, 2, 1, 0)])
    return (3 - votes.argmax(axis=0)).astype(np.uint8)


def _affine(rng, spacing: float, gap: float) -> np.ndarray:
    """RAS+ but oblique, as short-axis stacks are, by less than what would rename an axis."""
    angles = rng.uniform(-0.35, 0.35, 3)
    affine = np.eye(4)
    affine[:3, :3] = nib.eulerangles.euler2mat(*angles) * [spacing, spacing, gap]
    affine[:3, 3] = rng.uniform(-80, 80, 3)
    return affine.round(6)


def nifti(array: np.ndarray, affine: np.ndarray, flip: bool) -> nib.Nifti1Image:
    if flip:
        reverse = np.diag([-1.0, -1.0, 1.0, 1.0])
        reverse[:2, 3] = np.array(array.shape[:2]) - 1
        array, affine = array[::-1, ::-1], affine @ reverse
    image = nib.Nifti1Image(np.ascontiguousarray(array), affine)
    image.header.set_xyzt_units("mm")
    return image
