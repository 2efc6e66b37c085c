"""Methods beyond Pix2Rep: a step is its paper's formulas, resumes bitwise, and learns; what all methods share."""

import copy
import math
from itertools import repeat

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from small import Small
from torch import nn

from pix2rep.config import ConfigError, NetworkConfig, PretrainConfig, load
from pix2rep.data.cache import prepare
from pix2rep.data.discover import discover
from pix2rep.data.phantom import write_phantoms
from pix2rep.data.slices import SliceSource
from pix2rep.methods import build_method, load_method
from pix2rep.methods.base import Batch
from pix2rep.methods.bim import cluster_map
from pix2rep.monitor import clustering
from pix2rep.networks import move_towards
from pix2rep.optimizers import build_optimizer
from pix2rep.pretrain import run
from pix2rep.training import Training

CPU = torch.device("cpu")
TINY = (
    "loss.method=bim data.size=32,32 data.spacing=null network.channels=4,4,8,8,8 network.features=8 bim.heads=2 bim.clusters=5 bim.encoder_hidden=8"
    " bim.encoder_projection=8 split.val=0.2 split.test=0.2 pretrain.batch_size=4 pretrain.device=cpu pretrain.threads=1 pretrain.lr=3e-3"
).split()


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    root = tmp_path_factory.mktemp("phantoms")
    write_phantoms(root, patients=5, seed=0, size=32)
    return root


@pytest.fixture(scope="module")
def source(phantoms, tmp_path_factory):
    config = load(None, TINY)
    prepared = prepare(discover(phantoms), config.data, tmp_path_factory.mktemp("cache"))
    return SliceSource(prepared, prepared.patients, config.data.size)


@pytest.fixture(scope="module")
def batch(source):
    indices = np.linspace(0, len(source) - 1, 6).astype(int)
    return Batch(source.batch(indices)[0], depths=source.depths(indices))


def small(dims):
    return Small(NetworkConfig(dims=dims, features=6))


def written_out(config, backbone, heads, encoder_head, view_1, view_2, theta, depths):
    """A step's loss by the formulas of the papers, in the dtype of the views, every sum over displacements and pairs spelt out."""
    opt, d = config.bim, view_1.ndim - 2
    maps = backbone.encode(torch.cat([view_1, view_2]))
    f, f_t = backbone.decode(maps, view_1.shape[2:]).chunk(2)
    grid = F.affine_grid(theta, f.shape, align_corners=False)
    f = F.grid_sample(f, grid, mode="nearest", padding_mode="zeros", align_corners=False)
    squares = sum((view_2 - view_2.roll(1, axis)) ** 2 for axis in range(2, d + 2))
    edges = scaled(squares.sqrt().mean(1)) ** opt.power
    total = 0
    for head in heads:
        a, b = (head(x).movedim(1, -1).softmax(-1) for x in (f, f_t))
        joint = torch.einsum("...i,...j->ij", a, b) / a[..., 0].numel()
        joint = (joint + joint.T) / 2
        marginal = joint.sum(0)
        target = opt.alpha * torch.eye(len(joint)).to(joint) / len(joint) + (1 - opt.alpha) * joint
        logs = (marginal[:, None] + 1e-5).log() + (marginal[None] + 1e-5).log()
        information = -(target * (joint + 1e-5).log()).sum() + opt.lamda * (joint * logs).sum()
        boundary = sum(local_correlation(scaled(-(c * (c + 1e-16).log()).sum(-1)), edges, opt.window) for c in (a, b)) / 2
        total = total + (opt.information_weight * information - opt.boundary_weight * boundary) / len(heads)
    if opt.encoder_weight:
        pooled = maps[-1].flatten(2).mean(2)
        kept = min(opt.encoder_images, len(view_1))
        z = F.normalize(encoder_head(torch.cat([pooled[:kept], pooled[len(view_1) :][:kept]])), dim=1)
        part = (list(range(kept)) if depths is None else [int(3 * depth) for depth in depths[:kept]]) * 2
        total = total + opt.encoder_weight * sum(of_anchor(z, part, i, opt.temperature) for i in range(len(z))) / len(z)
    return total


def of_anchor(z, part, i, temperature):
    others = [j for j in range(len(z)) if j != i]
    log_sum = torch.logsumexp(torch.stack([z[i] @ z[j] / temperature for j in others]), 0)
    positives = [j for j in others if part[j] == part[i]]
    return sum(log_sum - z[i] @ z[j] / temperature for j in positives) / len(positives)


