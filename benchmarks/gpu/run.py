"""One run of the command: where results go, what they belong to, what is there already, how much time is left."""

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import time

import torch

from benchmarks.harness import ROOT, surroundings, write_json

SOURCES = ("pix2rep_kernels/**/*.py", "csrc/**/*.*", "benchmarks/gpu/*.py", "benchmarks/peers.py", "benchmarks/harness.py")


def digest() -> str:
    """Of every file that a result depends on: says whether an earlier one is of this very code, git or not."""
    found = hashlib.sha256()
    for path in sorted(path for pattern in SOURCES for path in ROOT.glob(pattern)):
        found.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return found.hexdigest()[:16]


def commit() -> str:
    """From git, also where the folder is somebody else's; else PIX2REP_COMMIT; else the file COMMIT; else "unknown"."""
    said = subprocess.run(["git", "-c", "safe.directory=*", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    written = ROOT / "COMMIT"
    return said or os.environ.get("PIX2REP_COMMIT") or (written.read_text().strip() if written.exists() else "") or "unknown"


class Run:
    def __init__(self, asked: argparse.Namespace):
        self.dry, self.again, self.end = asked.dry_run, asked.again, time.monotonic() + asked.minutes * 60
        self.device = "cpu" if self.dry else "cuda"
        title = "rehearsal" if self.dry else torch.cuda.get_device_name()
        name = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
        self.folder = (asked.out or (ROOT / "build" if self.dry else ROOT / "benchmarks/results")) / name
        self.scratch = ROOT / "build/gpu"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.scratch.mkdir(parents=True, exist_ok=True)
        self.facts = surroundings() | {"device": title, "commit": commit(), "sources": digest(), "cpus": os.cpu_count()}
        self.facts["command"] = "python -m benchmarks.gpu " + " ".join(sys.argv[1:])
        if not self.dry:
            self.facts |= {"capability": list(torch.cuda.get_device_capability()), "cuda": torch.version.cuda, "driver": _driver()}

    def left(self) -> float:
        return self.end - time.monotonic()

    def seconds(self, most: float, keep: float = 10) -> float:
        """What a part may take: `most`, or what is left less `keep`."""
        return max(5.0, min(most, self.left() - keep))

    def earlier(self, part: str) -> dict | None:
        """The result of `part` for this very code, in this run's folder or among the committed ones."""
        for folder in () if self.again else (self.folder, ROOT / "benchmarks/results" / self.folder.name):
            path = folder / f"{part}.json"
            if path.exists() and (found := json.loads(path.read_text())).get("sources") == self.facts["sources"] and "broken" not in found:
                return found
        return None

    def write(self, part: str, **content) -> dict:
        content = self.facts | content
        write_json(self.folder / f"{part}.json", content)
        return content


def _driver() -> str:
    try:
        asked = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"]
        return subprocess.run(asked, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired) as missing:
        return f"unknown: {missing}"
