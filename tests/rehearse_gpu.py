"""Pretend a GPU: `pytest -p rehearse_gpu` takes the paths that tests and benchmarks take where one is, to find a tensor on the wrong device.

A tensor "on cuda" is a wrapper about one of the CPU that Python sees on cuda and that mixes with CPU tensors as CUDA ones do: not at all, but for single
numbers, copies and indices. Triton and CUDA kernels refuse what is not wrapped and what they refuse anyway; the CPU kernels compute in their place.
"""

import os
import types

os.environ |= {"TRITON_INTERPRET": "1", "PIX2REP_EMULATE": "1"}

import torch
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

aten = torch.ops.aten
MOVES = {aten.copy_.default, aten._to_copy.default}
INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}
CUDA = torch.device("cuda", 0)


class OnGpu(torch.Tensor):
    """To autograd it is a meta tensor, whose gradients run in the calling thread."""

    @staticmethod
    def __new__(cls, held):
        made = torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype, device="meta"
        )  # fmt: skip
        made.held = held
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_meta = property(lambda self: False)
    is_cpu = property(lambda self: False)

    def __repr__(self):
        return f"OnGpu({self.held})"

    @classmethod
    def __torch_dispatch__(cls, function, types_, args=(), kwargs=None):
        return run(function, args, kwargs or {})


def run(function, args, kwargs):
    leaves = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    wrapped = [t for t in leaves if isinstance(t, OnGpu)]
    asked = kwargs.get("device")
    # Autograd, and what makes a tensor like another, name the device that they believe it to be on.
    to_gpu = asked is not None and torch.device(asked).type in (("cuda",) if Named.asks_meta else ("cuda", "meta"))
    if not wrapped and not to_gpu:
        return function(*args, **kwargs)
    if wrapped and function not in MOVES:
        moved = args[:1] if function in INDEXED and isinstance(args[0], OnGpu) else leaves
        values = args[2:] if function in INDEXED else ()
        if any(not isinstance(t, OnGpu) and t.ndim for t in (*moved, *values) if isinstance(t, torch.Tensor)):
            raise RuntimeError(f"Expected all tensors to be on the same device, but found cuda:0 and cpu in {function}")
    if to_gpu:
        kwargs = kwargs | {"device": torch.device("cpu")}
    plain_args, plain = pytree.tree_map_only(OnGpu, lambda t: t.held, (args, kwargs))
    if function.namespace == "pix2rep" and plain_args[-1] != "reference":
        out = stand_in(function, plain_args)
    else:
        out = function(*plain_args, **plain)
    stays = to_gpu if asked is not None else bool(wrapped)
    if function is aten.copy_.default:
        return args[0]
    if not stays:
        return out
    wrapping = pytree.tree_map_only(torch.Tensor, lambda t: t if isinstance(t, OnGpu) else OnGpu(t), out)
    return return_and_correct_aliasing(function, args, kwargs, wrapping) if wrapped else wrapping


class Pretend(TorchDispatchMode):
    def __torch_dispatch__(self, function, types_, args=(), kwargs=None):
        return run(function, args, kwargs or {})


class Named(TorchFunctionMode):
    """The device "cuda" by its index: without one PyTorch asks the driver."""

    asks_meta = False

    def __torch_function__(self, function, types_, args=(), kwargs=None):
        if function is torch.Tensor.cuda:
            function, args = torch.Tensor.to, (args[0], CUDA)
        if function is torch.Tensor.tolist and isinstance(args[0], OnGpu):
            return args[0].held.tolist()

        def one(x):
            return CUDA if isinstance(x, torch.device) and x.type == "cuda" or isinstance(x, str) and x in ("cuda", "cuda:0") else x

        if function is torch.Tensor.to:
            args = tuple(map(one, args))
        kwargs = {k: one(v) if k == "device" else v for k, v in (kwargs or {}).items()}
        if function is torch.tensor and kwargs.get("device") == CUDA:
            return torch.tensor(*args, **kwargs | {"device": "cpu", "requires_grad": False}).to(CUDA).requires_grad_(kwargs.get("requires_grad", False))
        Named.asks_meta = kwargs.get("device") in ("meta", torch.device("meta")) or function is torch.Tensor.to and "meta" in map(str, args[1:])
        return function(*args, **kwargs)


def stand_in(function, arguments):
    from pix2rep_kernels import dispatch

    *rest, backend = arguments
    backend = "triton" if backend == "auto" else backend
    op = function._schema.name.partition("::")[2].removesuffix("_backward")
    tensors = [t for t in rest if torch.is_tensor(t)]
    if reason := "the tensors are on cuda, this backend needs cpu" if backend == "cpu" else dispatch.true_why_not(op, backend, tensors):
        raise RuntimeError(f"backend {backend!r} cannot run {op}: {reason}")
    return function(*rest, "cpu")


class Event:
    def __init__(self, **_):
        pass

    def record(self, *_):
        import time

        self.at = time.perf_counter()

    def synchronize(self):
        pass

    def elapsed_time(self, other):
        return 1e3 * (other.at - self.at)


def install():
    properties = types.SimpleNamespace(name="NVIDIA H200 pretended", multi_processor_count=132, total_memory=141 << 30, major=9, minor=0)
    stubs = {
        "is_available": lambda: True, "_lazy_init": lambda: None, "device_count": lambda: 1, "get_device_name": lambda *_: properties.name,
        "get_device_capability": lambda *_: (9, 0), "get_device_properties": lambda *_: properties, "synchronize": lambda *_: None, "Event": Event,
        "memory_allocated": lambda *_: 0, "max_memory_allocated": lambda *_: 1 << 20, "reset_peak_memory_stats": lambda *_: None,
        "empty_cache": lambda: None, "mem_get_info": lambda *_: (140 << 30, 141 << 30), "current_device": lambda: 0,
    }  # fmt: skip
    for name, stub in stubs.items():
        setattr(torch.cuda, name, stub)
    from pix2rep_kernels import dispatch

    dispatch.true_why_not = inner = dispatch.why_not

    def why_not(op, backend, tensors):
        kinds = {t.device.type for t in tensors if t is not None}
        if backend in ("triton", "cuda") and kinds == {"cpu"}:
            return dispatch.why_unavailable(op, backend) or "the tensors are on cpu, this backend needs cuda"
        if backend == "cpu" and kinds == {"cuda"}:
            return "the tensors are on cuda, this backend needs cpu"
        return inner(op, backend, tensors)

    dispatch.why_not = why_not
    Pretend().__enter__()
    Named().__enter__()


install()
