"""Every method on phantoms, in 2D and 3D: seconds and memory of a step, Dice of a linear probe beside random weights.

`python -m benchmarks.methods OUT [--json FILE]` runs `pix2rep phantom`, `pretrain` and `probe` for each, with the presets `demo` and `demo_3d` and the
overrides below; what OUT holds already is not run again. Steps are timed afterwards, one method at a time, by `pix2rep profile`'s means.
"""

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks import harness
from pix2rep.config import load
from pix2rep.heap import ask_for_huge_pages
from pix2rep.log import read_log
from pix2rep.profile import profile_step

SETS = {2: ("demo", ["--kind", "heart"]), 3: ("demo_3d", ["--kind", "ct"])}
LRC = ["loss.method=lrc", "lrc.superpixel_scale=10", "lrc.queue=256", "lrc.momentum=0.99", "lrc.global_hidden=64", "lrc.global_projection=64"]
BIM = ["loss.method=bim", "bim.clusters=20"]
SIMCLR = ["loss.method=simclr"]
METHODS = {
    2: {
        "pix2rep, InfoNCE, 1000 pixels": [],
        "pix2rep, InfoNCE, 4096 pixels": ["loss.num_samples=4096"],
        "pix2rep, Barlow, all pixels": ["loss.objective=barlow", "loss.num_samples=null", "loss.mode=bicubic"],
        "bim": BIM,
        "lrc": LRC,
        "simclr": SIMCLR,
    },
    3: {
        "pix2rep, InfoNCE, 1000 voxels": [],
        "pix2rep, InfoNCE, 4096 voxels": ["loss.num_samples=4096"],
        "pix2rep, Barlow, all voxels": ["loss.objective=barlow", "loss.num_samples=null"],
        "bim": BIM,
        "lrc": LRC,
        "pgl": ["loss.method=pgl", "pgl.head_hidden=64", "pgl.projection=64"],
        "pgl, decoder": ["loss.method=pgl", "pgl.where=decoder", "pgl.head_hidden=64", "pgl.projection=64"],
        "simclr": SIMCLR,
    },
}


def command(*arguments) -> None:
    """`pix2rep ...`; its words go on to the screen. Raises CalledProcessError."""
    print("pix2rep", shlex.join(map(str, arguments)), flush=True)
    subprocess.run([sys.executable, "-m", "pix2rep", *map(str, arguments)], check=True)


def learn(out: Path, dims: int, name: str, threads: int) -> dict:
    """Pre-train and probe, unless OUT has both. Returns Dice of both arms and the losses of the log."""
    preset, kind = SETS[dims]
    data, run = out / f"{dims}d", out / f"{dims}d_{name.replace(', ', '_').replace(' ', '_')}"
    overrides = [*METHODS[dims][name], f"pretrain.threads={threads}", f"data.cache={out / f'{dims}d_cache'}"]
    if not data.is_dir():
        command("phantom", data, *kind)
    if not (run / "weights.safetensors").is_file():
        command("pretrain", data, run, "--config", preset, *overrides, *(["--resume"] if (run / "config.yaml").is_file() else []))
    if not (run / "probe/results.json").is_file():
        command("probe", run)
    result = json.loads((run / "probe/results.json").read_text(encoding="utf-8"))
    rows = [row for row in read_log(run / "log.jsonl") if "loss" in row]
    return {
        "overrides": METHODS[dims][name],
        "steps": rows[-1]["step"],
        "losses": {row["step"]: row["loss"] for row in rows},
        "peak_memory_mib": max(row["peak_memory_mib"] for row in rows),
        "dice": {entry["arm"]: entry["dice"]["mean"] for entry in result["summary"]},
        "each_seed": {entry["arm"]: entry["seeds"] for entry in result["summary"]},
        "difference": result["differences"][0],
    }


def timed(dims: int, name: str, threads: int) -> dict:
    """Seconds, bytes and the loss's share of a step on noise."""
    config = load(SETS[dims][0], [*METHODS[dims][name], f"pretrain.threads={threads}", "pretrain.device=cpu"])
    result = profile_step(config, losses=("ours",), repeats=9, limit=20)
    entry = result["losses"]["ours"]
    kept = ("step_seconds", "timed_steps", "peak_bytes", "loss_bytes", "loss_share")
    return {"batch": config.pretrain.batch_size, "size": list(config.data.size), **{key: entry[key] for key in kept}}


def table(content: dict) -> str:
    """A row a method and dimension."""
    lines = [["", "images a step", "seconds a step", "loss's share", "memory", "probe, pre-trained", "random", "difference"]]
    lines.append(["---"] * len(lines[0]))
    for row in content["rows"]:
        shape = "x".join(map(str, row["size"]))
        values = [_interval(row["dice"][arm]) for arm in ("pretrained", "random")]
        lines.append([
            f"{row['dims']}D {row['method']}", f"{row['batch']} of {shape}", f"{row['step_seconds']:.3f}", f"{100 * row['loss_share']:.0f} %",
            f"{row['peak_bytes'] / 2**20:,.0f} MiB", *values, _interval(row["difference"], "+"),
        ])  # fmt: skip
    text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    steps = " / ".join(f"{dims}D {', '.join(map(str, sorted({row['steps'] for row in content['rows'] if row['dims'] == dims})))}" for dims in (2, 3))
    return text + (
        "\nLinear probe on the frozen backbone, one labelled patient, three draws of it; 3D Dice, mean over classes and test patients"
        f" [95 % interval over patients]. One pre-training each, of {steps} steps. Memory: bytes of tensors. {content['device']}, {content['threads']} threads;"
        f" `{content['command']}`; commit {content['commit'][:7]}.\n"
    )


def _interval(value: dict, sign: str = "") -> str:
    return f"{value['mean']:{sign}.3f} [{value['low']:{sign}.3f}, {value['high']:{sign}.3f}]"


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.methods", description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path, help="folder of data and runs")
    parser.add_argument("--dims", type=int, nargs="*", choices=tuple(METHODS), default=list(METHODS))
    parser.add_argument("--only", nargs="*", help="methods by the start of their name; default: all")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--learn-only", action="store_true", help="no timing: on a machine where other programs run")
    parser.add_argument("--json", type=Path, help="write the rows here")
    asked = parser.parse_args(given)
    ask_for_huge_pages()
    torch.set_num_threads(asked.threads)
    chosen = [(dims, name) for dims in asked.dims for name in METHODS[dims] if not asked.only or any(map(name.startswith, asked.only))]
    rows = [{"dims": dims, "method": name, **learn(asked.out, dims, name, asked.threads)} for dims, name in chosen]
    if asked.learn_only:
        return
    for row in rows:
        row |= timed(row["dims"], row["method"], asked.threads)
    content = {**harness.surroundings(), "command": "python -m benchmarks.methods OUT", "threads": asked.threads, "rows": rows}
    print(table(content))
    if asked.json:
        harness.write_json(asked.json, content)


if __name__ == "__main__":
    main()
