"""A kill or a full disk at any moment of writing loses no checkpoint and no result; two processes never write to one run."""

import errno
import fcntl
import io
import json
import logging
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from pix2rep import checkpoint, disk, pretrain
from pix2rep.config import load
from pix2rep.log import RunLog, read_log, say
from volumes import dataset

EVERY = os.environ.get("PIX2REP_TEST") == "full"  # else every other moment
ALLOCATING = ("open", "write", "fsync", "link", "mkdir")
TINY = (
    "data.size=8,8 network.name=crash:backbone network.features=4 network.head_hidden=4 network.projection=4 loss.num_samples=16"
    " split.val=0 split.test=0.3 pretrain.steps=2 pretrain.batch_size=2 pretrain.checkpoint_every=1 pretrain.log_every=1 pretrain.keep=1"
    " pretrain.device=cpu pretrain.threads=1"
).split()


class Server:
    """crash.py, with a job a call."""

    def __init__(self, root):
        self.root, script = root, Path(__file__).with_name("crash.py")
        self.process = subprocess.Popen(
            [sys.executable, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )

    def __call__(self, call, *arguments, how=None, at=0):
        print(json.dumps({"how": how, "at": at, "call": call, "arguments": arguments}), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())

    def pretrain(self, name, how=None, at=0, resume=False):
        return self("pretrain", str(self.root / "data"), str(self.root / name), self.options, resume, how=how, at=at)

    @property
    def options(self):
        return [*TINY, f"data.cache={self.root / 'cache'}"]

    def results(self, text, how=None, at=0):
        return self("results", str(self.root), text[0], text, how=how, at=at)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    root = tmp_path_factory.mktemp("crash")
    dataset(root / "data", patients=3)
    started = Server(root)
    try:
        started.pretrain("first")
        yield started
    finally:
        started.process.kill()
        started.process.wait()
        started.process.stdin.close(), started.process.stdout.close()


@pytest.fixture(scope="module")
def moments(server):
    """{number: operation} of an undisturbed run, but for those of its first checkpoint: the second is written alike."""
    status, trace, error = server.pretrain("whole")
    assert (status, error) == (0, None)
    first, second = (next(k for k, name in enumerate(trace) if f"step_000000{step}" in name) for step in (1, 2))
    return {k: trace[k] for k in (*range(first), *range(second, len(trace)))}


def second_checkpoint(moments):
    return next(k for k, operation in moments.items() if "step_0000002" in operation)


def left_behind(folder):
    return [path.name for path in folder.rglob("*") if disk.TEMPORARY.fullmatch(path.name)]


def resumed_is_the_undisturbed_one(server, name):
    status, _, error = server.pretrain(name, resume=True)
    assert (status, error) == (0, None), name
    run, whole = server.root / name, server.root / "whole"
    assert (run / "weights.safetensors").read_bytes() == (whole / "weights.safetensors").read_bytes(), name
    assert [row["step"] for row in read_log(run / "log.jsonl") if row["event"] == "step"] == [1, 2], name
    assert not left_behind(run), name


def test_killed_anywhere_it_resumes_to_the_same_bits(server, moments):
    for k, operation in list(moments.items())[:: 1 if EVERY else 2]:
        name = f"kill{k}"
        assert server.pretrain(name, "kill", k)[0] == -signal.SIGKILL, operation
        begun = (server.root / name / "config.yaml").exists()
        if k >= second_checkpoint(moments):
            assert checkpoint.newest(server.root / name)[1]["step"] >= 1, operation  # the first checkpoint, or already the second
        if begun and k % 8 == 0:
            assert "run must be a new folder" in server.pretrain(name)[2], operation
        resumed_is_the_undisturbed_one(server, name)


def test_full_disk_anywhere_is_said_once_and_the_run_resumes(server, moments):
    allocating = [(k, operation) for k, operation in moments.items() if operation.split()[0] in ALLOCATING]
    for k, operation in allocating[:: 1 if EVERY else 2]:
        name = f"full{k}"
        _, _, error = server.pretrain(name, "full", k)
        assert error.startswith(f"DiskFull: {server.root}"), (operation, error)
        assert "cannot be written: the disk is full; " in error and error.endswith(f"{server.root / name} --resume"), (operation, error)
        saved = checkpoint.last(server.root / name)
        assert (f"last good checkpoint: {saved} (step " if saved else "no checkpoint yet") in error, (operation, error)
        assert saved or k < second_checkpoint(moments), operation
        assert not left_behind(server.root / name), operation
        resumed_is_the_undisturbed_one(server, name)


def test_new_results_come_whole_or_not_at_all(server):
    folder = server.root / "probe"
    trace = server.results("a first one")[1]
    (folder / "notes.txt").write_text("mine")
    texts = ["a first one"]

    def check():
        files = [path for path in folder.rglob("*.*") if path.suffix != ".txt"]
        (text,) = {json.loads(path.read_text())["text"] for path in files}
        assert sorted(str(path.relative_to(folder)) for path in files) == sorted(
            ["results.csv", "results.json", f"models/{text[0]}.safetensors", f"models/{text[0]}-2.safetensors"]
        )
        assert (folder / "notes.txt").read_text() == "mine"
        return text

    k = 0
    while True:  # to the first moment at which the writer has ended
        texts.append(f"{'bc'[k % 2]} of {k}")
        status, trace, _ = server.results(texts[-1], "kill", k)
        assert check() in texts[-2:]
        texts = [check()]
        if status == 0:
            break
        k += 1
    assert k > 20
    for k in range(0, len(trace), 1 if EVERY else 3):
        new = f"{'de'[k % 2]} of {k}"
        error = server.results(new, "full", k)[2]
        assert error is None or error.startswith("DiskFull"), error
        assert check() == (texts[-1] if error else new)
        texts = [check()]
    assert server.results("e at last")[2] is None and check() == "e at last"
    assert not list(server.root.glob("probe.partial")) and not list(server.root.glob("probe.old"))


def test_second_process_is_refused(server):
    run = server.root / "locked"
    run.mkdir()
    with disk.lock(run / "lock", str(run)):
        error = server.pretrain("locked")[2]
        assert error.startswith(f"InUse: {run} is being written by process {os.getpid()} on ") and "wait until it ends" in error
        assert server.pretrain("locked", resume=True)[2] == error
    assert server.pretrain("locked")[2] is None
    with disk.replaced(server.root / "probe", ()) as folder:
        (folder / "results.json").write_text("{}")
        assert server.results("f too")[2].startswith(f"InUse: {server.root / 'probe'} is being written by process {os.getpid()}")


def test_file_system_without_locks_is_a_warning(tmp_path, monkeypatch, caplog):
    def unsupported(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with disk.lock(tmp_path / "lock", "runs/x"):
        assert "no locks on the file system" in caplog.text and "no second process writes to runs/x" in caplog.text
    old, young = tmp_path / ".0123abcd-a.json", tmp_path / ".0123abcd-b.json"
    for path in (old, young):
        path.touch()
    os.utime(old, (0, 0))
    disk.clear(tmp_path)
    assert young.exists() and not old.exists()


def test_temporaries_of_the_dead_are_cleared_those_of_the_living_are_not(tmp_path):
    dead, own = tmp_path / "deep" / ".0123abcd-step_0000001.pt", tmp_path / ".hidden-file"
    dead.parent.mkdir()
    dead.touch(), own.touch()
    with disk.atomic(tmp_path / "a.json") as living:
        disk.clear(tmp_path)
        assert living.exists() and own.exists() and not dead.exists()
        living.write_text("whole")
    assert (tmp_path / "a.json").read_text() == "whole"


# a folder that holds something


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("config.yaml", "", "a run of 0 steps; continue it with --resume"),
        ("log.jsonl", '{"event": "start"}\n', "a run of 0 steps"),
        ("log.jsonl", "somebody's notes", "a run of 0 steps"),
        ("weights.safetensors", "", "a run of 0 steps"),
        ("checkpoints/step_0000007.pt", "", "a run of 7 steps"),
        ("split.json", "{}", "must be a folder without split.json.*give a split as split.file"),
    ],
)
def test_what_a_run_would_overwrite_is_refused(server, tmp_path, name, text, message):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(text)
    with pytest.raises(FileExistsError, match=message):
        pretrain.run(server.root / "data", tmp_path, load(None, server.options))
    assert (tmp_path / name).read_text() == text


