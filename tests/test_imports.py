"""What an import of truenorm brings along, and how it waits for other libraries' modules."""

from __future__ import annotations

import importlib
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from truenorm import _imports

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
    "help": "from truenorm.cli import main; assert main(['--help']) == 0",
    "info": "from truenorm.cli import main; assert main(['info']) == 0",
    "a layer": (
        "import truenorm; x = torch.randn(4, 6, 5, requires_grad=True);"
        "truenorm.BatchNorm1d(6)(x).sum().backward(); truenorm.LayerNorm(5)(x).sum().backward()"
    ),
}


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
    _imports._WAITING.pop(name, None)
    _imports.FAILED.pop("it", None)
    _imports.DONE[:] = [each for each in _imports.DONE if each not in ("it", "its part")]


def test_after_the_import(module: str) -> None:
    seen = []
    _imports.after_import(module, "it", lambda m: seen.append(m.ready))
    _imports.after_import(f"{module}.part", "its part", lambda m: seen.append(m.__name__))
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
    _imports.after_import(module, "it", lambda m: seen.append(m.ready))
    assert seen == [True]


def test_in_the_middle_of_its_import(
    module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A library that imports truenorm before it is whole: done at the next import after it."""
    seen: list[bool] = []
    monkeypatch.setattr(
        _imports, "_test", lambda m: seen.append(hasattr(m, "ready")), raising=False
    )
    (tmp_path / module / "__init__.py").write_text(
        "from truenorm import _imports\n"
        f"_imports.after_import({module!r}, 'it', _imports._test)\n"
        "assert 'it' not in _imports.DONE\n"
        "ready = True\n"
    )
    importlib.import_module(module)
    importlib.import_module(f"{module}.part")
    assert seen == [True]


def test_what_fails_is_said_and_breaks_no_import(module: str) -> None:
    def fails(module: object) -> None:
        raise AttributeError("moved away")

    _imports.after_import(module, "it", fails)
    with pytest.warns(RuntimeWarning, match="could not be made known to it.*moved away"):
        importlib.import_module(module)
    assert _imports.FAILED["it"] == "AttributeError: moved away"


def test_a_warning_taken_as_an_error_breaks_no_import(module: str) -> None:
    def fails(module: object) -> None:
        raise AttributeError("moved away")

    _imports.after_import(module, "it", fails)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert importlib.import_module(module).ready
    assert "it" in _imports.FAILED


def test_an_import_that_fails_is_its_own(module: str, tmp_path: Path) -> None:
    (tmp_path / module / "__init__.py").write_text("raise ImportError('not today')\n")
    seen: list[int] = []
    _imports.after_import(module, "it", lambda m: seen.append(1))
    with pytest.raises(ImportError, match="not today"):
        importlib.import_module(module)
    assert not seen
    (tmp_path / module / "__init__.py").write_text("ready = 'later'\n")
    importlib.invalidate_caches()
    importlib.import_module(module)
    assert seen == [1]
