"""InfoNCE in plain PyTorch, line for line (infonce.1-7). Stores the whole similarity matrix: the truth, not the way to run."""

import torch
from torch import Tensor


def forward(
    a, b, temperature, temperature_floor, negatives, positive, valid_a, valid_b, ids_a, ids_b, queue, precision
) -> tuple[Tensor, Tensor]:
    """losses and lse, both [G, anchors]; lse is inf for an anchor that is none."""
    problem = _Problem(a, b, temperature, temperature_floor, negatives, positive, valid_a, valid_b, ids_a, ids_b, queue)
    r = torch.where(problem.negative, problem.s, -torch.inf).logsumexp(-1)  # (infonce.2)
    losses = torch.logaddexp(r - problem.s_positive, torch.zeros_like(r))  # (infonce.3)
    losses = torch.where(problem.active, losses, 0)
    lse = torch.where(problem.active, problem.s_positive + losses, torch.inf)  # (infonce.4)
    return losses, lse


def backward(
    grad_losses, losses, lse, a, b, temperature, temperature_floor, negatives, positive, valid_a, valid_b, ids_a, ids_b, queue, precision,
    need_a, need_b, need_temperature,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of a, b and temperature; one that is not needed has shape [0]."""
    problem = _Problem(a, b, temperature, temperature_floor, negatives, positive, valid_a, valid_b, ids_a, ids_b, queue)
    g = torch.where(problem.active, grad_losses, 0)
    p = torch.where(problem.negative, (problem.s - lse.unsqueeze(-1)).exp(), 0)
    p = p.scatter(-1, problem.positive.unsqueeze(-1), torch.expm1(-losses).unsqueeze(-1))
    weights = torch.where(problem.active.unsqueeze(-1), g.unsqueeze(-1) * p, 0)  # (infonce.5)
    grad_x = weights @ problem.y / problem.tau  # (infonce.6)
    grad_y = weights.transpose(-1, -2) @ problem.x / problem.tau
    n, m = a.shape[1], b.shape[1]
    if negatives == "forward":
        grad_a, grad_b = grad_x, grad_y[:, :m]
    else:
        grad_a, grad_b = grad_x[:, :n] + grad_y[:, :n], grad_x[:, n:] + grad_y[:, n : 2 * n]
    s = torch.where(weights != 0, problem.s, 0)
    grad_tau = -(weights * s).sum() / problem.tau  # (infonce.7)
    grad_temperature = torch.where(temperature < temperature_floor, 0, grad_tau)
    return (
        _rows(grad_a, problem.valid_a, a.dtype) if need_a else a.new_empty(0),
        _rows(grad_b, problem.valid_b, b.dtype) if need_b else b.new_empty(0),
        grad_temperature.to(temperature.dtype) if need_temperature else temperature.new_empty(0),
    )


def _rows(grad: Tensor, valid: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.where(valid.unsqueeze(-1), grad, 0).to(dtype)


class _Problem:
    """Anchors x [G, A, D], candidates y [G, C, D] and who contrasts with whom, for the three kinds of negatives."""

    def __init__(self, a, b, temperature, floor, negatives, positive, valid_a, valid_b, ids_a, ids_b, queue):
        dtype = torch.float64 if torch.float64 in (a.dtype, b.dtype) else torch.float32
        groups, n, m = a.shape[0], a.shape[1], b.shape[1]
        self.tau = temperature.to(dtype).clamp(min=floor)
        valid_a = a.new_ones(groups, n, dtype=torch.bool) if valid_a is None else valid_a
        valid_b = b.new_ones(groups, m, dtype=torch.bool) if valid_b is None else valid_b
        self.valid_a, self.valid_b = valid_a, valid_b
        # An invalid row may hold NaN: zero it before any product.
        rows_a = torch.where(valid_a.unsqueeze(-1), a.to(dtype), 0)
        rows_b = torch.where(valid_b.unsqueeze(-1), b.to(dtype), 0)
        positive = torch.arange(n, device=a.device).expand(groups, n) if positive is None else positive
        _check_positive(positive, m, permutation=negatives != "forward")
        active_a = valid_a & valid_b.gather(1, positive)
        if negatives == "forward":
            self.x, self.y, self.positive, self.active = rows_a, rows_b, positive, active_a
            valid_y, ids_x, ids_y = valid_b, ids_a, ids_b
            allowed = torch.ones(n, m, dtype=torch.bool, device=a.device)
        else:
            inverse = positive.argsort(-1)
            self.x = self.y = torch.cat([rows_a, rows_b], 1)
            self.positive = torch.cat([positive + n, inverse], 1)
            self.active = torch.cat([active_a, valid_b & valid_a.gather(1, inverse)], 1)
            valid_y = torch.cat([valid_a, valid_b], 1)
            ids_x = ids_y = None if ids_a is None else torch.cat([ids_a, ids_b], 1)
            side = torch.arange(2 * n, device=a.device) >= n
            allowed = side.unsqueeze(1) != side if negatives == "cross" else ~torch.eye(2 * n, dtype=torch.bool, device=a.device)
        negative = allowed & valid_y.unsqueeze(1) & self.active.unsqueeze(2)
        if ids_x is not None:
            negative = negative & (ids_x.unsqueeze(2) != ids_y.unsqueeze(1))
        negative = negative.scatter(-1, self.positive.unsqueeze(-1), False)
        if queue is not None:
            self.y = torch.cat([self.y, queue.to(dtype).expand(groups, *queue.shape)], 1)
            negative = torch.cat([negative, self.active.unsqueeze(2).expand(-1, -1, len(queue))], 2)
        self.negative = negative
        self.s = self.x @ self.y.transpose(-1, -2) / self.tau  # (infonce.1)
        self.s_positive = self.s.gather(-1, self.positive.unsqueeze(-1)).squeeze(-1)


def _check_positive(positive: Tensor, m: int, permutation: bool) -> None:
    if positive.numel() == 0 or positive.device.type != "cpu":
        return
    if int(positive.min()) < 0 or int(positive.max()) >= m:
        raise ValueError(f"`positive` must be in [0, {m}), got values from {int(positive.min())} to {int(positive.max())}")
    if permutation and not torch.equal(positive.sort(-1).values, torch.arange(m).expand_as(positive)):
        raise ValueError("`positive` must be a permutation of each group with negatives 'joint' or 'cross', got a repeated index")
