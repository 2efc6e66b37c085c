"""entropy against the eager compositions: `python -m benchmarks.run entropy`.

Eager is softmax, log, product and sum ("add": 1e-16 inside the logarithm, as the boundary-aware paper's code), the same by `log_softmax`, or by
`torch.special.entr`; all keep what autograd wants.
"""

import torch

from benchmarks.case import Case, Inputs, Peer, Work, seeded, with_compile
from benchmarks.micro import microbenchmark
from pix2rep_kernels import entropy
from pix2rep_kernels.layout import memory_format

# B, K, S, layout. The trainer's maps in both layouts, the paper's, few and many clusters, a volume.
SIZES = [(8, 40, (128, 128), "last"), (8, 40, (128, 128), "first"), (2, 10, (16, 96, 96), "last")]
LARGE = [(18, 40, (224, 224), "first"), (18, 40, (224, 224), "last"), (8, 3, (128, 128), "last"), (8, 100, (128, 128), "first"), (2, 10, (16, 96, 96), "first")]


def added(logits):
    c = logits.softmax(1)
    return -(c * (c + 1e-16).log()).sum(1, keepdim=True)


def log_softmax(logits):
    log_c = logits.log_softmax(1)
    return -(log_c.exp() * log_c).sum(1, keepdim=True)


def entr(logits):
    return torch.special.entr(logits.softmax(1)).sum(1, keepdim=True)


def inputs(batch, clusters, space, layout, device, dtype):
    """Logits that want a gradient, and an upstream gradient."""
    generator = seeded(device)
    logits = torch.empty(batch, clusters, *space, device=device)
    logits = logits if layout == "first" else torch.empty_like(logits, memory_format=memory_format(logits.ndim))
    upstream = torch.randn(batch, 1, *space, generator=generator, device=device, dtype=torch.float32)
    return Inputs([logits.normal_(generator=generator).to(dtype).requires_grad_()], (upstream.to(torch.promote_types(dtype, torch.float32)),))


def case(batch, clusters, space, layout):
    pixels = batch * torch.Size(space).numel()
    logits = pixels * clusters
    few = tuple(min(s, 48 if len(space) == 2 else 16) for s in space)
    return Case(
        "entropy", f"B={batch} K={clusters} S={'x'.join(map(str, space))} {layout}", torch.float32, {"B": batch, "K": clusters, "S": space},
        make=lambda device, dtype: inputs(batch, clusters, space, layout, device, dtype),
        small=lambda device, dtype: inputs(1, clusters, few, layout, device, dtype),
        ours=lambda backend, x: entropy(x, backend=backend),
        peers=with_compile({"add": Peer(added), "log_softmax": Peer(log_softmax), "entr": Peer(entr)}),
        work={"forward": Work(4.0 * (logits + pixels), exps=logits), "backward": Work(4.0 * (2 * logits + pixels), exps=logits)},
        layout=layout, paper=space == (224, 224),
    )  # fmt: skip


def cases(large=False, device="cpu"):
    return [case(*size) for size in [*SIZES, *(LARGE if large or device == "cuda" else [])]]


test_entropy = microbenchmark(cases)
