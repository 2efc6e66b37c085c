"""Gradients of the joint sums (joint.6-7): of logits without a radius one kernel for both maps; else one a map, from the other's probabilities."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from pix2rep_kernels.triton.joint_forward import box_bits, spread
from pix2rep_kernels.triton.joint_tiles import (
    HALF,
    VARYING,
    Format,
    counted,
    displacement,
    finished,
    map_of,
    mixed,
    pixels,
    places,
    probabilities,
    volume,
)

CHUNK = 16  # clusters that joint_side multiplies at a time, which keeps it in registers


@triton.jit(do_not_specialize=VARYING)
def joint_gradients(
    a_ptr, b_ptr, mask_ptr, weights_ptr, unit_ptr, grad_a_ptr, grad_b_ptr,  # weights [2, KP, KP]: G and its transpose, over unit
    scale, K, S, D, H, W,
    a_b, a_k, a_z, a_y, a_x, b_b, b_k, b_z, b_y, b_x, ga_b, ga_k, ga_z, ga_y, ga_x, gb_b, gb_k, gb_z, gb_y, gb_x,
    NEED_A: tl.constexpr, NEED_B: tl.constexpr, MASKED: tl.constexpr, FLAT_A: tl.constexpr, FLAT_B: tl.constexpr,
    KP: tl.constexpr, P: tl.constexpr, HALF: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Radius 0, logits: both maps are read once and both gradients written once."""
    k = tl.arange(0, KP)
    image, n, x, y, z, inside = pixels(tl.program_id(0), S, D, H, W, 0, 0, 0, False, P)
    counts = counted(mask_ptr, image, n, inside, S, MASKED)
    unit = tl.load(unit_ptr)
    stored = (k < K)[:, None] & inside[None, :]
    a = probabilities(a_ptr, places(image, n, x, y, z, k, a_b, a_k, a_z, a_y, a_x, FLAT_A), k < K, counts, True)
    b = probabilities(b_ptr, places(image, n, x, y, z, k, b_b, b_k, b_z, b_y, b_x, FLAT_B), k < K, counts, True)
    if NEED_A:
        grad = finished(mixed(weights_ptr, k, k, b, scale, KP, HALF, PRECISION) * unit, a, counts, True)
        at = places(image, n, x, y, z, k, ga_b, ga_k, ga_z, ga_y, ga_x, True)
        tl.store(grad_a_ptr + at, grad.to(grad_a_ptr.dtype.element_ty), mask=stored)
    if NEED_B:
        grad = finished(mixed(weights_ptr + KP * KP, k, k, a, scale, KP, HALF, PRECISION) * unit, b, counts, True)
        at = places(image, n, x, y, z, k, gb_b, gb_k, gb_z, gb_y, gb_x, True)
        tl.store(grad_b_ptr + at, grad.to(grad_b_ptr.dtype.element_ty), mask=stored)


