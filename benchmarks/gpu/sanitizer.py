"""compute-sanitizer over small calls: memcheck, and racecheck, which sees shared memory alone; a process for each op and backend."""

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.harness import ROOT
from pix2rep_kernels.dispatch import OPS
from pix2rep_kernels.testing import backends

TOOLS = ("memcheck", "racecheck")
PROCESSES = 20  # every op and backend under one tool or the other at once


def tool_path() -> str | None:
    return shutil.which("compute-sanitizer") or next(map(str, Path("/usr/local").glob("cuda*/bin/compute-sanitizer")), None)


def sanitizer(seconds: float, dry: bool = False) -> dict:
    """(tool, op, backend) -> "clean", what was found, or why there is no answer."""
    path = tool_path()
    if path is None and not dry:
        return {"skipped": "compute-sanitizer is not here"}
    # Blocks of the caching allocator would hide a read beyond a tensor; without determinism's workspace cuBLAS refuses.
    given = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "CUBLAS_WORKSPACE_CONFIG": ":4096:8", "OMP_NUM_THREADS": "1"}
    given["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    pairs = [(op, backend) for op in OPS for backend in backends(op) if backend in ("triton", "cuda")][: 1 if dry else None]

    def one(job: tuple[str, str, str]) -> tuple[str, dict]:
        tool, op, backend = job
        prefix = [] if tool == "plain" or dry else [path, "--tool", tool, "--target-processes", "application-only", "--print-limit", "3"]
        try:
            result = subprocess.run(
                [*prefix, sys.executable, "-m", "benchmarks.gpu.small", op, backend], cwd=ROOT, env=given, capture_output=True, text=True, timeout=share
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return " ".join(job), {"verdict": f"stopped after {share:.0f} s"}
        return " ".join(job), judged(result.returncode, result.stdout + result.stderr, bool(prefix))

    share = seconds / 3
    with ThreadPoolExecutor(PROCESSES) as pool:  # first alone, which compiles the kernels
        plain = dict(pool.map(one, [("plain", *pair) for pair in pairs]))
        share = seconds / 1.7
        watched = dict(pool.map(one, [(tool, *pair) for tool in TOOLS for pair in pairs]))
    return {"plain": plain, "watched": watched, "path": path}


def judged(code: int, text: str, watched: bool) -> dict:
    """Clean only if the tool says 0 and the program came to its end."""
    lines = [line.strip("= ") for line in text.splitlines()]
    ended = any(line.startswith("ran ") for line in lines)
    if not watched:
        return {"verdict": "clean"} if ended and code == 0 else {"verdict": f"exit code {code}", "said": lines[-3:]}
    summary = next((line for line in reversed(lines) if "SUMMARY" in line), None)
    if summary is None or not ended:
        return {"verdict": f"no answer, exit code {code}", "said": lines[-3:]}
    counted = re.search(r"(\d+) (?:error|hazard)", summary)
    if counted and counted[1] == "0":
        return {"verdict": "clean"}
    return {"verdict": summary, "said": [line for line in lines if re.search(r"Invalid|hazard|Race|leak|at .*\+0x|misaligned|error", line, re.I)][:8]}
