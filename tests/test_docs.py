"""The documentation: its Python blocks run and print what they show, and its site is built."""

from __future__ import annotations

import contextlib
import doctest
import importlib
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
from browser import browser, wait_for
from versions import older_than

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("README*.md"), *(ROOT / "docs").rglob("*.md")])
# a block of Python, and the block that shows what it prints, where one follows at once
_BLOCK = re.compile(
    r"^```python[^\n]*\n(.*?)^```[ \t]*$(?:\s*^```output\n(.*?)^```[ \t]*$)?",
    re.MULTILINE | re.DOTALL,
)
_BIAS = re.compile(r"(?<=affine=True), bias=True")
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
            # norms of torch 2.11 print no bias
            prints_bias = "bias" in repr(torch.nn.LayerNorm(2))
            shown = block.shown if prints_bias else _BIAS.sub("", block.shown)
            same = doctest.OutputChecker().check_output(shown, printed.getvalue(), _LOOSELY)
            assert same, f"{page}:{block.line} prints\n{printed.getvalue()}and shows\n{shown}"


READINGS = [
    pytest.param(page, reading, id=f"{page.relative_to(ROOT)}:{reading[0].line}")
    for page in PAGES
    for reading in readings(blocks(page.read_text(encoding="utf-8")))
]


# torch's exporters use a deprecated part of torch's own
@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec:FutureWarning")
# truenorm's checks of shapes; nobody is shown them (_standard.py), but here warnings are errors
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize(("page", "reading"), READINGS)
def test_blocks_run(
    page: Path, reading: list[Block], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if older_than(2, 12) and any("torchao" in block.code for block in reading):
        pytest.skip("torchao 0.18 folds no BatchNorm with torch 2.11, nor one of torch's")
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
def builder() -> Iterator[ModuleType]:
    """tools/site/build.py as a module."""
    pytest.importorskip("sphinx", reason="no sphinx: pip install '.[docs]'")
    pytest.importorskip("matplotlib", reason="no matplotlib: pip install '.[docs]'")
    names = {path.stem for path in (ROOT / "tools/site").glob("*.py")}
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "tools/site"))
        yield importlib.import_module("build")
    for name in names:
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def verified(builder: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small part of what `truenorm verify` measures: enough for every kind of table."""
    path: Path = tmp_path_factory.mktemp("verified") / "verified.json"
    path.write_text("what the last build left")
    builder.measure(path, "--layer", "GroupNorm", "--dtype", "float32")
    return path


def build(verified: Path, to: Path, docs: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "tools/site/build.py", "--verified", verified]
    command += ["--docs", docs, "--staged", to / "staged", "--out", to / "site"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def site(verified: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    to: Path = tmp_path_factory.mktemp("built")
    done = build(verified, to, ROOT / "docs")
    assert done.returncode == 0, done.stdout + done.stderr
    return to / "site"


def test_the_site_is_built(site: Path, verified: Path) -> None:
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
        assert not re.search(r"<script[^>]*mathjax", text, re.IGNORECASE), name
    kernel = (site / "formula-to-kernel.html").read_text(encoding="utf-8")
    assert re.search(r'<svg role="img"[^>]*><title>\\delta = [^<]*</title><path [^>]*d="M', kernel)
    # every page is in every page's menu
    changelog = (site / "changelog.html").read_text(encoding="utf-8")
    menu = changelog[changelog.index("sidebar-tree") : changelog.index("<article")]
    for name in made - {"index.html", "changelog.html", "search.html", "genindex.html"}:
        assert f'href="{name}"' in menu, name
    api = (site / "api/layers.html").read_text(encoding="utf-8")
    assert "process_group" in api
    assert "Ulyanov" in api


def test_in_a_browser(site: Path) -> None:
    names = ["index", "layers/sync-batch-norm", "api/layers", "measured", "zh/layers/index"]
    # what stands out on the right, but for what scrolls within a box of its own
    wider = """
        const scrolls = e => e.tagName != "ARTICLE" && (
            getComputedStyle(e).overflowX != "visible" || scrolls(e.parentElement));
        return [...document.querySelectorAll("article :is(p, li, img, svg, pre, table)")]
            .filter(e => e.getBoundingClientRect().right > screen.width)
            .filter(e => !scrolls(e.parentElement)).map(e => e.outerHTML.slice(0, 80));"""
    unseen = "return [...document.images].filter(i => !i.complete || !i.naturalWidth).length"
    with browser(390, 844, mobile=True) as driver:
        for name in names:
            driver.get((site / f"{name}.html").as_uri())
            assert driver.execute_script(wider) == [], name
            assert driver.execute_script(unseen) == 0, name
        # the search works from the disk, in both languages
        for words, found in (("momentum", "layers/batch-norm"), ("运行统计量", "zh/layers/")):
            driver.get((site / "search.html").as_uri() + f"?q={words}")
            wait_for(driver, f"document.querySelector('#search-results li a[href*=\"{found}\"]')")
        assert driver.get_log("browser") == []


def test_a_broken_link_is_an_error(verified: Path, tmp_path: Path) -> None:
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


def test_an_option_that_is_told_nowhere_is_an_error(
    builder: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(builder.api._OPTIONS, "statistics_frozen")
    with pytest.raises(LookupError, match=r"api\.py: say what statistics_frozen is for"):
        builder.api.pages()


def test_a_table_that_nobody_makes_is_an_error(builder: ModuleType) -> None:
    with pytest.raises(LookupError, match="no table 'sped'; there are speed, "):
        builder._page("<!-- made by the build: sped -->", 0)


def test_chinese_lines_are_joined_and_blocks_are_not(builder: ModuleType) -> None:
    code = "```python\nx = 1  # 一\n```\n"
    text = "均值和\n方差，\n`x`，以及\nE[x]：\n\n- 一，\n  [二](b.md)。\n- 三\n\n" + code
    joined = "均值和方差，`x`，以及\nE[x]：\n\n- 一，[二](b.md)。\n- 三\n\n" + code
    assert builder._page(text, 1) == joined


def slug(heading: str) -> str:
    """A heading's anchor, as GitHub and MyST make it."""
    plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
    return re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")


def lost_links(page: Path) -> list[str]:
    """The links of a page, read where it stands in the repository, that lead to nothing."""
    text = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    lost = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if path.startswith("https:") or {"api", "pictures"} & set(Path(path).parts):
            continue  # elsewhere; what the build makes, which Sphinx checks
        headings = re.findall(r"^#+ (.*)", target.read_text("utf-8"), re.M) if anchor else []
        if not target.exists() or (anchor and anchor not in map(slug, headings)):
            lost.append(link)
    return lost


REPOSITORY = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]


