"""What the native library asks of a system; one that does not load: the words, and what serves."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import truenorm
from truenorm._core import library, loading

NATIVE = Path(truenorm.info().library or "")
only_linux = pytest.mark.skipif(sys.platform != "linux", reason="files of Linux's")
only_native = pytest.mark.skipif(
    truenorm.info().cpu != "native", reason="there is no native library to look at"
)
# what torch's own wheels ask for: manylinux_2_28
MOST = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 24), "CXXABI": (1, 3, 11)}
BY_HAND = {"TRUENORM_BACKEND", "TRUENORM_ISA", "TRUENORM_LIBRARY"}


@pytest.fixture
def nothing_named(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in BY_HAND:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def _cut(path: Path, size: int) -> Path:
    path.write_bytes(NATIVE.read_bytes()[:size])
    return path


def _for_another_processor(path: Path) -> Path:
    bytes_ = bytearray(NATIVE.read_bytes())
    bytes_[18:20] = (243).to_bytes(2, "little")  # RISC-V
    path.write_bytes(bytes_)
    return path


def _compiled(path: Path, *options: str, source: str) -> Path:
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("no C compiler")
    command = [compiler, "-shared", "-fPIC", "-x", "c", "-", "-o", str(path), *options]
    subprocess.run(command, input=source, text=True, check=True)
    return path


@only_linux
@only_native
@pytest.mark.skipif(shutil.which("objdump") is None, reason="no objdump")
def test_the_library_asks_for_nothing_that_torch_does_not() -> None:
    command = ["objdump", "-T", str(NATIVE)]
    symbols = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    needs = set(re.findall(r"\((GLIBC|GLIBCXX|CXXABI)_([\d.]+)\)", symbols))
    assert {name for name, _ in needs} == set(MOST)
    newer = [n for n in needs if tuple(map(int, n[1].split("."))) > MOST[n[0]]]
    assert newer == []


@only_linux
@only_native
@pytest.mark.parametrize("size", [0, 3, 20, 100, 5000, 0.5, 0.99, -1])
def test_a_library_that_was_cut_is_refused_before_it_is_loaded(
    size: float, tmp_path: Path, nothing_named: pytest.MonkeyPatch
) -> None:
    whole = NATIVE.stat().st_size
    broken = _cut(tmp_path / "cut.so", int(size * whole) if 0 < size < 1 else int(size) % whole)
    nothing_named.setattr(library, "_find", lambda: broken)
    with pytest.warns(
        RuntimeWarning, match=r"at torch's speed: .*cut.so is .*install truenorm again"
    ):
        native, why = library._load()
    assert native is None
    assert "cut off after" in why or size in (0, 3)
    assert why.count("\n") == 0


@only_linux
@only_native
def test_what_is_no_library_of_ours(tmp_path: Path, nothing_named: pytest.MonkeyPatch) -> None:
    text = tmp_path / "text.so"
    text.write_text("<html>not found</html>")
    cases = {
        text: r"text.so is no library for Linux: install truenorm again, from a wheel",
        tmp_path / "none.so": r"none.so does not exist: install truenorm again",
        _for_another_processor(tmp_path / "other.so"): r"is for another processor, and this is",
        _compiled(tmp_path / "else.so", source="int truth(void) { return 42; }"): (
            r"else.so is not truenorm's native library: name another"
        ),
        _compiled(
            tmp_path / "old.so",
            source="int aoti_gone(void); int truth(void) { return aoti_gone(); }",
        ): r"undefined symbol: aoti_gone: it was built for another torch than .*: install truenorm",
    }
    for path, words in cases.items():
        with pytest.raises(OSError, match=words):
            loading.load(path)


@pytest.mark.parametrize(
    ("loader", "remedy"),
    [
        (
            "/lib/x86_64-linux-gnu/libm.so.6: version `GLIBC_2.29' not found (required by x.so)",
            "was built for a newer system than this: install a wheel, which asks for glibc 2.28",
        ),
        ("dlopen(x.so, 0x0006): tried: 'x.so' (not a mach-o file)", "from a wheel for this plat"),
    ],
)
def test_what_the_systems_loader_says_has_a_remedy(
    loader: str, remedy: str, tmp_path: Path, nothing_named: pytest.MonkeyPatch
) -> None:
    def load_library(path: str) -> None:
        raise OSError(f"Could not load this library: {path}") from OSError(loader)

    there = tmp_path / "x.so"
    there.touch()
    nothing_named.setattr(loading, "_fault", lambda path: "")
    nothing_named.setattr(torch.ops, "load_library", load_library)
    with pytest.raises(OSError, match=re.escape(loader) + ".*" + re.escape(remedy)):
        loading.load(there)


@only_native
def test_a_torch_that_is_too_old(nothing_named: pytest.MonkeyPatch) -> None:
    nothing_named.setattr(library, "_find", lambda: NATIVE)
    nothing_named.setattr(loading.torch, "__version__", "2.10.1+cpu")
    with pytest.warns(RuntimeWarning, match=r"needs torch 2.11 or newer, and this is 2.10.1\+cpu"):
        native, why = library._load()
    assert native is None
    assert why.endswith("pip install 'torch>=2.11'")


@pytest.mark.parametrize("named", ["TRUENORM_LIBRARY", "TRUENORM_BACKEND", "TRUENORM_ISA"])
def test_what_is_asked_for_by_name_loads_or_raises(named: str, tmp_path: Path) -> None:
    value = {"TRUENORM_BACKEND": "native", "TRUENORM_ISA": "baseline"}
    environment = {k: v for k, v in os.environ.items() if k not in BY_HAND}
    if named == "TRUENORM_LIBRARY":
        environment[named] = str(tmp_path / "none.so")
        program = "import truenorm"
    else:
        environment[named] = value[named]
        program = (
            "import importlib.util as u; found = u.find_spec\n"
            "u.find_spec = lambda n, *a: None if n == 'truenorm._native' else found(n, *a)\n"
            "import truenorm"
        )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 1
    assert "ImportError: truenorm's native library did not load: " in done.stderr
    assert (
        "none.so does not exist" if named == "TRUENORM_LIBRARY" else "has no native"
    ) in done.stderr
