"""torch.nn.functional's normalization functions: the same names, arguments and defaults.

Each validates its arguments, then makes one call: the layers too take it from here. The formulas,
forward and backward, are written out in `truenorm.reference`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.overrides import handle_torch_function, has_torch_function_variadic

from ._core import added as _added
from ._core import checks, eager, geometry, imports, masks, modulation
from ._core.call import CONSTANT, UNCENTRED, Call, Form, Running
from ._core.geometry import RMS_EPS
from ._core.normalize import local_response_norm as _response
from ._core.normalize import normalize, normalize_with_statistics
from .moments import Moments

__all__ = [
    "add_layer_norm",
    "add_rms_norm",
    "batch_norm",
    "group_norm",
    "instance_norm",
    "layer_norm",
    "local_response_norm",
    "rms_norm",
]


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    padding_value: float = 0.0,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """Normalize each channel by its mean and variance over the whole batch.

    y = (x − E[x]) / sqrt(Var[x] + eps) · weight + bias

    With `training` the statistics are the batch's, over every sample and position of a channel, and
    the running ones, where given, move in place towards them:
    running = (1 − momentum) · running + momentum · observed. The biased variance normalizes, the
    unbiased one is stored. Without `training` the running statistics are used.

    `mask`, `lengths` and `padding_value`, by name: which values count; `scale` and `shift`: y times
    1 + scale, and shift added to that; both as in the layers.

    Shapes: input (N, C, *); running_mean, running_var, weight, bias (C,); output like input, in its
    memory format.

    Errors: ValueError for one value per channel in training, or an eps that is not positive;
    RuntimeError for statistics or parameters of another size or device; TypeError for a non-tensor.
    As in torch.nn.functional any momentum is taken; the layers take [0, 1].

    Source: Ioffe and Szegedy 2015, https://arxiv.org/abs/1502.03167.
    """
    more = _more(mask, lengths, padding_value, scale, shift)
    if has_torch_function_variadic(input, running_mean, running_var, weight, bias):
        return handle_torch_function(
            batch_norm,
            (input, running_mean, running_var, weight, bias),
            input,
            running_mean,
            running_var,
            weight=weight,
            bias=bias,
            training=training,
            momentum=momentum,
            eps=eps,
            **more,
        )
    if isinstance(input, Tensor) and input.dim() < 2 and not input.numel() and not more:
        checks.check_floating(input)
        return input.clone()  # as torch, which looks for channels only where there are values
    if not _masks(more):
        form, after = eager.BATCH if training else CONSTANT, _after(scale, shift)
        y = _shortly(input, weight, bias, form, eps, after, running_mean, running_var, momentum)
        if y is not None:
            return y
    running = _running(running_mean, running_var, momentum)
    args = input, running_mean, running_var, weight, bias, training, eps
    call = batch_call(*args, one_value=_masks(more))
    return _made(call, running if training else None, more)


def batch_call(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    eps: float,
    *,
    one_value: bool = False,
) -> Call:
    """By x's own statistics where `training`, else by the running ones.

    one_value: whether a statistic of x's own may span one value, which has no variance.
    """
    checks.check_tensor("input", input)
    checks.check_floating(input)
    # torch fails over the channels it looks for, or over the statistics it checks first
    one_dim_error = IndexError if training and running_mean is None else RuntimeError
    checks.check_at_least_2d(input, one_dim_error)
    checks.check_eps(eps, "batch_norm", training=training)
    _check_per_channel(input, running_mean, running_var, weight, bias)
    given = None
    if not training:
        checks.check_running_given(running_mean, "training=False")
        assert running_mean is not None and running_var is not None
        given = running_mean, running_var
    elif not one_value:
        values = geometry.values_per_statistic(input.shape, geometry.BATCH)
        checks.check_more_than_one_value(input, values, per_sample=False)
    return Call(input, weight, bias, Form(geometry.BATCH, eps, not training), given=given)


def batch_norm_stats(
    input: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Moments]:
    """Normalize each channel by its statistics over the batch, and return these: (y, Moments).

    y = (x − E[x]) / sqrt(Var[x] + eps) · weight + bias

    Nothing is changed in place, so that this goes under torch.func's transforms, and any number of
    calls may come before a backward. The moments are constants to autograd;
    `Moments.update(running_mean, running_var, momentum)` gives new running statistics.

    Shapes: input (N, C, *); weight, bias (C,); y like input; moments.mean, moments.m2 (C,).

    Errors: as for `batch_norm` in training.
    """
    call = batch_call(input, None, None, weight, bias, True, eps)
    y, (mean, var, _) = normalize_with_statistics(call)
    count = geometry.values_per_statistic(input.shape, geometry.BATCH)
    return y, Moments(mean.new_full((), count), mean, var * count)


def _check_per_channel(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
) -> None:
    checks.check_both_running(running_mean, running_var)
    checks.check_per_channel("running_mean", running_mean, input)
    checks.check_per_channel("running_var", running_var, input)
    checks.check_per_channel("weight", weight, input)
    checks.check_per_channel("bias", bias, input)


def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    padding_value: float = 0.0,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """Normalize each channel of each sample by its own mean and variance over the positions.

    y = (x − E[x]) / sqrt(Var[x] + eps) · weight + bias

    With `use_input_stats` the statistics are the sample's own, and the running ones, where given,
    move in place towards their average over the batch (unbiased variance); without it the running
    statistics are used.

    `mask`, `lengths` and `padding_value`, by name: which values count; `scale` and `shift`: y times
    1 + scale, and shift added to that; both as in the layers.

    Shapes: input (N, C, *positions); running_mean, running_var, weight, bias (C,); output like
    input, in its memory format.

    Errors: ValueError for one position per channel; RuntimeError for statistics or parameters of
    another size or device; TypeError for a non-tensor. As in torch.nn.functional any eps and
    momentum are taken; the layers take eps ≥ 0 and a momentum in [0, 1].

    Source: Ulyanov et al. 2016, https://arxiv.org/abs/1607.08022.
    """
    more = _more(mask, lengths, padding_value, scale, shift)
    if has_torch_function_variadic(input, running_mean, running_var, weight, bias):
        return handle_torch_function(
            instance_norm,
            (input, running_mean, running_var, weight, bias),
            input,
            running_mean=running_mean,
            running_var=running_var,
            weight=weight,
            bias=bias,
            use_input_stats=use_input_stats,
            momentum=momentum,
            eps=eps,
            **more,
        )
    if not _masks(more):
        form, after = eager.INSTANCE if use_input_stats else CONSTANT, _after(scale, shift)
        y = _shortly(input, weight, bias, form, eps, after, running_mean, running_var, momentum)
        if y is not None:
            return y
    running = _running(running_mean, running_var, momentum)
    args = input, running_mean, running_var, weight, bias, use_input_stats, eps
    call = instance_call(*args, one_value=_masks(more))
    return _made(call, running if use_input_stats else None, more)


def instance_call(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    use_input_stats: bool,
    eps: float,
    *,
    one_value: bool = False,
) -> Call:
    """By x's own statistics where `use_input_stats`, else by the running ones."""
    checks.check_tensor("input", input)
    checks.check_floating(input)
    checks.check_at_least_2d(input, ValueError)
    _check_per_channel(input, running_mean, running_var, weight, bias)
    if use_input_stats:
        axes = geometry.instance(input.shape[1])
        if not one_value and input.shape[1]:
            values = geometry.values_per_statistic(input.shape, axes)
            checks.check_more_than_one_value(input, values, per_sample=True)
        return Call(input, weight, bias, Form(axes, eps))
    checks.check_running_given(running_mean, "use_input_stats=False")
    assert running_mean is not None and running_var is not None
    given = running_mean, running_var
    return Call(input, weight, bias, Form(geometry.BATCH, eps, True), given=given)


