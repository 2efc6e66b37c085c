"""Build `_C` (CPU kernels) and, where nvcc is, `_C_cuda` against LibTorch's stable ABI.

PIX2REP_BUILD=auto (default) | cpu | cuda | none chooses; the presence of a GPU never does. "emulate" builds the CUDA sources for the CPU, for tests.
"""

import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
BUILD = os.environ.get("PIX2REP_BUILD", "auto")
if BUILD not in ("auto", "cpu", "cuda", "none", "emulate"):
    raise SystemExit(f"`PIX2REP_BUILD` must be auto, cpu, cuda or none, got {BUILD!r}")

# One object serves torch 2.11 and later, CPython 3.10 and later.
MACROS = [("TORCH_STABLE_ONLY", None), ("TORCH_TARGET_VERSION", "0x020b000000000000"), ("Py_LIMITED_API", "0x030A0000")]
FLAGS = ["-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-Wall", "-Wno-psabi", "-Wno-maybe-uninitialized", "-Wno-unknown-pragmas"]
# Flags of each instruction set that `<op>_kernels.cpp` is compiled for; the processor chooses at run time (csrc/cpu/isa.h).
ISA_FLAGS = {"baseline": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    ISA_FLAGS |= {"avx2": ["-mavx2", "-mfma"], "avx512": ["-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma"]}
# Machine code for Ampere and Hopper, and code (+ptx) that the driver compiles for what comes after.
ARCHS = os.environ.get("PIX2REP_CUDA_ARCHS", "80,90a,80+ptx").split(",")
if not all(re.fullmatch(r"\d+a?(\+ptx)?", arch) for arch in ARCHS):
    raise SystemExit(f"`PIX2REP_CUDA_ARCHS` must list chips such as 80,90a,80+ptx, got {','.join(ARCHS)!r}")
NVCC_FLAGS = ["-std=c++17", "-O3", "-DUSE_CUDA", "--expt-relaxed-constexpr", "--extended-lambda", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wno-psabi"]
NVCC_FLAGS += [
    f"-gencode=arch=compute_{chip},code={'compute' if ptx else 'sm'}_{chip}" for chip, _, ptx in (arch.partition("+") for arch in ARCHS)
]


def nvcc() -> str | None:
    """The CUDA compiler, of CUDA_HOME or on PATH."""
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=os.path.join(home, "bin")) if home else shutil.which("nvcc")


def torch_root() -> Path | None:
    """Folder of the installed torch. A build in isolation hides the environment's own packages from import, not from the disk."""
    if spec := importlib.util.find_spec("torch"):
        return Path(spec.origin).parent
    for key in ("platlib", "purelib"):
        if (root := Path(sysconfig.get_paths()[key]) / "torch").is_dir():
            return root
    return None


def fresh(target: str) -> bool:
    """Whether an object is newer than this file and everything that the compiler says it read (the .d file that -MMD writes)."""
    made, listed = Path(target), Path(target).with_suffix(".d")
    if not (made.exists() and listed.exists()):
        return False
    read = [Path(name) for name in listed.read_text().partition(": ")[2].replace("\\\n", " ").split()]
    return all(file.exists() and file.stat().st_mtime < made.stat().st_mtime for file in [Path(__file__), *read])


def cuda_root() -> Path:
    """Folder of the CUDA toolkit that `nvcc` belongs to."""
    text = subprocess.run([nvcc(), "--dryrun", "-c", "none.cu"], capture_output=True, text=True).stderr
    return Path(re.search(r"^#\$ TOP=(.*)$", text, re.MULTILINE)[1])


def first_line(compiler: str, line: int = 0) -> str:
    """What a compiler says of itself."""
    return subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout.strip().split("\n")[line]


class Build(build_ext):
    """Compile each kernel file once an instruction set, the files side by side."""

    def build_extension(self, extension):
        torch = torch_root()
        include = [str(torch / "include"), str(ROOT / "csrc")]
        name = extension.name.rpartition(".")[2]
        emulated = name == "_C_emulated"
        jobs = []
        for source in extension.sources:
            sets = ISA_FLAGS if source.endswith("_kernels.cpp") else {None: []}
            for isa, flags in sets.items():
                macros = [*MACROS, ("PIX2REP_MODULE", name), *([("PIX2REP_ISA", isa)] if isa else [])]
                macros += [("PIX2REP_EMULATE", None)] if emulated else []
                jobs.append((source, os.path.join(self.build_temp, name, isa or "any"), macros, FLAGS + flags))
        include += [str(ROOT / "tests/emulate")] if emulated else []

        def compile_one(job):
            source, folder, macros, flags = job
            target = os.path.join(folder, source + ".o")
            if self.force or not fresh(target):
                defined = [f"-D{key}" if value is None else f"-D{key}={value}" for key, value in macros]
                included = [f"-I{path}" for path in [*include, *self.include_dirs]]
                Path(target).parent.mkdir(parents=True, exist_ok=True)
                if source.endswith(".cu") and not emulated:
                    compiler = [nvcc(), *NVCC_FLAGS]
                else:
                    compiler = [*self.compiler.compiler_so_cxx, *flags, *(["-x", "c++"] if emulated else [])]
                self.spawn([*compiler, *defined, *included, "-MMD", "-MF", str(Path(target).with_suffix(".d")), "-c", source, "-o", target])
            return target

        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            objects = list(pool.map(compile_one, jobs))
        target = self.get_ext_fullpath(extension.name)
        libraries, folders = ["torch_cpu"], [str(torch / "lib")]
        if name == "_C_cuda":
            libraries += ["cudart_static", "rt", "pthread", "dl"]
            folders += [str(cuda_root() / "lib64")]
        self.compiler.link_shared_object(objects, target, libraries=libraries, library_dirs=folders, target_lang="c++")
        if emulated:
            return
        facts = {"objects": [], "isas": sorted(ISA_FLAGS), "flags": FLAGS, "machine": platform.machine()}
        path = Path(target).with_name("_build.json")
        if path.exists():
            facts = json.loads(path.read_text())
        facts["objects"] = sorted({*facts["objects"], name})
        facts["compiler"] = first_line(self.compiler.compiler_cxx[0])
        if name == "_C_cuda":
            facts["nvcc"], facts["nvcc_flags"] = first_line(nvcc(), -1), NVCC_FLAGS
        path.write_text(json.dumps(facts, indent=1) + "\n")

    def copy_extensions_to_source(self):
        super().copy_extensions_to_source()
        if BUILD != "emulate":
            shutil.copy(Path(self.build_lib) / "pix2rep_kernels/_build.json", ROOT / "pix2rep_kernels")


class Wheel(bdist_wheel):
    """abi3 when something was compiled, pure Python otherwise."""

    def finalize_options(self):
        if self.distribution.ext_modules:
            self.py_limited_api = "cp310"
        super().finalize_options()


def extensions() -> list[Extension]:
    if BUILD == "none":
        return []
    cuda = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc/cuda").glob("*.c*") if p.suffix in (".cu", ".cpp"))
    if BUILD == "emulate":
        return [Extension("pix2rep_kernels._C_emulated", cuda, py_limited_api=True)]
    if BUILD == "cuda" and nvcc() is None:
        raise SystemExit("`PIX2REP_BUILD` must be auto, cpu or none where there is no nvcc on PATH or under CUDA_HOME, got 'cuda'")
    cpu = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc/cpu").glob("*.cpp"))
    found = [Extension("pix2rep_kernels._C", cpu, py_limited_api=True, language="c++")]
    if BUILD != "cpu" and nvcc():
        # Where nvcc is there but fails, of a version that is too old, say, the rest is built all the same.
        found.append(Extension("pix2rep_kernels._C_cuda", cuda, py_limited_api=True, optional=BUILD == "auto"))
    return found


if __name__ == "__main__":  # tests/sanitize reads the flags
    # Read by an isolated build before it compiles; torch that is in the environment already is used instead.
    needs_torch = BUILD != "none" and torch_root() is None
    setup(
        ext_modules=extensions(),
        cmdclass={"build_ext": Build, "bdist_wheel": Wheel},
        setup_requires=["torch>=2.11", "numpy"] if needs_torch else [],
    )
