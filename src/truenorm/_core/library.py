"""Finding and loading the native library, and saying which path serves which device."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

from . import imports, pool

BACKENDS = ("auto", "native", "plain")


@dataclass(frozen=True)
class Native:
    """The loaded native library."""

    path: Path
    instruction_set: str


def _find() -> Path | None:
    named = os.environ.get("TRUENORM_LIBRARY")
    if named:
        return Path(named)
    spec = importlib.util.find_spec("truenorm._native")
    return Path(spec.origin) if spec is not None and spec.origin else None


def _load() -> tuple[Native | None, str]:
    """The library, or None and the reason why not."""
    backend = os.environ.get("TRUENORM_BACKEND", "auto")
    if backend not in BACKENDS:
        raise ImportError(
            f"TRUENORM_BACKEND (={backend!r}) is unknown: set it to one of {', '.join(BACKENDS)}"
        )
    cap_mib = pool.cap_mib()
    if backend == "plain":
        return None, "TRUENORM_BACKEND=plain"
    path = _find()
    try:
        if path is None:
            raise OSError(
                "this installation has no native library: install a wheel for this platform, "
                "or install from source with a C++20 compiler (g++ or clang++) on PATH"
            )
        torch.ops.load_library(str(path))
        library = ctypes.CDLL(str(path))
        library.truenorm_instruction_set.restype = ctypes.c_char_p
        name = library.truenorm_instruction_set()
        if name is None:
            raise OSError(
                f"TRUENORM_ISA (={os.environ.get('TRUENORM_ISA')!r}) is not an instruction set "
                "of this machine and library: unset it, or set it to baseline, avx2 or avx512"
            )
        pool.attach(library, cap_mib)
        return Native(path, name.decode()), ""
    except OSError as error:
        # a backend that was asked for by name must load or raise
        if backend == "native" or os.environ.get("TRUENORM_ISA"):
            raise ImportError(f"truenorm's native library did not load: {error}") from error
        reason = str(error)
    warnings.warn(
        f"truenorm runs on plain PyTorch ops, correct but slower: {reason}",
        RuntimeWarning,
        stacklevel=2,
    )
    return None, reason


NATIVE, WHY_NOT = _load()


@dataclass(frozen=True)
class Info:
    """What truenorm runs on; print it, or read its fields.

    version: truenorm's.
    torch_version: the installed PyTorch's.
    cpu: "native" or "plain".
    instruction_set: of the native kernels on this machine, or None.
    library: path of the native library, or None.
    why_plain: why CPU tensors are served by plain PyTorch ops, or "".
    pool: the recycled memory of large results, or None without the native library.
    cuda: "triton" or "plain".
    cuda_words: what serves CUDA tensors, and why where that is plain PyTorch ops.
    other_devices: what serves tensors of every other device.
    strangers: libraries that take truenorm's layers for none that they know, and why.
    """

    version: str
    torch_version: str
    cpu: str
    instruction_set: str | None
    library: str | None
    why_plain: str
    pool: pool.Pool | None = None
    cuda: str = "plain"
    cuda_words: str = "plain PyTorch ops"
    other_devices: str = "plain"
    strangers: tuple[str, ...] = ()

    def __str__(self) -> str:
        if self.cpu == "native":
            cpu = f"native kernels ({self.instruction_set})"
        else:
            cpu = f"plain PyTorch ops ({self.why_plain})"
        return (
            f"truenorm {self.version}, torch {self.torch_version}\n"
            f"cpu: {cpu}\n"
            f"pool: {self.pool or 'none'}\n"
            f"cuda: {self.cuda_words}\n"
            "mps, xpu and other devices: plain PyTorch ops\n"
            f"library: {self.library or 'none'}"
            + "".join(f"\nnot made known to {each}" for each in self.strangers)
        )


def info() -> Info:
    """Which path, native kernels or plain PyTorch ops, serves which device."""
    from .. import __version__, _triton

    imports.retry()
    cuda, cuda_words = _triton.describe()
    return Info(
        version=__version__,
        torch_version=str(torch.__version__),
        cpu="native" if NATIVE else "plain",
        instruction_set=NATIVE.instruction_set if NATIVE else None,
        library=str(NATIVE.path) if NATIVE else None,
        why_plain=WHY_NOT,
        pool=pool.statistics(),
        cuda=cuda,
        cuda_words=cuda_words,
        strangers=tuple(f"{name}: {why}" for name, why in imports.FAILED.items()),
    )
