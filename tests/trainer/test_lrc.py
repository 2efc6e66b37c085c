"""LRC in the trainer: one step against plain float64, moving average and queue, superpixels kept beside the volumes, resuming, other weights to begin with."""

import contextlib
import copy
import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from pix2rep import finetune
from pix2rep.config import ConfigError, LrcConfig, load
from pix2rep.data.cache import prepare
from pix2rep.data.discover import discover
from pix2rep.data.nifti import VolumeError
from pix2rep.data.slices import SliceSource
from pix2rep.data.superpixels import Superpixels
from pix2rep.evaluate import save_model
from pix2rep.methods import build_method
from pix2rep.methods.base import Batch
from pix2rep.networks import build_backbone
from pix2rep.pretrain import Interrupted, run
from pix2rep.training import Training
from pix2rep.views.spatial import warp_labels
from pix2rep_kernels import felzenszwalb, native
from volumes import AFFINE, save

if reason := native.why_missing("cpu"):
    pytest.skip(reason, allow_module_level=True)

TINY = (
    "loss.method=lrc data.size=32,32 network.channels=4,4,8,8,8 network.features=8 lrc.queue=6 lrc.global_hidden=8 lrc.global_projection=5"
    " lrc.superpixel_scale=20 lrc.superpixel_min_size=8 lrc.min_pixels=3 split.val=0.2 pretrain.steps=4 pretrain.batch_size=2"
    " pretrain.checkpoint_every=2 pretrain.log_every=2 pretrain.lr=3e-3 pretrain.device=cpu pretrain.threads=1"
).split()
SOLID = ["network.dims=3", "data.size=16,16,16", "lrc.superpixel_scale=60"]
PLAIN = [f"photometric.{key}=0" for key in ("noise_p", "blur_p", "gamma_p", "bias_p", "invert_p")]
CPU = torch.device("cpu")


def volume(patient, shape=(36, 30, 6)):
    x, y, z = np.mgrid[: shape[0], : shape[1], : shape[2]]
    rings = np.cos(np.hypot(x - 14 - patient, y - 15 + patient) / 3 + z / 4)
    return (200 + 100 * rings * (x > 4) - 150 * (x <= 4) + np.random.default_rng(patient).normal(0, 8, shape)).clip(0).astype(np.int16)


@pytest.fixture(scope="module")
def volumes(tmp_path_factory):
    root = tmp_path_factory.mktemp("volumes")
    for patient in range(5):
        save(root / f"p{patient}/image.nii.gz", volume(patient))
    return root


@pytest.fixture(scope="module")
def prepared(volumes, tmp_path_factory):
    return prepare(discover(volumes), load(None, TINY).data, tmp_path_factory.mktemp("cache"))


