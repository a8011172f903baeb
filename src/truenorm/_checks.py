"""Every error a user can meet, worded once.

Each names the argument, its value and the remedy, and is raised before anything is changed. The
exception types are those of torch.nn where torch.nn raises one, and its key phrases are kept, so
that code which matches on them goes on working.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed
from torch import Tensor
from torch.nn import Module


def _shape(x: Tensor) -> str:
    return f"shape {tuple(x.shape)}"


def check_tensor(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(
            f"`{name}` must be a torch.Tensor, but got {type(value).__name__}: "
            f"convert it with torch.as_tensor(…)"
        )


def check_floating(input: Tensor, *, complex_too: bool = False) -> None:
    if not (input.is_floating_point() or (complex_too and input.is_complex())):
        raise NotImplementedError(
            f"`input` has dtype {input.dtype}, and normalization is not implemented for it: "
            "convert it to a floating point dtype, e.g. input.float()"
        )


def check_input_dim(input: Any, allowed: Sequence[int], layer: str, shapes: str) -> None:
    check_tensor("input", input)
    if input.dim() not in allowed:
        expected = " or ".join(f"{d}D" for d in allowed)
        raise ValueError(
            f"expected {expected} input (got {input.dim()}D input): `input` of {_shape(input)} "
            f"does not fit {layer}, which takes {shapes}"
        )


def check_at_least_2d(input: Tensor, error: type[Exception]) -> None:
    if input.dim() < 2:
        raise error(
            f"Expected at least 2 dimensions for input tensor but received {input.dim()}: `input` "
            f"of {_shape(input)} needs the dimensions (N, C, …); add them with input[None]"
        )


def check_num_features(
    input: Tensor, dim: int, num_features: int, error: type[Exception], note: str = ""
) -> None:
    if input.shape[dim] != num_features:
        raise error(
            f"expected input's size at dim={dim} to match num_features ({num_features}), but got: "
            f"{input.shape[dim]}. `input` has {_shape(input)}{note}; build the layer with "
            f"num_features={input.shape[dim]}, or permute the input so that its channels are at "
            f"dim={dim}"
        )


def check_eps(eps: Any, layer: str, *, training: bool = False) -> None:
    if training and eps <= 0.0:
        raise ValueError(
            f"{layer} eps must be positive during training, but got {eps}: use the default 1e-5"
        )
    if eps < 0.0:
        raise ValueError(f"{layer} eps must be non-negative, but got {eps}: use the default 1e-5")


def check_momentum(momentum: Any) -> None:
    if not 0.0 <= momentum <= 1.0:
        raise ValueError(
            f"`momentum` must be in [0, 1] or None, but got {momentum}: it is the weight of the "
            "new observation, running = (1 - momentum) * running + momentum * observed"
        )


def check_more_than_one_value(input: Tensor, count: int, *, per_sample: bool) -> None:
    if count != 1:
        return
    if per_sample:
        raise ValueError(
            "Expected more than 1 spatial element when training, got input size "
            f"{input.shape}: one value has no variance; use larger maps, or eval() with "
            "track_running_stats=True"
        )
    raise ValueError(
        "Expected more than 1 value per channel when training, got input size "
        f"{input.shape}: one value has no variance; use a larger batch, drop the last batch "
        "(drop_last=True), or call eval()"
    )


def check_parameter(
    name: str, value: Any, input: Tensor, shape: Sequence[int], remedy: str
) -> None:
    """A weight, bias or running statistic: a tensor of this shape, on the input's device."""
    if value is None:
        return
    check_tensor(name, value)
    if value.device != input.device:
        raise RuntimeError(
            f"`{name}` is on device {value.device}, but `input` is on {input.device}: "
            f"move both to one device, e.g. layer.to({str(input.device)!r})"
        )
    if tuple(value.shape) != tuple(shape):
        raise RuntimeError(
            f"{remedy}, but got {name} of {_shape(value)} and input of {_shape(input)}"
        )


