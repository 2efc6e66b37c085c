"""What one pair costs infonce's Triton kernels: instructions and MUFU along the hot loop's path, counted in the machine code.

`python -m benchmarks.static infonce` prints it after the calls; its gate is what `tests/test_static.py` asserts.

Counted is the innermost loop with the most exponentials, along its interior path: a forward branch inside the loop that jumps over neither
a matrix instruction nor an exponential goes around code that masks single pairs, and interior tiles take the jump. The pairs of one trip
are the work of its matrix instructions (their shape is in the opcode) over the features that the kernel multiplies, so that unrolling
counts by itself; without matrix instructions they are one tile. Where the features are a loop inside, its instructions count once a chunk.
A multiprocessor issues 128 lanes and 16 MUFU a clock, so that clocks a pair = max(instructions / 128, MUFU / 16).
"""

import collections
import re
from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.compiled import SHARED, Code, disassemble, is_matrix, is_spill, opcode
from pix2rep_kernels.triton import infonce_backward, infonce_blocks, infonce_forward, infonce_rows
from pix2rep_kernels.triton.infonce_blocks import format_of
from pix2rep_kernels.triton.infonce_rows import ONLINE, PLAIN, SHIFTED
from pix2rep_kernels.triton.tiles import DIAGONAL, JOINT, NOTHING, OWN_POSITIVE, STREAM_POSITIVE

CLOCKS = 0.0625  # a pair, on every interior path that the gate names
HEADER = "       kernel                   features own x stream   regs spills  shared  instr/p mufu/p clocks/p  matrix instructions"

TYPES = {"floor": "fp32", "headroom": "fp32", "too_small": "fp32", "halved": "fp32", "flushed_ptr": "*i1", "valid_ptr": "*i1"}
INT64 = {"positive_ptr", "index_ptr", "first_ptr"}
INT32 = {"own_ids_ptr", "stream_ids_ptr"}
OPERANDS = {"own_ptr", "stream_ptr", "partner_ptr", "scaled_ptr"}
PLAIN_OPERANDS = {"stream_plain_ptr", "plain_ptr"}
ALIGNED = {"own_padded", "stream_padded", "padded", "partner_padded"}


class Variant(NamedTuple):
    """One kernel as one call would compile it."""

    name: str
    kernel: object
    format: object
    constants: dict
    blocks: object  # shared memory -> options
    gate: bool = False
    features: int = 0  # multiplied a pair, 0: no pairs


def variants(gate: bool) -> list[Variant]:
    """What the op would launch, from its own block functions."""
    found = []
    for d in (64, 128):
        for name, left_out in (("cross", DIAGONAL), ("joint", JOINT)):
            found += [_sums(f"sums {name}", d, left_out, gate=True), _products(f"products {name}", d, left_out, gate=True)]
    if gate:
        return found
    for d in (16, 32, 256, 512):
        found += [_sums("sums cross", d, DIAGONAL), _sums("sums joint", d, JOINT), _products("products joint", d, JOINT)]
    for d in (64, 128, 256):
        found += [_sums("sums joint shifted", d, JOINT, SHIFT=True), _products("products joint shifted", d, JOINT, REGIME=SHIFTED)]
        found += [_sums("sums joint masks", d, JOINT, VALID=True), _sums("sums joint masks ids", d, JOINT, VALID=True, IDS=True)]
        found += [_sums("sums forward masks ids", d, OWN_POSITIVE, STREAM_SUMS=False, VALID=True, IDS=True)]
        found += [_sums("sums forward positive", d, OWN_POSITIVE, STREAM_SUMS=False), _sums("sums queue", d, NOTHING, STREAM_SUMS=False)]
        found += [_products("products joint ids", d, JOINT, IDS=True), _products("products queue", d, NOTHING, STREAM_ANCHORS=False)]
        found += [_products("products forward a", d, OWN_POSITIVE, STREAM_ANCHORS=False)]
        found += [_products("products forward b", d, STREAM_POSITIVE, OWN_ANCHORS=False)]
        found += [_rare("edges", d), _rare("online", d), _products("products joint online", d, JOINT, REGIME=ONLINE)]
    for precision in ("tf32x3", "ieee"):
        for d in (64, 256):
            found += [_sums(f"sums joint {precision}", d, JOINT, precision=precision)]
            found += [_products(f"products joint {precision}", d, JOINT, precision=precision), _rare("edges", d, precision)]
    return found + [_rows(kernel, d) for d in (64, 256) for kernel in ("prepare", "losses", "weights", "gradients")]


