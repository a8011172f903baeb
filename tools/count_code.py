"""How much code there is between a layer and its kernels: lines, operators, functions.

    tools/count_code.py [CHECKOUT]

Read off the sources, without an import: of any checkout, whether what layers share is in `_ops`,
`_plain.py` and their like or in a package `_core`.
"""

from __future__ import annotations

import argparse
import ast
import re
from pathlib import Path

# what the way of a call is made of; a place that is not there counts for nothing
PLACES = {
    "_core": (
        "_core",
        "_ops",
        "_plain.py",
        "_padding.py",
        "_axes.py",
        "_standard.py",
        "_exchange.py",
    ),
    "nn": ("nn",),
    "functional.py": ("functional.py",),
    "csrc": ("../../csrc",),
}
SOURCES = {".py", ".cpp", ".h"}
# what stood elsewhere before there was a `_core`, and is no part of the way
BESIDE = {"checks", "library.py", "pool.py", "imports.py", "merging.py"}


def files_of(place: Path) -> list[Path]:
    found = place.rglob("*") if place.is_dir() else [place] if place.exists() else []
    return sorted(
        path
        for path in found
        if path.suffix in SOURCES and not BESIDE & set(path.relative_to(place.parent).parts)
    )


def lines_of(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def operators_of(texts: list[str]) -> set[str]:
    """Names in `torch.ops.truenorm`: those of schemas, in Python or in C++."""
    schema = re.compile(r"""["']([a-z]\w*)\(Tensor""")
    # a table of Python's: the name, and its schema after it
    row = re.compile(r"""["']([a-z]\w*)["']: \(?\s*f?["']\((?:Tensor|\{_)""")
    return {name for text in texts for each in (schema, row) for name in each.findall(text)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkout", nargs="?", type=Path, default=Path(__file__).parents[1])
    package = parser.parse_args().checkout / "src" / "truenorm"
    whole = 0
    for name, places in PLACES.items():
        lines = sum(lines_of(path) for place in places for path in files_of(package / place))
        print(f"{lines:6} lines of {name}")
        whole += lines
    print(f"{whole:6} together")
    texts = {p: p.read_text(encoding="utf-8") for p in files_of(package)}
    native = [p.read_text(encoding="utf-8") for p in files_of(package / "../../csrc")]
    print(f"{len(operators_of([*texts.values(), *native])):6} operators in torch.ops.truenorm")
    functions, both = 0, 0
    for text in texts.values():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ClassDef):
                functions += any(ast.unparse(base).endswith("Function") for base in node.bases)
            elif isinstance(node, ast.FunctionDef):
                args = node.args
                names = {a.arg for a in (*args.posonlyargs, *args.args, *args.kwonlyargs)}
                both += names >= {"weight", "bias"}
    print(f"{functions:6} subclasses of autograd.Function")
    print(f"{both:6} functions with both `weight` and `bias`")


if __name__ == "__main__":
    main()