def check_per_channel(name: str, value: Any, input: Tensor) -> None:
    """A parameter or statistic with one value per channel, at dim 1."""
    if value is None:
        return
    channels = input.shape[1]
    # what is nearly always so first: a small input's call is short enough to notice the rest
    if isinstance(value, Tensor) and value.shape == (channels,) and value.device == input.device:
        return
    if isinstance(value, Tensor) and value.numel() != channels and "running" in name:
        raise RuntimeError(
            f"{name} should contain {channels} elements not {value.numel()}: `input` of "
            f"{_shape(input)} has {channels} channels; build the layer with num_features={channels}"
        )
    check_parameter(
        name,
        value,
        input,
        (channels,),
        f"Expected {name} to be a vector of size equal to the number of channels in input",
    )


def check_both_running(running_mean: Any, running_var: Any) -> None:
    if (running_mean is None) != (running_var is None):
        missing = "running_mean" if running_mean is None else "running_var"
        raise ValueError(
            "running_mean and running_var must either both be None or neither be None: "
            f"`{missing}` is None"
        )


def check_running_given(running_mean: Any, flag: str) -> None:
    if running_mean is None:
        raise RuntimeError(
            f"Expected running_mean and running_var to be defined when {flag}: pass both "
            f"(running_mean must be defined in evaluation mode), or change {flag}"
        )


def check_groups(input: Tensor, num_groups: int) -> None:
    if num_groups < 1:
        raise ValueError(f"`num_groups` must be at least 1, but got {num_groups}")
    if input.shape[1] % num_groups:
        raise RuntimeError(
            "Expected number of channels in input to be divisible by num_groups, but got input of "
            f"shape {list(input.shape)} and num_groups={num_groups}: choose a divisor of "
            f"{input.shape[1]}"
        )


def check_num_groups_divide(num_groups: int, num_channels: int) -> None:
    if num_groups < 1:
        raise ValueError(f"`num_groups` must be at least 1, but got {num_groups}")
    if num_channels % num_groups:
        raise ValueError(
            f"num_channels ({num_channels}) must be divisible by num_groups ({num_groups}): "
            f"choose a divisor of {num_channels}"
        )


def check_normalized_shape(input: Tensor, normalized_shape: Sequence[int]) -> None:
    if not normalized_shape:
        raise RuntimeError(
            "Expected normalized_shape to be at least 1-dimensional, i.e., containing at least one "
            "element, but got normalized_shape = []: name the trailing sizes to normalize over"
        )
    if tuple(input.shape[-len(normalized_shape) :]) != tuple(normalized_shape):
        sizes = ", ".join(str(s) for s in normalized_shape)
        raise RuntimeError(
            f"Given normalized_shape=[{sizes}], expected input with shape [*, {sizes}], but got "
            f"input of size {list(input.shape)}: normalized_shape must equal the input's trailing "
            "sizes"
        )


def check_elementwise(
    name: str, value: Any, input: Tensor, normalized_shape: Sequence[int]
) -> None:
    check_parameter(
        name,
        value,
        input,
        normalized_shape,
        f"Expected {name} to be of same shape as normalized_shape ({list(normalized_shape)})",
    )


def check_local_response(input: Tensor, size: Any) -> None:
    if input.dim() < 3:
        raise ValueError(
            f"Expected 3D or higher dimensionality input (got {input.dim()} dimensions): `input` "
            f"of {_shape(input)} needs the dimensions (N, C, positions …)"
        )
    if size < 1:
        raise RuntimeError(
            f"`size` (={size}) is the number of neighbouring channels and should be greater than "
            "zero"
        )


def check_tunable(input: Tensor, why_plain: str) -> None:
    """`input` is where Triton kernels can be tuned; why_plain: why none serve its device, or ""."""
    if not input.is_cuda:
        raise RuntimeError(
            f"`input` is on device {input.device}, and only CUDA kernels can be tuned: "
            "move layer and input to a GPU, e.g. input.cuda()"
        )
    if why_plain:
        raise RuntimeError(
            f"`input` is on {input.device}, which plain PyTorch ops serve ({why_plain}): "
            "there is nothing to tune"
        )


def check_same_features(one: int, other: int) -> None:
    if one != other:
        raise ValueError(
            f"moments of {one} and of {other} features cannot be merged: merge those of one layer"
        )


def check_process_group(group: Any) -> None:
    """A torch.distributed.ProcessGroup that this process is a member of, or "world"."""
    if group == "world":
        return
    if group is torch.distributed.GroupMember.NON_GROUP_MEMBER:
        raise ValueError(
            "`process_group` is a group that this process is not a member of: build the layer with "
            "the group that holds this rank"
        )
    if not isinstance(group, torch.distributed.ProcessGroup):
        raise TypeError(
            '`process_group` must be a torch.distributed.ProcessGroup or "world", but got '
            f"{type(group).__name__}: make one with torch.distributed.new_group(ranks)"
        )


