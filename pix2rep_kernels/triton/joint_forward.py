"""Joint sums (joint.1-3): every program multiplies its tiles into one K x K, and a second kernel adds those in order."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from pix2rep_kernels.triton.joint_tiles import (
    BLOCK,
    HALF,
    VARYING,
    Format,
    Map,
    counted,
    displacement,
    map_of,
    pixels,
    places,
    probabilities,
    volume,
)
from pix2rep_kernels.triton.tiles import product


@triton.jit(do_not_specialize=VARYING)
def joint_spread(
    map_ptr, mask_ptr, out_ptr, K, S, D, H, W, stride_b, stride_k, stride_z, stride_y, stride_x,
    SOFTMAX: tl.constexpr, MASKED: tl.constexpr, FLAT: tl.constexpr, KP: tl.constexpr, P: tl.constexpr, HALF: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Masked probabilities of one tile into out [B, K, prod(S)] float32."""
    k = tl.arange(0, KP)
    image, n, x, y, z, inside = pixels(tl.program_id(0), S, D, H, W, 0, 0, 0, False, P)
    counts = counted(mask_ptr, image, n, inside, S, MASKED)
    p = probabilities(map_ptr, places(image, n, x, y, z, k, stride_b, stride_k, stride_z, stride_y, stride_x, FLAT), k < K, counts, SOFTMAX)
    at = (image * K + k[:, None]) * S + n[None, :]
    tl.store(out_ptr + at, p, mask=(k < K)[:, None] & inside[None, :])


@triton.jit(do_not_specialize=VARYING)
def joint_box(in_ptr, out_ptr, count, size, pitch, reach, BLOCK: tl.constexpr):
    """out = sum over 2 reach + 1 neighbours along an axis of `size` entries that lie `pitch` apart; those outside are 0."""
    at = tl.cast(tl.program_id(0), tl.int64) * BLOCK + tl.arange(0, BLOCK)
    along = at // pitch % size
    total = tl.zeros([BLOCK], tl.float32)
    for step in range(-reach, reach + 1):
        found = (at < count) & (along + step >= 0) & (along + step < size)
        total += tl.load(in_ptr + at + tl.cast(step, tl.int64) * pitch, mask=found, other=0.0)
    tl.store(out_ptr + at, total, mask=at < count)


