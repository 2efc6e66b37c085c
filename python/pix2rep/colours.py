"""Features as colours and as similarities, and how well those of two views follow the transform between them."""

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from pix2rep.overlay import COLOURS

if TYPE_CHECKING:
    from pix2rep.pairs import Pair

NEAR = 3.0  # pixels within which a match counts as found
QUERIES = 256  # points that are matched
DEUTERANOPE = np.array([[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]])  # linear RGB; Machado et al. 2009


@dataclass(frozen=True)
class Colours:
    """Features as colours by one PCA for all pictures: component 1 is lightness, 2 blue to yellow, 3 green to red (CIELAB).

    So the first two, most of what there is to see, do not need red and green told apart.
    """

    mean: np.ndarray  # [C]
    components: np.ndarray  # [3, C]
    low: np.ndarray  # [3], 2nd percentile
    high: np.ndarray  # 98th
    explained: np.ndarray  # [3] share of the variance

    @classmethod
    def fit(cls, maps: list[np.ndarray]) -> "Colours":
        """From all pixels of feature planes [C, H, W]."""
        rows = np.concatenate([m.reshape(len(m), -1).T for m in maps]).astype(np.float64)
        mean = rows.mean(0)
        values, vectors = np.linalg.eigh((rows - mean).T @ (rows - mean) / len(rows))
        components = np.zeros((3, len(mean)))
        found = vectors.T[::-1][:3]
        components[: len(found)] = found * np.sign(found[np.arange(len(found)), np.abs(found).argmax(1)])[:, None]  # eigh's signs are arbitrary
        low, high = np.percentile((rows - mean) @ components.T, (2, 98), axis=0)
        explained = np.zeros(3)
        explained[: len(found)] = values[::-1][:3] / max(values.sum(), 1e-30)
        return cls(mean, components, low, high, explained)

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """RGB [H, W, 3] in [0, 1] of a plane [C, H, W]."""
        from skimage.color import lab2rgb

        scores = np.tensordot(self.centred(features), self.components, (0, 1))  # [H, W, 3]
        share = np.clip((scores - self.low) / np.maximum(self.high - self.low, 1e-12), 0, 1)
        lab = np.stack([30 + 65 * share[..., 0], 90 * share[..., 2] - 45, 100 * share[..., 1] - 50], -1)
        return np.clip(lab2rgb(lab), 0, 1)

    def centred(self, features: np.ndarray) -> np.ndarray:
        """Features minus the mean over all pictures: without it the cosine of any two pixels is near 1."""
        return features - self.mean[:, None, None].astype(features.dtype)


def cosine(features: np.ndarray, row: np.ndarray) -> np.ndarray:
    """Of a feature [C] with every pixel of a plane [C, *S]; 0 where one is 0."""
    norm = np.linalg.norm(features, axis=0) * np.linalg.norm(row)
    return np.tensordot(row, features, 1) / np.maximum(norm, 1e-12)


def cosines(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Of two planes [C, *S], pixel by pixel: [*S]."""
    norm = np.linalg.norm(first, axis=0) * np.linalg.norm(second, axis=0)
    return (first * second).sum(0) / np.maximum(norm, 1e-12)


def agreement(pair: "Pair", colours: Colours) -> dict[str, float]:
    """How well features follow the transform, over pixels of view 2 that come from inside.

    corresponding: mean cosine of the two features of a pixel; unrelated: the same with pixels drawn anew; found: share of QUERIES pixels
    whose most similar pixel in view 1 is within NEAR pixels of the true one; chance: that share for a pixel drawn at random. NaN without
    such pixels.
    """
    first, second, warped = (colours.centred(f) for f in (pair.features_1, pair.features_2, pair.warped))
    keep = np.flatnonzero(pair.in_plane)
    if len(keep) < 2:
        return dict.fromkeys(("corresponding", "unrelated", "found", "chance"), float("nan"))
    rng = np.random.default_rng(0)
    rows_1, rows_2 = (_unit(f.reshape(len(f), -1).T[keep]) for f in (warped, second))
    keys = _unit(first.reshape(len(first), -1).T)
    queries = rng.permutation(len(keep))[:QUERIES]
    width = first.shape[2]
    truth = pair.source.reshape(-1, 2)[keep[queries]]
    best = (rows_2[queries] @ keys.T).argmax(1)
    distance = np.hypot(best // width - truth[:, 0], best % width - truth[:, 1])
    lattice = np.arange(len(keys))
    by_chance = np.hypot(lattice // width - truth[:, :1], lattice % width - truth[:, 1:]) <= NEAR
    return {
        "corresponding": float((rows_1 * rows_2).sum(1).mean()),
        "unrelated": float((rows_1 * rows_2[rng.permutation(len(keep))]).sum(1).mean()),
        "found": float((distance <= NEAR).mean()),
        "chance": float(by_chance.mean()),
    }


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


@cache
def distinct(count: int) -> np.ndarray:
    """RGB [count, 3] in [0, 1]: Okabe and Ito's colours, then each the farthest (CIELAB) from those before it, also to a deuteranope's eye."""
    from matplotlib.colors import to_rgb

    chosen = [to_rgb(colour) for colour in COLOURS][:count]
    steps = np.linspace(0, 1, 11)
    rgb = np.stack(np.meshgrid(steps, steps, steps), -1).reshape(-1, 3)
    seen = _seen(rgb)
    coloured = (np.ptp(rgb, 1) >= 0.25) & (seen[0][:, 0] > 30) & (seen[0][:, 0] < 92)  # grey is the image's
    rgb, seen = rgb[coloured], [lab[coloured] for lab in seen]
    nearest = np.full(len(rgb), np.inf)
    for k in range(count):
        if k == len(chosen):
            chosen.append(tuple(rgb[nearest.argmax()]))
        far, far_too = (np.linalg.norm(lab - own, axis=1) for lab, own in zip(seen, _seen(np.array([chosen[k]])), strict=True))
        nearest = np.minimum(nearest, far + far_too)
    return np.array(chosen)


def _seen(rgb: np.ndarray) -> list[np.ndarray]:
    """CIELAB [N, 3] of colours [N, 3] as they are, and as they look to a deuteranope."""
    from skimage.color import rgb2lab

    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4) @ DEUTERANOPE.T
    linear = np.clip(linear, 0, 1)
    confused = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return [rgb2lab(rgb), rgb2lab(confused)]
