"""Two ranks give the loss, and after DistributedDataParallel's mean the gradients, of one process that has every row. float64, gloo, real DDP."""

import datetime

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import pix2rep_kernels
from pix2rep_kernels import Pix2RepLoss, distributed
from pix2rep_kernels.testing import error

RANKS, ROWS, BATCH = 2, 6, 2  # rows and images of a rank
TOLERANCE = 1e-12  # float64: the two ways differ in the order of sums


class Net(nn.Module):
    """Two maps [B, 3, H, W] or sets of rows [N, 3] to features with 4 channels, and a temperature to learn."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3, dtype=torch.float64))
        self.temperature = nn.Parameter(torch.tensor(0.4, dtype=torch.float64))

    def forward(self, *views):
        return *(torch.einsum("dc,nc...->nd...", self.weight, x) + self.temperature * x[:, :1] for x in views), self.temperature


def problem():
    """Global batch; the second rank's data are twice the first's plus 1."""
    torch.manual_seed(0)
    scale, shift = torch.tensor([1.0, 2.0]), torch.tensor([0.0, 1.0])
    rows = [torch.randn(RANKS, ROWS, 3).double() * scale[:, None, None] + shift[:, None, None] for _ in range(2)]
    maps = [torch.randn(RANKS, BATCH, 3, 4, 5).double() * scale[:, None, None, None, None] + shift[:, None, None, None, None] for _ in range(2)]
    theta = (torch.eye(2, 3) * 0.8 + 0.2 * torch.randn(RANKS, BATCH, 2, 3)).double()
    return {
        "rows": rows, "maps": maps, "theta": theta,
        "valid": torch.rand(RANKS, ROWS) < 0.7, "ids": torch.randint(4, (RANKS, ROWS)), "queue": F.normalize(torch.randn(5, 4).double(), dim=1),
        "positive": torch.stack([torch.randperm(ROWS) for _ in range(RANKS)]), "mask": torch.rand(RANKS, BATCH, 4, 5) < 0.6,
        "weight": torch.rand(RANKS, ROWS).double(), "points": torch.stack([torch.randperm(BATCH * 20)[:9] for _ in range(RANKS)]),
    }  # fmt: skip


def part(t, rank):
    """One rank's part of [RANKS, n, ..]; of all ranks where rank is None."""
    return t.flatten(0, 1) if rank is None else t[rank]


def offset(index, step, rank):
    """An index into a rank's own rows, as one into the rows of all where rank is None."""
    return (index + torch.arange(RANKS)[:, None] * step).flatten() if rank is None else index[rank]


def contrast(negatives, *, masks=False, ids=False, positive=False, queue=False, wider=False):
    def loss(net, data, rank):
        module = distributed if rank is not None else pix2rep_kernels
        a, b, tau = net(*(part(x, rank) for x in data["rows"]))
        a, b = F.normalize(a, dim=1), F.normalize(b, dim=1)
        extra = {"valid_a": part(data["valid"], rank)} if masks else {}
        extra |= {"ids_a": part(data["ids"], rank)} if ids else {}
        extra |= {"positive": offset(data["positive"], ROWS, rank)} if positive else {}
        extra |= {"queue": data["queue"]} if queue else {}
        if wider:  # fewer anchors than candidates, masks and ids of both
            a = a.unflatten(0, (-1, ROWS))[:, :2].flatten(0, 1)
            keep = slice(0, 2)
            extra = {"valid_a": part(data["valid"][:, keep], rank), "ids_a": part(data["ids"][:, keep], rank), "ids_b": part(data["ids"], rank)}
            extra["positive"] = offset(data["positive"][:, keep], ROWS, rank)
        losses = module.infonce(a, b, temperature=tau, negatives=negatives, **extra)
        return distributed.mean(losses)

    return loss


def correlated(normalization="batchnorm", weighted=False, uneven=False):
    def loss(net, data, rank):
        module = distributed if rank is not None else pix2rep_kernels
        x, y = data["rows"]
        weight = data["weight"] if weighted else None
        if uneven:  # the second rank has two rows fewer
            x, y = ([t[0], t[1][:-2]] for t in (x, y))
            x, y = ([torch.cat(t)] if rank is None else [t[rank]] for t in (x, y))
        else:
            x, y = [part(x, rank)], [part(y, rank)]
        x, y, _ = net(x[0], y[0])
        c = module.crosscorr(x, y, normalization=normalization, weight=None if weight is None else part(weight, rank))
        return (c - torch.eye(4)).square().sum()

    return loss


def pixels(mask=False, points=True, idle=False, **options):
    def loss(net, data, rank):
        gather = rank is not None
        f1, f2, _ = net(*(part(x, rank) for x in data["maps"]))
        allowed = data["mask"] & torch.tensor([True, not idle]).view(RANKS, 1, 1, 1)  # idle: the second rank has no valid pixel
        extra = {"mask": part(allowed, rank)} if mask else {}
        extra |= {"points": offset(data["points"], BATCH * 20, rank)} if points else {}
        return Pix2RepLoss(**{"num_samples": None, **options}, gather_distributed=gather)(f1, f2, part(data["theta"], rank), **extra)

    return loss


