"""Pixel InfoNCE: contrast every feature row with its match against all other rows; the N x N matrix is never stored.

    s_ij    = <x_i, y_j> / tau                                                  (infonce.1)
    r_i     = log sum_{j in neg(i)} exp(s_ij)                                   (infonce.2)
    loss_i  = log(1 + exp(r_i - s_i+)),  s_i+ the similarity to the positive    (infonce.3)
    lse_i   = s_i+ + loss_i  =  log(exp(s_i+) + exp(r_i))                       (infonce.4)
    G_ij    = g_i exp(s_ij - lse_i), j in neg(i);   G_i+ = g_i (exp(-loss_i) - 1)   (infonce.5)
    dx_i    = sum_j G_ij y_j / tau;   dy_j = sum_i G_ij x_i / tau               (infonce.6)
    dtau    = -sum_ij G_ij s_ij / tau                                           (infonce.7)

x are the anchors, y the candidates, g the upstream gradient. With a [N, D] and b [M, D]:

    negatives   anchors x   candidates y        source
    "joint"     [a; b]      [a; b] less i       NT-Xent, Chen et al. 2020; Pix2Rep, arXiv 2407.20395
    "cross"     a and b     b and a             CLIP, Radford et al. 2021
    "forward"   a           b                   CPC, van den Oord et al. 2018; MoCo

neg(i) leaves out the anchor itself, its positive, invalid rows and rows with the anchor's id. The positive stays outside the sum (infonce.3), so
that a loss near 0 keeps its relative accuracy and is never negative.

Memory O((N + M) D). Floor with tile recomputation: "cross" 10 N^2 D flops and 3 N^2 exponentials (8 and 2 where one pass makes both gradients).
"""

import math

import torch
from torch import Tensor

from pix2rep_kernels.check import expect, expect_choice, expect_device, expect_dtype, expect_float, expect_temperature
from pix2rep_kernels.register import register

NEGATIVES = ("joint", "cross", "forward")
PRECISIONS = (None, "ieee", "tf32x3", "fp16")

_INPUTS = (
    "Tensor a, Tensor b, Tensor temperature, float temperature_floor, str negatives, Tensor? positive, "
    "Tensor? valid_a, Tensor? valid_b, Tensor? ids_a, Tensor? ids_b, Tensor? queue, str? precision"
)
SCHEMA = f"infonce({_INPUTS}, str backend) -> (Tensor losses, Tensor lse)"
BACKWARD_SCHEMA = (
    f"infonce_backward(Tensor grad_losses, Tensor losses, Tensor lse, {_INPUTS}, "
    "bool need_a, bool need_b, bool need_temperature, str backend) -> (Tensor grad_a, Tensor grad_b, Tensor grad_temperature)"
)


