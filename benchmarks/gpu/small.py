"""Small calls, forward and backward, of one op on one backend: `python -m benchmarks.gpu.small OP BACKEND`, what compute-sanitizer watches."""

import sys

import torch

from pix2rep_kernels import align, crosscorr, entropy, infonce, joint, lncc, pool, warp
from pix2rep_kernels.ops.warp import MODES
from pix2rep_kernels.testing import home


def calls(device: str) -> dict:
    """op -> functions of a backend that return tensors with gradients; odd sizes, so that every tile has an edge."""

    def draw(*shape):
        return torch.randn(*shape, device=device, requires_grad=True)

    def last(t):
        return t.detach().contiguous(memory_format=torch.channels_last).requires_grad_()

    a, b = (torch.nn.functional.normalize(torch.randn(35, 24, device=device), dim=1).requires_grad_() for _ in range(2))
    c, d = (torch.nn.functional.normalize(torch.randn(150, 72, device=device), dim=1).bfloat16().requires_grad_() for _ in range(2))
    valid, ids = torch.rand(35, device=device) > 0.2, torch.randint(0, 9, (35,), device=device)
    first, theta = draw(2, 12, 7, 9), torch.eye(2, 3, device=device).expand(2, -1, -1) + 0.2
    volume, turned = draw(1, 5, 3, 4, 5), torch.eye(3, 4, device=device)[None] * 0.9
    labels = torch.randint(-1, 6, (2, 7, 9), device=device)
    mask = torch.rand(2, 1, 7, 9, device=device) > 0.2
    return {
        "infonce": [lambda k, n=n: infonce(a, b, temperature=0.1, negatives=n, valid_a=valid, ids_a=ids, backend=k) for n in ("joint", "cross", "forward")]
        + [lambda k, n=n: infonce(c, d, temperature=0.1, negatives=n, backend=k) for n in ("joint", "cross")]
        + [lambda k: infonce(a, b, temperature=0.004, backend=k), lambda k: infonce(a[:9], b, temperature=0.1, negatives="forward", queue=b[:5], backend=k)],
        "warp": [lambda k, f=f, m=m: warp(f, theta, mode=m, normalize=True, backend=k)[0] for f in (first, last(first)) for m in MODES]
        + [lambda k: warp(volume, turned, backend=k)[0], lambda k: warp(first, theta, points=torch.tensor([3, 3, 99], device=device), backend=k)[0]],
        "crosscorr": [lambda k, w=w: crosscorr(a, b[:, :17], weight=w, backend=k) for w in (None, valid)] + [lambda k: crosscorr(c, d, backend=k)],
        "joint": [lambda k, r=r, c=c: joint(first, first.flip(2), radius=r, collapsed=c, mask=mask, backend=k) for r, c in ((0, True), (1, True), (1, False))],
        "lncc": [lambda k: lncc(first, first.roll(1, 2), window=5, backend=k), lambda k: lncc(volume, volume.roll(1, 3), window=3, backend=k)],
        "pool": [lambda k, f=f: pool(f, labels, regions=6, backend=k)[0] for f in (first, last(first))],
        "align": [lambda k: sum(align(first, last(first), theta, theta, backend=k)[:3]), lambda k: align(volume, volume, turned, turned, backend=k)[0]],
        "entropy": [lambda k, f=f: entropy(f, mask=mask, backend=k) for f in (first, last(first))] + [lambda k: entropy(volume, backend=k)],
    }  # fmt: skip


def run(op: str, backend: str) -> None:
    """Every call, and again with the deterministic kernels."""
    for deterministic in (False, True):
        torch.use_deterministic_algorithms(deterministic)
        for call in calls(home(backend))[op]:
            call(backend).float().square().sum().backward()
    if home(backend) == "cuda":
        torch.cuda.synchronize()
    print(f"ran {op} {backend}")


if __name__ == "__main__":
    run(*sys.argv[1:])
