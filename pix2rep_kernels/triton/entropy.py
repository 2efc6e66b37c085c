"""Entropy of softmax in Triton: a program holds all clusters of one tile of pixels, read once; the backward pass makes softmax again from one more read.

More clusters than a tile holds at full width make it narrower, down to one pixel a program.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from pix2rep_kernels.layout import new_empty
from pix2rep_kernels.triton.joint_tiles import VARYING, counted, map_of, pixels, places, volume
from pix2rep_kernels.triton.tiles import LN2, LOG2E

LEAST = tl.constexpr(-2000.0)  # 2^LEAST is 0, and 0 LEAST is too: a forbidden cluster's -inf would make that NaN


@triton.jit
def _places(image, n, x, y, z, k, stride_b, stride_k, stride_z, stride_y, stride_x, FLAT: tl.constexpr, UNIT: tl.constexpr):
    """Offsets [clusters, pixels] into a map. With a UNIT above 1 clusters are side by side, and the strides come in UNITs: so many are read at a time."""
    if UNIT > 1:
        return (image * stride_b + n.to(tl.int64) * stride_x)[None, :] * UNIT + k[:, None]
    return places(image, n, x, y, z, k, stride_b, stride_k, stride_z, stride_y, stride_x, FLAT)


@triton.jit
def _powers(map_ptr, at, known, counts):
    """log2 of the probabilities up to each pixel's constant, their powers, and the reciprocals of Z [pixels] (entropy.1)."""
    x = tl.load(map_ptr + at, mask=known[:, None] & counts[None, :], other=-float("inf")).to(tl.float32)
    x = tl.where(counts[None, :], x, 0.0)
    t = (x - tl.max(x, 0)[None, :]) * LOG2E
    t = tl.where(t < LEAST, LEAST, t)  # in this order NaN passes
    e = tl.where(known[:, None], tl.exp2(t), 0.0)
    return t, e, tl.sum(e, 0)


@triton.jit(do_not_specialize=VARYING)
def entropy_forward_kernel(
    logits_ptr, mask_ptr, h_ptr, units, S, D, H, W, stride_b, stride_k, stride_z, stride_y, stride_x,
    MASKED: tl.constexpr, FLAT: tl.constexpr, UNIT: tl.constexpr, KP: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """(entropy.2) of one tile into h [B, prod(S)] float32."""
    k = tl.arange(0, KP)
    K = units * UNIT
    image, n, x, y, z, inside = pixels(tl.program_id(0), S, D, H, W, 0, 0, 0, False, P)
    counts = counted(mask_ptr, image, n, inside, S, MASKED)
    at = _places(image, n, x, y, z, k, stride_b, stride_k, stride_z, stride_y, stride_x, FLAT, UNIT)
    t, e, total = _powers(logits_ptr, at, k < K, counts)
    h = tl.log(total) - LN2 * tl.sum(e * t, 0) / total
    tl.store(h_ptr + image * S + n, tl.where(counts, h, 0.0), mask=inside)


@triton.jit(do_not_specialize=VARYING)
def entropy_backward_kernel(
    grad_h_ptr, logits_ptr, mask_ptr, grad_ptr, units, S, D, H, W,
    stride_b, stride_k, stride_z, stride_y, stride_x, grad_b, grad_k, grad_z, grad_y, grad_x,
    MASKED: tl.constexpr, FLAT: tl.constexpr, UNIT: tl.constexpr, KP: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """(entropy.3) of one tile, from grad_h [B, prod(S)]."""
    k = tl.arange(0, KP)
    K = units * UNIT
    image, n, x, y, z, inside = pixels(tl.program_id(0), S, D, H, W, 0, 0, 0, False, P)
    counts = counted(mask_ptr, image, n, inside, S, MASKED)
    at = _places(image, n, x, y, z, k, stride_b, stride_k, stride_z, stride_y, stride_x, FLAT, UNIT)
    t, e, total = _powers(logits_ptr, at, k < K, counts)
    each = 1.0 / total
    scale = -LN2 * tl.load(grad_h_ptr + image * S + n, mask=counts, other=0.0) * each
    grad = scale[None, :] * e * (t - (tl.sum(e * t, 0) * each)[None, :])  # 0 where a pixel does not count: its t and dH are
    at = _places(image, n, x, y, z, k, grad_b, grad_k, grad_z, grad_y, grad_x, True, UNIT)
    tl.store(grad_ptr + at, grad.to(grad_ptr.dtype.element_ty), mask=(k < K)[:, None] & inside[None, :])


def blocks(clusters: int) -> dict:
    """A tile of 4096 logits, 32 a thread: they, their powers and their places fit in the registers."""
    padded = triton.next_power_of_2(clusters)
    width = max(1, min(1024, 4096 // padded))
    return {"KP": padded, "P": width, "num_warps": max(1, min(16, padded * width // 1024))}


def forward(logits, mask) -> Tensor:
    """H [B, 1, *S], float32."""
    h = logits.new_empty((logits.shape[0], 1, *logits.shape[2:]), dtype=torch.float32)
    if h.numel() > 0:
        where = map_of(logits)
        unit = _unit(where.strides, where.flat, logits)
        _launch(entropy_forward_kernel, (logits, _dense(mask), h), logits, _in_units(where.strides, unit), where.flat, unit)
    return h


def backward(grad_h, logits, mask, channels_last) -> Tensor:
    """Gradient of the logits."""
    grad = new_empty(logits, logits.shape, channels_last)
    if grad.numel() > 0:
        where, to = map_of(logits), map_of(grad)
        unit = min(_unit(where.strides, where.flat, logits), _unit(to.strides, True, logits))
        strides = (*_in_units(where.strides, unit), *_in_units(to.strides, unit))
        _launch(entropy_backward_kernel, (grad_h.contiguous(), logits, _dense(mask), grad), logits, strides, where.flat, unit)
    return grad


def _dense(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.contiguous()


def _unit(strides: tuple, flat: bool, logits: Tensor) -> int:
    """Clusters side by side that 16 bytes hold, or fewer where rows begin between them; 1 where they are not side by side."""
    batch, cluster, _, _, pixel = strides
    if cluster != 1 or not flat:
        return 1
    return math.gcd(16 // logits.element_size(), logits.shape[1], batch, pixel)


def _in_units(strides: tuple, unit: int) -> tuple:
    return strides if unit == 1 else tuple(stride // unit for stride in strides)


def _launch(kernel, tensors: tuple, logits: Tensor, strides: tuple, flat: bool, unit: int) -> None:
    batch, clusters, *space = logits.shape
    size, options = math.prod(space), blocks(clusters)
    masked = tensors[-2] is not None  # the mask stands before the result
    with torch.cuda.device_of(logits):
        kernel[(batch * triton.cdiv(size, options["P"]),)](
            *tensors, clusters // unit, size, *volume(space), *strides, MASKED=masked, FLAT=flat, UNIT=unit, **options
        )  # fmt: skip
