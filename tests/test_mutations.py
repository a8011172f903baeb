"""The list of tools/mutate.py, which `make mutate` alone runs: what it breaks is still there."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(str(ROOT / "tools"))
    from mutate import Builder
    from mutations import MUTATIONS, Mutation
sys.modules.pop("mutate")
sys.modules.pop("mutations")

EVERY = pytest.mark.parametrize("mutation", MUTATIONS, ids=[m.promise for m in MUTATIONS])


@EVERY
def test_what_it_breaks_is_there(mutation: Mutation) -> None:
    text = (ROOT / "csrc" / mutation.file).read_text(encoding="utf-8")
    assert text.count(mutation.old) == mutation.times
    assert mutation.new != mutation.old


@EVERY
def test_it_names_tests(mutation: Mutation) -> None:
    texts = [(ROOT / path).read_text(encoding="utf-8") for path in mutation.tests]
    names = " ".join(re.findall(r"def (test_\w+)", "".join(texts)))
    for word in mutation.select.split(" or "):
        assert word in names, f"no test has {word!r} in its name"


def test_no_mutation_twice() -> None:
    assert len({m.promise for m in MUTATIONS}) == len(MUTATIONS)


def test_the_copy_has_all_that_is_built(tmp_path: Path) -> None:
    builder = Builder(tmp_path)
    named = re.findall(r"\w+/\w+\.cpp", (ROOT / "CMakeLists.txt").read_text(encoding="utf-8"))
    assert named
    assert all((builder.tree / name).is_file() for name in named)
