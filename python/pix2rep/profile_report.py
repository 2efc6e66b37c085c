"""What `pix2rep profile` prints and writes."""

import json
import os
import platform
import re
from pathlib import Path

import torch
from rich.table import Table

from pix2rep.checkpoint import atomic
from pix2rep.config import Config, to_dict
from pix2rep.log import table_console
from pix2rep.plain import COPIES
from pix2rep.pretrain import versions
from pix2rep.profile import READING
from pix2rep.training import pick_device

SOURCES = {
    "cpu": "bytes of PyTorch's tensors, summed from its profiler's allocations; scratch taken by malloc (fused kernels, oneDNN) is not in it",
    "cuda": "bytes that PyTorch's caching allocator gave out; the CUDA context and what the allocator holds unused come on top",
}


def show_step(result: dict) -> None:
    """The parts of a step, both losses side by side, then the totals."""
    measured = {which: entry for which, entry in result["losses"].items() if "parts" in entry}
    table = Table(title=f"one pre-training step, {result['batch_size']} images of {result['pixels']:,} pixels")
    table.add_column("part")
    for which in measured:
        for name in ("adds", "peak", "time", "share"):
            table.add_column(f"{which}: {name}" if name == "adds" else name, justify="right")
    for kind, count in result["standing"].items():
        table.add_row(kind, *([size(count), "", "", ""] * len(measured)))
    first, *_ = measured.values()
    table.add_section()
    for k, row in enumerate(first["parts"]):
        cells = []
        for entry in measured.values():
            part = entry["parts"][k]
            cells += [size(part["added_bytes"]), size(part["peak_bytes"]), f"{1e3 * part['seconds']:.1f} ms", f"{100 * part['share']:.1f} %"]
        table.add_row(row["part"], *cells)
    table.add_section()
    for name, key in (("peak of all", "peak_bytes"), ("after the step", "after_bytes")):
        table.add_row(name, *(cell for entry in measured.values() for cell in ("", size(entry[key]), "", "")))
    if any("resident_bytes" in entry for entry in measured.values()):
        table.add_row("process grew by", *(cell for entry in measured.values() for cell in ("", size(entry["resident_bytes"]), "", "")))
    screen = table_console()
    screen.print(table)
    for which, entry in measured.items():
        screen.print(
            f"{which}: {entry['images_per_s']:.2f} images/s, loss {100 * entry['loss_share']:.1f} % of the step"
            f" (median of {entry['timed_steps']}); it holds {size(entry['loss_bytes'])} at most, gradients of features included"
        )
        if "reading_cpu_seconds" in result:
            screen.print(_reading(which, entry, result["reading_cpu_seconds"]))
    for which, entry in result["losses"].items():
        if "would_need_bytes" in entry:
            one = entry["would_need_bytes"] // COPIES
            screen.print(
                f"{which}: not run, would need {decimal(entry['would_need_bytes'])} for the similarities alone"
                f" ({COPIES} copies of {decimal(one)}, from their shape)"
            )
    screen.print(f"gradients of the parameters: {size(result['gradients'])}, made in backward, given back after the optimiser")
    screen.print("adds: what is left when a part ends; peak: the most within it, beyond parameters, buffers, optimiser state and images")
    screen.print(f"counted: {result['memory_source']}")


def _reading(which: str, entry: dict, cpu: float) -> str:
    """What data cost: the wait, and the loader's thread beside the step; views."""
    seconds = {part["part"]: part["seconds"] for part in entry["parts"]}
    share = (seconds[READING] + seconds["views"] + cpu) / entry["step_seconds"]
    return (
        f"{which}: the loader takes {1e3 * cpu:.1f} ms of one CPU core a step, beside it, and the step waits {1e3 * seconds[READING]:.1f} ms for it;"
        f" with the views at most {100 * share:.1f} % of the step"
    )


def show_fit(result: dict) -> None:
    """The largest batch of each loss within the budget, and how the prediction was checked."""
    table = Table(title=f"largest batch within {size(result['budget_bytes'])}, {result['pixels']:,} pixels an image")
    for name in ("pixels in the loss", "loss", "largest batch", "needs there", "law from", "checked at", "predicted", "measured"):
        table.add_column(name, justify="left" if name in ("loss", "law from", "checked at") else "right")
    for row in result["rows"]:
        source = f"batches {', '.join(map(str, row['measured']))}" if row["source"] == "measured" else f"shapes, {COPIES} copies"
        verified = row["verified"]
        cells = (verified["why_not"], "", "") if "why_not" in verified else (
            f"batch {verified['batch']}", size(verified["predicted_bytes"]), size(verified["measured_bytes"]) if verified["measured_bytes"] else "out of memory"
        )  # fmt: skip
        needs = size(row["predicted_bytes"]) + ("" if row["largest_batch"] else " for 1")
        table.add_row(f"{row['num_samples'] or 'all'}", row["loss"], f"{row['largest_batch']:,}", needs, source, *cells)
    screen = table_console()
    screen.print(table)
    screen.print(f"counted: {result['memory_source']}")


def surroundings(config: Config) -> dict:
    """Device, threads, versions, memory source and config: what a measurement belongs to."""
    device = pick_device(config.pretrain.device)
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()) if Path("/proc/cpuinfo").exists() else None
        name = f"{found[1] if found else platform.processor()}, {os.cpu_count()} cores"
    about = {"device": name, "threads": torch.get_num_threads(), "platform": platform.platform(), "versions": versions()}
    return {**about, "memory_source": SOURCES[device.type], "config": to_dict(config)}


def write(path: str | Path, result: dict) -> None:
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def size(count: float) -> str:
    """Bytes for the eye: two or three figures and a binary unit."""
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(count) >= factor:
            return f"{count / factor:.2f} {unit}" if count < 10 * factor else f"{count / factor:,.1f} {unit}"
    return f"{count:.0f} B"


def decimal(count: int) -> str:
    """Bytes in the units that memory is sold in."""
    unit, factor = ("GB", 1e9) if count >= 1e9 else ("MB", 1e6)
    return f"{count / factor:,.1f} {unit}" if count < 10 * factor else f"{count / factor:,.0f} {unit}"
