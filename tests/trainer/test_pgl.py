"""PGL: its step against a plain rewriting in float64, its geometry on images, its target, whole runs."""

import copy
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pix2rep import checkpoint, downstream, evaluate
from pix2rep.config import ConfigError, load
from pix2rep.data.cache import Prepared
from pix2rep.data.patches import PatchSource
from pix2rep.data.phantom_ct import ORGANS, write_ct_phantoms
from pix2rep.method_config import PglConfig
from pix2rep.methods import build_method
from pix2rep.methods.base import Batch
from pix2rep.methods.pgl import flipped
from pix2rep.networks import build_backbone
from pix2rep.pretrain import run
from pix2rep.study import open_study
from pix2rep.training import Training
from pix2rep.views.intensity import Intensity
from volumes import prepared_case

REAL = Path(os.environ.get("PIX2REP_DATA", Path(__file__).parents[2] / ".." / "shared" / "data"))
TINY = (
    f"data.size=16,16,16 network.name={__name__}:Small network.channels=4,4,4,4,4 network.features=4 network.norm=batch"
    " pgl.head_hidden=8 pgl.projection=4 split.val=0.2 split.test=0.2"
    " pretrain.steps=4 pretrain.batch_size=2 pretrain.device=cpu pretrain.threads=1 pretrain.log_every=2"
).split()
UNET = "network.name=basicunet"
STILL = [f"pgl.{key}=0" for key in ("noise_p", "blur_p", "contrast_p", "gamma_p")]
EVEN = "pgl.flip=0,0,0"


class Small(nn.Module):
    """A backbone of two levels, the coarser at a quarter of the resolution."""

    encoder_channels = (4, 6)

    def __init__(self, config):
        super().__init__()
        self.out_channels = config.features
        self.fine = nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), nn.BatchNorm3d(4), nn.ReLU())
        self.coarse = nn.Sequential(nn.AvgPool3d(4), nn.Conv3d(4, 6, 3, padding=1), nn.BatchNorm3d(6))
        self.last = nn.Sequential(nn.Conv3d(10, config.features, 1), nn.BatchNorm3d(config.features))

    def encode(self, x):
        fine = self.fine(x)
        return [fine, self.coarse(fine)]

    def decode(self, maps, size):
        return self.last(torch.cat([maps[0], F.interpolate(maps[1], size, mode="trilinear")], 1))

    def forward(self, x):
        return self.decode(self.encode(x), x.shape[2:])


def made(*options):
    config = load("pgl", [*TINY, *options])
    torch.manual_seed(0)
    backbone = build_backbone(config.network)
    return config, backbone, build_method(config, backbone)


def batch_of(size=(16, 16, 16), batch=2, dtype=torch.float32) -> Batch:
    rng = torch.Generator().manual_seed(1)
    crops = torch.rand(2, batch, 1, *size, generator=rng).to(dtype)
    edges = torch.rand(2, 2, batch, 3, generator=rng, dtype=dtype) * torch.tensor(size)
    return Batch(crops[0], crops=crops, boxes=torch.stack([edges.amin(0), edges.amax(0)]))


def generator(seed=5) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# a step, rewritten