def scaled(x):
    low, high = (pick(x.detach().flatten(1), 1).view(-1, *(1,) * (x.ndim - 1)) for pick in (torch.amin, torch.amax))
    return (x - low) / (high - low + 1e-6)


def local_correlation(i, j, window):
    half = window // 2
    padded = [F.pad(x, [half] * 2 * (x.ndim - 1)) for x in (i, j, i * i, j * j, i * j)]
    for axis in range(1, i.ndim):
        padded = [x.unfold(axis, window, 1).sum(-1) for x in padded]
    n, (s_i, s_j, s_ii, s_jj, s_ij) = window ** (i.ndim - 1), padded
    cross, of_i, of_j = ((s - p * q / n).clamp(min=1e-5) for s, p, q in ((s_ij, s_i, s_j), (s_ii, s_i, s_i), (s_jj, s_j, s_j)))
    return (cross**2 / (of_i * of_j)).mean()


@pytest.mark.parametrize(
    ("dims", "extra"),
    [
        (2, ["bim.encoder_weight=0.7", "bim.encoder_images=4"]),
        (2, ["bim.head=mlp", "bim.alpha=0.2", "bim.lamda=1.3", "bim.boundary_weight=0.4", "bim.information_weight=2"]),
        (3, ["data.size=8,10,12", "network.dims=3", "bim.encoder_weight=1", "bim.window=3"]),
    ],
    ids=["encoder", "mlp", "3d"],
)
def test_bim_step_is_the_formulas(dims, extra):
    torch.manual_seed(0)
    config = load(None, [*TINY, *extra])
    backbone = small(dims)
    method = build_method(config, backbone)
    size = (12, 14) if dims == 2 else config.data.size
    depths = torch.tensor([0.1, 0.9, 0.5, 0.3, 0.7]) if dims == 2 else None  # parts 0 2 1 0 2
    images = torch.rand(5, 1, *size)
    view_1, view_2, theta = method.views(images, torch.Generator().manual_seed(3))
    assert view_1.shape == view_2.shape == images.shape and not torch.equal(theta[0], theta[1])

    truth, head_copies = copy.deepcopy(backbone).double(), copy.deepcopy(method.heads).double()
    encoder_head = copy.deepcopy(method.encoder_head).double() if config.bim.encoder_weight else None
    expected = written_out(config, truth, head_copies, encoder_head, view_1.double(), view_2.double(), theta.double(), depths)
    expected.backward()
    loss, stats = method.step(backbone, Batch(images, depths=depths), torch.Generator().manual_seed(3), monitor=True)
    loss.backward()

    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    pairs = [(backbone, truth), (method.heads, head_copies)] + ([(method.encoder_head, encoder_head)] if encoder_head else [])
    for ours, theirs in pairs:
        mine, right = (torch.cat([p.grad.flatten().double() for p in module.parameters()]) for module in (ours, theirs))
        assert (mine - right).norm() < 1e-4 * right.norm()
        assert right.norm() > 0
    for (name, mine), right in zip(backbone.named_buffers(), truth.buffers(), strict=True):
        torch.testing.assert_close(mine.double(), right.double(), msg=name)  # one pass over both views
    assert all(math.isfinite(value) for value in stats.values()) and 0 < stats["assignment_entropy"] <= math.log(5) + 1e-6


def test_bim_transforms_features_as_images():
    """Without a change of colours, features of single pixels agree wherever the transform came from inside."""
    still = "bim.jitter=1,1 bim.gamma=1,1 bim.crop_rotation=0 bim.crop_scale=1,1 bim.crop_flip=0".split()
    images = torch.rand(4, 1, 16, 20)
    backbone = nn.Conv2d(1, 6, 1, bias=False)
    backbone.out_channels = 6
    method = build_method(load(None, [*TINY, *still]), backbone)
    view_1, view_2, theta = method.views(images, torch.Generator().manual_seed(0))
    torch.testing.assert_close(view_1, images)
    assert torch.equal(view_2, method.transform(view_1, theta)[0]) and not torch.equal(view_2, view_1)
    assert method.step(backbone, Batch(images), torch.Generator().manual_seed(0), monitor=True)[1]["agreement"] == 1
    assert set(view_2.unique().tolist()) <= {0.0, *view_1.unique().tolist()}  # nearest: no new values


