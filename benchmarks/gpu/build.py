"""`python -m benchmarks.gpu.build`: whether `_C` and `_C_cuda` load under this very python, torch and C library; if not, build them here for this GPU alone."""

import json
import os
import shutil
import subprocess
import sys

from benchmarks.harness import ROOT

LIMIT_S = 200
PROBE = "import json, torch; from pix2rep_kernels import native; print(json.dumps({k: native.why_missing(k) for k in native.OBJECTS}))"


def missing() -> dict[str, str]:
    """Object -> why it does not load, asked in a fresh process: one that crashes on loading is missing too."""
    clean = {k: v for k, v in os.environ.items() if k != "PIX2REP_EMULATE"}
    asked = subprocess.run([sys.executable, "-c", PROBE], cwd=ROOT, env=clean | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    if asked.returncode:
        return {"both": (asked.stderr.strip().splitlines() or [f"exit code {asked.returncode}"])[-1]}
    return {name: why for name, why in json.loads(asked.stdout.splitlines()[-1]).items() if why}


def chips() -> str:
    """What PIX2REP_CUDA_ARCHS should name for the GPU that is here."""
    import torch

    major, minor = torch.cuda.get_device_capability() if torch.cuda.is_available() else (9, 0)
    return f"{major}{minor}a" if major >= 9 else f"{major}{minor}"


def ensure() -> dict:
    """Build what does not load; says what was found and what is left. Never raises: Triton and the reference go on without."""
    found = missing()
    if not found:
        return {"objects": "both load as they are"}
    said = {"objects": f"do not load: {found}", "built": "no"}
    if "cuda" in found and len(found) == 1 and shutil.which("nvcc") is None:
        return said | {"built": "no: there is no nvcc"}
    given = os.environ | {"PIX2REP_CUDA_ARCHS": os.environ.get("PIX2REP_CUDA_ARCHS", chips()), "PIX2REP_BUILD": "auto"}
    try:
        command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        result = subprocess.run(command, cwd=ROOT, env=given, capture_output=True, text=True, timeout=LIMIT_S)
        said["built"] = f"for {given['PIX2REP_CUDA_ARCHS']}, exit code {result.returncode}" + (f": {result.stderr[-1500:]}" if result.returncode else "")
    except subprocess.TimeoutExpired:
        said["built"] = f"stopped after {LIMIT_S} s"
    return said | {"missing": missing()}


if __name__ == "__main__":
    print(json.dumps(ensure(), indent=1))
