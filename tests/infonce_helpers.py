"""Inputs of infonce's tests, and the comparison with float64 that they share."""

import math

import torch
import torch.nn.functional as F

from pix2rep_kernels import infonce
from pix2rep_kernels.testing import backends, error, poisoned, tolerance

GPU = torch.cuda.is_available()
FAST = [b for b in backends("infonce") if b not in ("triton", "cuda")]  # kernels that run interpreted or emulated have a table of their own
SMALL = [b for b in backends("infonce") if b != "reference"]
WIDE = [*FAST, *(b for b in SMALL if GPU and b not in FAST)]  # at every size where they are fast: on a GPU, without float64
NEGATIVES = ("joint", "cross", "forward")


def rows(*shape, dtype=torch.float64):
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1).to(dtype)


def options(kind, groups, n, d, negatives, dtype=torch.float64):
    """Optional arguments by name: none, masks, ids, permuted positives, a queue, all of them."""
    made = {
        "plain": {},
        "masked": {"valid_a": torch.rand(groups, n) > 0.3, "valid_b": torch.rand(groups, n) > 0.3},
        "ids": {"ids_a": torch.randint(-3, max(n // 2, 1), (groups, n)), "ids_b": torch.randint(-3, max(n // 2, 1), (groups, n))},
        "permuted": {"positive": torch.stack([torch.randperm(n) for _ in range(groups)])},
        "queue": {} if negatives == "cross" else {"queue": rows(7, d, dtype=dtype)},
    }
    return {k: v for option in made.values() for k, v in option.items()} if kind == "all" else made[kind]


def run(backend, a, b, tau, upstream, **kw):
    """losses, grad_a, grad_b, grad_temperature."""
    device = "cuda" if GPU and backend in ("triton", "cuda") else "cpu"
    a, b = a.detach().to(device, copy=True).requires_grad_(), b.detach().to(device, copy=True).requires_grad_()
    compute = torch.float64 if a.dtype == torch.float64 else torch.float32
    tau = torch.tensor(tau, dtype=compute, device=device, requires_grad=True)
    kw = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in kw.items()}
    with poisoned():
        losses = infonce(a, b, temperature=tau, backend=backend, **kw)
        losses.backward(upstream.to(losses))
    return losses.cpu(), a.grad.cpu(), b.grad.cpu(), tau.grad.cpu()


def check(backend, a, b, tau, negatives, dtype, narrow=False, floor=1e-4, **kw):
    """Compare one backend with the float64 reference on the same rounded inputs; the allowance is PyTorch's own error at that precision, doubled.

    Added to it is the rounding of one similarity, eps |a||b| / tau: PyTorch's own error can be luckily smaller on few rows. In float64 PyTorch is the
    truth, so there it is the bound of a dot product, D times as much. `narrow`: similarities are float16 products and the gradients bfloat16 ones,
    so PyTorch's own error is that of rows rounded likewise.
    The temperature's gradient is -<dx, x>/tau, so Cauchy-Schwarz carries the rows' allowance over to it.
    """
    a, b = a.to(dtype), b.to(dtype)
    kw = {k: v.to(dtype) if k == "queue" else v for k, v in kw.items()}
    wide = {k: v.double() if k == "queue" else v for k, v in kw.items()}
    narrow = narrow or dtype in (torch.float16, torch.bfloat16) and backend in ("triton", "cuda")
    upstream = torch.randn(a.shape[0], a.shape[1] * (1 if negatives == "forward" else 2), dtype=torch.float64)
    fixed = {"tau": tau, "upstream": upstream, "negatives": negatives, "temperature_floor": floor}
    truth = run("reference", a.double(), b.double(), **fixed, **wide)
    eager = run("reference", a, b, **fixed, **kw)
    got = run(backend, a, b, **fixed, **kw)
    if narrow:
        half, brief = (run("reference", a.to(t).float(), b.to(t).float(), **fixed, **kw) for t in (torch.float16, torch.bfloat16))
        eager = half[0], *brief[1:]
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    largest = (a.double().norm(dim=-1).nan_to_num().max() * b.double().norm(dim=-1).nan_to_num().max()).item() / tau
    eps = torch.finfo(torch.float16 if narrow else compute).eps
    rounding = eps * (a.shape[-1] if compute == torch.float64 else 1) * largest
    worst = 0.0
    for g, e, t in zip(got[:3], eager[:3], truth[:3], strict=True):
        own = error([e], [t])
        # Where the truth itself is a rounding residue, relative errors say nothing: there the loss's scale is the measure.
        if t.norm() < 1e-9:
            assert g.double().norm() <= (tolerance(0, compute) + rounding) * a.numel() / tau
            continue
        worst = max(worst, error([g], [t]))
        assert error([g], [t]) <= tolerance(own, g.dtype) + rounding, (negatives, tau, list(kw))
    norms = [math.hypot(x[1].double().norm(), x[2].double().norm()) for x in (truth, eager)]
    rows_error = max(error(eager[1:3], truth[1:3]), error(got[1:3], truth[1:3])) if worst else 0.0
    bound = (2 * rows_error + rounding) * max(norms) * math.hypot(a.double().nan_to_num().norm(), b.double().nan_to_num().norm()) / tau
    # The rows' gradient leaves out what cancels within one anchor; sum |g| bounds that part.
    bound += rounding * upstream.abs().sum() / tau
    assert abs(got[3].double() - truth[3]) <= bound
    return worst