def test_other_files_and_a_start_that_failed_are_no_run(server, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="network.name"):
        pretrain.run(server.root / "data", tmp_path, load(None, [*server.options, "network.name=nothing"]))
    assert not (tmp_path / "config.yaml").exists() and not (tmp_path / "split.json").exists()
    pretrain.run(server.root / "data", tmp_path, load(None, server.options))
    assert (tmp_path / "notes.txt").read_text() == "mine"


# damaged files


def save_steps(run, *steps):
    for step in steps:
        checkpoint.save(run, {"step": step, "weights": torch.full((2000,), float(step))}, keep=3)


def test_damaged_last_checkpoint_gives_way_to_the_one_before(tmp_path, caplog):
    save_steps(tmp_path, 1, 2, 3)
    third = tmp_path / "checkpoints" / "step_0000003.pt"
    data = bytearray(third.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 512] = bytes(512)  # a block that never reached the disk: torch.load itself does not notice
    third.write_bytes(data)  # last.pt is the same file
    with caplog.at_level(logging.WARNING):
        path, state = checkpoint.newest(tmp_path)
    assert path.name == "step_0000002.pt" and state["step"] == 2 and state["weights"].eq(2).all()
    assert "last.pt: wrong checksum" in caplog.text and "step_0000002.pt (step 2) instead of" in caplog.text
    (tmp_path / "checkpoints" / "last.pt").unlink()
    assert checkpoint.newest(tmp_path)[1]["step"] == 2
    for path in checkpoint.numbered(tmp_path):
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="a checkpoint that loads, all 3 in .*checkpoints are damaged; checkpoint must be a file written by"):
        checkpoint.newest(tmp_path)


