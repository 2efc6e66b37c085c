"""What is timed on a GPU: one case an op, size and dtype, with its inputs, its eager composition, and the floor that the chip's ceilings set."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.peers import CROSS_ONLY, eager
from pix2rep_kernels import align, crosscorr, entropy, infonce, joint, lncc, pool, warp

TEMPERATURE = 0.1
LIMIT_BYTES = 100e9  # above this eager is not tried


@dataclass
class Target:
    """What a row must reach: times in milliseconds, multiples of the measured floor, times a peer's speed, MiB beyond the inputs."""

    ms: float | None = None
    floors: float | None = None
    over: dict[str, float] = field(default_factory=dict)
    extra_MiB: float | None = None


@dataclass
class Case:
    """`ours(backend, *inputs)` and each `peers[name](*inputs)` return a tensor whose gradient goes back to the inputs that require it."""

    op: str
    name: str
    dtype: torch.dtype
    make: Callable[[str], list[Tensor]]
    ours: Callable
    peers: dict[str, Callable]
    floor_s: Callable[[dict], float]
    small: Callable[[str], list[Tensor]]  # a size at which float64 is affordable
    eager_bytes: float = 0.0
    target: Target | None = None
    fields: dict = field(default_factory=dict)

    @property
    def key(self) -> str:
        return f"{self.op}|{self.name}|{str(self.dtype).removeprefix('torch.')}"


def _bytes(dtype) -> int:
    return torch.finfo(dtype).bits // 8


def _unit(n, d, dtype, device):
    return F.normalize(torch.randn(n, d, device=device), dim=1).to(dtype).requires_grad_()


def infonce_floor(negatives, n, d):
    """4 or 5 units of 2 N^2 D flops and one exponential a pair and pass (kernels' section 4.2): split backward, "joint" over one triangle forward."""
    pairs, passes = (n * n, (1, 2, 2)) if negatives == "cross" else (4 * n * n, (0.5, 2))

    def floor(c):
        flop = 2 * pairs * d / c["bf16_flop"]
        exps = pairs / c["ex2"]
        return sum(max(0.5 * flop, 0.5 * exps) if units == 0.5 else max(units * flop, exps) for units in passes)

    return floor


def infonce_cases(peers: dict[str, Callable], small: bool) -> list[Case]:
    sizes = [("cross", 4096, 128), *(("cross", 65_536, d) for d in (64, 128, 256)), *(("joint", 65_536, d) for d in (64, 128, 256))]
    sizes += [("joint", 131_072, 256), ("cross", 1_048_576, 128), ("joint", 1_048_576, 128)]
    # 1.6 times floor B at 790 TFLOP/s; six copies of a view in float32.
    targets = {
        ("cross", 65_536, d): Target(ms, None, {"memeff": memeff, "eager": 6.0}, 6 * 65_536 * d * 4 / 2**20)
        for d, ms, memeff in ((64, 6.24, 3.0), (128, 11.2, 2.0), (256, 22.2, 1.5))
    }
    targets |= {("joint", 65_536, d): Target(ms) for d, ms in ((64, 11.2), (128, 22.4), (256, 44.8))}
    targets |= {("joint", 131_072, 256): Target(300.0, extra_MiB=1024.0)}
    targets |= {(negatives, 1_048_576, 128): Target(ms, extra_MiB=4096.0) for negatives, ms in (("cross", 3000.0), ("joint", 6000.0))}
    found = []
    for negatives, n, d in [("cross", 48, 16), ("joint", 48, 16)] if small else sizes:
        def ours(backend, a, b, negatives=negatives):
            return infonce(a, b, temperature=TEMPERATURE, negatives=negatives, backend=backend).mean()

        usable = {} if n > 131_072 else {k: v for k, v in peers.items() if negatives == "cross" or k not in CROSS_ONLY}
        if d != 128:
            usable.pop("compile", None)  # each size compiles anew for ten seconds
        found.append(Case(
            "infonce", f"{negatives} N={n} D={d}", torch.bfloat16,
            lambda device, n=n, d=d: [_unit(n, d, torch.bfloat16, device) for _ in range(2)], ours,
            {name: lambda a, b, p=p, negatives=negatives: p(a, b, negatives, TEMPERATURE) for name, p in usable.items()},
            infonce_floor(negatives, n, d), lambda device, d=d: [_unit(32 if small else 2048, d, torch.bfloat16, device) for _ in range(2)],
            eager_bytes=12.0 * (n if negatives == "cross" else 2 * n) ** 2, target=targets.get((negatives, n, d)),
            fields={"negatives": negatives, "N": n, "D": d, "temperature": TEMPERATURE},
        ))  # fmt: skip
    return found


