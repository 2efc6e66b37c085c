"""What nvcc makes of infonce's CUDA kernels, without a GPU: registers, spills, instructions a pair: `python -m benchmarks.cuda_static`.

Counted is the loop over tiles along the path of an interior tile: a forward branch around code that calls `rarely()` is taken, others are not, and the
loop over further panels of features runs once a panel. Every count is checked against the matrix instructions that the tile's work takes. A
multiprocessor issues 128 lanes and 16 MUFU a clock; an sm_80 multiplies 1024 pairs of 16-bit values by its HMMA, so that
clocks a pair = max(instructions / 128, MUFU / 16, multiply-adds / 1024).
"""

import argparse
import collections
import importlib.util
import json
import os
import re
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
OUT = Path(__file__).parent / "results" / "static" / "cuda_infonce.json"
SOURCES = ("infonce.cu", "infonce_sums.cu", "infonce_products.cu")
ARCHS = ("80", "90a")
MACROS = ("USE_CUDA", "TORCH_STABLE_ONLY", "TORCH_TARGET_VERSION=0x020b000000000000", "PIX2REP_STATIC")
FORMS = ("plain", "shifted", "listed")


class Code(NamedTuple):
    """Machine code of one kernel and what ptxas says of it."""

    instructions: list  # (address, text)
    registers: int
    stack: int


def tool(name: str) -> str:
    """A program of the CUDA toolkit or of triton's wheel."""
    spec = importlib.util.find_spec("triton")
    own = Path(spec.origin).parent / "backends" / "nvidia" / "bin" if spec and spec.origin else ROOT
    return shutil.which(name) or str(own / name)


