"""Batches of slices (or of volumes, when the size has three entries), and an order of them that is a function of the step."""

import copy
from collections import OrderedDict

import numpy as np
import torch

from pix2rep.data.cache import Prepared, PreparedCase, crop_or_pad
from pix2rep.data.superpixels import Superpixels

_OPEN = 256  # memory maps kept; each holds a file descriptor


class SliceSource:
    """The slices of some patients. With size (H, W) an item is an axial slice, with (D, H, W) a whole volume.

    `labelled=True` keeps cases with labels only, and batches carry them. Raises ValueError when no item is left; reading a
    prepared volume that has changed or gone meanwhile raises VolumeError.
    """

    def __init__(self, prepared: Prepared, patients, size: tuple[int, ...], labelled: bool = False):
        if len(size) not in (2, 3) or min(size) < 1:
            raise ValueError(f"data.size must be two or three positive numbers of pixels, got {tuple(size)}")
        self.prepared, self.size, self.labelled = prepared, tuple(size), labelled
        wanted = set(patients)
        self.cases = [c for c in prepared.cases if c.patient in wanted and not (labelled and c.label_file is None)]
        if not self.cases:
            kind = "a labelled volume" if labelled else "a volume"
            names = ", ".join(sorted(wanted)[:5])
            raise ValueError(f"patients must have {kind} among the {len(prepared.cases)} prepared, got {len(wanted)} patients ({names})")
        counts = [case.shape[0] if len(size) == 2 else 1 for case in self.cases]
        self._case = np.repeat(np.arange(len(counts)), counts)  # [items] -> case
        self._start = np.concatenate([[0], np.cumsum(counts)])
        self._place = {case.id: k for k, case in enumerate(self.cases)}
        self._maps: OrderedDict = OrderedDict()
        self.superpixels: Superpixels | None = None

    def __len__(self) -> int:
        return len(self._case)

    def at(self, step: int) -> "SliceSource":
        """The source as a (micro-)step reads it: itself, its items are the same at every step."""
        return self

    def batch(self, indices) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Images [B, 1, *size] float32 in [0, 1] and labels [B, *size] int64 (None for an unlabelled source), cropped or zero padded."""
        images = torch.from_numpy(np.stack([self._item(int(i), "image") for i in indices])).float().unsqueeze(1)
        if not self.labelled:
            return images, None
        return images, torch.from_numpy(np.stack([self._item(int(i), "labels") for i in indices])).long()

    def case_slices(self, case: PreparedCase | str) -> np.ndarray:
        """Indices of a case's items in order of Z, for `batch`."""
        name = case if isinstance(case, str) else case.id
        if name not in self._place:
            raise ValueError(f"case must be one of the source's {len(self.cases)}, got {name}")
        k = self._place[name]
        return np.arange(self._start[k], self._start[k + 1])

    def patients_of(self, indices) -> list[str]:
        """Patients that the items come from, sorted, each once."""
        return sorted({self.cases[self._case[int(i)]].patient for i in indices})

    def indices(self, indices) -> torch.Tensor:
        """int64 [B]: the items themselves, for a method that tells images apart."""
        return torch.from_numpy(np.array(indices, dtype=np.int64))

    def spacing(self, indices) -> torch.Tensor:
        """Voxel sizes, mm along the axes of `size`: float32 [B, len(size)]."""
        return torch.tensor([self.cases[self._case[int(i)]].spacing[-len(self.size) :] for i in indices], dtype=torch.float32)

    def depths(self, indices) -> torch.Tensor:
        """float32 [B] in (0, 1): place of a slice's middle between its volume's first and last face; of a whole volume 0.5."""
        indices = np.asarray(indices)
        first, after = (self._start[self._case[indices] + k] for k in (0, 1))
        return torch.from_numpy(((indices - first + 0.5) / (after - first)).astype(np.float32))

    def with_superpixels(self, superpixels: Superpixels) -> "SliceSource":
        """The same items, with superpixels (made now where they are not kept) for `regions`."""
        superpixels.make(self.cases)
        other = copy.copy(self)
        other.superpixels, other._maps = superpixels, OrderedDict()
        return other

    def regions(self, indices) -> torch.Tensor:
        """int32 [B, *size]: the superpixels that `Superpixels.select` keeps, -1 elsewhere. Raises ValueError for a source without."""
        if self.superpixels is None:
            raise ValueError("source must have superpixels to read regions, got one without; `with_superpixels` adds them")
        found = [self.superpixels.select(self._item(int(i), "superpixels", -1), self._item(int(i), "image")) for i in indices]
        return torch.from_numpy(np.stack(found))

    def _item(self, index: int, what: str, padding: int = 0) -> np.ndarray:
        k = self._case[index]
        array = self._map(k, what)
        array = array[index - self._start[k]] if len(self.size) == 2 else array
        return crop_or_pad(array if padding == 0 else array.astype(np.int32), self.size, padding)

    def _map(self, k: int, what: str) -> np.ndarray:
        key = (k, what)
        if key not in self._maps:
            case = self.cases[k]
            self._maps[key] = self.superpixels.open(case) if what == "superpixels" else getattr(case, what)()
            if len(self._maps) > _OPEN:
                self._maps.popitem(last=False)
        self._maps.move_to_end(key)
        return self._maps[key]


class MovingSource(SliceSource):
    """A source whose items show another part of a volume at every step: which, is a function of (seed, step) and what a subclass adds."""

    def __init__(self, prepared: Prepared, patients, size: tuple[int, ...], seed: int, labelled: bool):
        super().__init__(prepared, patients, size, labelled)
        self.seed, self.step = seed, 0

    def at(self, step: int) -> "MovingSource":
        """The source as a (micro-)step reads it."""
        moved = copy.copy(self)  # the open files are shared
        moved.step = step
        return moved

    def _uniform(self, counter: tuple[int, int, int, int], shape: tuple[int, ...]) -> np.ndarray:
        """float64 in [0, 1), the same in every NumPy release. A subclass's counter keeps its stream apart from the others and StepSampler's."""
        words = np.random.Philox(counter=list(counter), key=[self.seed, self.step]).random_raw(int(np.prod(shape)))
        return (words >> np.uint64(11)).reshape(shape) * 2.0**-53


class StepSampler:
    """Indices of every step, a pure function of (seed, step): a run resumed at a step sees what it would have seen.

    Each epoch is a fresh permutation cut into whole batches (its remainder waits for another epoch); with fewer items than a batch the
    permutation wraps around.
    """

    def __init__(self, length: int, batch_size: int, seed: int):
        if length < 1 or batch_size < 1:
            raise ValueError(f"length and batch_size must be at least 1, got {length} and {batch_size}")
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.steps_per_epoch = max(1, length // batch_size)
        self._epoch, self._order = -1, None

    def indices(self, step: int) -> np.ndarray:
        """[batch_size] int64."""
        epoch, part = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            # Raw Philox words are the same in every NumPy release, unlike Generator.permutation.
            words = np.random.Philox(key=[self.seed, epoch]).random_raw(self.length)
            self._epoch, self._order = epoch, np.argsort(words, kind="stable")
        if self.length < self.batch_size:
            return np.resize(self._order, self.batch_size)
        return self._order[part * self.batch_size : (part + 1) * self.batch_size].copy()
