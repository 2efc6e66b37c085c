"""`python -m pix2rep_kernels`: versions, how the compiled objects were built, and which backend runs which op here, with the reason for each gap."""

import importlib.metadata
import os
import platform

import torch

from pix2rep_kernels import __version__, dispatch, native


def report() -> str:
    """The text that `python -m pix2rep_kernels` prints."""
    lines = [f"pix2rep-kernels {__version__}", *(f"  {name:<10} {value}" for name, value in versions().items()), ""]
    width = max(map(len, dispatch.OPS)) + 2
    lines.append(" " * width + "".join(f"{backend:<12}" for backend in dispatch.BACKENDS))
    gaps = {}
    for op in dispatch.OPS:
        cells = []
        for backend in dispatch.BACKENDS:
            reason = dispatch.why_unavailable(op, backend)
            cells.append("yes" if reason is None else "-")
            if reason:
                gaps.setdefault((backend, reason), []).append(op)
        lines.append(f"{op:<{width}}" + "".join(f"{cell:<12}" for cell in cells))
    if gaps:
        lines += ["", "not here:", *(f"  {backend} ({', '.join(ops)}): {reason}" for (backend, reason), ops in gaps.items())]
    return "\n".join(lines)


def versions() -> dict[str, str]:
    """What a bug report needs: versions, devices, build facts, environment."""
    facts = native.build_facts()
    found = {"python": platform.python_version(), "torch": torch.__version__, "machine": platform.machine()}
    for package in ("triton", "numpy"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    found["cuda"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "no device"
    if facts:
        found["built"] = f"{', '.join(facts['objects'])} by {facts['compiler']}, instruction sets {', '.join(facts['isas'])}"
    else:
        found["built"] = "nothing"
    asked = {k: v for k, v in os.environ.items() if k.startswith("PIX2REP_") or k == "TRITON_INTERPRET"}
    if asked:
        found["environment"] = ", ".join(f"{k}={v}" for k, v in sorted(asked.items()))
    return found


if __name__ == "__main__":
    print(report())
