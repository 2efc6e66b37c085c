"""A run ends in the same weights however often it stops; what goes wrong is said; the parts of a step."""

import json
import math
import os
import signal

import nibabel
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from pix2rep import checkpoint, training
from pix2rep.config import PretrainConfig, load
from pix2rep.methods.base import Batch
from pix2rep.methods.pix2rep import Pix2Rep
from pix2rep.monitor import collapse
from pix2rep.networks import CONV
from pix2rep.pretrain import Interrupted, NonFiniteLoss, run
from pix2rep.training import Training, learning_rate, seed_of

TINY = (
    "data.size=32,32 network.channels=4,4,8,8,8 network.features=8 network.head_hidden=8 network.projection=8 loss.num_samples=64"
    " split.val=0.2 spatial.elastic=0.5 pretrain.steps=12 pretrain.batch_size=3 pretrain.checkpoint_every=5 pretrain.log_every=4"
    " pretrain.lr=3e-3 pretrain.device=cpu pretrain.threads=1"
).split()


@pytest.fixture(scope="module")
def volumes(tmp_path_factory):
    """Five patients, one volume each: rings about a centre that moves, on a ramp, with noise."""
    root = tmp_path_factory.mktemp("volumes")
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:36, :36]
    for patient in range(5):
        rings = 100 * np.cos(np.hypot(y - 14 - patient, x - 20 + patient) / 2) + 10 * x
        array = (rng.normal(200, 10, (36, 36, 4)) + rings[..., None]).astype(np.int16)
        (root / f"p{patient}").mkdir()
        nibabel.save(nibabel.Nifti1Image(array, np.diag([1.5, 1.5, 8, 1])), root / f"p{patient}" / "image.nii.gz")
    return root


def weights_of(run_dir):
    return load_file(run_dir / "weights.safetensors")


def rows_of(run_dir, event="step"):
    return [row for line in (run_dir / "log.jsonl").read_text().splitlines() if (row := json.loads(line))["event"] == event]


def stop_at(monkeypatch, step, how):
    """Make the training step `step` (from 0) call `how` first, once."""
    real, stopped = Training.step, []

    def wrapped(self, number, batches, monitor):
        if number == step and not stopped:
            stopped.append(number)
            how()
        return real(self, number, batches, monitor)

    monkeypatch.setattr(Training, "step", wrapped)


def crash():
    raise ZeroDivisionError("power cut")


