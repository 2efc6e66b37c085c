"""What the chip can do: exponentials, fused multiply-adds, L2 reads, atomic adds, copies, matrix products. The floors of every row are counted from these."""

import json
import sys

import torch
import triton
import triton.language as tl

from benchmarks.gpu.timing import Clock

UNROLLED: tl.constexpr = tl.constexpr(4)  # the loop's own instructions are then few
# What an H200 should give (rates a second): a measurement far from these says that the loop or the chip is not what was thought.
EXPECTED = {"ex2": 3.9e12, "fma": 6.0e13, "l2_bytes": 5.5e12, "atomic_bytes": 3.0e12, "copy_bytes": 4.3e12, "bf16_flop": 7.9e14, "tf32_flop": 4.0e14}


@triton.jit
def _exponentials(out, ROUNDS: tl.constexpr, BLOCK: tl.constexpr):
    x = tl.arange(0, BLOCK).to(tl.float32) * 1e-6 - 1.0
    y = x * 0.5
    z = x * 0.25
    w = x * 0.125
    for _ in range(ROUNDS // UNROLLED):  # four chains hide the latency; every result feeds the next, and stays near a fixed point
        for _ in tl.static_range(UNROLLED):
            x = tl.exp2(-x)
            y = tl.exp2(-y)
            z = tl.exp2(-z)
            w = tl.exp2(-w)
    tl.store(out + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), x + y + z + w)


@triton.jit
def _multiply_adds(out, a, ROUNDS: tl.constexpr, BLOCK: tl.constexpr):
    x = tl.arange(0, BLOCK).to(tl.float32)
    y, z, w = x + 1, x + 2, x + 3
    for _ in range(ROUNDS // UNROLLED):
        for _ in tl.static_range(UNROLLED):
            x = tl.fma(x, a, y)
            y = tl.fma(y, a, z)
            z = tl.fma(z, a, w)
            w = tl.fma(w, a, x)
    tl.store(out + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), x + y + z + w)


@triton.jit
def _reads(source, out, count, ROUNDS: tl.constexpr, BLOCK: tl.constexpr):
    total = tl.zeros([BLOCK], tl.float32)
    first = tl.program_id(0) * BLOCK * 7
    for k in range(0, ROUNDS, UNROLLED):
        for j in tl.static_range(UNROLLED):  # as many loads of 16 bytes a thread in flight; `count` is a power of two
            at = tl.multiple_of((first + (k + j) * BLOCK * 131) & (count - 1), BLOCK)
            total += tl.load(source + at + tl.arange(0, BLOCK), cache_modifier=".cg")
    tl.store(out + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), total)


@triton.jit
def _adds(target, count, ROUNDS: tl.constexpr, BLOCK: tl.constexpr):
    first = tl.program_id(0) * BLOCK * 7
    for k in range(0, ROUNDS, UNROLLED):
        for j in tl.static_range(UNROLLED):
            at = tl.multiple_of((first + (k + j) * BLOCK * 131) & (count - 1), BLOCK)
            tl.atomic_add(target + at + tl.arange(0, BLOCK), 1.0, sem="relaxed")


def measure(clock: Clock, small: bool = False) -> dict[str, float]:
    """Rates a second: ex2, fma (2 FLOP each), l2_bytes, atomic_bytes, copy_bytes (read and written), bf16_flop, tf32_flop."""
    device = clock.device
    programs, rounds, block = (2, 4, 64) if small else (132 * 16, 1024, 512)
    out = torch.empty(programs * block, device=device)
    work = programs * rounds * block
    found = {
        "ex2": 4 * work / clock(lambda: _exponentials[(programs,)](out, ROUNDS=rounds, BLOCK=block))["best_s"],
        "fma": 8 * work / clock(lambda: _multiply_adds[(programs,)](out, 0.5, ROUNDS=rounds, BLOCK=block))["best_s"],
    }
    resident = torch.ones((1 << 12) if small else (32 << 20) // 4, device=device)
    count = resident.numel() // block * block
    found["l2_bytes"] = 4 * work / clock(lambda: _reads[(programs,)](resident, out, count, ROUNDS=rounds, BLOCK=block))["best_s"]
    found["atomic_bytes"] = work / clock(lambda: _adds[(programs,)](resident, count, ROUNDS=rounds // 4 or 1, BLOCK=block))["best_s"]
    large = torch.empty(1 << 10 if small else 1 << 31, dtype=torch.int8, device=device)
    target = torch.empty_like(large)
    found["copy_bytes"] = 2 * large.numel() / clock(lambda: target.copy_(large))["best_s"]
    large = target = None
    n = 64 if small else 8192
    for name, dtype in (("bf16_flop", torch.bfloat16), ("tf32_flop", torch.float32)):
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")
        a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
        found[name] = 2 * n**3 / clock(lambda a=a, b=b: a @ b)["best_s"]
        torch.set_float32_matmul_precision(before)
    return found


if __name__ == "__main__":
    cpu = "--small" in sys.argv
    print(json.dumps(measure(Clock("cpu" if cpu else "cuda"), small=cpu)))
