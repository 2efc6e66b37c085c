"""Every loss on the CPU against its official formula in eager PyTorch: `pytest benchmarks/losses.py`, or `python -m benchmarks.losses` for the table.

Forward and backward at the papers' sizes (fewer images where a step of eager would take gigabytes), float32. Value and gradients of both sides are checked
against float64 on a smaller batch before anything is timed. Peak memory is that of a process of its own, beyond the inputs, gradients counted.
"""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

from benchmarks import harness
from benchmarks.harness import interleaved, peak_mib
from pix2rep_kernels import BoundaryInfoMaxLoss, LocalRegionContrastLoss, Pix2RepLoss, PriorGuidedLocalLoss, box_grid
from pix2rep_kernels.testing import error, tolerance


@dataclass
class Case:
    """`ours` and `eager` take what `inputs(batch, dtype)` returns, whose floating maps that want gradients come in the first list."""

    about: str
    ours: Callable
    eager: Callable
    inputs: Callable
    batch: int
    small: int


def warped_rows(f1, f2, theta, mode):
    grid = F.affine_grid(theta, (len(f1), 1, *f1.shape[2:]), align_corners=True)
    warped = F.grid_sample(f1, grid, mode=mode, align_corners=True)
    return (f.movedim(1, -1).flatten(0, -2) for f in (warped, f2))


def eager_pix2rep(maps, theta, points):
    z = torch.cat([F.normalize(rows)[points] for rows in warped_rows(*maps, theta, "bilinear")])
    s = z @ z.T / 0.53
    s.fill_diagonal_(-torch.inf)
    return F.cross_entropy(s, torch.arange(len(z)).roll(len(points)))


def eager_barlow(maps, theta):
    x, y = (F.batch_norm(rows, None, None, training=True) for rows in warped_rows(*maps, theta, "bicubic"))
    c = x.T @ y / len(x)
    on = c.diagonal()
    return (on - 1).square().sum() + 5e-3 * (c.square().sum() - on.square().sum())


def eager_bim(maps, image):
    """All heads: softmax once a map, as the official code does."""
    squares = sum((image - image.roll(1, axis)).square() for axis in (2, 3))
    edges = unit(squares.sqrt().mean(1, keepdim=True)).pow(0.75)
    total = 0
    for a, b in zip(maps[0::2], maps[1::2], strict=True):
        p, q = a.softmax(1), b.softmax(1)
        joint = torch.einsum("bkp,blp->kl", p.flatten(2), q.flatten(2)) / (p.numel() / p.shape[1])
        joint = (joint + joint.T) / 2
        target = 0.5 * torch.eye(len(joint)) / len(joint) + 0.5 * joint
        logs = (joint.sum(1, keepdim=True) + 1e-5).log() + (joint.sum(0, keepdim=True) + 1e-5).log()
        total = total + (joint * logs - target * (joint + 1e-5).log()).sum()
        total = total + sum(boundary(unit(-(c * (c + 1e-16).log()).sum(1, keepdim=True)), edges) for c in (p, q)) / 2
    return total / (len(maps) // 2)


def unit(x):
    low, high = (f(x.detach(), (1, 2, 3), keepdim=True) for f in (torch.amin, torch.amax))
    return (x - low) / (high - low + 1e-6)


def boundary(i, j):
    def box(x):
        return 25 * F.avg_pool2d(x, 5, 1, 2)

    s_i, s_j = box(i), box(j)
    cross, v, w = (t.clamp(min=1e-5) for t in (box(i * j) - s_i * s_j / 25, box(i * i) - s_i.square() / 25, box(j * j) - s_j.square() / 25))
    return -(cross.square() / (v * w)).mean()


def eager_lrc(maps, labels):
    index = labels.flatten(1)
    regions = int(index.max()) + 1  # all of them in every image
    counts = F.one_hot(index, regions).sum(1).unsqueeze(2)
    q, k = (
        F.normalize(f.new_zeros(len(f), regions, f.shape[1]).scatter_add(1, index.unsqueeze(2).expand(-1, -1, f.shape[1]), f.flatten(2).mT) / counts, dim=2)
        for f in (maps[0], maps[1].detach())
    )  # fmt: skip
    s = q @ k.mT / 0.1
    return F.cross_entropy(s.flatten(0, 1), torch.arange(regions).repeat(len(q)))


def eager_pgl(maps, grids, size):
    q, z = (
        F.grid_sample(f, F.affine_grid(theta, (len(f), 1, *size), align_corners=False), align_corners=False, padding_mode="border")
        for f, theta in zip((maps[0], maps[1].detach()), grids, strict=True)
    )
    return (2 - 2 * (F.normalize(q) * F.normalize(z)).sum(1)).mean()


def two_maps(batch, channels, size, dtype, pairs=1):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch, channels, *size, generator=generator).to(dtype).requires_grad_() for _ in range(2 * pairs)]


def thetas(batch, dtype):
    return torch.eye(2, 3, dtype=dtype) * 0.8 + 0.1 * torch.randn(batch, 2, 3, generator=torch.Generator().manual_seed(1)).to(dtype)


def pix2rep_inputs(batch, dtype):
    points = torch.randperm(batch * 128 * 128, generator=torch.Generator().manual_seed(2))[:1000]
    return two_maps(batch, 256, (128, 128), dtype), thetas(batch, dtype), points


def bim_inputs(batch, dtype):
    image = F.avg_pool2d(torch.rand(batch, 1, 226, 226, generator=torch.Generator().manual_seed(1)), 3, 1)
    return two_maps(batch, 40, (224, 224), dtype, pairs=3), image.to(dtype)


