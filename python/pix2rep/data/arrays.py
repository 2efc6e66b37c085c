"""Arrays of voxels to the shape and range that networks take."""

from pathlib import Path

import numpy as np

from pix2rep.data.discover import Case
from pix2rep.data.nifti import VolumeError


def crop_or_pad(array: np.ndarray, size: tuple[int, ...], value: float = 0) -> np.ndarray:
    """Centre crop or pad of the last len(size) axes to `size`; odd differences leave the extra element at the end."""
    lead = array.ndim - len(size)
    if lead < 0:
        raise ValueError(f"size must have at most {array.ndim} entries, got {tuple(size)}")
    source, target = [slice(None)] * lead, [slice(None)] * lead
    for n, s in zip(array.shape[lead:], size, strict=True):
        cut, pad, kept = max(n - s, 0) // 2, max(s - n, 0) // 2, min(n, s)
        source.append(slice(cut, cut + kept))
        target.append(slice(pad, pad + kept))
    if all(n >= s for n, s in zip(array.shape[lead:], size, strict=True)):
        return array[tuple(source)]
    out = np.full(array.shape[:lead] + tuple(size), value, dtype=array.dtype)
    out[tuple(target)] = array[tuple(source)]
    return out


def uncrop(array: np.ndarray, shape: tuple[int, ...], value: float = 0) -> np.ndarray:
    """Inverse of `crop_or_pad`: back to `shape` on the last len(shape) axes, `value` where the crop had cut."""
    return crop_or_pad(array, shape, value)


def scale(path: Path, image: np.ndarray, percentiles: tuple[float, float], window: tuple[float, float] | None = None) -> np.ndarray:
    """Image [Z, H, W] float32, clipped to its percentiles, or to `window` where given, as float32 in [0, 1].

    Raises VolumeError (of `path`) for one value only, and for an image that lies outside the window.
    """
    low, high = np.percentile(image, percentiles) if window is None else window
    if not high > low:  # more than 98 % of one value, such as a small organ in air
        low, high = image.min(), image.max()
    if not high > low:
        raise VolumeError(path, f"intensities must vary, got {low:g} in every voxel")
    if window is not None and not (image.max() > low and image.min() < high):
        raise VolumeError(path, f"intensities must vary within data.window={low:g},{high:g}, got {image.min():g} to {image.max():g}")
    low, high = np.float64(low), np.float64(high)
    scaled = np.empty(image.shape, np.float32)
    for slab, target in zip(image, scaled, strict=True):  # slab by slab: float64 is twice the volume
        target[:] = (np.clip(slab, low, high) - low) / (high - low)
    return scaled


def label_box(case: Case, labels: np.ndarray | None, margin: int) -> tuple[tuple[int, int], ...]:
    """Half-open ranges of Z, H, W around the foreground, `margin` pixels wider in plane. Raises VolumeError where there is none."""
    if labels is None or not labels.any():
        raise VolumeError(case.label or case.image, "data.roi=gt needs a label with foreground, got none")
    box = []
    for axis, extra in enumerate((0, margin, margin)):  # slices without foreground are dropped
        hit = np.flatnonzero(labels.any(axis=tuple(a for a in range(3) if a != axis)))
        box.append((max(0, int(hit[0]) - extra), min(labels.shape[axis], int(hit[-1]) + 1 + extra)))
    return tuple(box)


def resize(image: np.ndarray, size: tuple[int, int, int]) -> np.ndarray:
    """[Z, H, W] float32 at `size`, linear along every axis and antialiased."""
    import torch
    import torch.nn.functional as F

    resized = F.interpolate(torch.from_numpy(image)[:, None], size[1:], mode="bilinear", align_corners=False, antialias=True)[:, 0]
    return resize_depth(resized, size[0]).numpy()


def resize_depth(volume, depth: int):
    """Tensor [Z, ...] -> [depth, ...], linear and antialiased; itself where the depth is that already."""
    import torch.nn.functional as F

    if len(volume) == depth:
        return volume
    plane = volume.flatten(1)[None, None]  # antialiasing exists for two axes only: [1, 1, Z, everything else]
    plane = F.interpolate(plane, (depth, plane.shape[-1]), mode="bilinear", align_corners=False, antialias=True)
    return plane.view(depth, *volume.shape[1:])


def nearest(n: int, m: int) -> np.ndarray:
    """For each of m cells that cover n, the one whose centre is nearest."""
    return np.minimum(((np.arange(m) + 0.5) * n / m).astype(np.int64), n - 1)
