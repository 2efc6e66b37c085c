"""Kernels as real calls compile them, without a GPU: the host code runs on CPU tensors, and each launch only specialises and compiles."""

import contextlib

from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from pix2rep_kernels.triton import infonce_problem

SHARED = {80: 166912, 90: 232448}  # bytes that one program may hold


class Chip:
    """What the JIT asks of a driver, of a GPU that is not here."""

    def __init__(self, capability: int):
        self.capability = capability

    def get_current_target(self):
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self):
        return self.capability  # each device has a cache of its own

    def get_current_stream(self, device):
        return 0


@contextlib.contextmanager
def compiling(capability: int):
    """The kernels that the block launches for sm_<capability>, as (name, compiled), each once; none runs, so that outputs are garbage."""
    kernels = {}
    launch = JITFunction.run

    def run(self, *args, grid, warmup, **options):
        kernel = launch(self, *args, grid=grid, warmup=True, **options)
        kernels[id(kernel)] = (self.fn.__name__, kernel)

    infonce_problem.SHARED_H100 = SHARED[capability]  # what the op takes for a tensor that is on no GPU
    driver.set_active(Chip(capability))
    JITFunction.run = run
    try:
        yield kernels.values()
    finally:
        JITFunction.run = launch
        infonce_problem.SHARED_H100 = SHARED[90]
