"""Overlap and surface distance of labelled volumes, and intervals over patients.

A class that a volume does not have, and that is not predicted there, has no score (NaN) and is left out of every mean. Present in one of
the two only: Dice 0. HD95 needs both surfaces: it is undefined (NaN) as soon as one of them is empty, and such volumes are counted.
"""

import warnings

import numpy as np

EMPTY_POLICY = (
    "class absent from truth and prediction: no score, left out of the means; absent from one of them: Dice 0; "
    "HD95 undefined when either is empty (counted as hd95_undefined)"
)


def _check(prediction: np.ndarray, truth: np.ndarray) -> None:
    if prediction.shape != truth.shape:
        raise ValueError(f"prediction must have the shape of truth, {truth.shape}, got {prediction.shape}")


def dice(prediction: np.ndarray, truth: np.ndarray, classes: int) -> np.ndarray:
    """Dice of labels 1..classes: 2 |P n T| / (|P| + |T|).

    prediction, truth: integer arrays of one shape. Returns float64 [classes], NaN where both are empty. Raises ValueError on unequal
    shapes.
    """
    _check(prediction, truth)
    size = classes + 1
    # One pass over the voxels gives every intersection and both volumes. Labels beyond `classes` never reach here (the study refuses them).
    confusion = np.bincount(truth.ravel().astype(np.int64) * size + prediction.ravel(), minlength=size * size).reshape(size, size)
    total = confusion.sum(0) + confusion.sum(1)
    scores = np.full(size, np.nan)
    np.divide(2.0 * np.diag(confusion), total, out=scores, where=total > 0)
    return scores[1:]


def hd95(prediction: np.ndarray, truth: np.ndarray, classes: int, spacing: tuple[float, ...]) -> np.ndarray:
    """95th percentile Hausdorff distance of labels 1..classes (MONAI: the larger of the two directions), in the unit of `spacing`.

    prediction, truth: integer arrays [Z, H, W] or [H, W]; spacing: one length an axis, in that order. Returns float64 [classes], NaN where
    undefined. Raises ValueError on unequal shapes or a spacing of another length.
    """
    import torch
    from monai.metrics import compute_hausdorff_distance

    _check(prediction, truth)
    if len(spacing) != truth.ndim:
        raise ValueError(f"spacing must have {truth.ndim} lengths, one an axis, got {tuple(spacing)}")
    if truth.ndim == 3 and truth.shape[0] == 1:  # in a single slice every voxel would be surface
        prediction, truth, spacing = prediction[0], truth[0], spacing[1:]
    distances = np.full(classes, np.nan)
    options = {"include_background": True, "percentile": 95, "spacing": tuple(map(float, spacing))}
    for k in range(1, classes + 1):
        p, t = (torch.from_numpy(a == k)[None, None] for a in (prediction, truth))
        if p.any() and t.any():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # MONAI 1.6 warns of an argument that it passes itself
                distances[k - 1] = compute_hausdorff_distance(p, t, **options).item()
    return distances


def nanmean(values) -> float:
    """Mean of what is not NaN; NaN of nothing, without numpy's warning."""
    values = np.asarray(values, dtype=np.float64)
    values = values[~np.isnan(values)]
    return float(values.mean()) if values.size else float("nan")


def bootstrap(values, resamples: int = 2000, level: float = 0.95, seed: int = 0) -> tuple[float, float, float]:
    """Mean of `values` (one a patient; NaN left out) and its percentile bootstrap interval: (mean, low, high).

    Fewer than two patients have no interval: low and high are NaN. Seeded: the same values give the same interval.
    """
    values = np.asarray(values, dtype=np.float64)
    values = values[~np.isnan(values)]
    if values.size < 2:
        return nanmean(values), float("nan"), float("nan")
    draws = np.random.default_rng(seed).integers(values.size, size=(resamples, values.size))
    low, high = np.quantile(values[draws].mean(1), [(1 - level) / 2, (1 + level) / 2])
    return float(values.mean()), float(low), float(high)
