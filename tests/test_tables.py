"""Documents say what the results files say: every marked table is rendered again and compared."""

import json
import re

import pytest

from benchmarks import tables
from benchmarks.harness import ROOT

DOCUMENTS = [path for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))) if path.exists()]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_tables_are_those_of_the_results(path):
    text = path.read_text()
    assert tables.render(text) == text, f"python -m benchmarks.tables {path.relative_to(ROOT)}"


def section():
    text = (ROOT / "README.md").read_text()
    return text[text.index("## Speed and memory") :].partition("\n## ")[0]


def test_the_speed_section_has_no_number_of_its_own():
    prose = tables.MARKED.sub("", section())
    assert tables.MARKED.search(section())
    assert not re.search(r"\d+(\.\d+)? ?(ms|s|MiB|GiB|GB|x|%|times)\b", prose), prose
    assert "|" not in prose


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_figures_exist(path):
    for name in re.findall(r"!\[[^\]]*\]\(([^)#]+)\)", path.read_text()):
        assert name.startswith("http") or (path.parent / name).exists(), f"{path.name}: {name}"


def test_a_number_that_drifts_is_seen(tmp_path):
    row = {"op": "infonce", "case": "joint N=9 D=4", "negatives": "joint", "N": 9, "D": 4, "run": 0, "errors": {"value": 0.0}, "eager_errors": {"value": 0.0}}
    timed = {"both": {"median_s": 0.25}, "extra_MiB": 3.0, "percent_of_floor": {"both": 40.0}}
    rows = [row | timed | {"who": "ours", "backend": "cpu"}, row | timed | {"who": "lightly", "both": {"median_s": 1.0}}]
    rows.append(row | {"who": "eager", "skipped": "would need 64.0 GiB", "needs_bytes": 64 * 2**30})
    facts = {"device": "d", "threads": 2, "versions": {"torch": "2"}, "commit": "c"}
    path = tmp_path / "cpu/infonce.json"
    path.parent.mkdir()
    path.write_text(json.dumps({"runs": [facts], "rows": rows, "growth": []}))
    text = "before\n<!-- results: infonce cpu -->\n<!-- end -->\nafter <!-- results: ops gpu -->\n<!-- end -->\n"
    once = tables.render(text, tmp_path)
    assert "| joint, 9 x 4 | 2 | 250 ms |  | 1.00 s (lightly) | 4.0 | 3 MiB | needs 64 GiB |" in once and "Not measured yet." in once
    assert once.startswith("before\n") and "after" in once and tables.render(once, tmp_path) == once
    assert tables.render(once.replace("250 ms", "240 ms"), tmp_path) == once
    with pytest.raises(KeyError):
        tables.render("<!-- results: nonsense cpu -->\n<!-- end -->", tmp_path)