@pytest.mark.parametrize(
    "extra",
    [
        [],
        ["pretrain.accumulate=2", "pretrain.schedule=cosine", "pretrain.warmup=0.25", "pretrain.clip_grad=1", "pretrain.weight_decay=0.1"],
        ["pretrain.amp=fp16", f"network.name={__name__}:dropout_backbone"],
    ],
    ids=["plain", "accumulate-cosine-clip", "fp16-dropout"],
)
@pytest.mark.parametrize("how", ["crash between checkpoints", "signal"])
def test_resumed_run_is_bitwise_the_uninterrupted_one(volumes, tmp_path, monkeypatch, extra, how):
    config = load(None, TINY + extra)
    run(volumes, tmp_path / "whole", config)
    handler = signal.getsignal(signal.SIGINT)  # ignored where a shell started the tests in the background
    if how == "signal":  # a checkpoint after the step that it met
        stop_at(monkeypatch, 6, lambda: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(Interrupted, match=r"SIGINT after step 7 of 12; checkpoint: \S+step_0000007.pt; continue with: pix2rep p"):
            run(volumes, tmp_path / "parts", config)
        assert signal.getsignal(signal.SIGINT) is handler
    else:  # steps 6 to 9 are lost and taken again
        stop_at(monkeypatch, 9, crash)
        with pytest.raises(ZeroDivisionError):
            run(volumes, tmp_path / "parts", config)
    assert not (tmp_path / "parts" / "weights.safetensors").exists()
    torch.rand(7)  # the global stream has moved on
    run(volumes, tmp_path / "parts", config, resume=True)

    whole, parts = weights_of(tmp_path / "whole"), weights_of(tmp_path / "parts")
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    timed = ("time", "images_per_s", "peak_memory_mib")
    logs = [[{k: v for k, v in row.items() if k not in timed} for row in rows_of(tmp_path / part)] for part in ("whole", "parts")]
    assert logs[0] == logs[1]
    assert [row["step"] for row in logs[0]] == [4, 8, 12]


def test_seed_decides_the_weights(volumes, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run(volumes, tmp_path / name, load(None, [*TINY, "pretrain.steps=2", f"pretrain.seed={seed}"]))
    a, b, c = (weights_of(tmp_path / name) for name in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["conv_0.conv_0.conv.weight"], c["conv_0.conv_0.conv.weight"])


def test_run_folder(volumes, tmp_path, capsys):
    config = load(None, TINY)
    path = run(volumes, tmp_path / "run", config)
    assert path == tmp_path / "run" / "weights.safetensors"
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir()) == ["last.pt", "step_0000010.pt", "step_0000012.pt"]
    assert checkpoint.load(checkpoint.last(tmp_path / "run"))["step"] == 12
    split = json.loads((tmp_path / "run" / "split.json").read_text())
    assert len(split["pretrain"]) == 3

    backbone, loaded = checkpoint.load_backbone(tmp_path / "run")
    assert loaded.data.root == str(volumes)
    assert loaded.pretrain == config.pretrain
    assert not backbone.training
    assert all(torch.equal(value, weights_of(tmp_path / "run")[name]) for name, value in backbone.state_dict().items())

    from monai.networks.nets import BasicUNet

    plain = BasicUNet(2, 1, 4, features=(4, 4, 8, 8, 8, 8), norm="batch")
    keys = plain.load_state_dict(weights_of(tmp_path / "run"), strict=False)
    assert (sorted(keys.missing_keys), keys.unexpected_keys) == (["final_conv.bias", "final_conv.weight"], [])

    row = rows_of(tmp_path / "run")[-1]
    assert {"loss", "lr", "images_per_s", "peak_memory_mib", "alignment", "uniformity", "dead_dimensions"} <= row.keys()
    assert "step 12/12  loss " in capsys.readouterr().err


def test_pretraining_tells_pixels_apart(volumes, tmp_path):
    """Without intensity changes the ramp and the rings name every pixel: the loss falls well below that of features that say nothing."""
    plain = [f"photometric.{key}=0" for key in ("noise_p", "blur_p", "gamma_p", "bias_p", "invert_p")]
    longer = ["pretrain.lr=1e-2", "pretrain.steps=40", "pretrain.batch_size=4"]
    easier = ["loss.temperature=0.1", "spatial.scale=0.7,0.95", "spatial.elastic=0"]
    run(volumes, tmp_path / "run", load(None, [*TINY, *plain, *longer, *easier]))
    rows = rows_of(tmp_path / "run")
    nothing = math.log(2 * 64 - 1)
    assert rows[0]["loss"] > nothing - 0.4
    assert np.mean([row["loss"] for row in rows[-3:]]) < nothing - 0.8
    assert rows[-1]["alignment"] < rows[0]["alignment"]


def test_accumulation_is_the_mean_of_the_gradients(volumes, tmp_path, monkeypatch):
    used, each, weight = [], [], []
    update, method_step, build = torch.optim.AdamW.step, Pix2Rep.step, training.build_backbone

    def built(config):
        backbone = build(config)
        weight.append(backbone.conv_0.conv_0.conv.weight)
        return backbone

    def updated(self, *arguments):
        used.append(weight[0].grad.clone())
        return update(self, *arguments)

    def recorded(self, *arguments):
        loss, stats = method_step(self, *arguments)
        each.append(torch.autograd.grad(loss, weight[0], retain_graph=True)[0])
        return loss, stats

    monkeypatch.setattr(training, "build_backbone", built)
    monkeypatch.setattr(torch.optim.AdamW, "step", updated)
    monkeypatch.setattr(Pix2Rep, "step", recorded)
    run(volumes, tmp_path / "run", load(None, [*TINY, "pretrain.accumulate=3", "pretrain.steps=1"]))
    assert len(each) == 3
    assert not torch.equal(each[0], each[1])
    torch.testing.assert_close(used[0], sum(each) / 3)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_divergence_stops_with_step_patients_and_checkpoint(volumes, tmp_path, monkeypatch, what):
    real, calls = Pix2Rep.step, []

    class Blow(torch.autograd.Function):
        """Identity whose gradient is not finite."""

        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * math.nan

    def step(self, *arguments):
        calls.append(1)
        loss, stats = real(self, *arguments)
        if len(calls) == 15:  # accumulate 2: step 8, second micro-batch is call 16
            loss = loss * math.nan if what == "loss" else Blow.apply(loss)
        return loss, stats

    monkeypatch.setattr(Pix2Rep, "step", step)
    config = load(None, [*TINY, "pretrain.accumulate=2", "pretrain.log_every=100"])
    with pytest.raises(NonFiniteLoss, match=r"last checkpoint: \S+last.pt \(step 5\)") as error:
        run(volumes, tmp_path / "run", config)
    # The gradient of step 8 shows in the loss of step 9.
    assert f"loss must be finite, got nan at step {8 if what == 'loss' else 9}; patients in the batch: p" in str(error.value)
    assert error.value.exit_code == 3
    event = rows_of(tmp_path / "run", "diverged")[0]
    split = json.loads((tmp_path / "run" / "split.json").read_text())
    assert set(event["patients"]) <= set(split["pretrain"])
    assert not (tmp_path / "run" / "weights.safetensors").exists()
    monkeypatch.undo()
    run(volumes, tmp_path / "run", config, resume=True)


def test_weights_that_are_not_finite_are_never_saved(volumes, tmp_path, monkeypatch):
    real = Training.step

    def step(self, number, batches, monitor):
        stats = real(self, number, batches, monitor)
        if number == 4:  # the step before a checkpoint
            with torch.no_grad():
                next(self.method.parameters())[0] = math.inf
        return stats

    monkeypatch.setattr(Training, "step", step)
    with pytest.raises(NonFiniteLoss, match="weights must be finite, got NaN or inf at step 5; .*last checkpoint: none"):
        run(volumes, tmp_path / "run", load(None, TINY))


def test_broken_volume_is_skipped_and_said(volumes, tmp_path, capsys):
    data = tmp_path / "data"
    for path in sorted(volumes.rglob("*.nii.gz")):
        (data / path.parent.name).mkdir(parents=True)
        (data / path.parent.name / path.name).write_bytes(path.read_bytes())
    (data / "p9").mkdir()
    (data / "p9" / "image.nii.gz").write_bytes(path.read_bytes()[:200])
    run(data, tmp_path / "run", load(None, [*TINY, "pretrain.steps=1", "data.skip_bad=true"]))
    assert [row["case"] for row in rows_of(tmp_path / "run", "skipped")] == ["p9_image"]
    assert "skipped 1 of 6 volumes" in capsys.readouterr().err


def test_refusals(volumes, tmp_path):
    config = load(None, [*TINY, "pretrain.steps=5"])
    with pytest.raises(FileNotFoundError, match="data.root must be a folder"):
        run(tmp_path / "nothing", tmp_path / "run", config)
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="pretrain.device must be a device of this machine, got 'gpu'"):
        run(volumes, tmp_path / "run", load(None, [*TINY, "pretrain.device=gpu"]))
    run(volumes, tmp_path / "run", config)
    with pytest.raises(FileExistsError, match="run must be a new folder.*a run of 5 steps; continue it with --resume"):
        run(volumes, tmp_path / "run", config)
    with pytest.raises(ValueError, match="config must be the checkpoint's to resume: loss.temperature was 0.53, got 0.1"):
        run(volumes, tmp_path / "run", load(None, [*TINY, "pretrain.steps=5", "loss.temperature=0.1"]), resume=True)
    with pytest.raises(ValueError, match="pretrain.steps must be at least the 5 steps taken, got 4"):
        run(volumes, tmp_path / "run", load(None, [*TINY, "pretrain.steps=4"]), resume=True)
    run(volumes, tmp_path / "run", load(None, [*TINY, "pretrain.steps=6", "downstream.seeds=7"]), resume=True)
    smaller = tmp_path / "smaller"
    for path in sorted(volumes.rglob("*.nii.gz")):
        array = nibabel.load(path)
        (smaller / path.parent.name).mkdir(parents=True)
        nibabel.save(array.slicer[..., :3], smaller / path.parent.name / path.name)
    with pytest.raises(ValueError, match="data must be those of the checkpoint, 3 volumes with 12 slices, got 3 with 9"):
        run(smaller, tmp_path / "run", load(None, [*TINY, "pretrain.steps=6"]), resume=True)