def test_bim_views_share_a_crop_and_differ_in_colour():
    still = [*TINY, *"bim.rotation=0 bim.scale=1,1 bim.translation=0 bim.mirror=0 bim.gamma=1,1".split()]
    images = torch.rand(4, 1, 16, 16)
    view_1, view_2, _ = build_method(load(None, [*still, "bim.jitter=1,1"]), small(2)).views(images, torch.Generator().manual_seed(0))
    assert torch.equal(view_1, view_2) and not torch.equal(view_1, images)
    view_1, view_2, _ = build_method(load(None, still), small(2)).views(images, torch.Generator().manual_seed(0))
    assert not any(torch.equal(a, b) for a, b in zip(view_1, view_2, strict=True))
    assert min(view_1.min(), view_2.min()) >= 0 and max(view_1.max(), view_2.max()) <= 1


@pytest.mark.parametrize("dims", [2, 3])
def test_bim_transform_is_in_its_ranges(dims):
    size = [f"network.dims={dims}", "data.size=" + ",".join(["8"] * dims)]
    method = build_method(load(None, [*TINY, *size]), small(dims))
    theta = method.views(torch.rand(400, 1, *[8] * dims), torch.Generator().manual_seed(0))[2]
    linear = theta[:, :, :dims]
    zoom = torch.linalg.det(linear).abs() ** (-1 / dims)
    assert 0.8 <= zoom.min() < 0.82 and 1.28 < zoom.max() <= 1.3
    assert 0.09 < theta[:, :, dims].abs().max() <= 0.1
    mirrored = (torch.linalg.det(linear) < 0).float().mean()  # of an odd number of axes: 2 x 0.9 x 0.1, or 0.9^3 + 3 x 0.9 x 0.1^2
    assert mirrored == pytest.approx(0.18 if dims == 2 else 0.756, abs=0.07)
    if dims == 2:
        signs = linear.diagonal(dim1=1, dim2=2).sign()  # cosines up to 45 degrees are positive
        assert (signs < 0).float().mean() == pytest.approx(0.9, abs=0.05)
        angle = torch.atan2(linear[:, 1, 0] * signs[:, 0], linear[:, 0, 0].abs()).rad2deg()
        assert 44 < angle.abs().max() <= 45 + 1e-3


def test_bim_turns_volumes_in_mm():
    """What T and the crop do to distances in mm is one factor: no shear, whatever the voxels."""
    size, spacing = (6, 10, 16), torch.tensor([[5.0, 1.0, 2.0], [1.0, 1.0, 1.0]]).repeat(20, 1)
    method = build_method(load(None, [*TINY, "network.dims=3", "data.size=6,10,16", "bim.mirror=0"]), small(3))
    assert method.needs == {"spacing"}
    seen = []
    crop = method.crop
    method.crop = lambda *given: seen.append(given[-1]) or crop(*given)
    theta = method.views(torch.rand(40, 1, *size), torch.Generator().manual_seed(0), spacing)[2]
    extent = (torch.tensor(size) * spacing).flip(1)  # of T's faces, x first
    linear = extent[:, :, None] * theta[:, :, :3] / extent[:, None]
    square = linear @ linear.transpose(1, 2)
    torch.testing.assert_close(square, square[:, :1, :1] * torch.eye(3), atol=1e-5, rtol=0)
    assert (linear - linear * torch.eye(3)).abs().amax((1, 2)).min() > 1e-3
    method.step(small(3), Batch(torch.rand(2, 1, *size), spacing=spacing[:2]), torch.Generator().manual_seed(0))
    assert torch.equal(seen[0], spacing) and torch.equal(seen[1], spacing[:2])


def test_cluster_heads():
    layers = build_method(load(None, [*TINY, "bim.head=mlp", "bim.head_hidden=7"]), small(2)).heads[0]
    assert [type(layer) for layer in layers] == [nn.Conv2d, nn.LeakyReLU, nn.Conv2d] and layers[1].negative_slope == 0.01
    assert layers[0].weight.shape == (7, 6, 1, 1) and layers[2].weight.shape == (5, 7, 1, 1)
    assert [type(head) for head in build_method(load(None, TINY), small(2)).heads] == [nn.Conv2d] * 2