def check_no_transform(active: bool) -> None:
    if active:
        raise NotImplementedError(
            "statistics over several processes have no vmap and no forward-mode derivative: call "
            "the layer outside torch.func's transforms, or without its `process_group`"
        )


def check_same_statistics(layer: str, ranks: Sequence[float]) -> None:
    """Every rank of a group exchanges as many statistics as the others."""
    if any(n != ranks[0] for n in ranks):
        by_rank = ", ".join(f"{n:.0f} on rank {rank}" for rank, n in enumerate(ranks))
        raise ValueError(
            f"{layer} has other numbers of statistics (channels; samples times groups) in other "
            f"processes of its group: {by_rank}. Build the model the same, and where samples are "
            "cut over ranks give every rank its part of each"
        )


def check_more_than_one_value_of_all(input: Tensor, count: float, *, per_sample: bool) -> None:
    """`count` values in all processes together, of which `input` is this one's part."""
    if count == 1:
        what = "spatial element" if per_sample else "value per channel"
        raise ValueError(
            f"Expected more than 1 {what} when training, over all processes together, got input "
            f"size {input.shape}: one value has no variance; use a larger batch, or call eval()"
        )


def exchange_failed(rank: int, ranks: int, error: Exception) -> NoReturn:
    raise RuntimeError(
        f"the exchange of statistics failed on rank {rank} of {ranks}: another process of the "
        "group has died, has not called this layer within the group's timeout, or has called "
        f"another one. What that process printed says why; the backend says: {error}"
    ) from error


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


# ---------------------------------------------------------------- tools for whole models


def check_module(name: str, model: Any) -> None:
    if not isinstance(model, Module):
        raise TypeError(
            f"`{name}` must be a torch.nn.Module, but got {type(model).__name__}: pass the model "
            "itself, not its state_dict or its output"
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


def check_some_batches(batches: int) -> None:
    if not batches:
        raise ValueError("`loader` gave no batch: pass one that starts over at each iteration")


def check_same_model(path: Any, same: bool) -> None:
    if not same:
        raise ValueError(
            f"`resume` (={str(path)!r}) was written for a model with other parameters: delete the "
            "file, or name another one"
        )


def check_pass_of_rank(rank: int, failed: str | None) -> None:
    if failed is not None:
        raise RuntimeError(
            f"recalibrate failed on rank {rank}, and so on all: nothing was changed. There: "
            f"{failed}"
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


def check_together(layers: Sequence[Any], inputs: Sequence[Any], kind: type) -> None:
    for layer in layers:
        if not isinstance(layer, kind):
            raise TypeError(
                f"`layers` holds a {type(layer).__name__}, whose statistics do not span processes: "
                "give BatchNorm, SyncBatchNorm, InstanceNorm and GroupNorm layers of truenorm"
            )
    if len(layers) != len(inputs):
        raise ValueError(
            f"`inputs` (={len(inputs)} of them) must be as many as `layers` (={len(layers)})"
        )
    if len({id(layer) for layer in layers}) < len(layers):
        raise ValueError("`layers` holds a layer twice: call it a second time by itself")


def check_one_group(groups: Sequence[Any]) -> None:
    if any(group is not groups[0] for group in groups):
        raise ValueError(
            "`layers` exchange statistics with different groups, or only some of them do: give "
            "those of one `process_group`, all in training or all in evaluation"
        )


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
    raise ValueError(
        f"`{name}` failed on a batch of shape {_shapes(batch)} with {type(error).__name__}: "
        f"{error} — pass data that the model takes, or say how it is called: "
        "call=lambda model, batch: model(…)"
    ) from error


def check_positive(name: str, value: Any) -> None:
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"`{name}` must be a whole number of at least 1, but got {value!r}")


def check_foldable(model: Module) -> None:
    if hasattr(model, "_orig_mod") or isinstance(model, torch.jit.ScriptModule):
        raise ValueError(
            f"`model` is compiled ({type(model).__name__}), and its layers can no longer be "
            "replaced: fold the model first, then compile it"
        )
    if model.training:
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