CASES = {
    "joint": contrast("joint"), "cross": contrast("cross"), "forward": contrast("forward"),
    **{f"{kind}, masks, ids, positives": contrast(kind, masks=True, ids=True, positive=True) for kind in ("joint", "cross", "forward")},
    **{f"{kind}, positives": contrast(kind, positive=True) for kind in ("joint", "cross")},
    "joint, queue": contrast("joint", queue=True), "forward, queue, ids": contrast("forward", queue=True, ids=True),
    "forward, more candidates": contrast("forward", wider=True),
    **{f"crosscorr, {kind}": correlated(kind) for kind in ("batchnorm", "std", "none")},
    "crosscorr, weights": correlated(weighted=True), "crosscorr, uneven": correlated(uneven=True),
    "Pix2RepLoss, all pixels": pixels(points=False), "Pix2RepLoss, points": pixels(), "Pix2RepLoss, mask": pixels(mask=True, outside="drop"),
    **{f"Pix2RepLoss, {kind}, an idle rank": pixels(mask=True, idle=True, objective=kind) for kind in ("infonce", "barlow")},
    "Pix2RepLoss, an image each": pixels(points=False, mask=True, per_image=True),
    "Pix2RepLoss, barlow": pixels(objective="barlow", points=False), "Pix2RepLoss, barlow, mask": pixels(mask=True, objective="barlow", outside="drop"),
}  # fmt: skip


def found(case, net, rank):
    """[loss, gradients of the net's parameters]."""
    net.zero_grad()
    loss = CASES[case](net, problem(), rank)
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in net.parameters())]


def refusal(call):
    try:
        call()
    except ValueError as caught:
        return str(caught)
    return "none"


def work(rank, folder):
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=RANKS, timeout=timeout)
    torch.manual_seed(1)
    net = DistributedDataParallel(Net())
    results = {case: found(case, net, rank) for case in CASES}
    few = torch.randn(4 + rank, 3)
    results["rows"] = refusal(lambda: distributed.infonce(few, few, temperature=0.5))
    same = torch.randn(4, 3)
    valid = torch.ones(4, dtype=torch.bool) if rank else None
    results["masks"] = refusal(lambda: distributed.infonce(same, same, temperature=0.5, valid_a=valid))
    results["groups"] = refusal(lambda: distributed.infonce(same.unsqueeze(0), same.unsqueeze(0), temperature=0.5))
    half = same.half().requires_grad_()
    gathered = distributed.gather(half)
    (gathered * (rank + 1)).sum().backward()
    results["half"] = half.grad
    results["order"] = distributed.gather(torch.full((2,), rank))
    results["drawn"] = len(Pix2RepLoss(num_samples=5, gather_distributed=True)._draw(1, 20, None, torch.device("cpu"), None))
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    multiprocessing.spawn(work, (str(folder),), nprocs=RANKS)
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_are_one_process(ranks, case):
    torch.manual_seed(1)
    want = found(case, Net(), None)
    assert want[0] > 0 and want[1].norm() > 0
    for results in ranks:  # each returns the global loss
        for got, expected in zip(results[case], want, strict=True):
            assert error([got], [expected]) < TOLERANCE


def test_ranks_that_differ_are_refused_on_every_rank(ranks):
    for results in ranks:
        assert "rows of `a` must be the same on every rank, got 4 on rank 0, 5 on rank 1 (drop the last batch" in results["rows"]
        assert "`valid_a` (0: not given) must be the same on every rank, got 0 on rank 0, 1 on rank 1" in results["masks"]
        assert "`a` must have shape [N, D] over ranks" in results["groups"]


def test_gather_keeps_order_and_adds_gradients(ranks):
    for results in ranks:
        assert results["order"].tolist() == [0, 0, 1, 1]
        assert results["half"].dtype == torch.float16 and results["half"].tolist() == [[3.0] * 3] * 4


def test_samples_are_those_of_the_global_batch(ranks):
    assert [results["drawn"] for results in ranks] == [3, 3]  # of 5


@pytest.mark.parametrize("case", ["joint", "cross", "forward", "crosscorr, batchnorm", "Pix2RepLoss, points", "Pix2RepLoss, barlow"])
def test_without_a_process_group_all_is_local(case, monkeypatch):
    torch.manual_seed(1)
    net = Net()
    want = found(case, net, None)
    monkeypatch.setattr(f"{__name__}.part", lambda t, rank: t.flatten(0, 1))
    monkeypatch.setattr(f"{__name__}.offset", lambda index, step, rank, offset=offset: offset(index, step, None))
    got = found(case, net, 0)
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))
    assert distributed.ranks() == 1