def test_bim_leaves_out_what_came_from_outside():
    """Changing the bias of a head changes where the features are 0 only: with outside=drop these count no more."""
    away = [*TINY, "bim.translation=0.9", "bim.rotation=0", "bim.mirror=0", "bim.boundary_weight=0"]
    torch.manual_seed(0)
    backbone = small(2)
    losses = {}
    for outside in ("keep", "drop"):
        torch.manual_seed(1)
        method = build_method(load(None, [*away, f"bim.outside={outside}"]), backbone)
        losses[outside] = method.step(backbone, Batch(torch.rand(4, 1, 16, 16)), torch.Generator().manual_seed(0))[0].item()
    assert abs(losses["keep"] - losses["drop"]) > 1e-4


def test_bim_loss_falls(batch):
    training = Training(load(None, [*TINY, "pretrain.lr=2e-2"]), CPU, source=None)
    for step in range(12):
        stats = training.step(step, repeat(batch), monitor=step == 11)
    training.collect(12)
    assert np.mean(training.losses[-3:]) < np.mean(training.losses[:3]) - 0.1
    assert all(math.isfinite(value) for value in stats.values())


def test_bim_in_mixed_precision(batch):
    training = Training(load(None, [*TINY, "pretrain.amp=bf16", "bim.encoder_weight=1"]), CPU, source=None)
    seen = []
    training.method.heads[0].register_forward_hook(lambda *of: seen.append(of[2].dtype))
    training.step(0, repeat(batch), monitor=False)
    assert training.collect(1) is None and training.weights_are_finite() and seen == [torch.bfloat16] * 2


def test_bim_resumes_bitwise(phantoms, tmp_path, monkeypatch):
    extra = "pretrain.steps=6 pretrain.checkpoint_every=3 pretrain.optimizer=radam pretrain.schedule=cosine pretrain.warmup=0.3 bim.encoder_weight=1".split()
    config, real, calls = load(None, [*TINY, *extra]), Training.step, []
    run(phantoms, tmp_path / "whole", config)

    def step(self, number, batches, monitor):
        calls.append(number)
        if number == 4 and calls.count(4) == 1:
            raise ZeroDivisionError("power cut")
        return real(self, number, batches, monitor)

    monkeypatch.setattr(Training, "step", step)
    with pytest.raises(ZeroDivisionError):
        run(phantoms, tmp_path / "parts", config)
    torch.rand(7)
    run(phantoms, tmp_path / "parts", config, resume=True)
    assert calls == [0, 1, 2, 3, 4, 3, 4, 5]
    whole, parts = (load_file(tmp_path / name / "weights.safetensors") for name in ("whole", "parts"))
    assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)
    (method, backbone), (other, _) = (load_method(tmp_path / name) for name in ("whole", "parts"))
    mine, theirs = method.state_dict(), other.state_dict()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert {name.split(".")[0] for name in mine} == {"heads", "encoder_head"}

    maps = cluster_map(method, backbone, torch.rand(2, 1, 20, 24), head=1)
    assert maps.shape == (2, 20, 24) and not maps.is_floating_point() and 0 <= maps.min() <= maps.max() < 5
    backbone.train()
    before = backbone.conv_0.conv_0.adn.N.running_mean.clone()
    cluster_map(method, backbone, torch.rand(2, 1, 32, 32))
    assert backbone.training and torch.equal(before, backbone.conv_0.conv_0.adn.N.running_mean)
    with pytest.raises(ValueError, match=r"head must be in 0 to 1 \(bim.heads\), got 2"):
        cluster_map(method, backbone, torch.rand(1, 1, 32, 32), head=2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bim.window=4", "bim.window must be odd, got 4"),
        ("bim.alpha=1.5", r"bim.alpha must be in \[0, 1\], got 1.5"),
        ("bim.scale=1.3,0.8", r"bim.scale must be SMALLEST,LARGEST with 0 < SMALLEST <= LARGEST, got \[1.3, 0.8\]"),
        ("bim.clusters=1", "bim.clusters must be at least 2, got 1"),
        ("bim.head=deep", "bim.head must be 'linear' or 'mlp', got 'deep'"),
    ],
)
def test_bim_options_refused(text, message):
    with pytest.raises(ConfigError, match=message):
        load(None, [text])


