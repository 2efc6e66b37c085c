"""Curves of a pre-training run from its log, what they should look like, and words where they do not."""

import math
from dataclasses import dataclass

from pix2rep.config import Config

COLLAPSED, POOR = -0.5, -1.0  # uniformity: 0 is one point, near -4 spread over the sphere
UNRELATED = 1.8  # alignment: 2 is unrelated, 0 the same
DEAD_SOME, DEAD_MANY = 0.1, 0.5  # shares of the projection's dimensions
UNLEARNT = 0.01  # relative distance to the loss when all similarities are alike
SHARE = 0.1  # of the rows, the last ones, that are judged
FEW = 5  # rows

TITLES = {
    "loss": "loss",
    "lr": "learning rate",
    "images_per_s": "images a second",
    "peak_memory_mib": "peak memory, MiB",
    "alignment": "alignment",
    "uniformity": "uniformity",
    "dead_dimensions": "dead dimensions",
}
RANGE = {"alignment": (0.0, 2.0), "uniformity": (-4.0, 0.0), "images_per_s": (0.0, 0.0), "peak_memory_mib": (0.0, 0.0)}  # shown at least
HEALTHY = {
    "loss": "falls fast, then slowly; no jumps",
    "lr": "as pretrain.schedule says",
    "images_per_s": "level: a dip is another program, or the disk",
    "peak_memory_mib": "level after the first rows",
    "alignment": "falls from 2 (unrelated) towards 0",
    "uniformity": "falls from 0 (one point) towards -4",
    "dead_dimensions": "stays near 0",
    "assignment_entropy": "near log(clusters); 0 is one cluster",
    "pixel_entropy": "falls from log(clusters)",
    "agreement": "rises towards 1",
    "regions": "level: regions contrasted an image",
}


@dataclass(frozen=True)
class Finding:
    """A sentence on a run; `good` False where something is to be done."""

    good: bool
    text: str


def series(rows: list[dict]) -> dict[str, list[tuple[int, float]]]:
    """{name: (step, value) of every "step" row} for all numbers of a log; what was not finite is NaN."""
    found: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        if row.get("event") == "step" and isinstance(row.get("step"), int):
            for name, value in row.items():
                if name not in ("event", "time", "step"):
                    found.setdefault(name, []).append((row["step"], value if isinstance(value, int | float) else math.nan))
    return {name: found[name] for name in (*(t for t in TITLES if t in found), *(n for n in found if n not in TITLES))}


def alike_loss(config: Config) -> float | None:
    """log(2P - 1), the InfoNCE loss when all similarities are alike; None where P is not known beforehand."""
    loss, opt = config.loss, config.pretrain
    if loss.method != "pix2rep" or loss.objective != "infonce" or loss.per_image or loss.outside != "keep":
        return None
    pixels = opt.batch_size * math.prod(config.data.size)
    return math.log(2 * min(loss.num_samples or pixels, pixels) - 1)


def dimensions(config: Config) -> int | None:
    """D of the rows that the monitors look at; None where the method decides."""
    return config.network.projection if config.loss.method == "pix2rep" else None


def judge(found: dict[str, list[tuple[int, float]]], config: Config) -> list[Finding]:
    """Sentences on the last SHARE of the rows, with their thresholds."""
    count = max((len(points) for points in found.values()), default=0)
    if count < FEW:
        return [Finding(True, f"{count} rows in the log: too few to judge, {FEW} are needed.")]
    last = {name: _mean([v for _, v in points[-max(1, round(SHARE * len(points))) :]]) for name, points in found.items()}
    findings = []
    if lost := [step for step, value in found.get("loss", []) if not math.isfinite(value)]:
        findings.append(Finding(False, f"The loss is not a number from step {lost[0]}."))
    uniformity, alignment = (last.get(name, math.nan) for name in ("uniformity", "alignment"))
    if uniformity > COLLAPSED:
        findings.append(Finding(False, f"Collapsed: uniformity {uniformity:.2f} is above {COLLAPSED}: all pixels have nearly the same features."))
    elif uniformity > POOR:
        findings.append(Finding(False, f"Near collapse: uniformity {uniformity:.2f} is above {POOR:g}."))
    if alignment > UNRELATED:
        findings.append(Finding(False, f"Alignment {alignment:.2f} is above {UNRELATED}: features of corresponding pixels have next to nothing in common."))
    size = dimensions(config)
    dead = last.get("dead_dimensions", math.nan) / size if size else math.nan
    if dead > DEAD_SOME:
        word = "Most" if dead > DEAD_MANY else "Some"
        findings.append(Finding(False, f"{word} of the {size} dimensions of the projection are dead ({dead:.0%}, above {DEAD_SOME:.0%})."))
    alike = alike_loss(config)
    if alike and abs(last.get("loss", math.nan) - alike) < UNLEARNT * alike:
        findings.append(Finding(False, f"The loss {last['loss']:.3f} is within {UNLEARNT:.0%} of {alike:.3f}, its value when all similarities are alike."))
    if not findings and math.isfinite(uniformity + alignment):
        findings.append(
            Finding(
                True,
                f"No sign of collapse over the last {SHARE:.0%} of the rows: uniformity {uniformity:.2f} (collapsed above {COLLAPSED}), alignment "
                f"{alignment:.2f} (unrelated above {UNRELATED})" + (f", dead dimensions {dead:.0%} (many above {DEAD_SOME:.0%})." if size else "."),
            )
        )
    return findings


def figure(found: dict[str, list[tuple[int, float]]], config: Config, resumed: list[int]):
    """A panel a series; grey is where a run has collapsed, dotted where it was resumed. Returns a matplotlib Figure."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    columns = 4
    rows = math.ceil(len(found) / columns)
    drawn = Figure(figsize=(11, 2.5 * rows + 0.2), layout="constrained")
    FigureCanvasSVG(drawn)
    axes = drawn.subplots(rows, columns, squeeze=False).flat
    bad, shown = {"uniformity": (COLLAPSED, 0.0), "alignment": (UNRELATED, 2.0)}, dict(RANGE)
    if size := dimensions(config):
        bad["dead_dimensions"], shown["dead_dimensions"] = (DEAD_SOME * size, size), (0, size)
    for (name, points), axis in zip(found.items(), axes, strict=False):
        steps, values = zip(*points, strict=True)
        axis.plot(steps, values, color="#0072B2", linewidth=1.4, marker="o" if len(points) < 40 else None, markersize=2.5)
        axis.set_title(TITLES.get(name, name), fontsize=10, loc="left")
        axis.set_xlabel(HEALTHY.get(name, ""), fontsize=8, color="0.35")
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.25)
        if name in bad:
            axis.axhspan(*bad[name], color="0.86", zorder=0)
        if name in shown:
            axis.update_datalim([(steps[0], value) for value in shown[name]])
        if name == "loss" and (alike := alike_loss(config)):
            axis.axhline(alike, color="0.5", linestyle="--", linewidth=1)
        for step in resumed:
            axis.axvline(step, color="0.5", linestyle=":", linewidth=1)
    for axis in axes:
        axis.set_axis_off()
    return drawn


def _mean(values: list[float]) -> float:
    finite = [v for v in values if math.isfinite(v)]
    return sum(finite) / len(finite) if finite else math.nan