def test_damaged_checkpoint_is_named(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.pt").write_bytes(b"half a file")
    with pytest.raises(ValueError, match="checkpoint must be a file written by pix2rep pretrain, cannot read .*last.pt"):
        checkpoint.load(checkpoint.last(tmp_path))


def test_checkpoint_of_an_older_version_is_refused_by_name(volumes, tmp_path):
    config = load(None, [*TINY, "pretrain.steps=1"])
    run(volumes, tmp_path, config)
    path = checkpoint.last(tmp_path)
    torch.save(checkpoint.load(path) | {"format": 1}, path)
    with pytest.raises(checkpoint.OtherFormat, match=r"checkpoint must have format 2 to be resumed, got 1 in \S+last.pt: another version"):
        run(volumes, tmp_path, config, resume=True)
    checkpoint.load_backbone(tmp_path)


def test_atomic_leaves_the_old_file_when_the_write_fails(tmp_path):
    path = tmp_path / "new" / "file.nii.gz"
    with checkpoint.atomic(path) as temporary:
        assert temporary.name.endswith(".nii.gz")
        temporary.write_text("first")
    with pytest.raises(ZeroDivisionError), checkpoint.atomic(path) as temporary:
        temporary.write_text("sec")
        crash()
    assert path.read_text() == "first"
    assert list(path.parent.iterdir()) == [path]


def test_unfinished_run_has_no_backbone(tmp_path):
    with pytest.raises(FileNotFoundError, match="run must be the folder of a finished pre-training"):
        checkpoint.load_backbone(tmp_path)


class Pointwise(nn.Module):
    """Features that commute with every linear warp exactly."""

    out_channels = 6

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 1, bias=False)

    def forward(self, x):
        return self.conv(x)


