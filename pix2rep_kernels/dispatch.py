"""Choose a backend for one call on real tensors, and say why another one cannot run.

A named backend that cannot run raises its reason; only "auto" falls back.
"""

import functools
import importlib
import importlib.util
import logging
import os
import sys

import torch
from torch import Tensor

from pix2rep_kernels import native
from pix2rep_kernels.check import expect_choice

log = logging.getLogger("pix2rep_kernels")

OPS = ("warp", "infonce", "crosscorr", "joint", "lncc", "pool", "align", "entropy")
HOMES: dict[str, str] = {}  # op -> package whose folders hold it, filled by `register`
BACKENDS = ("reference", "cpu", "triton", "cuda")
CHOICES = ("auto", *BACKENDS)

# No GPU measurement has ordered the CUDA entries yet.
AUTO_ORDER = {"cpu": ("cpu", "reference"), "cuda": ("triton", "cuda", "reference")}

# (op, backend) that does not exist, and why. Everything else does: `tests/test_names.py` holds it.
_TRITON_SERVES = "the Triton kernel serves CUDA tensors; C++ would have to beat it in a measurement first"
ABSENT = {(op, "cuda"): _TRITON_SERVES for op in ("joint", "lncc", "align", "entropy")}


def interpreted() -> bool:
    """True when Triton kernels run in Triton's interpreter, on the CPU (`TRITON_INTERPRET=1`, set before the first import of triton)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def why_unavailable(op: str, backend: str) -> str | None:
    """Why `backend` cannot serve `op` in this installation, whatever the tensors; None when it can."""
    if (op, backend) in ABSENT:
        return ABSENT[op, backend]
    if backend in native.OBJECTS:
        if reason := native.why_missing(backend):
            return reason
        if not _has_kernel(op, backend):
            return f"{native.OBJECTS[backend]} was built before {op} existed (rebuild: pip install --no-build-isolation .)"
    if backend == "triton":
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed (pip install triton, Linux only)"
        if not (interpreted() or torch.cuda.is_available()):
            return "no CUDA device is visible (TRITON_INTERPRET=1 runs the kernels on the CPU, slowly)"
    return None


def _has_kernel(op: str, backend: str) -> bool:
    """Whether the loaded object of `backend` registered a kernel of `op`; the schema alone comes with _C."""
    key = "CUDA" if backend == "cuda" and not native.emulated() else "CPU"
    ops = native.namespace(backend)
    return hasattr(ops, op) and torch._C._dispatch_has_kernel_for_dispatch_key(f"{ops.name}::{op}", key)


def why_not(op: str, backend: str, tensors: list[Tensor | None]) -> str | None:
    """Why `backend` cannot run `op` on these tensors, as a sentence; None when it can.

    Args:
        op: one of `OPS`.
        backend: one of `BACKENDS`.
        tensors: the tensor arguments of the op or of its backward, in the order of the schema; None stands for one that is absent.

    Raises:
        ValueError: op or backend is unknown, or every tensor is None.
    """
    expect_choice(op, "op", tuple(HOMES))
    expect_choice(backend, "backend", BACKENDS)
    if all(t is None for t in tensors):
        raise ValueError("`tensors` must hold a tensor, got none")
    if reason := why_unavailable(op, backend):
        return reason
    present = [t for t in tensors if t is not None]
    kind = present[0].device.type
    if backend == "cpu" and kind != "cpu":
        return f"the tensors are on {kind}, this backend needs cpu"
    if backend == "cuda" and kind != "cuda" and not native.emulated():
        return f"the tensors are on {kind}, this backend needs cuda"
    if backend == "triton" and kind == "cpu" and not interpreted():
        return "the tensors are on cpu, this backend needs cuda (or TRITON_INTERPRET=1)"
    return _hub(op).why_not(backend, tensors)


def _hub(op: str):
    name = f"{HOMES[op]}.ops.{op}"
    return sys.modules.get(name) or importlib.import_module(name)


def why_slower(op: str, backend: str, tensors: list[Tensor | None]) -> str | None:
    """Why a later backend is faster on these tensors, if the hub says so by a function `why_slower(backend, tensors)`; asked for "auto" alone."""
    hook = getattr(_hub(op), "why_slower", None)
    return hook(backend, tensors) if hook else None


def choose(op: str, backend: str, tensors: list[Tensor | None]) -> str:
    """The backend that runs this call.

    Raises:
        ValueError: `backend` is none of `CHOICES`.
        RuntimeError: the named backend cannot run; the message is `why_not`'s sentence.
    """
    expect_choice(backend, "backend", CHOICES)
    if backend == "auto":
        backend = os.environ.get("PIX2REP_BACKEND", "auto")
        expect_choice(backend, "PIX2REP_BACKEND", CHOICES)
    if backend != "auto":
        if reason := why_not(op, backend, tensors):
            raise RuntimeError(f"backend {backend!r} cannot run {op}: {reason}")
        return backend
    kind = next(t for t in tensors if t is not None).device.type
    skipped = {}
    for candidate in AUTO_ORDER.get(kind, ("reference",)):
        reason = why_not(op, candidate, tensors) or (why_slower(op, candidate, tensors) if candidate != "reference" else None)
        if reason is None:
            if candidate == "reference" and kind == "cuda":
                _warn_slow(op, skipped["triton"])
            return candidate
        skipped[candidate] = reason
        log.debug("%s: %s skipped: %s", op, candidate, reason)
    raise RuntimeError(f"no backend can run {op} on {kind}")


@functools.cache
def _warn_slow(op: str, reason: str) -> None:
    log.warning("%s runs on the slow reference backend, which stores every pair: %s", op, reason)


@functools.cache
def implementation(op: str, backend: str, deterministic: bool = False):
    """`(forward, backward)` of an op: the same two names in every backend, with the schema's arguments less `backend`.

    A compiled op whose fast backward adds in any order brings `<op>_backward_ordered` too, taken where determinism is asked for; Triton asks itself.
    """
    if backend in native.OBJECTS:
        namespace = native.namespace(backend)
        ordered = f"{op}_backward_ordered"
        backward = ordered if deterministic and hasattr(namespace, ordered) and _has_kernel(ordered, backend) else f"{op}_backward"
        return getattr(namespace, op).default, getattr(namespace, backward).default
    module = importlib.import_module(f"{HOMES[op]}.{backend}.{op}")
    return module.forward, module.backward
