"""Other block sizes of the Triton kernels, by the plain functions that choose them: right first, then timed. Nothing is chosen at run time from this."""

import contextlib
import functools
import importlib
import json
import os
import sys
from collections.abc import Iterator

import torch

from benchmarks.gpu import bench as bench_module
from benchmarks.gpu import cases as case_module
from benchmarks.gpu.queue import Queue, work
from benchmarks.gpu.queue_plugin import FAULT, cuda_fault
from benchmarks.gpu.timing import Clock
from benchmarks.harness import ROOT

# own rows, streamed rows, warps, stages, registers; own is a multiple of stream where a triangle is swept
SUMS = [
    (own, stream, warps, stages, registers)
    for own, stream, warps in ((128, 64, 4), (256, 64, 8), (128, 128, 8), (64, 64, 4))
    for stages, registers in ((2, None), (3, None), (3, 128), (4, None))
]
PRODUCTS = [(own, stream, warps, stages, None) for own, stream, warps in ((64, 64, 4), (128, 64, 8), (128, 128, 8), (64, 32, 4)) for stages in (2, 3, 4)]
PRODUCTS += [(128, 128, 8, 2, 128), (64, 64, 4, 3, 128)]
PLACES = {"sums": ("infonce_forward", "sum_blocks", SUMS), "products": ("infonce_backward", "product_blocks", PRODUCTS)}
CASES = [f"infonce|{negatives} N=65536 D={d}|bfloat16" for negatives in ("cross", "joint") for d in (64, 128, 256)]


@contextlib.contextmanager
def instead(place: str, blocks: tuple | None) -> Iterator[None]:
    """Those blocks wherever the kernels of `place` are launched inside; None: its own choice."""
    from pix2rep_kernels.triton.infonce_blocks import Blocks

    module, name, _ = PLACES[place]
    module = importlib.import_module(f"pix2rep_kernels.triton.{module}")
    own = getattr(module, name)
    if blocks is not None:
        setattr(module, name, lambda *_, **__: Blocks(*blocks))
    try:
        yield
    finally:
        setattr(module, name, own)


def names() -> list[str]:
    """Each case with its own blocks, then every alternative, cases in turn."""
    found = [json.dumps([key, place, None]) for key in CASES for place in ("sums",)]
    for index in range(max(len(SUMS), len(PRODUCTS))):
        found += [json.dumps([key, place, blocks[index]]) for key in CASES for place, (_, _, blocks) in PLACES.items() if index < len(blocks)]
    return found


def measured(key: str, place: str, blocks: list | None, device: str = "cuda") -> dict:
    case = bench_module.cases()[key]
    found = {"case": key, "place": place, "blocks": blocks}
    call = functools.partial(case.ours, "triton")
    with instead(place, blocks and tuple(blocks)):
        try:
            bench_module.check(case, "triton", call, device)
            torch.manual_seed(1)
            inputs = case.make(device)
            found |= Clock(device, 0.15)(functools.partial(case_module.gradients, call, inputs))
        except Exception as broken:  # noqa: BLE001 - blocks that do not fit are a result
            found["failed"] = f"{type(broken).__name__}: {(str(broken).splitlines() or [''])[0][:160]}"
    return found


def worker() -> None:
    queue = Queue(os.environ["PIX2REP_QUEUE"])
    while (name := queue.take()) is not None:
        found = measured(*json.loads(name))
        fault = "failed" in found and cuda_fault()
        queue.record(name, outcome="row", row=found | ({"failed": fault} if fault else {}))
        if fault:
            os._exit(FAULT)


def tune(run) -> dict:
    """Rows of every alternative that was reached, the fastest of each case first."""
    queue = Queue.start(run.scratch / "tune", names())
    environment = {"PIX2REP_RATES": "", "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    said = work(queue, [sys.executable, "-m", "benchmarks.gpu.tune"], 1, run.seconds(400), 60, environment, ROOT)
    rows = [o.get("row") or {"name": n, "failed": o["why"]} for n, o in queue.outcomes().items()]
    rows.sort(key=lambda r: (r.get("case", ""), r.get("median_s", 1e9)))
    return {"rows": rows, "not_reached": len(queue.left()), "workers_said": said}


if __name__ == "__main__":
    worker()