def _sums(name: str, d: int, left_out, *, gate: bool = False, precision: str = "fp16", **changes) -> Variant:
    form = format_of(d, {torch.float16}, precision)
    constants = {
        "D": form.d, "CHUNK": form.chunk, "LEFT_OUT": left_out.value, "TRIANGLE": left_out is JOINT, "STREAM_SUMS": True, "VALID": False,
        "IDS": False, "SHIFT": False, "PRECISION": form.precision,
    }  # fmt: skip
    masked = changes.get("VALID", False) or changes.get("IDS", False) or left_out in (OWN_POSITIVE, NOTHING)

    def blocks(shared):
        return infonce_blocks.sum_blocks(form, masked, shared).options

    return Variant(name, infonce_forward.sums, form, constants | changes, blocks, gate, form.d)


def _products(name: str, d: int, left_out, *, gate: bool = False, precision: str = "fp16", **changes) -> Variant:
    form = format_of(d, {torch.float16}, precision)
    regime = changes.pop("REGIME", PLAIN)
    constants = {
        "D": form.d, "CHUNK": form.chunk, "SLICE": form.slice, "LEFT_OUT": left_out.value, "OWN_ANCHORS": True, "STREAM_ANCHORS": True,
        "IDS": False, "SHARED": not form.half, "REGIME": regime.value, "GUARDED": regime is not PLAIN, "PRECISION": form.precision,
    }  # fmt: skip

    def blocks(shared):
        return infonce_blocks.product_blocks(form, shared).options

    return Variant(name, infonce_backward.products, form, constants | changes, blocks, gate, form.d + form.slice)


def _rare(name: str, d: int, precision: str = "fp16") -> Variant:
    form = format_of(d, {torch.float16}, precision)
    own = {"edges": {"BLOCK": infonce_blocks.sum_blocks(form, True).own, "SHIFT": True}, "online": {"RESCUE": True}}[name]
    constants = {
        "D": form.d, "CHUNK": form.chunk, "LEFT_OUT": JOINT.value, "VALID": True, "IDS": True, "PRECISION": form.precision,
    }  # fmt: skip

    def blocks(shared):
        return infonce_blocks.row_blocks(form, shared).options

    return Variant(f"{name} joint masks ids", getattr(infonce_forward, name), form, constants | own, blocks, features=form.d)


def _rows(name: str, d: int) -> Variant:
    form = format_of(d, {torch.float16}, "fp16")
    constants = {
        "prepare": {"INDEX": True, "VALID": True, "COPY": True},
        "losses": {"INDEX": True, "POSITIVE": False, "QUEUE": True, "REGIME": SHIFTED.value},
        "weights": {"BLOCK": 128, "INDEX": True, "SHIFT": True},
        "gradients": {
            "OWN_ANCHORS": True, "STREAM_ANCHORS": True, "INDEX": True, "PARTNERS": "same", "QUEUE": True, "DOTS": True, "UNSCALE": False,
        },
    }[name]  # fmt: skip
    sizes = {} if name == "weights" else form.sizes
    kernel = getattr(infonce_backward if name == "gradients" else infonce_rows, name)
    return Variant(name, kernel, form, sizes | constants, lambda shared: {})


