"""Compile every Triton kernel without a GPU and read from the machine code: registers, spills, shared memory, matrix instructions.

`python -m benchmarks.static [op ...]` prints a table and writes benchmarks/results/static/<op>.json. A "*" marks a call of one-off shapes, which no
training has; a "!" marks more shared memory than the chip has. Kernels are those that the calls of `benchmarks/calls_<op>.py` launch, compiled as the
JIT would; for infonce follows what a pair costs (`benchmarks/static_pairs.py`).
"""

import argparse
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

if os.environ.pop("TRITON_INTERPRET", None):
    sys.stderr.write("benchmarks.static compiles: TRITON_INTERPRET is ignored\n")

import torch

from benchmarks import static_pairs
from benchmarks.compiled import call_rows, calls_of, facts
from benchmarks.harness import write_json
from pix2rep_kernels.dispatch import OPS

HERE = Path(__file__).parent
HEADER = "       call                                     kernel                            warps regs spills  shared  bits   instr  matrix instructions"


def show(row: dict) -> str:
    matrix = " ".join(f"{count} {name}" for name, count in row["matrix"].items())
    call = ("* " if row["one_off"] else "  ") + row["call"]
    return (
        f"sm_{row['sm']}{call:42.42} {row['kernel']:33} {row['num_warps']:>5} {row['registers']:>4} {row['spills']:>6} {row['shared_bytes']:>7}"
        f"{' ' if row['fits'] else '!'} {row['widest_load_bits']:>4} {row['instructions']:>7}  {matrix}"
    )


def jobs(op: str, chips: list[int], sample: bool) -> list[tuple]:
    """Functions and arguments, each of which gives rows. A sample takes the first calls only, except on the last chip."""
    wanted = []
    names = list(calls_of(op).CALLS)
    for chip in chips:
        wanted += [(call_rows, op, name, chip) for name in (names[:3] if sample and chip != chips[-1] else names)]
    if op == "infonce":
        chips = chips[-1:] if sample else chips
        wanted += [(static_pairs.measure, index, sample, chip) for index in range(len(static_pairs.variants(sample))) for chip in chips]
    return wanted


def run(job: tuple):
    torch.set_num_threads(1)
    return job[0](*job[1:])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.static", description=__doc__.partition("\n")[0])
    parser.add_argument("ops", nargs="*", help="every op that has a calls file, when none is named")
    parser.add_argument("--sm", type=int, nargs="*", default=[80, 90])
    parser.add_argument("--sample", action="store_true", help="on all but the last chip the first calls only; of the pairs those that the gate names")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=HERE / "results" / "static", help="folder of the JSON files")
    arguments = parser.parse_args()
    ops = arguments.ops or [op for op in OPS if (HERE / f"calls_{op}.py").exists()]
    # Forked before anything compiles: no process imports torch and triton again.
    with ProcessPoolExecutor(arguments.processes, multiprocessing.get_context("fork")) as pool:
        for op in ops:
            calls, pairs = [], []
            print(f"{op}\n{HEADER}", flush=True)
            for rows in pool.map(run, jobs(op, arguments.sm, arguments.sample)):
                if isinstance(rows, dict):
                    if not pairs:
                        print(static_pairs.HEADER)
                    pairs.append(rows)
                    print(static_pairs.show(rows), flush=True)
                else:
                    calls += rows
                    print("\n".join(map(show, rows)), flush=True)
            of_pairs = {"limit_clocks_a_pair": static_pairs.CLOCKS, "rows": pairs} if pairs else {}
            write_json(arguments.out / f"{op}.json", {**facts(), **of_pairs, "calls": calls})


if __name__ == "__main__":
    main()