def at_common_points(features, low, high, flip, size, padded, count, mode):
    """Sample one map [C, *N], which covers a crop of `size` padded to `padded`, at the centres of `count` cells of a box."""
    lines = []
    for axis in range(3):
        n, s, p = features.shape[1 + axis], size[axis], padded[axis]
        a, b = low[axis].item(), high[axis].item()
        cell = s / max(1, n * s // p)  # a box under one voxel of the map is widened to one
        if b - a < cell:
            a, b = (a + b) / 2 - cell / 2, (a + b) / 2 + cell / 2
        edge = torch.tensor([a + (m + 0.5) / count[axis] * (b - a) for m in range(count[axis])], dtype=torch.float64)
        edge = s - edge if flip[axis] else edge
        lines.append(2 * (edge + (p - s) // 2) / p - 1)
    z, y, x = torch.meshgrid(*lines, indexing="ij")
    grid = torch.stack([x, y, z], -1)[None]
    return F.grid_sample(features[None], grid, mode=mode, padding_mode="border", align_corners=False)[0].flatten(1)  # [C, M]


def distance(p, z, norm):
    if norm == "none":
        return (p - z).square().mean()
    if norm == "flat":
        return 2 - 2 * F.cosine_similarity(p.flatten(), z.flatten(), dim=0)
    return (2 - 2 * F.cosine_similarity(p, z, dim=0)).mean()


def plain_step(config, backbone, method, batch, seed):
    options, rng = config.pgl, generator(seed)
    flips = [torch.rand(len(batch.images), 3, generator=rng) < torch.tensor(options.flip) for _ in range(2)]
    size = batch.crops.shape[3:]
    views = []
    for crop, flip in zip(batch.crops, flips, strict=True):
        views.append(torch.stack([image.flip([1 + a for a in range(3) if f[a]]) for image, f in zip(crop, flip, strict=True)]))

    def maps(network, view):
        return network.encode(view)[-1] if options.where == "encoder" else network(view)

    padded = [max(32, math.ceil(n / 16) * 16) for n in size] if config.network.name == "basicunet" else size
    online = [maps(backbone, view) for view in views]
    target = [maps(method.target["backbone"], view) for view in views]
    count = options.points or online[0].shape[2:]

    mode = "nearest" if options.mode == "nearest" else "bilinear"

    def aligned(values):
        boxes = zip(*batch.boxes, flips, strict=True)
        return [
            torch.stack([at_common_points(*one, size, padded, count, mode) for one in zip(view, low, high, flip, strict=True)])
            for view, (low, high, flip) in zip(values, boxes, strict=True)
        ]

    heads = method.heads
    grow = lambda rows: rows.unflatten(2, tuple(count))  # noqa: E731
    if options.align == "before":
        online, target = ([grow(v) for v in aligned(values)] for values in (online, target))
    q = [heads["projector"](m) for m in online]
    q = [heads["predictor"](m) for m in q] if options.predictor else q
    z = [method.target["projector"](m).detach() for m in target]
    q, z = ([v.flatten(2) for v in values] if options.align == "before" else aligned(values) for values in (q, z))
    directions = ((0, 1), (1, 0)) if options.symmetric else ((0, 1),)
    loss = sum(torch.stack([distance(p, t, options.norm) for p, t in zip(q[a], z[b], strict=True)]).mean() for a, b in directions)
    if options.global_weight:
        means = [[m.mean((2, 3, 4), keepdim=True) for m in values] for values in (online, target)]
        q = [heads["global_predictor"](heads["global_projector"](m)).flatten(1) for m in means[0]]
        z = [method.target["global_projector"](m).flatten(1).detach() for m in means[1]]
        loss = loss + options.global_weight * sum((2 - 2 * F.cosine_similarity(q[a], z[b])).mean() for a, b in directions)
    return loss


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ([UNET], (16, 17, 40)),  # padded to 32, 32, 48: oddly along y
        ([], (8, 12, 16)),
        (["pgl.where=decoder", "pgl.points=3,4,5", "pgl.norm=none"], (8, 10, 12)),
        (["pgl.align=before", "pgl.norm=flat", "pgl.symmetric=false"], (8, 8, 16)),
        (["pgl.where=decoder", "pgl.global_weight=0.7", "pgl.flip=1,0,0.5"], (8, 8, 8)),
        (["pgl.predictor=false", "pgl.mode=nearest", "pgl.points=2,3,3"], (8, 12, 16)),
    ],
    ids=["unet", "encoder", "decoder-none", "before-flat", "global", "nearest"],
)
def test_a_step_is_the_plain_formula(options, size):
    config, backbone, method = made(*STILL, *options)
    backbone, method, batch = backbone.double(), method.double(), batch_of(size, 1 if UNET in options else 2, torch.float64)
    with torch.no_grad():
        for weight in method.target.parameters():
            weight.mul_(1.1)  # a target that lags behind
    twins = copy.deepcopy((backbone, method))
    loss, stats = method.step(backbone, batch, generator(), monitor=True)
    loss.backward()
    expected = plain_step(config, *twins, batch, 5)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-10)
    compared = 0
    for mine, theirs in zip([*backbone.parameters(), *method.parameters()], [*twins[0].parameters(), *twins[1].parameters()], strict=True):
        assert (mine.grad is None) == (theirs.grad is None)
        if mine.grad is not None:
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-6, atol=1e-9)
            compared += mine.grad.abs().max() > 1e-6
    assert compared >= 4 and all(weight.grad is None for weight in method.target.parameters())
    assert set(stats) == {"alignment", "uniformity", "dead_dimensions"} and 0 <= stats["alignment"] <= 4


@pytest.mark.parametrize("where", ["encoder", "decoder"])
def test_equal_crops_without_flip_or_predictor_have_no_loss(where):
    _, backbone, method = made(*STILL, EVEN, "pgl.predictor=false", f"pgl.where={where}")
    batch = batch_of()
    same = Batch(batch.images, crops=batch.crops[:1].repeat(2, 1, 1, 1, 1, 1), boxes=batch.boxes[:, :1].repeat(1, 2, 1, 1))
    assert abs(method.step(backbone, same, generator())[0]) < 1e-5
    assert method.step(backbone, batch, generator())[0] > 1e-3


class See(nn.Module):
    """A backbone whose features are the image."""

    out_channels = 1

    def forward(self, x):
        return x + 0 * next(self.parameters(), x.new_zeros(()))


