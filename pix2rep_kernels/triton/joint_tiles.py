"""Tiles of clusters x pixels that joint's kernels share: where their pixels lie, their probabilities, their products; and the sizes of both."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pix2rep_kernels.triton.tiles import LOG2E, product

WARPS = 1056  # 8 for each of the 132 multiprocessors of an H100 or H200
BLOCK = 1024  # entries of a program without a product
HALF = 15  # probabilities enter float16 products times 2^15: what underflows is below 2^-40

# Of the kernels' arguments: compiled once for every value. Of the others it matters to loads whether they are 1 or a multiple of 16.
VARYING = ("tiles", "parts", "displacements", "radius", "sign", "D", "H", "W", "size", "reach")


@triton.jit
def pixels(tile, S, D, H, W, dz, dy, dx, SHIFT: tl.constexpr, P: tl.constexpr):
    """Image and pixels [P] of one tile moved by a displacement, as indices into prod(S) and as z, y, x, and whether they lie in the image."""
    tiles = tl.cdiv(S, P)
    image = tl.cast(tile // tiles, tl.int64)
    n = tile % tiles * P + tl.arange(0, P)
    inside = n < S
    x, y, z = n % W, n // W % H, n // W // H
    if SHIFT:
        x, y, z = x + dx, y + dy, z + dz
        inside = inside & (x >= 0) & (x < W) & (y >= 0) & (y < H) & (z >= 0) & (z < D)
        n = (z * H + y) * W + x
    return image, n, x, y, z, inside


@triton.jit
def displacement(d, radius, DIMS: tl.constexpr):
    """(dz, dy, dx) of the d-th one, slowest axis first."""
    side = 2 * radius + 1
    dz = 0
    if DIMS == 3:
        dz = d // side // side - radius
    return dz, d // side % side - radius, d % side - radius


@triton.jit
def places(image, n, x, y, z, k, stride_b, stride_k, stride_z, stride_y, stride_x, FLAT: tl.constexpr):
    """Offsets [clusters, pixels] into a map. FLAT: the spatial axes are one axis of stride stride_x."""
    if FLAT:
        pixel = n.to(tl.int64) * stride_x
    else:
        pixel = x.to(tl.int64) * stride_x + y.to(tl.int64) * stride_y + z.to(tl.int64) * stride_z
    return image * stride_b + k[:, None].to(tl.int64) * stride_k + pixel[None, :]


@triton.jit
def counted(mask_ptr, image, n, inside, S, MASKED: tl.constexpr):
    """The pixels that count."""
    if MASKED:
        inside = inside & (tl.load(mask_ptr + image * S + n, mask=inside, other=0) != 0)
    return inside


@triton.jit
def probabilities(map_ptr, at, known, counts, SOFTMAX: tl.constexpr):
    """(joint.1) [clusters, pixels] in float32; 0 where a pixel does not count, whatever the map holds there."""
    x = tl.load(map_ptr + at, mask=known[:, None] & counts[None, :], other=-float("inf") if SOFTMAX else 0.0).to(tl.float32)
    if SOFTMAX:
        e = tl.exp2((x - tl.max(x, 0)[None, :]) * LOG2E)
        x = tl.where(counts[None, :], e * (1.0 / tl.sum(e, 0))[None, :], 0.0)  # a division is four products
    return x


@triton.jit
def finished(gradient, p, counts, SOFTMAX: tl.constexpr):
    """(joint.7), and exactly 0 where a pixel does not count."""
    if SOFTMAX:
        gradient = p * (gradient - tl.sum(p * gradient, 0)[None, :])
    return tl.where(counts[None, :], gradient, 0.0)


@triton.jit
def mixed(weights_ptr, k, other, p, scale, KP: tl.constexpr, HALF: tl.constexpr, PRECISION: tl.constexpr):
    """weights [k, other] @ p [other, pixels] (joint.6); float16 operands are p times scale."""
    weights = tl.load(weights_ptr + k[:, None] * KP + other[None, :])
    if HALF:
        p = (p * scale).to(tl.float16)
    return product(weights, p, PRECISION)


class Format(NamedTuple):
    """Clusters padded for matrix products, pixels of a tile, and how operands are held."""

    padded: int
    pixels: int
    half: bool
    precision: str
    num_warps: int

    @property
    def options(self) -> dict:
        stages = 2 if self.half or self.padded < 128 else 1  # rows fetched ahead would spill beside three products
        blocks = {"KP": self.padded, "P": self.pixels, "num_warps": self.num_warps, "num_stages": stages}
        return {**blocks, "HALF": self.half, "PRECISION": self.precision}

    @property
    def programs(self) -> int:
        return WARPS // self.num_warps


class Map(NamedTuple):
    """A map with its strides: batch, cluster, and three spatial axes."""

    data: Tensor
    strides: tuple[int, ...]
    flat: bool


def format_of(a: Tensor, b: Tensor, logits: bool) -> Format:
    """Operands: float16 where both maps have 16 bits and softmax bounds them by 1; else float32, as `torch.get_float32_matmul_precision()` says."""
    padded = max(16, triton.next_power_of_2(a.shape[1]))
    half = logits and a.element_size() == 2 and b.element_size() == 2
    strict = torch.get_float32_matmul_precision() == "highest"
    # Few enough registers for three products a pair; more warps than padded x padded keeps busy would each hold the same operands.
    pixels, warps = {16: (64, 1), 32: (64, 2), 64: (64, 4), 128: (32, 8)}[padded] if half else {16: (32, 1), 32: (32, 2), 64: (16, 4), 128: (16, 8)}[padded]
    return Format(padded, pixels, half, "ieee" if half else "tf32x3" if strict else "tf32", warps)


def map_of(t: Tensor) -> Map:
    """The spatial axes count as one where their strides allow."""
    spatial = t.stride()[2:]
    kept = [(size, stride) for size, stride in zip(t.shape[2:], spatial, strict=True) if size > 1]
    flat = all(outer == stride * size for (_, outer), (size, stride) in zip(kept, kept[1:], strict=False))
    last = kept[-1][1] if kept else 1
    strides = (0, 0, last) if flat else (0,) * (3 - len(spatial)) + spatial
    return Map(t, (t.stride(0), t.stride(1), *strides), flat)


def volume(shape) -> tuple[int, int, int]:
    """D, H, W; 2D has D = 1."""
    return (1,) * (3 - len(shape)) + tuple(shape)
