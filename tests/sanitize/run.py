"""Build the C++ bodies of csrc/cpu without torch or Python and run them under AddressSanitizer (and leaks), UndefinedBehaviorSanitizer, ThreadSanitizer.

`make sanitize`, or `python tests/sanitize/run.py [op ...]`. Each `<op>.cpp` here drives one op; every instruction set that this processor has is run. Flags
of instruction sets and warnings are setup.py's. Objects stay in build/sanitize while what they read is unchanged.
"""

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
import setup  # noqa: E402

FLAGS = [*setup.FLAGS, "-O1", "-g1", "-fno-omit-frame-pointer", "-fno-var-tracking"]  # the last of two -O counts
SANITIZERS = {
    "address": ["-fsanitize=address", "--param", "asan-instrumentation-with-call-threshold=0"],  # calls: unrolled tiles compile in half the time
    "undefined": ["-fsanitize=undefined,float-cast-overflow", "-fno-sanitize-recover=all"],
    "thread": ["-fsanitize=thread"],
}
OPTIONS = {"ASAN_OPTIONS": "detect_leaks=1:strict_init_order=1", "UBSAN_OPTIONS": "print_stacktrace=1", "TSAN_OPTIONS": "halt_on_error=1"}
NEEDS = {"avx2": {"avx2", "fma"}, "avx512": {"avx512f", "avx512dq", "avx512vl"}}


def ops() -> list[str]:
    return sorted(path.stem for path in Path(__file__).parent.glob("*.cpp") if path.stem != "main")


def compile_one(job: tuple[Path, Path, list[str]]) -> Path:
    source, target, flags = job
    if not (setup.fresh(str(target)) and target.stat().st_mtime > Path(__file__).stat().st_mtime):
        target.parent.mkdir(parents=True, exist_ok=True)
        command = [os.environ.get("CXX", "c++"), *FLAGS, *flags, "-I", str(ROOT / "csrc"), "-MMD", "-c", str(source), "-o", str(target)]
        subprocess.run(command, check=True)
    return target


def jobs(chosen: list[str]) -> list[tuple[Path, Path, list[str]]]:
    """Sources, objects and flags for every sanitizer, the slowest first."""
    kernels = (ROOT / "csrc/cpu").glob("*_kernels.cpp")  # all: a body may use another op's
    sources = [(path, isa, [*flags, f"-DPIX2REP_ISA={isa}"]) for path in kernels for isa, flags in setup.ISA_FLAGS.items()]
    sources += [(Path(__file__).with_name(f"{name}.cpp"), "driver", []) for name in [*chosen, "main"]]
    sources.sort(key=lambda source: -source[0].stat().st_size)
    return [
        (path, ROOT / "build" / "sanitize" / sanitizer / folder / f"{path.stem}.o", flags + more)
        for sanitizer, more in SANITIZERS.items() for path, folder, flags in sources
    ]  # fmt: skip


def instruction_sets() -> list[str]:
    """What this processor runs, of what setup.py compiles for it."""
    info = Path("/proc/cpuinfo")
    has = set(info.read_text().split()) if info.exists() else set()
    return [isa for isa in setup.ISA_FLAGS if NEEDS.get(isa, set()) <= has]


def run(binary: Path, isa: str) -> str:
    started = time.monotonic()
    result = subprocess.run([str(binary)], env={**os.environ, **OPTIONS, "PIX2REP_ISA": isa}, capture_output=True, text=True)
    if result.returncode or result.stderr:
        raise SystemExit(f"{binary} with PIX2REP_ISA={isa} failed:\n{result.stdout}{result.stderr}")
    return f"{binary.parent.name:9} {isa:8} {time.monotonic() - started:5.1f} s  {result.stdout.strip()}"


def main() -> None:
    chosen = sys.argv[1:] or ops()
    started = time.monotonic()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        wanted = jobs(chosen)
        objects = list(pool.map(compile_one, wanted))
        binaries = []
        for sanitizer, flags in SANITIZERS.items():
            binaries.append(ROOT / "build" / "sanitize" / sanitizer / "run")
            linked = [str(o) for o in objects if sanitizer in o.relative_to(ROOT / "build" / "sanitize").parts[0]]
            subprocess.run([os.environ.get("CXX", "c++"), *flags, *linked, "-o", str(binaries[-1]), "-pthread"], check=True)
        print(f"built in {time.monotonic() - started:.0f} s: {', '.join(chosen)}")
        for line in pool.map(run, *zip(*[(b, isa) for b in binaries for isa in instruction_sets()], strict=True)):
            print(line, flush=True)


if __name__ == "__main__":
    main()
