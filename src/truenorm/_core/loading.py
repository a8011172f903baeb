"""Loading the native library's file: what is wrong with it, in a sentence with the remedy."""

from __future__ import annotations

import ctypes
import platform
import struct
import sys
from pathlib import Path

import torch

OLDEST_TORCH = (2, 11)
# what a file of Linux's says of the processor that it is for
_PROCESSORS = {62: "x86_64", 183: "aarch64"}
_AGAIN = "install truenorm again"


def _torch_is_new_enough() -> bool:
    return tuple(int(part) for part in str(torch.__version__).split(".")[:2]) >= OLDEST_TORCH


def _fault(path: Path) -> str:
    """What is wrong with a file of Linux's, whose loader ends the process at one that was cut."""
    size = path.stat().st_size
    with path.open("rb") as file:
        header = file.read(64)
    if header[:4] != b"\x7fELF":
        return f"is no library for Linux: {_AGAIN}, from a wheel for this platform"
    if len(header) == 64:
        processor = _PROCESSORS.get(struct.unpack_from("<H", header, 18)[0], "another processor")
        if processor != platform.machine():
            return (
                f"is for {processor}, and this is {platform.machine()}: "
                f"{_AGAIN}, from a wheel for this platform"
            )
        (sections,) = struct.unpack_from("<Q", header, 40)
        each, count = struct.unpack_from("<HH", header, 58)
        if sections + each * count <= size:
            return ""
    return f"is cut off after {size:,} bytes: {_AGAIN}, as after a download that broke off"


def _remedy(words: str) -> str:
    """What helps against what the system's loader says."""
    if "version `" in words and "not found" in words:
        return (
            "the library was built for a newer system than this: install a wheel, which asks for "
            "glibc 2.28 or newer, or install from source"
        )
    if "undefined symbol" in words:
        return f"it was built for another torch than {torch.__version__}: {_AGAIN}"
    return f"{_AGAIN}, from a wheel for this platform or from source"


def load(path: Path) -> ctypes.CDLL:
    """The library, its operators registered with torch; OSError in one sentence if it is not."""
    if not _torch_is_new_enough():
        oldest = ".".join(map(str, OLDEST_TORCH))
        raise OSError(
            f"it needs torch {oldest} or newer, and this is {torch.__version__}: "
            f"pip install 'torch>={oldest}'"
        )
    if not path.is_file():
        raise OSError(f"{path} does not exist: {_AGAIN}")
    fault = _fault(path) if sys.platform == "linux" else ""
    if fault:
        raise OSError(f"{path} {fault}")
    try:
        torch.ops.load_library(str(path))
        library = ctypes.CDLL(str(path))
    except OSError as error:
        words = str(error.__cause__ or error)
        raise OSError(f"{words}: {_remedy(words)}") from error
    if not hasattr(library, "truenorm_instruction_set"):
        raise OSError(f"{path} is not truenorm's native library: name another, or {_AGAIN}")
    return library
