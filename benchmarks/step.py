"""A pre-training step: images/s, peak memory and the loss's share, with few and with all pixels, by method and network.

`python -m benchmarks.step [--json FILE] [--large] [--resident]`; the step and its parts are those of `pix2rep profile`. InfoNCE over all
pixels of a full batch compares 147,456 or 262,144 rows with each other: minutes on two cores, so it runs at batch 2 unless --large is given,
beside 1000 samples at that batch; that of volumes (589,824 rows) is left to GPUs.
"""

import argparse
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks import harness
from pix2rep.config import Config, load
from pix2rep.heap import ask_for_huge_pages
from pix2rep.meter import CpuSeconds
from pix2rep.profile import profile_step

UNET = ["network.channels=32,32,64,128,256", "network.features=32", "network.projection=64"]
NETWORKS = {
    "demo 96x96": load("demo", ["data.size=96,96"]),
    "BasicUNet 128x128": load(None, ["data.size=128,128", *UNET]),
    "BasicUNet 16x96x96": load(None, ["network.dims=3", "data.size=16,96,96", "spatial.flip=[]", "pretrain.batch_size=2", *UNET]),
}
SAMPLES = (1000, 4096, None)
VOLUMES = [("infonce", 1000), ("infonce", 4096), ("barlow", 2**17), ("barlow", None)]
SMALL = 2  # images of an all-pixel InfoNCE
METHODS = {  # beside pix2rep's objectives: by dimensions, (method, samples): of lrc a region's, null: all
    2: [("bim", None), ("lrc", 50), ("lrc", None), ("simclr", None)],
    3: [("bim", None), ("lrc", 50), ("lrc", None), ("pgl", None), ("pgl decoder", None), ("simclr", None)],
}


def batches(full: int, large: bool) -> dict[int, list[tuple[str, int | None]]]:
    """{batch: [(objective, num_samples)]}: the full batch, and a small one for what would take minutes."""
    every = [(objective, samples) for objective in ("infonce", "barlow") for samples in SAMPLES]
    dear = ("infonce", None)
    return {full: every} if large else {full: [case for case in every if case != dear], SMALL: [("infonce", 1000), dear]}


def cases(name: str, large: bool) -> Iterator[tuple[int, str, int | None]]:
    """(batch, objective or method, num_samples) of a network."""
    config = NETWORKS[name]
    found = batches(config.pretrain.batch_size, large) if config.network.dims == 2 else {config.pretrain.batch_size: VOLUMES}
    for batch, own in found.items():
        yield from ((batch, *case) for case in own)
    if not name.startswith("demo"):
        yield from ((config.pretrain.batch_size, *case) for case in METHODS[config.network.dims])


def configured(config: Config, batch: int, objective: str, samples: int | None, threads: int) -> Config:
    config = replace(config, pretrain=replace(config.pretrain, batch_size=batch, device="cpu", threads=threads))
    if objective in ("infonce", "barlow"):
        return replace(config, loss=replace(config.loss, objective=objective, num_samples=samples))
    method, _, where = objective.partition(" ")
    config = replace(config, loss=replace(config.loss, method=method), lrc=replace(config.lrc, num_samples=samples))
    return replace(config, pgl=replace(config.pgl, where=where or "encoder", head_hidden=256))


def measure(asked) -> Iterator[dict]:
    for name in asked.networks:
        for batch, objective, samples in cases(name, asked.large):
            if asked.only and objective.partition(" ")[0] not in asked.only:
                continue
            chosen = configured(NETWORKS[name], batch, objective, samples, asked.threads)
            result = profile_step(chosen, repeats=asked.repeats, limit=asked.limit, resident=asked.resident)
            yield from rows(name, chosen, objective, samples, result)


