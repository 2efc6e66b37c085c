"""What the tests and benchmarks of every op share: backends that run here, errors against float64, poisoned memory."""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from pix2rep_kernels import dispatch


def home(backend: str) -> str:
    """Device on which a test runs `backend`: "cuda" for GPU kernels where a GPU is, else "cpu", where they run interpreted or emulated."""
    return "cuda" if backend in ("triton", "cuda") and torch.cuda.is_available() else "cpu"


def backends(op: str, device: str | None = None) -> list[str]:
    """Backends of `op` that run in this process, on `device` or, by default, each on its `home`."""
    return [name for name in dispatch.BACKENDS if dispatch.why_not(op, name, [torch.empty(0, device=device or home(name))]) is None]


def placed(function: Callable) -> Callable:
    """An op for tests that hold CPU tensors: the named backend gets its tensors on its `home`, what it returns comes back."""

    def run(*tensors, backend="auto", **options):
        def there(x):
            return x.to(home(backend)) if isinstance(x, Tensor) else x

        out = function(*map(there, tensors), backend=backend, **{k: there(v) for k, v in options.items()})
        return out.cpu() if isinstance(out, Tensor) else type(out)(*(t.cpu() for t in out)) if hasattr(out, "_fields") else tuple(t.cpu() for t in out)

    return run


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