@triton.jit(do_not_specialize=VARYING)
def joint_side(
    own_ptr, other_ptr, mask_ptr, weights_ptr, unit_ptr, grad_ptr,  # other holds probabilities; weights [displacements, KP, KP]
    scale, displacements, radius, sign, K, S, D, H, W,
    own_b, own_k, own_z, own_y, own_x, other_b, other_k, other_z, other_y, other_x, grad_b, grad_k, grad_z, grad_y, grad_x,
    SOFTMAX: tl.constexpr, MASKED: tl.constexpr, FLAT: tl.constexpr, FLAT_OTHER: tl.constexpr, SHIFT: tl.constexpr, DIMS: tl.constexpr, CHUNK: tl.constexpr,
    KP: tl.constexpr, P: tl.constexpr, HALF: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of one map: sum over displacements of weights_d @ other, moved by sign * d. Radius 0: other is not masked yet, but its pixel is `own`'s."""
    k = tl.arange(0, KP)
    total = tl.zeros([KP, P], tl.float32)
    for d in range(displacements):
        dz, dy, dx = displacement(d, radius, DIMS)
        image, n, x, y, z, there = pixels(tl.program_id(0), S, D, H, W, sign * dz, sign * dy, sign * dx, SHIFT, P)
        for first in range(0, KP, CHUNK):
            other = first + tl.arange(0, CHUNK)
            at = places(image, n, x, y, z, other, other_b, other_k, other_z, other_y, other_x, FLAT_OTHER)
            p = probabilities(other_ptr, at, other < K, there, False)
            total += mixed(weights_ptr + tl.cast(d, tl.int64) * KP * KP, k, other, p, scale, KP, HALF, PRECISION)
    image, n, x, y, z, inside = pixels(tl.program_id(0), S, D, H, W, 0, 0, 0, False, P)
    counts = counted(mask_ptr, image, n, inside, S, MASKED)
    own = total
    if SOFTMAX:
        own = probabilities(own_ptr, places(image, n, x, y, z, k, own_b, own_k, own_z, own_y, own_x, FLAT), k < K, counts, SOFTMAX)
    grad = finished(total * tl.load(unit_ptr), own, counts, SOFTMAX)
    at = places(image, n, x, y, z, k, grad_b, grad_k, grad_z, grad_y, grad_x, True)
    tl.store(grad_ptr + at, grad.to(grad_ptr.dtype.element_ty), mask=(k < K)[:, None] & inside[None, :])


def grads(grad_sums, a, b, mask, radius, collapsed, logits, grad_a: Tensor | None, grad_b: Tensor | None, form: Format) -> None:
    """Fill the gradients that are not None."""
    batch, clusters, *space = a.shape
    size, shift = math.prod(space), radius > 0 and not collapsed
    bits = HALF - (box_bits(space, radius) if radius and collapsed else 0)
    weights, unit = _weights(grad_sums, form, bits)
    maps, outs = [map_of(t) for t in (a, b)], [map_of(a if g is None else g) for g, t in ((grad_a, a), (grad_b, b))]
    grid = (batch * triton.cdiv(size, form.pixels),)
    common = {"MASKED": mask is not None, **form.options}
    if radius == 0 and logits:
        joint_gradients[grid](
            a, b, mask, weights, unit, outs[0].data, outs[1].data, 2.0**bits, clusters, size, *volume(space),
            *maps[0].strides, *maps[1].strides, *outs[0].strides, *outs[1].strides,
            NEED_A=grad_a is not None, NEED_B=grad_b is not None, FLAT_A=maps[0].flat, FLAT_B=maps[1].flat, **common,
        )  # fmt: skip
        return
    for side, grad in enumerate((grad_a, grad_b)):
        if grad is not None:
            other = maps[1 - side]
            if radius:
                other = map_of(spread(other, mask, form, logits, radius if collapsed else 0))
            joint_side[grid](
                maps[side].data, other.data, mask, weights[side], unit, grad, 2.0**bits, len(grad_sums), radius, 2 * side - 1,
                clusters, size, *volume(space), *maps[side].strides, *other.strides, *outs[side].strides,
                SOFTMAX=logits, FLAT=maps[side].flat, FLAT_OTHER=other.flat, SHIFT=shift, DIMS=len(space), CHUNK=CHUNK, **common,
            )  # fmt: skip


def _weights(grad_sums: Tensor, form: Format, bits: int) -> tuple[Tensor, Tensor]:
    """G and its transpose [2, displacements, KP, KP], over a power of two that leaves the largest below 1 in float16; unit undoes it and 2^bits."""
    unit = torch.ones((), device=grad_sums.device)
    if form.half:
        largest = grad_sums.abs().amax()
        unit = torch.where(largest.isfinite(), torch.ldexp(unit, torch.frexp(largest).exponent), unit)
    g = (grad_sums / unit).to(torch.float16 if form.half else torch.float32)
    pad = form.padded - grad_sums.shape[-1]
    both = torch.nn.functional.pad(torch.stack([g, g.transpose(-2, -1)]), (0, pad, 0, pad))
    return both.contiguous(), unit * 2.0**-bits if form.half else unit
