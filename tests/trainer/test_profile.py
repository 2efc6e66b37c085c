"""Bytes and seconds belong to the part that took them, predictions to the law that made them; the profiled step is the trainer's."""

import json
import time
from itertools import repeat
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from typer.testing import CliRunner

from pix2rep import fit, meter, profile, profile_report
from pix2rep.cli import app
from pix2rep.config import load
from pix2rep.data.slices import SliceSource
from pix2rep.fit import Law, fit_batch, fit_law, parse_size
from pix2rep.meter import CpuMemory, CpuSeconds, CudaMemory, CudaSeconds, Meter, Snapshot
from pix2rep.plain import COPIES, PlainLoss, similarity_bytes
from pix2rep.profile import PARTS, READING, Bytes, Profiled, folder_source, in_fresh_process, loss_bytes, merged, profile_step
from pix2rep.synthetic import synthetic
from pix2rep.training import Training
from pix2rep_kernels import Pix2RepLoss
from pix2rep_kernels.testing import error, tolerance
from volumes import dataset

TINY = (
    "data.size=32,32 network.channels=4,4,8,8,8 network.features=8 network.head_hidden=8 network.projection=8 loss.num_samples=64"
    " pretrain.batch_size=1 pretrain.device=cpu pretrain.threads=1"
).split()
CPU = torch.device("cpu")
NO_AVERAGE = tuple(part for part in PARTS if part not in (READING, "moving average"))


def profiled(*overrides, batch=1):
    config = load(None, [*TINY, *overrides])
    made = Profiled(config, batch, CPU)
    made.step("ours")
    return made


def test_cpu_memory_counts_tensors_to_the_byte():
    with Meter(CpuMemory()) as measured:
        measured("two, one freed")
        kept = torch.zeros(250)
        gone = torch.zeros(100, dtype=torch.float64)
        del gone
        measured("nothing")
        measured("one more, both freed")
        more = kept.clone()
        del kept, more
    assert measured.parts == [("two, one freed", (1000, 1800)), ("nothing", (1000, 1000)), ("one more, both freed", (0, 2000))]


@pytest.mark.parametrize("which", profile.LOSSES)
def test_parts_sum_to_the_total(which):
    """All that a step takes beyond what stands is given back, and between backward and optimiser only gradients and scalars are there."""
    made = profiled()
    parts = made.memory(which)
    assert tuple(parts) == NO_AVERAGE
    standing = made.standing()
    count = sum(parameter.numel() for parameter in made.training.parameters)
    assert standing["parameters"] == 4 * count
    assert standing["optimiser state"] == 2 * 4 * count + 4 * len(made.training.parameters)  # two moments, and a counter each
    assert standing["images"] == 4 * 32 * 32
    assert parts["optimiser"].kept == sum(part.added for part in parts.values()) == 0
    scalars = parts["networks backward"].kept - 4 * count
    assert 0 <= scalars <= 16  # the loss, and its detached copy for the log
    # At full resolution two convolutions to 4 channels and two to 8, each kept before its batch norm and after its activation.
    assert parts["backbone"].added > 2 * 4 * 32 * 32 * (2 * 2 * 4 + 2 * 2 * 8)


def test_a_part_that_comes_twice_is_one_row():
    stamps = [("views", (5, 9)), ("backbone", (20, 30)), ("loss forward", (30, 50)), ("backbone", (40, 45)), ("loss forward", (42, 70)), ("optimiser", (0, 60))]
    parts = merged(stamps)
    assert parts == {
        "views": Bytes(5, 5, 9), "backbone": Bytes(25, 40, 45), "loss forward": Bytes(12, 42, 70), "optimiser": Bytes(-42, 0, 60),
    }  # fmt: skip
    assert loss_bytes(stamps) == 70 - (5 + 25)  # networks and views hold 30 then


def test_what_a_gpu_holds_beside_the_tensors_is_named(monkeypatch):
    made = profiled()
    known = sum(made.standing().values())
    monkeypatch.setattr(profile, "allocated_bytes", lambda device: known + 512)
    assert made.standing()["workspaces and rounding"] == 512


def test_parts_in_mixed_precision():
    made = profiled("pretrain.amp=fp16", "pretrain.clip_grad=1", "loss.objective=barlow")
    assert tuple(made.seconds("ours")) == tuple(made.seconds("eager")) == NO_AVERAGE


def test_steps_that_read_from_a_folder(tmp_path):
    dataset(tmp_path, patients=3)
    config = load(None, [*TINY, "pretrain.batch_size=2"])
    with folder_source(tmp_path, config) as source:
        images = Profiled(config, 2, CPU, source).batch.images
        result = profile_step(config, source, losses=("ours",), repeats=3)
    assert images.shape == (2, 1, 32, 32) and 0 <= images.min() < images.max() <= 1
    parts = result["losses"]["ours"]["parts"]
    assert [part["part"] for part in parts] == [READING, *NO_AVERAGE]
    assert parts[0]["seconds"] > 0 and parts[0]["kept_bytes"] == parts[0]["peak_bytes"] == 0
    assert 0 < result["reading_cpu_seconds"] < result["losses"]["ours"]["step_seconds"]