@triton.jit(do_not_specialize=VARYING)
def joint_sums(
    a_ptr, b_ptr, mask_ptr, partial_ptr,  # partial [parts, displacements, K, K]
    tiles, parts, displacements, radius, scale_a, scale_b, K, S, D, H, W,
    a_b, a_k, a_z, a_y, a_x, b_b, b_k, b_z, b_y, b_x,
    SOFTMAX_A: tl.constexpr, SOFTMAX_B: tl.constexpr, MASKED: tl.constexpr, FLAT_A: tl.constexpr, FLAT_B: tl.constexpr,
    SHIFT: tl.constexpr, DIMS: tl.constexpr, KP: tl.constexpr, P: tl.constexpr, HALF: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(joint.2) of one displacement over the tiles part, part + parts, ...; a is moved, and masked already where SHIFT."""
    part, d = tl.program_id(0) % parts, tl.program_id(0) // parts
    dz, dy, dx = displacement(d, radius, DIMS)
    k = tl.arange(0, KP)
    total = tl.zeros([KP, KP], tl.float32)
    for tile in range(part, tiles, parts):
        image, n, x, y, z, inside = pixels(tile, S, D, H, W, 0, 0, 0, False, P)
        counts = counted(mask_ptr, image, n, inside, S, MASKED)
        b = probabilities(b_ptr, places(image, n, x, y, z, k, b_b, b_k, b_z, b_y, b_x, FLAT_B), k < K, counts, SOFTMAX_B)
        if SHIFT:
            image, n, x, y, z, counts = pixels(tile, S, D, H, W, dz, dy, dx, True, P)
        a = probabilities(a_ptr, places(image, n, x, y, z, k, a_b, a_k, a_z, a_y, a_x, FLAT_A), k < K, counts, SOFTMAX_A)
        if HALF:
            a, b = (a * scale_a).to(tl.float16), (b * scale_b).to(tl.float16)
        # Tensor cores truncate as they add: a long chain of sums there would drift.
        total += product(a, tl.trans(b), PRECISION)
    out = (tl.cast(part, tl.int64) * displacements + d) * K * K + k[:, None] * K + k[None, :]
    tl.store(partial_ptr + out, total, mask=(k < K)[:, None] & (k < K)[None, :])


@triton.jit(do_not_specialize=VARYING)
def joint_reduce(partial_ptr, out_ptr, parts, entries, scale, BLOCK: tl.constexpr):
    """out = scale * sum of the parts, in their order."""
    at = tl.cast(tl.program_id(0), tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for part in range(parts):
        total += tl.load(partial_ptr + tl.cast(part, tl.int64) * entries + at, mask=at < entries, other=0.0)
    tl.store(out_ptr + at, total * scale, mask=at < entries)


def spread(m: Map, mask: Tensor | None, form: Format, logits: bool, reach: int) -> Tensor:
    """Masked probabilities [B, K, *S] float32, summed over |d|_inf <= reach when that is > 0: one map, two while it is box-filtered."""
    batch, clusters, *space = m.data.shape
    size = math.prod(space)
    out = m.data.new_empty(m.data.shape, dtype=torch.float32)
    joint_spread[(batch * triton.cdiv(size, form.pixels),)](
        m.data, mask, out, clusters, size, *volume(space), *m.strides, SOFTMAX=logits, MASKED=mask is not None, FLAT=m.flat, **form.options
    )
    pitch = size
    for n in space:
        pitch //= n
        if reach and n > 1:
            boxed = torch.empty_like(out)
            joint_box[(triton.cdiv(out.numel(), BLOCK),)](out, boxed, out.numel(), n, pitch, min(reach, n - 1), BLOCK=BLOCK)
            out = boxed
    return out


def box_bits(space, reach: int) -> int:
    """log2, rounded up, of the pixels in a box: its sums stay below 2^15 in float16 when scaled by 2^-bits more."""
    return sum(math.ceil(math.log2(min(2 * reach + 1, n))) for n in space)


def sums(a, b, mask, radius, collapsed, logits, form: Format) -> Tensor:
    """S [count, K, K]."""
    batch, clusters, *space = a.shape
    size, shift = math.prod(space), radius > 0 and not collapsed
    count = (2 * radius + 1) ** len(space) if shift else 1
    out = a.new_empty((count, clusters, clusters), dtype=torch.float32)
    moved = map_of(a)
    if radius:
        moved = map_of(spread(moved, mask, form, logits, radius if collapsed else 0))
    still = map_of(b)
    tiles = batch * triton.cdiv(size, form.pixels)
    parts = max(1, min(tiles, triton.cdiv(form.programs, count), batch * size // (4 * clusters)))  # a quarter of a map
    bits = HALF - (box_bits(space, radius) if radius and collapsed else 0)
    partial = a.new_empty((parts, count, clusters, clusters), dtype=torch.float32)
    joint_sums[(parts * count,)](
        moved.data, still.data, mask, partial, tiles, parts, count, radius, 2.0**bits, 2.0**HALF, clusters, size, *volume(space),
        *moved.strides, *still.strides, SOFTMAX_A=logits and radius == 0, SOFTMAX_B=logits, MASKED=mask is not None,
        FLAT_A=moved.flat, FLAT_B=still.flat, SHIFT=shift, DIMS=len(space), **form.options,
    )  # fmt: skip
    scale = 2.0 ** -(bits + HALF) if form.half else 1.0
    joint_reduce[(triton.cdiv(out.numel(), 128),)](partial, out, parts, out.numel(), scale, BLOCK=128)
    return out
