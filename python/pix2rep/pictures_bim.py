"""BIM: the likeliest cluster of every pixel of both views, by each sub-head, and how far the two maps agree."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Generator, Tensor

from pix2rep.colours import distinct
from pix2rep.config import Config
from pix2rep.data.cache import PreparedCase
from pix2rep.methods.bim import BIM, cluster_map
from pix2rep.pairs import Pair, Seen, Views, middle_image, pixels_of, plane_of, spacing_of, within
from pix2rep.pictures import Picture, Scene, outline, panels_of, show

HEADS = 3  # sub-heads that are shown
FILL = 0.6  # opacity of clusters
LUMA = (0.30, 0.59, 0.11)  # lightness of red, green and blue
NUMBERED = 0.03  # share of the pixels from which a cluster's number is written into the bar


@dataclass(frozen=True)
class Clusters:
    """Cluster maps of the first sub-heads, int [heads, H, W]."""

    count: int  # K
    first: np.ndarray  # view 1
    moved: np.ndarray  # view 1 as it lies in view 2, -1 outside
    second: np.ndarray  # view 2


def draw(method: BIM, case: PreparedCase, generator: Generator) -> Views:
    size = method.config.data.size
    view_1, view_2, theta = method.views(middle_image(case, size), generator, spacing_of(method, case))
    grid = torch.nn.functional.affine_grid(theta, [1, 1, *size], align_corners=False)
    source = pixels_of(grid, size, align_corners=False)
    return Views(view_1, view_2, source, within(source, size, 0.5), "nearest")


def words(config: Config) -> str:
    return "Views are drawn by the run's options `bim`: one crop, colours of its own for each view, view 2 turned, scaled, mirrored and its gamma changed."


def own(seen: Seen) -> Clusters:
    views, (at_1, at_2) = seen.views, seen.planes
    heads = range(min(len(seen.method.heads), HEADS))
    maps = [[cluster_map(seen.method, seen.backbone, view, head)[None] for head in heads] for view in (views.view_1, views.view_2)]
    first, second = (torch.cat(found, 1).reshape(1, len(heads), *views.inside.shape) for found in maps)
    return Clusters(seen.method.config.bim.clusters, plane_of(first, at_1), plane_of(_moved(first, views), at_2), plane_of(second, at_2))


def _moved(maps: Tensor, views: Views) -> Tensor:
    """Cluster maps [1, heads, *S] of view 1 at the nearest pixels of where view 2 comes from, -1 outside."""
    last = torch.tensor(views.inside.shape) - 1
    nearest = views.source.round().long().clamp(torch.zeros_like(last), last)
    return torch.where(views.inside, maps[(slice(None), slice(None), *nearest.unbind(-1))], -1)


def agreement(first: np.ndarray, second: np.ndarray, count: int) -> dict[str, float]:
    """How far two cluster maps, int [P] from 0 to count - 1, agree pixel by pixel; all NaN without a pixel.

    same: share of pixels in the same cluster; chance: that share were the two unrelated, each with its own cluster sizes; information: mutual
    information over the mean of the two entropies, NaN where both have one cluster only; used: number of clusters that occur.
    """
    if not len(first):
        return dict.fromkeys(("same", "chance", "information", "used"), float("nan"))
    joint = np.bincount(first * count + second, minlength=count**2).reshape(count, count) / len(first)
    p_1, p_2 = joint.sum(1), joint.sum(0)
    entropy_1, entropy_2, together = (-(p[p > 0] * np.log(p[p > 0])).sum() for p in (p_1, p_2, joint))
    entropies = entropy_1 + entropy_2
    return {
        "same": float(np.trace(joint)),
        "chance": float(p_1 @ p_2),
        "information": float(2 * (entropies - together) / entropies) if entropies > 0 else float("nan"),
        "used": int(((p_1 + p_2) > 0).sum()),
    }


def clusters(pair: Pair, scene: Scene) -> Picture | None:
    """A row a sub-head: the maps of both views over the image, view 1's moved beside view 2's; below, the share of each cluster."""
    found = pair.own
    if found is None:
        return None
    heads = len(found.first)
    figure, axes = panels_of(2 * heads, 3, heights=(1.0, 0.09) * heads)
    spec = axes[0, 0].get_gridspec()
    sentences = []
    for head in range(heads):
        shares = usage(scene, head)
        colours = distinct(found.count)[np.argsort(np.argsort(-shares, kind="stable"))]  # the more pixels, the more of its own a colour
        inside = found.moved[head] >= 0
        numbers = agreement(found.moved[head][inside], found.second[head][inside], found.count)
        as_moved = f"view 1, moved: {numbers['same']:.0%} as view 2"
        shown = ((pair.view_1, found.first, "view 1"), (pair.view_2, found.moved, as_moved), (pair.view_2, found.second, "view 2"))
        for axis, (image, maps, name) in zip(axes[2 * head], shown, strict=True):
            _paint(axis, image, maps[head], colours, pair, f"sub-head {head + 1}: {name}")
        for axis in axes[2 * head + 1]:
            axis.remove()
        _bar(figure.add_subplot(spec[2 * head + 1, :]), shares, colours)
        sentences.append(
            f"Sub-head {head + 1}: {numbers['same']:.0%} of the pixels in the same cluster of both views (unrelated maps: {numbers['chance']:.0%}), normalised "
            f"mutual information {numbers['information']:.2f}, {numbers['used']} of {found.count} clusters used."
        )
    sentences.append(
        "The middle map should be the right one: same colours, same places. A colour is one cluster of that sub-head in all pictures of the page; the bar "
        "has its number and its share of all pixels. Black lines are borders of clusters: they should follow borders of tissue. One colour nearly "
        "everywhere is collapse; specks are clusters that follow noise. Sub-heads number their clusters independently."
    )
    return Picture(figure, f"Cluster maps of two views of {pair.case}, by {heads} sub-heads", " ".join(sentences))


def usage(scene: Scene, head: int) -> np.ndarray:
    """Share of the pixels of all pictures in each cluster, [K]."""
    maps = [part[head].ravel() for pair in scene.pairs if pair.own for part in (pair.own.first, pair.own.second)]
    count = next(pair.own.count for pair in scene.pairs if pair.own)
    return np.bincount(np.concatenate(maps), minlength=count) / sum(map(len, maps))


def _paint(axis, image: np.ndarray, labels: np.ndarray, colours: np.ndarray, pair: Pair, title: str) -> None:
    """Clusters [H, W] over an image, their borders black; white where there is none (-1)."""
    low, high = np.percentile(image, (0.5, 99.5))
    grey = np.clip((image - low) / max(high - low, 1e-6), 0, 1)[..., None]
    show(axis, np.where(labels[..., None] >= 0, FILL * colours[labels] + (1 - FILL) * grey, 1.0), pair, title)
    outline(axis, labels, "black", 0.4)


def _bar(axis, shares: np.ndarray, colours: np.ndarray) -> None:
    """The clusters side by side, as wide as their share, the largest first."""
    left = 0.0
    for k in np.argsort(-shares, kind="stable"):
        axis.barh(0, shares[k], left=left, color=colours[k], edgecolor="black", linewidth=0.4)
        if shares[k] >= NUMBERED:
            ink = "black" if colours[k] @ LUMA > 0.4 else "white"
            axis.text(left + shares[k] / 2, 0, str(k), ha="center", va="center_baseline", fontsize=8, color=ink)
        left += shares[k]
    axis.set_xlim(0, 1)
    axis.set_axis_off()
