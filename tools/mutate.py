"""Breaks the native kernels on purpose, one place at a time, and expects the tests to notice.

Each mutation of mutations.py replaces one piece of csrc/ in a copy of the tree, which is built and
tested; the exit status is 1 if any survives. While one is tested the next is built, with little
optimization and for the instruction sets that it needs. Run by `make mutate`; words after the
command pick the mutations whose description has one of them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from mutations import MUTATIONS, Mutation

import truenorm

ROOT = Path(__file__).resolve().parent.parent
BEST = truenorm.info().instruction_set
# the environment's own cmake and ninja first
PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
# the same bits as -O3 gives, since no operation is contracted, in half the compiler's time
FLAGS = "-O1 -DNDEBUG"


def run(*command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(c) for c in command],
        cwd=ROOT,
        env={**os.environ, "PATH": PATH, **environment},
        capture_output=True,
        text=True,
    )


def must(*command: str | Path) -> None:
    done = run(*command)
    if done.returncode:
        raise SystemExit(f"the build failed:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")


def runs_here(name: str) -> bool:
    return not run(sys.executable, "-c", "import truenorm", TRUENORM_ISA=name).returncode


class Builder:
    """A copy of the sources, and per choice of instruction sets a build of them as they are.

    These builds stay for the next run, which makes anew what changed since.
    """

    def __init__(self, folder: Path) -> None:
        self.tree, self.build = folder / "tree", folder / "build"
        self.folder, self.built = folder, 0
        self.current: set[Path] = set()
        shutil.rmtree(self.tree, ignore_errors=True)
        self.tree.mkdir(parents=True)
        for name in ("CMakeLists.txt", "build_backend", "csrc", "tools/kernel_digest.cpp"):
            source = ROOT / name
            copy = shutil.copytree if source.is_dir() else shutil.copy2
            (self.tree / name).parent.mkdir(exist_ok=True)
            copy(source, self.tree / name)

    def _start_from(self, sets: tuple[str, ...]) -> None:
        """The unbroken build, whose objects are newer than the sources."""
        shutil.rmtree(self.build, ignore_errors=True)
        whole = self.folder / "-".join(sets)
        if whole.exists():
            shutil.copytree(whole, self.build)
        if whole in self.current:
            return
        # broken code may well warn
        define = [f"-DPython_EXECUTABLE={sys.executable}", "-DTRUENORM_WERROR=OFF"]
        define += ["-DCMAKE_BUILD_TYPE=None", f"-DCMAKE_CXX_FLAGS={FLAGS}"]
        define += [f"-DTRUENORM_INSTRUCTION_SETS={';'.join(sets)}"]
        must("cmake", "-S", self.tree, "-B", self.build, "-G", "Ninja", *define)
        must("cmake", "--build", self.build)
        shutil.rmtree(whole, ignore_errors=True)
        shutil.copytree(self.build, whole)
        self.current.add(whole)

    def library(self, mutation: Mutation) -> Path:
        """A library of its own with the mutation in it."""
        self._start_from(mutation.sets or (BEST,))
        target = self.tree / "csrc" / mutation.file
        original, times = target.read_text(), os.stat(target)
        if original.count(mutation.old) != mutation.times:
            raise SystemExit(f"{mutation.file} no longer has {mutation.old!r}: update mutations.py")
        target.write_text(original.replace(mutation.old, mutation.new))
        try:
            must("cmake", "--build", self.build)
        finally:
            target.write_text(original)
            os.utime(target, ns=(times.st_atime_ns, times.st_mtime_ns))
        self.built += 1
        return shutil.copy(self.build / "_native.so", self.folder / f"{self.built}.so")


def noticed(mutation: Mutation, library: Path) -> tuple[bool, str]:
    """Whether a test failed, and the end of what pytest said."""
    name = (mutation.sets or (BEST,))[0]
    done = run(
        sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider",
        *mutation.tests, "-k", mutation.select,
        TRUENORM_LIBRARY=str(library), TRUENORM_ISA=name, OMP_NUM_THREADS="1",
    )  # fmt: skip
    library.unlink()
    return done.returncode == 1, done.stdout[-1500:]


def main() -> int:
    begun = time.monotonic()
    words = sys.argv[1:] or [""]
    chosen = [m for m in MUTATIONS if any(word in m.promise for word in words)]
    absent = {name for m in chosen for name in m.sets if not runs_here(name)}

    def judge(mutation: Mutation, library: Path) -> bool:
        was, said = noticed(mutation, library)
        end = "" if was else f"\n{said}"
        print(f"{'noticed ' if was else 'SURVIVED'}  {mutation.promise}{end}", flush=True)
        return was

    judged: list[Future[bool]] = []
    with ThreadPoolExecutor(os.cpu_count()) as testing:
        builder = Builder(ROOT / "build" / "mutate")
        for mutation in chosen:
            if absent & set(mutation.sets):
                print(f"left out  {mutation.promise}: not of this machine", flush=True)
                continue
            judged.append(testing.submit(judge, mutation, builder.library(mutation)))
        good = sum(future.result() for future in judged)
    minutes = (time.monotonic() - begun) / 60
    print(f"{good} of {len(judged)} mutations noticed, in {minutes:.0f} minutes")
    return 0 if good == len(judged) else 1


if __name__ == "__main__":
    sys.exit(main())