def test_run_that_was_set_back_keeps_what_it_writes(tmp_path):
    save_steps(tmp_path, 5, 10)
    os.replace(tmp_path / "checkpoints" / "step_0000005.pt", tmp_path / "checkpoints" / "last.pt")
    assert checkpoint.newest(tmp_path)[1]["step"] == 5
    checkpoint.save(tmp_path, {"step": 7}, keep=1)
    assert [path.name for path in checkpoint.numbered(tmp_path)] == ["step_0000010.pt", "step_0000007.pt"]


@pytest.mark.parametrize("tail", ['{"event": "st', '{"event": "step", "step": 2}', "\0\0\0\0", "\udcff\udcfe"], ids=["torn", "no newline", "zeros", "bytes"])
def test_torn_log_is_read_and_continued(tmp_path, tail):
    path = tmp_path / "log.jsonl"
    path.write_text('{"event": "start", "step": 0}\n{"event": "step", "step": 1}\n' + tail, errors="surrogateescape")
    known = [row["step"] for row in read_log(path)]
    assert known == ([0, 1, 2] if "2}" in tail else [0, 1])
    log = RunLog(path, step=2)
    log.write("step", step=3)
    log.close()
    assert [row["step"] for row in read_log(path)] == [*known, 3]
    assert all(json.loads(line) for line in path.read_text().splitlines())


# real refusals of the kernel


@pytest.fixture
def small_files():
    """No file may grow beyond 20 kB: the kernel refuses in the middle of a write, with EFBIG (Python ignores SIGXFSZ)."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def write_array(path):
    with checkpoint.atomic(path) as temporary:
        np.save(temporary, np.zeros(100_000))


@pytest.mark.parametrize(
    "write",
    [
        lambda folder: checkpoint.save(folder, {"step": 2, "weights": torch.zeros(100_000)}, keep=1),
        lambda folder: checkpoint.save_tensors(folder / "a.safetensors", {"weights": torch.zeros(100_000)}, {}),
        lambda folder: write_array(folder / "a.npy"),
    ],
    ids=["torch", "safetensors", "numpy"],
)
def test_every_writer_says_that_the_disk_is_full(tmp_path, small_files, write):
    save_steps(tmp_path, 1)
    with pytest.raises(disk.DiskFull, match=rf"{tmp_path}\S+ cannot be written: the disk is full"):
        write(tmp_path)
    assert not left_behind(tmp_path)
    assert checkpoint.newest(tmp_path)[1]["step"] == 1


def test_log_that_the_disk_refuses(tmp_path):
    (tmp_path / "log.jsonl").symlink_to("/dev/full")
    log = RunLog(tmp_path / "log.jsonl")
    with pytest.raises(disk.DiskFull, match="log.jsonl cannot be written: the disk is full"):
        log.write("start")
    log.close()


def test_row_that_did_not_fit_leaves_no_part(tmp_path, small_files):
    log = RunLog(tmp_path / "log.jsonl")
    log.write("start")
    with pytest.raises(disk.DiskFull):
        log.write("step", text="x" * 30_000)
    log.close()
    assert [row["event"] for row in read_log(tmp_path / "log.jsonl")] == ["start"]
    assert (tmp_path / "log.jsonl").stat().st_size < 100


def test_screen_that_is_a_file_on_a_full_disk_ends_nothing(monkeypatch):
    from rich.console import Console

    from pix2rep import log

    class Full(io.StringIO):
        def write(self, text):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(log, "console", Console(file=Full()))
    say("a line that nobody reads")
