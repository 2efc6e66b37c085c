"""Which batch fits in a given memory, predicted from small batches and checked on a larger one.

The bytes of a step are linear in the batch, part by part (activations, gradients of features), but for the similarities of an eager InfoNCE
over all pixels, which are quadratic. So each part's peak gets a polynomial of its own, and the largest of them decides.
"""

import re
import time
from dataclasses import dataclass, replace

import numpy as np
import torch

from pix2rep.config import Config
from pix2rep.log import say
from pix2rep.meter import usable_bytes
from pix2rep.plain import COPIES, similarity_bytes
from pix2rep.profile import Profiled, losses_of
from pix2rep.training import pick_device

UNITS = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
MOST = 2**20  # images that a prediction looks at
CPU_SIMILARITIES = 2 * 2**30  # bytes of eager similarities that are still measured on a CPU: more takes minutes
ROUNDS = 4  # of checking a prediction, and correcting the law by what was measured instead
CLOSE = 0.01  # relative: a prediction that holds
BATCHES = (1, 2, 4)  # measured, times the smallest one that has loss.num_samples pixels


def parse_size(text: str) -> int:
    """ "24GiB" -> bytes. Raises ValueError."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*", text)
    unit = next((factor for name, factor in UNITS.items() if found and name.lower() == found[2].lower()), None)
    if unit is None or not float(found[1]):
        raise ValueError(f"--fit must be a size above 0 with a unit, such as 24GiB or 500MB ({', '.join(UNITS)}), got {text!r}")
    return round(float(found[1]) * unit)


@dataclass(frozen=True)
class Law:
    """Bytes of a step at a batch: the largest of its parts' polynomials. `parts`: {name: coefficients, constant first}."""

    parts: dict[str, tuple[float, ...]]

    def __call__(self, batch: int) -> float:
        return max(float(np.polynomial.polynomial.polyval(batch, coefficients)) for coefficients in self.parts.values())

    def largest(self, budget: float) -> int:
        """The largest batch, up to MOST, for which it and all smaller ones stay within `budget` bytes; 0 where none does."""
        low, high = 0, 1
        while high <= MOST and self(high) <= budget:
            low, high = high, 2 * high
        high = min(high, MOST + 1)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self(middle) <= budget else (low, middle)
        return low

    def plus(self, part: str, coefficients: tuple[float, ...]) -> "Law":
        summed = np.polynomial.polynomial.polyadd(self.parts[part], coefficients)
        return Law({**self.parts, part: tuple(float(c) for c in summed)})


def fit_law(measured: dict[int, dict[str, int]], degree: int) -> tuple[Law, float | None]:
    """Polynomials through the largest degree + 1 batches of {batch: {part: bytes}}, and how well they tell the smaller ones.

    A part's peak is the highest of several moments, each a law of its own: convex, so the larger batches say how it goes on. The second
    value is the largest |fitted - measured| / measured of the batches left over, None where none is.
    """
    batches = sorted(measured)
    used, left = batches[-degree - 1 :], batches[: -degree - 1]
    parts, errors = {}, []
    for part in measured[batches[0]]:
        found = np.polynomial.polynomial.polyfit(used, [measured[batch][part] for batch in used], degree)
        parts[part] = tuple(float(c) for c in found)
        errors += [abs(np.polynomial.polynomial.polyval(batch, found) / measured[batch][part] - 1) for batch in left]
    return Law(parts), max(map(float, errors), default=None)


