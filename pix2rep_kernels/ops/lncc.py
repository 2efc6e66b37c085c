"""Local normalised cross-correlation of two maps: one value a pixel, from box sums over a window, none of them stored.

    S_I = sum_w I, S_J, S_II, S_JJ, S_IJ likewise;  n = k^dims                  (lncc.1)
    c   = max(S_IJ - S_I S_J / n, e)                                            (lncc.2)
    v   = max(S_II - S_I^2 / n, e),  w = max(S_JJ - S_J^2 / n, e)               (lncc.3)
    cc  = (c / v) (c / w)                                                       (lncc.4)
    A   = 2 g cc / c [c > e],  B = -g cc / v [v > e],  B' = -g cc / w [w > e]   (lncc.5)
    dI  = J box(A) - box(A S_J / n) + 2 I box(B) - 2 box(B S_I / n)             (lncc.6)
    dJ  = I box(A) - box(A S_I / n) + 2 J box(B') - 2 box(B' S_J / n)           (lncc.7)

Windows of k pixels a side, zero-padded: n = k^dims at the border too. Every e is `eps`. Where c is clamped (not positively correlated) the window has no
gradient through c; a flat window clamps all three and scores exactly 1. g is the upstream gradient.

The differences of (lncc.2-3) and (lncc.6-7) cancel where a map's mean is far above its deviation: PyTorch's error, and the reference's, grows with the square
of that ratio. The other backends subtract means before they multiply. Axis by axis, part t = 0, 1, ... of c pixels, mean m_t and centred sum V_t is merged,

    d = m_t - m,  m += d / (t + 1),  V += V_t + c t / (t + 1) d d'              (lncc.8)

where d d' is that of II, JJ or IJ: V ends as the difference in (lncc.2-3), S_I = n m, and no variance cancels. Seen from any point (i, j) the gradient is

    dI  = sum over the windows w of the pixel of A (j - m_J) + 2 B (i - m_I),  plus (J - j) box(A) + 2 (I - i) box(B)   (lncc.9)

whose points are the means in the middle of each row or plane of windows, and last the pixel itself; dJ likewise.

Floor: 2 values a pixel read, 1 written; backward 3 read, 2 written. Beyond that the CPU keeps lines and planes of the windows of one task in each thread
(under 1 MiB but for very large windows), Triton the five float32 maps A, 2 B, 2 B', m_I, m_J in the backward alone (four for one gradient).

Sources: boundary-aware information maximisation, arXiv 2202.02371 (the boundary term); Avants et al. 2008.
"""

import torch
from torch import Tensor

from pix2rep_kernels.check import expect, expect_device, expect_float
from pix2rep_kernels.register import register

SCHEMA = "lncc(Tensor i, Tensor j, int window, float eps, str backend) -> Tensor cc"
BACKWARD_SCHEMA = (
    "lncc_backward(Tensor grad_cc, Tensor i, Tensor j, int window, float eps, bool need_i, bool need_j, str backend) "
    "-> (Tensor grad_i, Tensor grad_j)"
)


def lncc(
    i: Tensor,  # [B, C, *S]
    j: Tensor,  # [B, C, *S]
    *,
    window: int = 5,
    eps: float = 1e-5,
    backend: str = "auto",
) -> Tensor:
    """Squared local correlation of two maps in the window around each pixel (lncc.4), in [0, 1] up to the clamps.

    Args:
        i, j: maps [B, C, *S] with 2 or 3 spatial axes, each channel for itself (C = 1 in the paper); float16, bfloat16, float32 or float64, any strides.
        window: k, odd.
        eps: e > 0, the least covariance and variances times n; in the paper 1e-5, for maps in [0, 1].
        backend: "auto", "reference", "cpu", "triton" or "cuda".

    Returns:
        [B, C, *S], float32 (float64 where i or j is float64). NaN and inf, and pixels whose squares overflow, reach every window that holds them, as NaN.

    Raises:
        ValueError: a shape, device, window or eps is off; the message names argument, expectation and value.
        TypeError: an argument has the wrong type or dtype.
        RuntimeError: the named backend cannot run; a second derivative is asked for.
    """
    _check(i, j, window, eps)
    return torch.ops.pix2rep.lncc(i, j, window, float(eps), backend)


def why_not(backend: str, tensors: list[Tensor | None]) -> str | None:
    """Limits of a backend that depend on the tensors; `dispatch.why_not` asks."""
    if backend in ("triton", "cuda") and any(t is not None and t.dtype == torch.float64 for t in tensors):
        return "float64 maps run on the backends reference and cpu only"
    return None


def _check(i, j, window, eps) -> None:
    expect_float(i, "i")
    expect_float(j, "j")
    if i.ndim not in (4, 5):
        expect(False, "i", "have shape [B, C, H, W] or [B, C, D, H, W]", tuple(i.shape))
    if j.shape != i.shape:
        expect(False, "j", f"have the shape of i {tuple(i.shape)}", tuple(j.shape))
    expect_device(j, "j", i, "i")
    if isinstance(window, bool) or not isinstance(window, int):
        raise TypeError(f"`window` must be an int, got {window!r}")
    expect(window > 0 and window % 2 == 1, "window", "be odd and > 0", window)
    if isinstance(eps, bool) or not isinstance(eps, (int, float)):
        raise TypeError(f"`eps` must be a float, got {eps!r}")
    expect(1e-30 <= eps < float("inf"), "eps", "be > 0 and finite (1e-30 at least)", eps)


def compute_dtype(i: Tensor, j: Tensor) -> torch.dtype:
    """float64 when a map is float64, else float32: the dtype of cc."""
    return torch.float64 if torch.float64 in (i.dtype, j.dtype) else torch.float32


def _fake(i, j, window, eps, backend):
    return i.new_empty(i.shape, dtype=compute_dtype(i, j))


def _backward_fake(grad_cc, i, j, window, eps, need_i, need_j, backend):
    return i.new_empty(i.shape if need_i else (0,)), j.new_empty(j.shape if need_j else (0,))


def _setup_context(ctx, inputs, output):
    i, j, *ctx.options = inputs
    ctx.save_for_backward(i, j)


def _backward(ctx, grad_cc):
    i, j = ctx.saved_tensors
    window, eps, backend = ctx.options
    needs = ctx.needs_input_grad[:2]
    grads = torch.ops.pix2rep.lncc_backward(grad_cc, i, j, window, eps, *needs, backend)
    return *(grad if need else None for grad, need in zip(grads, needs, strict=True)), None, None, None


register(SCHEMA, BACKWARD_SCHEMA, fake=_fake, backward_fake=_backward_fake, setup_context=_setup_context, backward=_backward)