@pytest.mark.parametrize("page", REPOSITORY, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    assert lost_links(page) == []


def test_a_lost_link_is_noticed(tmp_path: Path) -> None:
    page = tmp_path / "a.md"
    page.write_text("# A `b`, c\n\n[x](a.md#a-b-c) [x](#gone) [x](b.md)\n![](no.png)\n", "utf-8")
    assert lost_links(page) == ["#gone", "b.md", "no.png"]


def test_tour_and_layers_are_there_in_both_languages() -> None:
    docs = ROOT / "docs"
    pages = [docs / "index.md", *sorted((docs / "layers").glob("*.md"))]
    assert {p.relative_to(docs / "zh") for p in (docs / "zh").rglob("*.md")} == {
        p.relative_to(docs) for p in pages
    }
    for page in pages:
        name = page.relative_to(docs)
        up = "../" * (len(name.parts) - 1)
        chinese = docs / "zh" / name
        assert f"[中文]({up}zh/{name})" in page.read_text("utf-8")
        assert f"[English](../{up}{name})" in chinese.read_text("utf-8")
        # the same code with the same output, but for comments; as many sections
        codes = [
            [(re.sub(r" *#.*", "", b.code), b.shown) for b in blocks(p.read_text("utf-8"))]
            for p in (page, chinese)
        ]
        assert codes[0] == codes[1], name
        sections = [len(re.findall(r"^#+ ", p.read_text("utf-8"), re.M)) for p in (page, chinese)]
        assert sections[0] == sections[1], name


@pytest.mark.parametrize("name", [p.stem for p in sorted((ROOT / "docs/layers").glob("*-*.md"))])
def test_a_layers_page_has_what_a_reader_looks_for(name: str) -> None:
    text = (ROOT / "docs/layers" / f"{name}.md").read_text("utf-8")
    assert re.findall(r"^## (.*)", text, re.M) == ["By hand", "When to use it", "Pitfalls"]
    assert re.search(r"^\$\$", text, re.M)
    assert "](../pictures/" in text


def test_urls_are_well_formed() -> None:
    for page in PAGES:
        for url in re.findall(r"https?://[^\s)>\"'`]+", page.read_text(encoding="utf-8")):
            assert re.fullmatch(r"https://[\w.-]+\.[a-z]{2,}(?:/[\w./#?=&%+,()-]*)?", url), url
