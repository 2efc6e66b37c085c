"""Machine code of csrc/cuda without a GPU: the cubins of the built `_C_cuda`, or of nvcc where that is older than the sources, taken apart."""

import importlib.util
import os
import re
import shutil
import struct
import subprocess
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import setup

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
OPS = sorted({source.stem.partition("_")[0] for source in SOURCES})
ARCHS = ("80", "90a")
CACHE = ROOT / "build" / "cuda_static"
MACROS = ("TORCH_STABLE_ONLY", "TORCH_TARGET_VERSION=0x020b000000000000")
RESERVED = 1024  # bytes of shared memory that belong to the system, in the count of kernels that use any
MAX_THREADS = 5  # tag of the attribute that __launch_bounds__ leaves in a cubin


class Code(NamedTuple):
    """One kernel on one chip."""

    name: str  # as C++ writes it, without namespaces and parameters
    instructions: list[tuple[int, str]]  # address, text; a branch names an address
    registers: int
    stack: int
    shared: int  # static, bytes
    threads: int  # of a block at most, 0 where the source does not say


def tool(name: str) -> str:
    """A program of the CUDA toolkit or of triton's wheel."""
    spec = importlib.util.find_spec("triton")
    own = Path(spec.origin).parent / "backends" / "nvidia" / "bin" if spec and spec.origin else ROOT
    return shutil.which(name) or str(own / name)


def output(*command: object) -> str:
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True).stdout


def compiled(source: str, arch: str, *macros: str) -> Path:
    """The cubin of one file, from CACHE where that is newer than everything that the compiler read."""
    torch = Path(importlib.util.find_spec("torch").origin).parent
    target = CACHE / "-".join([Path(source).stem, arch, *macros, "cubin"])
    if not setup.fresh(str(target)):
        CACHE.mkdir(parents=True, exist_ok=True)
        flags = [flag for flag in setup.NVCC_FLAGS if not flag.startswith("-gencode")]
        command = [shutil.which("nvcc"), *flags, f"-gencode=arch=compute_{arch},code=sm_{arch}", f"-I{torch / 'include'}"]
        command += [f"-D{macro}" for macro in (*MACROS, *macros)]
        made = target.with_suffix(f".{os.getpid()}")
        subprocess.run([*command, "-MMD", "-MF", target.with_suffix(".d"), "-cubin", "-o", made, ROOT / "csrc" / "cuda" / source], check=True)
        os.replace(made, target)
    return target


def built() -> Path | None:
    """The built object, where it is newer than its sources."""
    read = [path for folder in ("cuda", "common") for path in (ROOT / "csrc" / folder).iterdir()]
    objects = [path for path in (ROOT / "pix2rep_kernels").glob("_C_cuda.*so") if all(path.stat().st_mtime > file.stat().st_mtime for file in read)]
    return objects[0] if objects else None


def kernels(archs=ARCHS, ops=OPS) -> dict[tuple[str, str], list[Code]]:
    """Every kernel by op and chip, of as few compilations as there can be."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        if whole := built():
            subprocess.run([tool("cuobjdump"), "-xelf", "all", whole], cwd=folder, capture_output=True, check=True)
            cubins = [(op_of(path), path.stem.rpartition("sm_")[2], path) for path in Path(folder).glob("*.cubin")]
            expected = Counter((source.stem.partition("_")[0], arch) for source in SOURCES for arch in ARCHS)
            assert Counter((op, arch) for op, arch, _ in cubins) == expected, "the object does not hold one cubin a source and chip"
        else:
            jobs = [(source, arch) for source in SOURCES for arch in archs if source.stem.partition("_")[0] in ops]
            with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
                made = pool.map(lambda job: compiled(job[0].name, job[1]), jobs)
                cubins = [(source.stem.partition("_")[0], arch, path) for (source, arch), path in zip(jobs, made, strict=True)]
        for op, arch, path in cubins:
            if op in ops and arch in archs:
                found.setdefault((op, arch), []).extend(take_apart(path))
    return found


def op_of(cubin: Path) -> str:
    """Of which op's source a cubin of the object is: the word that most of its kernels' names have."""
    names = [name for name in sections(cubin.read_bytes()) if name.startswith(".text.")]
    return max(OPS, key=lambda op: sum(op in name for name in names))


def sections(elf: bytes) -> dict[str, bytes]:
    """Contents of a 64-bit ELF file by the sections' names."""
    (table,) = struct.unpack_from("<Q", elf, 0x28)
    size, count, names = struct.unpack_from("<HHH", elf, 0x3A)
    headers = [struct.unpack_from("<II4Q", elf, table + i * size) for i in range(count)]
    text = headers[names][4]
    return {elf[text + h[0] : elf.index(b"\0", text + h[0])].decode(): elf[h[4] : h[4] + h[5]] for h in headers}


def launch_bound(attributes: bytes) -> int:
    """The value of MAX_THREADS: entries are a format and a tag of a byte each, two bytes that are a value or, of format 4, the length of what follows."""
    at = 0
    while at < len(attributes):
        form, tag, length = struct.unpack_from("<BBH", attributes, at)
        if tag == MAX_THREADS and form == 4:
            return struct.unpack_from("<I", attributes, at + 4)[0]
        at += 4 + (length if form == 4 else 0)
    return 0


def readable(mangled: list[str]) -> list[str]:
    text = subprocess.run(["c++filt"], input="\n".join(mangled), capture_output=True, text=True, check=True).stdout.splitlines()
    return [re.sub(r"^void |\b\w+::|\(.*", "", name) for name in text]


def take_apart(cubin: Path) -> list[Code]:
    """Every kernel of a cubin."""
    usage = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)", output(tool("cuobjdump"), "-res-usage", cubin))
    bodies = re.split(r"^\.text\.(\S+):\n", output(tool("nvdisasm"), "-c", "-ndf", cubin), flags=re.MULTILINE)
    code = {name: _instructions(body) for name, body in zip(bodies[1::2], bodies[2::2], strict=True)}
    held = sections(cubin.read_bytes())
    names = readable([row[0] for row in usage])
    return [
        Code(name, code[mangled], int(registers), int(stack), max(int(shared) - RESERVED, 0), launch_bound(held[f".nv.info.{mangled}"]))
        for name, (mangled, registers, stack, shared) in zip(names, usage, strict=True)
    ]


def _instructions(body: str) -> list[tuple[int, str]]:
    found, labels, waiting = [], {}, []
    for address, text, label in re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?) ?;|^(\.L_x_\d+):", body, re.MULTILINE):
        if label:
            waiting.append(label)
            continue
        labels |= dict.fromkeys(waiting, int(address, 16))
        waiting = []
        found.append((int(address, 16), text))
    return [(at, re.sub(r"`\((\.L_x_\d+)\)", lambda m: hex(labels.get(m[1], 0)), text) if "`" in text else text) for at, text in found]


def opcode(text: str) -> str:
    return re.sub(r"^@!?U?P\w+\s+", "", text).split()[0]


def jump(text: str) -> int | None:
    """Where a branch goes; not those for a warp that has diverged."""
    match = re.search(r"\bBRA (?:!?U?P\w+, )?`?\(?(0x[0-9a-f]+)", text)
    return int(match[1], 16) if match and opcode(text) == "BRA" else None
