"""Runs a part of the suite on an emulated aarch64, with torch's own wheel for it.

    python tools/emulate.py [arguments of pytest]

The wheel of truenorm is the one in dist/. qemu-user runs Debian's Python from a folder, and pip
puts torch and what it needs (4 GB) into another; both stay in build/cross/aarch64. What cannot be
had it says, and that is no failure.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from cross import PLATFORMS, ROOT, TORCH, CannotBeHad

FOLDER = ROOT / "build" / "cross" / "aarch64"
DEBIAN, SITE, PACKAGE = FOLDER / "root", FOLDER / "site", FOLDER / "package"
# those that start no process of their own: that would be one of this machine's
TESTS = ("kernels", "batch", "instance", "group", "layer", "local_response", "errors", "pool")


def quietly(*command: str | Path) -> bool:
    with (FOLDER / "log").open("a") as log:
        return subprocess.run([*map(str, command)], stdout=log, stderr=log).returncode == 0


def needed(program: str, package: str) -> None:
    if shutil.which(program) is None:
        raise CannotBeHad(f"there is no {program}: apt install {package}")


def python() -> Path:
    """Debian's, unpacked and not installed: nothing of it is run before it is emulated."""
    executable = DEBIAN / "usr/bin/python3.11"
    if not executable.is_file():
        needed("debootstrap", "debootstrap")
        options = ("--foreign", "--arch=arm64", "--variant=minbase")
        packages = "--include=python3,libstdc++6,libgomp1"
        if not quietly("debootstrap", *options, packages, "bookworm", DEBIAN):
            raise CannotBeHad("debootstrap cannot make a folder of Debian's for arm64 (as root)")
        for package in (DEBIAN / "var/cache/apt/archives").glob("*.deb"):
            quietly("dpkg-deb", "-x", package, DEBIAN)
    return executable


def installed(to: Path, *what: str) -> bool:
    tags = ["manylinux2014_aarch64", *(f"manylinux_2_{minor}_aarch64" for minor in range(17, 36))]
    platforms = [word for tag in tags for word in ("--platform", tag)]
    python = ("--python-version", "3.11", "--only-binary=:all:", *platforms)
    return quietly(sys.executable, "-m", "pip", "install", "-q", "--target", to, *python, *what)


def emulated(arguments: list[str]) -> int:
    needed("qemu-aarch64", "qemu-user")
    wheels = [*(ROOT / "dist").glob("truenorm-*aarch64.whl")]
    if not wheels:
        raise CannotBeHad("there is no wheel in dist/: make wheel-aarch64")
    FOLDER.mkdir(parents=True, exist_ok=True)
    command = ["qemu-aarch64", "-L", str(DEBIAN), str(python())]
    if not (SITE / "torch").is_dir() and not installed(SITE, f"torch=={TORCH}", "numpy", "pytest"):
        raise CannotBeHad(f"pip finds no torch {TORCH} for {PLATFORMS['aarch64'].wheel}")
    shutil.rmtree(PACKAGE, ignore_errors=True)
    installed(PACKAGE, "--no-deps", str(wheels[0]))
    tests = arguments or ["-x", *(f"tests/test_{name}.py" for name in TESTS)]
    path = f"{PACKAGE}:{SITE}"
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONNOUSERSITE": "1"}
    command += ["-m", "pytest", "-p", "no:cacheprovider", *tests]
    return subprocess.run(command, cwd=ROOT, env=environment).returncode


if __name__ == "__main__":
    try:
        sys.exit(emulated(sys.argv[1:]))
    except CannotBeHad as missing:
        print(f"not tried, since {missing}")
