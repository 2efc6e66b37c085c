"""Mixed precision and compilation: a step of every method against float64, skipped steps, torch.compile."""

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from small import Small

from pix2rep.config import load
from pix2rep.methods import build_method
from pix2rep.methods.base import Batch, Network
from pix2rep.training import Training
from pix2rep_kernels import native
from sweep import FULL

if reason := native.why_missing("cpu"):
    pytest.skip(reason, allow_module_level=True)

CPU = torch.device("cpu")
TINY = (
    "network.name=small:Small network.features=6 network.head_hidden=8 network.projection=8 loss.num_samples=64 bim.heads=2 bim.clusters=5"
    " bim.encoder_weight=1 bim.encoder_hidden=8 bim.encoder_projection=8 lrc.queue=6 lrc.global_hidden=8 lrc.global_projection=6 lrc.min_pixels=3"
    " pgl.head_hidden=8 pgl.projection=6 pretrain.batch_size=4 pretrain.device=cpu pretrain.threads=1 pretrain.schedule=constant pretrain.warmup=0"
).split()
SOLID = ["network.dims=3", "data.size=8,16,16"]
CASES = {
    "pix2rep": ["loss.method=pix2rep"],
    "barlow-3d": ["loss.method=pix2rep", "loss.objective=barlow", "loss.num_samples=null", *SOLID],
    "bim": ["loss.method=bim"],
    "bim-3d": ["loss.method=bim", "bim.window=3", *SOLID],
    "lrc": ["loss.method=lrc"],
    "lrc-3d": ["loss.method=lrc", "lrc.keys=online", *SOLID],
    "pgl": ["loss.method=pgl", "pgl.global_weight=1", *SOLID],
    "pgl-before": ["loss.method=pgl", "pgl.align=before", "pgl.where=decoder", "pgl.points=4,6,6", *SOLID],
}
TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
SCALE = 2.0**8  # of the loss, as GradScaler's: small gradients are no fp16 numbers


