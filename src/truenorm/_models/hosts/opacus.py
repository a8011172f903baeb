"""Opacus: what breaks differential privacy is refused, and per-sample gradients are exact.

Without this a BatchNorm of truenorm's passes for private, which no BatchNorm is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from ... import functional, nn
from . import layers

_REMEDY = (
    "its per-sample gradients would be wrong; set it back (truenorm.unfuse for an activation), or "
    "give the model torch's layers (truenorm.revert)"
)
# of a BatchNorm's options those that are about its batch, which the layer in its place has not
_OF_BATCHES = nn.BatchNorm1d._options.keys() - nn.GroupNorm._options.keys()


def register(opacus: Any) -> None:
    from opacus.grad_sample import register_grad_sampler
    from opacus.grad_sample.grad_sample_module import GradSampleModule
    from opacus.validators import (
        ModuleValidator,
        register_module_fixer,
        register_module_validator,
    )
    from opacus.validators.errors import IllegalModuleConfigurationError

    validators, fixers = ModuleValidator.VALIDATORS, ModuleValidator.FIXERS
    # were these somewhere else, a BatchNorm would pass unseen
    assert torch.nn.BatchNorm2d in validators, "ModuleValidator.VALIDATORS holds no BatchNorm"
    for ours, theirs in layers.TORCHS.items():
        validate = _validator(validators.get(theirs), IllegalModuleConfigurationError)
        register_module_validator(ours)(validate)
    for ours, theirs in layers.like(fixers).items():
        register_module_fixer(ours)(_fixer(fixers[theirs]))
    for ours in layers.like(GradSampleModule.GRAD_SAMPLERS):
        register_grad_sampler(ours)(_grad_sample)


def _validator(validate: Any, error: Callable[[str], Exception]) -> Callable[..., list[Exception]]:
    def validate_ours(module: Module, **kwargs: Any) -> list[Exception]:
        found = [] if validate is None else list(validate(module, **kwargs))
        if options := layers.beyond(module):
            found.append(error(layers.stranger(module, options, "Opacus", _REMEDY)))
        return found

    return validate_ours


def _fixer(fix: Callable[..., Module]) -> Callable[..., Module]:
    def fix_ours(module: Module, **kwargs: Any) -> Module:
        from ..converting import convert

        fixed = convert(fix(module, **kwargs))
        for name, value in layers.chosen(module).items():
            if name not in _OF_BATCHES and name != "process_group":
                setattr(fixed, name, value)
        return fixed

    return fix_ours


def _normalized(layer: Any, x: Tensor) -> Tensor:
    """x as it is before weight and bias."""
    match layer:
        case nn.GroupNorm():
            return functional.group_norm(x, layer.num_groups, eps=layer.eps)
        case nn.LayerNorm():
            return functional.layer_norm(x, layer.normalized_shape, eps=layer.eps)
        case nn.RMSNorm():
            return functional.rms_norm(x, layer.normalized_shape, eps=layer.eps)
    return functional.instance_norm(x, eps=layer.eps)


def _of_each(grad: Tensor, parameter: Tensor, rows: bool) -> Tensor:
    """What of grad (N, *) belongs to a parameter, summed over all but the samples."""
    if rows:
        return (
            grad.flatten(1, grad.dim() - parameter.dim() - 1).sum(1)
            if (grad.dim() > parameter.dim() + 1)
            else grad
        )
    return grad.flatten(2).sum(2) if grad.dim() > 2 else grad


def _grad_sample(layer: Any, activations: list[Tensor], backprops: Tensor) -> dict[Any, Tensor]:
    """Gradients of weight and bias, sample by sample: (N, *parameter's shape)."""
    found: dict[Any, Tensor] = {}
    rows = isinstance(layer, (nn.LayerNorm, nn.RMSNorm))
    weight, bias = layer.weight, getattr(layer, "bias", None)
    if weight is not None and weight.requires_grad:
        found[weight] = _of_each(_normalized(layer, activations[0]) * backprops, weight, rows)
    if bias is not None and bias.requires_grad:
        found[bias] = _of_each(backprops, bias, rows)
    return found
