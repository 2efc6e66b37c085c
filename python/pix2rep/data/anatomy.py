"""The body behind the phantoms: a heart in short axis and what lies around it, as tissue maps. Lengths in mm, angles in radians."""

from dataclasses import dataclass

import numpy as np

GROUPS = ("DCM", "HCM", "MINF", "NOR", "RV")
RV, MYO, LV = 1, 2, 3

# fmt: off
(AIR, LUNG, VESSEL, FAT, MUSCLE, MARROW, LIVER, SPLEEN, WALL, CONTENT_1, CONTENT_2, GAS,
 ATRIUM, AORTA, RV_WALL, RV_BLOOD, MYOCARDIUM, LV_BLOOD, PAPILLARY) = range(19)
# fmt: on
TISSUES = PAPILLARY + 1

# Ranges of: end-diastolic inner radius and wall (mm), factor of the radius at end-systole, longitudinal shortening (share), RV size, its
# factor at end-systole.
_HEARTS = {
    "NOR": ((22, 26), (7.5, 10), (0.60, 0.70), (0.12, 0.18), (0.85, 1.1), (0.60, 0.75)),
    "DCM": ((29, 36), (6.5, 9), (0.84, 0.94), (0.03, 0.08), (0.9, 1.2), (0.75, 0.9)),
    "HCM": ((19, 23), (11, 15), (0.45, 0.60), (0.10, 0.16), (0.75, 1.0), (0.55, 0.7)),
    "MINF": ((24, 31), (7.5, 10), (0.62, 0.78), (0.06, 0.12), (0.8, 1.1), (0.6, 0.8)),
    "RV": ((19, 24), (7, 9.5), (0.60, 0.72), (0.08, 0.15), (1.35, 1.75), (0.75, 0.9)),
}

_BINS = 720  # of the tables over the angle about the LV's axis
_ANGLE = (np.arange(_BINS) + 0.5) * (2 * np.pi / _BINS)


def spline_basis(positions: np.ndarray, points: int) -> np.ndarray:
    """Uniform cubic B-spline weights [n, points] at positions in [0, 1]; rows sum to 1."""
    s = np.clip(positions, 0, 1) * (points - 3)
    first = np.minimum(s.astype(np.int64), points - 4)
    f = s - first
    weights = np.stack([(1 - f) ** 3, 3 * f**3 - 6 * f**2 + 4, 3 * (f - f**2) * f + 3 * f + 1, f**3], axis=-1) / 6
    basis = np.zeros((len(s), points))
    np.put_along_axis(basis, first[:, None] + np.arange(4), weights, axis=1)
    return basis


def _harmonics(rng, spread: float, orders: tuple[int, ...]) -> np.ndarray:
    return sum(rng.normal(0, spread / k**0.5) * np.cos(k * _ANGLE + rng.uniform(0, 2 * np.pi)) for k in orders)


@dataclass(frozen=True)
class Plane:
    """Pixel centres of one slice and the smooth fields on it."""

    x: np.ndarray  # [1, n], to the right, 0 at the centre
    y: np.ndarray  # [n, 1], downwards
    basis: dict  # control points a side -> [n, points]

    @classmethod
    def of(cls, n: int, fov: float) -> "Plane":
        u = (np.arange(n) + 0.5) / n
        line = ((u - 0.5) * fov).astype(np.float32)
        return cls(line[None, :], line[:, None], {k: spline_basis(u, k).astype(np.float32) for k in (5, 8, 24, 64)})

    def field(self, coefficients: np.ndarray) -> np.ndarray:
        """[n, n] from [points, points]."""
        basis = self.basis[len(coefficients)]
        return basis @ coefficients.astype(np.float32) @ basis.T


