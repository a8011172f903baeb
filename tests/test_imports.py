"""What an import of truenorm brings along, its order, and how it waits for other libraries."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

import truenorm
from truenorm._core import imports

# each takes longer to import than all of truenorm, or belongs to somebody else
HEAVY = {
    "captum", "fvcore", "jinja2", "matplotlib", "mpmath", "numpy.random", "onnx", "onnxscript",
    "opacus", "PIL", "plotly", "rich", "scipy", "sklearn", "sympy", "thop", "torch._dynamo",
    "torch._export", "torch._inductor", "torch.ao", "torch.distributed.fsdp",
    "torch.distributed.tensor", "torch.fx.experimental.symbolic_shapes", "torch.onnx._internal",
    "torch.testing", "torchvision", "tqdm", "transformers", "triton",
}  # fmt: skip
PROGRAMS = {
    "import": "import truenorm",
    "help": "from truenorm._tools.cli import main; assert main(['--help']) == 0",
    "info": "from truenorm._tools.cli import main; assert main(['info']) == 0",
    "a layer": (
        "import truenorm; x = torch.randn(4, 6, 5, requires_grad=True);"
        "truenorm.BatchNorm1d(6)(x).sum().backward(); truenorm.LayerNorm(5)(x).sum().backward()"
    ),
}


SOURCE = Path(truenorm.__file__).parent
# their members are looked at one by one; every other package as a whole
OPEN = ("truenorm", "truenorm._core", "truenorm._models", "truenorm._tools")


def imported(program: str) -> set[str]:
    """Modules that a program imports on top of torch, in a process of its own."""
    code = (
        f"import sys, torch\nbefore = set(sys.modules)\n{program}\n"
        "print(*['MODULES', *(set(sys.modules) - before)])"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True
    )
    return set(done.stdout.splitlines()[-1].split()[1:])


@pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS)
def test_nothing_heavy_is_imported(program: str) -> None:
    found = imported(program)
    assert "truenorm.nn" in found
    heavy = {m for m in found if any(f"{m}.".startswith(f"{name}.") for name in HEAVY)}
    assert not heavy
    # torch's own among them: what a layer needs is there already
    assert len({m for m in found if m.split(".")[0] != "truenorm"}) < 20


def edges(folder: Path) -> dict[str, set[str]]:
    """What each module of the package in `folder` imports of it, within functions too.

    Not counted: what only a type checker reads; the packages above a module, which come with it;
    and the version, which stands before all imports.
    """
    files = {
        ".".join(path.relative_to(folder.parent).with_suffix("").parts): path
        for path in sorted(folder.rglob("*.py"))
    }
    files = {name.removesuffix(".__init__"): path for name, path in files.items()}
    found: dict[str, set[str]] = {}
    for name, path in files.items():
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        found[name] = set()
        for node in read_at_run_time(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found[name] |= {each.name for each in node.names}
            elif isinstance(node, ast.ImportFrom):
                up = "." * node.level + (node.module or "")
                source = importlib.util.resolve_name(up, package)
                for each in node.names:
                    if each.name != "__version__":
                        whole = f"{source}.{each.name}"
                        found[name].add(whole if whole in files else source)
        found[name] = (found[name] & files.keys()) - {name}
    return found


def read_at_run_time(tree: ast.AST) -> Iterator[ast.AST]:
    """Every node but those below `if TYPE_CHECKING`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            continue
        yield node
        yield from read_at_run_time(node)


def circles(imports: dict[str, set[str]]) -> list[tuple[str, ...]]:
    """Names that import each other, directly or by way of others."""

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        waiting = [start]
        while waiting:
            new = imports[waiting.pop()] - seen
            seen |= new
            waiting.extend(new)
        return seen

    after = {name: reached(name) for name in imports}
    mutual = {name: {m for m in after[name] if name in after[m]} for name in imports}
    return sorted({tuple(sorted(names)) for names in mutual.values() if names})


def of_packages(imports: dict[str, set[str]], open_: tuple[str, ...]) -> dict[str, set[str]]:
    """The same between packages: a module belongs to the one that lies right in an open one."""

    def whole(name: str) -> str:
        while name not in open_ and name.rpartition(".")[0] not in open_:
            name = name.rpartition(".")[0]
        return name

    found: dict[str, set[str]] = {whole(name): set() for name in imports}
    for name, others in imports.items():
        found[whole(name)] |= {whole(other) for other in others} - {whole(name)}
    return found


def test_no_circle_of_imports() -> None:
    found = edges(SOURCE)
    assert {"truenorm._triton", "truenorm._core.pool"} <= found[
        "truenorm._core.library"
    ]  # lazy ones too
    assert circles(of_packages(found, OPEN)) == []
    assert circles(found) == []


LAZY, TYPES = "def f():\n    ", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    "


