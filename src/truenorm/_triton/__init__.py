"""Triton kernels for CUDA tensors: whether they can serve here, and their registration.

Triton and the kernels are imported at the first call on a CUDA tensor, not with truenorm.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

BACKENDS = ("auto", "triton", "torch", "plain")
# the oldest that the kernels are written for, and the oldest GPU that it compiles them for
OLDEST_TRITON, OLDEST_GPU = (3, 4), (8, 0)

Kernels = Mapping[str, Callable[..., Any]]


def _installed() -> str | None:
    """Triton's version, found without importing it."""
    for name in ("triton", "pytorch-triton"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _reason(triton: str | None, cuda: str | None, environment: Mapping[str, str]) -> str:
    """Why no kernel serves CUDA tensors, or ""."""
    asked = environment.get("TRUENORM_CUDA", "auto")
    if asked not in BACKENDS:
        raise ImportError(
            f"TRUENORM_CUDA (={asked!r}) is unknown: set it to one of {', '.join(BACKENDS)}"
        )
    oldest = ".".join(map(str, OLDEST_TRITON))
    reason = ""
    if asked in ("torch", "plain"):
        return f"TRUENORM_CUDA={asked}"
    if cuda is None:
        reason = "this PyTorch is built without CUDA"
    elif triton is None:
        reason = f'Triton is not installed: pip install "triton>={oldest}"'
    elif tuple(int(n) for n in re.findall(r"\d+", triton)[:2]) < OLDEST_TRITON:
        reason = f'Triton {triton} is too old: pip install "triton>={oldest}"'
    if reason and asked == "triton":
        # a backend that was asked for by name must load or raise
        raise ImportError(f"TRUENORM_CUDA=triton, but the kernels cannot be loaded: {reason}")
    backend = environment.get("TRUENORM_BACKEND")
    if not reason and asked == "auto" and backend in ("torch", "plain"):
        reason = f"TRUENORM_BACKEND={backend}"
    return reason


def _asks_formula(environment: Mapping[str, str]) -> bool:
    """Whether the formula in float64 was asked for by name."""
    asked = environment.get("TRUENORM_CUDA", "auto")
    return asked == "plain" or (asked == "auto" and environment.get("TRUENORM_BACKEND") == "plain")


TRITON = _installed()
WHY_NOT = _reason(TRITON, torch.version.cuda, os.environ)
FORMULA = _asks_formula(os.environ)

# what serves where no kernel does
KERNELLESS = "plain" if FORMULA else "torch"

# why no kernel serves a device, or ""
_devices: dict[int, str] = {}


def _probe(index: int) -> str:
    """Why this device cannot be served; a failure to load is not one of a layer."""
    capability = torch.cuda.get_device_capability(index)
    if capability < OLDEST_GPU:
        oldest = ".".join(map(str, OLDEST_GPU))
        return f"compute capability {'.'.join(map(str, capability))} is below {oldest}"
    try:
        from triton.runtime import driver

        from . import host  # noqa: F401

        # builds Triton's part of the driver, which takes a C compiler
        with torch.cuda.device(index):
            driver.active.get_current_target()
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return ""


def why_plain(index: int) -> str:
    """Why no kernel serves a CUDA device, or ""."""
    if WHY_NOT:
        return WHY_NOT
    if index not in _devices:
        reason = _probe(index)
        if reason and os.environ.get("TRUENORM_CUDA") == "triton":
            raise RuntimeError(f"TRUENORM_CUDA=triton, but not on cuda:{index}: {reason}")
        if reason:
            warnings.warn(
                f"truenorm runs on torch's own operators on cuda:{index}, as fast: {reason}",
                RuntimeWarning,
                stacklevel=2,
            )
        _devices[index] = reason
    return _devices[index]


def serving(name: str, plain: Callable[..., Any]) -> Callable[..., Any]:
    """An operator on CUDA tensors: the kernels, or plain where they cannot serve."""

    def serve(*args: Any) -> Any:
        # the first argument of every operator is a tensor on the device, of the input's kind
        if why_plain(args[0].device.index):
            return plain(*args)
        from . import host

        return (host.KERNELS[name] if host.serves(args[0]) else plain)(*args)

    return serve


def serves_gate(x: Tensor, groups: int) -> bool:
    """Whether the kernel of a norm beside a gate takes x, whose last dimension has these groups."""
    if why_plain(x.device.index):
        return False
    from . import host, host_gated

    return host.serves(x) and host_gated.fits(x, groups)


def register(library: Any, plain: Kernels) -> None:
    """Put the kernels before the plain ones, for CUDA tensors."""
    if not WHY_NOT:
        for name, kernel in plain.items():
            library.impl(name, serving(name, kernel), "CUDA")


def describe(words_without: Mapping[str, str]) -> tuple[str, str]:
    """("triton", "torch" or "plain", in words what serves CUDA tensors)."""
    without = words_without[KERNELLESS]
    if WHY_NOT:
        return KERNELLESS, f"{without} ({WHY_NOT})"
    words = f"Triton kernels (triton {TRITON})"
    found = [(i, why_plain(i)) for i in range(torch.cuda.device_count())]
    others = [f"cuda:{index} on {without} ({reason})" for index, reason in found if reason]
    if found and len(others) == len(found):
        return KERNELLESS, "; ".join(others)
    return "triton", "; ".join([words, *others])