def compile_variant(variant: Variant, blocks: dict, arch: int) -> Code:
    """Compile for sm_<arch>. Pointers and padded sizes are multiples of 16, as they are at run time."""
    constants = variant.constants | {name: value for name, value in blocks.items() if name.isupper()}
    options = {name: value for name, value in blocks.items() if not name.isupper()}
    signature, attributes, values = {}, {}, {}
    for position, name in enumerate(variant.kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            values[(position,)] = constants[name]
            continue
        signature[name] = _type(name, variant.format.half)
        if name.endswith("_ptr") or name in ALIGNED:
            attributes[(position,)] = [["tt.divisibility", 16]]
    compiled = triton.compile(ASTSource(variant.kernel, signature, values, attributes), target=GPUTarget("cuda", arch, 32), options=options)
    return disassemble(compiled)


def _type(name: str, half: bool) -> str:
    if name in TYPES:
        return TYPES[name]
    if name in OPERANDS:
        return "*fp16" if half else "*fp32"
    if name in PLAIN_OPERANDS:
        return "*bf16" if half else "*fp32"
    if name.endswith("_ptr"):
        return "*i64" if name in INT64 else "*i32" if name in INT32 else "*fp32"
    return "i32"


def matrix_work(text: str) -> int:
    """Multiply-adds of one matrix instruction: of a warpgroup for HGMMA, of a warp for HMMA."""
    name = opcode(text)
    if match := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", name):
        return int(match[1]) * int(match[2]) * int(match[3])
    if match := re.match(r"HMMA\.(\d+)\.", name):
        return {"16816": 16 * 8 * 16, "1688": 16 * 8 * 8, "1684": 16 * 8 * 4}[match[1]]
    return 0


def target(text: str) -> int | None:
    """Where a branch goes."""
    match = re.search(r"BRA\b.*?(0x[0-9a-f]+)", text)
    return int(match[1], 16) if match else None


def interior(code: Code, chunks: int) -> list[tuple[str, int]]:
    """Instructions of the hot loop along the path of interior tiles, each with its runs a trip; [] when no loop has an exponential."""
    loops = [(target(text), address) for address, text in code.instructions if (target(text) or address) < address]

    def costly(first, last):
        texts = [text for address, text in code.instructions if first <= address <= last]
        return sum(opcode(t) == "MUFU.EX2" for t in texts), sum(bool(matrix_work(t)) for t in texts)

    hot = [loop for loop in loops if costly(*loop)[0]]
    if not hot:
        return []
    innermost = [(a, b) for a, b in hot if not any((c, d) != (a, b) and a <= c and d <= b for c, d in hot)]
    first, last = max(innermost, key=lambda loop: costly(*loop))
    inner = [(a, b) for a, b in loops if first <= a and b <= last and (a, b) != (first, last)]
    skipped = []
    for address, text in code.instructions:
        to = target(text)
        if first <= address < last and to and address < to <= last and costly(address + 1, to - 1) == (0, 0):
            skipped.append((address, to))
    return [
        (text, chunks if any(a <= address <= b for a, b in inner) else 1)
        for address, text in code.instructions
        if first <= address <= last and not any(a < address < b for a, b in skipped)
    ]


def measure(index: int, gate: bool, arch: int) -> dict:
    """One row of the table, of `variants(gate)[index]`."""
    variant = variants(gate)[index]
    blocks = variant.blocks(SHARED[arch])
    code = compile_variant(variant, blocks, arch)
    warps = blocks.get("num_warps", 4)
    row = {
        "kernel": variant.name, "sm": arch, "d": variant.format.d, **blocks, "registers": code.registers, "stack_bytes": code.stack,
        "spills": sum(is_spill(opcode(text)) for _, text in code.instructions), "shared_bytes": code.shared,
        "fits": code.shared <= SHARED[arch], "gate": variant.gate,
    }  # fmt: skip
    body = interior(code, variant.format.d // variant.format.chunk) if variant.features else []
    if not body:
        return row
    operations = collections.Counter()
    for text, runs in body:
        operations[opcode(text)] += runs
    lanes = 32 * warps
    tile = blocks["OWN"] * blocks["STREAM"]
    work = sum(matrix_work(text) * runs for text, runs in body) * (warps // 4 if any("HGMMA" in name for name in operations) else warps)
    passes = 3 if variant.format.precision == "tf32x3" else 1
    trips = round(work / (tile * variant.features * passes)) if work else 1
    pairs = tile * trips / lanes
    mufu = sum(count for name, count in operations.items() if name.startswith("MUFU"))
    matrix = {name: count for name, count in sorted(operations.items()) if is_matrix(name)}
    instructions = operations.total()
    clocks = max(instructions / 128, mufu / 16) / pairs
    return row | {
        "tiles_a_trip": trips,
        "matrix": matrix,
        "instructions_a_pair": round(instructions / pairs, 3),
        "mufu_a_pair": round(mufu / pairs, 3),
        "clocks_a_pair": round(clocks, 4),
    }


def show(row: dict) -> str:
    blocks = f"{row.get('OWN', '')}x{row.get('STREAM', '')} {row.get('num_warps', 4)}w {row.get('num_stages', '')}s" if "OWN" in row else ""
    matrix = " ".join(f"{count} {name}" for name, count in row.get("matrix", {}).items())
    numbers = [row.get(key) for key in ("instructions_a_pair", "mufu_a_pair", "clocks_a_pair")]
    texts = ["" if number is None else f"{number:.4g}" for number in numbers]
    flag = " " if row["fits"] else "!"
    return (
        f"sm_{row['sm']}  {row['kernel']:24} D={row['d']:<4} {blocks:14} {row['registers']:>4} {row['spills']:>6} "
        f"{row['shared_bytes']:>7}{flag} {texts[0]:>7} {texts[1]:>6} {texts[2]:>8}  {matrix}"
    )