@pytest.mark.parametrize(
    ("files", "of_modules", "whole"),
    [
        ({"a": "from . import b", "b": LAZY + "from .a import x"}, ["a", "b"], ["a", "b"]),
        ({"a": "from . import b", "b": TYPES + "from .a import x"}, [], []),
        ({"a": "from .b import x", "b": "import p.c", "c": "from p import a"}, [*"abc"], [*"abc"]),
        ({"a": "from . import b, c", "b": "from . import c", "c": ""}, [], []),
        ({"a": "from . import b, __version__", "b": "from . import __version__"}, [], []),
        # no module imports the other, their packages do
        ({"a.x": "from ..b import y", "a.z": "", "b.y": "from ..a.z import z"}, [], ["a", "b"]),
        # within a package, one module the other
        ({"a.x": "from . import y", "a.y": LAZY + "from . import x"}, ["a.x", "a.y"], []),
    ],
)
def test_circles_are_found(
    files: dict[str, str], of_modules: list[str], whole: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "p"
    for name, text in files.items():
        path = folder / f"{name.replace('.', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        for package in {folder, path.parent}:
            (package / "__init__.py").touch()
        path.write_text(text)
    found = edges(folder)
    assert circles(found) == [tuple(f"p.{name}" for name in of_modules)] * bool(of_modules)
    packages = circles(of_packages(found, ("p",)))
    assert packages == [tuple(f"p.{name}" for name in whole)] * bool(whole)


@pytest.mark.parametrize("name", ["_model.swap\n_restored", "_fuse.classes\n_new"])
def test_what_old_pickles_name_is_found(name: str) -> None:
    pickled = f"ctruenorm.{name}\n.".encode()
    imported(f"import pickle; assert callable(pickle.loads({pickled!r}))")


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a package that can be imported, and has not been."""
    name = "somebody_elses"
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text("import warnings\nready = True\n")
    (tmp_path / name / "part.py").write_text("from somebody_elses import ready\n")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    yield name
    for each in [m for m in sys.modules if m.split(".")[0] == name]:
        del sys.modules[each]
    imports._WAITING.pop(name, None)
    imports.FAILED.pop("it", None)
    imports.DONE[:] = [each for each in imports.DONE if each not in ("it", "its part")]


def test_after_the_import(module: str) -> None:
    seen = []
    imports.after_import(module, "it", lambda m: seen.append(m.ready))
    imports.after_import(f"{module}.part", "its part", lambda m: seen.append(m.__name__))
    assert not seen
    found = importlib.util.find_spec(module)
    assert found is not None
    assert not seen
    importlib.import_module(f"{module}.part")
    assert seen == [True, f"{module}.part"]
    loader = sys.modules[module].__spec__.loader
    assert type(loader).__name__ == "SourceFileLoader"
    assert loader.get_source(module).startswith("import")
    importlib.reload(sys.modules[module])
    assert seen == [True, f"{module}.part"]


def test_where_it_was_imported_before(module: str) -> None:
    importlib.import_module(module)
    seen = []
    imports.after_import(module, "it", lambda m: seen.append(m.ready))
    assert seen == [True]


def test_in_the_middle_of_its_import(
    module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A library that imports truenorm before it is whole: done at the next import after it."""
    seen: list[bool] = []
    monkeypatch.setattr(imports, "_test", lambda m: seen.append(hasattr(m, "ready")), raising=False)
    (tmp_path / module / "__init__.py").write_text(
        "from truenorm._core import imports\n"
        f"imports.after_import({module!r}, 'it', imports._test)\n"
        "assert 'it' not in imports.DONE\n"
        "ready = True\n"
    )
    importlib.import_module(module)
    importlib.import_module(f"{module}.part")
    assert seen == [True]


def test_what_fails_is_said_and_breaks_no_import(module: str) -> None:
    def fails(module: object) -> None:
        raise AttributeError("moved away")

    imports.after_import(module, "it", fails)
    with pytest.warns(RuntimeWarning, match="could not be made known to it.*moved away"):
        importlib.import_module(module)
    assert imports.FAILED["it"] == "AttributeError: moved away"


def test_a_warning_taken_as_an_error_breaks_no_import(module: str) -> None:
    def fails(module: object) -> None:
        raise AttributeError("moved away")

    imports.after_import(module, "it", fails)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert importlib.import_module(module).ready
    assert "it" in imports.FAILED


def test_an_import_that_fails_is_its_own(module: str, tmp_path: Path) -> None:
    (tmp_path / module / "__init__.py").write_text("raise ImportError('not today')\n")
    seen: list[int] = []
    imports.after_import(module, "it", lambda m: seen.append(1))
    with pytest.raises(ImportError, match="not today"):
        importlib.import_module(module)
    assert not seen
    (tmp_path / module / "__init__.py").write_text("ready = 'later'\n")
    importlib.invalidate_caches()
    importlib.import_module(module)
    assert seen == [1]
