"""Pictures for every method: two views with corresponding points, features as colours, similarity to one pixel; of volumes, three planes."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from pix2rep.colours import Colours, cosine, cosines
from pix2rep.config import Config
from pix2rep.overlay import COLOURS
from pix2rep.pairs import Pair, Plane, Seen, Views

if TYPE_CHECKING:
    from pix2rep.data.cache import PreparedCase
    from pix2rep.methods.base import Method

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
    pairs: tuple[Pair, ...] = ()


Panel = Callable[[Pair, Scene], Picture | None]  # None: of this pair there is nothing to show


def full_resolution(method: "Method", backbone: nn.Module, view: Tensor) -> Tensor:
    """What the backbone makes of a view [1, 1, *S]: [1, C, *S]."""
    return backbone(view)


def coarsest(method: "Method", backbone: nn.Module, view: Tensor) -> Tensor:
    """The last map of the backbone's encoder for a view [1, 1, *S], interpolated to [1, C, *S]: of a method that trains nothing beyond."""
    size = tuple(view.shape[2:])
    padded = backbone.padded(size) if hasattr(backbone, "padded") else size
    whole = F.interpolate(backbone.encode(view)[-1], padded, mode="bilinear" if len(size) == 2 else "trilinear", align_corners=False)
    return whole[(..., *(slice((p - n) // 2, (p - n) // 2 + n) for p, n in zip(padded, size, strict=True)))]


@dataclass(frozen=True)
class Look:
    """How the runs of a method are looked at."""

    draw: "Callable[[Method, PreparedCase, Generator], Views]"  # two views, as in a step of the method
    words: Callable[[Config], str]  # on these views
    panels: tuple[Panel, ...]  # drawn of every pair, in order
    features: "Callable[[Method, nn.Module, Tensor], Tensor]" = full_resolution
    own: Callable[[Seen], Any] | None = None  # makes Pair.own for the method's own panels
    heads: bool = False  # whether that takes the method's trained heads, which only checkpoints hold


def views(pair: Pair, scene: Scene) -> Picture:
    """Both views with corresponding points, their features as colours, and how alike they are."""
    figure, axes = panels_of(2, 3)
    show(axes[0, 0], pair.view_1, pair, "view 1")
    show(axes[0, 1], pair.view_2, pair, "view 2")
    _frame(axes[0, 0], pair.frames[0], pair.view_1.shape)
    if pair.frames[1] is not None:
        _frame(axes[0, 1], pair.frames[1], pair.view_2.shape)
    for number, (row, column) in enumerate(pair.points):
        y, x = pair.source[row, column]
        at_home, colour = pair.inside[row, column], COLOURS[number % len(COLOURS)]
        _point(axes[0, 0], x, y, number + 1, colour, at_home, pair.in_plane[row, column])
        _point(axes[0, 1], column, row, number + 1, colour, at_home, True)
    alike = cosines(scene.colours.centred(pair.warped), scene.colours.centred(pair.features_2))
    similar = np.where(pair.inside, alike, np.nan)
    drawn = axes[0, 2].imshow(similar, cmap=SIMILARITY, vmin=-1, vmax=1, origin="lower", interpolation="nearest", aspect=pair.aspect)
    axes[0, 2].set_title("view 1's features, moved, against view 2's: cosine", fontsize=9)
    figure.colorbar(drawn, ax=axes[0, 2], shrink=0.8)
    show(axes[1, 0], scene.colours(pair.features_1), pair, "features of view 1")
    moved = np.where(pair.inside[..., None], scene.colours(pair.warped), 1.0)
    show(axes[1, 1], moved, pair, "features of view 1, moved into view 2")
    show(axes[1, 2], scene.colours(pair.features_2), pair, "features of view 2")
    outside = sum(not pair.inside[tuple(p)] for p in pair.points)
    caption = (
        "Top: a number marks the same place of the body in both views; "
        + ("the dashed frame is what view 2 shows of view 1" if pair.frames[1] is None else "the dashed frames hold what both show")
        + (", crosses come from outside and have no partner" if outside else "")
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
    figure, axes = panels_of(2, len(shown))
    for k, (name, own, image, features) in enumerate(shown):
        show(axes[0, k], image, own, name)
        alike = cosine(scene.colours.centred(features), query)
        drawn = axes[1, k].imshow(alike, cmap=SIMILARITY, vmin=-1, vmax=1, origin="lower", interpolation="nearest", aspect=own.aspect)
        best = np.unravel_index(alike.argmax(), alike.shape)
        for axis in axes[:, k]:
            if name == "view 2":
                mark(axis, column, row, "o", TRUE)
            else:
                mark(axis, best[1], best[0], "s", BEST)
                if own is pair and pair.in_plane[row, column]:
                    mark(axis, *pair.source[row, column][::-1], "o", TRUE)
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


def planes(pair: Pair, scene: Scene) -> Picture | None:
    """Three planes of volumes, of view 2 and of view 1 moved there."""
    if not pair.planes:
        return None
    sides = [own.aspect * own.view.shape[0] / own.view.shape[1] for own in pair.planes]
    figure, axes = panels_of(3, 4, 2.6, tuple(min(max(side, 0.15), 1.5) + 0.1 for side in sides))
    for own, row in zip(pair.planes, axes, strict=True):
        outside = ~own.inside
        low, high = np.percentile(own.view, (0.5, 99.5))
        show(row[0], own.view, own, f"{own.name}: view 2", (low, high))
        show(row[1], np.where(outside, np.nan, own.moved), own, "view 1, moved", (low, high))
        show(row[2], np.where(outside[..., None], 1.0, scene.colours(own.warped)), own, "features of view 1, moved")
        show(row[3], scene.colours(own.features), own, "features of view 2")
    caption = (
        "Planes of view 2 through the middle of what both views show, and the same of view 1, moved; white comes from outside of it. Anatomy should lie "
        "in the same places of the first two columns in all three planes, colours in the last two."
    )
    return Picture(figure, f"Three planes of two views of {pair.case}, and their features as colours", caption)


COMMON: tuple[Panel, ...] = (views, similarity, planes)


def panels_of(rows: int, columns: int, side: float = SIDE, heights: tuple[float, ...] | None = None):
    """Figure and axes [rows, columns] of panels `side` inches wide, and as high or, of each row, `heights` times that."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(side * columns + 0.7, side * sum(heights or [1] * rows) + 0.1 * rows), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False, height_ratios=heights)
    for axis in axes.flat:
        axis.tick_params(bottom=False, left=False, labelbottom=False, labelleft=False)
        for spine in axis.spines.values():
            spine.set(color="0.6", linewidth=0.5)  # what lies outside is white
    return figure, axes


def show(axis, image: np.ndarray, pair: Pair | Plane, title: str, limits: tuple[float, float] | None = None):
    """Grey [H, W] between `limits` (default: its own percentiles), or RGB. Row 0 is posterior in RAS+, so it goes to the bottom."""
    low, high = limits or (np.percentile(image, (0.5, 99.5)) if image.ndim == 2 else (0, 1))
    axis.set_title(title, fontsize=9)
    return axis.imshow(image, cmap="gray", vmin=low, vmax=max(high, low + 1e-6), origin="lower", interpolation="nearest", aspect=pair.aspect)


def outline(axis, labels: np.ndarray, colour: str, width: float, **options) -> None:
    """Lines between pixels [H, W] of different labels."""
    from matplotlib.collections import LineCollection

    rows, columns = np.nonzero(labels[:, 1:] != labels[:, :-1])
    upright = [((x + 0.5, y - 0.5), (x + 0.5, y + 0.5)) for y, x in zip(rows, columns, strict=True)]
    rows, columns = np.nonzero(labels[1:] != labels[:-1])
    level = [((x - 0.5, y + 0.5), (x + 0.5, y + 0.5)) for y, x in zip(rows, columns, strict=True)]
    axis.add_collection(LineCollection(upright + level, colors=colour, linewidths=width, capstyle="projecting", **options), autolim=False)


def _frame(axis, outline: np.ndarray, shape: tuple[int, int]) -> None:
    """A closed line through pixels [N, 2], on axes widened so that it can be seen where it leaves the image, up to half a side."""
    y, x = outline.T
    axis.plot(x, y, color="white", linewidth=2.4)
    axis.plot(x, y, color="black", linewidth=1.2, linestyle=(0, (4, 3)))
    height, width = shape
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


def mark(axis, x: float, y: float, marker: str, colour: str) -> None:
    size = 110 if marker == "o" else 60
    axis.scatter(x, y, s=size, marker=marker, facecolors="none", edgecolors="white", linewidths=3.2, zorder=3)
    axis.scatter(x, y, s=size, marker=marker, facecolors="none", edgecolors=colour, linewidths=1.6, zorder=4)
