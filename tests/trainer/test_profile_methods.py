"""The parts of a step of every method: told apart by where networks are called and left, without changing the step."""

from itertools import repeat

import pytest
import torch

from pix2rep.config import load
from pix2rep.profile import PARTS, READING, Profiled
from pix2rep.synthetic import synthetic
from pix2rep.training import Training

TINY = (
    "data.size=32,32 network.channels=4,4,8,8,8 network.features=8 network.head_hidden=8 network.projection=8 pretrain.device=cpu pretrain.threads=1"
).split()
NO_AVERAGE = tuple(part for part in PARTS if part not in (READING, "moving average"))


def profiled(*overrides):
    made = Profiled(load(None, [*TINY, *overrides]), 2, torch.device("cpu"))
    made.step("ours")
    return made


METHODS = {
    "simclr": "simclr.head_hidden=8 simclr.projection=8",
    "bim": "bim.heads=2 bim.clusters=4 bim.encoder_weight=1",
    "lrc": "lrc.queue=8 lrc.global_hidden=8 lrc.global_projection=8 lrc.max_regions=32",
    "pgl": "network.dims=3 data.size=32,32,32 pgl.head_hidden=8 pgl.projection=8 pgl.global_weight=1",
}


@pytest.mark.parametrize("method", METHODS)
def test_every_methods_step_is_the_trainers(method):
    """Marked or not, the same weights; every part of the step is there, backward as often in the loss and the networks as they alternate."""
    made = profiled(f"loss.method={method}", *METHODS[method].split())
    parts = made.memory("ours")
    assert tuple(parts) == (NO_AVERAGE if method in ("bim", "simclr") else (*NO_AVERAGE, "moving average"))
    assert abs(sum(part.added for part in parts.values())) <= 16 + (512 if method == "lrc" else 0)  # lrc: keys of the queue
    assert all(seconds > 0 for seconds in made.seconds("ours").values())
    plain = Training(made.config, torch.device("cpu"), source=None)
    for step in range(3):
        plain.step(step, repeat(synthetic(made.config, 2, plain.method.needs)), monitor=False)
    for module in ("backbone", "method"):
        mine, theirs = (getattr(training, module).state_dict() for training in (made.training, plain))
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_backward_of_the_loss_is_told_from_that_of_the_networks():
    """Whatever runs inside the loss, or inside a head, runs in that part, forward and backward."""
    for who, expected in (("loss", ["loss forward", "loss backward"]), ("heads", ["heads", "networks backward"])):
        made, marks, seen = profiled("loss.method=bim", "bim.heads=1", "bim.clusters=4"), [], []
        method = made.training.method
        module = method.loss if who == "loss" else method.heads[0]

        def spy(_, given, out, marks=marks, seen=seen):
            seen.append(marks[-1])
            return Spy.apply(out, lambda: seen.append(marks[-1]))

        module.register_forward_hook(spy)
        made.step("ours", marks.append)
        assert list(dict.fromkeys(seen)) == expected and len(seen) == 2 * (1 if who == "loss" else 2)


class Spy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, told):
        ctx.told = told
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        ctx.told()
        return grad, None
