"""Two views of a slice with the grid between them, and what a backbone makes of both: what the pictures of a report show."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pix2rep.config import Config
from pix2rep.data.cache import PreparedCase, crop_or_pad
from pix2rep.methods.pix2rep import IMAGE_MODE
from pix2rep.training import seed_of
from pix2rep.views.photometric import Photometric
from pix2rep.views.spatial import SpatialView, dense, warp_image
from pix2rep_kernels import warp

INSIDE, OUTSIDE = 7, 2  # points of a pair
MARGIN, APART = 0.06, 0.1  # shares of the side that points keep from the border of view 2, and from each other
NEAR = 3.0  # pixels within which a match counts as found
QUERIES = 256  # points that are matched


@dataclass(frozen=True)
class Pair:
    """One slice plane of two views; of volumes, the middle plane of view 2 and the plane of view 1 that its first point comes from.

    Pixels are (row, column). Planes of features are float32 [C, H, W].
    """

    patient: str
    case: str
    part: str  # of the split
    plane: str  # in words
    aspect: float  # height of a pixel over its width, mm
    view_1: np.ndarray  # [H, W]
    view_2: np.ndarray
    source: np.ndarray  # [H, W, 2] float: where in view 1 a pixel of view 2 comes from
    inside: np.ndarray  # [H, W] bool: it comes from within view 1
    in_plane: np.ndarray  # [H, W] bool: and, of volumes, from the plane shown
    features_1: np.ndarray
    features_2: np.ndarray
    warped: np.ndarray  # features of view 1 at `source`, 0 outside
    points: np.ndarray  # [P, 2] int: pixels of view 2, those that come from inside first


def draw_views(image: Tensor, config: Config, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """View 1 and view 2 [1, 1, *S] of an image of that shape, and the grid [1, *S, d] that maps view 2 to view 1, drawn as in pre-training."""
    photometric = Photometric(config.photometric)
    view_1 = photometric(image, generator)
    size = tuple(image.shape[2:])
    grid = dense(SpatialView(config.spatial, config.network.dims)(1, size, generator, image.device), size)
    return view_1, warp_image(photometric(image, generator), grid, IMAGE_MODE[config.loss.mode]), grid


@torch.no_grad()
def make_pair(case: PreparedCase, part: str, config: Config, backbone: Callable[[Tensor], Tensor], index: int) -> Pair:
    """The pair of the middle slice of a case (of the whole of it where data.size has three entries), on the CPU.

    `index` and pretrain.seed decide the draws. Raises VolumeError for a prepared volume that is not what was written.
    """
    volume, size = np.asarray(case.image()), config.data.size
    middle = len(volume) // 2
    image = torch.from_numpy(crop_or_pad(volume[middle] if len(size) == 2 else volume, size).astype(np.float32))[None, None]
    generator = torch.Generator().manual_seed(seed_of(config.pretrain.seed, index))
    view_1, view_2, grid = draw_views(image, config, generator)
    features_1, features_2 = (backbone(view).float() for view in (view_1, view_2))
    height, width = size[-2:]
    flat = 0 if len(size) == 2 else size[0] // 2 * height * width
    lattice = torch.arange(flat, flat + height * width)
    warped, _ = warp(features_1, grid, points=lattice, mode=config.loss.mode)
    position = pixels_of(grid, size).reshape(-1, len(size))[lattice].reshape(height, width, -1)  # [H, W, d], last axis ordered as `size`
    last = torch.tensor([n - 1 for n in size])
    inside = ((position > -1e-4) & (position < last + 1e-4)).all(-1)
    view_2 = view_2[0, 0].reshape(-1, height, width)[flat // (height * width)].numpy()
    points = choose_points(view_2, inside.numpy(), generator)
    depth, in_plane = 0, inside
    if len(size) == 3:
        row, column = points[0]
        depth = int(position[row, column, 0].round().clamp(0, size[0] - 1))
        in_plane = inside & ((position[..., 0] - depth).abs() <= 0.5)
    plane = f"slice {middle + 1} of {len(volume)}" if len(size) == 2 else f"slice {depth + 1} of view 1, {size[0] // 2 + 1} of view 2, of {size[0]}"

    def planes(features: Tensor, at: int) -> np.ndarray:
        return features[0].reshape(features.shape[1], -1, height, width)[:, at].numpy()

    return Pair(
        case.patient, case.id, part, plane, case.spacing[1] / case.spacing[2],
        planes(view_1, depth)[0], view_2, position[..., -2:].numpy(), inside.numpy(), in_plane.numpy(),
        planes(features_1, depth), planes(features_2, flat // (height * width)), warped.T.reshape(-1, height, width).float().numpy(), points,
    )  # fmt: skip


def pixels_of(grid: Tensor, size: tuple[int, ...]) -> Tensor:
    """Positions [*S, d] in pixels, ordered as the axes `size`, of a dense grid [1, *S, d] (x first, align_corners=True)."""
    return (grid[0].flip(-1) + 1) / 2 * torch.tensor([n - 1 for n in size])


def choose_points(view: np.ndarray, inside: np.ndarray, generator: torch.Generator) -> np.ndarray:
    """Up to INSIDE pixels of view 2 [H, W] that come from inside, spread, then up to OUTSIDE others: [P, 2] int, P >= 1.

    The first is where the picture changes most, near the middle.
    """
    from scipy.ndimage import gaussian_gradient_magnitude

    height, width = view.shape
    edge = max(1, round(MARGIN * min(height, width)))
    row, column = np.mgrid[:height, :width]
    border = np.minimum(np.minimum(row, height - 1 - row), np.minimum(column, width - 1 - column))  # pixels to it
    strength = gaussian_gradient_magnitude(view.astype(np.float32), 1.5)
    middle = np.exp(-8 * ((row / height - 0.5) ** 2 + (column / width - 0.5) ** 2))
    central = inside & (border >= edge)
    candidates = np.argwhere(central if central.any() else np.ones_like(inside))
    change = strength[tuple(candidates.T)]
    candidates = candidates[change >= np.median(change)]  # not in empty air
    chosen = [candidates[(strength * middle)[tuple(candidates.T)].argmax()]]
    chosen += _spread(candidates, chosen, INSIDE - 1, APART * min(height, width), generator)
    return np.array(chosen + _spread(np.argwhere(~inside & (border >= edge // 2)), chosen, OUTSIDE, edge, generator))


def _spread(candidates: np.ndarray, taken: list[np.ndarray], count: int, apart: float, generator: torch.Generator) -> list[np.ndarray]:
    """Up to `count` of the candidates [K, 2], each the farthest from those before it, and at least `apart` pixels."""
    order = torch.randperm(len(candidates), generator=generator).numpy()  # among equally far ones
    candidates, found = candidates[order], []
    while len(found) < count and len(candidates):
        gap = np.min([np.hypot(*(candidates - point).T) for point in (*taken, *found)], axis=0)
        if gap.max() < apart:
            break
        found.append(candidates[gap.argmax()])
    return found


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


def agreement(pair: Pair, colours: Colours) -> dict[str, float]:
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