def batch_of(config) -> Batch:
    size, generator = (16, 16) if config.network.dims == 2 else config.data.size, torch.Generator().manual_seed(1)
    count, d = 4, len(size)
    images = torch.rand(count, 1, *[n // 2 for n in size], generator=generator)
    crops = torch.stack([F.interpolate(images, size, mode="bilinear" if d == 2 else "trilinear"), torch.rand(count, 1, *size, generator=generator)])
    edges = torch.rand(2, 2, count, d, generator=generator) * torch.tensor(size)
    regions = (torch.arange(size[-1]) // 4).int().expand(count, *size).contiguous()
    return Batch(
        crops[0], regions, crops, torch.stack([edges.amin(0), edges.amax(0)]), torch.tensor([3.0, 1, 1][-d:]).expand(count, d),
        torch.tensor([0.1, 0.9, 0.5, 0.4]), torch.arange(count),
    )  # fmt: skip


class Step:
    """One step of a method whose networks are called by `call(method, function, *inputs)`."""

    def __init__(self, config, models, call):
        backbone, self.method = models
        real = self.method.call
        self.outputs: list = []

        def recorded(function, *inputs):
            outputs = call(real, function, *inputs)
            for tensor in outputs if isinstance(outputs, list) else [outputs]:
                if tensor.requires_grad:
                    tensor.retain_grad()
            self.outputs.append(outputs)
            return outputs

        self.method.call = recorded
        generator = torch.Generator().manual_seed(2)
        self.loss, self.stats = self.method.step(Network(self.method, backbone), batch_of(config), generator, monitor=True)
        (self.loss * SCALE).backward()
        self.weights = [p for p in (*backbone.parameters(), *self.method.parameters()) if p.grad is not None]

    def gradient(self):
        return torch.cat([p.grad.double().flatten() for p in self.weights]) / SCALE

    def leaves(self):
        return [t for outputs in self.outputs for t in (outputs if isinstance(outputs, list) else [outputs])]


def cast(value, dtype):
    if isinstance(value, list):
        return [cast(entry, dtype) for entry in value]
    return value.to(dtype) if isinstance(value, torch.Tensor) else value


def made(name, amp):
    config = load(None, [*TINY, *CASES[name]])
    torch.manual_seed(0)
    backbone = Small(config.network)
    method = build_method(config, backbone)
    method.autocast = lambda: torch.autocast("cpu", TYPES[amp])
    for weight in method.parameters():  # a moving average that is not the network
        if not weight.requires_grad:
            weight.data.add_(0.1 * torch.randn(weight.shape))
    return config, (backbone.train(), method.train())


@pytest.mark.parametrize("amp", TYPES)
@pytest.mark.parametrize("name", CASES)
def test_only_the_networks_are_in_low_precision(name, amp):
    config, models = made(name, amp)
    double = tuple(copy.deepcopy(model).double() for model in models)
    double[1].autocast = lambda: torch.autocast("cpu", enabled=False)
    surrogate, untouched = copy.deepcopy(models), copy.deepcopy(models)
    if config.loss.method == "lrc":
        surrogate[1].queue = surrogate[1].queue.double()

    ours = Step(config, models, lambda call, *inputs: call(*inputs))
    assert {t.dtype for t in ours.leaves()} == {TYPES[amp]}
    assert ours.loss.dtype == torch.float32 and all(p.dtype == p.grad.dtype == torch.float32 for p in ours.weights)
    assert ours.stats and all(math.isfinite(value) for value in ours.stats.values())
    assert all(b.dtype == torch.float32 for b in models[1].buffers() if b.is_floating_point())

    # The rest in float64 and in float32 on the same outputs: float32 is all that the loss loses, its gradient one rounding to the outputs'
    # type beside it. Pix2Rep's interpolated rows, and their gradients, are of that type too.
    def replayed(models, dtype):
        recorded = iter(ours.outputs)

        def fresh(t):
            return t.detach().to(dtype).requires_grad_(t.requires_grad)

        def call(*_):
            outputs = next(recorded)
            return [fresh(t) for t in outputs] if isinstance(outputs, list) else fresh(outputs)

        return Step(config, models, call)

    exact, single = replayed(copy.deepcopy(double), torch.float64), replayed(untouched, torch.float32)
    compared = [three for three in zip(ours.leaves(), exact.leaves(), single.leaves(), strict=True) if three[1].grad is not None]
    unit, tiny = torch.finfo(TYPES[amp]).eps / 2, torch.finfo(TYPES[amp]).tiny * torch.finfo(TYPES[amp]).eps
    extra = 1 if config.loss.method == "pix2rep" else 0
    shift = extra * unit * sum((right * right.grad).abs().sum() for _, right, _ in compared) / SCALE  # by rows that are all wrong by a unit
    assert abs(ours.loss - exact.loss) <= 4 * torch.finfo(torch.float32).eps * abs(exact.loss) + shift
    for mine, right, near in compared:
        limit = (1 + 2 * extra) * unit * right.grad.norm() + tiny * right.numel() ** 0.5 + 2 * (near.grad - right.grad).norm()
        assert (mine.grad.double() - right.grad).norm() <= limit < 0.02 * right.grad.norm()

    # Against float64 throughout: not much further than networks alone in low precision are.
    truth = Step(config, double, lambda call, function, *inputs: call(function, *cast(list(inputs), torch.float64)))
    alone = Step(config, surrogate, lambda call, function, *inputs: cast(call(function, *cast(list(inputs), torch.float32)), torch.float64))
    assert abs(ours.loss - truth.loss) <= 2 * abs(alone.loss - truth.loss) + 1e-6 * abs(truth.loss) + shift
    far, limit = ((step.gradient() - truth.gradient()).norm() for step in (ours, alone))
    assert far <= 1.25 * limit < 0.75 * truth.gradient().norm() and ours.gradient().isfinite().all()


def trained(name, *extra):
    config = load(None, [*TINY, *CASES[name], *extra])
    return Training(config, CPU, source=None), itertools.repeat(batch_of(config))


AVERAGES = {"lrc": {"momentum": "", "momentum_head": "head"}, "pgl": {"target.backbone": "", "target.projector": "heads.projector"}}  # of what


def rescaled(training, scale):
    training.scaler.load_state_dict(training.scaler.state_dict() | {"scale": scale})


@pytest.mark.parametrize("name", ["pix2rep", "bim", "lrc", "pgl"])
def test_a_skipped_step_leaves_weights_and_moves_average_and_queue(name):
    """An overflow in fp16: the optimiser skips, what comes of the forward pass stays valid."""
    training, batches = trained(name, "pretrain.amp=fp16", "lrc.momentum=0.5", "pgl.momentum=0.5")
    method = training.method
    averages = AVERAGES.get(name, {})
    with torch.no_grad():
        for average in averages:
            for weight in method.get_submodule(average).parameters():
                weight.add_(1)
    before = copy.deepcopy((training.parameters, method.state_dict()))
    rescaled(training, 2.0**60)
    training.step(0, batches, monitor=False)
    assert training.scaler.get_scale() < 2.0**60 and not training.optimizer.state
    assert all(torch.equal(*pair) for pair in zip(training.parameters, before[0], strict=True))
    for average, source in averages.items():
        online = method.get_submodule(source) if source else training.backbone
        for (key, weight), theirs in zip(method.get_submodule(average).named_parameters(), online.parameters(), strict=True):
            torch.testing.assert_close(weight, (before[1][f"{average}.{key}"] + theirs) / 2)
    if name == "lrc":
        assert method.queue_ids.tolist() == [0, 1, 2, 3, -1, -1] and not method.keys
        assert not torch.equal(method.queue[:4], before[1]["queue"][:4]) and torch.equal(method.queue[4:], before[1]["queue"][4:])
        torch.testing.assert_close(method.queue.norm(dim=1), torch.ones(6))
    rescaled(training, 2.0**6)
    training.step(1, batches, monitor=False)
    assert training.scaler.get_scale() == 2.0**6 and training.collect(2) is None and training.weights_are_finite()
    assert not any(torch.equal(*pair) for pair in zip(training.parameters[:4], before[0], strict=False))


UNET = "network.name=basicunet network.channels=4,4,8,8,8 network.features=8"
# Of the two losses. Where pooled values tie, rounding picks the one that gets the gradient; in bf16 fused layers round less often.
RELATIVE = {"": (1e-4, 1e-4), UNET: (1e-4, 1e-2), f"{UNET} pretrain.amp=bf16": (1e-2, 1e-1)}
COMPILED = [(name, "eager", "") for name in ("bim", "lrc", "pgl")]
if FULL:  # a minute a case, most of it the C++ compiler's
    COMPILED += [(name, "inductor", "") for name in ("bim", "lrc", "pgl")]
    # Not PGL's: on the CPU PyTorch 2.13 compiles the 3D U-Net's norms over a small bottleneck in bf16 to NaN.
    COMPILED += [(name, "inductor", options) for name in ("bim", "lrc") for options in RELATIVE if options]


@pytest.mark.parametrize(("name", "backend", "options"), COMPILED)
def test_compiled_steps_are_the_steps(name, backend, options, monkeypatch):
    compiled, real = [], torch.compile
    torch.compiler.reset()

    def spied(function):
        compiled.append(function)
        return real(function, backend=backend)

    monkeypatch.setattr(torch, "compile", spied)
    losses = []  # SGD: AdamW's first step is the gradient's sign, which rounding may turn
    for extra in ([], ["pretrain.compile=true"]):
        training, batches = trained(name, "pretrain.optimizer=sgd", "pretrain.lr=1e-3", *options.split(), *extra)
        for step in range(2):
            training.step(step, batches, monitor=step == 1)
        losses.append([loss.item() for loss in training.pending])
    first, second = (pytest.approx(loss, rel=rel) for loss, rel in zip(losses[0], RELATIVE[options], strict=True))
    assert losses[1][0] == first and losses[1][1] == second
    assert losses[0][0] != losses[0][1] and len(compiled) == len(set(compiled)) >= 2