@pytest.mark.parametrize("elastic", [0.0, 1.0])
def test_equivariant_features_are_aligned(elastic):
    """View 2 and the features of view 1 go through one grid, and only they."""
    plain = [f"photometric.{key}=0" for key in ("noise_p", "blur_p", "gamma_p", "bias_p", "invert_p")]
    method = Pix2Rep(load(None, [*plain, f"spatial.elastic={elastic}", "loss.temperature=0.1"]), Pointwise())
    method.head = nn.Conv2d(6, 5, 1, bias=False)
    batch = Batch(torch.rand(4, 1, 24, 24))
    loss, stats = method.step(Pointwise(), batch, torch.Generator().manual_seed(0), monitor=True)
    assert stats["alignment"] < 1e-10
    assert loss.requires_grad
    assert method.step(Pointwise(), batch, torch.Generator().manual_seed(0))[1] == {}


@pytest.mark.parametrize("dims", [2, 3])
def test_head_on_rows_sees_the_pixels_drawn(dims):
    """A linear head gives the loss that it gives on maps; it is called once a view, with as many rows as pixels are drawn."""
    seen, losses = [], []
    for where in ("rows", "map"):
        config = load(None, [f"loss.head_on={where}", "loss.num_samples=50", f"network.dims={dims}", "data.size=" + ",".join(["12"] * dims)])
        method = Pix2Rep(config, Pointwise())
        torch.manual_seed(1)
        method.head = CONV[dims](6, 5, 1, bias=False)
        method.head.register_forward_hook(lambda _, given, out: seen.append(out[0, 0].numel() * len(out)))
        batch = Batch(torch.rand(2, 1, *[12] * dims, generator=torch.Generator().manual_seed(2)))
        loss, stats = method.step(lambda x: torch.cat([x + k for k in range(6)], 1).sin(), batch, torch.Generator().manual_seed(0), monitor=True)
        losses.append(loss)
        assert 0 <= stats["alignment"] < 4
    assert seen == [50, 50, 2 * 12**dims, 2 * 12**dims]
    torch.testing.assert_close(*losses)


def test_collapse_statistics():
    rows = torch.randn(256, 16)
    spread = collapse(rows, rows * 3)
    assert spread["alignment"] < 1e-10
    assert spread["dead_dimensions"] == 0
    # On the unit sphere in 16 dimensions |z - z'|^2 has mean 2 and variance 4/16: exp(-2 x) averages to about exp(-4 + 0.5).
    assert spread["uniformity"] == pytest.approx(-3.5, abs=0.1)
    assert collapse(rows, torch.randn(256, 16))["alignment"] == pytest.approx(2, abs=0.1)
    point = collapse(rows, torch.ones(256, 16))
    assert point["uniformity"] == pytest.approx(0, abs=1e-6)
    assert point["dead_dimensions"] == 16
    half = rows.clone()
    half[:, :8] = 0
    assert collapse(half, half)["dead_dimensions"] == 8
    assert math.isnan(collapse(rows[:1], rows[:1])["alignment"])


def dropout_backbone(config):
    """A backbone that draws from the global stream."""
    network = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(8, 8, 3, padding=1))
    network.out_channels = 8
    return network


def test_learning_rate():
    opt = PretrainConfig(steps=100, lr=1.0, warmup=0.1, schedule="cosine")
    rates = [learning_rate(opt, step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[10] == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert 0 < rates[-1] < 1e-3
    assert learning_rate(PretrainConfig(lr=0.5), 9_999) == 0.5


def test_seeds_of_micro_batches_differ():
    assert len({seed_of(seed, index) for seed in range(20) for index in range(200)}) == 4000
