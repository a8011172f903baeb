"""Running statistics that stay: evaluation's normalization, whatever model.train() says."""

from __future__ import annotations

from typing import TypeVar

from torch.nn import Module
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy

from .._core import checks
from ..nn._policy import Policed

__all__ = ["freeze", "unfreeze"]

M = TypeVar("M", bound=Module)


def freeze(model: M) -> M:
    """Let every layer with running statistics normalize by them in training too; return the model.

    y = (x − running_mean) / sqrt(running_var + eps) · weight + bias, after model.train() as after
    model.eval(). The running statistics no longer move. x, weight and bias have their gradients as
    before (requires_grad_(False) freezes weight and bias). Nothing is sent between processes.

    A frozen layer has `statistics_frozen = True`, shows it in its repr, and keeps it through
    pickle, deepcopy and state_dict: the keys are torch's, and the metadata beside them, which
    torch.save writes, says which layers are frozen. truenorm's layers read it; torch's load the
    same file and are not frozen. A state without that record, torch's say, leaves a layer as it is.
    Resetting the layer (`reset_running_stats`, which torch.optim.swa_utils.update_bn calls, and
    `reset_parameters`) leaves frozen statistics as they are.

    model: a model or one layer, with BatchNorm, SyncBatchNorm or tracking InstanceNorm of
        truenorm's. Layers without running statistics (GroupNorm, a plain InstanceNorm) are the same
        in training and evaluation, and are left alone.

    Errors: TypeError where `model` is no module; ValueError where it has nothing to freeze, where a
    layer is torch's (`truenorm.convert` it first), lazy, or a BatchNorm that does not track.
    Nothing is frozen then.
    """
    for layer in _layers(model, "frozen").values():
        layer._choose("statistics_frozen", True)
    return model


def unfreeze(model: M) -> M:
    """Undo `freeze`: the layers normalize by the batch in training again; return the model.

    Errors: as for `freeze`.
    """
    for layer in _layers(model, "unfrozen").values():
        layer._choose("statistics_frozen", False)
    return model


def _layers(model: Module, verb: str) -> dict[str, Policed]:
    checks.check_module("model", model)
    found, why_not = {}, {}
    for name, module in model.named_modules():
        if not isinstance(module, _NormBase):
            continue
        mean = module._buffers.get("running_mean")
        batch = not hasattr(module, "_get_no_batch_dim")
        if mean is None or not module.track_running_stats:
            if batch:
                why_not[name] = "has no running statistics (track_running_stats=False)"
        elif not isinstance(module, Policed):
            why_not[name] = (
                f"is {type(module).__module__}.{type(module).__name__}, which always "
                "follows model.train(); truenorm.convert(model) first"
            )
        elif is_lazy(mean):
            why_not[name] = "is lazy and has not seen an input yet; call the model once before"
        else:
            found[name] = module
    checks.check_freezable(found, why_not, verb)
    return found