def crosscorr_cases(small: bool) -> list[Case]:
    def barlow(c):
        eye = torch.eye(len(c), device=c.device, dtype=c.dtype)
        return ((c - eye).square() * (eye + 5e-3 * (1 - eye))).sum()

    def plain(x, y):
        u, v = (F.batch_norm(t, None, None, training=True) for t in (x, y))
        return barlow((u.T @ v).float() / len(x))

    def floor(n, d, b):
        one = lambda c, values, flop: max(values * b / c["copy_bytes"], flop / c["bf16_flop"])  # noqa: E731
        return lambda c: one(c, 2 * n * d, 2 * n * d * d) + one(c, 4 * n * d, 4 * n * d * d)

    sizes = [(64, 16)] if small else [(65_536, 128), (262_144, 256), (786_432, 256), (1_048_576, 256)]
    found = []
    for n, d in sizes:
        for dtype in (torch.bfloat16, torch.float32) if n != 786_432 else (torch.bfloat16,):
            make = lambda device, n=n, d=d, dtype=dtype: [torch.randn(n, d, device=device).to(dtype).requires_grad_() for _ in range(2)]  # noqa: E731
            found.append(Case(
                "crosscorr", f"N={n} D={d}", dtype, make, lambda backend, x, y: barlow(crosscorr(x, y, backend=backend)), {"eager": plain},
                floor(n, d, _bytes(dtype)), lambda device, make=make: make(device, n=64 if small else 4096),
                eager_bytes=20.0 * n * d * 4, target=Target(1.12) if (n, dtype) == (1_048_576, torch.bfloat16) else None, fields={"N": n, "D": d},
            ))  # fmt: skip
    return found


def warp_cases(small: bool) -> list[Case]:
    found = []
    sizes = [(2, 16, 8, 20)] if small else [(8, 128, 128, 65_536), (8, 256, 128, 1000), (8, 256, 128, None), (48, 256, 128, None)]
    for (batch, channels, edge, points), last in ((size, last) for size in sizes for last in (True, False)):
        def make(device, batch=batch, channels=channels, edge=edge, points=points, last=last):
            f = torch.randn(batch, channels, edge, edge, device=device).bfloat16()
            f = f.contiguous(memory_format=torch.channels_last) if last else f
            theta = torch.eye(2, 3, device=device) + 0.1 * torch.randn(batch, 2, 3, device=device)
            drawn = None if points is None else torch.randperm(batch * edge * edge, device=device)[:points]
            return [f.requires_grad_(), theta, drawn]

        def ours(backend, f, theta, points):
            return _weighted(warp(f, theta, points=points, normalize=True, backend=backend)[0])

        def plain(f, theta, points):
            grid = F.affine_grid(theta, (len(f), 1, *f.shape[2:]), align_corners=True)
            rows = F.grid_sample(f.to(grid.dtype), grid, align_corners=True).movedim(1, -1).flatten(0, -2)  # coordinates in 16 bits would be off by pixels
            return _weighted(F.normalize(rows if points is None else rows[points]))

        count = batch * edge * edge if points is None else points
        whole, rows = batch * edge * edge * channels * 2, count * channels * 2
        found.append(Case(
            "warp", f"{batch}x{channels}x{edge}^2 P={points or 'all'} {'last' if last else 'first'}", torch.bfloat16, make, ours, {"eager": plain},
            lambda c, whole=whole, rows=rows: (min(whole, 4 * rows) + rows + rows + rows + whole) / c["copy_bytes"],
            lambda device, make=make, points=points: make(device, batch=1, edge=8 if small else 32, points=points and min(points, 40)), eager_bytes=6.0 * whole,
            target=Target(floors=2.0, over={"eager": 4.0}) if last else None, fields={"points": points, "layout": "last" if last else "first"},
        ))  # fmt: skip
    return found


def _weighted(rows: Tensor) -> Tensor:
    """A scalar whose gradient differs at every element."""
    return (rows.float() * torch.linspace(-1, 1, rows.shape[-1], device=rows.device)).square().sum()


