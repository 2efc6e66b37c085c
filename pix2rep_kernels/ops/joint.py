"""Joint distribution of two cluster maps, K x K, over displacements within a radius, from logits; the probabilities are never stored.

    a^_p   = softmax(a_p),  b^_p = softmax(b_p)       or a_p, b_p themselves       (joint.1)
    S_d    = sum_p m_{p+d} m_p a^_{p+d} b^_p^T,  |d|_inf <= T                      (joint.2)
    S      = sum_d S_d  =  sum_p box_T(m a^)_p (m b^)_p^T                          (joint.3)
    P      = S / sum(S)                                                            (joint.4)
    P      = (P + P^T) / 2   when symmetric                                        (joint.5)
    da^_p += m_p sum_d m_{p-d} G_d b^_{p-d},   db^_p += m_p sum_d m_{p+d} G_d^T a^_{p+d}   (joint.6)
    da_k   = a^_k (da^_k - <a^, da^>)                                              (joint.7)

p runs over the pixels of every image, d over the (2T+1)^dims displacements (slowest axis first, each from -T to T); a pixel outside the image does not
count. m is the mask, 1 where none is given. G_d is the gradient of S_d. "Collapsed" sums over d before normalising: S costs one box filter and one product
(joint.3). The uncollapsed P_d are normalised one by one.

The op computes S (joint.1-3) and its gradient (joint.6-7), float32 sums in a fixed order; (joint.4-5) are O(K^2) PyTorch on top. Floor at T = 0: both maps
read once forward; read once and written once backward; 2 M K^2 flops forward, 4 M K^2 backward for M pixels.

Sources: IIC, Ji et al. 2019; boundary-aware information maximisation, arXiv 2202.02371.
"""

import torch
from torch import Tensor

from pix2rep_kernels.check import checked_mask, expect, expect_device, expect_float
from pix2rep_kernels.layout import is_channels_last, new_empty
from pix2rep_kernels.register import register

_OPTIONS = "Tensor? mask, int radius, bool collapsed, bool logits"
SCHEMA = f"joint(Tensor a, Tensor b, {_OPTIONS}, str backend) -> Tensor sums"
BACKWARD_SCHEMA = (
    f"joint_backward(Tensor grad_sums, Tensor a, Tensor b, {_OPTIONS}, bool need_a, bool need_b, bool channels_last_a, bool channels_last_b, "
    "str backend) -> (Tensor grad_a, Tensor grad_b)"
)


def joint(
    a: Tensor,  # [B, K, *S]
    b: Tensor,  # [B, K, *S]
    *,
    radius: int = 0,
    collapsed: bool = True,
    mask: Tensor | None = None,  # [B, 1, *S] or [B, *S]
    symmetric: bool = True,
    logits: bool = True,
    detach_normalizer: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Joint distribution of the clusters of two maps (joint.4-5).

    Args:
        a, b: cluster maps [B, K, *S] with 2 or 3 spatial axes; float16, bfloat16, float32 or float64, any strides.
        radius: T >= 0, in pixels: pairs (p + d, p) with |d|_inf <= T count.
        collapsed: sum over displacements before normalising (one K x K); else one distribution a displacement.
        mask: bool, on both maps: only pairs of pixels that it holds count. No gradient elsewhere, exactly 0, whatever a and b hold there.
        symmetric: (P + P^T) / 2.
        logits: a and b are logits (softmax over K, temperature 1); else they are probabilities.
        detach_normalizer: no gradient through sum(S) in (joint.4), as the official IIC; the same for logits, whose sum is constant.
        backend: "auto", "reference", "cpu", "triton" or "cuda".

    Returns:
        [K, K], or [(2T+1)^dims, K, K] when not collapsed; float32 (float64 where a or b is float64). Entries of a distribution sum to 1; zeros when no
        pair counts. NaN in a pixel that counts reaches every entry.

    Raises:
        ValueError: a shape, device or radius is off; the message names argument, expectation and value.
        TypeError: an argument has the wrong type or dtype.
        RuntimeError: the named backend cannot run; a second derivative is asked for.
    """
    mask = _check(a, b, radius, mask)
    sums = torch.ops.pix2rep.joint(a, b, mask, radius, collapsed, logits, backend)
    total = sums.sum((-2, -1), keepdim=True)
    total = torch.where(total == 0, 1, total.detach() if detach_normalizer else total)
    p = sums / total
    p = (p + p.transpose(-2, -1)) / 2 if symmetric else p
    return p.squeeze(0) if collapsed else p


def why_not(backend: str, tensors: list[Tensor | None]) -> str | None:
    """Limits of a backend that depend on the tensors; `dispatch.why_not` asks."""
    if backend in ("triton", "cuda") and any(t is not None and t.dtype == torch.float64 for t in tensors):
        return "float64 maps run on the backends reference and cpu only"
    first = tensors[0]  # a, or the gradient of the sums: axis 1 has K entries
    if backend == "triton" and first.ndim > 1 and first.shape[1] > 128:
        return f"{first.shape[1]} clusters: more than 128 run on the backends reference and cpu only"
    return None


def _check(a, b, radius, mask) -> Tensor | None:
    expect_float(a, "a")
    expect_float(b, "b")
    if a.ndim not in (4, 5):
        expect(False, "a", "have shape [B, K, H, W] or [B, K, D, H, W]", tuple(a.shape))
    if b.shape != a.shape:
        expect(False, "b", f"have the shape of a {tuple(a.shape)}", tuple(b.shape))
    expect_device(b, "b", a, "a")
    if isinstance(radius, bool) or not isinstance(radius, int):
        raise TypeError(f"`radius` must be an int, got {radius!r}")
    expect(radius >= 0, "radius", "be >= 0", radius)
    return None if mask is None else checked_mask(mask, a, "a")


def compute_dtype(a: Tensor, b: Tensor) -> torch.dtype:
    """float64 when a map is float64, else float32: the dtype of the sums."""
    return torch.float64 if torch.float64 in (a.dtype, b.dtype) else torch.float32


def _fake(a, b, mask, radius, collapsed, logits, backend):
    count = 1 if collapsed else (2 * radius + 1) ** (a.ndim - 2)
    return a.new_empty((count, a.shape[1], a.shape[1]), dtype=compute_dtype(a, b))


def _backward_fake(grad_sums, a, b, mask, radius, collapsed, logits, need_a, need_b, channels_last_a, channels_last_b, backend):
    grad_a = new_empty(a, a.shape, channels_last_a) if need_a else a.new_empty(0)
    grad_b = new_empty(b, b.shape, channels_last_b) if need_b else b.new_empty(0)
    return grad_a, grad_b


def _setup_context(ctx, inputs, output):
    a, b, mask, *ctx.options = inputs
    ctx.save_for_backward(a, b, mask)


def _backward(ctx, grad_sums):
    a, b, mask = ctx.saved_tensors
    *options, backend = ctx.options
    needs = ctx.needs_input_grad[:2]
    grads = torch.ops.pix2rep.joint_backward(grad_sums, a, b, mask, *options, *needs, is_channels_last(a), is_channels_last(b), backend)
    return *(grad if need else None for grad, need in zip(grads, needs, strict=True)), *(None,) * 5


register(SCHEMA, BACKWARD_SCHEMA, fake=_fake, backward_fake=_backward_fake, setup_context=_setup_context, backward=_backward)