def compile_source(source: str, arch: str) -> dict[str, Code]:
    """Kernels of one file by mangled name."""
    torch = Path(importlib.util.find_spec("torch").origin).parent
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernels.cubin"
        command = [shutil.which("nvcc"), "-std=c++17", "-O3", "--expt-relaxed-constexpr", "--extended-lambda", "-cubin", "-o", str(cubin)]
        command += [f"-gencode=arch=compute_{arch},code=sm_{arch}", f"-I{torch / 'include'}", *(f"-D{macro}" for macro in MACROS)]
        subprocess.run([*command, str(ROOT / "csrc" / "cuda" / source)], check=True)
        sass, usage = (
            subprocess.run([tool("cuobjdump"), flag, str(cubin)], capture_output=True, text=True, check=True).stdout for flag in ("-sass", "-res-usage")
        )
    found = {}
    for name, registers, stack in re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+)", usage):
        body = re.search(rf"Function : {re.escape(name)}\n(.*?)(?=Function :|\Z)", sass, re.DOTALL)[1]
        instructions = [(int(a, 16), text.strip()) for a, text in re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", body, re.MULTILINE)]
        found[name] = Code(instructions, int(registers), int(stack))
    return found


def opcode(text: str) -> str:
    return re.sub(r"^@!?U?P\w+\s+", "", text).split()[0]


def jump(text: str) -> int | None:
    """Where a branch goes; not those for a warp that has diverged."""
    match = re.search(r"\bBRA (?:!?U?P\w+, )?`?\(?(0x[0-9a-f]+)", text)
    return int(match[1], 16) if match and opcode(text) == "BRA" else None


def interior(code: Code, panels: int) -> collections.Counter:
    """Instructions of one interior tile by opcode."""
    loops = [(jump(text), address) for address, text in code.instructions if (jump(text) or address) < address]

    def count(first, last, name):
        return sum(opcode(text).startswith(name) for address, text in code.instructions if first <= address <= last)

    hot = [loop for loop in loops if count(*loop, "MUFU.EX2") >= 32]
    first, last = min(hot, key=lambda loop: loop[1] - loop[0])
    inner = [(a, b) for a, b in loops if first <= a and b < last and count(a, b, "HMMA") >= 32]
    found, at = collections.Counter(), first
    for address, text in code.instructions:
        if not (first <= address <= last) or address < at:
            continue
        runs = panels - 1 if any(a <= address <= b for a, b in inner) else 1
        found[opcode(text)] += runs
        to = jump(text)
        if not to or not address < to <= last:
            continue
        always = not text.startswith("@") and not re.search(r"BRA !?U?P", text)
        around = count(address + 1, to - 1, "PMTRIG") and count(address + 1, to - 1, "HMMA") <= 20
        if always or around:
            at = to
    return found


def variant(name: str) -> tuple[str, tuple[int, ...]]:
    """Kernel and template arguments of a mangled name."""
    arguments = re.search(r"I((?:L[bi]\d+E)+)E", name)
    kernel = re.match(r"_ZN7pix2rep7infonce(\d+)(\w+)", name)
    return kernel[2][: int(kernel[1])], tuple(int(n) for n in re.findall(r"L[bi](\d+)E", arguments[1])) if arguments else ()


def rows(archs=ARCHS, sources=SOURCES) -> list[dict]:
    """One row a kernel and chip; for the sweeps one a width of rows, with its costs a pair."""
    jobs = [(source, arch) for arch in archs for source in sources]
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        compiled = list(pool.map(lambda job: compile_source(*job), jobs))
    found = []
    for (_, arch), kernels in zip(jobs, compiled, strict=True):
        for mangled, code in kernels.items():
            name, arguments = variant(mangled)
            spills = sum(opcode(text).startswith(("LDL", "STL")) for _, text in code.instructions)
            row = {"kernel": name, "sm": arch, "registers": code.registers, "stack_bytes": code.stack, "spills": spills}
            if name == "sums":
                biased, listed, wide = arguments
                row |= {"form": "listed" if listed else "biased" if biased else "plain", "wide": bool(wide)}
                found += [row | _costs(code, d, d, 32) for d in (64, 128, 256) if not wide] or [row]
            elif name == "products":
                d, form, split, wide = arguments
                row |= {"form": FORMS[form], "wide": bool(wide), "split": bool(split)}
                found.append(row if wide or d < 64 else row | _costs(code, d, 2 * d, 16 if d == 256 or (d == 128 and form == 2) else 32))
            else:
                found.append(row)
    return sorted(found, key=lambda row: (row["kernel"], row["sm"], row.get("d", 0), row.get("form", "")))


def _costs(code: Code, d: int, features: int, warp_rows: int) -> dict:
    """Per pair of a tile of warp_rows x 64 pairs a warp."""
    operations = interior(code, d // 64)
    pairs = warp_rows * 64 / 32
    matrix = sum(n for name, n in operations.items() if name.startswith("HMMA.16816"))
    mufu = sum(n for name, n in operations.items() if name.startswith("MUFU"))
    assert matrix == warp_rows * 64 * features / (16 * 8 * 16), f"{matrix} matrix instructions on the interior path"
    assert mufu == pairs, f"{mufu} exponentials on the interior path"
    instructions = operations.total() / pairs
    clocks = {"issue": instructions / 128, "mufu": 1 / 16, "matrix": features / 1024}
    return {"d": d, "instructions_a_pair": round(instructions, 3), "clocks_a_pair": {name: round(value, 4) for name, value in clocks.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cuda_static", description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=OUT, help="JSON file to write")
    parser.add_argument("--sm", nargs="*", default=list(ARCHS))
    arguments = parser.parse_args()
    found = rows(arguments.sm)
    for row in found:
        costs = row.get("clocks_a_pair", {})
        print(f"sm_{row['sm']:4} {row['kernel']:22} {row.get('form', ''):8} {'wide' if row.get('wide') else row.get('d', ''):>4} {row['registers']:>4} regs"
              f" {row['spills']:>3} spills  {row.get('instructions_a_pair', ''):>6} instr/pair  {costs}")  # fmt: skip
    release = re.search(r"release [^\n]*", subprocess.run([shutil.which("nvcc"), "--version"], capture_output=True, text=True).stdout)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    temporary = arguments.out.with_suffix(".tmp")
    temporary.write_text(json.dumps({"nvcc": release[0] if release else "", "rows": found}, indent=1) + "\n")
    os.replace(temporary, arguments.out)


if __name__ == "__main__":
    main()
