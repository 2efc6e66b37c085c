"""Load the compiled objects `_C` (schemas and CPU kernels) and `_C_cuda`, once, and remember why one is missing."""

import functools
import importlib
import importlib.util
import json
from pathlib import Path

OBJECTS = {"cpu": "_C", "cuda": "_C_cuda"}
_CURE = {
    "cpu": "reinstall with a C++17 compiler and PIX2REP_BUILD=auto",
    "cuda": "reinstall with nvcc on PATH or CUDA_HOME set, and PIX2REP_BUILD=auto",
}


@functools.cache
def why_missing(backend: str) -> str | None:
    """None when the object of `backend` ("cpu" or "cuda") is loaded, else the reason and its cure."""
    if backend == "cuda" and (reason := why_missing("cpu")):
        return reason  # the schemas live in _C
    name = f"pix2rep_kernels.{OBJECTS[backend]}"
    if importlib.util.find_spec(name) is None:
        return f"{OBJECTS[backend]} was not built ({_CURE[backend]})"
    try:
        importlib.import_module(name)
    except (ImportError, OSError) as error:
        return f"{OBJECTS[backend]} does not load: {error}"
    return None


def build_facts() -> dict:
    """What `setup.py` wrote beside the objects: versions, compilers, flags; empty when nothing was built."""
    path = Path(__file__).with_name("_build.json")
    return json.loads(path.read_text()) if path.exists() else {}
