"""Superpixels of prepared volumes, made once and kept beside them: CASE-KEY.superpixels-KEY.npy, [Z, H, W], numbered a slice or a volume."""

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from pix2rep.config import LrcConfig
from pix2rep.data.cache import PreparedCase
from pix2rep.data.nifti import VolumeError
from pix2rep.data.parallel import in_order
from pix2rep.disk import atomic
from pix2rep_kernels import felzenszwalb

log = logging.getLogger(__name__)

_VERSION = 1  # raise it when kept files change meaning


class Superpixels:
    """Superpixels by the section `lrc`: of every slice by itself (dims 2), or supervoxels of the whole volume (dims 3)."""

    def __init__(self, config: LrcConfig, dims: int):
        self.config, self.dims = config, dims

    def make(self, cases: Sequence[PreparedCase], workers: int | None = None) -> int:
        """Those of every case that are not kept already, by `workers` threads (default: one a processor, at most 8); returns how many."""
        missing = [case for case in cases if self._kept(case) is None]
        if missing:
            log.info("making the superpixels of %d volumes; those of %d are there", len(missing), len(cases) - len(missing))
        for _ in in_order(self._one, missing, workers):
            pass
        return len(missing)

    def path(self, case: PreparedCase) -> Path:
        """The image's file carries a key of its source and preparation; this adds one of what superpixels depend on beside it."""
        options = [self.config.superpixel_scale, self.config.superpixel_sigma, self.config.superpixel_min_size, self._spacing(case)]
        key = hashlib.sha256(json.dumps([_VERSION, self.dims, *options]).encode()).hexdigest()[:12]
        return case.image_file.with_name(f"{case.image_file.name.removesuffix('.image.npy')}.superpixels-{key}.npy")

    def open(self, case: PreparedCase) -> np.ndarray:
        """uint16 or int32 [Z, H, W], memory-mapped read-only. Raises VolumeError for a file that has changed or gone since `make`."""
        found = self._kept(case)
        if found is None:
            raise VolumeError(self.path(case), f"must be superpixels {list(case.shape)}, as they were made; start the command again to make them anew")
        return found

    def select(self, labels: np.ndarray, image: np.ndarray) -> np.ndarray:
        """Regions of an item, int32 of its shape: the superpixels kept, numbered from 0, and -1 elsewhere.

        labels: int32, -1 outside the volume; image: of the same shape. Background and tiny ones, as the item shows them, are dropped, then
        the smallest of more than max_regions.
        """
        inside = labels >= 0
        flat = labels[inside]
        if not flat.size:
            return np.full(labels.shape, -1, np.int32)
        sizes = np.bincount(flat)
        total = np.bincount(flat, weights=image[inside])
        keep = (sizes >= self.config.min_pixels) & (total >= self.config.background * sizes)
        largest = np.flatnonzero(keep)[np.argsort(-sizes[keep], kind="stable")[: self.config.max_regions]]
        number = np.full(len(sizes), -1, np.int32)
        number[np.sort(largest)] = np.arange(len(largest))
        regions = np.full(labels.shape, -1, np.int32)
        regions[inside] = number[flat]
        return regions

    def _one(self, case: PreparedCase) -> None:
        volume = torch.from_numpy(np.array(case.image()))
        items = volume if self.dims == 2 else [volume]
        options = {"scale": self.config.superpixel_scale, "sigma": self.config.superpixel_sigma, "min_size": self.config.superpixel_min_size}
        labels = np.stack([felzenszwalb(item, spacing=self._spacing(case), **options).numpy() for item in items]).reshape(case.shape)
        with atomic(self.path(case)) as temporary:
            np.save(temporary, labels.astype(np.uint16) if labels.max() < 2**16 else labels)

    def _spacing(self, case: PreparedCase) -> tuple[float, ...] | None:
        return tuple(case.spacing) if self.config.superpixel_spacing and self.dims == 3 else None

    def _kept(self, case: PreparedCase) -> np.ndarray | None:
        try:
            array = np.load(self.path(case), mmap_mode="r")
            return array if array.dtype in (np.uint16, np.int32) and array.shape == case.shape else None
        except (OSError, ValueError, EOFError, AttributeError):  # an .npz has neither dtype nor shape
            return None
