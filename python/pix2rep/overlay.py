"""Pictures of test slices: image, truth, and what each arm predicts, in colours that the colour-blind tell apart."""

from pathlib import Path

import numpy as np

from pix2rep import metrics
from pix2rep.data.cache import PreparedCase, crop_or_pad
from pix2rep.data.nifti import read

# Okabe and Ito's palette, ordered so that neighbours in it differ in lightness too; black and grey are the image's.
COLOURS = ("#E69F00", "#56B4E9", "#CC79A7", "#F0E442", "#009E73", "#D55E00", "#0072B2")
FILL, LINE = 0.35, 1.4  # opacity of a region, width of its outline in points


def draw(image: np.ndarray, panels: dict[str, np.ndarray | None], classes: tuple[str, ...], title: str):
    """A figure of one slice: `image` [H, W] in [0, 1] once a panel, with the labels [H, W] of each panel on it (None: the bare image).

    Labels 1..K take the palette's colours in order, again from its start after seven. Returns a matplotlib Figure.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    figure = Figure(figsize=(2.6 * len(panels), 3.3), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = np.atleast_1d(figure.subplots(1, len(panels)))
    for axis, (name, labels) in zip(axes, panels.items(), strict=True):
        axis.imshow(image, cmap="gray", vmin=0, vmax=1, origin="lower", interpolation="nearest")  # row 0 is posterior in RAS+
        axis.set_title(name, fontsize=9)
        axis.set_axis_off()
        for k in range(1, len(classes) + 1) if labels is not None else ():
            region = labels == k
            if region.any():
                colour = COLOURS[(k - 1) % len(COLOURS)]
                axis.contourf(region, levels=[0.5, 1.5], colors=[colour], alpha=FILL)
                axis.contour(region, levels=[0.5], colors=[colour], linewidths=LINE)
    patches = [Patch(facecolor=COLOURS[k % len(COLOURS)], label=name) for k, name in enumerate(classes)]
    figure.legend(handles=patches, loc="outside lower center", ncols=len(patches), fontsize=8, frameon=False)
    figure.suptitle(title, fontsize=9)
    return figure


def spread(length: int, count: int) -> list[int]:
    """At most `count` evenly spaced indices of `length` things."""
    return [round(i) for i in np.linspace(0, length - 1, min(count, length))]


def write(folder: Path, cases: list[PreparedCase], predictions: dict[str, dict[str, np.ndarray]], study, title: str, prefix: str = "") -> list[Path]:
    """Write downstream.overlays pictures, spread over the test volumes: <prefix>CASE.png shows the slice with the most foreground of the
    truth, as much of it as data.size holds.

    predictions: {arm: {case id: labels [Z, H, W] on the source's own grid}}. Dice in the panels' titles is the whole volume's. Returns the
    paths.
    """
    from pix2rep.checkpoint import atomic

    paths = []
    for case in (cases[i] for i in spread(len(cases), study.config.downstream.overlays)):
        truth = study.truth(case)
        z = int((truth > 0).sum((1, 2)).argmax())
        panels = {"image": None, "truth": _seen(truth[z], case, study)}
        for arm, volumes in predictions.items():
            score = metrics.nanmean(metrics.dice(volumes[case.id], truth, len(study.classes)))
            panels[f"{arm}, Dice {score:.2f}"] = _seen(volumes[case.id][z], case, study)
        volume = read(case.source).array.transpose(2, 1, 0)
        low, high = study.config.data.window or np.percentile(volume, study.config.data.percentiles)
        image = np.clip((_seen(volume[z], case, study) - low) / max(high - low, 1e-6), 0, 1)
        path = folder / f"{prefix}{case.id}.png"
        figure = draw(image, panels, study.classes, f"{title}: {case.id}, slice {z + 1} of {len(truth)}")
        with atomic(path) as temporary:
            figure.savefig(temporary, format="png")
        paths.append(path)
    return paths


def _seen(plane: np.ndarray, case: PreparedCase, study) -> np.ndarray:
    """What the network sees of a slice [H, W] of the source, at the source's own resolution."""
    (y0, y1), (x0, x1) = case.crop[1:]
    if study.slides:
        return plane[y0:y1, x0:x1]
    size = study.config.data.size[-2:]
    window = [round(s * (high - low) / n) for s, (low, high), n in zip(size, case.crop[1:], case.shape[1:], strict=True)]
    return crop_or_pad(plane[y0:y1, x0:x1], tuple(window))
