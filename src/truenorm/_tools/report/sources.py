"""Models and data named on the command line."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from ..extras import CommandError, require


@contextmanager
def _from_here() -> Iterator[None]:
    """Modules of the working folder can be imported, as `python -m` does it."""
    sys.path.insert(0, str(Path.cwd()))
    try:
        yield
    finally:
        sys.path.remove(str(Path.cwd()))


def _attribute(argument: str, text: str, what: str) -> Any:
    module, _, name = text.partition(":")
    if not module or not name:
        raise CommandError(f"{argument} (={text!r}) must be module:{what}, e.g. mynet:{what}")
    with _from_here():
        try:
            found: Any = importlib.import_module(module)
        except Exception as error:  # whatever a user's module raises
            raise CommandError(
                f"{argument} (={text!r}): module {module!r} cannot be imported, "
                f"{type(error).__name__}: {error}"
            ) from error
    for part in name.split("."):
        if not hasattr(found, part):
            raise CommandError(f"{argument} (={text!r}): module {module!r} has no {name!r}")
        found = getattr(found, part)
    return found


def _made(argument: str, text: str, make: Callable[[], Any]) -> Any:
    with _from_here():
        try:
            return make()
        except Exception as error:  # whatever a user's function raises
            raise CommandError(
                f"{argument} (={text!r}) failed with {type(error).__name__}: {error}"
            ) from error


def model(text: str) -> Module:
    """The module that `module:factory` makes, or is."""
    found = _attribute("model", text, "factory")
    made = found if isinstance(found, Module) else None
    if made is None and callable(found):
        made = _made("model", text, found)
    if not isinstance(made, Module):
        raise CommandError(
            f"model (={text!r}) gave {type(made).__name__}, not a torch.nn.Module: name a function "
            "without arguments that returns the model"
        )
    return made


def data(text: str, shape: list[int] | None, batch_size: int) -> Any:
    """A loader: `digits`, an .npz or .pt file's first array, or what `module:loader` gives."""
    if text == "digits":
        return _batches(_shaped(_digits(), shape), batch_size)
    if text.endswith(".npz"):
        return _batches(_shaped(_npz(text), shape), batch_size)
    if ":" not in text:
        raise CommandError(
            f"--data (={text!r}) is unknown: pass digits, a file named *.npz, or module:loader"
        )
    found = _attribute("--data", text, "loader")
    return _made("--data", text, found) if callable(found) else found


def _digits() -> Tensor:
    """1,797 scans of digits, (N, 1, 8, 8), from 0 to 1."""
    require("sklearn", purpose="--data digits")
    from sklearn.datasets import load_digits

    return torch.tensor(load_digits().images / 16.0, dtype=torch.float32).unsqueeze(1)


def _npz(path: str) -> Tensor:
    require("numpy", purpose="--data of an .npz file", extra="report")
    import numpy

    try:
        with numpy.load(path, allow_pickle=False) as file:
            name = next((n for n in ("x", "images", "inputs", "data") if n in file.files), None)
            name = name or next(iter(file.files), None)
            if name is None:
                raise CommandError(f"--data (={path!r}) holds no array")
            values = torch.as_tensor(numpy.asarray(file[name]))
    except CommandError:
        raise
    except Exception as error:  # numpy's, zipfile's, the system's
        raise CommandError(f"--data (={path!r}) cannot be read: {error}") from error
    if values.dim() < 2 or not values.shape[0]:
        raise CommandError(
            f"--data (={path!r}): array {name!r} of shape {tuple(values.shape)} holds no samples "
            "(N, …)"
        )
    return values if values.is_floating_point() else values.float()


def _shaped(x: Tensor, shape: list[int] | None) -> Tensor:
    """Images (N, C, H, W) brought to this shape of a sample: resized, a grey channel repeated."""
    if shape is None:
        return x
    if x.dim() != 4 or len(shape) != 3 or min(shape) < 1:
        raise CommandError(
            f"--shape (={' '.join(map(str, shape))}) is of images: three sizes C H W, for data "
            f"(N, C, H, W); this data has shape {tuple(x.shape)}"
        )
    if x.shape[1] not in (1, shape[0]):
        raise CommandError(
            f"--shape (={' '.join(map(str, shape))}) has {shape[0]} channels, the data "
            f"{x.shape[1]}: only a single channel can be repeated"
        )
    size = (shape[1], shape[2])
    if x.shape[2:] != size:
        x = torch.nn.functional.interpolate(x, size, mode="bilinear", antialias=True)
    return x.expand(-1, shape[0], -1, -1).contiguous()


def _batches(x: Tensor, batch_size: int) -> Iterator[Tensor]:
    return iter(x.split(batch_size))
