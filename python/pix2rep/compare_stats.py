"""Means of a comparison with intervals over patients and seeds.

A score has a patient, a seed and a class; a patient's is the mean over volumes and seeds within a class, then over classes
(`report.patient_scores`), and the mean is over patients. The interval is a percentile bootstrap, crossed: every resample draws patients
with replacement and, independently, seeds with replacement, the same ones for whatever is paired.
"""

from dataclasses import dataclass

import numpy as np

INTERVAL = (
    "95 % percentile interval of a crossed bootstrap: test patients and seeds are both drawn with replacement, independently of each other"
)


@dataclass(frozen=True)
class Scores:
    """Sum and number of the defined values of each patient, seed and class, over volumes: float64 [P, S, C] each."""

    total: np.ndarray
    count: np.ndarray

    def of_class(self, index: int) -> "Scores":
        return Scores(self.total[..., index : index + 1], self.count[..., index : index + 1])

    def of_seeds(self, indices: list[int]) -> "Scores":
        return Scores(self.total[:, indices], self.count[:, indices])

    def patients(self, seed_weights: np.ndarray | None = None) -> np.ndarray:
        """Scores [B, P] with seeds weighted [B, S] (None: equally, B = 1); NaN for a patient without any."""
        weights = np.ones((1, self.total.shape[1])) if seed_weights is None else seed_weights
        total, count = (np.tensordot(weights, part, (1, 1)) for part in (self.total, self.count))  # [B, P, C]
        values = np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)
        return _mean(values, np.ones(values.shape[-1]))

    @property
    def mean(self) -> float:
        return float(_mean(self.patients(), np.ones(len(self.total)))[0])


def scores_of(rows: list[dict], key: str, patients: list[str], seeds: list[int], classes: tuple[str, ...]) -> Scores:
    """From rows of `evaluate.score_case`; NaN is not counted."""
    places = [{name: index for index, name in enumerate(names)} for names in (patients, seeds, classes)]
    total, count = np.zeros((2, len(patients), len(seeds), len(classes)))
    for row in rows:
        if not np.isnan(row[key]):
            at = tuple(place[row[name]] for place, name in zip(places, ("patient", "seed", "class"), strict=True))
            total[at] += row[key]
            count[at] += 1
    return Scores(total, count)


def interval(scores: Scores, resamples: int, other: Scores | None = None, seed: int = 0) -> dict[str, float]:
    """{"mean", "low", "high"} of the scores, or of their paired difference to `other` (the same patients and seeds, in order).

    Fewer than two patients have no interval: low and high are NaN.
    """
    patients, seeds = scores.total.shape[:2]
    observed = scores.patients() - (0 if other is None else other.patients())
    found = {"mean": float(_mean(observed, np.ones(patients))[0]), "low": float("nan"), "high": float("nan")}
    if patients < 2 or not seeds or np.isnan(found["mean"]):
        return found
    of_patients, of_seeds = draws(patients, seeds, resamples, seed)
    values = scores.patients(of_seeds) - (0 if other is None else other.patients(of_seeds))
    low, high = np.nanquantile(_mean(values, of_patients), [0.025, 0.975])
    return found | {"low": float(low), "high": float(high)}


def draws(patients: int, seeds: int, resamples: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """How often each patient [B, P] and each seed [B, S] is in each resample."""
    rng = np.random.default_rng(seed)
    return tuple(rng.multinomial(n, np.full(n, 1 / n), resamples).astype(float) for n in (patients, seeds))


def wins(scores: Scores, other: Scores) -> tuple[int, int]:
    """How many patients score better, how many worse."""
    difference = (scores.patients() - other.patients())[0]
    return int((difference > 0).sum()), int((difference < 0).sum())


def _mean(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weighted mean over the last axis of what is not NaN; NaN of nothing."""
    known = ~np.isnan(values)
    total, weight = (np.where(known, values, 0) * weights).sum(-1), (known * weights).sum(-1)
    return np.divide(total, weight, out=np.full(total.shape, np.nan), where=weight > 0)
