"""What is measured, described once: an op at a size, its inputs, our call, the peers' calls, and the work that no implementation can do without.

`benchmarks/bench_<op>.py` and `benchmarks/losses.py` offer `cases(large=False, device="cpu")`; `benchmarks.run` measures them, pytest times them.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

GIB = 2**30


@dataclass
class Inputs:
    """Arguments of a call, in lists where it takes lists; every tensor in them that requires a gradient is a leaf.

    `upstream` holds a gradient of each output; None where the output is one scalar.
    """

    arguments: list
    upstream: tuple[Tensor, ...] | None = None


@dataclass(frozen=True)
class Work:
    """Of one pass, counted from the shapes: bytes read and written, FLOP of matrix products, exponentials."""

    bytes: float = 0.0
    flop: float = 0.0
    exps: float = 0.0

    def seconds(self, ceilings: dict, dtype: torch.dtype) -> float:
        """Least time at the measured ceilings. Products and exponentials overlap on a GPU; a CPU's vector units do both (`shared_units`)."""
        names = ("bf16_flop", "fp32_flop") if dtype.itemsize == 2 else ("fp32_flop", "tf32_flop")
        products = self.flop / next(ceilings[name] for name in names if name in ceilings)
        exps = self.exps / ceilings["ex2"]
        return max(self.bytes / ceilings["copy_bytes"], products + exps if ceilings.get("shared_units") else max(products, exps))


@dataclass(frozen=True)
class Peer:
    """`call(*arguments)` returns what the case's `ours` does.

    bytes: memory of a step beyond its inputs, where that is what stops it.
    truth: the eager composition of what it computes, where that is not quite the case's own (its rows normalised, another standard deviation).
    unlike: computes less (a bound, not a peer); timed, never compared.
    slow_start: compiles for seconds; only with --large or by name.
    """

    call: Callable
    bytes: float = 0.0
    truth: Callable | None = None
    unlike: bool = False
    slow_start: bool = False


@dataclass(frozen=True)
class Case:
    """An op at a size.

    op, name: `name` is unique within the op. fields: the sizes, as results hold them.
    make(device, dtype), small(device, dtype): Inputs at the size, and at one where float64 is affordable.
    ours(backend, *arguments). peers: the first is the eager composition whose float64 result is the truth. absent: peers that cannot run here, and why.
    work: of "forward" and of "backward". layout: "last", "first" or "". paper: the size is a paper's own.
    series: sizes of one growth curve carry the same word, and `n` is their place on it. target: what the design asks for.
    """

    op: str
    name: str
    dtype: torch.dtype
    fields: dict
    make: Callable[[str, torch.dtype], Inputs]
    small: Callable[[str, torch.dtype], Inputs]
    ours: Callable
    peers: dict[str, Peer]
    work: dict[str, Work]
    absent: dict[str, str] = field(default_factory=dict)
    layout: str = ""
    paper: bool = False
    series: str = ""
    n: int = 0
    target: str = ""

    def floor_s(self, ceilings: dict, which: str = "both") -> float:
        """Least seconds of "forward", "backward" or "both" at the measured ceilings."""
        passes = self.work if which == "both" else (which,)
        return sum(self.work[name].seconds(ceilings, self.dtype) for name in passes)

    @property
    def eager_bytes(self) -> float:
        """Memory that the eager composition needs beyond its inputs; 0 where it is of their size."""
        return next(iter(self.peers.values())).bytes


def leaves(arguments: list) -> Iterator[Tensor]:
    """Tensors that want a gradient."""
    for value in arguments:
        if isinstance(value, (list, tuple)):
            yield from leaves(value)
        elif isinstance(value, Tensor) and value.requires_grad:
            yield value


def doubled(inputs: Inputs) -> Inputs:
    """The same numbers in float64, new leaves."""

    def one(value):
        if isinstance(value, (list, tuple)):
            return type(value)(map(one, value))
        if isinstance(value, Tensor) and value.is_floating_point():
            return value.detach().double().requires_grad_(value.requires_grad)
        return value

    return Inputs(one(inputs.arguments), one(inputs.upstream))


def step(call: Callable, inputs: Inputs, mark: Callable[[], None] = lambda: None) -> list[Tensor]:
    """Outputs, then the gradient of every leaf. `mark` is called before the forward pass, between the two and after the backward pass."""
    wanted = list(leaves(inputs.arguments))
    mark()
    outputs = call(*inputs.arguments)
    outputs = (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
    mark()
    given = inputs.upstream or (None,) * len(outputs)
    follow = [(t, g) for t, g in zip(outputs, given, strict=True) if t.requires_grad]  # a target's own norm has none
    gradients = torch.autograd.grad([t for t, _ in follow], wanted, [g for _, g in follow])
    mark()
    return [*(t.detach() for t in outputs), *gradients]


def errors(got: list[Tensor], truth: list[Tensor], outputs: int) -> dict[str, float]:
    """Relative error of each output and each gradient against float64."""
    from pix2rep_kernels.testing import error

    names = ["value" if outputs == 1 else f"value {k + 1}" for k in range(outputs)]
    names += [f"gradient {k + 1}" for k in range(len(truth) - outputs)]
    return {name: error([g], [t]) for name, g, t in zip(names, got, truth, strict=True)}


def seeded(device: str, seed: int = 0) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def compiled(call: Callable) -> Callable:
    """`torch.compile(call)` at fixed shapes; its compiler is imported when it is first called."""
    made = functools.cache(lambda: torch.compile(call, dynamic=False))
    return lambda *arguments: made()(*arguments)


def with_compile(peers: dict[str, Peer]) -> dict[str, Peer]:
    """The peers and torch.compile of the first, which keeps what that keeps unless told otherwise."""
    first = next(iter(peers.values()))
    return peers | {"compile": Peer(compiled(first.call), bytes=first.bytes, slow_start=True)}
