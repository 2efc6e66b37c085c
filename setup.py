"""Build `_C` (CPU kernels) against LibTorch's stable ABI.

PIX2REP_BUILD=auto (default) | cpu | cuda | none chooses; the presence of a GPU never does.
"""

import importlib.util
import json
import os
import platform
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
if BUILD not in ("auto", "cpu", "cuda", "none"):
    raise SystemExit(f"`PIX2REP_BUILD` must be auto, cpu, cuda or none, got {BUILD!r}")

# One object serves torch 2.11 and later, CPython 3.10 and later.
MACROS = [("TORCH_STABLE_ONLY", None), ("TORCH_TARGET_VERSION", "0x020b000000000000"), ("Py_LIMITED_API", "0x030A0000")]
FLAGS = ["-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-Wall", "-Wno-psabi", "-Wno-maybe-uninitialized", "-Wno-unknown-pragmas"]
# Flags of each instruction set that `<op>_kernels.cpp` is compiled for; the processor chooses at run time (csrc/cpu/isa.h).
ISA_FLAGS = {"baseline": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    ISA_FLAGS |= {"avx2": ["-mavx2", "-mfma"], "avx512": ["-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma"]}


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


class Build(build_ext):
    """Compile each kernel file once an instruction set, the files side by side."""

    def build_extension(self, extension):
        torch = torch_root()
        include = [str(torch / "include"), str(ROOT / "csrc")]
        jobs = []
        for source in extension.sources:
            sets = ISA_FLAGS if source.endswith("_kernels.cpp") else {None: []}
            for isa, flags in sets.items():
                macros = [*MACROS, *([("PIX2REP_ISA", isa)] if isa else [])]
                jobs.append((source, os.path.join(self.build_temp, isa or "any"), macros, FLAGS + flags))

        def compile_one(job):
            source, folder, macros, flags = job
            (target,) = self.compiler.object_filenames([source], output_dir=folder)
            if self.force or not fresh(target):
                self.compiler.compile([source], folder, macros, include, extra_postargs=[*flags, "-MMD"])
            return target

        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            objects = list(pool.map(compile_one, jobs))
        target = self.get_ext_fullpath(extension.name)
        self.compiler.link_shared_object(objects, target, libraries=["torch_cpu"], library_dirs=[str(torch / "lib")], target_lang="c++")
        version = subprocess.run([*self.compiler.compiler_cxx[:1], "--version"], capture_output=True, text=True).stdout.partition("\n")[0]
        facts = {"objects": ["_C"], "compiler": version, "isas": sorted(ISA_FLAGS), "flags": FLAGS, "machine": platform.machine()}
        Path(target).with_name("_build.json").write_text(json.dumps(facts, indent=1) + "\n")

    def copy_extensions_to_source(self):
        super().copy_extensions_to_source()
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
    if BUILD == "cuda" and not any((ROOT / "csrc/cuda").glob("*.cu")):
        raise SystemExit("`PIX2REP_BUILD` must be auto, cpu or none: there is no CUDA C++ source yet, got 'cuda'")
    sources = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc/cpu").glob("*.cpp"))
    headers = sorted(str(p.relative_to(ROOT)) for folder in ("common", "cpu") for p in (ROOT / "csrc" / folder).glob("*.h"))
    return [Extension("pix2rep_kernels._C", sources, depends=headers, py_limited_api=True, language="c++")]


if __name__ == "__main__":  # tests/sanitize reads the flags
    # Read by an isolated build before it compiles; torch that is in the environment already is used instead.
    needs_torch = BUILD != "none" and torch_root() is None
    setup(
        ext_modules=extensions(),
        cmdclass={"build_ext": Build, "bdist_wheel": Wheel},
        setup_requires=["torch>=2.11", "numpy"] if needs_torch else [],
    )
