"""Cross-correlation of two feature sets over their rows, D x D, from one pass of shifted moments.

    u_n   = x_n - cx,  v_n = y_n - cy                                           (crosscorr.1)
    n     = sum_n w_n                                                           (crosscorr.2)
    sx    = sum_n w_n u_n,      sy = sum_n w_n v_n                              (crosscorr.3)
    qx    = sum_n w_n u_n^2,    qy = sum_n w_n v_n^2                            (crosscorr.4)
    P     = sum_n w_n u_n v_n^T                                                 (crosscorr.5)
    dx_n  = w_n (gsx + 2 gqx u_n + gP v_n),  dy_n = w_n (gsy + 2 gqy v_n + gP^T u_n)   (crosscorr.6)
    C_ij  = (P_ij / n - mx_i my_j) / (sigma_x,i sigma_y,j),  mx = sx / n, my = sy / n  (crosscorr.7)
    sigma = sqrt(q/n - m^2 + 1e-5)  or  sqrt((q/n - m^2) n/(n-1)) + 1e-6        (crosscorr.8)

x [N, D1] and y [N, D2] are the two views, w the rows' weights, cx and cy pivots: the result does not depend on them, its rounding does (q/n - m^2 cancels
where the mean is far from the pivot). The pivot is the mean of up to 128 rows spread over the N, so that it is near the mean (with 16-bit inputs a GPU rounds
it to their dtype: then x - c is nearly exact in it). A row with w = 0 takes no part, whatever it holds.

The op computes (crosscorr.1-6), the moments, one read of each view forward and one affine product a view backward; (crosscorr.7-8) are O(D^2) PyTorch on
top, differentiated by autograd, and so is anything else that the moments give (VICReg's covariance; an all-reduce over ranks). No standardised copy of a
view is stored. Floor: (D1 + D2) N values read forward, as many read and written backward; 2 N D1 D2 flops forward, twice that backward.

Sources: Barlow Twins, Zbontar et al. 2021; Pix2Rep-v2, arXiv 2609.01427.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from pix2rep_kernels.check import expect, expect_choice, expect_device, expect_float, expect_tensor
from pix2rep_kernels.register import register

NORMALIZATIONS = ("batchnorm", "std", "none")

SCHEMA = (
    "crosscorr(Tensor x, Tensor y, Tensor? weight, str backend) -> (Tensor count, Tensor pivot_x, Tensor pivot_y, "
    "Tensor sum_x, Tensor sum_y, Tensor square_x, Tensor square_y, Tensor product)"
)
BACKWARD_SCHEMA = (
    "crosscorr_backward(Tensor grad_sum_x, Tensor grad_sum_y, Tensor grad_square_x, Tensor grad_square_y, Tensor grad_product, "
    "Tensor x, Tensor y, Tensor? weight, Tensor pivot_x, Tensor pivot_y, bool need_x, bool need_y, str backend) -> (Tensor grad_x, Tensor grad_y)"
)


class Moments(NamedTuple):
    """Raw moments about a pivot (crosscorr.2-5), float32 (float64 for float64 features)."""

    count: Tensor  # []
    pivot_x: Tensor  # [D1]
    pivot_y: Tensor  # [D2]
    sum_x: Tensor  # [D1]
    sum_y: Tensor  # [D2]
    square_x: Tensor  # [D1]
    square_y: Tensor  # [D2]
    product: Tensor  # [D1, D2]

    def about(self, pivot_x: Tensor, pivot_y: Tensor) -> "Moments":
        """The same moments about another pivot: those of several ranks may be added once they share one."""
        x, y = self.pivot_x - pivot_x, self.pivot_y - pivot_y
        return Moments(
            self.count, pivot_x, pivot_y, self.sum_x + self.count * x, self.sum_y + self.count * y,
            self.square_x + 2 * x * self.sum_x + self.count * x * x, self.square_y + 2 * y * self.sum_y + self.count * y * y,
            self.product + torch.outer(x, self.sum_y) + torch.outer(self.sum_x, y) + self.count * torch.outer(x, y),
        )  # fmt: skip


def crosscorr(
    x: Tensor,  # [N, D1]
    y: Tensor,  # [N, D2]
    *,
    normalization: str = "batchnorm",
    weight: Tensor | None = None,  # [N]
    backend: str = "auto",
) -> Tensor:
    """Cross-correlation matrix of two feature sets (crosscorr.7), exactly, without a standardised copy of either.

    Args:
        x, y: rows of the two views; float16, bfloat16, float32 or float64, any strides.
        normalization: "batchnorm": biased variance, eps 1e-5 in the root (`BatchNorm1d(affine=False)`, Pix2Rep-v2, Barlow Twins); "std": unbiased
            standard deviation plus 1e-6 (MONAI); "none": the biased covariance itself.
        weight: bool or floating, >= 0 by contract: how much each row counts. A row of weight 0 (False) is left out and gets gradient exactly 0, whatever
            it holds. No gradient to the weights. With "std", weights are numbers of rows: n/(n-1) is taken of their sum.
        backend: "auto", "reference", "cpu", "triton" or "cuda".

    Returns:
        [D1, D2], float32 (float64 where x or y is float64); zeros when no row counts. A NaN or inf in a row that counts reaches its row or column of C.

    Raises:
        ValueError: a shape, device or choice is off; the message names argument, expectation and value.
        TypeError: an argument has the wrong type or dtype.
        RuntimeError: the named backend cannot run; a second derivative of the moments is asked for.
    """
    expect_choice(normalization, "normalization", NORMALIZATIONS)
    return correlation(moments(x, y, weight=weight, backend=backend), normalization)


def moments(x: Tensor, y: Tensor, *, weight: Tensor | None = None, backend: str = "auto") -> Moments:
    """Shifted moments of two feature sets (crosscorr.1-5); arguments and errors as in `crosscorr`."""
    _check(x, y, weight)
    if weight is not None:
        weight = weight.detach().to(compute_dtype(x, y))
    return Moments(*torch.ops.pix2rep.crosscorr(x, y, weight, backend))


def correlation(m: Moments, normalization: str = "batchnorm") -> Tensor:
    """C [D1, D2] of the moments (crosscorr.7-8)."""
    n = torch.where(m.count == 0, 1, m.count)
    mean_x, mean_y = m.sum_x / n, m.sum_y / n
    covariance = m.product / n - torch.outer(mean_x, mean_y)
    if normalization == "none":
        return covariance
    scale_x, scale_y = (_scale(square / n - mean * mean, n, normalization) for square, mean in ((m.square_x, mean_x), (m.square_y, mean_y)))
    return covariance / torch.outer(scale_x, scale_y)


def _scale(variance: Tensor, n: Tensor, normalization: str) -> Tensor:
    variance = variance.clamp(min=0)  # rounding may leave less
    if normalization == "batchnorm":
        return (variance + 1e-5).sqrt()
    variance = variance * n / (n - 1)
    dead = variance == 0  # as torch.std, whose gradient is 0 there
    return torch.where(dead, 0, torch.where(dead, 1, variance).sqrt()) + 1e-6


def why_not(backend: str, tensors: list[Tensor | None]) -> str | None:
    """Limits of a backend that depend on the tensors; `dispatch.why_not` asks."""
    if backend in ("triton", "cuda") and any(t is not None and t.dtype == torch.float64 for t in tensors):
        return "float64 features run on the backends reference and cpu only"
    return None


def _check(x, y, weight) -> None:
    expect_float(x, "x")
    expect_float(y, "y")
    if x.ndim != 2:
        expect(False, "x", "have shape [N, D1]", tuple(x.shape))
    if y.ndim != 2 or y.shape[0] != x.shape[0]:
        expect(False, "y", f"have shape [{x.shape[0]}, D2]", tuple(y.shape))
    expect_device(y, "y", x, "x")
    if weight is None:
        return
    expect_tensor(weight, "weight")
    if weight.dtype != torch.bool:
        expect_float(weight, "weight")
    if weight.shape != x.shape[:1]:
        expect(False, "weight", f"have shape ({x.shape[0]},)", tuple(weight.shape))
    expect_device(weight, "weight", x, "x")


def compute_dtype(x: Tensor, y: Tensor) -> torch.dtype:
    """float64 when a view is float64, else float32: the dtype of the moments and of the weights."""
    return torch.float64 if torch.float64 in (x.dtype, y.dtype) else torch.float32


def _fake(x, y, weight, backend):
    d1, d2 = x.shape[1], y.shape[1]
    return tuple(x.new_empty(shape, dtype=compute_dtype(x, y)) for shape in ((), (d1,), (d2,), (d1,), (d2,), (d1,), (d2,), (d1, d2)))


def _backward_fake(grad_sum_x, grad_sum_y, grad_square_x, grad_square_y, grad_product, x, y, weight, pivot_x, pivot_y, need_x, need_y, backend):
    return x.new_empty(x.shape if need_x else (0,)), y.new_empty(y.shape if need_y else (0,))


def _setup_context(ctx, inputs, output):
    x, y, weight, ctx.backend = inputs
    ctx.mark_non_differentiable(*output[:3])
    ctx.save_for_backward(x, y, weight, *output[1:3])


def _backward(ctx, grad_count, grad_pivot_x, grad_pivot_y, *grads):
    needs = ctx.needs_input_grad[:2]
    found = torch.ops.pix2rep.crosscorr_backward(*grads, *ctx.saved_tensors, *needs, ctx.backend)
    return *(grad if need else None for grad, need in zip(found, needs, strict=True)), None, None


register(SCHEMA, BACKWARD_SCHEMA, fake=_fake, backward_fake=_backward_fake, setup_context=_setup_context, backward=_backward)
