"""Statistics across processes: what is beyond a layer's own `process_group`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ._core import checks
from ._core.normalize import normalize_together
from .nn._base import Spanning

__all__ = ["call_together"]


def call_together(layers: Sequence[Any], inputs: Sequence[Tensor]) -> list[Tensor]:
    """Call several layers on an input each, with one exchange of statistics for all of them.

    outputs[i] = layers[i](inputs[i]), to the same bits, but with one all-gather forward and one
    backward instead of one for each layer: for layers whose inputs do not depend on one another's
    outputs, as those of parallel branches. Where there is nothing to exchange (evaluation, one
    process) each layer is called by itself. The layers' hooks are not run.

    layers: BatchNorm, SyncBatchNorm, InstanceNorm or GroupNorm, each at most once, with one group.
    inputs, outputs: as each layer's own; nothing is changed where one of them is refused.

    Errors: TypeError for another layer; ValueError for another number of inputs than of layers, a
    layer that is there twice, or layers with different groups; else as each layer's own.
    """
    checks.check_together(layers, inputs, Spanning)
    groups = [layer._statistics_group() for layer in layers]
    checks.check_one_group(groups)
    if not groups or groups[0] is None or any(layer._makes_several_calls() for layer in layers):
        return [layer.forward(x) for layer, x in zip(layers, inputs, strict=True)]
    prepared = [layer._prepared(x) for layer, x in zip(layers, inputs, strict=True)]
    outputs = normalize_together([call for call, _ in prepared], groups[0])
    return [at.back(y) for (_, at), y in zip(prepared, outputs, strict=True)]
