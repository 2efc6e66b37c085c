"""Load the compiled objects `_C` (schemas and CPU kernels) and `_C_cuda`, once, and remember why one is missing.

With PIX2REP_EMULATE=1 the backend "cuda" is `_C_emulated`, the CUDA sources compiled for the CPU (PIX2REP_BUILD=emulate), slow and for tests.
"""

import functools
import importlib
import importlib.util
import json
import os
from pathlib import Path

import torch

OBJECTS = {"cpu": "_C", "cuda": "_C_cuda"}
_KEPT = []  # a library that nobody holds is gone
_CURE = {
    "cpu": "reinstall with a C++17 compiler and PIX2REP_BUILD=auto",
    "cuda": "reinstall with nvcc on PATH or CUDA_HOME set, and PIX2REP_BUILD=auto",
}


def emulated() -> bool:
    """True when the CUDA kernels run emulated, on the CPU."""
    return os.environ.get("PIX2REP_EMULATE") == "1"


def namespace(backend: str):
    """Where the ops of a compiled backend are: `torch.ops.<namespace>`."""
    return torch.ops.pix2rep_emulated if backend == "cuda" and emulated() else torch.ops.pix2rep_native


@functools.cache
def why_missing(backend: str) -> str | None:
    """None when the object of `backend` ("cpu" or "cuda") is loaded, else the reason and its cure."""
    if backend == "cuda" and (reason := why_missing("cpu")):
        return reason  # the schemas live in _C
    instead = backend == "cuda" and emulated()
    name = "_C_emulated" if instead else OBJECTS[backend]
    if importlib.util.find_spec(f"pix2rep_kernels.{name}") is None:
        return f"{name} was not built ({'build with PIX2REP_BUILD=emulate' if instead else _CURE[backend]})"
    try:
        if instead:
            _define_emulated()
        importlib.import_module(f"pix2rep_kernels.{name}")
    except (ImportError, OSError) as error:
        return f"{name} does not load: {error}"
    return None


def _define_emulated() -> None:
    """The schemas of `_C` once more, in a namespace of their own: both objects serve CPU tensors."""
    from pix2rep_kernels.dispatch import OPS

    library = torch.library.Library("pix2rep_emulated", "DEF")
    for op in OPS:
        for name in (op, f"{op}_backward"):
            if hasattr(torch.ops.pix2rep_native, name):
                library.define(str(getattr(torch.ops.pix2rep_native, name).default._schema).partition("::")[2])
    _KEPT.append(library)


def build_facts() -> dict:
    """What `setup.py` wrote beside the objects: versions, compilers, flags; empty when nothing was built."""
    path = Path(__file__).with_name("_build.json")
    return json.loads(path.read_text()) if path.exists() else {}
