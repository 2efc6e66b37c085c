"""Mean feature of every labelled region of an image, and the region's size.

    c_r  = |{p : label(p) = r}|                                                 (pool.1)
    mu_r = (1 / c_r) sum_{p : label(p) = r} F(p),   0 where c_r = 0             (pool.2)
    dF(p) = dmu_r / c_r,  r = label(p);   0 where p has no region               (pool.3)

p runs over the pixels of one image, r over 0 .. R-1; a pixel whose label is outside that range belongs to no region. Sums are float64 and in a fixed
order on cpu and triton: a mean is one rounding away from the exact one however large its region, and the same bits every time.
Floor: features and labels read once; backward the labels read, a map written.

Source: superpixel pooling, e.g. Localized Region Contrast, arXiv 2304.03406.
"""

import torch
from torch import Tensor

from pix2rep_kernels.check import expect, expect_device, expect_float, expect_tensor
from pix2rep_kernels.layout import is_channels_last, new_empty
from pix2rep_kernels.register import register

LABELS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)

SCHEMA = "pool(Tensor features, Tensor labels, SymInt regions, str backend) -> (Tensor means, Tensor counts)"
BACKWARD_SCHEMA = (
    "pool_backward(Tensor grad_means, Tensor counts, Tensor labels, Tensor like, SymInt[] shape, bool channels_last, str backend) -> Tensor grad_features"
)


def pool(
    features: Tensor,  # [B, C, *S]
    labels: Tensor,  # [B, *S]
    *,
    regions: int,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Mean feature of each region of each image (pool.2).

    Args:
        features: [B, C, *S] with 1 to 3 spatial axes; float16, bfloat16, float32 or float64; any strides, channels-last is the fast layout.
        labels: [B, *S] uint8, int8, int16, int32 or int64: the region of each pixel. A label outside [0, regions), a negative one above all, means none:
            the pixel is left out, whatever it holds, and gets gradient exactly 0.
        regions: R >= 0.
        backend: "auto", "reference", "cpu", "triton" or "cuda".

    Returns:
        means: [B, R, C] float32 (float64 for float64 features); 0 where a region is empty. NaN and inf reach the means of their region.
        counts: [B, R] int64.

    Raises:
        ValueError: a shape or device is off; the message names argument, expectation and value.
        TypeError: an argument has the wrong type or dtype.
        RuntimeError: the named backend cannot run; a second derivative is asked for.
    """
    _check(features, labels, regions)
    return torch.ops.pix2rep.pool(features, labels, regions, backend)


def why_not(backend: str, tensors: list[Tensor | None]) -> str | None:
    """Limits of a backend that depend on the tensors; `dispatch.why_not` asks."""
    if backend in ("triton", "cuda"):
        present = [t for t in tensors if t is not None]
        if any(t.dtype == torch.float64 for t in present):
            return "float64 features run on the backends reference and cpu only"
        if most := max((t.numel() for t in present if not t.is_floating_point() and t.numel() >= 2**31), default=0):
            return f"labels are sorted, at most 2^31 - 1 of them; there are {most}"
    return None


def _check(features, labels, regions) -> None:
    expect_float(features, "features")
    if not 3 <= features.ndim <= 5:
        expect(False, "features", "have shape [B, C, *S] with 1 to 3 spatial axes", tuple(features.shape))
    expect_tensor(labels, "labels")
    if labels.dtype not in LABELS:
        raise TypeError(f"`labels` must be uint8, int8, int16, int32 or int64, got {str(labels.dtype).removeprefix('torch.')}")
    if labels.shape != features.shape[:1] + features.shape[2:]:
        expect(False, "labels", f"have shape {(features.shape[0], *features.shape[2:])}", tuple(labels.shape))
    expect_device(labels, "labels", features, "features")
    if isinstance(regions, bool) or not isinstance(regions, (int, torch.SymInt)):
        raise TypeError(f"`regions` must be an int, got {regions!r}")
    if regions < 0:
        expect(False, "regions", "be >= 0", regions)


def compute_dtype(features: Tensor) -> torch.dtype:
    """float64 for float64 features, else float32: the dtype of the means."""
    return torch.float64 if features.dtype == torch.float64 else torch.float32


def _fake(features, labels, regions, backend):
    means = features.new_empty((features.shape[0], regions, features.shape[1]), dtype=compute_dtype(features))
    return means, features.new_empty((features.shape[0], regions), dtype=torch.int64)


def _backward_fake(grad_means, counts, labels, like, shape, channels_last, backend):
    return new_empty(like, shape, channels_last)


def _setup_context(ctx, inputs, output):
    features, labels, _, ctx.backend = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(labels, output[1])
    ctx.shape, ctx.dtype, ctx.channels_last = features.shape, features.dtype, features.ndim > 3 and is_channels_last(features)


def _backward(ctx, grad_means, grad_counts):
    labels, counts = ctx.saved_tensors
    like = grad_means.new_empty(0, dtype=ctx.dtype)  # the features' dtype; the map itself is not kept
    return torch.ops.pix2rep.pool_backward(grad_means, counts, labels, like, ctx.shape, ctx.channels_last, ctx.backend), None, None, None


register(SCHEMA, BACKWARD_SCHEMA, fake=_fake, backward_fake=_backward_fake, setup_context=_setup_context, backward=_backward)