def infonce(
    a: Tensor,  # [.., N, D]
    b: Tensor,  # [.., M, D]
    *,
    temperature: float | Tensor,
    temperature_floor: float = 0.01,
    negatives: str = "joint",
    positive: Tensor | None = None,  # [.., N]
    valid_a: Tensor | None = None,  # [.., N]
    valid_b: Tensor | None = None,  # [.., M]
    ids_a: Tensor | None = None,  # [.., N]
    ids_b: Tensor | None = None,  # [.., M]
    queue: Tensor | None = None,  # [Q, D]
    precision: str | None = None,
    backend: str = "auto",
) -> Tensor:
    """InfoNCE loss of every anchor (infonce.3), exactly, in O(N D) memory.

    Args:
        a, b: feature rows, L2-normalised by contract (`warp(normalize=True)` or `F.normalize` gives them), float16, bfloat16, float32 or float64, any
            strides. Leading dimensions are groups: negatives stay inside a group. M may differ from N with "forward" only.
        temperature: tau > 0. A float is also the floor. A 0-d tensor is clamped to `temperature_floor` on its device and may be learnt: the gradient
            flows where it is at or above the floor.
        temperature_floor: smallest tau of a tensor temperature; it alone picks the kernel, so no value is read back from the device.
        negatives: "joint", "cross" or "forward", see the table above.
        positive: int64, column of `b` that matches each row of `a`; default: its own index (N <= M then). With "joint" and "cross" a permutation of each group.
            An index outside [0, M) raises on the CPU; on CUDA the anchor's loss is NaN.
        valid_a, valid_b: bool. An invalid row is neither anchor nor candidate, and an anchor whose positive is invalid is no anchor: loss and
            gradient exactly 0, whatever the row holds. `valid_b` defaults to `valid_a` when M == N.
        ids_a, ids_b: int64. Rows with equal ids are not each other's negatives; the positive always counts. `ids_b` defaults to `ids_a` when M == N.
        queue: extra negatives for every anchor, shared by the groups, without gradient; "joint" and "forward" only. It is saved for the backward
            pass: pass a clone if it is overwritten before that.
        precision: of the matrix products on a GPU, for the others there is one. None: float16 and bfloat16 rows use float16 similarities and bfloat16
            gradient products; float32 rows follow `torch.get_float32_matmul_precision()` ("highest": "tf32x3", otherwise "fp16").
            "ieee", "tf32x3", "fp16" name one; the CUDA kernels have one way of float32's digits for both of the first. Accumulation is float32.
        backend: "auto", "reference", "cpu", "triton" or "cuda".

    Returns:
        losses, float32 (float64 for float64 rows): [.., 2N] for "joint" and "cross", the anchors of `a` first; [.., N] for "forward".
        An anchor without any negative has loss 0. NaN in a valid row reaches every loss that it takes part in; inf reaches its own, unless
        its similarities are all -inf, which exp takes to 0.

    Raises:
        ValueError: a shape, device, choice or temperature is off; the message names argument, expectation and value.
        TypeError: an argument has the wrong dtype.
        RuntimeError: the named backend cannot run; a second derivative is asked for.
    """
    _check(a, b, negatives, positive, valid_a, valid_b, ids_a, ids_b, queue, precision)
    temperature, floor = _temperature(temperature, temperature_floor, a, b)
    groups, n, m = a.shape[:-2], a.shape[-2], b.shape[-2]
    if n == m:
        valid_b = valid_a if valid_b is None else valid_b
        ids_b = ids_a if ids_b is None else ids_b
    count = math.prod(groups)
    vectors = [None if v is None else v.reshape(count, v.shape[-1]) for v in (positive, valid_a, valid_b, ids_a, ids_b)]
    losses, _ = torch.ops.pix2rep.infonce(
        a.reshape(count, n, a.shape[-1]), b.reshape(count, m, b.shape[-1]), temperature, floor, negatives, *vectors,
        None if queue is None else queue.detach(), precision, backend,
    )  # fmt: skip
    return losses.reshape(*groups, losses.shape[-1])


def why_not(backend: str, tensors: list[Tensor | None]) -> str | None:
    """Limits of a backend that depend on the tensors; `dispatch.why_not` asks."""
    if backend in ("triton", "cuda") and any(t is not None and t.ndim == 3 and t.dtype == torch.float64 for t in tensors):
        return "float64 rows run on the backends reference and cpu only"
    return None


def _temperature(temperature: float | Tensor, floor: float, a: Tensor, b: Tensor) -> tuple[Tensor, float]:
    if isinstance(temperature, Tensor):
        expect_float(temperature, "temperature")
        if temperature.ndim != 0:
            expect(False, "temperature", "be a float or a 0-d tensor", f"shape {tuple(temperature.shape)}")
        expect_temperature(floor, "temperature_floor")
        return temperature.to(a.device, compute_dtype(a, b)), float(floor)
    expect_temperature(temperature)
    return torch.full((), temperature, dtype=compute_dtype(a, b), device=a.device), float(temperature)


