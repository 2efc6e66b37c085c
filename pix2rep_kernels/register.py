"""Register one op with torch.library: schema, body that picks a backend, fake, autograd, and a backward that is an op of its own."""

from collections.abc import Callable

import torch

from pix2rep_kernels import dispatch

LIBRARY = torch.library.Library("pix2rep", "DEF")


def register(
    schema: str,
    backward_schema: str,
    *,
    fake: Callable,
    backward_fake: Callable,
    setup_context: Callable,
    backward: Callable,
    settle: Callable | None = None,
    home: str = "pix2rep_kernels",
) -> None:
    """Define `pix2rep::<op>` and `pix2rep::<op>_backward`.

    Both schemas end in `str backend`; a backend's `forward` and `backward` take the other arguments in the same order.
    `setup_context` and `backward` are autograd's, as `torch.library.register_autograd` takes them. `settle` takes the list of inputs,
    and may fill in at run time what a graph cannot hold, such as a global setting. `home` is the package whose folders `ops`, `reference`, … hold the op.
    """
    op = schema.partition("(")[0]
    dispatch.HOMES[op] = home
    for text, which, fake_of in ((schema, 0, fake), (backward_schema, 1, backward_fake)):
        name = text.partition("(")[0]
        LIBRARY.define(text, tags=(torch.Tag.pt2_compliant_tag,))
        LIBRARY.impl(name, _body(op, which, settle), "CompositeExplicitAutograd")
        torch.library.register_fake(f"pix2rep::{name}", fake_of, lib=LIBRARY)
    torch.library.register_autograd(f"pix2rep::{op}", backward, setup_context=setup_context, lib=LIBRARY)
    torch.library.register_autograd(f"pix2rep::{op}_backward", _refuse(op), lib=LIBRARY)


def _body(op: str, which: int, settle: Callable | None) -> Callable:
    def body(*arguments):
        *inputs, backend = arguments
        tensors = [x for x in inputs if x is None or isinstance(x, torch.Tensor)]
        chosen = dispatch.choose(op, backend, tensors)
        kind = next(t for t in tensors if t is not None).device.type
        if settle is not None:
            settle(inputs)
        with torch.autocast(kind, enabled=False):  # an op states its own precision
            return dispatch.implementation(op, chosen, torch.are_deterministic_algorithms_enabled())[which](*inputs)

    return body


def _refuse(op: str) -> Callable:
    def refuse(ctx, *grads):
        raise RuntimeError(f"{op} has no second derivative: call backward without create_graph=True")

    return refuse
