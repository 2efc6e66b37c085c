"""Pictures of what a backbone has learnt: two views with corresponding points, features as colours, similarity to one pixel."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from pix2rep.overlay import COLOURS
from pix2rep.pairs import Colours, Pair, cosine

DPI = 100
SIDE = 3.3  # inches of a panel: three fill a page 1100 pixels wide
TRUE, BEST = "#D55E00", "#009E73"  # of Okabe and Ito's palette: vermilion and bluish green
SIMILARITY = "cividis"


@dataclass(frozen=True)
class Picture:
    """A matplotlib Figure with a text that stands for it and a sentence on what to look for."""

    figure: object
    alt: str
    caption: str


@dataclass(frozen=True)
class Scene:
    """What all pictures of a report share. `others`: {case: the pair of another patient}, missing where there is one patient only."""

    colours: Colours
    temperature: float | None  # of an InfoNCE loss
    others: dict[str, Pair]


def views(pair: Pair, scene: Scene) -> Picture:
    """Both views with corresponding points, their features as colours, and how alike they are."""
    figure, axes = _panels(2, 3)
    _image(axes[0, 0], pair.view_1, pair, "view 1")
    _image(axes[0, 1], pair.view_2, pair, "view 2")
    _frame(axes[0, 0], pair)
    for number, (row, column) in enumerate(pair.points):
        y, x = pair.source[row, column]
        at_home, colour = pair.inside[row, column], COLOURS[number % len(COLOURS)]
        _point(axes[0, 0], x, y, number + 1, colour, at_home, pair.in_plane[row, column])
        _point(axes[0, 1], column, row, number + 1, colour, at_home, True)
    similar = np.where(pair.inside, _alike(pair, scene.colours), np.nan)
    drawn = axes[0, 2].imshow(similar, cmap=SIMILARITY, vmin=-1, vmax=1, origin="lower", interpolation="nearest", aspect=pair.aspect)
    axes[0, 2].set_title("view 1's features, moved, against view 2's: cosine", fontsize=9)
    figure.colorbar(drawn, ax=axes[0, 2], shrink=0.8)
    _image(axes[1, 0], scene.colours(pair.features_1), pair, "features of view 1")
    moved = np.where(pair.inside[..., None], scene.colours(pair.warped), 1.0)
    _image(axes[1, 1], moved, pair, "features of view 1, moved into view 2")
    _image(axes[1, 2], scene.colours(pair.features_2), pair, "features of view 2")
    outside = sum(not pair.inside[tuple(p)] for p in pair.points)
    caption = (
        "Top: a number marks the same place of the body in both views; the dashed frame is what view 2 shows of view 1"
        + (", crosses come from outside of it and have no partner" if outside else "")
        + (", open circles from another slice" if not pair.in_plane[pair.inside].all() else "")
        + "; the map is yellow where the two views' features agree. Bottom: the last two pictures should have the same colours in the same "
        "places (the first of them is as coarse as view 1 where view 2 magnifies), and different tissues different colours."
    )
    return Picture(figure, f"Two views of {pair.case} with {len(pair.points)} numbered points, and their features as colours", caption)


def similarity(pair: Pair, scene: Scene) -> Picture:
    """How alike one pixel of view 2 is to every pixel of both views and of another patient."""
    row, column = pair.points[0]
    query = scene.colours.centred(pair.features_2)[:, row, column]
    shown = [("view 2", pair, pair.view_2, pair.features_2), ("view 1", pair, pair.view_1, pair.features_1)]
    if (other := scene.others.get(pair.case)) is not None:
        shown.append((f"another patient, {other.patient}", other, other.view_1, other.features_1))
    figure, axes = _panels(2, len(shown))
    for k, (name, own, image, features) in enumerate(shown):
        _image(axes[0, k], image, own, name)
        alike = cosine(scene.colours.centred(features), query)
        drawn = axes[1, k].imshow(alike, cmap=SIMILARITY, vmin=-1, vmax=1, origin="lower", interpolation="nearest", aspect=own.aspect)
        axes[1, k].set_axis_off()
        best = np.unravel_index(alike.argmax(), alike.shape)
        for axis in axes[:, k]:
            if name == "view 2":
                _mark(axis, column, row, "o", TRUE)
            else:
                _mark(axis, best[1], best[0], "s", BEST)
                if own is pair and pair.in_plane[row, column]:
                    _mark(axis, *pair.source[row, column][::-1], "o", TRUE)
    figure.colorbar(drawn, ax=axes[1, :], shrink=0.8, label="cosine")
    caption = (
        "Cosine of the features of one pixel of view 2 (circle) with those of every pixel. In view 1 the circle is the true partner and the square "
        "the most similar pixel: they should coincide, and what is yellow should be few pixels or one tissue, not everything. In another patient the "
        "square should lie on the same anatomy."
    )
    if scene.temperature:
        more = np.exp(0.1 / scene.temperature)
        caption += f" At the loss's temperature, {scene.temperature:g}, a negative that is more similar by 0.1 weighs {more:.3g} times as much."
    return Picture(figure, f"Cosine similarity of one pixel of {pair.case} with all pixels of {len(shown)} images", caption)


# What is drawn of every case, in order.
PANELS: tuple[Callable[[Pair, Scene], Picture], ...] = (views, similarity)


def _panels(rows: int, columns: int):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(SIDE * columns + 0.7, (SIDE + 0.1) * rows), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    return figure, axes


def _image(axis, image: np.ndarray, pair: Pair, title: str) -> None:
    """Row 0 is posterior in RAS+, so it goes to the bottom."""
    low, high = np.percentile(image, (0.5, 99.5)) if image.ndim == 2 else (0, 1)
    axis.imshow(image, cmap="gray", vmin=low, vmax=max(high, low + 1e-6), origin="lower", interpolation="nearest", aspect=pair.aspect)
    axis.set_title(title, fontsize=9)


def _frame(axis, pair: Pair) -> None:
    """The outline of view 2 in view 1, on axes widened so that it can be seen where it leaves the image, up to half a side."""
    edges = [pair.source[0], pair.source[1:, -1], pair.source[-1, -2::-1], pair.source[-2::-1, 0]]
    y, x = np.concatenate(edges).T
    axis.plot(x, y, color="white", linewidth=2.4)
    axis.plot(x, y, color="black", linewidth=1.2, linestyle=(0, (4, 3)))
    height, width = pair.view_1.shape
    for values, size, limit in ((x, width, axis.set_xlim), (y, height, axis.set_ylim)):
        room = 0.08 * size  # for a number beside a cross
        limit(max(min(values.min() - room, -0.5), -size / 2), min(max(values.max() + room, size - 0.5), 1.5 * size))


def _point(axis, x: float, y: float, number: int, colour: str, inside: bool, in_plane: bool) -> None:
    """A numbered disc; a cross where the point comes from outside, an open circle where it comes from another slice."""
    kind = {"marker": "o", "facecolors": colour if in_plane else "none", "edgecolors": "black" if in_plane else colour, "s": 95}
    if not inside:
        kind = {"marker": "X", "facecolors": "white", "edgecolors": "black", "s": 120}
    axis.scatter(x, y, linewidths=1, zorder=3, clip_on=True, **kind)
    ink = "black" if in_plane or not inside else colour
    towards_middle = -9 if x > sum(axis.get_xlim()) / 2 else 9
    shift = (0, 0) if inside else (towards_middle, 0)
    outline = {"boxstyle": "round,pad=0.1", "facecolor": "white", "edgecolor": "none"} if not inside else None
    axis.annotate(
        str(number), (x, y), shift, textcoords="offset points", ha="center", va="center_baseline", fontsize=7, color=ink, fontweight="bold",
        annotation_clip=True, zorder=4, bbox=outline,
    )  # fmt: skip


def _mark(axis, x: float, y: float, marker: str, colour: str) -> None:
    size = 110 if marker == "o" else 60
    axis.scatter(x, y, s=size, marker=marker, facecolors="none", edgecolors="white", linewidths=3.2, zorder=3)
    axis.scatter(x, y, s=size, marker=marker, facecolors="none", edgecolors=colour, linewidths=1.6, zorder=4)


def _alike(pair: Pair, colours: Colours) -> np.ndarray:
    first, second = colours.centred(pair.warped), colours.centred(pair.features_2)
    return (first * second).sum(0) / np.maximum(np.linalg.norm(first, axis=0) * np.linalg.norm(second, axis=0), 1e-12)
