"""Compile an op's Triton kernels as its calls launch them, without a GPU, and read from the machine code what ptxas made of them.

`benchmarks/calls_<op>.py` holds

    CALLS    name -> keyword arguments of `call`
    call     runs the host functions of the op, forward and backward, on CPU tensors
    MATRIX   kernel -> names of the calls whose products are large: HGMMA on sm_90, HMMA on sm_80
    WIDE     kernel -> names of the calls whose rows are aligned: read 16 bytes at a time
    ONE_OFF  names of the calls whose shapes only try what the JIT does with sizes of 1 and the like; left out: those with "one of everything" in them

MATRIX is needed where kernels multiply matrices, WIDE may be left out.
"""

import collections
import importlib
import re
import subprocess
import tempfile
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
import triton

from benchmarks.harness import commit
from benchmarks.jit_calls import SHARED, compiling

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Code(NamedTuple):
    """SASS of one kernel and what ptxas says of it."""

    instructions: list[tuple[int, str]]  # address, text
    registers: int
    stack: int
    shared: int


def disassemble(compiled) -> Code:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        sass, usage = (
            subprocess.run([TOOLS / "cuobjdump", flag, file.name], capture_output=True, text=True, check=True).stdout for flag in ("-sass", "-res-usage")
        )
    found = dict(re.findall(r"(REG|STACK):(\d+)", usage))
    instructions = [(int(a, 16), text) for a, text in re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", sass, re.MULTILINE)]
    return Code(instructions, int(found["REG"]), int(found["STACK"]), compiled.metadata.shared)


def opcode(text: str) -> str:
    return re.sub(r"^@!?U?P\w+\s+", "", text).split()[0]


def is_spill(name: str) -> bool:
    return name.startswith(("LDL", "STL"))


def is_matrix(name: str) -> bool:
    return name.startswith(("HGMMA", "HMMA", "QGMMA", "IGMMA", "IMMA", "DMMA"))


def calls_of(op: str) -> ModuleType:
    return importlib.import_module(f"benchmarks.calls_{op}")


def call_rows(op: str, name: str, chip: int) -> list[dict]:
    """One row for each kernel that a call launches on sm_<chip>."""
    calls = calls_of(op)
    one_off = getattr(calls, "ONE_OFF", {call for call in calls.CALLS if "one of everything" in call})
    with compiling(chip) as kernels:
        calls.call(**calls.CALLS[name])
    rows = []
    for kernel, compiled in kernels:
        code = disassemble(compiled)
        names = collections.Counter(opcode(text) for _, text in code.instructions)
        loads = [int(match[1]) for load in names if (match := re.match(r"LDG(?:STS)?\.E\.(?:\w+\.)*?(64|128)\b", load))]
        rows.append({
            "op": op, "kernel": kernel, "call": name, "sm": chip, "one_off": name in one_off,
            "num_warps": compiled.metadata.num_warps, "registers": code.registers, "stack_bytes": code.stack,
            "spills": sum(count for load, count in names.items() if is_spill(load)), "shared_bytes": code.shared, "fits": code.shared <= SHARED[chip],
            "widest_load_bits": max(loads, default=32), "instructions": names.total(),
            "matrix": {load: count for load, count in sorted(names.items()) if is_matrix(load)},
        })  # fmt: skip
    return rows


def facts() -> dict:
    """Versions and the commit that the numbers belong to."""
    ptxas = subprocess.run([TOOLS / "ptxas", "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release [^\n]*", ptxas)
    versions = {"torch": torch.__version__, "triton": triton.__version__, "ptxas": release[0] if release else ""}
    return versions | commit("pix2rep_kernels/triton", "benchmarks/*.py")
