"""What the documents say is run: Python blocks, `pix2rep` commands, links, names of options, signatures, equations, quoted messages.

A page's blocks share one namespace and one temporary folder, in order. `<!-- setup ... -->` is Python that the reader does not see; `<!-- not run: reason -->`
leaves out the block below it; `<!-- commands run -->` in a page has its `pix2rep` commands run too, between its blocks, on a tiny phantom.
"""

import importlib
import inspect
import os
import re
import shlex
from pathlib import Path
from unittest import mock

import pytest
import torch
import typer
import yaml
from typer.testing import CliRunner

import pix2rep_kernels
from pix2rep.cli import app
from pix2rep.config import PRESETS, Config, flatten, load
from pix2rep_kernels import dispatch, distributed

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
PIECE = re.compile(r"<!-- setup\n(?P<setup>.*?)-->|(?P<skip><!-- not run: .+? -->\n+)?^```(?P<kind>\w*)\n(?P<text>.*?)^```$", re.DOTALL | re.MULTILINE)
NOT_RUN = 2  # blocks that may be left out, over all pages
TINY = {
    "pretrain": "data.size=32,32 data.spacing=null network.channels=4,4,8,8,8 network.features=8 network.head_hidden=8 network.projection=8"
    " loss.num_samples=64 split.val=0.2 split.test=0.2 pretrain.steps=2 pretrain.batch_size=2 pretrain.device=cpu pretrain.threads=1",
    "downstream": "downstream.labelled=1 downstream.seeds=0 downstream.probe_steps=2 downstream.probe_lr=0.1 downstream.class_weights=none"
    " downstream.finetune_steps=2 downstream.finetune_batch_size=2 downstream.finetune_lr=1e-3 downstream.overlays=1 downstream.bootstrap=50"
    " downstream.teacher_weight=1 downstream.teacher_batch_size=2",
}
COMMANDS = typer.main.get_command(app).commands

every_page = pytest.mark.parametrize("page", PAGES, ids=NAMES)


def pieces(page):
    return list(PIECE.finditer(page.read_text()))


def commands(text):
    """`pix2rep` commands of a bash block, without comments."""
    lines = text.replace("\\\n", " ").splitlines()
    found = [shlex.split(line, comments=True) for line in lines]
    return [words[1:] for words in found if words[:1] == ["pix2rep"]]


@every_page
def test_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace, text = {"__name__": "page"}, page.read_text()
    with mock.patch.dict(os.environ):
        for piece in PIECE.finditer(text):
            if piece["kind"] == "bash" and "<!-- commands run -->" in text:
                for words in commands(piece["text"]):
                    run_tiny(words)
            elif piece["setup"] or (piece["kind"] == "python" and not piece["skip"]):
                line = text[: piece.start()].count("\n") + 1
                exec(compile("\n" * line + (piece["setup"] or piece["text"]), str(page), "exec"), namespace)
    assert not torch.are_deterministic_algorithms_enabled(), "a page leaves a global setting behind"


def run_tiny(words):
    command = words[0]
    if command == "phantom":
        words = [*words, "--patients", "6", "--size", "32"]
    elif command == "pretrain":
        words = [*words, *TINY["pretrain"].split(), *(["data.size=16,32,32"] if {"pgl", "network.dims=3"} & set(words) else [])]
    elif command in ("probe", "finetune", "evaluate"):
        words = [*words, *TINY["downstream"].split()]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, (words, result.output, result.exception)


def test_few_blocks_are_left_out():
    skipped = [(page.name, piece["skip"]) for page in PAGES for piece in pieces(page) if piece["skip"]]
    assert len(skipped) <= NOT_RUN, skipped


@every_page
def test_commands_parse(page):
    for piece in pieces(page):
        if piece["kind"] != "bash":
            continue
        for name, *rest in commands(piece["text"]):
            context = COMMANDS[name].make_context(name, list(rest))  # an unknown option or a missing argument raises
            config = context.params.get("config")
            load(None if config and config.endswith(".yaml") else config, context.params.get("overrides") or ())