def _check(a, b, negatives, positive, valid_a, valid_b, ids_a, ids_b, queue, precision) -> None:
    expect_choice(negatives, "negatives", NEGATIVES)
    expect_choice(precision, "precision", PRECISIONS)
    for name, rows in (("a", a), ("b", b), ("queue", queue)):
        if rows is not None:
            expect_float(rows, name)
            expect_device(rows, name, a, "a")
    if a.ndim < 2:
        expect(False, "a", "have shape [.., N, D]", tuple(a.shape))
    if b.ndim != a.ndim or b.shape[:-2] != a.shape[:-2]:
        expect(False, "b", f"have shape [.., M, D] with the groups of a {tuple(a.shape)}", tuple(b.shape))
    if b.shape[-1] != a.shape[-1]:
        expect(False, "b", f"have D = {a.shape[-1]} features as `a` has", b.shape[-1])
    if negatives != "forward" and b.shape[-2] != a.shape[-2]:
        expect(False, "b", f"have N = {a.shape[-2]} rows as `a` has (negatives={negatives!r})", b.shape[-2])
    if positive is None and a.shape[-2] > b.shape[-2]:
        expect(False, "positive", f"be given where `a` has more rows ({a.shape[-2]}) than `b` ({b.shape[-2]})", None)
    if queue is not None:
        if negatives == "cross":
            expect(False, "queue", 'be None with negatives="cross"', tuple(queue.shape))
        if queue.ndim != 2 or queue.shape[1] != a.shape[-1]:
            expect(False, "queue", f"have shape [Q, {a.shape[-1]}]", tuple(queue.shape))
    if ids_b is not None and ids_a is None:
        expect(False, "ids_a", "be given with ids_b", None)
    if ids_a is not None and ids_b is None and a.shape[-2] != b.shape[-2]:
        expect(False, "ids_b", "be given with ids_a when M != N", None)
    vectors = (
        ("positive", positive, a, torch.int64), ("valid_a", valid_a, a, torch.bool), ("valid_b", valid_b, b, torch.bool),
        ("ids_a", ids_a, a, torch.int64), ("ids_b", ids_b, b, torch.int64),
    )  # fmt: skip
    for name, vector, rows, dtype in vectors:
        if vector is None:
            continue
        expect_dtype(vector, name, dtype)
        if vector.shape != rows.shape[:-1]:
            expect(False, name, f"have shape {tuple(rows.shape[:-1])}", tuple(vector.shape))
        expect_device(vector, name, a, "a")


def compute_dtype(a: Tensor, b: Tensor) -> torch.dtype:
    """float64 when a row set is float64, else float32: the dtype of losses and lse."""
    return torch.float64 if torch.float64 in (a.dtype, b.dtype) else torch.float32


def _settle(inputs: list) -> None:
    """The precision of float32 rows that PyTorch's setting allows, which C++ cannot ask for."""
    at = 11 if isinstance(inputs[4], str) else 14  # the backward pass has three tensors before the same inputs
    a, b = inputs[at - 11], inputs[at - 10]
    if inputs[at] is None and torch.float32 in (a.dtype, b.dtype) and torch.get_float32_matmul_precision() != "highest":
        inputs[at] = "fp16"


def _fake(a, b, temperature, temperature_floor, negatives, *rest):
    anchors = a.shape[1] * (1 if negatives == "forward" else 2)
    losses = a.new_empty((a.shape[0], anchors), dtype=compute_dtype(a, b))
    return losses, torch.empty_like(losses)


def _backward_fake(grad_losses, losses, lse, a, b, temperature, *rest):
    need_a, need_b, need_temperature = rest[-4:-1]
    return (
        a.new_empty(a.shape if need_a else (0,)),
        b.new_empty(b.shape if need_b else (0,)),
        temperature.new_empty(() if need_temperature else (0,)),
    )


def _setup_context(ctx, inputs, output):
    a, b, temperature, floor, negatives, *vectors, queue, precision, backend = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*output, a, b, temperature, *vectors, queue)
    ctx.options = (floor, negatives, precision, backend)


def _backward(ctx, grad_losses, grad_lse):
    losses, lse, a, b, temperature, *vectors, queue = ctx.saved_tensors
    floor, negatives, precision, backend = ctx.options
    needs = ctx.needs_input_grad[:3]
    grads = torch.ops.pix2rep.infonce_backward(
        grad_losses, losses, lse, a, b, temperature, floor, negatives, *vectors, queue, precision, *needs, backend
    )
    return *(grad if need else None for grad, need in zip(grads, needs, strict=True)), *(None,) * 10


register(SCHEMA, BACKWARD_SCHEMA, fake=_fake, backward_fake=_backward_fake, setup_context=_setup_context, backward=_backward, settle=_settle)