def test_flipped_crops_of_one_volume_agree_where_they_show_the_same(tmp_path):
    """The whole way, from the file to the loss: only interpolation keeps two crops' intensities apart, and any slip of a box or flip shows."""
    z, y, x = np.meshgrid(*(np.arange(n) for n in (24, 40, 40)), indexing="ij")
    case = prepared_case(tmp_path, "waves", 0.5 + 0.4 * np.sin(z / 5) * np.sin(y / 4) * np.cos(x / 6))
    config = load("pgl", [*TINY, *STILL, "pgl.where=decoder", "pgl.norm=none", "pgl.depth=free", "pgl.points=6,6,6"])
    method = build_method(config, See())
    for heads in (method.heads, method.target):
        for name in heads:
            if name != "backbone":
                heads[name] = nn.Identity()
    source, wrong = PatchSource(Prepared(tmp_path, [case]), ["waves"], (16, 16, 16)), []
    for step in range(6):
        now = source.at(step)
        batch = Batch(now.batch([0, 0])[0], crops=now.crops([0, 0]), boxes=now.boxes([0, 0]))
        assert method.step(See(), batch, generator(step))[0] < 1e-3
        batch.boxes[:, 1] = 16 - batch.boxes[:, 1].flip(0)  # as if the second crop's flips were not known
        wrong.append(method.step(See(), batch, generator(step))[0].item())
    assert np.mean(wrong) > 2e-2


def test_flipped():
    x, flip = torch.rand(2, 1, 3, 4, 5), torch.tensor([[True, False, True], [False, False, False]])
    torch.testing.assert_close(flipped(x, flip), torch.stack([x[0].flip(1, 3), x[1]]), rtol=0, atol=0)


# intensities, target, options


def test_intensity_changes_stay_in_their_ranges():
    x = torch.linspace(0.1, 0.9, 9 * 8 * 8).view(1, 1, 9, 8, 8).repeat(200, 1, 1, 1, 1)
    none = dict.fromkeys(("noise_p", "blur_p", "contrast_p", "gamma_p"), 0.0)
    torch.testing.assert_close(Intensity(PglConfig(**none))(x, generator()), x, rtol=0, atol=0)
    ratio = Intensity(PglConfig(**none | {"contrast_p": 1.0}))(x, generator())[:, 0, 0, 0, 0] / x[:, 0, 0, 0, 0]
    assert 0.75 <= ratio.min() < 0.78 and 1.22 < ratio.max() <= 1.25
    power = Intensity(PglConfig(**none | {"gamma_p": 1.0}))(x, generator())[:, 0, 0, 0, 0].log() / math.log(0.1)
    assert 0.69 < power.min() < 0.73 and 1.46 < power.max() < 1.51
    noise = (Intensity(PglConfig(**none | {"noise_p": 1.0}))(x, generator()) - x).flatten(1).std(1)
    assert 0.25 * 0.1**0.5 * 0.9 < noise.max() < 0.25 * 0.1**0.5 * 1.1
    point = torch.zeros(50, 1, 9, 9, 9)
    point[:, :, 4, 4, 4] = 1
    peak = Intensity(PglConfig(**none | {"blur_p": 1.0}))(point, generator())[:, 0, 4, 4, 4]
    assert 0.05 < peak.min() < 0.09 and 0.3 < peak.max() < 0.55  # of sigma 1 and 0.5
    changed = (Intensity(PglConfig())(x, generator()) != x).flatten(1).any(1).float().mean()
    assert 0.7 < changed < 0.95  # 1 - 0.9 * 0.8 * 0.5 * 0.5


