"""Bad calls of the compiled ops are refused before any memory is read: by `_C`, by `_C_cuda` (on any machine, with CPU tensors) and by its emulation.

The calls run in a process of their own; one that crashes it is one failed test.
"""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import zeros

ROOT = Path(__file__).parents[1]
OBJECTS = ("_C", "_C_cuda", "_C_emulated")

INT = torch.int64
HUGE = zeros(1).expand(2**20, 3, 4, 5)
WIDE = zeros(1).expand(1, 1, 2**16, 2**16)  # 2^32 pixels

OPTIONS = {"grid": zeros(2, 2, 3), "size": [3, 4], "points": torch.tensor([0, 5]), "mode": "linear", "align_corners": False, "padding_mode": "zeros",
           "normalize": True}  # fmt: skip
WARP_BACKWARD = {"grad_rows": zeros(2, 3), "rows": zeros(2, 3), "norms": zeros(2)} | OPTIONS | {"shape": [2, 3, 4, 5], "channels_last": False}
ROWS = {"a": zeros(2, 4, 3), "b": zeros(2, 4, 3), "temperature": torch.tensor([0.1]), "temperature_floor": 0.1, "negatives": "joint",
        "positive": torch.arange(4).expand(2, 4), "valid_a": zeros(2, 4, dtype=torch.bool), "valid_b": zeros(2, 4, dtype=torch.bool),
        "ids_a": zeros(2, 4, dtype=INT), "ids_b": zeros(2, 4, dtype=INT), "queue": zeros(5, 3), "precision": None}  # fmt: skip
MOMENTS = {"x": zeros(6, 3), "y": zeros(6, 2), "weight": zeros(6)}

# Arguments that every object takes, in the order of the schema.
GOOD = {
    "warp": {"features": zeros(2, 3, 4, 5)} | OPTIONS,
    "warp_backward": WARP_BACKWARD,
    "warp_backward_ordered": WARP_BACKWARD,
    "pool": {"features": zeros(2, 3, 4, 5), "labels": zeros(2, 4, 5, dtype=INT), "regions": 4},
    "pool_backward": {"grad_means": zeros(2, 4, 3), "counts": zeros(2, 4, dtype=INT), "labels": zeros(2, 4, 5, dtype=INT), "like": zeros(0),
                      "shape": [2, 3, 4, 5], "channels_last": False},
    "infonce": ROWS,
    "infonce_backward": {"grad_losses": zeros(2, 8), "losses": zeros(2, 8), "lse": zeros(2, 8)} | ROWS
                        | {"need_a": True, "need_b": True, "need_temperature": True},
    "crosscorr": MOMENTS,
    "crosscorr_backward": {"grad_sum_x": zeros(3), "grad_sum_y": zeros(2), "grad_square_x": zeros(3), "grad_square_y": zeros(2),
                           "grad_product": zeros(3, 2)} | MOMENTS | {"pivot_x": zeros(3), "pivot_y": zeros(2), "need_x": True, "need_y": True},
}  # fmt: skip
FIRST = {"warp_backward": "rows", "warp_backward_ordered": "rows", "pool_backward": "like", "infonce_backward": "a", "crosscorr_backward": "x"}


def wrong(*names):
    """Those arguments with fewer entries, of another dtype, and with another number of axes."""
    return [(name, change) for name in names for change in ({name: "short"}, {name: "half"}, {name: "flat"})]


