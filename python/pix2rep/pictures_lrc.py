"""LRC: superpixels over both views, those kept and those dropped, and how alike one region is to all others."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Generator, Tensor, nn

from pix2rep.colours import Colours
from pix2rep.config import Config
from pix2rep.data.cache import PreparedCase
from pix2rep.data.superpixels import Superpixels
from pix2rep.methods.lrc import LRC
from pix2rep.overlay import COLOURS
from pix2rep.pairs import Pair, Seen, Views, middle, middle_image, pixels_of, plane_of, spacing_of, within
from pix2rep.pictures import BEST, SIMILARITY, TRUE, Picture, Scene, coarsest, full_resolution, outline, panels_of, show
from pix2rep.views.spatial import dense, identity, warp_image, warp_labels
from pix2rep_kernels import pool

BORDER, DROPPED, SMALL = COLOURS[3], COLOURS[6], COLOURS[5]  # of kept regions; tints of pixels in none, and in one too small in view 2
TINT = 0.45
BINS = 16  # of sizes


@dataclass(frozen=True)
class Regions:
    """Superpixels of a slice, or supervoxels of a volume, R of them kept. Planes are int [H, W]: a kept region's number, or -1."""

    cut: np.ndarray  # all superpixels of view 1 as they were cut, -1 outside the volume
    first: np.ndarray  # view 1
    second: np.ndarray  # view 2
    cut_sizes: np.ndarray  # [N] pixels of each superpixel, kept or not
    sizes: np.ndarray  # [2, R] pixels in view 1 and view 2
    means: np.ndarray  # [2, R, C] mean features
    least: int  # pixels that a region needs in both views

    @property
    def both(self) -> np.ndarray:
        """Numbers of the regions that are large enough in both views: those that are contrasted."""
        return np.flatnonzero(self.sizes.min(0) >= self.least)


def draw(method: LRC, case: PreparedCase, generator: Generator) -> Views:
    config, image = method.config, middle_image(case, method.config.data.size)
    size, superpixels = config.data.size, Superpixels(config.lrc, config.network.dims)
    superpixels.make([case])
    cut = middle(case, size, superpixels.open(case), -1)
    first = torch.from_numpy(superpixels.select(cut, image[0, 0].numpy()))[None]
    view_1, view_2 = (method.photometric(image, generator) for _ in range(2))
    grid, second = dense(identity(1, len(size)), size), first
    if config.lrc.warp:
        grid = dense(method.spatial(1, size, generator, "cpu", spacing_of(method, case)), size)
        view_2, second = warp_image(view_2, grid), warp_labels(first + 1, grid) - 1
    source = pixels_of(grid, size)
    return Views(view_1, view_2, source, within(source, size), "linear", detail=(torch.from_numpy(cut)[None], first, second))


def features(method: LRC, backbone: nn.Module, view: Tensor) -> Tensor:
    return (full_resolution if method.options.local_weight else coarsest)(method, backbone, view)


def words(config: Config) -> str:
    views = "`photometric` and `spatial`" if config.lrc.warp else "`photometric` alone (lrc.warp=false)"
    text = f"Views are drawn by the run's options {views}, view 1 as the query and view 2 as the key. "
    if not config.lrc.local_weight:
        return text + "Features are the encoder's last map, interpolated to the image's size: with lrc.local_weight=0 nothing trains the decoder."
    keys = " (those of view 2 by the network's moving average, which is not used here)" if config.lrc.keys == "momentum" else ""
    return text + f"The loss compares means of these features over superpixels{keys}."


def own(seen: Seen) -> Regions:
    cut, first, second = seen.views.detail
    count = max(1, int(first.max()) + 1)
    pooled = [pool(f, r, regions=count) for f, r in zip(seen.features, (first, second), strict=True)]
    planes = (plane_of(labels[None], at)[0] for labels, at in ((cut, seen.planes[0]), (first, seen.planes[0]), (second, seen.planes[1])))
    sizes = np.bincount(cut[cut >= 0].numpy())
    return Regions(
        *planes, sizes[sizes > 0], np.stack([size[0].numpy() for _, size in pooled]), np.stack([rows[0].numpy() for rows, _ in pooled]),
        seen.method.options.min_pixels,
    )  # fmt: skip


def borders(pair: Pair, scene: Scene) -> Picture:
    """Superpixels over both views, the warped ones over view 2, and their sizes."""
    found = pair.own
    figure, axes = panels_of(1, 3)
    kind, unit = ("supervoxels", "voxels") if pair.planes else ("superpixels", "pixels")
    small = np.isin(found.second, np.setdiff1d(np.unique(found.second[found.second >= 0]), found.both))
    for axis, image, labels, tints, name in (
        (axes[0, 0], pair.view_1, found.first, ((found.first < 0, DROPPED),), f"view 1: {kind}"),
        (axes[0, 1], pair.view_2, found.second, ((found.second < 0, DROPPED), (small, SMALL)), "view 2: the same, moved"),
    ):
        show(axis, _tinted(image, tints), pair, name)
        if labels is found.first:
            outline(axis, found.cut, DROPPED, 0.5)
        outline(axis, labels, BORDER, 0.8)
    kept, cut = found.sizes[0][found.sizes[0] > 0], len(found.cut_sizes)
    _sizes(axes[0, 2], found.cut_sizes, kept, f"number of {kind} by size, {unit}")
    tiny = int((found.cut_sizes < found.least).sum())
    area = f"; {kept.min():.0f} to {kept.max():.0f} {unit}, median {np.median(kept):.0f}" if len(kept) else ""
    share = (found.first >= 0).mean()
    caption = (
        f"{cut} {kind}, {len(kept)} kept (yellow borders; {share:.0%} of the picture{area}), {len(found.both)} of them with at least {found.least} "
        f"{unit} in view 2 too: those are contrasted. Blue in view 1 are those dropped: {tiny} of under {found.least} {unit}, {cut - len(kept) - tiny} darker "
        "than lrc.background or beyond lrc.max_regions. In view 2 blue also comes from outside of view 1, and vermilion is kept but too small there. "
        "Borders should follow organs: where they cut through, or join two tissues, change lrc.superpixel_scale."
    )
    return Picture(figure, f"{kind.capitalize()} of {pair.case} over two views, and their sizes", caption)


