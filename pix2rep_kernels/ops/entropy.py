"""Entropy of softmax at every pixel, from logits; the probabilities are never stored.

    c_k = exp(l_k - m) / Z,  m = max_k l_k,  Z = sum_k exp(l_k - m)     (entropy.1)
    H   = -sum_k c_k log c_k  =  log Z - sum_k c_k (l_k - m)            (entropy.2)
    dl_k = -dH c_k (l_k - <c, l>)                                       (entropy.3)

k runs over the K clusters of one pixel, 0 log 0 is 0 (a cluster whose logit is -inf takes no part), dH is the upstream gradient. H is 0 where the mask is
False, and so is dl. (entropy.3) is the derivative -dH c_k (log c_k + H), of which log Z cancels: the backward pass takes no logarithm, and needs neither H
nor c from the forward pass.

BIM's official code has log(c_k + 1e-16). That lowers (entropy.2) by sum_k c_k log(1 + 1e-16 / c_k), between 0 and K 1e-16, as log(1 + x) <= x: less than
one rounding of 1 (2^-53 = 1.1e-16) for each of the K terms in float64, and in float32 less than one of all (2^-24) up to K = 5e8. It is left out.

Floor: the logits read once, one value a pixel written; backward read and written once. One exponential a logit in each pass, one logarithm a pixel.

Source: boundary-aware information maximisation, arXiv 2202.02371 (the boundary term's map).
"""

import torch
from torch import Tensor

from pix2rep_kernels.check import checked_mask, expect, expect_float
from pix2rep_kernels.layout import is_channels_last, new_empty
from pix2rep_kernels.register import register

SCHEMA = "entropy(Tensor logits, Tensor? mask, str backend) -> Tensor h"
BACKWARD_SCHEMA = "entropy_backward(Tensor grad_h, Tensor logits, Tensor? mask, bool channels_last, str backend) -> Tensor grad_logits"


def entropy(
    logits: Tensor,  # [B, K, *S]
    *,
    mask: Tensor | None = None,  # [B, *S] or [B, 1, *S]
    backend: str = "auto",
) -> Tensor:
    """Entropy of the softmax over K at every pixel (entropy.2), in nats, from 0 (sure) to log K (all clusters alike).

    Args:
        logits: [B, K, *S] with 2 or 3 spatial axes, K >= 1; float16, bfloat16, float32 or float64, any strides.
        mask: bool, the pixels that count. Elsewhere H is 0 and the gradient exactly 0, whatever the logits hold there.
        backend: "auto", "reference", "cpu", "triton" or "cuda".

    Returns:
        [B, 1, *S], float32 (float64 for float64 logits). NaN where a pixel that counts holds NaN or +inf, or -inf alone.

    Raises:
        ValueError: a shape or device is off; the message names argument, expectation and value.
        TypeError: an argument has the wrong type or dtype.
        RuntimeError: the named backend cannot run; a second derivative is asked for.
    """
    return torch.ops.pix2rep.entropy(logits, _check(logits, mask), backend)


def why_not(backend: str, tensors: list[Tensor | None]) -> str | None:
    """Limits of a backend that depend on the tensors; `dispatch.why_not` asks."""
    if backend in ("triton", "cuda") and any(t is not None and t.dtype == torch.float64 for t in tensors):
        return "float64 maps run on the backends reference and cpu only"
    return None


def _check(logits, mask) -> Tensor | None:
    expect_float(logits, "logits")
    if logits.ndim not in (4, 5) or logits.shape[1] == 0:
        expect(False, "logits", "have shape [B, K, H, W] or [B, K, D, H, W] with K >= 1", tuple(logits.shape))
    return None if mask is None else checked_mask(mask, logits, "logits")


def _fake(logits, mask, backend):
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return logits.new_empty((logits.shape[0], 1, *logits.shape[2:]), dtype=dtype)


def _backward_fake(grad_h, logits, mask, channels_last, backend):
    return new_empty(logits, logits.shape, channels_last)


def _setup_context(ctx, inputs, output):
    logits, mask, ctx.backend = inputs
    ctx.save_for_backward(logits, mask)


def _backward(ctx, grad_h):
    logits, mask = ctx.saved_tensors
    return torch.ops.pix2rep.entropy_backward(grad_h, logits, mask, is_channels_last(logits), ctx.backend), None, None


register(SCHEMA, BACKWARD_SCHEMA, fake=_fake, backward_fake=_backward_fake, setup_context=_setup_context, backward=_backward)