def rows(name: str, config: Config, objective: str, samples: int | None, result: dict) -> Iterator[dict]:
    standing = sum(result["standing"].values())
    for which, entry in result["losses"].items():
        row = {
            "network": name, "B": config.pretrain.batch_size, "objective": objective, "num_samples": samples,
            "pixels": result["batch_size"] * result["pixels"], "D": channels(config), "loss": which,
            "clock": CpuSeconds.clock.__name__, "load": os.getloadavg()[0],
        }  # fmt: skip
        if "would_need_bytes" in entry:
            yield row | {"would_need_GB": entry["would_need_bytes"] / 1e9}
            continue
        kept = ("images_per_s", "loss_share", "step_seconds", "timed_steps")
        parts = {part["part"]: [part["added_bytes"], part["peak_bytes"], part["seconds"]] for part in entry["parts"]}
        yield row | {key: entry[key] for key in kept} | {
            "peak_MiB": entry["peak_bytes"] / 2**20, "loss_MiB": entry["loss_bytes"] / 2**20, "standing_MiB": standing / 2**20,
            "parts_added_peak_seconds": parts,
            **({"resident_growth_MiB": entry["resident_bytes"] / 2**20} if "resident_bytes" in entry else {}),
        }  # fmt: skip


def channels(config: Config) -> int:
    """Of what the loss takes of a pixel and view."""
    if config.loss.method == "bim":
        return config.bim.heads * config.bim.clusters
    return {"pix2rep": config.network.projection, "lrc": config.network.features, "pgl": config.pgl.projection, "simclr": 0}[config.loss.method]


def line(r: dict) -> str:
    name = f"{r['network']:18} B={r['B']} {r['objective']:11}{str(r['num_samples'] or 'all'):>6} {r['loss']:6}"
    if "would_need_GB" in r:
        return f"{name}would need {r['would_need_GB']:,.0f} GB for its similarities"
    grown = f"{r['resident_growth_MiB'] + r['standing_MiB']:10.0f}" if "resident_growth_MiB" in r else f"{'':10}"
    return f"{name}{r['images_per_s']:9.2f}{100 * r['loss_share']:8.1f} %{r['loss_MiB']:9.0f}{r['peak_MiB']:10.0f}{grown}{r['timed_steps']:7}{r['load']:7.1f}"


HEADER = f"{'':52}images/s  loss's loss MiB  peak MiB  resident  steps   load"


def table(content: dict) -> str:
    """Ours: time, the loss's share, what it holds against 6 N D float32 of what it takes, the step's peak and that over what it would be without the loss."""
    rows = [r for r in content["rows"] if r["loss"] == "ours" and "step_seconds" in r]
    lines = [["network", "batch", "loss", "pixels", "seconds a step", "loss's share", "loss holds", "6 N D x 4 bytes", "peak", "over the networks'"]]
    lines.append(["---"] * len(lines[0]))
    for r in rows:
        bound = 6 * r["pixels"] * r["D"] * 4 / 2**20
        networks = max(peak for part, (_, peak, _) in r["parts_added_peak_seconds"].items() if not part.startswith("loss")) / 2**20 + r["standing_MiB"]
        samples = {"lrc": f"{r['num_samples'] or 'all'} a region"}.get(r["objective"], f"{r['num_samples'] or 'all'}")
        lines.append([
            r["network"], str(r["B"]), r["objective"], samples, f"{r['step_seconds']:.3g}", f"{100 * r['loss_share']:.1f} %", f"{r['loss_MiB']:,.0f} MiB",
            f"{bound:,.0f} MiB" if bound and r['objective'] != 'pgl' else "", f"{r['peak_MiB']:,.0f} MiB", f"{r['peak_MiB'] / networks:.2f}",
        ])  # fmt: skip
    text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    return text + f"\n{content['device']}, {content['threads']} threads; `python -m benchmarks.step --large`; commit {content['commit'][:7]}.\n"


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--networks", nargs="*", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--large", action="store_true", help="all-pixel InfoNCE at the full batch")
    parser.add_argument("--resident", action="store_true", help="also the growth of a fresh process, for each row")
    parser.add_argument("--limit", type=float, default=20.0, help="seconds that the timing of a row may take")
    parser.add_argument("--cpu-time", action="store_true", help="seconds of the CPU, not of the wall: for a busy machine, with --threads 1")
    parser.add_argument("--only", nargs="*", help="objectives or methods; default: all")
    asked = parser.parse_args(given)
    ask_for_huge_pages()
    torch.set_num_threads(asked.threads)
    if asked.cpu_time:
        CpuSeconds.clock = staticmethod(time.process_time)
    print(HEADER)
    table = []
    for row in measure(asked):
        table.append(row)
        print(line(row), flush=True)
        if asked.json:
            harness.write_json(asked.json, {"threads": asked.threads, **harness.surroundings(), "rows": table})


if __name__ == "__main__":
    main()
