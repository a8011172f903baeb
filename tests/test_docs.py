"""Every Python block of the README and of docs/ runs as it stands, on its own."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("README*.md"), *(ROOT / "docs").rglob("*.md")])
_BLOCK = re.compile(r"^```python[^\n]*\n(.*?)^```[ \t]*$", re.MULTILINE | re.DOTALL)


def blocks(page: Path) -> list[tuple[int, str]]:
    """(line of the first statement, code) of each block."""
    text = page.read_text(encoding="utf-8")
    return [(text.count("\n", 0, m.start(1)) + 1, m.group(1)) for m in _BLOCK.finditer(text)]


BLOCKS = [
    pytest.param(page, line, code, id=f"{page.relative_to(ROOT)}:{line}")
    for page in PAGES
    for line, code in blocks(page)
]


# torch's exporters use a deprecated part of torch's own
@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec:FutureWarning")
@pytest.mark.parametrize(("page", "line", "code"), BLOCKS)
def test_block_runs(
    page: Path, line: int, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    # a failure's traceback points into the page
    compiled = compile("\n" * (line - 1) + code, str(page), "exec")
    exec(compiled, {"__name__": "__main__"})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_no_fence_is_missed(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert text.count("```python") == len(blocks(page))
    assert text.count("```") % 2 == 0


def test_where_torch_differs_has_blocks() -> None:
    page = ROOT / "docs" / "where-torch-differs.md"
    code = [code for _, code in blocks(page)]
    assert len(code) >= 10
    # each shows truenorm right, and does not claim that a later torch is still wrong
    assert all("assert" in c and "print(" in c for c in code)
