"""Builds the native library for a platform that is not at hand.

    python tools/cross.py macos      # arm64: does csrc compile and link there?
    python tools/cross.py windows    # x64: the same
    python tools/cross.py aarch64    # a wheel for Linux, in build/cross/aarch64/wheel

What is compiled, by zig (from PyPI) or for aarch64 by g++'s cross form, is linked to the library of
torch's own wheel for the platform. Nothing is run, but for the kernels' digest on Windows where
wine is there. What cannot be had it says, and that is no failure.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TORCH = "2.11.0"  # the oldest that is promised
HEADERS = ("csrc/stable/", "csrc/inductor/aoti_torch/", "headeronly/")


@dataclass(frozen=True)
class Platform:
    """wheel: pip's name of it. built: the native library's."""

    compiler: str
    wheel: str
    torch_library: str
    system: str
    processor: str
    built: str = "_native.so"


PLATFORMS = {
    "macos": Platform(
        "zig c++ -target aarch64-macos",
        "macosx_11_0_arm64",
        "libtorch_cpu.dylib",
        "Darwin",
        "arm64",
    ),
    "windows": Platform(
        "zig c++ -target x86_64-windows-gnu",
        "win_amd64",
        "torch_cpu.lib",
        "Windows",
        "AMD64",
        "_native.pyd",
    ),
    # zig's would bring its own C++ library beside torch's, and no error would find its way out
    "aarch64": Platform(
        "aarch64-linux-gnu-g++", "manylinux_2_28_aarch64", "libtorch_cpu.so", "Linux", "aarch64"
    ),
}


class CannotBeHad(Exception):
    """What is missing, in words."""


def run(*command: str | Path, **environment: str) -> str:
    words = [*map(str, command)]
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, **environment})
    if done.returncode:
        sys.exit(f"{' '.join(words)}\n{done.stdout[-6000:]}{done.stderr[-6000:]}")
    return done.stdout.strip()


def torch_of(platform: Platform, folder: Path) -> Path:
    """The headers and the one library of torch's wheel."""
    torch = folder / "torch"
    if (torch / "lib" / platform.torch_library).is_file():
        return torch
    if not [*folder.glob("torch-*.whl")]:
        command = [
            *(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"),
            *("--only-binary=:all:", "--platform", platform.wheel, "--python-version", "3.11"),
            *("--dest", str(folder), f"torch=={TORCH}"),
        ]
        if subprocess.run(command, capture_output=True).returncode:
            raise CannotBeHad(f"pip finds no wheel of torch {TORCH} for {platform.wheel}")
    (wheel,) = folder.glob("torch-*.whl")
    headers = tuple(f"torch/include/torch/{part}" for part in HEADERS)
    library = f"torch/lib/{platform.torch_library}"
    with zipfile.ZipFile(wheel) as archive:
        wanted = [n for n in archive.namelist() if n.startswith(headers) or n == library]
        archive.extractall(folder, wanted)
    wheel.unlink()
    return torch


def compiler(platform: Platform, folder: Path) -> str:
    """What CMake calls."""
    program, *options = platform.compiler.split()
    if program != "zig":
        if shutil.which(program) is None:
            raise CannotBeHad(f"there is no {program}: apt install g++-aarch64-linux-gnu")
        return program
    if importlib.util.find_spec("ziglang") is None:
        raise CannotBeHad("there is no zig: pip install ziglang")
    script = folder / "c++"
    command = f'"{sys.executable}" -m ziglang {" ".join(options)}'
    script.write_text(f'#!/bin/sh\nexec {command} "$@"\n')
    script.chmod(0o755)
    return str(script)


def configured(name: str) -> tuple[Path, list[str]]:
    """The folder of a platform, and what CMake is told of it."""
    platform, folder = PLATFORMS[name], ROOT / "build" / "cross" / name
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "CMAKE_CXX_COMPILER": compiler(platform, folder),
        "CMAKE_SYSTEM_NAME": platform.system,
        "CMAKE_SYSTEM_PROCESSOR": platform.processor,
        "TORCH_DIR": torch_of(platform, folder),
        # which is of macOS, and changes what is installed; that is nothing here
        "CMAKE_INSTALL_NAME_TOOL": "true",
    }
    return folder, [f"-D{key}={value}" for key, value in settings.items()]


def check(name: str) -> str:
    """What was seen, in a sentence."""
    folder, settings = configured(name)
    cmake = shutil.which("cmake", path=str(Path(sys.executable).parent)) or "cmake"
    build = folder / "build"
    settings += [
        "-DCMAKE_BUILD_TYPE=Release",
        "-DTRUENORM_REQUIRE_NATIVE=ON",
        "-DTRUENORM_WERROR=ON",
    ]
    run(cmake, "-S", ROOT, "-B", build, "-G", "Ninja", *settings)
    run(cmake, "--build", build)
    library = (build / PLATFORMS[name].built).read_bytes()
    for exported in (b"truenorm_instruction_set", b"truenorm_pool_statistics"):
        if exported not in library:
            sys.exit(f"{name}: the library does not export {exported.decode()}")
    seen = f"compiled and linked to torch {TORCH}'s library ({len(library) / 1e6:.1f} MB)"
    if name == "windows" and shutil.which("wine"):
        run(cmake, "--build", build, "--target", "kernel_digest")
        return (
            f"{seen}; under wine the kernels' digest is {run('wine', build / 'kernel_digest.exe')}"
        )
    return f"{seen}; not run"


def wheel(name: str) -> str:
    """A wheel of a platform, and where it lies."""
    folder, settings = configured(name)
    platform, to = PLATFORMS[name], folder / "wheel"
    shutil.rmtree(to, ignore_errors=True)
    run(
        *(sys.executable, "-m", "pip", "wheel", "-qq", "--no-deps", "--no-build-isolation"),
        *("--wheel-dir", to, ROOT),
        CMAKE_ARGS=" ".join(settings),
        TRUENORM_REQUIRE_NATIVE="ON",
        # by which Python names the platform that it builds for
        _PYTHON_HOST_PLATFORM=f"{platform.system.lower()}-{platform.processor}",
    )
    (made,) = to.glob(f"*_{platform.processor}.whl")
    return f"made {made.relative_to(ROOT)}"


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1] not in PLATFORMS:
        sys.exit(__doc__)
    chosen = sys.argv[1]
    try:
        print(f"{chosen}: {wheel(chosen) if chosen == 'aarch64' else check(chosen)}")
    except CannotBeHad as missing:
        print(f"{chosen}: not tried, since {missing}")
