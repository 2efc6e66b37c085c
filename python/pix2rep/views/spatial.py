"""Random geometry with a known grid, one draw an image, in a batch on the device.

A grid maps output to input positions in normalised coordinates (`align_corners=True`: -1 and 1 are the centres of the outermost pixels),
x first, as `F.affine_grid` and `F.grid_sample` have it.

    affine    g(p) = R C T F p      R rotation, C crop (scale and shift), T translation, F flip                    (1)
    elastic   g(p) = R C T F (p + e(p))      e: sum of uniform cubic B-splines with random control points           (2)
"""

import math

import torch
import torch.nn.functional as F

from pix2rep.config import SpatialConfig
from pix2rep.views.random import uniform


class SpatialView:
    """Draws grids. Pure but for the generator: the same generator state gives the same grids.

    dims: 2 or 3; in 3D the rotation is Rz Ry Rx, each angle U(-r, r), and flips may have a third entry for z.
    spacing: relative voxel size along the array's axes ([D,] H, W), so that a rotation does not shear anisotropic voxels; None: equal.
    """

    def __init__(self, config: SpatialConfig, dims: int = 2, spacing: tuple[float, ...] | None = None):
        _check(config, dims, spacing)
        self.config, self.dims = config, dims
        self.spacing = tuple(spacing) if spacing is not None else (1.0,) * dims

    def __call__(
        self,
        batch_size: int,
        size: tuple[int, ...],
        generator: torch.Generator | None = None,
        device: torch.device | str = "cpu",
        spacing: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """float32 grid for images [B, C, *size]: affine [B, d, d+1], or dense [B, *size, d] where `config.elastic` > 0.

        spacing: [B, d], voxel sizes of each image in place of the constructor's.
        """
        if batch_size < 1 or len(size) != self.dims:
            raise ValueError(f"batch_size must be at least 1 and size have {self.dims} entries, got {batch_size} and {tuple(size)}")
        if spacing is not None and spacing.shape != (batch_size, self.dims):
            raise ValueError(f"spacing must have shape {[batch_size, self.dims]}, got {list(spacing.shape)}")
        theta = self._theta(batch_size, size, spacing, generator, device)
        if not self.config.elastic:
            return theta
        moved = dense(identity(batch_size, self.dims, device), size) + self._displacement(batch_size, size, generator, device)
        flat = moved.flatten(1, -2)  # [B, prod(size), d]
        mapped = torch.baddbmm(theta[:, None, :, -1], flat, theta[:, :, :-1].transpose(1, 2))
        return mapped.view(moved.shape)

    def _theta(self, batch: int, size, spacing, generator, device) -> torch.Tensor:
        """Equation (1), [B, d, d+1]."""
        config, d = self.config, self.dims
        angle = uniform((batch, 1 if d == 2 else 3), -config.rotation, config.rotation, generator, device) * (math.pi / 180)
        scale = uniform((batch, 1), *config.scale, generator, device)
        crop = uniform((batch, d), -1, 1, generator, device) * (1 - scale).clamp(min=0)
        shift = uniform((batch, d), -config.translation, config.translation, generator, device)
        flip = self._flip(batch, generator, device)
        rotation = self._rotation(angle, size, spacing)
        linear = rotation * scale[:, :, None]  # R C, [B, d, d]
        offset = rotation @ (crop + scale * shift)[:, :, None]
        return torch.cat([linear * flip[:, None, :], offset], dim=2)

    def _flip(self, batch: int, generator, device) -> torch.Tensor:
        """[B, d] of 1 and -1: at most one axis is flipped."""
        draw, flips, start = uniform((batch,), 0, 1, generator, device), [], 0.0
        for axis in range(self.dims):
            share = self.config.flip[axis] if axis < len(self.config.flip) else 0.0
            flips.append(1 - 2 * ((draw >= start) & (draw < start + share)).float())
            start += share
        return torch.stack(flips, dim=1)

    def _rotation(self, angle: torch.Tensor, size, spacing: torch.Tensor | None) -> torch.Tensor:
        """[B, d, d]: isometric in mm, expressed in normalised coordinates (x first)."""
        axes = self.spacing if spacing is None else spacing.to(angle).unbind(1)
        extent = [max(n - 1, 1) * s for n, s in zip(size, axes, strict=True)][::-1]
        rotation = None
        for k, (i, j) in enumerate([(0, 1)] if self.dims == 2 else [(0, 1), (0, 2), (1, 2)]):
            c, s = angle[:, k].cos(), angle[:, k].sin()
            plane = torch.eye(self.dims, device=angle.device).repeat(len(angle), 1, 1)
            plane[:, i, i], plane[:, j, j] = c, c
            plane[:, i, j], plane[:, j, i] = -s * (extent[j] / extent[i]), s * (extent[i] / extent[j])
            rotation = plane if rotation is None else rotation @ plane
        return rotation

    def _displacement(self, batch: int, size, generator, device) -> torch.Tensor:
        """e of equation (2), [B, *size, d], normalised; 0 for the images that draw no elastic field."""
        d, total = self.dims, 0
        # Pixels at 128 -> share of the half extent: the same field at every size.
        unit = 2 / 127
        for points, reach in zip(self.config.elastic_points, self.config.elastic_displacement, strict=True):
            control = uniform((batch, d) + (points,) * d, -reach * unit, reach * unit, generator, device)
            inner = torch.zeros(points, device=device)
            inner[1:-1] = 1  # the outermost ring stays put
            for axis in range(d):
                control = control * inner.view((-1,) + (1,) * (d - 1 - axis))
            for axis, n in enumerate(size):  # separable: [.., points, ..] -> [.., n, ..]
                control = torch.movedim(torch.movedim(control, 2 + axis, -1) @ _spline(n, points, device).T, -1, 2 + axis)
            total = total + control
        drawn = uniform((batch,) + (1,) * (d + 1), 0, 1, generator, device) < self.config.elastic
        return torch.movedim(total * drawn, 1, -1)


def identity(batch_size: int, dims: int = 2, device: torch.device | str = "cpu") -> torch.Tensor:
    """The affine grid that moves nothing, [B, d, d+1] float32."""
    return torch.eye(dims, dims + 1, device=device).repeat(batch_size, 1, 1)


def dense(grid: torch.Tensor, size: tuple[int, ...]) -> torch.Tensor:
    """Any grid as a dense one [B, *size, d]."""
    if grid.dim() != 3:
        return grid
    return F.affine_grid(grid, [len(grid), 1, *size], align_corners=True)


def warp_image(x: torch.Tensor, grid: torch.Tensor, mode: str = "bilinear") -> torch.Tensor:
    """Images [B, C, *S] at the grid's positions, zero outside; `mode` "bilinear" (trilinear in 3D), "nearest" or "bicubic" (2D)."""
    points = dense(grid, tuple(x.shape[2:])).to(x.dtype)
    return F.grid_sample(x, points, mode=mode, padding_mode="zeros", align_corners=True)


def warp_labels(labels: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    """Integer labels [B, *S] at the nearest pixel, 0 outside."""
    return warp_image(labels[:, None].float(), grid, mode="nearest")[:, 0].to(labels.dtype)


def _spline(n: int, points: int, device) -> torch.Tensor:
    """[n, points]: cubic B-spline weights of n positions over control points at both ends and evenly between."""
    t = torch.linspace(0, points - 1, n, device=device)[:, None] - torch.arange(points, device=device)
    a = t.abs()
    near, far = (4 - 6 * a**2 + 3 * a**3) / 6, (2 - a).clamp(min=0) ** 3 / 6
    return torch.where(a < 1, near, far)


def _check(config: SpatialConfig, dims: int, spacing) -> None:
    if dims not in (2, 3):
        raise ValueError(f"dims must be 2 or 3, got {dims}")
    if spacing is not None and (len(spacing) != dims or min(spacing) <= 0):
        raise ValueError(f"spacing must be {dims} positive numbers, got {spacing}")
    if config.rotation < 0:
        raise ValueError(f"spatial.rotation must be at least 0 degrees, got {config.rotation}")
    if len(config.scale) != 2 or not 0 < config.scale[0] <= config.scale[1]:
        raise ValueError(f"spatial.scale must be a range 0 < low <= high, got {tuple(config.scale)}")
    if config.translation < 0:
        raise ValueError(f"spatial.translation must be at least 0, got {config.translation}")
    if len(config.flip) > dims or any(p < 0 for p in config.flip) or sum(config.flip) > 1 + 1e-9:
        raise ValueError(f"spatial.flip must be up to {dims} probabilities with a sum of at most 1, got {tuple(config.flip)}")
    if not 0 <= config.elastic <= 1:
        raise ValueError(f"spatial.elastic must be a probability, got {config.elastic}")
    if len(config.elastic_points) != len(config.elastic_displacement) or any(p < 3 for p in config.elastic_points):
        raise ValueError(
            "spatial.elastic_points must be numbers of at least 3, one for each of elastic_displacement, "
            f"got {tuple(config.elastic_points)} and {tuple(config.elastic_displacement)}"
        )
