"""What the tests and benchmarks of every op share: backends that run here, errors against float64, poisoned memory."""

import contextlib
import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from pix2rep_kernels import dispatch


def backends(op: str, device: str = "cpu") -> list[str]:
    """Backends of `op` that run on `device` in this process."""
    probe = [torch.empty(0, device=device)]
    return [name for name in dispatch.BACKENDS if dispatch.why_not(op, name, probe) is None]


def error(got: Iterable[Tensor], truth: Iterable[Tensor]) -> float:
    """Largest relative error ||got - truth|| / ||truth|| over pairs of tensors, in float64; the absolute norm where the truth is 0.

    NaN where either holds one, so that no comparison with it passes.
    """
    worst = 0.0
    for g, t in zip(got, truth, strict=True):
        difference = (g.detach().double().cpu() - t.detach().double().cpu()).norm().item()
        scale = t.detach().double().norm().item()
        relative = difference / scale if scale > 0 else difference
        if math.isnan(relative):
            return math.nan  # max() would drop it
        worst = max(worst, relative)
    return worst


def tolerance(same_precision: float, dtype: torch.dtype) -> float:
    """Twice PyTorch's own error at the same precision, plus one rounding of the result's dtype."""
    return 2 * same_precision + torch.finfo(dtype).eps


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Uninitialised memory holds NaN inside, so that an element never written shows; deterministic algorithms are on meanwhile."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]
