"""Every loss against its official formula in eager PyTorch, at the papers' sizes (fewer images where a step of eager would take gigabytes):
`python -m benchmarks.run losses`.
"""

import torch
import torch.nn.functional as F

from benchmarks.case import Case, Inputs, Peer, Work, seeded, with_compile
from benchmarks.micro import microbenchmark
from pix2rep_kernels import BoundaryInfoMaxLoss, LocalRegionContrastLoss, Pix2RepLoss, PriorGuidedLocalLoss, box_grid


def warped_rows(f1, f2, theta, mode):
    grid = F.affine_grid(theta, (len(f1), 1, *f1.shape[2:]), align_corners=True)
    warped = F.grid_sample(f1, grid, mode=mode, align_corners=True)
    return (f.movedim(1, -1).flatten(0, -2) for f in (warped, f2))


def eager_pix2rep(maps, theta, points):
    z = torch.cat([F.normalize(rows)[points] for rows in warped_rows(*maps, theta, "bilinear")])
    s = z @ z.T / 0.53
    s.fill_diagonal_(-torch.inf)
    return F.cross_entropy(s, torch.arange(len(z), device=z.device).roll(len(points)))


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
        target = 0.5 * torch.eye(len(joint), device=joint.device) / len(joint) + 0.5 * joint
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
    return F.cross_entropy(s.flatten(0, 1), torch.arange(regions, device=s.device).repeat(len(q)))


def eager_pgl(maps, grids, size):
    q, z = (
        F.grid_sample(f, F.affine_grid(theta, (len(f), 1, *size), align_corners=False), align_corners=False, padding_mode="border")
        for f, theta in zip((maps[0], maps[1].detach()), grids, strict=True)
    )
    return (2 - 2 * (F.normalize(q) * F.normalize(z)).sum(1)).mean()


def two_maps(batch, channels, size, device, dtype, pairs=1, target=False):
    """Maps of each view in turn; the second is a target without gradient where the loss detaches it."""
    generator = seeded(device)
    maps = [torch.randn(batch, channels, *size, generator=generator, device=device).to(dtype).requires_grad_() for _ in range(2 * pairs)]
    return [maps[0], maps[1].detach()] if target else maps


def thetas(batch, device, dtype):
    eye = torch.eye(2, 3, dtype=dtype, device=device)
    return eye * 0.8 + 0.1 * torch.randn(batch, 2, 3, generator=seeded(device, 1), device=device).to(dtype)


def pix2rep_inputs(batch, edge, device, dtype):
    points = torch.randperm(batch * edge * edge, generator=seeded(device, 2), device=device)[:1000]
    return two_maps(batch, 256, (edge, edge), device, dtype), thetas(batch, device, dtype), points


def barlow_inputs(batch, edge, device, dtype):
    return two_maps(batch, 256, (edge, edge), device, dtype), thetas(batch, device, dtype)


def bim_inputs(batch, edge, device, dtype):
    image = F.avg_pool2d(torch.rand(batch, 1, edge + 2, edge + 2, generator=seeded(device, 1), device=device), 3, 1)
    return two_maps(batch, 40, (edge, edge), device, dtype, pairs=3), image.to(dtype)


def lrc_inputs(batch, edge, device, dtype):
    side = -(-edge // 10)  # 100 blocks
    blocks = torch.arange(100, device=device).reshape(10, 10).repeat_interleave(side, 0).repeat_interleave(side, 1)[:edge, :edge]
    return two_maps(batch, 64, (edge, edge), device, dtype, target=True), torch.stack([blocks.roll(7 * n, 1) for n in range(batch)])


def pgl_inputs(batch, edge, device, dtype, channels=256, depth=3):
    space = (max(2, edge // depth), edge, edge)
    generator = seeded(device, 1)
    low = 4 * torch.rand(2, batch, 3, generator=generator, device=device)
    flip = torch.rand(2, batch, 3, generator=generator, device=device) < 0.5
    view = torch.tensor([16.0, 96, 96], device=device)
    grids = [box_grid(corner, view - 4 + corner, (16, 96, 96), mirrored, features=space).to(dtype) for corner, mirrored in zip(low, flip, strict=True)]
    return two_maps(batch, channels, space, device, dtype, target=True), grids, space


def decoder_inputs(batch, edge, device, dtype):
    return pgl_inputs(batch, edge, device, dtype, 32, 6)


MAP = 128 * 128 * 256
# loss, what of it, ops beneath, ours, eager, inputs, images and edge, those of the check; floats that are read in each pass, and gradients, of one image
ROWS = [
    (
        "pix2rep", "C=256 128x128, 1000 pixels", ["warp", "infonce"], lambda k, f, t, p: Pix2RepLoss(backend=k)(*f, t, points=p),
        eager_pix2rep, pix2rep_inputs, (8, 128), (2, 32), 5 * 125 * 256, 2 * MAP,
    ),
    (
        "barlow", "C=256 128x128, bicubic, every pixel", ["warp", "crosscorr"],
        lambda k, f, t: Pix2RepLoss("barlow", num_samples=None, mode="bicubic", backend=k)(*f, t),
        eager_barlow, barlow_inputs, (4, 128), (1, 32), 2 * MAP, 2 * MAP,
    ),
    (
        "bim", "K=40, 3 heads, 224x224", ["joint", "entropy", "lncc"], lambda k, f, x: BoundaryInfoMaxLoss(backend=k)(f[0::2], f[1::2], x),
        eager_bim, bim_inputs, (4, 224), (1, 56), 6 * 40 * 224 * 224, 6 * 40 * 224 * 224,
    ),
    (
        "lrc", "C=64 256x256, 100 regions", ["pool", "infonce"], lambda k, f, labels: LocalRegionContrastLoss(backend=k)(*f, labels),
        eager_lrc, lrc_inputs, (8, 256), (2, 80), 2 * 64 * 256 * 256, 64 * 256 * 256,
    ),
    (
        "pgl", "C=256 2x6x6", ["align"], lambda k, f, g, size: PriorGuidedLocalLoss(backend=k)(*f, *g, size=size),
        eager_pgl, pgl_inputs, (128, 6), (4, 6), 2 * 256 * 72, 256 * 72,
    ),
    (
        "pgl", "C=32 16x96x96", ["align"], lambda k, f, g, size: PriorGuidedLocalLoss(backend=k)(*f, *g, size=size),
        eager_pgl, decoder_inputs, (2, 96), (1, 24), 2 * 32 * 16 * 96 * 96, 32 * 16 * 96 * 96,
    ),
]  # fmt: skip


def case(loss, about, ops, ours, eager, inputs, size, few, read, gradients):
    def given(size):
        return lambda device, dtype: Inputs(list(inputs(*size, device, dtype)))

    batch = size[0]
    work = {"forward": Work(4.0 * batch * read), "backward": Work(4.0 * batch * (read + gradients))}
    return Case(
        "losses", f"{loss} B={batch} {about}", torch.float32, {"loss": loss, "B": batch, "size": about, "ops": ops}, make=given(size), small=given(few),
        ours=ours, peers=with_compile({"eager": Peer(eager)}), work=work, paper=True,
    )  # fmt: skip


def cases(large=False, device="cpu"):
    return [case(*row) for row in ROWS]


test_losses = microbenchmark(cases)
