"""pytest takes its tests one by one from a queue that other processes take from too (`-p benchmarks.gpu.queue_plugin`)."""

import json
import os
import re
import time
from pathlib import Path

import pytest

from benchmarks.gpu.queue import Queue
from benchmarks.gpu.suite import ELSEWHERE, group_of

FAULT = 77  # exit code of a process whose CUDA context a test has broken


def pytest_collection_finish(session):
    if not (target := os.environ.get("PIX2REP_COLLECT")):
        return
    found = []
    for item in session.items:
        backend = getattr(item, "callspec", None) and item.callspec.params.get("backend")
        if backend in ("reference", "cpu") or ELSEWHERE.search(item.name):
            continue
        found.append((group_of(item.nodeid, str(backend)), item.nodeid))
    Path(target).write_text(json.dumps(found))


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session):
    if session.config.option.collectonly or "PIX2REP_QUEUE" not in os.environ:
        return None
    queue, items = Queue(os.environ["PIX2REP_QUEUE"]), {item.nodeid: item for item in session.items}
    reports = []

    class Listener:
        def pytest_runtest_logreport(self, report):
            reports.append(report)

    session.config.pluginmanager.register(Listener())
    while (name := queue.take()) is not None:
        if name not in items:
            queue.record(name, outcome="failed", why="this process did not collect it: its name is not the same every time")
            continue
        reports.clear()
        start = time.monotonic()
        items[name].config.hook.pytest_runtest_protocol(item=items[name], nextitem=None)
        bad = next((r for r in reports if r.failed), None)
        skipped = next((r for r in reports if r.skipped), None)
        outcome = {"outcome": "failed" if bad else "skipped" if skipped else "passed", "seconds": time.monotonic() - start}
        if bad:
            text = str(bad.longrepr)
            said = re.findall(r"^E +(.*)", text, re.MULTILINE) or text.strip().splitlines()[-1:]
            outcome["why"] = " | ".join(said[:3])[:400]
        elif skipped:
            outcome["why"] = str(skipped.longrepr[2] if isinstance(skipped.longrepr, tuple) else skipped.longrepr)[:200]
        broken = bad and cuda_fault()
        queue.record(name, **outcome | ({"outcome": "died", "why": f"{broken}: {outcome['why']}"} if broken else {}))
        if broken:
            os._exit(FAULT)
    return True


def cuda_fault() -> str | None:
    """What CUDA says where a fault has ended it for this process."""
    import torch

    if not torch.cuda.is_available():
        return None
    try:
        torch.cuda.synchronize()
        torch.zeros(1, device="cuda").item()
    except Exception as fault:  # noqa: BLE001 - whatever it is, the process is of no more use
        return str(fault).splitlines()[0]
    return None