def fit_batch(config: Config, budget: int, limit: float = 60.0) -> dict:
    """Predict the largest batch within `budget` bytes; of pix2rep for our loss and the eager one, `loss.num_samples` (1000 where that is null) and all pixels.

    limit: seconds that one check may take. It runs the step at the predicted batch, or at the largest one below it that free memory and
    `limit` allow; where the bytes differ by more than CLOSE, they enter the law, and the new prediction is checked, up to ROUNDS times.

    Returns {"budget_bytes", "pixels", "rows": [...]}. A row: loss, num_samples (None: all), source ("measured", or "shapes" for similarities
    too large to measure), measured (batches), law ({part: coefficients, constant first}, bytes), residual (of `fit_law`), largest_batch,
    predicted_bytes (there; for one image where none fits), verified: {batch, predicted_bytes, measured_bytes (None: out of memory)} or {why_not}.
    """
    device = pick_device(config.pretrain.device)
    if config.pretrain.threads:
        torch.set_num_threads(config.pretrain.threads)
    samples = config.loss.num_samples or 1000
    pixels = int(np.prod(config.data.size))
    sampled = config.loss.method == "pix2rep"
    first = -(-samples // pixels) if sampled and not config.loss.per_image else 1  # fewer pixels than samples would bend the law
    batches = tuple(first * factor for factor in BATCHES)
    profiled = Profiled(config, first, device)
    rows = []
    for count in (samples, None) if sampled else (None,):
        chosen = replace(config, loss=replace(config.loss, num_samples=count))
        profiled.losses = losses_of(chosen)
        for which in profiled.losses:
            rows.append(_row(profiled, chosen, which, batches, budget, limit, rows))
    return {"budget_bytes": budget, "pixels": pixels, "rows": rows}


def _row(profiled: Profiled, config: Config, which: str, batches: tuple[int, ...], budget: int, limit: float, before: list[dict]) -> dict:
    count = config.loss.num_samples
    of_one = similarity_bytes(config.loss, 1, int(np.prod(config.data.size)))
    quadratic = count is None and of_one > 0 and not config.loss.per_image  # per image: as many matrices as images
    say(f"measuring {which}, {count or 'all'} pixels")
    if which == "eager" and not _measurable(COPIES * similarity_bytes(config.loss, batches[-1], profiled.pixels), profiled.device):
        # The same step with few samples, or with our loss: what is beyond it is similarities.
        row = next((row for row in before if row["loss"] == which and row["source"] == "measured"), before[0])
        if quadratic:
            added = (0.0, 0.0, float(COPIES * of_one))
        elif config.loss.per_image:
            added = (0.0, float(COPIES * of_one))
        else:
            added = (float(COPIES * similarity_bytes(config.loss, batches[-1], profiled.pixels)),)
        law, residual, source = Law(row["law"]).plus("loss backward", added), row["residual"], "shapes"
        largest = law.largest(budget)
        verified = {"why_not": "too large to measure here" if largest else "no batch fits"}
    else:
        degree, source = 2 if which == "eager" and quadratic else 1, "measured"
        runs = _Runs(profiled, which)
        profiled.memory_of(batches[0], which)  # warm
        for batch in batches:
            runs(batch)
        for _ in range(ROUNDS):
            law, residual = fit_law(runs.parts, degree)
            largest = law.largest(budget)
            verified = _verified(runs, law, largest, 2 if quadratic else 1, limit)
            if "why_not" in verified or not verified["measured_bytes"] or abs(verified["measured_bytes"] / verified["predicted_bytes"] - 1) < CLOSE:
                break
    row = {"loss": which, "num_samples": count, "source": source, "law": law.parts, "residual": residual, "largest_batch": largest}
    return row | {"measured": sorted(runs.parts) if source == "measured" else [], "predicted_bytes": law(max(largest, 1)), "verified": verified}


def _measurable(similarities: int, device: torch.device) -> bool:
    most = usable_bytes(device)
    return similarities <= (most if device.type == "cuda" else min(most, COPIES * CPU_SIMILARITIES))


class _Runs:
    """Steps run so far: {batch: {part: bytes}} and {batch: seconds}."""

    def __init__(self, profiled: Profiled, which: str):
        self.profiled, self.which, self.parts, self.seconds = profiled, which, {}, {}

    def __call__(self, batch: int) -> dict[str, int]:
        if batch not in self.parts:
            began = time.perf_counter()
            self.parts[batch] = self.profiled.memory_of(batch, self.which)
            self.seconds[batch] = time.perf_counter() - began
        return self.parts[batch]


def _verified(runs: _Runs, law: Law, largest: int, power: int, limit: float) -> dict:
    """Run the step at the largest batch, or at the largest that is affordable here."""
    if not largest:
        return {"why_not": "no batch fits"}
    measured = max(runs.parts)
    in_memory = law.largest(usable_bytes(runs.profiled.device))
    in_time = int(measured * (limit / runs.seconds[measured]) ** (1 / power))  # time grows with the batch, or at most with its square
    batch = min(largest, max(measured, min(in_memory, in_time)))
    result = {"batch": batch, "predicted_bytes": law(batch), "measured_bytes": None}
    try:
        return result | {"measured_bytes": max(runs(batch).values())}
    except torch.OutOfMemoryError:
        return result