def map_cases(small: bool) -> list[Case]:
    """joint, entropy, lncc, pool, align at the papers' sizes, float32 as their mixed-precision code runs them (bfloat16 features for pool and align)."""
    edge = 8 if small else 224
    batch = 2 if small else 18

    def logits(device):
        return [torch.randn(batch, 8 if small else 40, edge, edge, device=device, requires_grad=True) for _ in range(2)]

    def plain_joint(a, b):
        p = torch.einsum("bkp,blp->kl", a.flatten(2).softmax(1), b.flatten(2).softmax(1))
        return ((p + p.T) / (2 * p.sum())).square().sum()

    def one_map(device):
        return logits(device)[:1]

    def plain_entropy(a):
        p = a.softmax(1)
        return (p * p.log()).sum(1).square().mean()

    def maps(device):
        return [torch.rand(batch, 1, edge, edge, device=device, requires_grad=True), torch.rand(batch, 1, edge, edge, device=device)]

    def plain_lncc(i, j):
        i, j = i.double() if i.dtype == torch.float64 else i, j
        sums = [F.avg_pool2d(t, 5, 1, 2, divisor_override=1) for t in (i, j, i * i, j * j, i * j)]
        c, v, w = (s.clamp(min=1e-5) for s in (sums[4] - sums[0] * sums[1] / 25, sums[2] - sums[0] ** 2 / 25, sums[3] - sums[1] ** 2 / 25))
        return (c * c / (v * w)).mean()

    def regions(device):
        side = 8 if small else 128
        f = torch.randn(2 if small else 8, 64, side, side, device=device).bfloat16().contiguous(memory_format=torch.channels_last)
        at = torch.arange(side, device=device) // max(side // 14, 1)
        labels = (at[:, None] * 15 + at[None, :]).expand(len(f), -1, -1)
        return [f.requires_grad_(), labels.int().contiguous()]

    def plain_pool(f, labels, count=256):
        rows = f.float().movedim(1, -1).flatten(1, -2) if f.dtype != torch.float64 else f.movedim(1, -1).flatten(1, -2)
        index = labels.flatten(1).long().unsqueeze(2).expand_as(rows)
        sums = rows.new_zeros(len(f), count, f.shape[1]).scatter_add(1, index, rows)
        sizes = rows.new_zeros(len(f), count).scatter_add(1, labels.flatten(1).long(), rows.new_ones(rows.shape[:2]))
        return _weighted(sums / sizes.clamp(min=1).unsqueeze(2))

    def volumes(device):
        size = (4, 6, 6) if small else (16, 96, 96)
        f = [torch.randn(2, 32, *size, device=device).contiguous(memory_format=torch.channels_last_3d).requires_grad_() for _ in range(2)]
        grids = [torch.eye(3, 4, device=device).expand(2, -1, -1) + 0.1 * torch.randn(2, 3, 4, device=device) for _ in range(2)]
        return [*f, *grids]

    def cosine(dot, sq1, sq2):
        return (2 - 2 * dot / (sq1.clamp(min=1e-24).sqrt() * sq2.clamp(min=1e-24).sqrt())).mean()

    def plain_align(f1, f2, g1, g2):
        q, z = (
            F.grid_sample(f, F.affine_grid(g.to(f.dtype), (len(f), 1, *f1.shape[2:]), align_corners=False), align_corners=False, padding_mode="border")
            for f, g in ((f1, g1), (f2, g2))
        )
        return cosine((q * z).sum(1), (q * q).sum(1), (z * z).sum(1))

    def traffic(make, factor):
        values = sum(t.numel() * t.element_size() for t in make("meta") if t.is_floating_point())
        return lambda c: factor * values / c["copy_bytes"]

    rows = [
        ("joint", torch.float32, logits, lambda backend, a, b: joint(a, b, backend=backend).square().sum(), plain_joint, 3),
        ("entropy", torch.float32, one_map, lambda backend, a: entropy(a, backend=backend).square().mean(), plain_entropy, 3),
        ("lncc", torch.float32, maps, lambda backend, i, j: lncc(i, j, backend=backend).mean(), plain_lncc, 3.5),
        ("pool", torch.bfloat16, regions, lambda backend, f, labels: _weighted(pool(f, labels, regions=256, backend=backend)[0]), plain_pool, 2),
        ("align", torch.float32, volumes,
         lambda backend, f1, f2, g1, g2: cosine(*align(f1, f2, g1, g2, backend=backend)[:3]), plain_align, 3),
    ]  # fmt: skip
    return [
        Case(op, "paper", dtype, make, ours, {"eager": plain}, traffic(make, factor), make, eager_bytes=20e9)
        for op, dtype, make, ours, plain, factor in rows
    ]


def all_cases(peers: dict[str, Callable], small: bool = False) -> list[Case]:
    """Every case, `small` for a rehearsal."""
    return [*infonce_cases(peers or {"eager": eager}, small), *crosscorr_cases(small), *warp_cases(small), *map_cases(small)]


# op -> the composition that is the truth where no peer is measured, because none could hold it.
EAGER = {"infonce": lambda case: lambda a, b: eager(a, b, case.fields["negatives"], TEMPERATURE)}


def gradients(function: Callable, inputs: list) -> list[Tensor]:
    """The value and the gradient of every input that wants one."""
    for t in inputs:
        if isinstance(t, Tensor) and t.requires_grad:
            t.grad = None
    value = function(*inputs)
    value.backward()
    return [value.detach(), *(t.grad for t in inputs if isinstance(t, Tensor) and t.requires_grad)]


def in_float64(inputs: list) -> list:
    """The same inputs in float64, new leaves."""
    def one(t):
        if not isinstance(t, Tensor) or not t.is_floating_point():
            return t
        return t.detach().double().requires_grad_(t.requires_grad)

    return [one(t) for t in inputs]
