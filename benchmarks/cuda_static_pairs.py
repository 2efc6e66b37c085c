"""What a pair of rows costs infonce's CUDA sweeps: instructions, exponentials and matrix products a pair, from machine code with marks.

Counted is the loop over tiles along the path of an interior tile: a forward branch around code that calls `rarely()` is taken, others are not, and the
loop over further panels of features runs once a panel. Every count is checked against the matrix instructions that the tile's work takes. A
multiprocessor issues 128 lanes and 16 MUFU a clock; an sm_80 multiplies 1024 pairs of 16-bit values by its HMMA, so that
clocks a pair = max(instructions / 128, MUFU / 16, multiply-adds / 1024).
"""

import collections
import os
import re
from concurrent.futures import ThreadPoolExecutor

from benchmarks.cuda_static_code import ARCHS, Code, compiled, jump, opcode, take_apart

SOURCES = ("infonce_sums.cu", "infonce_products.cu")
FORMS = ("plain", "shifted", "listed")


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


def rows(archs=ARCHS) -> list[dict]:
    """One row for each kernel that sweeps, width of rows and chip."""
    jobs = [(source, arch) for arch in archs for source in SOURCES]
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        cubins = list(pool.map(lambda job: compiled(*job, "PIX2REP_STATIC"), jobs))
    found = []
    for (_, arch), cubin in zip(jobs, cubins, strict=True):
        for code in take_apart(cubin):
            name, _, listed = code.name.partition("<")
            arguments = [int(value) if value.isdigit() else value == "true" for value in listed.rstrip(">").split(", ")]
            row = {"kernel": name, "sm": arch}
            if name == "sums":
                biased, listed, wide = arguments
                row |= {"form": "listed" if listed else "biased" if biased else "plain"}
                found += [row | _costs(code, d, d, 32) for d in (64, 128, 256) if not wide]
            elif name == "products":
                d, form, _, wide = arguments
                row |= {"form": FORMS[form]}
                found += [row | _costs(code, d, 2 * d, 16 if d == 256 or (d == 128 and form == 2) else 32)] if d >= 64 and not wide else []
    return sorted(found, key=lambda row: (row["kernel"], row["sm"], row["d"], row["form"]))


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
