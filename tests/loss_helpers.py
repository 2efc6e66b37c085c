"""What the losses' tests share: random maps, value and gradients against a formula written out, and what holds for every loss."""

import contextlib
import pickle

import torch
from torch import Tensor, nn

from pix2rep_kernels.testing import error
from sweep import FULL

SPACE = {2: (9, 7), 3: (4, 5, 6)}


def variable(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype).requires_grad_()


def affine(batch: int, dims: int, spread: float = 0.2) -> Tensor:
    return 0.8 * torch.eye(dims, dims + 1, dtype=torch.float64) + spread * torch.randn(batch, dims, dims + 1, dtype=torch.float64)


def gradients(value: Tensor, inputs) -> list[Tensor]:
    """Gradients of `value`, zeros where it does not depend on an input."""
    found = torch.autograd.grad(value, inputs, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(found, inputs, strict=True)]


def assert_same(got: Tensor, want: Tensor, inputs, bound: float = 1e-10) -> None:
    """Value and every gradient agree to `bound`, relative."""
    assert got.shape == () and got.dtype == want.dtype
    assert error([got], [want]) < bound
    assert error(gradients(got, inputs), gradients(want, inputs)) < bound


def slope(function, inputs, directions, step: float = 1e-5) -> float:
    """Central difference of `function` along `directions`."""
    with torch.no_grad():
        ahead, behind = (function(*(x + s * step * d for x, d in zip(inputs, directions, strict=True))) for s in (1, -1))
    return float(ahead - behind) / (2 * step)


def assert_house(loss: nn.Module, *arguments, **extra) -> None:
    """No state, a pickle of itself, the same bits again and under autocast."""
    assert not loss.state_dict() and not list(loss.parameters())
    copy = pickle.loads(pickle.dumps(loss))
    assert repr(copy) == repr(loss)

    def run():
        torch.manual_seed(11)
        value = copy(*arguments, **extra)
        inputs = [t for x in arguments for t in (x if isinstance(x, list) else [x]) if isinstance(t, Tensor) and t.requires_grad]
        return [value, *gradients(value, inputs)]

    first = run()
    assert all(map(torch.equal, run(), first))
    with torch.autocast("cpu", torch.bfloat16):
        assert all(map(torch.equal, run(), first))


@contextlib.contextmanager
def fresh_compiler():
    """torch.compile counts the graphs of a function over a whole process, whichever test made them."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def graphs(loss: nn.Module, problems) -> int:
    """Graphs that torch.compile(fullgraph=True, dynamic=True) makes to serve all `problems`, each (arguments, extra)."""
    with fresh_compiler():
        counter = torch._dynamo.testing.CompileCounter()
        compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=counter)
        for arguments, extra in problems:
            compiled(*arguments, **extra)
        return counter.frame_count


def assert_compiles(loss: nn.Module, inputs, *arguments, **extra) -> None:
    """In one graph, forward and backward: the same value and gradients. `make test-full` generates code too (about 10 s a graph)."""
    found = []
    with fresh_compiler():
        for call in (loss, torch.compile(loss, fullgraph=True, backend="inductor" if FULL else "aot_eager")):
            torch.manual_seed(5)
            value = call(*arguments, **extra)
            found.append([value, *gradients(value, inputs)])
    assert error(found[1], found[0]) < 1e-5
