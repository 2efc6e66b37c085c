"""The house: one word in every folder, schemas equal in Python and C++, imports that cost nothing and point one way."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pix2rep_kernels
from pix2rep_kernels import dispatch, native

ROOT = Path(__file__).parent.parent
FOLDERS = {
    "hub": "pix2rep_kernels/ops/{}.py", "reference": "pix2rep_kernels/reference/{}.py", "triton": "pix2rep_kernels/triton/{}.py",
    "cpu": "csrc/cpu/{}.cpp", "cuda": "csrc/cuda/{}.cu", "test": "tests/test_{}.py", "hypothesis": "tests/test_{}_hypothesis.py",
    "sanitize": "tests/sanitize/{}.cpp", "benchmark": "benchmarks/bench_{}.py", "calls": "benchmarks/calls_{}.py",
}  # fmt: skip


@pytest.mark.parametrize("op", dispatch.OPS)
def test_every_word_is_in_every_folder(op):
    for kind, path in FOLDERS.items():
        exists = (ROOT / path.format(op)).exists()
        assert exists != ((op, kind) in dispatch.ABSENT), f"{path.format(op)}: a file, or a reason in dispatch.ABSENT, not both"


def test_absences_have_reasons():
    for (op, kind), reason in dispatch.ABSENT.items():
        assert op in dispatch.OPS and kind in FOLDERS and len(reason.split()) > 4, (op, kind, reason)


def test_no_word_but_the_ops():
    shared = {"__init__", "main", "felzenszwalb"}  # not an op: one backend, no gradient; sanitized all the same
    for kind in ("hub", "reference", "sanitize", "benchmark", "calls"):
        folder, pattern = (ROOT / FOLDERS[kind]).parent, re.escape(Path(FOLDERS[kind]).name).replace(r"\{\}", "(.*)")
        found = {match[1] for path in folder.iterdir() if (match := re.fullmatch(pattern, path.name))}
        assert found <= {*dispatch.OPS, *shared}, folder
    for path in (ROOT / "pix2rep_kernels/triton").glob("*.py"):
        assert path.stem.split("_")[0] in {*dispatch.OPS, "", "tiles"}, f"{path.name} begins with no op's word"


def test_the_top_exports_ops_and_losses():
    losses = [
        node.name for path in (ROOT / "pix2rep_kernels/losses").glob("*.py") for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_") and any("Module" in ast.unparse(base) for base in node.bases)
    ]  # fmt: skip
    assert losses
    assert {*dispatch.OPS, *losses, "why_not"} <= set(pix2rep_kernels.__all__)
    assert all(hasattr(pix2rep_kernels, name) for name in pix2rep_kernels.__all__)


def described(arguments):
    """What a schema says of each argument or result: name, type, default, whether by name only, whether written to."""
    return [(a.name, str(a.type), a.has_default_value(), a.default_value, a.kwarg_only, str(a.alias_info)) for a in arguments]


@pytest.mark.parametrize("op", dispatch.OPS)
def test_schemas_are_equal_in_python_and_cpp(op):
    if reason := native.why_missing("cpu"):
        pytest.skip(reason)
    for name in (op, f"{op}_backward"):
        ours = getattr(torch.ops.pix2rep, name).default._schema
        theirs = getattr(torch.ops.pix2rep_native, name).default._schema
        assert ours.arguments[-1].name == "backend"
        assert described(ours.arguments[:-1]) == described(theirs.arguments)
        assert described(ours.returns) == described(theirs.returns)


@pytest.mark.parametrize("op", dispatch.OPS)
def test_backends_offer_the_same_two_functions(op):
    hub = importlib.import_module(f"pix2rep_kernels.ops.{op}")
    for schema, name in ((hub.SCHEMA, "forward"), (hub.BACKWARD_SCHEMA, "backward")):
        arguments = [a.split()[1] for a in re.search(r"\((.*?)\) ->", schema)[1].split(", ") if not a.endswith(" backend")]
        tree = ast.parse((ROOT / f"pix2rep_kernels/reference/{op}.py").read_text())
        function = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name)
        assert [a.arg for a in function.args.args] == arguments
        source = ast.parse((ROOT / f"pix2rep_kernels/triton/{op}.py").read_text())
        function = next(node for node in source.body if isinstance(node, ast.FunctionDef) and node.name == name)
        assert [a.arg for a in function.args.args] == arguments


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


# folder of pix2rep_kernels -> what of pix2rep_kernels its files may import; of its own folder they may import all
ARROWS = {
    "losses": ("ops.", "check", "dispatch", "distributed"),
    "ops": ("register", "check", "layout", "dispatch"),
    "reference": ("check", "layout"),
    "triton": ("check", "layout"),
}


def test_arrows_point_one_way():
    package = ROOT / "pix2rep_kernels"
    for folder, allowed in ARROWS.items():
        for path in (package / folder).glob("*.py"):
            for name in imports(path):
                inner = name.removeprefix("pix2rep_kernels.")
                assert inner == name or inner.startswith((*allowed, f"{folder}.")), f"{path} imports {name}"
    for path in package.rglob("*.py"):
        assert not any(name == "pix2rep" or name.startswith("pix2rep.") for name in imports(path)), path
    # These serve every op, and name none: hubs and backends are imported by name when a call needs them.
    for name in ("register", "dispatch", "native", "check", "layout", "testing"):
        assert not any(re.match(r"pix2rep_kernels\.(ops|losses|reference|triton)", found) for found in imports(package / f"{name}.py")), name
    public = {"pix2rep_kernels", *(f"pix2rep_kernels.{name}" for name in (*pix2rep_kernels.__all__, "__version__"))}
    for path in (ROOT / "python").rglob("*.py"):
        for name in imports(path):
            ours = name.startswith("pix2rep_kernels") and not name.startswith("pix2rep_kernels.testing")
            assert not ours or name in public, f"{path} imports {name}: public names only"


def test_benchmarks_import_no_tests():
    tests = {path.stem for path in (ROOT / "tests").rglob("*.py")} | {"tests", "example"}
    for path in (ROOT / "benchmarks").glob("*.py"):
        assert not tests & {name.partition(".")[0] for name in imports(path)}, path


def included(path):
    """(files of ours, other headers) that a C++ file includes."""
    text = path.read_text()
    return [path.parent / name for name in re.findall(r'^\s*#include "(.*?)"', text, re.MULTILINE)], re.findall(r"^\s*#include <(.*?)>", text, re.MULTILINE)


def test_cpp_arrows_point_one_way():
    for folder, allowed in (("common", ("common",)), ("cpu", ("common", "cpu")), ("cuda", ("common", "cuda"))):
        for path in (ROOT / "csrc" / folder).glob("*.*"):
            for file in included(path)[0]:
                if file.name == "emulate.h":  # found in tests/emulate, where the kernels are compiled for the CPU
                    continue
                assert file.resolve().parent in {ROOT / "csrc" / name for name in allowed}, f"{path} includes {file}"
                assert file.exists(), f"{path} includes {file}"


def test_cpp_bodies_know_no_torch():
    """`*_core.h`, `*_kernels.*` and whatever they include: a plain program runs them (tests/sanitize)."""
    known, left = set(), [path for path in (ROOT / "csrc/cpu").iterdir() if re.search(r"_(core|kernels)\.\w+$", path.name)]
    assert left
    while left:
        path = left.pop().resolve()
        if path in known:
            continue
        known.add(path)
        files, headers = included(path)
        left += files
        assert not [h for h in headers if h.startswith(("torch/", "ATen/", "c10/", "Python.h", "cuda"))], path


LEAN = """
import sys, time
import torch
start = time.perf_counter()
import pix2rep_kernels
seconds = time.perf_counter() - start
assert not {m for m in sys.modules if m == "triton" or m.startswith("triton.")}, "triton was imported"
assert "pix2rep_kernels._C" not in sys.modules, "_C was loaded"
assert not torch.cuda.is_initialized(), "CUDA was touched"
print(seconds)
"""


def test_import_is_free():
    result = subprocess.run([sys.executable, "-c", LEAN], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) < 1.0


UNBUILT = """
import sys, importlib.abc
class Hide(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name in ("pix2rep_kernels._C", "triton"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Hide())
from pix2rep_kernels import dispatch, native
import importlib.util
importlib.util.find_spec = lambda name, find=importlib.util.find_spec: None if name in ("pix2rep_kernels._C", "triton") else find(name)
import torch, pix2rep_kernels
x = torch.randn(1, 4, 8, 8, requires_grad=True)
pix2rep_kernels.Pix2RepLoss(num_samples=20)(x, x.detach()).backward()
try:
    pix2rep_kernels.infonce(torch.randn(4, 2), torch.randn(4, 2), temperature=0.1, backend="cpu")
except RuntimeError as error:
    print(error)
"""


def test_works_with_nothing_compiled():
    result = subprocess.run([sys.executable, "-c", UNBUILT], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "backend 'cpu' cannot run infonce: _C was not built" in result.stdout


def test_report_tells_every_op_and_gap():
    text = subprocess.run([sys.executable, "-m", "pix2rep_kernels"], capture_output=True, text=True, check=True).stdout
    for op in dispatch.OPS:
        (cells,) = re.findall(rf"^{op} +(.*\S)", text, re.MULTILINE)
        reasons = [dispatch.why_unavailable(op, backend) for backend in dispatch.BACKENDS]
        assert cells.split() == ["yes" if reason is None else "-" for reason in reasons]
        assert all(reason in text for reason in reasons if reason)
    assert torch.__version__ in text and pix2rep_kernels.__version__ in text


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_documents_name_paths_that_exist(document):
    text = (ROOT / document).read_text()
    for path in re.findall(r"`((?:csrc|pix2rep_kernels|python|benchmarks|tests|configs)/[\w./-]+)`", text):
        assert (ROOT / path).exists(), f"{document}: {path}"


def test_files_stay_small():
    listed = subprocess.run(["git", "ls-files", "*.py", "*.cpp", "*.h", "*.cu"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in listed.stdout.split():
        lines = len((ROOT / name).read_text().splitlines())
        assert lines <= 400, f"{name}: {lines} lines"
