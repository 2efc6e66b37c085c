"""Compile an op's Triton kernels as its calls launch them, without a GPU, and say what ptxas made of them: `python -m benchmarks.compiled warp`.

`benchmarks/calls_<op>.py` holds the calls. One JSON object a line: kernel, call, chip, registers, bytes of stack (spills) and of shared memory, widest
load in bits, matrix instructions.
"""

import argparse
import collections
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

if os.environ.pop("TRITON_INTERPRET", None):
    sys.stderr.write("benchmarks.compiled compiles: TRITON_INTERPRET is ignored\n")

import triton

from benchmarks.jit_calls import compiling

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def usage(cubin: bytes) -> dict:
    """Registers, stack, shared memory, widest load and matrix instructions of one kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        resources, sass = (
            subprocess.run([CUOBJDUMP, option, file.name], capture_output=True, text=True, check=True).stdout for option in ("-res-usage", "-sass")
        )
    found = {"registers": r"REG:(\d+)", "stack": r"STACK:(\d+)"}
    widths = [int(bits) for bits in re.findall(r"LDG\.E\.(?:[A-Z]+\.)*(64|128)", sass)]
    matrix = collections.Counter(re.findall(r"\b(H?G?MMA\.[\w.]+|HGMMA\.[\w.]+|HMMA\.[\w.]+)", sass))
    return {name: int(re.search(pattern, resources)[1]) for name, pattern in found.items()} | {
        "widest": max(widths, default=32),
        "matrix": dict(sorted(matrix.items())),
    }


def rows(op: str, chips=(80, 90)):
    """One row a kernel that a call launches, for each chip."""
    calls = importlib.import_module(f"benchmarks.calls_{op}")
    for name, options in calls.CALLS.items():
        for chip in chips:
            with compiling(chip) as kernels:
                calls.call(**options)
            for kernel, compiled in kernels:
                row = {"op": op, "kernel": kernel, "call": name, "sm": chip, "warps": compiled.metadata.num_warps}
                yield row | usage(compiled.asm["cubin"]) | {"shared": compiled.metadata.shared}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compiled", description=__doc__.partition("\n")[0])
    parser.add_argument("op")
    parser.add_argument("--sm", type=int, nargs="*", default=[80, 90])
    arguments = parser.parse_args()
    for row in rows(arguments.op, arguments.sm):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
