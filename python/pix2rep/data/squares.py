"""Random squares of slices, as Pix2Rep-v2 pre-trains on: cut before the views, which therefore show the same square."""

import numpy as np
import torch
import torch.nn.functional as F

from pix2rep.data.cache import Prepared
from pix2rep.data.slices import MovingSource


class SquareSource(MovingSource):
    """Squares of some patients' slices: an item is a slice, where its square lies a function of (seed, step, item).

    size: (H, W), what a square is resized to, images bicubically and clipped to [0, 1], labels and superpixels to the nearest; share: of a
    slice's shorter side, U for each square. Otherwise as `SliceSource`.
    """

    def __init__(self, prepared: Prepared, patients, size: tuple[int, int], share: tuple[float, float], seed: int = 0, labelled: bool = False):
        if len(size) != 2 or not 0 < share[0] <= share[1] <= 1:
            raise ValueError(f"data.squares must be SMALLEST,LARGEST in (0, 1] with data.size H,W, got {tuple(share)} with {tuple(size)}")
        super().__init__(prepared, patients, size, seed, labelled)
        self.share = tuple(share)

    def square(self, index: int) -> tuple[int, int, int]:
        """First row, first column and side of an item's square, pixels."""
        shape = self.cases[self._case[index]].shape[1:]
        share, *place = self._uniform((index, 0, 0, 2), (3,))
        smallest, largest = self.share
        side = max(1, round((smallest + (largest - smallest) * share) * min(shape)))
        return *(int(draw * (n - side + 1)) for draw, n in zip(place, shape, strict=True)), side

    def _item(self, index: int, what: str, padding: int = 0) -> np.ndarray:
        k = self._case[index]
        y, x, side = self.square(index)
        part = np.asarray(self._map(k, what)[index - self._start[k], y : y + side, x : x + side])
        if what == "image":
            image = torch.from_numpy(part.astype(np.float32))[None, None]
            return F.interpolate(image, self.size, mode="bicubic", align_corners=False).clamp(0, 1)[0, 0].numpy()
        rows, columns = (((np.arange(n) + 0.5) * side / n).astype(int) for n in self.size)
        return part[rows[:, None], columns].astype(np.int32)
