"""The command: fast help, one-line errors with their exit codes, a run from end to end."""

import json
import os
import signal
import subprocess
import sys
import time

import nibabel
import numpy as np
import pytest
from typer.testing import CliRunner

from pix2rep.cli import app

TINY = (
    "data.size=32,32 network.channels=4,4,8,8,8 network.features=8 network.head_hidden=8 network.projection=8 loss.num_samples=64"
    " split.val=0.2 pretrain.steps=4 pretrain.batch_size=2 pretrain.device=cpu pretrain.threads=1"
).split()


def pix2rep(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def volumes(tmp_path_factory):
    root = tmp_path_factory.mktemp("volumes")
    rng = np.random.default_rng(0)
    for patient in range(5):
        (root / f"p{patient}").mkdir()
        image = nibabel.Nifti1Image(rng.normal(100, 20, (32, 32, 2)).astype(np.int16), np.eye(4))
        nibabel.save(image, root / f"p{patient}" / "image.nii.gz")
    return root


def test_help_imports_nothing_heavy():
    code = (
        "import sys, typer.testing, pix2rep.cli as cli; result = typer.testing.CliRunner().invoke(cli.app, ['--help']);"
        "print(result.exit_code, 'pretrain' in result.output, *sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert out[:2] == ["0", "True"]
    assert not {"torch", "monai", "numpy", "nibabel", "matplotlib", "triton", "pix2rep_kernels"} & set(out)


def test_help_takes_under_half_a_second_as_a_module():
    def seconds():
        """Of CPU time: what the command costs, not what else the machine is doing."""
        before = os.times()
        done = subprocess.run([sys.executable, "-m", "pix2rep", "--help"], capture_output=True, text=True, check=True)
        assert "Usage: pix2rep" in done.stdout
        after = os.times()
        return after.children_user + after.children_system - before.children_user - before.children_system

    assert min(seconds() for _ in range(5)) < 0.5


@pytest.mark.parametrize("command", ["phantom", "pretrain", "profile", "probe", "finetune", "evaluate", "compare", "inspect", "report", "check", "info"])
def test_every_command_has_help(command):
    result = pix2rep(command, "--help")
    assert result.exit_code == 0
    assert f"pix2rep {command}" in result.output.replace("root ", "pix2rep ")


def test_info():
    result = pix2rep("info")
    assert result.exit_code == 0
    assert "torch" in result.output and "pix2rep_v1" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pretrain", "{data}", "{run}", "pretrain.lrr=1"], "error: unknown key 'pretrain.lrr'; did you mean pretrain.lr?"),
        (["pretrain", "{data}", "{run}", "--config", "nowhere.yaml"], "error: config must be a YAML file or one of the presets"),
        (["pretrain", "{run}", "{run}"], "error: data.root must be a folder with .nii or .nii.gz files, got"),
        (["probe", "{run}"], "error: run must be a folder written by pix2rep pretrain (with config.yaml), got"),
        (["evaluate", "{run}"], "error: run must be a folder written by pix2rep pretrain (with config.yaml), got"),
        (["check", "{run}"], "say what to check: --probe-above-random"),
    ],
)
def test_bad_input_ends_in_one_line(volumes, tmp_path, arguments, message):
    places = {"data": volumes, "run": tmp_path / "run"}
    result = pix2rep(*(argument.format(**places) for argument in arguments))
    assert result.exit_code == 2
    assert message in result.output
    assert "Traceback" not in result.output
    assert not (tmp_path / "run").exists()


def test_debug_shows_the_traceback(volumes, tmp_path):
    result = pix2rep("--debug", "pretrain", volumes, tmp_path / "run", "pretrain.lrr=1")
    assert type(result.exception).__name__ == "ConfigError"


def test_pretrain_then_resume(volumes, tmp_path):
    run = tmp_path / "run"
    (tmp_path / "some.yaml").write_text("loss: {temperature: 0.2}\n")
    result = pix2rep("pretrain", volumes, run, *TINY, "--config", tmp_path / "some.yaml")
    assert result.exit_code == 0, result.output
    assert "temperature: 0.2" in (run / "config.yaml").read_text()
    assert pix2rep("pretrain", volumes, run, *TINY).exit_code == 2

    result = pix2rep("pretrain", volumes, run, "--resume", "pretrain.steps=6")  # the rest comes from RUN/config.yaml
    assert result.exit_code == 0, result.output
    assert "resuming after step 4" in result.output
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["event"] == "step"] == [4, 6]


def test_resume_without_a_checkpoint_starts(volumes, tmp_path):
    result = pix2rep("pretrain", volumes, tmp_path / "run", *TINY, "--resume")
    assert result.exit_code == 0
    assert "no checkpoint in" in result.output


def test_divergence_exits_with_3(volumes, tmp_path):
    result = pix2rep("pretrain", volumes, tmp_path / "run", *TINY, "pretrain.lr=1e30", "pretrain.steps=20")
    assert result.exit_code == 3, result.output
    assert "must be finite" in result.output
    assert "patients in the batch: p" in result.output


def test_signal_leaves_a_checkpoint_and_says_how_to_go_on(volumes, tmp_path):
    run = tmp_path / "a run"
    arguments = [*TINY, "pretrain.steps=1_000_000", "pretrain.log_every=1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "pix2rep", "pretrain", str(volumes), str(run), *arguments], stderr=subprocess.PIPE, text=True, env=os.environ
    )
    try:
        for _ in range(600):
            if (run / "log.jsonl").is_file() and '"step": 2' in (run / "log.jsonl").read_text():
                break
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        error = process.communicate(timeout=60)[1]
    finally:
        process.kill()
    assert process.returncode == 128 + signal.SIGTERM, error
    assert "stopped by SIGTERM after step" in error
    assert f"continue with: pix2rep pretrain {volumes} '{run}' --resume" in error
    assert (run / "checkpoints" / "last.pt").is_file()
