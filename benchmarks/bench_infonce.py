"""infonce against eager PyTorch, other libraries and what streams as we do: one loss and its gradient over N pairs of L2-normalised rows.

`python -m benchmarks.run infonce` measures; the sizes of --large go far past where those die that store N x N.
"""

import torch
import torch.nn.functional as F

from benchmarks import libraries, peers
from benchmarks.case import Case, Inputs, Peer, Work, compiled, seeded
from benchmarks.micro import microbenchmark
from pix2rep_kernels import infonce

TEMPERATURE = 0.1
# negatives, N, D. First the sample of 1000 pixels that Pix2Rep draws, at its own width.
SIZES = [("joint", 1000, 256), ("cross", 8192, 64), ("joint", 8192, 64), ("cross", 4096, 128), ("joint", 4096, 256)]
SWEEP = [(negatives, n, 64) for n in (1024, 2048, 4096, 8192, 16_384, 32_768, 65_536, 262_144) for negatives in ("joint", "cross")]
WIDTHS = [("joint", 4096, d) for d in (32, 64, 128, 256, 512)]
LARGE = [*SWEEP, *WIDTHS, ("joint", 131_072, 256)]  # the last: every pixel of one batch of Pix2Rep
CUDA = [("cross", 4096, 128), *((negatives, 65_536, d) for negatives in ("cross", "joint") for d in (64, 128, 256))]
CUDA_LARGE = [
    ("joint", 131_072, 256), ("cross", 1_048_576, 128), ("joint", 1_048_576, 128),
    *((negatives, n, 128) for n in (4096, 16_384, 65_536, 262_144) for negatives in ("joint", "cross")), *(("joint", 65_536, d) for d in (32, 512)),
]  # fmt: skip
TARGETS = {
    ("cross", 65_536, 64): "6.2 ms", ("cross", 65_536, 128): "11.2 ms", ("cross", 65_536, 256): "22.2 ms", ("joint", 65_536, 64): "11.2 ms",
    ("joint", 65_536, 128): "22.4 ms", ("joint", 65_536, 256): "44.8 ms", ("joint", 131_072, 256): "0.3 s, 1 GiB",
    ("cross", 1_048_576, 128): "3 s, 4 GiB", ("joint", 1_048_576, 128): "6 s, 4 GiB",
}  # fmt: skip


def rows(n, d, device, dtype):
    generator = seeded(device)
    return [F.normalize(torch.randn(n, d, generator=generator, device=device), dim=1).to(dtype).requires_grad_() for _ in range(2)]


def work(negatives, n, d, device, width):
    """Products of 2 N^2 D flops and exponentials of each pass. "cross": 1 forward; backward 3 where one recompute feeds both gradients (CPU), 4 where each has
    its own (GPU). "joint": a triangle of (2N)^2 forward; backward a triangle too on a CPU, the square on a GPU.
    """
    pairs = n * n if negatives == "cross" else 4 * n * n
    units, exps = {
        ("cross", "cpu"): ((1, 3), (1, 1)), ("joint", "cpu"): ((0.5, 1.5), (0.5, 0.5)),
        ("cross", "cuda"): ((1, 4), (1, 2)), ("joint", "cuda"): ((0.5, 2), (0.5, 1)),
    }[negatives, device]  # fmt: skip
    moved = 2 * n * d * width
    return {
        name: Work(bytes=factor * moved, flop=u * 2 * pairs * d, exps=e * pairs)
        for name, factor, u, e in zip(("forward", "backward"), (1, 2), units, exps, strict=True)
    }


def peers_of(negatives, n, d, device):
    def plain(a, b):
        return peers.eager(a, b, negatives, TEMPERATURE)

    pairs = n * n if negatives == "cross" else 4 * n * n
    found, absent = peers.available(device)
    others = {name: call for name, call in found.items() if name != "eager" and (negatives == "cross" or name not in peers.CROSS_ONLY)}
    bytes_of = {"eager": 16.0 * n * n if negatives == "cross" else 12.0 * pairs, "compile": 8.0 * pairs}
    result = {"eager": Peer(plain, bytes=bytes_of["eager"])}
    for name, call in others.items():
        result[name] = Peer(lambda a, b, call=call: call(a, b, negatives, TEMPERATURE), bytes_of.get(name, 0.0), slow_start=name in ("compile", "flex"))
    libs, gone = libraries.infonce(plain, negatives, n, d, TEMPERATURE, device)
    absent = {**absent, **gone}
    if "compile" not in result:
        if reason := libraries.why_no_compiler(device):
            absent["compile"] = reason
        else:
            result["compile"] = Peer(compiled(plain), bytes_of["compile"], slow_start=True)
    return result | libs, {name: reason for name, reason in absent.items() if name not in result}


def case(negatives, n, d, device, dtype=None):
    dtype = dtype or (torch.bfloat16 if device == "cuda" else torch.float32)
    found, absent = peers_of(negatives, n, d, device)
    return Case(
        "infonce", f"{negatives} N={n} D={d}", dtype, {"negatives": negatives, "N": n, "D": d},
        make=lambda device, dtype: Inputs(rows(n, d, device, dtype)), small=lambda device, dtype: Inputs(rows(min(n, 512), d, device, dtype)),
        ours=lambda backend, a, b: infonce(a, b, temperature=TEMPERATURE, negatives=negatives, backend=backend).mean(),
        peers=found, absent=absent, work=work(negatives, n, d, device, dtype.itemsize), paper=(n, d) in ((1000, 256), (131_072, 256)),
        series=f"{negatives} D={d}", n=n, target=TARGETS.get((negatives, n, d), "") if device == "cuda" else "",
    )  # fmt: skip


def cases(large=False, device="cpu"):
    default, more = (CUDA, CUDA_LARGE) if device == "cuda" else (SIZES, LARGE)
    return [case(*size, device) for size in dict.fromkeys([*default, *(more if large else [])])]


test_infonce = microbenchmark(cases)