class Body:
    """One patient: everything random is drawn here, so that slices and frames agree."""

    def __init__(self, rng: np.random.Generator, group: str, fov: float):
        self.group, self.fov = group, fov
        self._draw_heart(rng)
        self._draw_chest(rng)
        self._draw_organs(rng)

    def _draw_heart(self, rng) -> None:
        radius, wall, squeeze, shortening, rv_size, rv_squeeze = (rng.uniform(*r) for r in _HEARTS[self.group])
        size = rng.uniform(0.88, 1.1)
        self.length = size * rng.uniform(82, 98)
        self.radius, self.wall = size * radius, size * wall
        self.squeeze, self.shortening, self.rv_squeeze = squeeze, shortening, rv_squeeze
        self.rv_depth = size * rv_size * rng.uniform(27, 34)
        self.rv_reach = np.deg2rad(rng.uniform(62, 80))  # half the angle over which the RV leans on the septum, at the base
        self.rv_skew, self.rv_end = rng.uniform(-0.3, 0.3), rng.uniform(0.8, 0.97)
        self.rotation = np.deg2rad(rng.uniform(-45, 45))
        shift = 0.11 * self.fov
        self.centre = np.array([rng.uniform(-1.2, 1.2) * shift, rng.uniform(-1.0, 0.8) * shift], np.float32)
        self.tilt = rng.uniform(-0.12, 0.12, 2).astype(np.float32)  # mm in plane a mm along the axis
        self.outline = _harmonics(rng, 0.04, (2, 3, 4, 5))
        self.thickness = 1 + _harmonics(rng, 0.08, (1, 2, 3))
        septum = np.exp(-(((_ANGLE - np.pi) / 0.9) ** 2))
        if self.group == "HCM":
            self.thickness += rng.uniform(0.3, 0.9) * septum
        if self.group == "RV":
            self.outline -= rng.uniform(0.06, 0.16) * septum
        self.scar = np.zeros(_BINS)
        if self.group == "MINF":
            away = np.angle(np.exp(1j * (_ANGLE - rng.uniform(0, 2 * np.pi))))
            self.scar = np.exp(-((away / rng.uniform(0.5, 0.9)) ** 4))
            self.thickness *= 1 - rng.uniform(0.25, 0.55) * self.scar
        # Thick over the RV and in the grooves, next to nothing where the LV touches the lung.
        lobes = _harmonics(rng, 0.9, (2, 3, 5, 7))
        fat = rng.uniform(2, 9) * np.clip(0.35 + 0.65 * np.cos(_ANGLE - np.pi + rng.uniform(-0.6, 0.6)) + lobes, 0, None)
        self.fat = fat.astype(np.float32)
        self.papillary = [(rng.uniform(0.5, 1.1), rng.uniform(3, 5)), (rng.uniform(-1.3, -0.6), rng.uniform(3, 5))]
        self.papillary_range = (rng.uniform(0.1, 0.25), rng.uniform(0.65, 0.85))
        self.trabeculae = rng.uniform(0.15, 0.5)
        self.atria = rng.uniform(0, 1, (3, 4))

    def _draw_chest(self, rng) -> None:
        hx, hy = self.centre
        self.half = np.array([rng.uniform(120, 165), rng.uniform(95, 130)], np.float32)
        self.middle = np.array([hx + rng.uniform(72, 112) - self.half[0], hy - rng.uniform(55, 85) + self.half[1]], np.float32)
        self.skin, self.chest_muscle = rng.uniform(4, 24), rng.uniform(7, 15)
        self.ribs, self.rib_phase = rng.integers(14, 24), rng.uniform(0, 2 * np.pi)
        self.diaphragm, self.slope = hy + rng.uniform(26, 48), rng.uniform(-0.35, 0.35)
        self.mediastinum = hx - rng.uniform(10, 45), hy + rng.uniform(-25, 20), rng.uniform(20, 45), rng.uniform(25, 50)
        # Fields over the plane, with four control points along the axis: neighbours in z look alike.
        self.bend = rng.normal(0, 17, (2, 4, 8, 8))
        self.layers = rng.normal(0, 1.6, (3, 4, 8, 8))
        self.lung_vessels = rng.uniform(0.9, 1.3)  # standard deviations of the fine field that make one

    def _draw_organs(self, rng) -> None:
        """Ellipses, later ones on top: (x, y, half axes, turn, wall, its tissue, the inside's, span along the axis)."""
        u = rng.uniform
        (hx, hy), below, always = self.centre, self.diaphragm, (-1.0, 2.0)
        self.liver_edge = hx + u(-25, 45)
        self.organs = []

        def add(x, y, a, b, wall, outer, inner, span=always):
            self.organs.append((x, y, a, b, u(0, np.pi), wall, outer, inner, span))

        def filling():  # of stomach and bowel: often as bright as blood inside a wall as dark as the heart's
            return rng.choice([CONTENT_1, CONTENT_2, GAS], p=[0.5, 0.3, 0.2])

        add(hx + u(-70, 70), below + u(45, 75), u(20, 28), u(14, 18), u(2, 4), SPLEEN, CONTENT_2)  # kidney
        add(hx + u(60, 95), below + u(10, 40), u(22, 35), u(14, 24), 0, SPLEEN, SPLEEN)
        add(hx + u(15, 60), below + u(18, 40), u(20, 34), u(14, 24), u(3, 6), WALL, filling(), (u(-0.2, 0.4), 2.0))  # stomach
        for _ in range(rng.integers(4, 9)):  # bowel
            r = u(7, 20)
            span = (u(-0.6, 0.5), u(0.5, 1.6))
            add(hx + u(-60, 95), below + u(14, 75), r, r * u(0.65, 1), r * u(0.15, 0.5), WALL, filling(), span)
        add(hx + u(-55, -15), below + u(10, 35), u(7, 12), u(6, 9), 0, AORTA, AORTA)  # inferior vena cava
        r = u(9, 13)
        add(hx + u(5, 45), hy + u(52, 80), r, r * u(0.9, 1), u(1.5, 2.5), MUSCLE, AORTA)  # descending aorta
        add(hx + u(-25, 15), hy + u(85, 110), u(17, 22), u(15, 19), u(2, 3), MUSCLE, MARROW)  # vertebra

    def depth(self, z: float, systole: bool) -> float:
        """Share of the LV's length at z mm below the end-diastolic base: 0 at the base, 1 at the apex; the base descends in systole."""
        down = self.length * self.shortening * systole
        return (z - down) / (self.length - down)

    def slice(self, plane: Plane, z: float, systole: bool, nudge: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Tissues and labels, both [n, n] uint8, of the slice at z; `nudge` (x, y) shifts it, as an uneven breath-hold does."""
        mix = spline_basis(np.array([z / self.length * 0.8 + 0.1]), 4)[0]
        bend = np.tensordot(mix, self.bend, axes=(0, 1))
        layers = [plane.field(c) for c in np.tensordot(mix, self.layers, axes=(0, 1))]
        x, y = plane.x - np.float32(nudge[0]), plane.y - np.float32(nudge[1])
        tissue = self._surroundings(plane, x + plane.field(bend[0]), y + plane.field(bend[1]), z, layers, rng)
        labels = np.zeros(tissue.shape, np.uint8)
        self._heart(plane, x + 0.3 * plane.field(bend[0]), y + 0.3 * plane.field(bend[1]), z, systole, tissue, labels, rng)
        return tissue, labels

    def _surroundings(self, plane, x, y, z, layers, rng) -> np.ndarray:
        px, py = (x - self.middle[0]) / self.half[0], (y - self.middle[1]) / self.half[1]
        depth = (1 - np.cbrt(px * px * np.abs(px) + py * py * np.abs(py))) * self.half.min()  # between ellipse and rectangle
        skin = self.skin * (1 + 0.35 * layers[0])
        fine = plane.field(rng.normal(0, 1, (64, 64)))
        tissue = np.where(fine > self.lung_vessels, VESSEL, LUNG).astype(np.uint8)
        below = y - self.diaphragm - self.slope * (x - self.centre[0]) + 12 * layers[1]
        cx, cy, a, b = self.mediastinum
        tissue[((x - cx) / a) ** 2 + ((y - cy) / b) ** 2 + 0.5 * layers[0] + 0.3 * layers[1] < 1] = FAT
        tissue[below > -3] = MUSCLE
        tissue[below > 0] = FAT
        liver = (below > 2) & (x < self.liver_edge + 18 * layers[2])
        tissue[liver] = LIVER
        tissue[liver & (fine > 1.35)] = VESSEL
        self._paint_organs(plane, x, y, z / self.length, tissue)
        chest = np.nonzero(depth < skin + self.chest_muscle)
        share = (depth[chest] - skin[chest]) / self.chest_muscle  # 0 at the skin's fat, 1 at the lung
        rib = (np.cos(self.ribs * np.arctan2(py[chest], px[chest]) + self.rib_phase) > 0.5) & (share > 0.25) & (share < 0.8)
        layer = np.where(rib, MARROW, MUSCLE)
        layer[(fine[chest] > 0.9) | (share < 0)] = FAT
        layer[depth[chest] < 0] = AIR
        tissue[chest] = layer
        return tissue

    def _paint_organs(self, plane, x, y, t, tissue) -> None:
        for cx, cy, a, b, turn, wall, outer, inner, (first, last) in self.organs:
            if not first < t < last:
                continue
            reach = max(a, b) + 35  # bent coordinates differ from straight ones by less
            rows, columns = np.searchsorted(plane.y[:, 0], (cy - reach, cy + reach)), np.searchsorted(plane.x[0], (cx - reach, cx + reach))
            window = slice(*rows), slice(*columns)
            c, s, part = np.float32(np.cos(turn)), np.float32(np.sin(turn)), tissue[window]
            dx, dy = x[window] - np.float32(cx), y[window] - np.float32(cy)
            q = np.sqrt(((c * dx + s * dy) / np.float32(a)) ** 2 + ((c * dy - s * dx) / np.float32(b)) ** 2)
            if outer == WALL:
                part[q < 1 + 4 / a] = FAT
            part[q < 1] = outer
            part[q < 1 - wall / b] = inner

    def _heart(self, plane, x, y, z, systole, tissue, labels, rng) -> None:
        centre = self.centre + self.tilt * (z - self.length / 2)
        c, s = np.float32(np.cos(self.rotation)), np.float32(np.sin(self.rotation))
        dx, dy = x - centre[0], y - centre[1]
        u, v = c * dx + s * dy, c * dy - s * dx
        rho = np.sqrt(u * u + v * v)
        angle = (np.arctan2(v, u) * (_BINS / (2 * np.pi))).astype(np.int32) % _BINS
        t = self.depth(z, systole)
        if t < 0:
            self._atria(u, v, t, tissue)
            return
        if t > 1.15:
            return
        inner, outer, free = (radii.astype(np.float32) for radii in self._contours(t, systole))
        shell = np.maximum(outer, free)
        wall = np.where(free > outer, np.float32(3), np.float32(0))
        tissue[rho < (shell + (wall + self.fat) * (1 - 0.5 * min(t, 1)))[angle]] = FAT
        rv = rho < free[angle]
        tissue[rho < np.where(wall > 0, free + wall, 0)[angle]] = RV_WALL
        tissue[rv] = RV_BLOOD
        fine = plane.field(rng.normal(0, 1, (64, 64)))
        tissue[rv & (fine > 1.25 - self.trabeculae)] = RV_WALL
        if t <= 1:
            inside, cavity = rho < outer[angle], rho < inner[angle]
            tissue[inside] = MYOCARDIUM
            tissue[cavity] = LV_BLOOD
            near_wall = rho > inner[angle] - (2 + 5 * t)
            tissue[cavity & near_wall & (fine > 0.9 - self.trabeculae)] = PAPILLARY
            if self.papillary_range[0] < t < self.papillary_range[1]:
                for where, size in self.papillary:
                    at = 0.68 * inner[int(where / (2 * np.pi) * _BINS) % _BINS]
                    size *= 1.15 if systole else 1.0
                    tissue[cavity & ((u - at * np.cos(where)) ** 2 + (v - at * np.sin(where)) ** 2 < size * size)] = PAPILLARY
            labels[inside] = MYO
            labels[cavity] = LV
            labels[rv & ~inside] = RV

    def _contours(self, t: float, systole: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Radii over the angle of the LV's inner and outer wall and of the RV's free wall (0 where there is none)."""
        taper = np.sqrt(max(1 - (0.97 * min(t, 1)) ** 2, 0)) * (1 - 0.1 * max(0, 1 - t / 0.12))
        wall = self.wall * self.thickness * (1 - 0.3 * t)
        outer = (self.radius + self.wall) * taper * (1 + self.outline)
        inner = np.maximum(outer - wall, 0)
        if systole:
            muscle = 1.05 * (outer**2 - inner**2) / (1 - self.shortening)  # kept by the wall, which the shortening thickens
            inner = inner * (self.squeeze + (1 - self.squeeze) * self.scar)
            outer = np.sqrt(inner**2 + muscle)
        inner = np.where(inner < 2.5, 0, inner)
        end = np.clip(1 - t / self.rv_end, 0, 1)
        off = np.angle(np.exp(1j * (_ANGLE - np.pi))) / (self.rv_reach * (0.55 + 0.45 * end))
        off = off + self.rv_skew * (1 - off**2)
        crescent = np.clip(1 - off**2, 0, None) ** 0.6
        depth = self.rv_depth * end**0.55 * (self.rv_squeeze if systole else 1.0)
        free = np.where((crescent > 0) & (depth > 2), outer + depth * crescent, 0)
        return inner, outer, free

    def _atria(self, u, v, t, tissue) -> None:
        """Above the valves: atria and the roots of the great vessels, bright like ventricles and without a thick wall."""
        scale = self.radius * max(0.6, 1 + t)
        places = ((0.3, 0.5, 1.0, 0.75), (-1.4, 0.3, 1.0, 0.8), (-0.2, -0.6, 0.55, 0.55))
        blobs = []
        for (cx, cy, a, b), r in zip(places, self.atria, strict=True):
            a, b = scale * a * (0.8 + 0.4 * r[2]), scale * b * (0.8 + 0.4 * r[3])
            du, dv = u - scale * (cx + 0.3 * (r[0] - 0.5)), v - scale * (cy + 0.3 * (r[1] - 0.5))
            blobs.append(((du / a) ** 2 + (dv / b) ** 2, min(a, b)))
        for grow, kind in ((6.0, FAT), (2.2, RV_WALL), (0.0, ATRIUM)):
            for q, r in blobs:
                tissue[q < (1 + grow / r) ** 2] = kind