def test_the_target_follows_along_half_a_cosine():
    _, backbone, method = made()
    assert [round(method.momentum(step, 10), 4) for step in (0, 5, 10)] == [0.99, 0.995, 1.0]
    before = copy.deepcopy(method.target)
    with torch.no_grad():
        for weight in [*backbone.parameters(), *method.heads.parameters()]:
            weight.add_(1)
    method.after_step(backbone, 0, 10)
    for (name, mine), old in zip(method.target.named_parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(mine, old + 0.01, msg=name)
    assert not any(weight.requires_grad for weight in method.target.parameters())


def test_options_that_do_not_fit():
    with pytest.raises(ValueError, match="network.dims must be 3 for loss.method=pgl, got 2"):
        config = load(None, ["loss.method=pgl", "pretrain.device=cpu"])
        build_method(config, build_backbone(config.network))
    with pytest.raises(ValueError, match=r"pretrain.batch_size must be at least 2 for pgl.global_weight above 0.*got 1"):
        made("pgl.global_weight=1", "pretrain.batch_size=1")
    for text, message in (
        ("pgl.crop_scale=1.4,1.1", "pgl.crop_scale must be SMALLEST,LARGEST"), ("pgl.flip=0.5,0.5,2", "pgl.flip must be three probabilities"),
        ("pgl.points=2,2", "pgl.points must be three numbers"), ("pgl.momentum=1.5", r"pgl.momentum must be in \[0, 1\]"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            load("pgl", [text])


@pytest.mark.parametrize("where", ["encoder", "decoder"])
def test_the_loss_falls(where):
    _, backbone, method = made(*STILL, EVEN, f"pgl.where={where}", "pgl.head_hidden=16")
    batch = batch_of()
    optimizer = torch.optim.AdamW([*backbone.parameters(), *method.heads.parameters()], lr=2e-2)
    losses = []
    for step in range(8):
        loss, _ = method.step(backbone, batch, generator())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        method.after_step(backbone, step, 8)
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


# whole runs


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    root = tmp_path_factory.mktemp("ct") / "data"
    write_ct_phantoms(root, patients=5, size=32, gap=(8.0, 9.0))
    return root


def test_a_resumed_run_is_bitwise_the_uninterrupted_one(phantoms, tmp_path, monkeypatch):
    options = load("pgl", [*TINY, "pretrain.checkpoint_every=2", f"data.cache={tmp_path / 'cache'}"])
    run(phantoms, tmp_path / "whole", options)
    real = Training.step

    def cut(self, step, *rest, **named):
        if step == 3:
            raise ZeroDivisionError("power cut")
        return real(self, step, *rest, **named)

    with monkeypatch.context() as patch:
        patch.setattr(Training, "step", cut)
        with pytest.raises(ZeroDivisionError):
            run(phantoms, tmp_path / "parts", options)
    torch.rand(7)
    run(phantoms, tmp_path / "parts", options, resume=True)
    whole, parts = (checkpoint.load(checkpoint.last(tmp_path / name)) for name in ("whole", "parts"))
    assert whole["step"] == parts["step"] == 4
    for part in ("backbone", "method"):
        assert whole[part].keys() == parts[part].keys()
        assert all(torch.equal(whole[part][name], parts[part][name]) for name in whole[part])
    assert any(name.startswith("target.backbone.") for name in whole["method"])
    assert any(not torch.equal(whole["method"][f"target.backbone.{name}"], value) for name, value in whole["backbone"].items())
    with pytest.raises(ValueError, match="pretrain.steps was 4, got 6"):  # the target's momentum depends on it
        run(phantoms, tmp_path / "parts", load(tmp_path / "parts/config.yaml", ["pretrain.steps=6"]), resume=True)


def test_from_volumes_to_dice(phantoms, tmp_path):
    """Encoder pre-trained, then probe and fine-tuning by windows over whole volumes of another spacing."""
    fast = "downstream.labelled=1 downstream.seeds=0 downstream.probe_steps=2 downstream.probe_lr=0.1 downstream.class_weights=none"
    fast += " downstream.finetune_steps=2 downstream.finetune_batch_size=2 downstream.finetune_lr=1e-3 downstream.overlays=1 downstream.bootstrap=50"
    options = load("pgl", [*TINY, *fast.split(), "pretrain.steps=1", "data.spacing=16,18,18", "downstream.sliding_overlap=0"])
    run(phantoms, tmp_path / "run", options)
    config = load(tmp_path / "run/config.yaml")
    backbone = checkpoint.load_backbone(tmp_path / "run")[0]
    assert backbone.coarse[2].num_batches_tracked > 0 == backbone.last[1].num_batches_tracked
    for what in ("probe", "finetune"):
        downstream.run(tmp_path / "run", config, what)
        rows = (tmp_path / f"run/{what}/results.csv").read_text()
        assert all(organ in rows for organ in ORGANS)
    model, _ = evaluate.load_model(next((tmp_path / "run/probe/models").glob("*pretrained*")), open_study(tmp_path / "run", config))
    assert model.backbone.last[1].num_batches_tracked > 0  # estimated, since the encoder's objective never ran the decoder


@pytest.mark.parametrize(("name", "options"), [("hippocampus", []), ("openkbp", ["data.spacing=8,12,12"])])
def test_real_volumes(name, options, tmp_path):
    folder = REAL / name
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder} (set PIX2REP_DATA)")
    for path in sorted((folder / "imagesTr").glob("*.nii.gz"))[:4]:
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / path.name).symlink_to(path.resolve())
    window = ["data.window=null"] if name == "hippocampus" else []
    run(tmp_path / "data", tmp_path / "run", load("pgl", [*TINY, UNET, *options, *window, "pretrain.steps=2"]))
    rows = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert all(math.isfinite(row["loss"]) for row in rows if row["event"] == "step")
