"""PGL: prior-guided local consistency (arXiv 2011.12640): the same place in two views shall have the same features, BYOL style."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pix2rep_kernels.check import expect, expect_choice, expect_device, expect_dtype, expect_tensor
from pix2rep_kernels.dispatch import CHOICES
from pix2rep_kernels.losses.common import compute_dtype, expect_finite, expect_like, expect_map, flag
from pix2rep_kernels.ops.align import MODES, PADDING_MODES, align

NORMS = ("channel", "flat", "none")
OUTSIDE = ("keep", "drop")
EPSILON = 1e-12  # of the norms, as in F.normalize


class PriorGuidedLocalLoss(nn.Module):
    """Distance of the online predictions of one view to the targets of the other, at the points of the region that both see.

        q_m, z_m = predictions_1, targets_2 interpolated at the point m of the common frame (align.1)
        "channel": mean_m (2 - 2 <q_m, z_m> / (|q_m| |z_m|))
        "flat":    the same with one norm over all points and channels of a sample; mean over the samples
        "none":    mean over points and channels of (q - z)^2

    The symmetric loss is the sum of both directions: loss(predictions_1, targets_2, grid1, grid2) + loss(predictions_2, targets_1, grid2, grid1).

    Voxel-wise discrepancy after alignment by the known transforms is sourced; everything else is inferred (no code was published): "channel" most
    likely, "flat" is how a third party read it; trilinear interpolation with half-pixel centres (`box_grid` makes such grids); BYOL with a detached target.

    Args:
        norm: "channel", "flat" or "none". Norms are at least 1e-12, as in `F.normalize`. The value of "none" is a difference of mean squares, rounded as
            those are where the maps are nearly equal; its gradient is not.
        mode: "linear" (bi- or trilinear by rank) or "nearest".
        detach_targets: no gradient to targets_2.
        outside: "keep" points that lie outside a map (they take its border) or "drop" them from the mean.
        normalize_first: L2-normalise both maps over the channels before the interpolation too (stores a normalised copy of each).
        align_corners, padding_mode: of the grids, as `F.grid_sample`.
        check_finite: raise on NaN or inf maps, naming the argument; reads a value back from the device, so it stops CUDA graphs and fullgraph.
        backend: "auto", "reference", "cpu", "triton" or "cuda".

    Shape:
        predictions_1, targets_2: [B, C, *S1] and [B, C, *S2] with 2 or 3 spatial axes, one floating dtype and device, any strides.
        grid1, grid2: from the common frame into each map: affine [B, d, d+1] or dense [B, *M, d], float32 or float64, each of its own kind; no gradient.
        size: M of affine grids; default the dense grid's, or S1.
        output: scalar, float32 (float64 for float64 maps); 0 when every point is dropped.

    Raises:
        ValueError, TypeError: an argument is off; the message names argument, expectation and value.

    Example:
        >>> grids = [box_grid(low, high, crop_size, flips, features=map_size) for low, high, flips in views]
        >>> loss = PriorGuidedLocalLoss()(predictor(online(x1)), target(x2), *grids, size=(2, 6, 6))
    """

    def __init__(
        self,
        norm: str = "channel",
        *,
        mode: str = "linear",
        detach_targets: bool = True,
        outside: str = "keep",
        normalize_first: bool = False,
        align_corners: bool = False,
        padding_mode: str = "border",
        check_finite: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        expect_choice(norm, "norm", NORMS)
        expect_choice(mode, "mode", MODES)
        expect_choice(outside, "outside", OUTSIDE)
        expect_choice(padding_mode, "padding_mode", PADDING_MODES)
        expect_choice(backend, "backend", CHOICES)
        self.norm, self.mode, self.outside, self.padding_mode = norm, mode, outside, padding_mode
        self.detach_targets, self.normalize_first = flag(detach_targets, "detach_targets"), flag(normalize_first, "normalize_first")
        self.align_corners = flag(align_corners, "align_corners")
        self.check_finite, self.backend = flag(check_finite, "check_finite"), backend

    def forward(
        self,
        predictions_1: Tensor,  # [B, C, *S1]
        targets_2: Tensor,  # [B, C, *S2]
        grid1: Tensor,  # [B, d, d+1] or [B, *M, d]
        grid2: Tensor,  # [B, d, d+1] or [B, *M, d]
        *,
        size: tuple[int, ...] | None = None,
    ) -> Tensor:
        expect_map(predictions_1, "predictions_1")
        expect_like(targets_2, "targets_2", predictions_1, "predictions_1", same_space=False)
        if self.check_finite:
            expect_finite(predictions_1, "predictions_1")
            expect_finite(targets_2, "targets_2")
        targets_2 = targets_2.detach() if self.detach_targets else targets_2
        maps = predictions_1, targets_2
        if self.normalize_first:
            maps = tuple(F.normalize(f.to(compute_dtype(f)), dim=1) for f in maps)
        dot, sq1, sq2, valid = align(
            *maps, grid1, grid2, size=size, mode=self.mode, align_corners=self.align_corners, padding_mode=self.padding_mode, backend=self.backend
        )  # fmt: skip
        if self.outside == "keep":
            valid = torch.ones_like(valid)
        else:
            dot, sq1, sq2 = (torch.where(valid, t, 0) for t in (dot, sq1, sq2))
        if self.norm == "flat":
            dot, sq1, sq2, valid = dot.flatten(1).sum(1), sq1.flatten(1).sum(1), sq2.flatten(1).sum(1), valid.flatten(1).any(1)
        distance = (sq1 + sq2 - 2 * dot) / predictions_1.shape[1] if self.norm == "none" else 2 - 2 * dot / (_norm(sq1) * _norm(sq2))
        return torch.where(valid, distance, 0).sum() / valid.sum().clamp(min=1)

    def extra_repr(self) -> str:
        names = ("norm", "mode", "detach_targets", "outside", "normalize_first", "align_corners", "padding_mode", "backend")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)


def _norm(square: Tensor) -> Tensor:
    """max(|x|, 1e-12) of |x|^2, whose gradient is 0 at 0 where that of a root is infinite."""
    return square.clamp(min=EPSILON**2).sqrt()


def box_grid(
    low: Tensor,  # [B, d]
    high: Tensor,  # [B, d]
    shape: tuple[int, ...],
    flip: Tensor | None = None,  # [B, d]
    *,
    features: tuple[int, ...] | None = None,
) -> Tensor:
    """Affine grid that takes a common frame onto a box of a view: [B, d, d+1] for align_corners=False (`align`, `PriorGuidedLocalLoss`).

    Point m of M on an axis lands on the voxel coordinate u = low + (m + 1/2)/M (high - low) - 1/2, and on shape - 1 - u where the axis is flipped.

    Args:
        low, high: the box's edges, floating, in voxels of the view before it was flipped: 0 and shape are the outermost edges, voxel k spans k to k + 1.
            Axes in the order of `shape`, slowest first.
        shape: S of the view.
        flip: bool, axes along which the view was flipped after the crop.
        features: S of its feature map, default `shape`. A side under one voxel of it is widened to one, about its centre.

    Returns:
        float32 (float64 where low is float64).
    """
    expect_tensor(low, "low")
    if not low.dtype.is_floating_point:
        raise TypeError(f"`low` must be floating, got {str(low.dtype).removeprefix('torch.')}")
    dims = len(shape)
    if low.ndim != 2 or low.shape[1] != dims or dims not in (2, 3):
        expect(False, "low", f"have shape [B, {dims}] for the 2 or 3 axes of shape {tuple(shape)}", tuple(low.shape))
    low = low.to(compute_dtype(low))
    expect_tensor(high, "high")
    if high.shape != low.shape:
        expect(False, "high", f"have shape {tuple(low.shape)} as `low` has", tuple(high.shape))
    expect_device(high, "high", low, "low")
    features = shape if features is None else features
    for name, sizes in (("shape", shape), ("features", features)):
        if len(sizes) != dims or min(sizes) < 1:
            expect(False, name, f"have {dims} entries >= 1", tuple(sizes))
    if flip is not None:
        expect_dtype(flip, "flip", torch.bool)
        if flip.shape != low.shape:
            expect(False, "flip", f"have shape {tuple(low.shape)} as `low` has", tuple(flip.shape))
        expect_device(flip, "flip", low, "low")
    scales, offsets = [], []  # of the frame's [-1, 1]
    for axis in reversed(range(dims)):  # grids have x, the last axis, first
        side = (high - low)[:, axis].clamp(min=shape[axis] / features[axis])
        scales.append(side / shape[axis])
        offsets.append((low + high)[:, axis] / shape[axis] - 1)
    theta = torch.cat([torch.diag_embed(torch.stack(scales, 1)), torch.stack(offsets, 1).unsqueeze(2)], 2)
    return theta if flip is None else torch.where(flip.flip(1).unsqueeze(2), -theta, theta)