def alike(pair: Pair, scene: Scene) -> Picture | None:
    """Each region filled by the cosine of its mean feature with that of one region of view 1."""
    found = pair.own
    if not len(found.both):
        return None
    chosen = query(found)
    rows = means(found, scene.colours)
    shown = [("view 1", pair, pair.view_1, found.first, rows[0]), ("view 2", pair, pair.view_2, found.second, rows[1])]
    if (other := scene.others.get(pair.case)) is not None:
        shown.append((f"another patient, {other.patient}", other, other.view_1, other.own.first, means(other.own, scene.colours)[0]))
    figure, axes = panels_of(2, len(shown))
    for k, (name, seen, image, labels, vectors) in enumerate(shown):
        cosines = np.where(np.isin(np.arange(len(vectors)), labels), vectors @ rows[0][chosen], -np.inf)  # of those in the plane
        filled = np.where(labels >= 0, cosines[labels], np.nan)
        show(axes[0, k], image, seen, name)
        drawn = show(axes[1, k], filled, seen, "", (-1, 1))
        drawn.set_cmap(SIMILARITY)
        outline(axes[1, k], labels, "black", 0.3)
        for axis in axes[:, k]:
            if k:
                outline(axis, labels == cosines.argmax(), "white", 3.6)
                outline(axis, labels == cosines.argmax(), BEST, 2.4)
            if seen is pair:
                outline(axis, labels == chosen, "white", 2.0)
                outline(axis, labels == chosen, TRUE, 1.2)
    figure.colorbar(drawn, ax=axes[1, :], shrink=0.8, label="cosine")
    numbers = matches(found, scene.colours)
    caption = (
        "Cosine of the mean features of one region of view 1 (vermilion) with those of every region; white is in none. In view 2 the most similar region "
        "(green) should be the same one, and few others yellow; in another patient it should be the same tissue. Of the "
        f"{len(found.both)} regions in both views {numbers['found']:.0%} are most similar to themselves (by chance {numbers['chance']:.0%}); mean cosine "
        f"{numbers['same']:.2f} with themselves, {numbers['others']:.2f} with others."
    )
    return Picture(figure, f"Cosine similarity of one region of {pair.case} with all regions of {len(shown)} images", caption)


def query(found: Regions) -> int:
    """Of the regions in both views (at least one) that both planes show, if any, the one with most of the middle of view 1."""
    shown = [k for k in found.both if (found.first == k).any() and (found.second == k).any()] or found.both
    row, column = (np.linspace(-0.5, 0.5, n) for n in found.first.shape)
    middle = np.exp(-8 * (row[:, None] ** 2 + column**2))
    return int(max(shown, key=lambda k: middle[found.first == k].sum()))


def means(found: Regions, colours: Colours) -> np.ndarray:
    """Mean features minus the mean over all pictures, unit length: [2, R, C]; 0 for a region that a view has not."""
    rows = np.where(found.sizes[..., None] > 0, found.means - colours.mean, 0)
    return rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-12)


def matches(found: Regions, colours: Colours) -> dict[str, float]:
    """Of the regions in both views. found: share of those of view 1 whose most similar one in view 2 is itself; chance: that share for one drawn
    at random; same, others: mean cosine with itself, and with the others, in view 2 (NaN for a single region).
    """
    first, second = means(found, colours)[:, found.both]
    cosines, count = first @ second.T, len(first)
    others = (cosines.sum() - np.trace(cosines)) / (count * (count - 1)) if count > 1 else float("nan")
    return {
        "found": float((cosines.argmax(1) == np.arange(count)).mean()),
        "chance": 1 / count,
        "same": float(np.trace(cosines) / count),
        "others": float(others),
    }


def _tinted(image: np.ndarray, tints: tuple[tuple[np.ndarray, str], ...]) -> np.ndarray:
    from matplotlib.colors import to_rgb

    low, high = np.percentile(image, (0.5, 99.5))
    rgb = np.repeat(np.clip((image - low) / max(high - low, 1e-6), 0, 1)[..., None], 3, -1)
    for where, colour in tints:
        rgb[where] = TINT * np.array(to_rgb(colour)) + (1 - TINT) * rgb[where]
    return rgb


def _sizes(axis, cut: np.ndarray, kept: np.ndarray, title: str) -> None:
    edges = np.geomspace(max(1, cut.min(initial=1)), max(2, cut.max(initial=2)), BINS)
    axis.hist(np.clip(cut, edges[0], edges[-1]), edges, color=DROPPED, alpha=TINT, label="dropped")
    axis.hist(np.clip(kept, edges[0], edges[-1]), edges, color=BORDER, edgecolor="0.4", linewidth=0.5, label="kept")
    axis.set_xscale("log")
    axis.set_title(title, fontsize=9)
    axis.tick_params(labelsize=8, bottom=True, left=True, labelbottom=True, labelleft=True)
    axis.legend(fontsize=8, frameon=False)
