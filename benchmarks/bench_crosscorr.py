"""crosscorr with the Barlow Twins loss on top, against eager PyTorch, lightly and MONAI: `python -m benchmarks.run crosscorr`.

Eager is F.batch_norm twice, one product and autograd. "products" is no peer: the three bare products X^T Y, Y G^T and X G that nobody can do without.
"""

import torch
import torch.nn.functional as F

from benchmarks import libraries
from benchmarks.case import Case, Inputs, Peer, Work, seeded, with_compile
from benchmarks.micro import microbenchmark
from pix2rep_kernels import crosscorr

LAMBDA = 5e-3  # Pix2Rep-v2's
SIZES = [(8_192, 32), (32_768, 64), (131_072, 64), (32_768, 256)]
LARGE = [(n, d) for d in (32, 64, 128, 256, 512) for n in (8_192, 32_768, 131_072)] + [(786_432, 256)]  # the last: one batch of Pix2Rep-v2
CUDA = [(65_536, 128), (262_144, 256), (1_048_576, 256)]
CUDA_LARGE = [(786_432, 256), (65_536, 256), (65_536, 512), (1_048_576, 512)]


def barlow(c):
    diagonal = c.diagonal()
    return (diagonal - 1).square().sum() + LAMBDA * (c.square().sum() - diagonal.square().sum())


def wide(c):
    return c.float() if c.dtype.itemsize == 2 else c


def eager(x, y):
    u, v = (F.batch_norm(t, None, None, training=True) for t in (x, y))
    return barlow(wide(u.T @ v) / len(x))


def eager_std(x, y):
    """Unbiased deviation, 1e-6 added."""
    u, v = ((t - t.mean(0)) / (t.std(0) + 1e-6) for t in (x, y))
    return barlow(wide(u.T @ v) / len(x))


class _Products(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y):
        ctx.save_for_backward(x, y)
        return x.T @ y

    @staticmethod
    def backward(ctx, g):
        x, y = ctx.saved_tensors
        return y @ g.T, x @ g


def products(x, y):
    return wide(_Products.apply(x, y)).sum()


def views(n, d, device, dtype):
    """Two views with half of their variance in common, and means off zero."""
    generator = seeded(device)
    common = torch.randn(n, d, generator=generator, device=device)
    return Inputs([torch.randn(n, d, generator=generator, device=device).add_(common).add_(1).to(dtype).requires_grad_() for _ in range(2)])


def case(n, d, device, dtype):
    moved = n * d * dtype.itemsize
    found, absent = libraries.barlow(eager_std, LAMBDA) if dtype.itemsize > 2 else ({}, {})
    eager_peers = with_compile({"eager": Peer(eager, bytes=12.0 * n * d * dtype.itemsize)})
    return Case(
        "crosscorr", f"N={n} D={d}" + ("" if dtype == torch.float32 else " bf16"), dtype, {"N": n, "D": d},
        make=lambda device, dtype: views(n, d, device, dtype), small=lambda device, dtype: views(min(n, 1024), d, device, dtype),
        ours=lambda backend, x, y: barlow(crosscorr(x, y, backend=backend)),
        peers=eager_peers | found | {"products": Peer(products, unlike=True)}, absent=absent,
        work={"forward": Work(2 * moved, 2 * n * d * d), "backward": Work(4 * moved, 4 * n * d * d)},
        paper=(n, d) == (786_432, 256), series=f"D={d}" + ("" if dtype == torch.float32 else " bf16"), n=n,
        target="1.12 ms" if (n, d, dtype) == (1_048_576, 256, torch.bfloat16) else "",
    )  # fmt: skip


def cases(large=False, device="cpu"):
    default, more = (CUDA, CUDA_LARGE) if device == "cuda" else (SIZES, LARGE)
    dtypes = (torch.bfloat16, torch.float32) if device == "cuda" else (torch.float32,)
    return [case(*size, device, dtype) for size in dict.fromkeys([*default, *(more if large else [])]) for dtype in dtypes]


test_crosscorr = microbenchmark(cases)