def test_methods_refused():
    backbone = nn.Conv2d(1, 6, 1)
    backbone.out_channels = 6
    with pytest.raises(ValueError, match="loss.method must be one of pix2rep, bim.*, got 'bin'"):
        build_method(load(None, ["loss.method=bin"]), backbone)
    with pytest.raises(ValueError, match="bim.encoder_weight needs a backbone with encode, decode and encoder_channels, got Conv2d"):
        build_method(load(None, [*TINY, "bim.encoder_weight=1"]), backbone)


def test_a_run_without_checkpoint_has_no_method(tmp_path):
    with pytest.raises(FileNotFoundError, match="run must be the folder of a pre-training with a checkpoint"):
        load_method(tmp_path)


def test_clustering_statistics():
    pixels = torch.arange(64).view(1, 8, 8) % 4
    sure = 50 * F.one_hot(pixels, 4).movedim(-1, 1).float()
    stats = clustering([sure, sure], [sure, sure.roll(1, 1)])
    assert stats["assignment_entropy"] == pytest.approx(math.log(4)) and stats["pixel_entropy"] == pytest.approx(0, abs=1e-6)
    assert stats["agreement"] == 0.5  # all of one head's, none of the other's
    assert clustering([sure[:, :, :, ::4]], [sure[:, :, :, ::4]])["assignment_entropy"] == pytest.approx(0, abs=1e-6)
    assert clustering([torch.zeros(1, 4, 3, 3)], [torch.zeros(1, 4, 3, 3)])["pixel_entropy"] == pytest.approx(math.log(4))


def test_depths_are_places_in_a_volume(source):
    for case in source.cases:
        depths = source.depths(source.case_slices(case))
        n = len(depths)
        torch.testing.assert_close(depths, (torch.arange(n) + 0.5) / n)


def test_a_batch_holds_what_its_method_needs(source):
    training = Training(load(None, [*TINY, "bim.encoder_weight=1"]), CPU, source)
    batch = next(training.batches(0))
    indices = training.sampler().indices(0)
    assert torch.equal(batch.depths, source.depths(indices)) and torch.equal(batch.images, source.batch(indices)[0])
    assert len(batch.patients) == 4 and set(batch.patients) == set(source.patients_of(indices))
    assert next(Training(load(None, TINY), CPU, source).batches(0)).depths is None


@pytest.mark.parametrize("name", ["adamw", "radam", "sgd", "lars"])
def test_optimizers_by_name(name):
    weight = nn.Parameter(torch.tensor([3.0, 4.0]).view(1, 2))
    optimizer = build_optimizer(PretrainConfig(optimizer=name, lr=0.1), [weight], CPU)
    (weight * torch.tensor([1.0, 2.0])).sum().backward()
    optimizer.step()
    assert (weight < torch.tensor([3.0, 4.0])).all()


def test_lars_moves_a_matrix_by_its_own_length():
    matrix, vector = nn.Parameter(torch.tensor([[3.0, 4.0]])), nn.Parameter(torch.tensor([3.0, 4.0]))
    optimizer = build_optimizer(PretrainConfig(optimizer="lars", lr=0.1, weight_decay=0.5), [matrix, vector], CPU)
    for _ in range(2):
        matrix.grad, vector.grad = torch.tensor([[0.5, 8.0]]), torch.tensor([0.5, 8.0])
        before = matrix.detach().clone()
        optimizer.step()
    # The second step: momentum keeps 0.9 of the first update, decay adds half the weight to the gradient.
    first = 1e-3 * 5 * torch.tensor([[2.0, 10.0]]) / math.hypot(2, 10)
    second = torch.tensor([[0.5, 8.0]]) + 0.5 * before
    second = 1e-3 * before.norm() * second / second.norm()
    torch.testing.assert_close(before - matrix, 0.1 * (0.9 * first + second), rtol=1e-3, atol=1e-7)
    torch.testing.assert_close(vector.detach(), torch.tensor([3.0, 4.0]) - 0.1 * 2.9 * torch.tensor([0.5, 8.0]))


def test_moving_average_takes_parameters_alone():
    target, online = (nn.BatchNorm1d(1) for _ in range(2))
    with torch.no_grad():
        online.weight.fill_(3)
        online.running_mean.fill_(5)
    move_towards(target, online, momentum=0.75)
    assert target.weight.item() == pytest.approx(1.5) and target.running_mean.item() == 0