# (argument that the message names, arguments that differ from GOOD)
GRID = [
    ("grid", {"grid": zeros(2, 3, 3)}), ("grid", {"grid": zeros(1, 2, 3)}), ("grid", {"grid": zeros(2, 3, 5, 2)}), ("grid", {"grid": zeros(2)}),
    ("grid", {"grid": torch.tensor(0.0)}), ("grid", {"grid": zeros(2, 2, 3, dtype=torch.half)}), ("grid", {"grid": zeros(2, 2, 3, dtype=INT)}),
    ("size", {"size": [3]}), ("size", {"size": [3, -1]}), ("size", {"size": [3, 2**24 + 1]}), ("mode", {"mode": "cubic"}),
    ("padding_mode", {"padding_mode": "reflection"}), ("points", {"points": torch.zeros(1, 2, dtype=INT)}),
    ("points", {"points": torch.zeros(2, dtype=torch.int32)}), ("points", {"points": torch.zeros(2)}), ("points", {"size": [0, 4]}),
]  # fmt: skip
WARP_SAVED = [
    *GRID, *wrong("grad_rows", "norms"), ("rows", {"rows": "short"}), ("rows", {"rows": "flat"}), ("rows", {"rows": zeros(2, 3, dtype=INT)}),
    ("norms", {"norms": zeros(0)}), ("norms", {"norms": zeros(2, dtype=torch.double)}),
    ("features", {"shape": [2, 3]}), ("features", {"shape": [2, 3, 0, 5]}), ("rows", {"shape": [2, 4, 4, 5]} | {"grad_rows": zeros(2, 4)}),
    ("features", {"shape": [2, 3, 2**16, 2**16]}), ("mode", {"mode": "bicubic", "shape": [2, 3, 4, 5, 6], "size": [1, 3, 4], "grid": zeros(2, 3, 4)}),
    ("size", {"shape": [2**20, 3, 4, 5], "size": [2**24, 2**24], "grid": zeros(1).expand(2**20, 2, 3)}),
]  # fmt: skip
VECTORS = ("positive", "valid_a", "valid_b", "ids_a", "ids_b")
INFONCE = [
    *wrong(*VECTORS), ("a", {"a": zeros(4, 3)}), ("a", {"a": zeros(2, 4, 3, dtype=INT)}), ("b", {"b": zeros(2, 4, 2)}), ("b", {"b": zeros(1, 4, 3)}),
    ("b", {"b": zeros(4, 3)}), ("b", {"b": zeros(2, 5, 3)}), ("b", {"b": zeros(2, 4, 3, dtype=torch.bool)}), ("negatives", {"negatives": "all"}),
    ("a", {"a": zeros(1).expand(1, 2**30, 3), "b": zeros(1).expand(1, 2**30, 3)}), ("temperature", {"temperature": zeros(2)}),
    ("temperature", {"temperature": zeros(1, dtype=INT)}), ("ids_b", {"ids_b": None}), ("queue", {"queue": zeros(5, 2)}), ("queue", {"queue": zeros(3)}),
    ("queue", {"queue": zeros(5, 3, dtype=INT)}), ("queue", {"queue": zeros(1).expand(2**31, 3)}), ("precision", {"precision": "fp8"}),
    ("positive", {"negatives": "forward", "positive": None, "b": zeros(2, 3, 3), "valid_b": None, "ids_a": None, "ids_b": None}),
]  # fmt: skip
CROSSCORR = [
    ("x", {"x": zeros(6)}), ("x", {"x": zeros(6, 3, dtype=INT)}), ("y", {"y": zeros(5, 2)}), ("y", {"y": torch.tensor(0.0)}),
    ("y", {"y": zeros(6, 2, dtype=torch.bool)}), *wrong("weight"),
]  # fmt: skip
BAD = {
    "warp": [
        *GRID, ("features", {"features": zeros(2, 3, 4)}), ("features", {"features": zeros(2, 3, 4, 0)}), ("features", {"features": zeros(3)}),
        ("features", {"features": zeros(2, 3, 4, 5, dtype=INT)}), ("features", {"features": zeros(1).expand(1, 1, 2**24 + 1, 1), "grid": zeros(1, 2, 3)}),
        ("features", {"features": WIDE, "grid": zeros(1, 2, 3)}), ("size", {"features": HUGE, "size": [2**24, 2**24], "grid": zeros(1).expand(2**20, 2, 3)}),
        ("points", {"features": zeros(0, 3, 4, 5), "grid": zeros(0, 2, 3)}),
    ],
    "warp_backward": WARP_SAVED,
    "warp_backward_ordered": WARP_SAVED,
    "pool": [
        ("features", {"features": zeros(2, 3)}), ("features", {"features": zeros(2, 3, 4, 5, dtype=INT)}), ("regions", {"regions": -1}),
        ("regions", {"regions": 2**62}), *wrong("labels"), ("labels", {"labels": zeros(2, 5, 4, dtype=INT)}), ("labels", {"labels": zeros(2, 4, 5)}),
        ("labels", {"labels": zeros(2, 4, 5, dtype=torch.bool)}), ("labels", {"labels": torch.tensor(0)}),
    ],
    "pool_backward": [
        *wrong("grad_means", "counts", "labels"), ("grad_means", {"grad_means": zeros(2, 4, 2)}), ("grad_means", {"grad_means": zeros(2, 3, 3)}),
        ("shape", {"shape": [2, 3]}), ("counts", {"shape": [3, 3, 4, 5]}), ("labels", {"shape": [2, 3, 4, 6]}), ("like", {"like": zeros(0, dtype=INT)}),
    ],
    "infonce": INFONCE,
    "infonce_backward": [*INFONCE, *wrong("grad_losses", "losses", "lse"), ("lse", {"lse": zeros(2, 8, dtype=torch.double)})],
    "crosscorr": CROSSCORR,
    "crosscorr_backward": [
        *CROSSCORR, *wrong("grad_sum_x", "grad_sum_y", "grad_square_x", "grad_square_y", "grad_product", "pivot_x", "pivot_y"),
        ("grad_product", {"grad_product": zeros(2, 3)}),
    ],
}  # fmt: skip
DOUBLE = torch.double
CUDA_ALONE = {
    "warp": [("features", {"features": zeros(2, 3, 4, 5, dtype=DOUBLE)})],
    "warp_backward": [("rows", {k: zeros(2, 3, dtype=DOUBLE) for k in ("rows", "grad_rows")} | {"norms": zeros(2, dtype=DOUBLE)})],
    "pool": [("features", {"features": zeros(2, 3, 4, 5, dtype=DOUBLE)})],
    "pool_backward": [("like", {"like": zeros(0, dtype=DOUBLE), "grad_means": zeros(2, 4, 3, dtype=DOUBLE)})],
    "infonce": [(name, {name: GOOD["infonce"][name].double()}) for name in ("a", "b", "temperature", "queue")]
    + [("a", {"a": zeros(1).expand(2, 4, 2**20 + 1), "b": zeros(1).expand(2, 4, 2**20 + 1), "queue": None})],
}  # fmt: skip


