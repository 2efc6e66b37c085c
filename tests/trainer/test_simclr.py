"""SimCLR in the trainer: a step against plain float64, what it trains, resuming, learning, refusals."""

import copy
import math
from itertools import repeat

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from pix2rep.config import ConfigError, load
from pix2rep.methods import build_method, load_method
from pix2rep.methods.base import Batch
from pix2rep.networks import build_backbone
from pix2rep.pretrain import run
from pix2rep.training import Training
from volumes import dataset

TINY = (
    "loss.method=simclr data.size=32,32 network.channels=4,4,8,8,8 network.features=8 simclr.head_hidden=8 simclr.projection=6 split.val=0.2"
    " split.test=0.2 pretrain.batch_size=4 pretrain.device=cpu pretrain.threads=1 pretrain.lr=3e-3 pretrain.log_every=2"
).split()
SOLID = ["network.dims=3", "data.size=16,16,16"]
PLAIN = [f"photometric.{key}=0" for key in ("noise_p", "blur_p", "gamma_p", "bias_p", "invert_p")]


@pytest.fixture(scope="module")
def volumes(tmp_path_factory):
    root = tmp_path_factory.mktemp("volumes")
    dataset(root, patients=6)
    return root


def made(extra=()):
    """Config, backbone and method, all float64, and a batch of five images, two in 3D."""
    config = load(None, [*TINY, *PLAIN, *extra])
    torch.manual_seed(0)
    backbone = build_backbone(config.network)
    method = build_method(config, backbone)
    images = torch.rand(5, 1, *config.data.size, dtype=torch.float64)
    batch = Batch(images, depths=torch.tensor([0.1, 0.2, 0.5, 0.6, 0.9]))
    if config.network.dims == 3:
        batch = Batch(images[:2], spacing=torch.tensor([[3.0, 1.0, 1.5], [1.0, 1.0, 1.0]]))
    return config, backbone.double().train(), method.double(), batch


def plain_loss(config, backbone, method, views, parts):
    """NT-Xent with loops over rows; parts: of each image, equal where two images are positives."""
    maps = backbone.encode(views)[-1]
    rows = torch.stack([method.head(m.flatten(1).mean(1)) for m in maps])
    rows = [row / row.norm() for row in rows]
    parts, terms = list(parts) * 2, []
    for i, anchor in enumerate(rows):
        others = [j for j in range(len(rows)) if j != i]
        everything = sum((anchor @ rows[j] / config.simclr.temperature).exp() for j in others)
        positives = [j for j in others if parts[j] == parts[i]]
        terms.append(sum(-((anchor @ rows[j] / config.simclr.temperature).exp() / everything).log() for j in positives) / len(positives))
    return sum(terms) / len(terms)


@pytest.mark.parametrize(
    ("extra", "parts"),
    [([], range(5)), (["simclr.positives=position", "simclr.temperature=0.4"], (0, 0, 1, 1, 2)), (SOLID, range(2))],
    ids=["image", "position", "3d"],
)
def test_one_step_is_the_formula(extra, parts):
    config, backbone, method, batch = made(extra)
    twin, twin_method = copy.deepcopy((backbone, method))
    loss, stats = method.step(backbone, batch, torch.Generator().manual_seed(1), monitor=True)
    loss.backward()

    generator, views = torch.Generator().manual_seed(1), []
    for _ in range(2):
        method.photometric(batch.images, generator)
        grid = F.affine_grid(method.spatial(len(batch.images), config.data.size, generator, spacing=batch.spacing), batch.images.shape, align_corners=True)
        views.append(F.grid_sample(batch.images, grid.double(), align_corners=True))
    assert (views[0] - views[1]).abs().mean() > 0.05
    expected = plain_loss(config, twin, twin_method, torch.cat(views), parts)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
    trained = [(p, q) for p, q in zip((*backbone.parameters(), *method.parameters()), (*twin.parameters(), *twin_method.parameters()), strict=True)]
    for ours, theirs in trained:
        assert (ours.grad is None) == (theirs.grad is None)
        if ours.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-6, atol=1e-10)
    assert all(p.grad is None for p in backbone.upcat_1.parameters()) and backbone.conv_0.conv_0.conv.weight.grad.abs().sum() > 0
    assert stats.keys() == {"alignment", "uniformity", "dead_dimensions"} and all(math.isfinite(value) for value in stats.values())


