"""Build the site: docs/ and what is made for it go into build/docs, and Sphinx makes HTML of them.

    python tools/site/build.py [--verified FILE] [--out FOLDER]

The accuracy tables come from FILE, written by `truenorm verify --json FILE`; where none is named,
verify runs first.
"""

from __future__ import annotations

import argparse
import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import api
import pictures
import tables

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]

# the order of pages; one that is added to a folder with a * needs no line here
NAVIGATION = {
    "Layers": ["layers/index", "layers/*"],
    "How to": ["howto/index", "howto/*"],
    "Numbers": ["measured", "performance", "where-torch-differs", "scale", "platforms"],
    "Inside": ["formula-to-kernel", "architecture", "contributing", "changelog"],
    "Examples": ["examples/*"],
    "API": ["api/layers", "api/functions", "api/models"],
    "中文": ["zh/index", "zh/layers/index", "zh/layers/*"],
}
# pages that stand at the repository's root, where people look for them first
OUTSIDE = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
# Chinese needs no space where a line ends, and HTML would put one there
_CHINESE = "[\u3000-\u9fff\uff00-\uffef]"
_LINE_END = re.compile(
    rf"(?<={_CHINESE})\n *(?={_CHINESE})|(?<=[，。：；、）])\n *(?![-*#|!\n ]|```|\$\$)"
)
_TABLE = re.compile(r"<!-- made by the build: (.*?) -->")


def _navigation(docs: Path) -> str:
    parts = []
    for caption, patterns in NAVIGATION.items():
        pages = [pattern for pattern in patterns if any(docs.glob(f"{pattern}.md"))]
        if not pages:
            continue
        parts.append(f"\n```{{toctree}}\n:hidden:\n:caption: {caption}\n:glob:\n")
        parts += [*pages, "```"]
    return "\n".join(parts) + "\n"


def _page(text: str, depth: int) -> str:
    """A page of docs/ with its tables made, and the links out of docs/ led to their copies."""
    up = "../" * depth
    text = _TABLE.sub(lambda asked: tables.table(asked[1]), text)
    text = text.replace(f"](../{up}benchmarks/results/)", f"]({up}measured.md)")
    text = re.sub(rf"\]\(\.\./{re.escape(up)}examples/(\w+)\.py\)", rf"]({up}examples/\1.md)", text)
    for name, page in OUTSIDE.items():
        text = text.replace(f"](../{up}{name}", f"]({up}{page}")
    return _LINE_END.sub("", text)


def _example(source: Path) -> str:
    """A page that shows a script: its first docstring line is the title."""
    code = source.read_text(encoding="utf-8")
    summary = (ast.get_docstring(ast.parse(code)) or source.stem).splitlines()[0].rstrip(".")
    return f"# {summary}\n\n`examples/{source.name}`\n\n```python\n{code}```\n"


def stage(docs: Path, to: Path) -> None:
    """Everything that Sphinx reads, in one folder."""
    shutil.rmtree(to, ignore_errors=True)
    shutil.copytree(docs, to)
    for page in sorted(to.rglob("*.md")):
        depth = len(page.relative_to(to).parts) - 1
        page.write_text(_page(page.read_text(encoding="utf-8"), depth), encoding="utf-8")
    for name, page in OUTSIDE.items():
        text = (ROOT / name).read_text(encoding="utf-8").replace("](docs/", "](")
        (to / page).write_text(text, encoding="utf-8")
    for page, text in api.pages().items():
        (to / page).parent.mkdir(exist_ok=True)
        (to / page).write_text(text, encoding="utf-8")
    (to / "examples").mkdir()
    for script in sorted((ROOT / "examples").glob("*.py")):
        (to / "examples" / f"{script.stem}.md").write_text(_example(script), encoding="utf-8")
    shutil.copytree(ROOT / "benchmarks" / "results", to / "results")
    (to / "pictures").mkdir()
    for name, picture in pictures.make(ROOT / "build" / "pictures").items():
        shutil.copy(picture, to / "pictures" / name)
    with (to / "index.md").open("a", encoding="utf-8") as index:
        index.write(_navigation(to))


def measure(to: Path, *options: str) -> None:
    """Have `truenorm verify` write its numbers, over those of the last build."""
    command = [sys.executable, "-m", "truenorm", "verify", "--quick", *options]
    command += ["--json", str(to), "--force"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def main() -> int:
    parser = argparse.ArgumentParser(description="Build the documentation's site.")
    parser.add_argument("--verified", type=Path, help="what `truenorm verify --json` wrote")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="the pages' sources")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "site")
    parser.add_argument("--staged", type=Path, default=ROOT / "build" / "docs")
    args = parser.parse_args()
    if args.verified is None:
        args.verified = ROOT / "build" / "verified.json"
        print("Measuring the accuracy (half a minute) ...", flush=True)
        measure(args.verified)
    tables.verified = args.verified
    stage(args.docs, args.staged)
    # a link that leads nowhere, a page that stands in no list: each is a warning, and that an error
    sphinx = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-E", "-c", HERE]
    done = subprocess.run([*sphinx, "-b", "html", args.staged, args.out])
    if done.returncode == 0:
        print(args.out / "index.html")
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
