"""Errors of what is done to a whole model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn import Module
from torch.utils._pytree import tree_leaves

from .layers import _shape


def check_only_with(name: str, value: Any, flag: str, given: bool) -> None:
    if not given:
        raise ValueError(
            f"`{name}` (={value!r}) goes with {flag} only: add it, or leave {name} out"
        )


def check_dims(layer: str, dims: Any) -> None:
    """How many dimensions of positions a SyncBatchNorm meets."""
    if dims not in (1, 2, 3):
        raise ValueError(
            f"`dims` (={dims!r}) of {layer!r} must be 1, 2 or 3, the d of the BatchNorm that it "
            "becomes: pass dims=2, say, where no convolution or Linear tells it"
        )


def check_module(name: str, model: Any) -> None:
    if not isinstance(model, Module):
        raise TypeError(
            f"`{name}` must be a torch.nn.Module, but got {type(model).__name__}: pass the model "
            "itself, not its state_dict or its output"
        )


def check_all_revertible(left: Sequence[tuple[str, str]]) -> None:
    if left:
        name, reason = left[0]
        raise ValueError(
            f"`model` has {len(left)} layer(s) that cannot be torch's, the first {name!r}: {reason}"
        )


def check_something_tracks(layers: Any) -> None:
    if not layers:
        raise ValueError(
            "`model` has no layer with running statistics: there is nothing to recalibrate; build "
            "its norm layers with track_running_stats=True"
        )


def check_initialized(name: str, lazy: bool) -> None:
    if lazy:
        raise ValueError(
            f"`model` has a lazy layer, {name!r}, that does not know its num_features yet: call "
            "the model once before"
        )


def check_loader(loader: Any) -> None:
    if isinstance(loader, (Tensor, str)) or not isinstance(loader, Iterable):
        raise TypeError(
            f"`loader` must be an iterable of batches, but got {type(loader).__name__}: of one "
            "batch pass [batch]"
        )


def check_some_batches(batches: int) -> None:
    if not batches:
        raise ValueError("`loader` gave no batch: pass one that starts over at each iteration")


def fail_lazy(name: str, key: str) -> NoReturn:
    raise ValueError(
        f"`{name}` has not seen an input yet: its lazy {key!r} has no shape; run it once first"
    )


def fail_no_norms(name: str, model: Module) -> NoReturn:
    raise ValueError(
        f"`{name}` ({type(model).__name__}) has no normalization layer: pass a model that has one "
        "of torch.nn's or truenorm's, or a subclass of them"
    )


def fail_batch(name: str, data: Any) -> NoReturn:
    loader = " or a loader of batches" if name == "data" else ""
    raise TypeError(
        f"`{name}` must be a batch (a tensor, a tuple, list or dictionary of tensors){loader}, but "
        f"got {type(data).__name__}"
    )


def check_not_batches(data: Sequence[Any]) -> None:
    """A list of equals may be a batch (input, target), or several batches."""
    kinds = {(v.shape, v.dtype) if isinstance(v, Tensor) else type(v) for v in data}
    if len(kinds) == 1:
        raise ValueError(
            f"`data` is a list of {len(data)} tensors of one shape, and may mean that many batches "
            "or one of that many tensors: pass iter(data) for batches, tuple(data) for one batch"
        )


def fail_no_batch() -> NoReturn:
    raise ValueError("`data` is a loader that gave no batch: check its data set and its sampler")


def fail_loader(index: int, error: Exception) -> NoReturn:
    raise RuntimeError(
        f"`data` is a loader that failed at batch {index} with {type(error).__name__}: {error}"
    ) from error


def _shapes(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k!r}: {_shapes(v)}" for k, v in value.items()) + "}"
    if isinstance(value, (tuple, list)):
        return "[" + ", ".join(_shapes(v) for v in value) + "]"
    return type(value).__name__


def fail_forward(name: str, batch: Any, error: Exception) -> NoReturn:
    # torch goes on to list every form that it takes
    said = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    if not any(isinstance(leaf, Tensor) for leaf in tree_leaves(batch)):
        raise ValueError(
            f"`{name}` failed on a batch without a tensor ({type(batch).__name__}) with {said} — "
            "pass tensors, of NumPy arrays torch.as_tensor(array), or say how the model is called: "
            "call=lambda model, batch: model(…)"
        ) from error
    raise ValueError(
        f"`{name}` failed on a batch of shape {_shapes(batch)} with {said} — pass data that the "
        "model takes, or say how it is called: call=lambda model, batch: model(…)"
    ) from error


def check_positive(name: str, value: Any) -> None:
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"`{name}` must be a whole number of at least 1, but got {value!r}")


def check_foldable(model: Module, frozen: bool) -> None:
    if hasattr(model, "_orig_mod") or isinstance(model, torch.jit.ScriptModule):
        raise ValueError(
            f"`model` is compiled ({type(model).__name__}), and its layers can no longer be "
            "replaced: fold the model first, then compile it"
        )
    if model.training and not frozen:
        raise ValueError(
            "`model` is in training mode, where BatchNorm normalizes by the batch: call "
            "model.eval() first"
        )


def check_folded_linear(input: Tensor) -> None:
    if input.dim() != 2:
        raise ValueError(
            f"expected 2D input (got {input.dim()}D input): BatchNorm was folded into a Linear "
            f"layer for inputs (N, C), and means other channels for {_shape(input)}; use the model "
            "before folding"
        )


def check_fold_changed_nothing(error: float, error_before: float) -> None:
    # roundings of the same order; what was misread in a forward is off by far more
    if not error <= 1e-3 + 20.0 * error_before:
        raise RuntimeError(
            f"folding changed the model's output by {error:.1e} of its largest value (its own "
            f"rounding error: {error_before:.1e}), so its forward runs its layers in another order "
            "than it seems to: the model is unchanged, fold its parts one by one"
        )


def fail_copy(error: Exception) -> NoReturn:
    raise ValueError(
        f"`model` cannot be copied ({type(error).__name__}: {error}): pass inplace=True to change "
        "the model itself"
    ) from error


def fail_nothing_in_common() -> NoReturn:
    raise ValueError(
        "`model_a` and `model_b` have no layer of the same name, and no output, in common: compare "
        "two versions of one model"
    )


def fail_not_reached(name: str, layers: Sequence[str]) -> NoReturn:
    raise ValueError(
        f"`{name}` called none of its {len(layers)} normalization layers on this data (the first: "
        f"{layers[0]!r}): pass data and `call` that run the whole model"
    )


def fail_exists(path: Path) -> NoReturn:
    raise FileExistsError(
        f"`path` (={str(path)!r}) exists: name another file, or pass force=True to replace it"
    )


def check_writable(path: Path, *, force: bool) -> None:
    """Before the work is done, that what comes of it can be written."""
    folder = path.absolute().parent
    if not folder.is_dir():
        raise FileNotFoundError(
            f"`path` (={str(path)!r}): the folder {str(folder)!r} does not exist, make it first"
        )
    if path.is_dir():
        raise IsADirectoryError(f"`path` (={str(path)!r}) is a folder: name a file")
    if path.exists() and not force:
        fail_exists(path)


def check_same_model(path: Any, same: bool) -> None:
    if not same:
        raise ValueError(
            f"`resume` (={str(path)!r}) was written for a model with other parameters: delete the "
            "file, or name another one"
        )


def check_more_than_one_seen(layer: str, values: float) -> None:
    if values <= 1:
        raise ValueError(
            f"`loader` gave {layer!r} {values:.0f} value(s) per channel, which have no variance: "
            "pass more data"
        )


def check_whole_samples(layer: str, process_group: Any) -> None:
    if process_group is not None:
        raise ValueError(
            f"`model` has an InstanceNorm, {layer!r}, that tracks statistics of samples cut over "
            "a process_group: recalibrate cannot see whole samples there; recalibrate it in one "
            "process, without its process_group"
        )


def check_norm_name(norm: Any) -> None:
    if not isinstance(norm, str) or "." not in norm.strip("."):
        raise TypeError(
            f"`norm` (={norm!r}) must be a torch.nn.Module class or its qualified name: pass the "
            'class, or "package.module.Class"'
        )


def check_reader(read: Any, rule: type) -> None:
    if not (read is None or isinstance(read, rule) or callable(read)):
        raise TypeError(
            f"`read` (={read!r}) must be a truenorm.Rule, a function from a module to one, or "
            "None: pass truenorm.Rule('rms'), say"
        )


def check_rule(name: str, found: Any, rule: type) -> None:
    if not (found is None or isinstance(found, rule)):
        raise TypeError(
            f"`read` of {name!r} returned {type(found).__name__}: return a truenorm.Rule, or None"
        )


def check_rounding(rounding: Any) -> None:
    if rounding not in ("module", "once"):
        raise ValueError(
            f"`rounding` (={rounding!r}) must be 'module', each norm's own order of casts, or "
            "'once', a single rounding"
        )
