"""The house: one word in every folder, schemas equal in Python and C++, imports that cost nothing and point one way."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pix2rep_kernels import dispatch, native

ROOT = Path(__file__).parent.parent
FOLDERS = {
    "hub": "pix2rep_kernels/ops/{}.py", "reference": "pix2rep_kernels/reference/{}.py", "triton": "pix2rep_kernels/triton/{}.py",
    "cpu": "csrc/cpu/{}.cpp", "cuda": "csrc/cuda/{}.cu", "test": "tests/test_{}.py", "benchmark": "benchmarks/bench_{}.py",
}  # fmt: skip


@pytest.mark.parametrize("op", dispatch.OPS)
def test_every_word_is_in_every_folder(op):
    for kind, path in FOLDERS.items():
        exists = (ROOT / path.format(op)).exists()
        assert exists != ((op, kind) in dispatch.ABSENT), f"{path.format(op)}: a file, or a reason in dispatch.ABSENT, not both"


def test_no_word_but_the_ops():
    for path in FOLDERS.values():
        folder, pattern = (ROOT / path).parent, Path(path).name.format("*")
        found = {re.fullmatch(pattern.replace("*", "(.*)"), p.name)[1] for p in folder.glob(pattern)}
        known = {*dispatch.OPS, "__init__"}
        if folder.name in ("ops", "reference", "benchmarks"):
            assert found <= known, folder


@pytest.mark.parametrize("op", dispatch.OPS)
def test_schemas_are_equal_in_python_and_cpp(op):
    if reason := native.why_missing("cpu"):
        pytest.skip(reason)
    for name in (op, f"{op}_backward"):
        ours = getattr(torch.ops.pix2rep, name).default._schema
        theirs = getattr(torch.ops.pix2rep_native, name).default._schema
        assert [(a.name, str(a.type)) for a in ours.arguments if a.name != "backend"] == [(a.name, str(a.type)) for a in theirs.arguments]
        assert [str(r.type) for r in ours.returns] == [str(r.type) for r in theirs.returns]


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
            yield node.module or ""
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_arrows_point_one_way():
    package = ROOT / "pix2rep_kernels"
    for folder in ("reference", "triton"):
        for path in (package / folder).glob("*.py"):
            for name in imports(path):
                assert not name.startswith(("pix2rep_kernels.ops", "pix2rep_kernels.losses", "pix2rep_kernels.register")), path
    for path in package.rglob("*.py"):
        assert not any(name == "pix2rep" or name.startswith("pix2rep.") for name in imports(path)), path
    public = {"pix2rep_kernels", "pix2rep_kernels.testing"}
    for path in (ROOT / "python").rglob("*.py"):
        for name in imports(path):
            assert not name.startswith("pix2rep_kernels") or name in public, f"{path} imports {name}: public names only"


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


def test_report_names_every_gap():
    result = subprocess.run([sys.executable, "-m", "pix2rep_kernels"], capture_output=True, text=True, check=True)
    for op, backend in dispatch.ABSENT:
        if backend in dispatch.BACKENDS:
            assert dispatch.ABSENT[op, backend] in result.stdout
    assert torch.__version__ in result.stdout


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