@every_page
def test_make_targets_modules_and_extras_exist(page):
    text = page.read_text()
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?:^|`)make ([\w-]+)", text, re.MULTILINE)) <= targets
    extras = re.search(r"^\[project.optional-dependencies\]\n(.*?)^\[", (ROOT / "pyproject.toml").read_text(), re.DOTALL | re.MULTILINE)[1]
    assert set(re.findall(r'pip install "\.\[(\w+)\]"', text)) <= set(re.findall(r"^(\w+) = ", extras, re.MULTILINE))
    for module in re.findall(r"python -m ((?:benchmarks|pix2rep)[\w.]*)(?![\w.<])", text):
        path = ROOT / module.replace(".", "/")
        assert path.is_dir() or path.with_suffix(".py").exists(), module


@every_page
def test_links_and_paths_exist(page):
    text = PIECE.sub("", page.read_text())
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(#[^)\s]*)?\)", text):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        file = (page.parent / target).resolve() if target else page
        assert file.exists(), f"{page.name}: {target}"
        inside = ROOT / "docs" in file.parents or page.parent == ROOT
        assert inside, f"{page.name}: {target} is outside docs/, where the built pages cannot follow"
        if anchor:
            titles = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
            known = {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}
            assert anchor[1:] in known, f"{page.name}: {target}{anchor}"
    for path in re.findall(r"`((?:csrc|pix2rep_kernels|python|benchmarks|tests|docs)/[\w./-]+)`", text):
        assert (ROOT / path).exists(), f"{page.name}: {path}"


@every_page
def test_options_and_presets_exist(page):
    sections = "|".join(vars(Config()))
    known = flatten(Config())
    for key in re.findall(rf"`((?:{sections})\.(?!json)\w+)", page.read_text()):
        assert key in known, f"{page.name}: {key}"
    presets = {path.stem for path in PRESETS.glob("*.yaml")}
    assert set(re.findall(r"--config (\w+)(?![\w./])", page.read_text())) <= presets


def test_every_page_is_in_the_navigation():
    class Loader(yaml.SafeLoader):
        pass

    Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda *_: None)
    listed = re.findall(r"[\w/-]+\.md", yaml.dump(yaml.load((ROOT / "mkdocs.yml").read_text(), Loader)["nav"]))
    assert sorted(listed) == sorted(str(page.relative_to(ROOT / "docs")) for page in PAGES[1:])


@pytest.mark.parametrize("op", dispatch.OPS)
def test_every_op_has_a_page_with_its_equations(op):
    text = (ROOT / f"docs/ops/{op}.md").read_text()
    hub = importlib.import_module(f"pix2rep_kernels.ops.{op}").__doc__
    equations = [line.strip() for line in hub.splitlines() if re.search(rf"\({op}\.\d+\)\s*$", line)]
    assert equations and not [line for line in equations if line not in text]
    for name in inspect.signature(getattr(pix2rep_kernels, op)).parameters:
        assert f"`{name}`" in text, f"docs/ops/{op}.md does not explain `{name}`"


@pytest.mark.parametrize("loss", [name for name in pix2rep_kernels.__all__ if name.endswith("Loss")])
def test_every_loss_has_a_page_with_its_arguments(loss):
    home = inspect.getmodule(getattr(pix2rep_kernels, loss)).__name__.rpartition(".")[2]
    text = (ROOT / f"docs/methods/{home}.md").read_text()
    for name in (*inspect.signature(getattr(pix2rep_kernels, loss)).parameters, loss):
        assert name in text, f"docs/methods/{home}.md does not explain {name}"


def signature(name, value):
    """`name(arguments)` without annotations."""
    shown = inspect.signature(value)
    plain = [p.replace(annotation=inspect.Parameter.empty) for p in shown.parameters.values()]
    return name + str(shown.replace(parameters=plain, return_annotation=inspect.Signature.empty))


def test_api_lists_every_public_name_as_it_is():
    text = (ROOT / "docs/api.md").read_text()
    ours = [name for name, value in vars(distributed).items() if inspect.isfunction(value) and value.__module__ == distributed.__name__ and name[0] != "_"]
    wanted = [signature(name, getattr(pix2rep_kernels, name)) for name in pix2rep_kernels.__all__]
    wanted += [signature(f"distributed.{name}", getattr(distributed, name)) for name in ours]
    assert [line for line in wanted if line not in text] == []
    headings = set(re.findall(r"^### `([\w.]+)`", text, re.MULTILINE))
    assert headings == {*pix2rep_kernels.__all__, *(f"distributed.{name}" for name in ours)}


def test_quoted_messages_are_in_the_source():
    """A message's fixed parts, between ellipses, as the source spells them (a string may be broken over lines there)."""
    source = "".join(path.read_text() for folder in ("pix2rep_kernels", "python/pix2rep") for path in (ROOT / folder).rglob("*.py"))
    source = re.sub(r'"\s*\n\s*f?"', "", source + (ROOT / "setup.py").read_text()).replace('\\"', '"')
    quoted = [piece["text"] for piece in pieces(ROOT / "docs/guides/troubleshooting.md") if piece["kind"] == "text"]
    assert len(quoted) > 8
    parts = [part.strip() for line in "".join(quoted).splitlines() for part in line.split("…")]
    assert [part for part in parts if part not in source] == []
