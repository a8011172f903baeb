"""The documentation: its Python blocks run and print what they show, and its site is built."""

from __future__ import annotations

import contextlib
import doctest
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("README*.md"), *(ROOT / "docs").rglob("*.md")])
# a block of Python, and the block that shows what it prints, where one follows at once
_BLOCK = re.compile(
    r"^```python[^\n]*\n(.*?)^```[ \t]*$(?:\s*^```output\n(.*?)^```[ \t]*$)?",
    re.MULTILINE | re.DOTALL,
)
_LOOSELY = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


class Block(NamedTuple):
    """The line of the first statement, the code, and what it prints ("": nobody says)."""

    line: int
    code: str
    shown: str


def blocks(text: str) -> list[Block]:
    return [
        Block(text.count("\n", 0, m.start(1)) + 1, m.group(1), m.group(2) or "")
        for m in _BLOCK.finditer(text)
    ]


def readings(found: list[Block]) -> list[list[Block]]:
    """Blocks that are read on after one another. One that begins with an import begins anew."""
    parts: list[list[Block]] = []
    for block in found:
        if not parts or block.code.startswith(("import ", "from ")):
            parts.append([])
        parts[-1].append(block)
    return parts


def run(page: str, reading: list[Block]) -> None:
    namespace = {"__name__": "__main__"}
    for block in reading:
        # a failure's traceback points into the page
        compiled = compile("\n" * (block.line - 1) + block.code, page, "exec")
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compiled, namespace)
        if block.shown:
            same = doctest.OutputChecker().check_output(block.shown, printed.getvalue(), _LOOSELY)
            assert same, f"{page}:{block.line} prints\n{printed.getvalue()}and shows\n{block.shown}"


READINGS = [
    pytest.param(page, reading, id=f"{page.relative_to(ROOT)}:{reading[0].line}")
    for page in PAGES
    for reading in readings(blocks(page.read_text(encoding="utf-8")))
]


@pytest.mark.parametrize(("page", "reading"), READINGS)
def test_blocks_run(
    page: Path, reading: list[Block], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run(str(page), reading)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_no_fence_is_missed(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert text.count("```python") == len(blocks(text))
    assert text.count("```output") == sum(bool(block.shown) for block in blocks(text))
    assert text.count("```") % 2 == 0


def test_a_wrong_block_is_noticed() -> None:
    page = "```python\nx = 2\n```\n\n```python\nprint(x + 1, 'and on')\n```\n\n```output\n{}\n```\n"
    (reading,) = readings(blocks(page.format("3 and ...")))
    run("a page", reading)
    with pytest.raises(AssertionError, match=r"a page:6 prints\s+3 and on\s+and shows\s+4"):
        run("a page", *readings(blocks(page.format("4"))))
    with pytest.raises(NameError, match="'x' is not defined"):
        run("a page", [reading[1]])


def test_where_torch_differs_has_blocks() -> None:
    page = ROOT / "docs" / "where-torch-differs.md"
    code = [block.code for block in blocks(page.read_text(encoding="utf-8"))]
    assert len(code) >= 10
    # each shows truenorm right, and does not claim that a later torch is still wrong
    assert all("assert" in c and "print(" in c for c in code)


# --- the site ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def verified(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small part of what `truenorm verify` measures: enough for every kind of table."""
    path = tmp_path_factory.mktemp("verified") / "verified.json"
    command = ["verify", "--quick", "--layer", "GroupNorm", "--dtype", "float32", "--json"]
    from truenorm.cli import main

    with contextlib.redirect_stdout(io.StringIO()):
        assert main([*command, str(path)]) == 0
    return path


def build(verified: Path, to: Path, docs: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "tools/site/build.py", "--verified", verified]
    command += ["--docs", docs, "--staged", to / "staged", "--out", to / "site"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def test_the_site_is_built(verified: Path, tmp_path: Path) -> None:
    pytest.importorskip("sphinx", reason="no sphinx: pip install '.[docs]'")
    pytest.importorskip("matplotlib", reason="no matplotlib: pip install '.[docs]'")
    done = build(verified, tmp_path, ROOT / "docs")
    assert done.returncode == 0, done.stdout + done.stderr
    site = tmp_path / "site"
    made = {str(path.relative_to(site)) for path in site.rglob("*.html")}
    sources = (ROOT / "docs").rglob("*.md")
    assert made >= {str(p.relative_to(ROOT / "docs").with_suffix(".html")) for p in sources}
    # the figures are those of the files they are made from
    measured = (site / "measured.html").read_text(encoding="utf-8")
    checks = json.loads(verified.read_text(encoding="utf-8"))["summary"]["checks"]
    assert f"{checks:,} checks" in measured
    assert "made by the build" not in measured
    newest = json.loads((ROOT / "benchmarks/results/cpu-2026-11-25.json").read_text("utf-8"))
    first = next(row for row in newest["families"] if row["family"].startswith("InstanceNorm"))
    assert f"{first['forward']:.3g} (" in measured
    # nothing is asked of another host, and nothing but the pages' own links leads to one
    for name in made:
        text = (site / name).read_text(encoding="utf-8")
        assert not re.search(r"(?:src|srcset)=\"(?:https?:)?//", text), name
        assert not re.search(r"<link[^>]*href=\"(?:https?:)?//", text), name
        assert "MathJax" not in text, name
    assert "<math" in (site / "formula-to-kernel.html").read_text(encoding="utf-8")
    api = (site / "api/layers.html").read_text(encoding="utf-8")
    assert "process_group" in api
    assert "Ulyanov" in api


def test_a_broken_link_is_an_error(verified: Path, tmp_path: Path) -> None:
    pytest.importorskip("sphinx", reason="no sphinx: pip install '.[docs]'")
    docs = tmp_path / "docs"
    docs.mkdir()
    broken = "[x](nowhere.md)\n\n[x](scale.md#gone)\n\n![](no.png)\n\n[x](scale.md#there)\n"
    (docs / "index.md").write_text(f"# A page\n\n{broken}", encoding="utf-8")
    (docs / "scale.md").write_text("# Scale\n\n## There\n", encoding="utf-8")
    done = build(verified, tmp_path, docs)
    assert done.returncode != 0
    warned = [line for line in done.stderr.splitlines() if "index.md" in line]
    assert len(warned) == 3
    for said in ("nowhere.md", "gone", "no.png"):
        assert any("WARNING" in line and said in line for line in warned), done.stderr


def test_urls_are_well_formed() -> None:
    for page in PAGES:
        for url in re.findall(r"https?://[^\s)>\"'`]+", page.read_text(encoding="utf-8")):
            assert re.fullmatch(r"https://[\w.-]+\.[a-z]{2,}(?:/[\w./#?=&%+,()-]*)?", url), url
