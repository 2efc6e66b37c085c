"""Pictures of test volumes: image, truth, and what each arm predicts, in colours that the colour-blind tell apart."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from nibabel.affines import voxel_sizes

from pix2rep import metrics
from pix2rep.data.cache import PreparedCase, crop_or_pad
from pix2rep.data.nifti import read

# Okabe and Ito's palette, ordered so that neighbours in it differ in lightness too; black and grey are the image's.
COLOURS = ("#E69F00", "#56B4E9", "#CC79A7", "#F0E442", "#009E73", "#D55E00", "#0072B2")
FILL, LINE, TRUTH = 0.35, 1.4, 0.9  # opacity of a region, width of its outline and of the truth's on predictions, in points
ARMS = {"pretrained": "pre-trained", "random": "from random"}  # in words
SIDE = 2.6  # inches of a panel


@dataclass(frozen=True)
class Row:
    """A plane of a volume: the image [H, W] in [0, 1], the truth, and labels [H, W] by name."""

    name: str
    aspect: float  # height of a pixel over its width, mm
    image: np.ndarray
    truth: np.ndarray
    labels: dict[str, np.ndarray]


def draw(rows: list[Row], classes: tuple[str, ...], title: str):
    """A figure of some planes of a volume, a row each: bare, with the truth, and with each of the labels and a white outline of the truth's classes.

    Labels 1..K take the palette's colours in order, again from its start after seven. Returns a matplotlib Figure.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    names = ("image", "truth", *rows[0].labels)
    heights = [min(max(row.aspect * row.image.shape[0] / row.image.shape[1], 0.2), 1.6) for row in rows]
    figure = Figure(figsize=(SIDE * len(names), SIDE * sum(heights) + 0.25 * len(rows) + 0.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(rows), len(names), squeeze=False, height_ratios=heights)
    for row, own in zip(rows, axes, strict=True):
        for axis, name, labels in zip(own, names, (None, row.truth, *row.labels.values()), strict=True):
            axis.imshow(row.image, cmap="gray", vmin=0, vmax=1, origin="lower", interpolation="nearest", aspect=row.aspect)  # row 0 is posterior in RAS+
            axis.set_axis_off()
            if row is rows[0]:
                axis.set_title(name, fontsize=9)
            for k in range(1, len(classes) + 1) if labels is not None else ():
                _region(axis, labels == k, COLOURS[(k - 1) % len(COLOURS)], LINE, FILL)
                if name not in ("image", "truth"):
                    _region(axis, row.truth == k, "white", TRUTH)
        if len(rows) > 1:
            own[0].text(0.02, 0.02, row.name, transform=own[0].transAxes, color="white", fontsize=8)
    handles = [Patch(facecolor=COLOURS[k % len(COLOURS)], label=name) for k, name in enumerate(classes)]
    handles.append(Line2D([], [], color="white", markeredgewidth=0, linewidth=TRUTH + 0.4, path_effects=_edged(), label="truth, on predictions"))
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 8), fontsize=9, frameon=False)
    figure.suptitle(title, fontsize=9)
    return figure


def _region(axis, region: np.ndarray, colour: str, width: float, fill: float = 0.0) -> None:
    if region.any() and min(region.shape) > 1:
        if fill:
            axis.contourf(region, levels=[0.5, 1.5], colors=[colour], alpha=fill)
        axis.contour(region, levels=[0.5], colors=[colour], linewidths=width)


def _edged() -> list:
    """A dark edge, so that a white line can be seen on a white page."""
    from matplotlib.patheffects import Normal, Stroke

    return [Stroke(linewidth=TRUTH + 1.6, foreground="0.3"), Normal()]


def spread(length: int, count: int) -> list[int]:
    """At most `count` evenly spaced indices of `length` things."""
    return [round(i) for i in np.linspace(0, length - 1, min(count, length))]


def write(folder: Path, cases: list[PreparedCase], predictions: dict[str, dict[str, np.ndarray]], study, title: str, prefix: str = "") -> list[Path]:
    """Write downstream.overlays pictures, spread over the test volumes: <prefix>CASE.png shows the slice with the most foreground of the
    truth, as much of it as data.size holds; with network.dims 3, such a plane along each axis.

    predictions: {arm: {case id: labels [Z, H, W] on the source's own grid}}. Dice in the panels' titles is the whole volume's. Returns the
    paths.
    """
    from pix2rep.checkpoint import atomic

    paths = []
    for case in (cases[i] for i in spread(len(cases), study.config.downstream.overlays)):
        truth, labels = study.truth(case), {}
        for arm, volumes in predictions.items():
            score = metrics.nanmean(metrics.dice(volumes[case.id], truth, len(study.classes)))
            labels[f"{ARMS.get(arm, arm)}, Dice {score:.2f}"] = volumes[case.id]
        rows = _rows(case, study, truth, labels)
        path = folder / f"{prefix}{case.id}.png"
        figure = draw(rows, study.classes, f"{title}: {case.id}, {rows[0].name} of {len(truth)}")
        with atomic(path) as temporary:
            figure.savefig(temporary, format="png")
        paths.append(path)
    return paths


def _rows(case: PreparedCase, study, truth: np.ndarray, labels: dict[str, np.ndarray]) -> list[Row]:
    volume = read(case.source).array.transpose(2, 1, 0)
    low, high = study.config.data.window or np.percentile(volume, study.config.data.percentiles)
    volume, truth, labels = _seen(volume, case, study), _seen(truth, case, study), {name: _seen(v, case, study) for name, v in labels.items()}
    spacing, rows = voxel_sizes(np.asarray(case.affine))[::-1], []
    for axis, name in enumerate(("slice", "coronal", "sagittal") if study.config.network.dims == 3 else ("slice",)):
        at = int((truth > 0).sum(tuple(k for k in range(3) if k != axis)).argmax())
        height, width = (s for k, s in enumerate(spacing) if k != axis)
        image = np.clip((volume.take(at, axis) - low) / max(high - low, 1e-6), 0, 1)
        planes = {key: v.take(at, axis) for key, v in labels.items()}
        rows.append(Row(name if axis else f"{name} {at + 1}", float(height / width), image, truth.take(at, axis), planes))
    return rows


def _seen(volume: np.ndarray, case: PreparedCase, study) -> np.ndarray:
    """What the network sees of the slices [Z, H, W] of the source, at the source's own resolution."""
    (y0, y1), (x0, x1) = case.crop[1:]
    if study.slides:
        return volume[:, y0:y1, x0:x1]
    size = study.config.data.size[-2:]
    window = [round(s * (high - low) / n) for s, (low, high), n in zip(size, case.crop[1:], case.shape[1:], strict=True)]
    return crop_or_pad(volume[:, y0:y1, x0:x1], tuple(window))