def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    padding_value: float = 0.0,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """Normalize each group of channels of each sample by its own mean and variance.

    y = (x − E[x]) / sqrt(Var[x] + eps) · weight + bias, over the C / num_groups channels of a group
    and all positions. The same in training and evaluation.

    `mask`, `lengths` and `padding_value`, by name: which values count; `scale` and `shift`: y times
    1 + scale, and shift added to that; both as in the layers.

    Shapes: input (N, C, *); weight, bias (C,); output like input, in its memory format.

    Errors: RuntimeError where num_groups does not divide C, or parameters differ in size or device;
    ValueError for one value per statistic in the whole batch; TypeError for a non-tensor. As in
    torch.nn.functional any eps is taken; the layer takes eps ≥ 0.

    Source: Wu and He 2018, https://arxiv.org/abs/1803.08494.
    """
    more = _more(mask, lengths, padding_value, scale, shift)
    if has_torch_function_variadic(input, weight, bias):
        return handle_torch_function(
            group_norm,
            (input, weight, bias),
            input,
            num_groups,
            weight=weight,
            bias=bias,
            eps=eps,
            **more,
        )
    if not _masks(more) and type(num_groups) is int and num_groups > 0:
        y = _shortly(input, weight, bias, eager.group(num_groups), eps, _after(scale, shift))
        if y is not None:
            return y
    call = group_call(input, num_groups, weight, bias, eps, one_value=_masks(more))
    return _made(call, None, more)


