"""Patches of volumes that may be larger than memory: only the slab that a patch covers is read from the prepared file.

A volume shorter than the patch along an axis counts as padded by zeros at both ends (`crop_or_pad`'s way): there is one position then.
"""

import numpy as np
import torch
import torch.nn.functional as F

from pix2rep.config import Config
from pix2rep.data.cache import Prepared
from pix2rep.data.slices import MovingSource, SliceSource
from pix2rep.data.squares import SquareSource
from pix2rep.method_config import PglConfig

COUNTER = (0, 0, 0, 1)  # of the draws
CANDIDATES = 64  # pairs of positions drawn until one overlaps enough


class PatchSource(MovingSource):
    """Random patches of some patients' volumes: an item is a volume, where its patch lies a function of (seed, step, place in the batch).

    size: (D, H, W); crops: how the two crops of PGL are drawn. Otherwise as `SliceSource`.
    """

    def __init__(
        self, prepared: Prepared, patients, size: tuple[int, int, int], seed: int = 0, labelled: bool = False, crops: PglConfig | None = None
    ):
        if len(size) != 3:
            raise ValueError(f"data.size must be three numbers of voxels for patches, got {tuple(size)}")
        super().__init__(prepared, patients, size, seed, labelled)
        self.geometry = crops or PglConfig()

    def batch(self, indices) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Images [B, 1, *size] float32 in [0, 1] and labels [B, *size] int64 (None for an unlabelled source)."""
        images = torch.from_numpy(self._read(indices, "image")).float().unsqueeze(1)
        return images, torch.from_numpy(self._read(indices, "labels")).long() if self.labelled else None

    def positions(self, indices) -> np.ndarray:
        """First voxel of each patch, [B, 3] int64; negative where the volume is padded."""
        shapes = np.array([self.cases[int(i)].shape for i in indices])
        return _place(self._uniform(COUNTER, (len(shapes), 3)), shapes, np.array(self.size))

    def crops(self, indices) -> torch.Tensor:
        """Two overlapping crops of each volume, resized linearly to `size`, from one slab read: float32 [2, B, 1, *size]."""
        images = []
        for index, low, sides in self._crop_boxes(indices):
            start, stop = low.min(0), (low + sides).max(0)
            slab = read_patch(self._map(int(index), "image"), start, tuple(stop - start))
            inner = (tuple(slice(a, a + n) for a, n in zip(corner - start, side, strict=True)) for corner, side in zip(low, sides, strict=True))
            images.append(torch.stack([_resized(slab[where], self.size) for where in inner]))
        return torch.stack(images, 1)

    def boxes(self, indices) -> torch.Tensor:
        """What both crops of `crops` see: lower and upper edges in voxels of each crop (0 and size: its faces), float32 [2, 2, B, 3]."""
        edges = []
        for _, low, sides in self._crop_boxes(indices):
            common = np.stack([low.max(0), (low + sides).min(0)])  # [2, 3]
            edges.append((common[:, None] - low) * (np.array(self.size) / sides))
        return torch.from_numpy(np.stack(edges, 2).astype(np.float32))

    def _crop_boxes(self, indices):
        """(index, first voxels [2, 3], sides [2, 3]) of each item's two crops."""
        draws = self._uniform(COUNTER, (len(indices), 2 + 2 * CANDIDATES, 3))
        for index, draw in zip(indices, draws, strict=True):
            yield index, *crop_boxes(self.cases[int(index)].shape, self.size, draw, self.geometry)

    def _read(self, indices, what: str) -> np.ndarray:
        return np.stack([read_patch(self._map(int(i), what), low, self.size) for i, low in zip(indices, self.positions(indices), strict=True)])


def open_source(prepared: Prepared, patients, config: Config) -> SliceSource:
    """Unlabelled images at data.size: slices (or with data.squares squares of them) for two entries, random patches for three."""
    size = config.data.size
    if config.data.squares is not None:
        return SquareSource(prepared, patients, size, config.data.squares, config.pretrain.seed)
    if len(size) == 2:
        return SliceSource(prepared, patients, size)
    return PatchSource(prepared, patients, size, config.pretrain.seed, crops=config.pgl)


