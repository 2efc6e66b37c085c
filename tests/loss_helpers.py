"""What the losses' tests share: random maps, value and gradients against a formula written out, what holds for every loss, and BIM's formula."""

import contextlib
import pickle
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pix2rep_kernels import dispatch
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
    """No state, a pickle of itself, the same bits again and under autocast, and every op on the backend that was named."""
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
    copy.backend = "reference"
    with mock.patch.object(dispatch, "choose", wraps=dispatch.choose) as choose:
        run()
    assert {call.args[1] for call in choose.call_args_list} == {"reference"}


def kept_mib(value_of, *inputs: Tensor) -> float:
    """MiB that autograd keeps from the forward pass `value_of()` until the backward pass, `inputs` themselves not counted."""
    known, kept = {x.untyped_storage().data_ptr() for x in inputs}, {}

    def note(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        value = value_of()
    assert value.requires_grad
    return sum(size for place, size in kept.items() if place not in known) / 2**20


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


def bim(a, b, image, *, alpha=0.5, lamda=1.0, w_rr=1.0, w_cc=1.0, power=0.75, boundary_on="both", wrap=True, window=5, frozen=None, **information):
    """The official loss of one head of BIM, w_rr RR + w_cc CC. `frozen`: target and ranges as constants."""
    total = w_rr * redundancy(a, b, alpha, lamda, frozen=frozen, **information)
    image = image.to(a.dtype)
    if image.shape[2:] != a.shape[2:]:
        image = F.interpolate(image, size=a.shape[2:], mode="bilinear" if a.ndim == 4 else "trilinear", align_corners=False)
    edges = scaled(gradient_magnitude(image, wrap)) ** power
    maps = {"both": (a, b), "first": (a,), "second": (b,)}[boundary_on]
    terms = [correlation(scaled(entropy(x), None if frozen is None else frozen["ranges"][x.shape]), edges, window) for x in maps]
    return total + w_cc * sum(terms) / len(terms)


def redundancy(a, b, alpha, lamda, radius=0, collapsed=True, symmetric=True, detach_target=False, detach_normalizer=False, eps=1e-5, clamp=False, frozen=None):
    """RR. The joint of every displacement at once by a convolution of the class maps, as in IIC's code."""
    k = a.shape[1]
    p, q = (t.softmax(1).transpose(0, 1) for t in (a, b))  # [K, B, *S]: classes are the batch, images the channels
    joint = (F.conv2d if a.ndim == 4 else F.conv3d)(p, q, padding=radius).flatten(2)  # [K, K, displacements]
    joints = [joint.sum(2)] if collapsed else list(joint.unbind(2))
    values = []
    for joint in joints:
        normaliser = joint.sum()
        joint = joint / (normaliser.detach() if detach_normalizer else normaliser)
        joint = (joint + joint.T) / 2 if symmetric else joint
        rows, columns = joint.sum(1), joint.sum(0)
        added = 0 if clamp else eps
        if clamp:
            joint, rows, columns = (torch.where(t < eps, eps, t) for t in (joint, rows, columns))
        value = 0
        for i in range(k):
            for j in range(k):
                target = alpha / k * (i == j) + (1 - alpha) * joint[i, j]
                if detach_target:
                    target = target.detach()
                if frozen is not None:
                    target = frozen["target"][i, j]
                value = value - target * (joint[i, j] + added).log()
                value = value + lamda * joint[i, j] * ((rows[i] + added).log() + (columns[j] + added).log())
        values.append(value)
    return sum(values) / len(values)


def entropy(x):
    c = x.softmax(1)
    return -(c * (c + 1e-16).log()).sum(1, keepdim=True)


def gradient_magnitude(image, wrap=True):
    squares = 0
    for axis in range(2, image.ndim):
        difference = image - image.roll(1, axis)
        if not wrap:
            difference.select(axis, 0).zero_()
        squares = squares + difference**2
    return squares.sqrt().mean(1, keepdim=True)


def scaled(x, ranges=None):
    found = []
    for n, one in enumerate(x):
        low, high = (one.min().detach(), one.max().detach()) if ranges is None else ranges[n]
        found.append((one - low) / (high - low + 1e-6))
    return torch.stack(found)


def correlation(i, j, window=5):
    dims = i.ndim - 2
    kernel, n = i.new_ones(1, 1, *[window] * dims), window**dims

    def box(t):
        return (F.conv2d if dims == 2 else F.conv3d)(t, kernel, padding=window // 2)

    def at_least(t):
        return torch.maximum(t, torch.full_like(t, 1e-5))

    s_i, s_j = box(i), box(j)
    cross = at_least(box(i * j) - s_i * s_j / n)
    return -(cross**2 / (at_least(box(i * i) - s_i**2 / n) * at_least(box(j * j) - s_j**2 / n))).mean()


def bim_problem(k=4, dims=2, batch=2, channels=2, dtype=torch.float64):
    a, b = (variable(batch, k, *SPACE[dims], dtype=dtype) for _ in range(2))
    return a, b, torch.rand(batch, channels, *SPACE[dims], dtype=dtype)