def group_call(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    one_value: bool = False,
) -> Call:
    checks.check_tensor("input", input)
    checks.check_floating(input)
    checks.check_at_least_2d(input, RuntimeError)
    checks.check_groups(input, num_groups)
    checks.check_per_channel("weight", weight, input)
    checks.check_per_channel("bias", bias, input)
    if not one_value:
        n, c, s = geometry.ncs(input.shape, geometry.BATCH)
        # as torch: an error only where the whole batch has one value per group
        checks.check_more_than_one_value(input, n * c // num_groups * s, per_sample=False)
    return Call(input, weight, bias, Form(geometry.group(num_groups), eps))


def _more(
    mask: Tensor | None, lengths: Tensor | None, padding_value: float, scale: Any, shift: Any
) -> dict[str, Any]:
    """What a call is given beyond torch's arguments; nothing where it has none of it."""
    if mask is None and lengths is None:
        if type(padding_value) is not float:
            checks.check_padding_value(padding_value)
        if scale is None and shift is None:
            return {}
    masked = {"mask": mask, "lengths": lengths, "padding_value": padding_value}
    return {**masked, "scale": scale, "shift": shift}


def _masks(more: dict[str, Any]) -> bool:
    return bool(more) and (more["mask"] is not None or more["lengths"] is not None)


def _after(scale: Any, shift: Any) -> eager.After | None:
    return None if scale is None and shift is None else (None, 0, 0.0, scale, shift)


def _shortly(
    input: Any, weight: Any, bias: Any, form: int, eps: Any, after: eager.After | None,
    mean: Any = None, var: Any = None, momentum: Any = None,
) -> Tensor | None:  # fmt: skip
    """The short way; None where it is not for this call, whose errors the long way words."""
    if not (type(input) is Tensor and type(eps) is float and eps > 0.0):
        return None
    if (mean is None) != (var is None) or is_dynamo_compiling():
        return None
    if form & CONSTANT:
        given = mean, var
        return eager.call(eager.GIVEN, input, weight, bias, form, eps, given, after)
    if mean is None or eager.graph_task() != -1:
        return eager.call(eager.OWN, input, weight, bias, form, eps, (), after)
    running = mean, var, None, momentum
    return eager.call(eager.MOVING, input, weight, bias, form, eps, running, after)


def _rows_shortly(
    input: Any, normalized_shape: Any, weight: Any, bias: Any, flags: int, eps: Any,
    after: eager.After | None,
) -> Tensor | None:  # fmt: skip
    """The same over trailing dimensions."""
    if type(input) is not Tensor or type(normalized_shape) not in (tuple, list, torch.Size):
        return None
    sizes = tuple(normalized_shape)
    if not sizes or input.shape[-len(sizes) :] != sizes:
        return None
    if not all(type(size) is int for size in sizes):
        return None
    return _shortly(input, weight, bias, eager.layer(len(sizes)) | flags, eps, after)


def _running(mean: Tensor | None, var: Tensor | None, momentum: float) -> Running | None:
    return None if mean is None or var is None else Running(mean, var, None, momentum)


def _made(call: Call, running: Running | None, more: dict[str, Any]) -> Tensor:
    """By the statistics of what is valid, or by those that are given."""
    call = call._replace(running=running)
    if more:
        masked = more["mask"], more["lengths"], more["padding_value"]
        mask = masks.mask_of(call.x, 1, *masked)
        form = call.form._replace(padding=more["padding_value"])
        call = call._replace(mask=mask, form=form)
        return normalize(modulated(call, more["scale"], more["shift"]))
    return normalize(call)


def modulated(call: Call, scale: Any, shift: Any) -> Call:
    """The call with y · (1 + scale) + shift in the place of y."""
    x, features = call.x, call.form.axes.feature_dims
    scale, shift = (
        modulation.arranged(name, t, x, features)
        for name, t in (("scale", scale), ("shift", shift))
    )
    return call._replace(scale=scale, shift=shift)


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """Normalize over the trailing dimensions named by `normalized_shape`.

    y = (x − E[x]) / sqrt(Var[x] + eps) · weight + bias, weight and bias element by element. The
    same in training and evaluation. `scale` and `shift`, by name: y times 1 + scale, and shift
    added to that, as in the layer.

    Shapes: input (*, *normalized_shape); weight, bias normalized_shape; output like input.

    Errors: RuntimeError where normalized_shape is not the input's trailing shape, or parameters
    differ in shape or device; TypeError for a non-tensor. As in torch.nn.functional any eps is
    taken; the layer takes eps ≥ 0.

    Source: Ba et al. 2016, https://arxiv.org/abs/1607.06450.
    """
    if has_torch_function_variadic(input, weight, bias):
        return handle_torch_function(
            layer_norm,
            (input, weight, bias),
            input,
            normalized_shape,
            weight=weight,
            bias=bias,
            eps=eps,
            **_given(scale, shift),
        )
    y = _rows_shortly(input, normalized_shape, weight, bias, 0, eps, _after(scale, shift))
    if y is not None:
        return y
    call = layer_call(input, normalized_shape, weight, bias, eps)
    return normalize(modulated(call, scale, shift))


def _given(scale: Any, shift: Any) -> dict[str, Any]:
    return {name: t for name, t in (("scale", scale), ("shift", shift)) if t is not None}


def layer_call(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Call:
    checks.check_tensor("input", input)
    checks.check_floating(input)
    checks.check_normalized_shape(input, normalized_shape)
    checks.check_elementwise("weight", weight, input, normalized_shape)
    checks.check_elementwise("bias", bias, input, normalized_shape)
    return Call(input, weight, bias, Form(geometry.layer(len(normalized_shape)), eps))


def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """Divide by the root mean square over the trailing dimensions named by `normalized_shape`.

    y = x / sqrt(E[x²] + eps) · weight; eps None is the machine epsilon of the input's
    dtype, and float32's for float16 and bfloat16. The same in training and evaluation. `scale` and
    `shift`, by name: y times 1 + scale, and shift added to that, as in the layer.

    Shapes: input (*, *normalized_shape); weight normalized_shape; output like input.

    Errors: RuntimeError where normalized_shape is not the input's trailing shape, or weight differs
    in shape or device; TypeError for a non-tensor. As in torch.nn.functional any eps is taken; the
    layer takes eps ≥ 0.

    Source: Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467.
    """
    if has_torch_function_variadic(input, weight):
        return handle_torch_function(
            rms_norm,
            (input, weight),
            input,
            normalized_shape,
            weight=weight,
            eps=eps,
            **_given(scale, shift),
        )
    # channels_last stays, which no kernel for trailing sizes writes
    if type(input) is Tensor and (input.dim() < 4 or input.is_contiguous()):
        short = RMS_EPS.get(input.dtype) if eps is None else eps
        after = _after(scale, shift)
        y = _rows_shortly(input, normalized_shape, weight, None, UNCENTRED, short, after)
        if y is not None:
            return y
    call = modulated(rms_call(input, normalized_shape, weight, eps), scale, shift)
    return in_torchs_memory_format(normalize(call), input)


def rms_call(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    eps: float | None,
) -> Call:
    checks.check_tensor("input", input)
    checks.check_floating(input, complex_too=True)
    checks.check_normalized_shape(input, normalized_shape)
    eps = geometry.rms_eps(eps, input.dtype)
    checks.check_elementwise("weight", weight, input, normalized_shape)
    return Call(input, weight, None, Form(geometry.rms(len(normalized_shape)), eps))


def in_torchs_memory_format(y: Tensor, input: Tensor) -> Tensor:
    """An RMSNorm's output in its input's, as torch's, which is made of elementwise operators."""
    if input.dim() < 4 or input.is_contiguous():
        return y
    for form, dims in ((torch.channels_last, 4), (torch.channels_last_3d, 5)):
        if input.dim() == dims and input.is_contiguous(memory_format=form):
            return y.contiguous(memory_format=form)
    return y


def add_layer_norm(
    input: Tensor,
    other: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """LayerNorm of a sum, and the sum: (layer_norm(h), h), h = input + other.

    h is rounded to its dtype before it is normalized, as by the two calls. Where both are of one
    shape, and large, it is normalized while it is in cache, and its gradient is added to the norm's
    likewise. The same in training and evaluation.

    Shapes: input, other (*, *normalized_shape), or what torch's addition takes; weight, bias
    normalized_shape; both outputs like the sum.

    Errors: TypeError where input or other is no tensor; else as for `layer_norm`.

    Source: Xiong et al. 2020, https://arxiv.org/abs/2002.04745 (the norm at a block's beginning).
    """
    if _added.is_large(input, other):
        call = layer_call(input, normalized_shape, weight, bias, eps)
        found = _added.at_once(input, other, call)
        if found is not None:
            return found
    h = _sum(input, other)
    return layer_norm(h, normalized_shape, weight, bias, eps), h


def add_rms_norm(
    input: Tensor,
    other: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> tuple[Tensor, Tensor]:
    """RMSNorm of a sum, and the sum: (rms_norm(h), h), h = input + other.

    As `add_layer_norm`, with the formula of `rms_norm`.

    Shapes: input, other (*, *normalized_shape), or what torch's addition takes; weight
    normalized_shape; both outputs like the sum.

    Errors: TypeError where input or other is no tensor; else as for `rms_norm`.

    Source: Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467.
    """
    if _added.is_large(input, other):
        found = _added.at_once(input, other, rms_call(input, normalized_shape, weight, eps))
        if found is not None:
            return found
    h = _sum(input, other)
    return rms_norm(h, normalized_shape, weight, eps), h


def _sum(input: Tensor, other: Tensor) -> Tensor:
    checks.check_tensor("input", input)
    checks.check_tensor("other", other)
    return input + other


_any_autocast = torch._C._is_any_autocast_enabled


def _has_autocast(device: str) -> bool:
    return torch.amp.is_autocast_available(device)


# torch 2.11 cannot compile the question
imports.constant_in_graphs("which devices have autocast", _has_autocast)


def local_response_norm(
    input: Tensor,
    size: int,
    alpha: float = 1e-4,
    beta: float = 0.75,
    k: float = 1.0,
) -> Tensor:
    """Divide each value by a power of the energy of its neighbouring channels.

    y_c = x_c · (k + alpha / size · Σ x_j²)^−beta, over the `size` channels j from c − size // 2 on,
    those outside the input counting as zero. The same in training and evaluation.

    Shapes: input (N, C, *positions); output like input, in its memory format. Integers are
    converted to the default dtype, as in torch.

    Errors: ValueError for an input of fewer than 3 dimensions; RuntimeError for a size below 1;
    TypeError for a non-tensor.

    Source: Krizhevsky et al. 2012.
    """
    if has_torch_function_variadic(input):
        return handle_torch_function(
            local_response_norm, (input,), input, size, alpha=alpha, beta=beta, k=k
        )
    checks.check_tensor("input", input)
    checks.check_local_response(input, size)
    if input.numel() == 0:
        return input
    if not (input.is_floating_point() or input.is_complex()):
        input = input.to(torch.get_default_dtype())
    checks.check_floating(input)
    # as under torch's autocast, which widens the power, and on CPU the pooling of 4D and 5D
    device = input.device.type
    widened = _any_autocast() and _has_autocast(device) and torch.is_autocast_enabled(device)
    if widened and (input.dim() > 3 or device != "cpu"):
        input = input.to(torch.promote_types(input.dtype, torch.float32))
    return _response(input, size, alpha, beta, k)


for _name in __all__:
    # torch.jit.script asks for it
    _refuse = partial(checks.fail_scripting, f"truenorm.functional.{_name}")
    globals()[_name].__prepare_scriptable__ = partial(_refuse, f"torch.nn.functional.{_name}")