def test_a_slow_loader_shows_as_waiting(tmp_path, monkeypatch, capsys):
    dataset(tmp_path, patients=3)
    config, real = load(None, TINY), SliceSource.batch

    def slow(self, indices):
        time.sleep(0.3)
        return real(self, indices)

    with folder_source(tmp_path, config) as source:
        monkeypatch.setattr(SliceSource, "batch", slow)
        result = profile_step(config, source, losses=("ours",), repeats=2)
    step = result["losses"]["ours"]
    assert step["parts"][0]["seconds"] > 0.1 and result["reading_cpu_seconds"] < 0.1  # it slept
    profile_report.show_step({"memory_source": "bytes"} | result)
    assert "ours: the loader takes" in capsys.readouterr().out


def test_eager_stores_the_similarities_and_ours_does_not():
    made = profiled("loss.num_samples=null")
    one = similarity_bytes(made.config.loss, 1, 32 * 32)
    assert one == 4 * 2048**2
    eager, ours = made.memory("eager"), made.memory("ours")
    before = eager["heads"].kept
    assert eager["loss forward"].peak - before >= one
    assert COPIES * one <= eager["loss backward"].peak - before < (COPIES + 0.5) * one
    assert max(ours[part].peak for part in ("loss forward", "loss backward")) - ours["heads"].kept < one / 10


