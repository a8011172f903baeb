"""Finding and loading the native library, and saying which path serves which device."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import platform
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

from . import imports, loading, pool

_X86_SETS = "baseline, avx2 or avx512"
BACKENDS = ("auto", "native", "torch", "plain")
# what serves without kernels, and what of truenorm's promises holds there
WITHOUT = {"torch": "torch's own operators", "plain": "the formula in float64, many times slower"}
OF_TORCH = (
    "torch's own operators: as fast as torch's layers, but for the smallest inputs; torch's "
    "rounding, not truenorm's bits (float32 on a CPU, by its own statistics and not compiled, "
    "within 3e-5 of the formula at any offset); running statistics stay wide; masks, and "
    "statistics over processes, by the formula in float64"
)


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
    if backend in ("torch", "plain"):
        return None, f"TRUENORM_BACKEND={backend}"
    path = _find()
    try:
        if path is None:
            raise OSError(
                "this installation has no native library: install a wheel for this platform, "
                "or install from source with a C++20 compiler (g++ or clang++) on PATH"
            )
        library = loading.load(path)
        library.truenorm_instruction_set.restype = ctypes.c_char_p
        name = library.truenorm_instruction_set()
        if name is None:
            raise OSError(
                f"TRUENORM_ISA (={os.environ.get('TRUENORM_ISA')!r}) is not an instruction set "
                "of this machine and library: unset it, or set it to "
                + ("neon" if platform.machine() in ("aarch64", "arm64") else _X86_SETS)
            )
        pool.attach(library, cap_mib)
        return Native(path, name.decode()), ""
    except OSError as error:
        # what was asked for by name must load or raise
        if backend == "native" or any(map(os.environ.get, ("TRUENORM_ISA", "TRUENORM_LIBRARY"))):
            raise ImportError(f"truenorm's native library did not load: {error}") from error
        reason = str(error)
    warnings.warn(
        f"truenorm runs on torch's own operators, at torch's speed: {reason}",
        RuntimeWarning,
        stacklevel=2,
    )
    return None, reason


NATIVE, WHY_NOT = _load()
# whether the formula in float64 was asked for by name, in the place of torch's own operators
FORMULA = os.environ.get("TRUENORM_BACKEND") == "plain"
# what serves where no kernel does
KERNELLESS = "plain" if FORMULA else "torch"


@dataclass(frozen=True)
class Info:
    """What truenorm runs on; print it, or read its fields.

    version: truenorm's.
    torch_version: the installed PyTorch's.
    cpu: "native"; else "torch", torch's own operators, or "plain", the formula in float64.
    instruction_set: of the native kernels on this machine, or None.
    library: path of the native library, or None.
    why_plain: why no kernels serve CPU tensors, or "".
    pool: the recycled memory of large results, or None without the native library.
    cuda: "triton", "torch" or "plain".
    cuda_words: what serves CUDA tensors, and why where that is no kernel.
    other_devices: what serves tensors of every other device, "torch" or "plain".
    without_kernels: what holds where torch's own operators serve a device of this machine, or "".
    strangers: libraries that take truenorm's layers for none that they know, and why.
    """

    version: str
    torch_version: str
    cpu: str
    instruction_set: str | None
    library: str | None
    why_plain: str
    pool: pool.Pool | None = None
    cuda: str = "torch"
    cuda_words: str = WITHOUT["torch"]
    other_devices: str = "torch"
    without_kernels: str = ""
    strangers: tuple[str, ...] = ()

    def __str__(self) -> str:
        if self.cpu == "native":
            cpu = f"native kernels ({self.instruction_set})"
        else:
            cpu = f"{WITHOUT[self.cpu]} ({self.why_plain})"
        return (
            f"truenorm {self.version}, torch {self.torch_version}\n"
            f"cpu: {cpu}\n"
            f"pool: {self.pool or 'none'}\n"
            f"cuda: {self.cuda_words}\n"
            f"mps, xpu and other devices: {WITHOUT[self.other_devices]}\n"
            f"library: {self.library or 'none'}"
            + (f"\n{self.without_kernels}" if self.without_kernels else "")
            + "".join(f"\nnot made known to {each}" for each in self.strangers)
        )


def _is_kernelless(cuda: str) -> bool:
    """Whether torch's own operators serve a device of this machine."""
    if FORMULA:
        return False
    if NATIVE is None:
        return True
    device = torch.accelerator.current_accelerator(check_available=True)
    return device is not None and (cuda != "triton" or device.type != "cuda")


def info() -> Info:
    """What serves which device: truenorm's kernels, torch's own operators or the formula."""
    from .. import __version__, _triton

    imports.retry()
    cuda, cuda_words = _triton.describe(WITHOUT)
    return Info(
        version=__version__,
        torch_version=str(torch.__version__),
        cpu="native" if NATIVE else KERNELLESS,
        instruction_set=NATIVE.instruction_set if NATIVE else None,
        library=str(NATIVE.path) if NATIVE else None,
        why_plain=WHY_NOT,
        pool=pool.statistics(),
        cuda=cuda,
        cuda_words=cuda_words,
        other_devices=KERNELLESS,
        without_kernels=OF_TORCH if _is_kernelless(cuda) else "",
        strangers=tuple(f"{name}: {why}" for name, why in imports.FAILED.items()),
    )
