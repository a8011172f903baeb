"""A case made real, and its validation against float64: what is wrong is not timed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from ... import nn, reference
from ...reference import Gradients
from ..verify.measure import (
    gradient_promise,
    gradients,
    last_places,
    output_error,
    output_promise,
    relative_error,
)
from .cases import Case

# float64 in, float64 out: both sides round, and differ in the order of their sums
_FLOAT64 = 1e-11
# values per piece of the oracle's work, which makes some twenty float64 copies of a piece
_PIECE = 2**20


class Subject:
    """The layers of truenorm and torch with equal parameters, an input and an output gradient.

    All is made on the device: a CPU takes minutes for what a GPU is measured on.
    """

    def __init__(self, case: Case, dtype: torch.dtype, device: str = "cpu") -> None:
        self.case, self.dtype = case, dtype
        generator = torch.Generator(device).manual_seed(20)
        self.ours: Any = case.build(nn).to(device, dtype)
        for name, held in (*self.ours.named_parameters(), *self.ours.named_buffers()):
            if held.is_floating_point():
                least = -0.5 if name in ("bias", "running_mean") else 0.5
                held.data.copy_(torch.rand(held.shape, generator=generator, device=device) + least)
        self.theirs: Any = case.build(torch.nn).to(device, dtype)
        self.theirs.load_state_dict(self.ours.state_dict())

        def values(mean: float) -> Tensor:
            made = torch.randn(case.shape, generator=generator, device=device) + mean
            return made.to(dtype).contiguous(memory_format=case.memory_format)

        self.x, self.grad = values(0.5), values(0.0)


def _pieces(case: Case) -> Iterator[tuple[slice, slice]]:
    """(samples, channels), together the whole input, none cutting through a statistic."""
    samples, channels = case.shape[:2]
    positions = case.numel // (samples * channels)
    if case.layer.startswith("BatchNorm"):
        sample_step, channel_step = samples, _PIECE // (samples * positions)
    elif case.layer.startswith("InstanceNorm"):
        sample_step, channel_step = _PIECE // (channels * positions), _PIECE // positions
    else:
        sample_step, channel_step = _PIECE // (channels * positions), channels
    for s in _steps(samples, sample_step):
        for c in _steps(channels, channel_step):
            yield s, c


def _steps(size: int, step: int) -> Iterator[slice]:
    if step >= size:
        yield slice(None)
        return
    for first in range(0, size, max(1, step)):
        yield slice(first, first + max(1, step))


def _exact(layer: Any, x: Tensor, grad: Tensor, channels: slice) -> tuple[Tensor, Gradients]:
    """Output and gradients by the formula, of some channels with their own parameters."""

    def of(name: str) -> Any:
        parameter = getattr(layer, name, None)
        return None if parameter is None else parameter[channels]

    if isinstance(layer, torch.nn.LocalResponseNorm):
        window = (layer.size, layer.alpha, layer.beta, layer.k)
        return (
            reference.local_response_norm(x, *window),
            reference.local_response_norm_backward(grad, x, *window),
        )
    w, b, eps = of("weight"), of("bias"), layer.eps
    if isinstance(layer, _InstanceNorm):
        return (
            reference.instance_norm(x, w, b, eps),
            reference.instance_norm_backward(grad, x, w, b, eps),
        )
    if isinstance(layer, _BatchNorm):
        batch = (of("running_mean"), of("running_var"), w, b, layer.training, eps)
        return reference.batch_norm(x, *batch), reference.batch_norm_backward(grad, x, *batch)
    if isinstance(layer, torch.nn.GroupNorm):
        group = (layer.num_groups, w, b, eps)
        return reference.group_norm(x, *group), reference.group_norm_backward(grad, x, *group)
    shape = layer.normalized_shape
    if isinstance(layer, torch.nn.RMSNorm):
        return (
            reference.rms_norm(x, shape, w, eps),
            reference.rms_norm_backward(grad, x, shape, w, eps),
        )
    return (
        reference.layer_norm(x, shape, w, b, eps),
        reference.layer_norm_backward(grad, x, shape, w, b, eps),
    )


def _running_error(subject: Subject, before: dict[str, Tensor]) -> float:
    """Error of the running statistics after one training step."""
    layer, worst = subject.ours, 0.0
    for s, c in _pieces(subject.case):
        was = before["running_mean"][c], before["running_var"][c]
        exact = reference.running_update(*was, subject.x[s, c], layer.momentum)
        after = layer.running_mean[c], layer.running_var[c]
        worst = max(worst, *(relative_error(a, e) for a, e in zip(after, exact, strict=True)))
    return worst


def validate(subject: Subject) -> str:
    """What is wrong with truenorm's results, forward and backward, by its promises; or ""."""
    try:
        return _validate(subject)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        return f"it raised {type(error).__name__}: {error}".splitlines()[0]
    finally:
        # the steps of the validation moved truenorm's running statistics
        subject.ours.load_state_dict(subject.theirs.state_dict())


def _validate(subject: Subject) -> str:
    layer, case, dtype = subject.ours, subject.case, subject.dtype
    half = dtype in (torch.bfloat16, torch.float16)
    output_bound, gradient_bound = output_promise(dtype, 0.0), gradient_promise(dtype, 0.0)
    if dtype == torch.float64:
        output_bound = gradient_bound = _FLOAT64
    # a rounded statistic is within half a unit of its last place, 1e-7 in float32
    running_bound = _FLOAT64 if dtype == torch.float64 else 1e-6
    before = {name: b.clone() for name, b in layer.named_buffers()}
    with torch.no_grad():
        alone = layer(subject.x)
    if case.layer.startswith("BatchNorm") and case.training:
        error = _running_error(subject, before)
        if not error <= running_bound:
            return f"running statistics are off by {error:.2g} (promised {running_bound:.2g})"
    found = gradients(layer, subject.x, subject.grad)
    if alone.shape != subject.x.shape or alone.stride() != subject.x.stride():
        return f"the output lies in memory as {alone.stride()}, not {subject.x.stride()}"
    # pieces of channels_last memory, a few channels wide, would be read slowly
    whole = [t.contiguous() for t in (subject.x, subject.grad, alone, found["output"])]
    input_gradient = found["input"].contiguous()
    sums = {
        name: torch.zeros(found[name].shape, dtype=torch.float64, device=found[name].device)
        for name in ("weight", "bias")
        if name in found
    }
    for s, c in _pieces(case):
        x, grad, *outputs = (t[s, c] for t in whole)
        exact, exact_gradients = _exact(layer, x, grad, c)
        for y in outputs:
            error = (last_places if half else output_error)(y, exact)
            if not error <= output_bound:
                return f"output is off by {error:.2g} (promised {output_bound:.2g})"
        error = relative_error(input_gradient[s, c], exact_gradients.input)
        if not error <= gradient_bound:
            return f"input gradient is off by {error:.2g} (promised {gradient_bound:.2g})"
        for name, total in sums.items():
            total[c] += getattr(exact_gradients, name)
    for name, total in sums.items():
        error = relative_error(found[name], total)
        if not error <= gradient_bound:
            return f"{name} gradient is off by {error:.2g} (promised {gradient_bound:.2g})"
    return ""
