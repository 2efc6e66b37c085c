"""infonce at sizes whose float64 truth nobody can hold: some anchors' losses, and some rows' gradients, exactly, from all rows and all losses."""

import torch

from pix2rep_kernels import infonce

ANCHORS = 64


def spot_errors(case, backend: str, inputs: list) -> dict[str, float]:
    """Relative errors of the losses of some anchors and of the gradients of some rows of a, of the mean loss.

    A gradient needs the log-sum-exp of every anchor, float64 that of a few: the others are taken from the losses, which are checked beside.
    """
    a, b = inputs
    n, negatives, tau = len(a), case.fields["negatives"], case.fields["temperature"]
    a.grad = b.grad = None
    losses = infonce(a, b, temperature=tau, negatives=negatives, backend=backend)
    losses.mean().backward()
    chosen = torch.linspace(0, n - 1, min(ANCHORS, n), device=a.device).long().unique()
    with torch.no_grad():
        positive = torch.cat([(x[i : i + 65536].double() * y[i : i + 65536].double()).sum(1) for x, y in ((a, b), (b, a)) for i in range(0, n, 65536)]) / tau
        lse = losses.double() + positive
        true_losses, true_grads = zip(*(_anchor(a, b, int(i), lse, positive, negatives, tau) for i in chosen), strict=True)
        got, want = losses[chosen].double(), torch.stack(true_losses)
        grads, true = a.grad[chosen].double(), torch.stack(true_grads) / (2 * n)
        return {
            "spot_error_value": ((got - want).norm() / want.norm()).item(),
            "spot_error_gradient": ((grads - true).norm() / true.norm()).item(),
        }


def _anchor(a, b, i, lse, positive, negatives, tau):
    """Loss of anchor a_i, and sum_k dloss_k / da_i, in float64."""
    n, row = len(a), a[i].double()
    candidates = [(b, 0)] if negatives == "cross" else [(a, 0), (b, n)]  # whose rows, and where their own anchors begin in `lse`
    found, grad = [], torch.zeros_like(row)
    for rows, first in candidates:
        offset = n if negatives == "cross" else first
        for start in range(0, n, 65536):
            part = rows[start : start + 65536].double()
            s = part @ row / tau
            if negatives == "joint" and rows is a and start <= i < start + len(part):
                s[i - start] = -torch.inf
            found.append(s)
            weights = (s - lse[i]).exp() + (s - lse[offset + start : offset + start + len(part)]).exp()
            grad += weights @ part
    loss = torch.cat(found).logsumexp(0) - positive[i]
    return loss, (grad - 2 * b[i].double()) / tau