def read_patch(array, low, size: tuple[int, ...]) -> np.ndarray:
    """A copy of array[low : low + size], 0 outside the array; only that slab is read. `low` may be negative."""
    ends = [(max(0, int(a)), max(0, min(int(a) + n, length))) for a, n, length in zip(low, size, array.shape, strict=True)]
    part = np.asarray(array[tuple(slice(*pair) for pair in ends)])
    if part.shape == tuple(size):
        return part.copy()
    whole = np.zeros(size, part.dtype)
    whole[tuple(slice(start - int(a), stop - int(a)) for (start, stop), a in zip(ends, low, strict=True))] = part
    return whole


def tiles(shape: tuple[int, ...], size: tuple[int, ...], overlap: float = 0.0) -> list[tuple[int, ...]]:
    """First voxels of patches of `size` that cover a volume, in a fixed order; the last ones end with it. overlap: share of a patch."""
    from monai.data.utils import dense_patch_slices

    padded = tuple(max(n, s) for n, s in zip(shape, size, strict=True))
    step = tuple(max(1, round(s * (1 - overlap))) for s in size)
    before = [max(s - n, 0) // 2 for n, s in zip(shape, size, strict=True)]
    return [tuple(int(part.start) - b for part, b in zip(found, before, strict=True)) for found in dense_patch_slices(padded, size, step)]


def crop_boxes(shape, size, draw: np.ndarray, config: PglConfig) -> tuple[np.ndarray, np.ndarray]:
    """First voxel and sides of two crops, int64 [2, 3] each, from uniform draws [2 + 2 CANDIDATES, 3].

    A side is the final one times U(crop_scale), or the whole (padded) volume where that is shorter. Positions are uniform among those that
    overlap enough; where no candidate does, the second crop is centred on the first.
    """
    size, shape = np.array(size), np.array(shape)
    first = 0 if config.depth == "free" else 1  # axis from which crops differ
    sides = np.tile(size, (2, 1))
    smallest, largest = config.crop_scale
    factor = smallest + (largest - smallest) * draw[:2]
    sides[:, first:] = np.minimum(np.rint(size * factor).astype(np.int64), np.maximum(shape, size))[:, first:]
    lows = _place(draw[2:].reshape(-1, 2, 3), shape, sides)  # [CANDIDATES, 2, 3]
    lows[:, 1, :first] = lows[:, 0, :first]
    good = np.flatnonzero(_overlap(lows, sides, config.overlap_of) >= config.min_overlap)
    if len(good):
        return lows[good[0]], sides
    low = lows[0]
    before = np.maximum(sides[1] - shape, 0) // 2
    low[1] = np.clip(low[0] + (sides[0] - sides[1]) // 2, -before, np.maximum(shape - sides[1], -before))
    return low, sides


def _overlap(lows: np.ndarray, sides: np.ndarray, of: str) -> np.ndarray:
    """Share of the voxels that two boxes (first voxels [..., 2, 3], sides [2, 3]) have in common, of their "union" or of the "smaller" box."""
    common = np.clip((lows + sides).min(-2) - lows.max(-2), 0, None).prod(-1)
    volumes = sides.prod(-1)
    return common / (volumes.sum() - common if of == "union" else volumes.min())


def _place(draw: np.ndarray, shape: np.ndarray, sides: np.ndarray) -> np.ndarray:
    """First voxels from uniform draws: anywhere inside, or half the missing voxels before the start where the volume is shorter."""
    room = shape - sides
    return np.where(room > 0, np.floor(draw * (np.maximum(room, 0) + 1)), -(np.maximum(-room, 0) // 2)).astype(np.int64)


def _resized(part: np.ndarray, size) -> torch.Tensor:
    """[D, H, W] -> float32 [1, *size], linear with half-pixel centres."""
    image = torch.from_numpy(part.astype(np.float32))[None]
    return image if image.shape[1:] == tuple(size) else F.interpolate(image[None], tuple(size), mode="trilinear", align_corners=False)[0]