def batch_of(config, size=2):
    """Noise, and blocks for superpixels: 0 to 3 a quarter, -1 on the rim."""
    shape = config.data.size
    generator = torch.Generator().manual_seed(5)
    images = torch.rand(size, 1, *shape, generator=generator)
    regions = sum((torch.arange(n) >= n // 2).int().mul(2**k).view([-1] + [1] * (len(shape) - 1 - k)) for k, n in enumerate(shape))
    regions = regions.expand(size, *shape).clone().int()
    regions[..., :2] = -1
    spacing = torch.tensor([3.0, 1.0, 2.0])[-len(shape) :].expand(size, -1) if len(shape) == 3 else None
    return Batch(images, regions=regions, spacing=spacing, indices=torch.arange(size))


def made(extra=(), double=True):
    config = load(None, [*TINY, *PLAIN, "lrc.num_samples=null", *extra])
    torch.manual_seed(0)
    backbone = build_backbone(config.network)
    method = build_method(config, backbone)
    with torch.no_grad():  # the key's weights must not be the query's
        for weight in (*method.momentum.parameters(), *(method.momentum_head.parameters() if method.head else ())):
            weight.add_(0.1 * torch.randn(weight.shape))
    if double:
        backbone, method = backbone.double(), method.double()
    return config, backbone.train(), method.train()


def plain_loss(config, backbone, method, view_q, view_k, regions_q, regions_k):
    """Both terms with loops over images and regions; image k of the batch is item k of the source."""
    options = config.lrc
    features_q, bottom_q = backbone(view_q), backbone.encode(view_q)[-1]
    with torch.no_grad():
        features_k, bottom_k = method.momentum(view_k), method.momentum.encode(view_k)[-1]
    if options.keys == "online":
        features_k = backbone(view_k)
    rows = []
    for f_q, f_k, r_q, r_k in zip(features_q, features_k, regions_q, regions_k, strict=True):
        both = [n for n in range(options.max_regions) if min((r_q == n).sum(), (r_k == n).sum()) >= options.min_pixels]
        mu_q, mu_k = (torch.stack([F.normalize(f[:, r == n].mean(1), dim=0) for n in both]) for f, r in ((f_q, r_q), (f_k, r_k)))
        rows.append((mu_q, mu_k))
    if options.negatives == "batch":
        rows = [tuple(map(torch.cat, zip(*rows, strict=True)))]
    losses = []
    for mu_q, mu_k in rows:
        for a, b in ((mu_q, mu_k), (mu_k, mu_q))[: 2 if options.symmetric else 1]:
            losses.append(F.cross_entropy(a @ b.T / options.temperature, torch.arange(len(a)), reduction="none"))
    local = torch.cat(losses).mean()
    if not options.global_weight:
        return options.local_weight * local
    query = F.normalize(method.head(bottom_q.flatten(2).mean(2)), dim=1)
    key = F.normalize(method.momentum_head(bottom_k.flatten(2).mean(2)), dim=1).detach()
    own = ((query * key).sum(1) / options.global_temperature).exp()
    ids = [-1] * options.queue if options.own_keys == "keep" else method.queue_ids.tolist()
    others = torch.stack([
        sum((q @ row / options.global_temperature).exp() for row, image in zip(method.queue, ids, strict=True) if image != k)
        for k, q in enumerate(query)
    ])  # fmt: skip
    return options.local_weight * local - options.global_weight * (own / (own + others)).log().mean()


@pytest.mark.parametrize(
    "extra",
    [
        [],
        ["lrc.warp=false", "lrc.symmetric=true", "lrc.local_weight=0.5", "lrc.global_weight=2"],
        ["lrc.keys=online", "lrc.negatives=batch", "lrc.global_weight=0"],
        ["lrc.own_keys=keep"],
        SOLID,
    ],
    ids=["default", "unwarped-symmetric-weights", "online-batch-local", "own-keys", "3d"],
)
def test_one_step_is_the_formula(extra):
    config, backbone, method = made(extra)
    if config.lrc.own_keys == "drop" and config.lrc.global_weight:
        method.queue_ids.copy_(torch.tensor([1, -1, 0, 7, 1, 2]))
    batch = batch_of(config)
    batch.images = batch.images.double()
    twin, twin_method = copy.deepcopy((backbone, method))
    loss, stats = method.step(backbone, batch, torch.Generator().manual_seed(1), monitor=True)
    loss.backward()

    view_k, regions_k = batch.images, batch.regions
    if config.lrc.warp:
        generator = torch.Generator().manual_seed(1)
        method.photometric(batch.images, generator), method.photometric(batch.images, generator)
        grid = method.spatial(len(batch.images), config.data.size, generator, spacing=batch.spacing)
        points = F.affine_grid(grid, batch.images.shape, align_corners=True)
        view_k = F.grid_sample(batch.images, points.double(), align_corners=True)
        regions_k = warp_labels(batch.regions + 1, grid) - 1
        assert not torch.equal(regions_k, batch.regions) and len(regions_k.unique()) > 2
    expected = plain_loss(config, twin, twin_method, batch.images, view_k, batch.regions, regions_k)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
    trained = [*backbone.parameters(), *(p for p in method.parameters() if p.requires_grad)]
    theirs = [*twin.parameters(), *(p for p in twin_method.parameters() if p.requires_grad)]
    for mine, other in zip(trained, theirs, strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-7, atol=1e-12)
    assert all(p.grad is None for p in method.momentum.parameters())
    assert stats["regions"] > 1 and ("loss_global" in stats) == (config.lrc.global_weight > 0)
    assert method.step(backbone, batch, torch.Generator().manual_seed(1))[1] == {}


def test_the_average_follows_and_the_queue_turns():
    config, backbone, method = made(["lrc.momentum=0.75"], double=False)
    first = torch.Generator().manual_seed(0)
    before, queue = copy.deepcopy(method.momentum), method.queue.clone()
    batch = batch_of(config, 4)
    for _ in range(2):  # 8 keys: two more than the queue holds
        method.step(backbone, batch, first)
        assert torch.equal(method.queue, queue), "keys of a step must not be its negatives"
    keys = torch.cat(method.keys)
    method.after_step(backbone, 0, 10)
    assert torch.equal(method.queue, keys[2:]) and method.oldest == 0 and not method.keys
    for now, old, online in zip(method.momentum.parameters(), before.parameters(), backbone.parameters(), strict=True):
        torch.testing.assert_close(now, 0.75 * old + 0.25 * online)
    queue = method.queue.clone()
    batch.indices = batch.indices + 10
    method.step(backbone, batch, first)
    newest = method.keys[0]
    assert method.queue_ids.tolist() == [2, 3, 0, 1, 2, 3]
    method.after_step(backbone, 1, 10)
    assert method.queue_ids.tolist() == [10, 11, 12, 13, 2, 3]
    assert torch.equal(method.queue, torch.cat([newest, queue[4:]])) and method.oldest == 4
    torch.testing.assert_close(method.queue.norm(dim=1), torch.ones(6))


def test_older_keys_of_the_same_image_are_no_negatives():
    """The queue holds nothing but the batch's own images: without them nothing is left to contrast with."""
    losses = {}
    for own in ("drop", "keep"):
        config, backbone, method = made(["lrc.local_weight=0", f"lrc.own_keys={own}"])
        assert method.needs == {"regions"} | ({"indices"} if own == "drop" else set()) and hasattr(method, "queue_ids") == (own == "drop")
        batch = batch_of(config, 1)
        batch.images, batch.indices = batch.images.double(), torch.tensor([5])
        other = torch.Generator().manual_seed(9)
        with torch.no_grad():
            for _ in range(6):
                method.step(backbone, batch, other)
        method.after_step(backbone, 0, 9)
        losses[own] = method.step(backbone, batch, torch.Generator().manual_seed(1))[0].item()
        if own == "drop":
            assert method.queue_ids.tolist() == [5] * 6
            batch.indices = torch.tensor([4])  # the same pixels under another name
            losses["another"] = method.step(backbone, batch, torch.Generator().manual_seed(1))[0].item()
    assert abs(losses["drop"]) < 1e-12 < losses["keep"] == pytest.approx(losses["another"], rel=1e-12)
    assert losses["keep"] > 0.5


def test_a_checkpoint_from_before_the_ids_is_taken():
    _, _, method = made()
    state = {name: value for name, value in method.state_dict().items() if name != "queue_ids"}
    method.load_state_dict(state)
    assert (method.queue_ids == -1).all()


def test_a_batch_says_which_images_it_holds(prepared):
    config = load(None, TINY)
    training = Training(config, CPU, SliceSource(prepared, prepared.patients, config.data.size))
    batches = training.batches(0)
    with contextlib.closing(batches):
        seen = [next(batches).indices for _ in range(2)]
    assert [found.tolist() for found in seen] == [training.sampler().indices(step).tolist() for step in range(2)]
    for step in range(2):
        training.step(step, training.batches(step), monitor=False)
    assert training.method.queue_ids.tolist() == [*torch.cat(seen).tolist(), -1, -1]


def test_only_the_local_loss_takes_any_backbone():
    config, _, _ = made(["lrc.global_weight=0"])
    backbone = torch.nn.Conv2d(1, 4, 3, padding=1)
    method = build_method(config, backbone)
    method.step(backbone, batch_of(config), torch.Generator().manual_seed(0))[0].backward()
    assert backbone.weight.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="lrc.global_weight above 0 needs a backbone with encode, decode and encoder_channels, got Conv2d"):
        build_method(load(None, TINY), backbone)


@pytest.mark.parametrize("extra", [[], SOLID], ids=["2d", "3d"])
def test_loss_falls(prepared, extra):
    config = load(None, [*TINY, *PLAIN, *extra, "lrc.momentum=0", "lrc.warp=false", "lrc.num_samples=null", "pretrain.lr=1e-2"])
    training = Training(config, CPU, SliceSource(prepared, prepared.patients, config.data.size))
    with contextlib.closing(training.batches(0)) as batches:
        batch = next(batches)
    losses = [training.step(step, itertools.repeat(batch), monitor=True)["loss_local"] for step in range(10)]
    assert losses[-1] < 0.7 * losses[0], losses


def test_resumed_run_is_bitwise_the_uninterrupted_one(volumes, tmp_path, monkeypatch):
    config = load(None, [*TINY, f"data.cache={tmp_path / 'cache'}", "pretrain.accumulate=2", "lrc.momentum=0.9"])
    run(volumes, tmp_path / "whole", config)
    real, state = Training.step, []

    def stopping(self, step, batches, monitor):
        if step == 3 and not state:
            state.append(self.method.queue.clone())
            raise Interrupted("power cut", 9)
        return real(self, step, batches, monitor)

    monkeypatch.setattr(Training, "step", stopping)
    with pytest.raises(Interrupted):
        run(volumes, tmp_path / "parts", config)
    run(volumes, tmp_path / "parts", config, resume=True)
    whole, parts = (torch.load(tmp_path / name / "checkpoints/last.pt") for name in ("whole", "parts"))
    for part in ("backbone", "method"):
        assert whole[part].keys() == parts[part].keys()
        assert all(torch.equal(value, parts[part][name]) for name, value in whole[part].items())
    assert not torch.equal(whole["method"]["queue"], state[0]) and whole["method"]["queue_ids"].min() >= 0


def test_superpixels_are_made_once_and_anew_where_options_or_files_change(prepared):
    options = load(None, [*TINY, "lrc.superpixel_scale=21"]).lrc  # no other test's
    superpixels, case = Superpixels(options, 2), prepared.cases[0]
    assert superpixels.make(prepared.cases, workers=2) == 5
    labels = np.array(superpixels.open(case))
    assert labels.dtype == np.uint16 and labels.shape == case.shape
    for z in (0, 5):
        slice_ = torch.from_numpy(np.array(case.image()[z]))
        assert np.array_equal(labels[z], felzenszwalb(slice_, scale=21, min_size=8))
    assert superpixels.make(prepared.cases) == 0
    finer, solid = copy.copy(options), Superpixels(options, 3)
    finer.superpixel_scale = 5.0
    assert Superpixels(finer, 2).make([case]) == 1 and solid.make([case]) == 1
    whole = torch.from_numpy(np.array(case.image()))
    assert np.array_equal(solid.open(case), felzenszwalb(whole, scale=21, min_size=8))
    wide = copy.copy(options)
    wide.superpixel_spacing = True  # 8 mm between slices of 2 x 1.5 mm
    assert Superpixels(wide, 3).make([case]) == 1
    assert np.array_equal(Superpixels(wide, 3).open(case), felzenszwalb(whole, scale=21, min_size=8, spacing=case.spacing))
    assert not np.array_equal(Superpixels(wide, 3).open(case), solid.open(case)) and AFFINE[2, 2] == 8

    path = superpixels.path(case)
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(VolumeError, match="must be superpixels .*start the command again"):
        superpixels.open(case)
    assert superpixels.make(prepared.cases) == 1
    assert np.array_equal(superpixels.open(case)[5], labels[5])


@pytest.mark.parametrize("size", [(24, 40), (4, 40, 24)], ids=["2d", "3d"])
def test_regions_of_a_batch(prepared, size):
    options = load(None, TINY).lrc
    dims = len(size)
    plain = SliceSource(prepared, prepared.patients, size)
    with pytest.raises(ValueError, match="source must have superpixels to read regions"):
        plain.regions([0])
    source = plain.with_superpixels(Superpixels(options, dims))
    images, regions = source.batch([1, 3])[0], source.regions([1, 3])
    assert regions.shape == images[:, 0].shape and regions.dtype == torch.int32
    for image, found in zip(images[:, 0].numpy(), regions.numpy(), strict=True):
        assert (found == -1).any() and found.max() > 5
        for n in range(found.max() + 1):
            assert (found == n).sum() >= options.min_pixels and image[found == n].mean() >= options.background
    assert (regions[:, ..., :2] == -1).all() and (regions[:, ..., -2:] == -1).all() if size[-1] > 36 else True
    few = copy.copy(options)
    few.max_regions = 3
    largest = plain.with_superpixels(Superpixels(few, dims)).regions([1])[0]
    sizes = np.sort(np.bincount(regions[0][regions[0] >= 0]))
    assert sorted(np.bincount(largest[largest >= 0])) == sizes[-3:].tolist()


def test_selection_by_hand():
    options = LrcConfig(min_pixels=2, background=0.1, max_regions=2)
    labels = np.array([[0, 0, 1, 4], [2, 2, 2, 4], [3, 3, -1, 4]], np.int32)
    image = np.where(labels == 2, 0.05, 0.5)
    found = Superpixels(options, 2).select(labels, image)  # 1 is tiny, 2 dark, 3 no larger than 0 and after it
    assert found.tolist() == [[0, 0, -1, 1], [-1, -1, -1, 1], [-1, -1, -1, 1]]
    assert (Superpixels(options, 2).select(np.full((2, 2), -1, np.int32), np.zeros((2, 2))) == -1).all()


def test_a_run_begins_with_given_weights(prepared, tmp_path):
    config = load(None, TINY)
    torch.manual_seed(7)
    weights = {name: value.clone() for name, value in build_backbone(config.network).state_dict().items()}
    save_file(weights, tmp_path / "weights.safetensors")
    save_file({f"backbone.{name}": value for name, value in weights.items()} | {"head.weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    source = SliceSource(prepared, prepared.patients, config.data.size)
    for name in ("weights", "model"):
        config.pretrain.init = str(tmp_path / f"{name}.safetensors")
        training = Training(config, CPU, source)
        assert all(torch.equal(value, weights[key]) for key, value in training.backbone.state_dict().items())
        assert all(torch.equal(value, weights[key]) for key, value in training.method.momentum.state_dict().items())
    config.pretrain.init = str(tmp_path / "gone.safetensors")
    assert Training(config, CPU, source, fresh=False)
    with pytest.raises(FileNotFoundError, match=r"pretrain.init must be a safetensors file, found no \S+gone"):
        Training(config, CPU, source)
    (tmp_path / "gone.safetensors").write_bytes(b"no weights")
    with pytest.raises(ValueError, match=r"pretrain.init must be a safetensors file, cannot read \S+gone"):
        Training(config, CPU, source)
    save_file({name: value for name, value in weights.items() if "upcat_1" not in name}, tmp_path / "gone.safetensors")
    with pytest.raises(ValueError, match=r"pretrain.init must hold the weights of this network, \d+ tensors, got others in \S+: upcat_1"):
        Training(config, CPU, source)
    assert load_file(tmp_path / "weights.safetensors").keys() == weights.keys()


def test_a_run_begins_with_a_fine_tuned_backbone(prepared, tmp_path):
    """As on top of a supervised pre-training: the file is the one that fine-tuning writes."""
    config = load(None, [*TINY, "downstream.finetune_steps=2", "downstream.finetune_batch_size=2", "downstream.augment=false"])
    torch.manual_seed(7)
    model = finetune.build(build_backbone(config.network), classes=2, dims=2, seed=0)
    before = copy.deepcopy(model.backbone.state_dict())
    labels = torch.zeros(4, 32, 32, dtype=torch.int64)
    labels[:, 8:20], labels[:, 20:] = 1, 2
    finetune.fit(model, torch.rand(4, 1, 32, 32), labels, 1e-2, config, 0, validate=lambda model: 0.0)
    entry = {"what": "finetune", "labelled": 1, "seed": 0, "arm": "random"}
    save_model(model, tmp_path, entry, SimpleNamespace(classes=("a", "b")))
    config.pretrain.init = str(tmp_path / "n1_seed0_random.safetensors")
    training = Training(config, CPU, SliceSource(prepared, prepared.patients, config.data.size))
    for name, value in model.backbone.state_dict().items():
        assert torch.equal(training.backbone.state_dict()[name], value) and torch.equal(training.method.momentum.state_dict()[name], value)
    assert not torch.equal(before["conv_0.conv_0.conv.weight"], training.backbone.conv_0.conv_0.conv.weight)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (["lrc.same_samples=true"], "lrc.same_samples must be false with lrc.warp"),
        (["lrc.local_weight=0", "lrc.global_weight=0"], "lrc.local_weight must be above 0 where global_weight is 0"),
        (["lrc.queue=0"], "lrc.queue must be at least 1, got 0"),
        (["lrc.momentum=1.5"], r"lrc.momentum must be in \[0, 1\], got 1.5"),
        (["lrc.temperature=0"], "lrc.temperature must be at least 0.01, got 0.0"),
    ],
)
def test_options_out_of_range(text, message):
    with pytest.raises(ConfigError, match=message):
        load("lrc", text)
