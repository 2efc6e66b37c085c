"""What nvcc makes of the kernels of csrc/cuda, without a GPU: `python -m benchmarks.cuda_static [op ...]`.

Prints and writes to benchmarks/results/static/cuda_<op>.json a row for each kernel that is instantiated and each chip: registers, stack, spills, shared
memory, threads and blocks of a multiprocessor, and counts of instructions; for infonce also what a pair of rows costs. Read are the cubins of the built
`_C_cuda` where it is newer than its sources. Shared memory is what the kernel declares: what a launch adds depends on the problem.
"""

import argparse
import re
import shutil
from collections import Counter
from pathlib import Path

import torch

from benchmarks import cuda_static_pairs
from benchmarks.cuda_static_code import ARCHS, OPS, Code, jump, kernels, opcode, output
from benchmarks.harness import commit, write_json

OUT = Path(__file__).parent / "results" / "static"
REGISTERS, THREADS, BLOCKS = 65536, 2048, 32  # of a multiprocessor, on both chips
WIDTHS = ("128", "64", "32", "16", "8")
COUNTED = {"hmma": "HMMA", "mufu": "MUFU", "ldmatrix": "LDSM", "copy_async": "LDGSTS", "shuffle": "SHFL", "barrier": "BAR", "call": "CALL"}


def width(name: str) -> int:
    """Bits that an instruction moves."""
    if value := re.search(r"\.[BF]?F(\d+)(?:x(\d))?\b", name):  # of an addition: F32, or F32x4
        return int(value[1]) * int(value[2] or 1)
    return int(next((part for part in re.sub(r"\.[US](8|16)\b", r".\1", name).split(".") if part in WIDTHS), "32"))


def registers(text: str) -> set[int]:
    return {int(n) + i for n, pair in re.findall(r"\bR(\d+)(\.64)?", text) for i in range(2 if pair else 1)}


def in_flight(code: Code, bits: int) -> int:
    """Most loads of at least `bits` from global memory that are under way before the first is used, along the straight line of the code."""
    pending, most = [], 0
    for _, text in code.instructions:
        name, used = opcode(text), registers(text)
        pending = [to for to in pending if not to & used]
        if name in ("EXIT", "RET") or (jump(text) is not None and not text.startswith("@") and not re.search(r"BRA !?U?P", text)):
            pending = []
        if name.startswith("LDG.") and width(name) >= bits:
            first = int(re.search(r"\bR(\d+)", text)[1])
            pending.append(set(range(first, first + max(1, width(name) // 32))))
            most = max(most, len(pending))
    return most


def row_of(code: Code, arch: str) -> dict:
    names = Counter(opcode(text) for _, text in code.instructions)
    moved = {kind: Counter() for kind in ("load", "store", "reduce")}
    for name, count in names.items():
        kind = {"LDG": "load", "STG": "store", "RED": "reduce", "REDG": "reduce", "ATOM": "reduce", "ATOMG": "reduce"}.get(name.partition(".")[0])
        if kind:
            moved[kind][width(name)] += count
    by_registers = REGISTERS // (-(-code.registers // 8) * 8 * code.threads) if code.threads else None
    return {
        "kernel": code.name, "sm": arch, "instructions": len(code.instructions), "registers": code.registers, "stack_bytes": code.stack,
        "spills": sum(count for name, count in names.items() if name.startswith(("LDL", "STL"))), "shared_bytes": code.shared,
        "threads": code.threads, "blocks": by_registers and min(by_registers, THREADS // code.threads, BLOCKS),
        "in_flight": in_flight(code, 8), "widest_in_flight": in_flight(code, max(moved["load"], default=32)),
        **{kind: {str(bits): count for bits, count in sorted(widths.items(), reverse=True)} for kind, widths in moved.items()},
        **{key: sum(count for name, count in names.items() if name.startswith(prefix)) for key, prefix in COUNTED.items()},
    }  # fmt: skip


def rows(archs=ARCHS, ops=OPS) -> dict[str, list[dict]]:
    """One row a kernel and chip, by op."""
    found = {op: [] for op in ops}
    for (op, arch), codes in kernels(archs, ops).items():
        found[op] += [row_of(code, arch) for code in codes]
    return {op: sorted(table, key=lambda row: (row["kernel"], row["sm"])) for op, table in found.items()}


def show(row: dict) -> str:
    moved = " ".join(f"{kind} " + "+".join(f"{n}x{bits}" for bits, n in row[kind].items()) for kind in ("load", "store", "reduce") if row[kind])
    return (
        f"sm_{row['sm']:4}{row['kernel']:46.46} {row['registers']:>4} {row['stack_bytes']:>5} {row['spills']:>6} {row['shared_bytes']:>6} "
        f"{row['threads'] or '':>7} {row['blocks'] or '':>6} {row['widest_in_flight']:>6} {row['hmma']:>5}  {moved}"
    )


def show_pair(row: dict) -> str:
    return f"sm_{row['sm']:4}{row['kernel']:10} {row['form']:8} D={row['d']:<4} {row['instructions_a_pair']:>6} instructions  clocks {row['clocks_a_pair']}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cuda_static", description=__doc__.partition("\n")[0])
    parser.add_argument("ops", nargs="*", help="every op that has CUDA kernels, when none is named")
    parser.add_argument("--sm", nargs="*", default=list(ARCHS))
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the JSON files")
    arguments = parser.parse_args()
    release = re.search(r"release [^\n]*", output(shutil.which("nvcc"), "--version")) if shutil.which("nvcc") else None
    facts = {"nvcc": release[0] if release else "", "torch": torch.__version__, **commit("csrc/cuda", "csrc/common", "setup.py")}
    for op, table in rows(arguments.sm, arguments.ops or OPS).items():
        print(f"{op}\n       {'kernel':46} regs stack spills shared threads blocks flying  hmma  instructions x bits")
        print("\n".join(map(show, table)), flush=True)
        pairs = {"pairs": cuda_static_pairs.rows(arguments.sm)} if op == "infonce" else {}
        print("".join(show_pair(row) + "\n" for row in pairs.get("pairs", [])), end="")
        write_json(arguments.out / f"cuda_{op}.json", {**facts, "rows": table, **pairs})


if __name__ == "__main__":
    main()