def test_profiled_step_is_the_trainers():
    made = profiled(batch=2)
    made.memory("ours"), made.seconds("ours")
    config = made.config
    plain = Training(config, CPU, source=None)
    for step in range(3):
        plain.step(step, repeat(synthetic(config, 2)), monitor=False)
    for mine, theirs in zip(made.training.parameters, plain.parameters, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("extra", ["outside=keep", "outside=drop", "per_image=true", "head_on=rows", "per_image=true loss.head_on=rows loss.outside=drop"])
@pytest.mark.parametrize("samples", ["40", "null"])
@pytest.mark.parametrize("objective", ["infonce", "barlow"])
def test_plain_loss_is_the_fused_one(objective, samples, extra):
    loss = load(None, [f"loss.objective={objective}", f"loss.num_samples={samples}", *f"loss.{extra}".split(), "loss.lambda_param=0.1"]).loss
    fused = Pix2RepLoss(objective, lambda_param=0.1, num_samples=loss.num_samples, per_image=loss.per_image, outside=loss.outside)
    theta = torch.eye(2, 3).repeat(2, 1, 1) + 0.2 * torch.randn(2, 2, 3)

    def step(criterion, dtype):
        maps = [torch.randn(2, 6, 8, 8, generator=torch.Generator().manual_seed(k)).to(dtype).requires_grad_() for k in (1, 2)]
        weight = torch.randn(6, 5, generator=torch.Generator().manual_seed(4)).to(dtype).requires_grad_()
        head = (lambda rows: F.batch_norm(rows, None, None, training=True).tanh() @ weight) if loss.head_on == "rows" else None
        value = criterion(*maps, theta.to(dtype), head=head, generator=torch.Generator().manual_seed(3))
        value.backward()
        return [value.detach(), *(f.grad for f in maps), *([weight.grad] if head else [])]

    truth = step(PlainLoss(loss), torch.float64)
    assert error(step(fused, torch.float32), truth) <= tolerance(error(step(PlainLoss(loss), torch.float32), truth), torch.float32)


def test_resident_memory_holds_the_tensors():
    """The kernel's count is that of whole pages: at least the tensors, less what the small step before left in malloc's hands."""
    made = profiled("loss.num_samples=null")
    tensors = max(part.peak for part in made.memory("eager").values())
    grown = in_fresh_process(made.config, "eager")["resident_bytes"]
    assert 0.8 * tensors < grown < 2 * tensors


@pytest.mark.parametrize(("degree", "coefficients"), [(1, (5e6, 3e5)), (2, (5e6, 3e5, 7e4))])
def test_fit_recovers_its_law(degree, coefficients):
    def value(batch):
        return sum(c * batch**k for k, c in enumerate(coefficients))

    law, residual = fit_law({batch: {"a": value(batch), "b": 1} for batch in (1, 2, 4)}, degree)
    assert law.parts["a"] == pytest.approx(coefficients, rel=1e-9)
    assert residual == (pytest.approx(0, abs=1e-12) if degree == 1 else None)
    largest = law.largest(1e9)
    assert value(largest) <= 1e9 < value(largest + 1)
    assert law.largest(1e6) == 0
    assert law.largest(1e300) == fit.MOST


def test_fit_follows_the_moment_that_grows():
    """A part whose peak is at a fixed cost for one image and in the activations for more; another that takes over at larger batches."""
    measured = {batch: {"a": max(100, 60 * batch), "b": 10 + 70 * batch} for batch in (1, 2, 4)}
    law, residual = fit_law(measured, 1)
    assert [round(law(batch)) for batch in (1, 2, 100)] == [80, 150, 7010]
    assert residual == pytest.approx(0.4)  # said: at one image the law of "a" gives 60
    assert Law({"a": (1.0, 2.0)}).plus("a", (0.0, 0.0, 3.0)).parts == {"a": (1.0, 2.0, 3.0)}


@pytest.mark.parametrize(("text", "count"), [("24GiB", 24 * 2**30), ("1.5 GB", 1_500_000_000), ("200mib", 200 * 2**20), ("12b", 12)])
def test_size(text, count):
    assert parse_size(text) == count


@pytest.mark.parametrize("text", ["24", "GiB", "24XB", "-1GiB", "0GiB", "", "24GiB more"])
def test_size_refused(text):
    with pytest.raises(ValueError, match="--fit must be a size above 0 with a unit, such as 24GiB or 500MB"):
        parse_size(text)


def test_predicted_batch_is_what_a_larger_step_takes(monkeypatch):
    monkeypatch.setattr(fit, "CPU_SIMILARITIES", 2**20)  # as if the eager similarities were too large to measure
    result = fit_batch(load(None, TINY), 12 * 2**20, limit=30)
    rows = {(row["num_samples"], row["loss"]): row for row in result["rows"]}
    for row in rows.values():
        assert row["predicted_bytes"] <= 12 * 2**20 or row["largest_batch"] == 0
    for row in (rows[64, "ours"], rows[64, "eager"], rows[None, "ours"]):
        assert row["source"] == "measured" and row["largest_batch"] > 4
        seen = row["verified"]
        assert seen["batch"] == row["largest_batch"]
        assert seen["measured_bytes"] == pytest.approx(seen["predicted_bytes"], rel=fit.CLOSE)
    dear = rows[None, "eager"]
    assert dear["source"] == "shapes" and dear["largest_batch"] == 0  # three copies of 16 MiB for one image
    made = profiled("loss.num_samples=null")
    assert dear["predicted_bytes"] == pytest.approx(max(made.memory_of(1, "eager").values()), rel=0.05)


def test_eager_that_does_not_fit_is_stated(monkeypatch, capsys):
    monkeypatch.setattr(profile, "usable_bytes", lambda device: 2**20)
    result = profile_step(load(None, [*TINY, "loss.num_samples=null"]), repeats=1)
    assert result["losses"]["eager"] == {"would_need_bytes": COPIES * 4 * 2048**2}
    assert result["losses"]["ours"]["peak_bytes"] > 0
    profile_report.show_step({"memory_source": "bytes"} | result)
    assert "eager: not run, would need 50 MB for the similarities alone (3 copies of 17 MB" in capsys.readouterr().out


def pix2rep(*arguments):
    return CliRunner().invoke(app, ["profile", *map(str, arguments)])


def test_command_prints_and_writes(tmp_path):
    file = tmp_path / "out" / "step.json"
    result = pix2rep(*TINY, "--no-resident", "--limit", 1, "--json", file)
    assert result.exit_code == 0, result.output
    assert all(part in result.output for part in (*NO_AVERAGE, "parameters", "images/s", "peak of all"))
    written = json.loads(file.read_text())
    assert [path.name for path in file.parent.iterdir()] == ["step.json"]
    assert {"torch", "python"} <= set(written["versions"]) and written["config"]["loss"]["num_samples"] == 64
    for entry in written["losses"].values():
        assert sum(part["share"] for part in entry["parts"]) == pytest.approx(1)
        assert sum(part["added_bytes"] for part in entry["parts"]) == entry["after_bytes"] - sum(written["standing"].values())


def test_command_fits(tmp_path, monkeypatch):
    monkeypatch.setattr(fit, "CPU_SIMILARITIES", 2**20)
    result = pix2rep(*TINY, "--fit", "3MiB", "--limit", 1, "--json", tmp_path / "fit.json")
    assert result.exit_code == 0, result.output
    assert "largest batch within 3.00 MiB" in result.output and "out of memory" not in result.output
    assert [row["loss"] for row in json.loads((tmp_path / "fit.json").read_text())["rows"]] == ["ours", "eager", "ours", "eager"]


def test_command_fits_another_method():
    result = pix2rep(*TINY, "loss.method=bim", "bim.heads=1", "bim.clusters=4", "--fit", "30MiB", "--limit", 1)
    assert result.exit_code == 0, result.output
    assert "ours" in result.output and "eager" not in result.output and "batches" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--fit", "24"], "error: --fit must be a size above 0 with a unit, such as 24GiB or 500MB (B, kB"),
        (["--snapshot", "{folder}/memory.pickle"], "error: --snapshot must be used on a CUDA device (PyTorch records no allocations of a CPU)"),
        (["--data", "{folder}"], "error: data.root must be a folder with .nii or .nii.gz files"),
        (["--fit", "1GiB", "--snapshot", "{folder}/memory.pickle"], "--fit takes neither --snapshot nor --data"),
        (["loss.method=bin"], "error: loss.method must be one of pix2rep, bim"),
        (["loss.objective=barlo"], "error: loss.objective must be 'infonce' or 'barlow', got 'barlo'"),
    ],
)
def test_bad_input_ends_in_one_line(tmp_path, arguments, message):
    result = pix2rep(*(argument.format(folder=tmp_path) for argument in [*TINY, *arguments]))
    assert result.exit_code == 2
    assert message in result.output
    assert not list(tmp_path.iterdir())


