"""Labelled phantoms of abdominal CT: 3D, in Hounsfield units, in the Medical Segmentation Decathlon's layout (imagesTr, labelsTr, dataset.json).

Organs are bent ellipsoids and tubes with textures of their own, drawn at twice the resolution along every axis and averaged, so that borders
share voxels; noise on top. Axes as in RAS+: x to the patient's right, y to the front, z upwards.
"""

import json
from pathlib import Path

import numpy as np

from pix2rep.checkpoint import atomic
from pix2rep.data.anatomy import spline_basis
from pix2rep.data.nifti import write
from pix2rep.data.phantom import claim, nifti

_VERSION = 1
ORGANS = ("liver", "spleen", "right kidney", "left kidney", "aorta", "spine")
LIVER, SPLEEN, RIGHT_KIDNEY, LEFT_KIDNEY, AORTA, SPINE = range(1, 7)


def write_ct_phantoms(out, patients: int = 40, seed: int = 0, size: int = 96, gap: tuple[float, float] = (3.0, 6.0), noise: float = 15.0) -> list[Path]:
    """Write `patients` volumes under `out`/imagesTr, their labels (1 to 6, `ORGANS`) under labelsTr, and return the image files.

    size: voxels a side of a slice (300 to 440 mm); gap: range of the distance of slices, mm; noise: HU. int16 images, uint8 labels.
    The files depend on the arguments alone, byte for byte, and a patient on all of them but `patients`.
    Raises ValueError for sizes out of range, FileExistsError when `out` holds anything but the same phantoms.
    """
    if patients < 1 or size < 32:
        raise ValueError(f"patients must be at least 1 and size at least 32 voxels, got {patients} and {size}")
    if not 1 <= gap[0] <= gap[1] or noise < 0:
        raise ValueError(f"gap must be a range 1 <= low <= high in mm and noise at least 0, got {gap} and {noise}")
    out = Path(out)
    settings = {"kind": "ct", "version": _VERSION, "patients": patients, "seed": seed, "size": size, "gap": list(gap), "noise": noise}
    claim(out, settings)
    images = []
    for number in range(1, patients + 1):
        rng, name = np.random.default_rng([seed, number, 1]), f"ct_{number:03d}.nii.gz"
        image, labels, affine = _patient(rng, size, rng.uniform(*gap), noise)
        flip = rng.random() < 0.5  # half of the files are stored as LPS
        for folder, array in (("imagesTr", image), ("labelsTr", labels)):
            (out / folder).mkdir(exist_ok=True)
            write(nifti(array, affine, flip), out / folder / name)
        images.append(out / "imagesTr" / name)
    names = {"0": "background"} | {str(k): organ for k, organ in enumerate(ORGANS, 1)}
    pairs = [{"image": f"./imagesTr/{path.name}", "label": f"./labelsTr/{path.name}"} for path in images]
    with atomic(out / "dataset.json") as temporary:
        temporary.write_text(json.dumps({"name": "phantom", "modality": {"0": "CT"}, "labels": names, "training": pairs}, indent=1) + "\n")
    return images