def test_views_are_noisy_each_in_its_own_way():
    config, backbone, method, batch = made(["spatial.rotation=0", "spatial.scale=1,1", "spatial.flip=0", "photometric.noise_p=1"])
    generator = torch.Generator().manual_seed(1)
    first, second = (method.view(batch, generator) for _ in range(2))
    assert all(0.001 < (view - batch.images).abs().mean() < 0.1 for view in (first, second)) and (first - second).abs().mean() > 0.001


@pytest.mark.parametrize("extra", [[], ["simclr.positives=position"]], ids=["image", "position"])
def test_the_loss_falls(extra):
    gentle = ["spatial.rotation=10", "spatial.scale=0.8,1", "simclr.head_hidden=32", "simclr.temperature=0.2"]
    config = load(None, [*TINY, *PLAIN, *gentle, *extra, "pretrain.lr=1e-2"])
    x, y = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")
    images = torch.stack([(x / (k + 1) + y * k / 5).sin() * k / 10 + k / 6 for k in range(6)])[:, None]
    training = Training(config, torch.device("cpu"), source=None)
    batch = Batch(images, depths=(torch.arange(6) + 0.5) / 6)
    for step in range(20):
        training.step(step, repeat(batch), monitor=False)
    training.collect(20)
    assert np.mean(training.losses[-4:]) < np.mean(training.losses[:4]) - 0.15, training.losses


def test_mixed_precision_contrasts_float32_rows():
    training = Training(load(None, [*TINY, "pretrain.amp=bf16"]), torch.device("cpu"), source=None)
    seen = []
    training.method.head.register_forward_hook(lambda *of: seen.append(of[2].dtype))
    training.step(0, repeat(Batch(torch.rand(4, 1, 32, 32))), monitor=True)
    assert seen == [torch.bfloat16] and training.pending[0].dtype == torch.float32 and training.collect(1) is None


@pytest.mark.parametrize("extra", [["simclr.positives=position"], SOLID], ids=["position", "3d"])
def test_resumed_run_is_bitwise_the_uninterrupted_one(volumes, tmp_path, monkeypatch, extra):
    config, real, calls = load(None, [*TINY, *extra, "pretrain.steps=4", "pretrain.checkpoint_every=2"]), Training.step, []
    run(volumes, tmp_path / "whole", config)

    def step(self, number, batches, monitor):
        calls.append(number)
        if number == 3 and calls.count(3) == 1:
            raise ZeroDivisionError("power cut")
        return real(self, number, batches, monitor)

    monkeypatch.setattr(Training, "step", step)
    with pytest.raises(ZeroDivisionError):
        run(volumes, tmp_path / "parts", config)
    torch.rand(7)
    run(volumes, tmp_path / "parts", config, resume=True)
    assert calls == [0, 1, 2, 3, 2, 3]
    whole, parts = (load_file(tmp_path / name / "weights.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert not any(parts[name] for name in parts if name.startswith("upcat") and name.endswith("num_batches_tracked"))
    heads = [load_method(tmp_path / name)[0].state_dict() for name in ("whole", "parts")]
    assert heads[0].keys() == heads[1].keys() and all(torch.equal(heads[0][name], heads[1][name]) for name in heads[0])


def test_refusals():
    backbone = torch.nn.Conv2d(1, 6, 1)
    with pytest.raises(ValueError, match="pretrain.batch_size must be at least 2 for loss.method=simclr.*got 1"):
        build_method(load(None, [*TINY, "pretrain.batch_size=1"]), backbone)
    with pytest.raises(ValueError, match="network.dims must be 2 for simclr.positives=position.*got 3"):
        build_method(load(None, [*TINY, *SOLID, "simclr.positives=position"]), backbone)
    with pytest.raises(ValueError, match="loss.method=simclr needs a backbone with encode, decode and encoder_channels, got Conv2d"):
        build_method(load(None, TINY), backbone)
    with pytest.raises(ConfigError, match="simclr.temperature must be at least 0.01, got 0.001"):
        load(None, ["simclr.temperature=0.001"])