class FakeCuda:
    """torch.cuda's counters, events and recorder as far as `meter` uses them."""

    def __init__(self, monkeypatch):
        self.live = self.peak = self.clock = 0
        self.calls = []
        for name, value in {
            "memory_allocated": lambda device: self.live,
            "max_memory_allocated": lambda device: self.peak,
            "reset_peak_memory_stats": lambda device: setattr(self, "peak", self.live),
            "synchronize": lambda device: self.calls.append("synchronize"),
            "current_stream": lambda device: self,
            "Event": lambda enable_timing: FakeEvent(),
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda **options: self.calls.append(options.get("enabled", "all")))
        monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", lambda name: (self.calls.append("dump"), Path(name).write_text("snapshot")))

    def take(self, count):
        self.live += count
        self.peak = max(self.peak, self.live)


class FakeEvent:
    def record(self, stream):
        stream.clock += 1
        self.at = stream.clock

    def elapsed_time(self, later):
        return 1e3 * (later.at - self.at)


def test_cuda_sources_with_fake_counters(monkeypatch):
    cuda, device = FakeCuda(monkeypatch), torch.device("cuda")
    cuda.take(500)
    with Meter(CudaMemory(device)) as measured:
        cuda.take(1000), cuda.take(-1000)  # before the first part
        measured("a")
        cuda.take(100), cuda.take(-60)
        measured("b")
        cuda.take(-40)
    assert measured.parts == [("a", (40, 100)), ("b", (0, 40))]
    with Meter(CudaSeconds(device)) as measured:
        measured("a")
        measured("b")
    assert measured.parts == [("a", 1.0), ("b", 1.0)] and cuda.calls == ["synchronize", "synchronize"]  # none within
    assert isinstance(meter.time_source(CPU), CpuSeconds) and isinstance(meter.memory_source(device), CudaMemory)


def test_snapshot_is_whole_or_absent_and_recording_ends(monkeypatch, tmp_path):
    cuda, device = FakeCuda(monkeypatch), torch.device("cuda")
    with Snapshot(tmp_path / "memory.pickle", device):
        pass
    assert (tmp_path / "memory.pickle").read_text() == "snapshot"
    with pytest.raises(ZeroDivisionError), Snapshot(tmp_path / "other.pickle", device):
        raise ZeroDivisionError
    assert cuda.calls == ["all", "synchronize", "dump", None, "all", None]
    assert [path.name for path in tmp_path.iterdir()] == ["memory.pickle"]


def test_steps_are_written_with_what_they_belong_to(tmp_path, monkeypatch, capsys):
    from benchmarks import step

    monkeypatch.setattr(step, "NETWORKS", {"tiny": load(None, TINY)})
    monkeypatch.setattr(step, "batches", lambda full, large: {2: [("infonce", 64), ("barlow", None)]})
    monkeypatch.setattr(step, "METHODS", {2: [("lrc", 3)]})
    step.main(["--threads", "1", "--repeats", "1", "--limit", "1", "--json", str(tmp_path / "step.json")])
    found = json.loads((tmp_path / "step.json").read_text())
    assert found["threads"] == 1 and {"device", "commit", "versions", "command"} <= found.keys()
    sides = [(row["objective"], row["num_samples"], row["loss"], row["B"]) for row in found["rows"]]
    assert sides == [(objective, samples, loss, 2) for objective, samples in (("infonce", 64), ("barlow", None)) for loss in ("ours", "eager")] + [
        ("lrc", 3, "ours", 1)
    ]
    assert all(row["images_per_s"] > 0 and 0 < row["loss_share"] < 1 and row["loss_MiB"] >= 0 for row in found["rows"])
    assert capsys.readouterr().out.count("tiny") == 5