def _patient(rng: np.random.Generator, size: int, gap: float, noise: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Image int16 and labels uint8, both [X, Y, Z], and their affine."""
    half = np.array([rng.uniform(140, 190), rng.uniform(95, 130)])  # of the body, mm
    length = rng.uniform(230, 300)
    spacing = 2.15 * half[0] / size
    shape = (size, size, round(length / gap))
    lines = [((np.arange(2 * n) + 0.5) / 2 - n / 2) * s for n, s in zip(shape, (spacing, spacing, gap), strict=True)]
    body = _Body(rng, half, length, lines)
    density, labels = body.paint()
    density = density.reshape(shape[0], 2, shape[1], 2, shape[2], 2).mean((1, 3, 5))
    density += rng.normal(0, noise, shape)
    affine = np.diag([spacing, spacing, gap, 1.0])
    affine[:3, 3] = rng.uniform(-50, 50, 3)
    return np.rint(density.clip(-1024, 3000)).astype(np.int16), _majority(labels), affine.round(6)


class _Body:
    """One patient on a fine grid: `density` in HU and `labels`, painted organ after organ."""

    def __init__(self, rng, half: np.ndarray, length: float, lines: list[np.ndarray]):
        self.rng, self.half, self.length = rng, half, length
        straight = [line.astype(np.float32).reshape([-1 if a == axis else 1 for a in range(3)]) for axis, line in enumerate(lines)]
        self.basis = {k: [spline_basis((np.arange(len(line)) + 0.5) / len(line), k).astype(np.float32) for line in lines] for k in (6, 20)}
        self.x, self.y, self.z = (axis + self.field(6, 4.0) for axis in straight)  # bent by some mm
        self.straight = straight
        self.fine = self.field(20, 1.0)
        shape = self.fine.shape
        self.density, self.labels = np.full(shape, -1000, np.float32), np.zeros(shape, np.uint8)

    def field(self, points: int, spread: float) -> np.ndarray:
        """A smooth random field on the fine grid."""
        a, b, c = self.basis[points]
        coefficients = self.rng.normal(0, spread, (points,) * 3).astype(np.float32)
        return np.einsum("xi,yj,zk,ijk->xyz", a, b, c, coefficients, optimize=True)

    def ellipsoid(self, place, radii, turn: float = 0.0) -> np.ndarray:
        """Distance from the centre, 1 on the surface; place: shares of the body's half axes and (z) half length; turn: about z."""
        cx, cy, cz = np.array(place) * (*self.half, self.length / 2)
        c, s = np.float32(np.cos(turn)), np.float32(np.sin(turn))
        dx, dy, dz = self.x - np.float32(cx), self.y - np.float32(cy), self.z - np.float32(cz)
        a, b, h = (np.float32(r) for r in radii)
        return np.sqrt(((c * dx + s * dy) / a) ** 2 + ((c * dy - s * dx) / b) ** 2 + (dz / h) ** 2)

    def fill(self, where: np.ndarray, hounsfield: float, texture: float, label: int = 0) -> None:
        self.density[where] = hounsfield + texture * self.fine[where]
        self.labels[where] = label

    def paint(self) -> tuple[np.ndarray, np.ndarray]:
        u = self.rng.uniform
        contrast = u(0, 1)  # of the injected agent
        self._trunk(u)
        self._gut(u)
        size = u(0.85, 1.15)
        for label, place, radii, low, high, texture in (
            (LIVER, (0.45, 0.1, 0.15), (72, 68, 60), 55, 115, 6), (SPLEEN, (-0.62, -0.35, 0.2), (28, 44, 46), 48, 125, 5),
            (RIGHT_KIDNEY, (0.38, -0.42, -0.3), (26, 28, 52), 35, 190, 10), (LEFT_KIDNEY, (-0.38, -0.42, -0.22), (26, 28, 54), 35, 190, 10),
        ):  # fmt: skip
            place = np.array(place) + self.rng.normal(0, (0.03, 0.03, 0.04))
            q = self.ellipsoid(place, size * np.array(radii) * u(0.88, 1.12, 3), u(-0.35, 0.35))
            self.fill(q < 1, low + contrast * (high - low), texture, label)
            if label in (RIGHT_KIDNEY, LEFT_KIDNEY):
                self.fill(q < 0.38, u(-40, 20), 15, label)  # the sinus
            if label == LIVER:
                vessels = (q < 0.9) & (self.fine > 1.5)
                self.fill(vessels, 60 + contrast * 90, 4, label)
        self._tubes(u, contrast)
        return self.density, self.labels

    def _trunk(self, u) -> None:
        x, y = self.x / np.float32(self.half[0]), self.y / np.float32(self.half[1])
        depth = (np.abs(x) ** 2.4 + np.abs(y) ** 2.4) ** np.float32(1 / 2.4)
        fat = u(0.8, 0.93)
        self.fill(depth < 1, -100, 12)
        self.fill(depth < fat, 50, 8)
        self.fill(depth < fat - 0.1, -95, 14)
        top = np.float32(self.length * u(0.16, 0.26))
        lung = (depth < fat - 0.06) & (self.z > top + 45 - 70 * depth**2)
        self.fill(lung, -850, 25)
        self.fill(lung & (self.fine > 1.3), 30, 10)
        ribs = (np.cos(2 * np.pi * (self.z + 25 * np.abs(x)) / u(26, 34)) > 0.5) & (self.z > -self.length * 0.1)
        self.fill(ribs & (depth > fat - 0.07) & (depth < fat - 0.02), 350, 60)
        table = np.abs(self.straight[1] + np.float32(1.08 * self.half[1])) < 6
        table = np.broadcast_to(table & (np.abs(self.straight[0]) < 0.8 * self.half[0]), self.density.shape)
        self.density[table & (depth > 1.02)] = -150

    def _gut(self, u) -> None:
        q = self.ellipsoid((u(-0.45, -0.3), u(0.25, 0.45), u(0.05, 0.25)), (u(38, 55), u(26, 36), u(30, 42)))
        self.fill(q < 1, 40, 6)
        self.fill(q < 0.88, u(0, 30), 15)
        self.fill((q < 0.86) & (self.y > np.float32(self.half[1] * u(0.35, 0.6))), -950, 10)
        for _ in range(14):
            place = u(-0.6, 0.6), u(-0.1, 0.6), u(-0.95, -0.1)
            q = self.ellipsoid(place, u(12, 26, 3), u(-1, 1))
            self.fill(q < 1, 45, 8)
            self.fill(q < 0.75, -850 if u() < 0.35 else u(5, 60), 20)

    def _tubes(self, u, contrast: float) -> None:
        radius, sway = u(20, 25), u(4, 12)
        y = self.y + np.float32(0.58 * self.half[1])
        q = np.hypot(self.x, y) / np.float32(radius)
        disc = np.cos(2 * np.pi * self.z / u(30, 38)) > 0.8
        process = (np.abs(self.x) < 6) & (y < 0) & (y > -2 * radius)
        self.fill(process | (q < 1), 180, 45, SPINE)
        self.fill((q < 1) & (q > 0.86), 420, 40, SPINE)
        self.fill((q < 1) & disc, 85, 10, SPINE)
        self.fill(np.hypot(self.x, y + np.float32(radius + 3)) < 7, 20, 5)  # the canal
        middle = np.float32(-8) + np.float32(sway) * np.sin(self.z / 60)
        q = np.hypot(self.x - middle, self.y + np.float32(0.58 * self.half[1] - radius - 15)) / np.float32(u(10, 13))
        self.fill(q < 1, 40 + contrast * 190, 4, AORTA)


def _majority(labels: np.ndarray) -> np.ndarray:
    """Most frequent label of every 2 x 2 x 2 block, the higher of two equals."""
    corners = [labels[i::2, j::2, k::2] for i in (0, 1) for j in (0, 1) for k in (0, 1)]
    highest = len(ORGANS)
    votes = np.stack([sum((corner == k).view(np.uint8) for corner in corners) for k in range(highest, -1, -1)])
    return (highest - votes.argmax(axis=0)).astype(np.uint8)