def lrc_inputs(batch, dtype):
    blocks = torch.arange(100).reshape(10, 10).repeat_interleave(26, 0).repeat_interleave(26, 1)[:256, :256]
    return two_maps(batch, 64, (256, 256), dtype), torch.stack([blocks.roll(7 * n, 1) for n in range(batch)])


def pgl_inputs(batch, dtype, channels=256, space=(2, 6, 6)):
    generator = torch.Generator().manual_seed(1)
    low = 4 * torch.rand(2, batch, 3, generator=generator)
    flip = torch.rand(2, batch, 3, generator=generator) < 0.5
    view = torch.tensor([16.0, 96, 96])
    grids = [box_grid(corner, view - 4 + corner, (16, 96, 96), mirrored, features=space).to(dtype) for corner, mirrored in zip(low, flip, strict=True)]
    return two_maps(batch, channels, space, dtype), grids, space


CASES = {
    "pix2rep": Case("C=256 128x128, 1000 pixels", lambda f, t, p: Pix2RepLoss()(*f, t, points=p), eager_pix2rep, pix2rep_inputs, 8, 1),
    "barlow": Case(
        "C=256 128x128, bicubic, every pixel", lambda f, t: Pix2RepLoss("barlow", num_samples=None, mode="bicubic")(*f, t), eager_barlow,
        lambda batch, dtype: (two_maps(batch, 256, (128, 128), dtype), thetas(batch, dtype)), 4, 1,
    ),
    "bim": Case("K=40, 3 heads, 224x224", lambda f, x: BoundaryInfoMaxLoss()(f[0::2], f[1::2], x), eager_bim, bim_inputs, 4, 1),
    "lrc": Case("C=64 256x256, 100 regions", lambda f, labels: LocalRegionContrastLoss()(*f, labels), eager_lrc, lrc_inputs, 8, 2),
    "pgl": Case("C=256 2x6x6", lambda f, g, size: PriorGuidedLocalLoss()(*f, *g, size=size), eager_pgl, pgl_inputs, 128, 4),
    "pgl, decoder": Case(
        "C=32 16x96x96", lambda f, g, size: PriorGuidedLocalLoss()(*f, *g, size=size), eager_pgl,
        lambda batch, dtype: pgl_inputs(batch, dtype, 32, (16, 96, 96)), 2, 1,
    ),
}  # fmt: skip


def step(which, name, maps, *rest):
    for f in maps:
        f.grad = None
    value = getattr(CASES[name], which)(maps, *rest)
    value.backward()
    return [value.detach(), *(f.grad for f in maps if f.grad is not None)]


def checked(name):
    """Largest relative error of value and gradients against float64 on the small batch: ours, eager's."""
    case = CASES[name]
    truth = step("eager", name, *case.inputs(case.small, torch.float64))
    mine, theirs = (error(step(which, name, *case.inputs(case.small, torch.float32)), truth) for which in ("ours", "eager"))
    if not mine <= tolerance(theirs, torch.float32):
        raise AssertionError(f"{name}: error {mine:.1e} is above twice PyTorch's own {theirs:.1e}; nothing is timed")
    return mine, theirs


MEMORY = """
import torch
from benchmarks.losses import CASES, step
which, name, threads = arguments
torch.set_num_threads(int(threads))
def prepare():
    step(which, name, *CASES[name].inputs(CASES[name].small, torch.float32))
    return CASES[name].inputs(CASES[name].batch, torch.float32)
def work(inputs):
    step(which, name, *inputs)
"""


def memory(which, name):
    return peak_mib(MEMORY, which, name, torch.get_num_threads())


def measure(name, repeats=5):
    """One row of the table: seconds forward and backward, MiB beyond the inputs."""
    mine, theirs = checked(name)
    case = CASES[name]
    given = case.inputs(case.batch, torch.float32)
    times = interleaved({which: lambda which=which: step(which, name, *given) for which in ("ours", "eager")}, repeats)
    return {
        "loss": name, "B": case.batch, "size": case.about, "dtype": "float32", "error": mine, "eager_error": theirs, **times,
        "ratio": times["eager"]["median_s"] / times["ours"]["median_s"], "extra_MiB": memory("ours", name), "eager_extra_MiB": memory("eager", name),
    }  # fmt: skip


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("which", ["ours", "eager"])
def test_loss(benchmark, which, name):
    case = CASES[name]
    benchmark.extra_info["error"], benchmark.extra_info["eager_error"] = checked(name)
    benchmark.extra_info["extra_MiB"] = memory(which, name)
    benchmark.group = f"{name} B={case.batch} {case.about} fwd+bwd"
    benchmark.pedantic(step, args=(which, name, *case.inputs(case.batch, torch.float32)), rounds=3, warmup_rounds=1)


HEADER = f"{'':46}{'ours ms':>9}{'eager ms':>10}{'ratio':>7}{'MiB':>8}{'eager':>8}{'error':>10}{'eager':>9}"


def line(r):
    mine, theirs = (1e3 * r[side]["median_s"] for side in ("ours", "eager"))
    name = f"{r['loss']} B={r['B']} {r['size']}"
    return f"{name:46}{mine:9.1f}{theirs:10.1f}{r['ratio']:7.2f}{r['extra_MiB']:8.0f}{r['eager_extra_MiB']:8.0f}{r['error']:10.1e}{r['eager_error']:9.1e}"


def main():
    parser = harness.parser(__doc__)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(CASES)}; default all")
    asked = harness.start(parser)
    harness.tabulate(asked, HEADER, (measure(name, asked.repeats) for name in asked.names or CASES), line)


if __name__ == "__main__":
    main()