FORMS = {
    "short": lambda t: t[: int(t.shape[0] > 1)],
    "half": lambda t: t.to(torch.half),
    "flat": lambda t: t.flatten()[:1].reshape([1] * (t.dim() + 1)),
    "meta": lambda t: t.to("meta"),
}


def changed(op, changes):
    """The arguments of a call; a change is a value, or one of FORMS of the good one."""
    good = GOOD[op]
    return list((good | {k: FORMS[v](good[k]) if isinstance(v, str) and v in FORMS else v for k, v in changes.items()}).values())


def kernel(name, op):
    """The op of an object as a function, or None where the object has no such kernel."""
    namespace, key = ("pix2rep_emulated", "CPU") if name == "_C_emulated" else ("pix2rep_native", "CUDA" if name == "_C_cuda" else "CPU")
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"{namespace}::{op}", key):
        return None
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))
    return functools.partial(getattr(getattr(torch.ops, namespace), op).default.redispatch, keys)


def cases():
    """(object, op, argument that the message names or None for a good call, changes)"""
    out = []
    for op, good in GOOD.items():
        for name in OBJECTS:
            out.append((name, op, FIRST.get(op, next(iter(good))) if name == "_C_cuda" else None, {}))
            out += [(name, op, *bad) for bad in BAD[op] + (CUDA_ALONE.get(op, []) if name != "_C" else [])]
        # Only one kind of device is sure to be there; tensors of the kind "meta" stand for those on another.
        out += [("_C_emulated", op, k, {k: "meta"}) for k, v in good.items() if isinstance(v, torch.Tensor)]
    return out


CASES = cases()
NAMES = [f"{name}-{op}-{argument}-{k}" for k, (name, op, argument, _) in enumerate(CASES)]


def report(start):
    """Run the calls from `start` on and print what each raised, a line each."""
    from pix2rep_kernels import native

    missing = {"_C": native.why_missing("cpu"), "_C_cuda": native.why_missing("cuda")}
    os.environ["PIX2REP_EMULATE"] = "1"
    native.why_missing.cache_clear()
    missing["_C_emulated"] = native.why_missing("cuda")
    for at, (name, op, _, changes) in list(enumerate(CASES))[start:]:
        print(json.dumps({"at": at}), flush=True)
        raised = ""
        if reason := missing[name] or (None if kernel(name, op) else f"{name} has no {op}"):
            print(json.dumps({"skip": reason}), flush=True)
            continue
        try:
            kernel(name, op)(*changed(op, changes))
        except RuntimeError as error:
            raised = str(error).split("\n")[0]
        print(json.dumps({"raised": raised}), flush=True)


@pytest.fixture(scope="module")
def results():
    environment = {k: v for k, v in os.environ.items() if k != "PIX2REP_EMULATE"} | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    found, start = {}, 0
    while start < len(CASES):
        code = f"import test_native_arguments as t; t.report({start})"
        run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
        lines = [json.loads(line) for line in run.stdout.splitlines()]
        assert lines, run.stderr
        for line in lines:
            start = line.get("at", start)
            found[start] = {"crashed": f"exit code {run.returncode}: {run.stderr[-500:]}"} if "at" in line else line
        start += 1
    return found


@pytest.mark.parametrize("at", range(len(CASES)), ids=NAMES)
def test_a_bad_call_is_refused_and_names_the_argument(results, at):
    argument, result = CASES[at][2], results[at]
    if "skip" in result:
        pytest.skip(result["skip"])
    assert "crashed" not in result, result["crashed"]
    if argument is None:
        assert result["raised"] == ""
    else:
        assert f"`{argument}` must " in result["raised"], result["raised"]
        assert ", got " in result["raised"], result["raised"]


def test_every_op_in_cuda_has_bad_calls():
    sources = "".join(path.read_text() for path in (ROOT / "csrc" / "cuda").glob("*.cu"))
    for line in sources.splitlines():
        if line.strip().startswith("m.impl("):
            assert line.split('"')[1] in BAD, line
