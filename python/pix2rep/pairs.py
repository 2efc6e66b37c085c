"""Two views of an image as a method draws them, and what a backbone makes of both: what the pictures of a report show."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from pix2rep.data.cache import PreparedCase, crop_or_pad
from pix2rep.training import seed_of
from pix2rep_kernels import warp

if TYPE_CHECKING:
    from pix2rep.methods.base import Method
    from pix2rep.pictures import Look

INSIDE, OUTSIDE = 7, 2  # points of a pair
MARGIN, APART = 0.06, 0.1  # shares of the side that points keep from the border of view 2, and from each other
PLANES = ("axial", "coronal", "sagittal")


@dataclass(frozen=True)
class Views:
    """Two views of one image, [1, 1, *S], and where in view 1 a pixel of view 2 comes from.

    Pixels are numbered by their centres, ordered as the axes S.
    """

    view_1: Tensor
    view_2: Tensor
    source: Tensor  # float32 [*S, d], pixels of view 1
    inside: Tensor  # bool [*S]: that lies within view 1
    mode: str  # "linear" | "nearest" | "bicubic": how features of view 1 are moved
    boxes: Tensor | None = None  # float32 [2, 2, d]: lower and upper faces of what both views see, of each view; None: view 2 shows a part of view 1
    detail: Any = None  # what else the method drew


@dataclass(frozen=True)
class Seen:
    """What the own pictures of a method are made of. `planes`: the planes of view 1 and view 2 that are shown, of volumes."""

    method: "Method"
    backbone: nn.Module
    views: Views
    features: tuple[Tensor, Tensor]  # float32 [1, C, *S]
    planes: tuple[int, int]


@dataclass(frozen=True)
class Plane:
    """A plane of view 2 and the same of view 1, moved there; [H, W], features [C, H, W]."""

    name: str  # of PLANES
    aspect: float
    view: np.ndarray
    moved: np.ndarray
    inside: np.ndarray
    features: np.ndarray
    warped: np.ndarray


@dataclass(frozen=True)
class Pair:
    """One slice plane of two views; of volumes, a plane of view 2 and the plane of view 1 that its first point comes from.

    Pixels are (row, column). Planes of features are float32 [C, H, W].
    """

    patient: str
    case: str
    part: str  # of the split
    plane: str  # in words
    aspect: float  # height of a pixel over its width, mm
    view_1: np.ndarray  # [H, W]
    view_2: np.ndarray
    source: np.ndarray  # [H, W, 2] float: where in view 1 a pixel of view 2 comes from
    inside: np.ndarray  # [H, W] bool: it comes from within view 1
    in_plane: np.ndarray  # [H, W] bool: and, of volumes, from the plane shown
    features_1: np.ndarray
    features_2: np.ndarray
    warped: np.ndarray  # features of view 1 at `source`, 0 outside
    points: np.ndarray  # [P, 2] int: pixels of view 2, those that come from inside first
    frames: tuple[np.ndarray, np.ndarray | None]  # [N, 2] float, closed outlines: what view 1, and view 2, has in common with the other
    planes: tuple[Plane, ...] = ()  # of volumes: axial, coronal, sagittal
    own: Any = None  # of the method's own pictures


@torch.no_grad()
def make_pair(case: PreparedCase, part: str, look: "Look", method: "Method", backbone: nn.Module, index: int, own: bool = True) -> Pair:
    """The pair of a case as `look` draws and sees it, on the CPU; without `own`, what the method's own pictures show is left out.

    `index` and pretrain.seed decide the draws. Raises VolumeError for a prepared volume that is not what was written.
    """
    config, size = method.config, method.config.data.size
    generator = torch.Generator().manual_seed(seed_of(config.pretrain.seed, index))
    views = look.draw(method, case, generator)
    features_1, features_2 = (look.features(method, backbone, view).float() for view in (views.view_1, views.view_2))
    height, width = size[-2:]
    common = views.inside.reshape(-1, height, width)
    at = len(common) // 2
    if not common[at].any():  # crops of a volume may have the plane in the middle not in common
        at = int(common.sum((1, 2)).argmax())
    inside, position = common[at], views.source.reshape(-1, height, width, len(size))[at]
    view_2 = plane_of(views.view_2, at)[0]
    points = choose_points(view_2, inside.numpy(), generator)
    depth, in_plane = 0, inside
    if len(size) == 3:
        row, column = points[0]
        depth = int(position[row, column, 0].round().clamp(0, size[0] - 1))
        in_plane = inside & ((position[..., 0] - depth).abs() <= 0.5)
    slices = case.image().shape[0]
    plane = f"slice {slices // 2 + 1} of {slices}" if len(size) == 2 else f"slice {depth + 1} of view 1, {at + 1} of view 2, of {size[0]}"
    lattice = torch.arange(at * height * width, (at + 1) * height * width)
    return Pair(
        case.patient, case.id, part, plane, case.spacing[1] / case.spacing[2],
        plane_of(views.view_1, depth)[0], view_2, position[..., -2:].numpy(), inside.numpy(), in_plane.numpy(),
        plane_of(features_1, depth), plane_of(features_2, at), moved(features_1, views, lattice).reshape(-1, height, width).numpy(),
        points, _frames(views, position[..., -2:].numpy()),
        _planes(views, (features_1, features_2), at, case.spacing) if len(size) == 3 else (),
        look.own(Seen(method, backbone, views, (features_1, features_2), (depth, at))) if own and look.own else None,
    )  # fmt: skip


def middle(case: PreparedCase, size: tuple[int, ...], array: np.ndarray | None = None, padding: int = 0) -> np.ndarray:
    """The middle slice of a case's image, or of `array` in its place, at `size`; where that has three entries, the middle of the whole of it."""
    volume = np.asarray(case.image() if array is None else array)
    volume = volume[len(volume) // 2] if len(size) == 2 else volume
    return crop_or_pad(volume.astype(np.int32) if padding else volume, size, padding)


def spacing_of(method: "Method", case: PreparedCase) -> Tensor | None:
    """Voxel sizes [1, d] as the method's step gets them, None where it asks for none."""
    return torch.tensor([case.spacing]) if "spacing" in method.needs else None


def middle_image(case: PreparedCase, size: tuple[int, ...]) -> Tensor:
    """`middle` as an image, float32 [1, 1, *size]."""
    return torch.from_numpy(middle(case, size).astype(np.float32))[None, None]


def plane_of(maps: Tensor, at: int) -> np.ndarray:
    """[1, C, *S] -> [C, H, W]; of volumes, plane `at`."""
    return maps[0].reshape(maps.shape[1], -1, *maps.shape[-2:])[:, at].numpy()


def pixels_of(grid: Tensor, size: tuple[int, ...], align_corners: bool = True) -> Tensor:
    """Positions [*S, d] in pixels, ordered as the axes `size`, of a dense grid [1, *S, d] (x first)."""
    sides = torch.tensor(size)
    share = (grid[0].flip(-1) + 1) / 2
    return share * (sides - 1) if align_corners else share * sides - 0.5


def within(source: Tensor, size: tuple[int, ...], reach: float = 1e-4) -> Tensor:
    """bool [*S]: positions [*S, d] in pixels that lie between the outermost centres, or at most `reach` pixels beyond."""
    return ((source > -reach) & (source < torch.tensor(size) - 1 + reach)).all(-1)


def moved(maps: Tensor, views: Views, where: Tensor, mode: str | None = None) -> Tensor:
    """Maps [1, C, *S] of view 1 as they lie in view 2, at its pixels `where` (int [P], flat): [C, P], 0 from outside."""
    last = torch.tensor(maps.shape[2:]) - 1
    source = views.source.flatten(0, -2)[where].clamp(torch.zeros_like(last), last)  # half a pixel beyond the outermost centres is the border
    grid = (2 * source / last.clamp(min=1) - 1).flip(-1)
    rows, _ = warp(maps, grid.view(1, *[1] * (len(last) - 1), -1, len(last)), mode=mode or views.mode)
    return (rows * views.inside.flatten()[where, None]).T


def _frames(views: Views, position: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    if views.boxes is None:
        return np.concatenate([position[0], position[1:, -1], position[-1, -2::-1], position[-2::-1, 0]]), None
    corners = [(0, 0), (0, 1), (1, 1), (1, 0), (0, 0)]
    faces = views.boxes[..., -2:].numpy() - 0.5  # of pixels numbered by their centres
    return tuple(np.array([(own[a, 0], own[b, 1]) for a, b in corners]) for own in faces)


def _planes(views: Views, features: tuple[Tensor, Tensor], at: int, spacing: tuple[float, ...]) -> tuple[Plane, ...]:
    """Through the middle of what plane `at` of view 2 has in common with view 1, else of the plane."""
    size, found = tuple(views.view_1.shape[2:]), []
    common = torch.argwhere(views.inside[at] if views.inside[at].any() else torch.ones(size[1:]))
    through = (at, *common.median(0).values.tolist())
    lattice = torch.arange(views.inside.numel()).view(size)
    for axis, name in enumerate(PLANES):
        where = lattice.select(axis, through[axis])
        rows, columns = (s for k, s in enumerate(spacing) if k != axis)
        flat = where.flatten()
        view, inside = views.view_2.flatten()[flat], views.inside.flatten()[flat]
        planes = (view, moved(views.view_1, views, flat, "linear")[0], inside)
        own = (features[1][0].flatten(1)[:, flat], moved(features[0], views, flat))
        shown = (part.reshape(*part.shape[:-1], *where.shape).numpy() for part in (*planes, *own))
        found.append(Plane(name, rows / columns, *shown))
    return tuple(found)


def choose_points(view: np.ndarray, inside: np.ndarray, generator: torch.Generator) -> np.ndarray:
    """Up to INSIDE pixels of view 2 [H, W] that come from inside, spread, then up to OUTSIDE others: [P, 2] int, P >= 1.

    The first is where the picture changes most, near the middle.
    """
    from scipy.ndimage import gaussian_gradient_magnitude

    height, width = view.shape
    edge = max(1, round(MARGIN * min(height, width)))
    row, column = np.mgrid[:height, :width]
    border = np.minimum(np.minimum(row, height - 1 - row), np.minimum(column, width - 1 - column))  # pixels to it
    strength = gaussian_gradient_magnitude(view.astype(np.float32), 1.5)
    middle = np.exp(-8 * ((row / height - 0.5) ** 2 + (column / width - 0.5) ** 2))
    central = inside & (border >= edge)
    candidates = np.argwhere(central if central.any() else np.ones_like(inside))
    change = strength[tuple(candidates.T)]
    candidates = candidates[change >= np.median(change)]  # not in empty air
    chosen = [candidates[(strength * middle)[tuple(candidates.T)].argmax()]]
    chosen += _spread(candidates, chosen, INSIDE - 1, APART * min(height, width), generator)
    return np.array(chosen + _spread(np.argwhere(~inside & (border >= edge // 2)), chosen, OUTSIDE, edge, generator))


def _spread(candidates: np.ndarray, taken: list[np.ndarray], count: int, apart: float, generator: torch.Generator) -> list[np.ndarray]:
    """Up to `count` of the candidates [K, 2], each the farthest from those before it, and at least `apart` pixels."""
    order = torch.randperm(len(candidates), generator=generator).numpy()  # among equally far ones
    candidates, found = candidates[order], []
    while len(found) < count and len(candidates):
        gap = np.min([np.hypot(*(candidates - point).T) for point in (*taken, *found)], axis=0)
        if gap.max() < apart:
            break
        found.append(candidates[gap.argmax()])
    return found
