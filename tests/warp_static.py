"""Compile the Triton kernels of warp as a call would and print what ptxas says of them, a JSON object a line; run by test_warp.py, not interpreted."""

import json
import re
import subprocess
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pix2rep_kernels.triton import warp, warp_backward
from pix2rep_kernels.triton.warp_points import TAPS, blocks

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
POINTERS = {
    "grid": "*fp32", "points": "*i64", "inside": "*i1", "norms": "*fp32", "grad_features": "*fp32", "keys": "*i64", "weights": "*fp32",
    "dots": "*fp32", "order": "*i64", "starts": "*i64",
}  # fmt: skip
UNIT_STRIDES = ("points_stride", "grid_c", "grad_c")
OPTIONS = {"AFFINE": True, "ALIGN": True, "GIVEN": True, "BORDER": False, "WIDE": False, "NORMALIZE": True}
KERNELS = {
    "forward": warp.warp_forward_kernel,
    "atomic": warp_backward.warp_backward_atomic_kernel,
    "records": warp_backward.warp_backward_records_kernel,
    "sum": warp_backward.warp_backward_sum_kernel,
}
CASES = [  # kernel, mode, dims, storage, channels, channels last
    ("forward", "linear", 2, "bf16", 256, True),
    ("forward", "linear", 2, "fp32", 64, False),
    ("forward", "bicubic", 2, "fp16", 600, True),
    ("forward", "linear", 3, "bf16", 100, False),
    ("atomic", "linear", 2, "fp32", 64, True),
    ("atomic", "linear", 2, "bf16", 256, False),
    ("atomic", "linear", 3, "bf16", 100, True),
    ("records", "bicubic", 2, "bf16", 256, True),
    ("sum", "linear", 2, "bf16", 256, True),
]


def compiled(which, mode, dims, storage, channels, last, capability):
    kernel, taps = KERNELS[which], TAPS[mode] ** dims
    block_p, block_c, warps = blocks(channels, last, taps, backward=which != "forward")
    constants = {**OPTIONS, "TAPS": TAPS[mode], "DIMS": dims, "LAST": last, "LOOP": channels > block_c, "K": taps, "BLOCK_R": 4}
    constants |= {"BLOCK_P": block_p, "BLOCK_C": block_c, **dict.fromkeys(UNIT_STRIDES, 1)} | ({"stride_c": 1} if last else {})
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    signature, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        kind = "*" + storage if name in ("features", "rows", "grad_rows") else POINTERS.get(name, "i32")
        signature[name] = "constexpr" if name in constants else kind
        aligned = kind.startswith("*") or (channels % 16 == 0 and (name == "C" or name.startswith("stride_") or name == "grad_p"))
        if aligned and name not in constants:
            attributes[i,] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps, "enable_fp_fusion": False})


def usage(cubin):
    """Registers, bytes of stack (spills), widest load in bits."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        resources, sass = (
            subprocess.run([CUOBJDUMP, option, file.name], capture_output=True, text=True, check=True).stdout for option in ("-res-usage", "-sass")
        )
    widths = [int(bits) for bits in re.findall(r"LDG\.E\.(?:CONSTANT\.)?(64|128)", sass)]
    found = {"registers": r"REG:(\d+)", "stack": r"STACK:(\d+)"}
    return {name: int(re.search(pattern, resources)[1]) for name, pattern in found.items()} | {"widest": max(widths, default=32)}


if __name__ == "__main__":
    for case in CASES:
        for capability in (80, 90):
            fields = dict(zip(("kernel", "mode", "dims", "storage", "channels", "last"), case, strict=True))
            print(json.dumps({**fields, "sm": capability, **usage(compiled(*case, capability).asm["cubin"])}), flush=True)
