"""SyncBatchNorm: batch statistics over every process of a group, on any device and backend."""

from __future__ import annotations

import functools
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.modules.batchnorm import _BatchNorm

from .._core import checks, exchange
from ._batch import BatchForward
from ._options import DEFAULTS, Option, options_of, with_options

# truenorm.convert: `_models/converting.py`, which imports this package, puts it here
_convert: Any = None


@with_options
class SyncBatchNorm(BatchForward, torch.nn.SyncBatchNorm):
    """Normalize each channel by its statistics over the whole batch, of every process.

    y = (x − E[x]) / sqrt(Var[x] + eps) · weight + bias

    In training E and Var (biased, divided by n) span the batches of all processes of
    `process_group` (None: of all processes) together, n values in all, and the running statistics
    move as in `BatchNorm1d`, to the same bits in every process. N may differ from process to
    process, and be 0. Every process has to call the layer, forward and backward, in the same order
    as its others. The gradients of weight and bias are this process's share, which
    DistributedDataParallel and fully_shard add up. In evaluation, and in one process, this is
    `BatchNorm` for inputs of any rank from 2 up.

    Communication: one all-gather of 2·C + 2 float64 numbers forward, one of 2·C backward, and at a
    layer's first call one of a single number.

    Shapes: input (N, C, *); output the same; weight, bias, running_mean, running_var (C,).

    Errors: as in `BatchNorm1d`, of which "more than 1 value per channel" counts all processes;
    ValueError on every process where one has another number of channels; RuntimeError on the others
    where a process dies or does not call the layer within the group's timeout.

    Source: Ioffe and Szegedy 2015, https://arxiv.org/abs/1502.03167. Arguments as in
    torch.nn.SyncBatchNorm.
    """

    _own_options: ClassVar[dict[str, Option | None]] = {
        "process_group": None,
        # it asks how many values there are
        "on_single": None,
    }

    def _in_graph(self, input: Tensor, after: Any) -> None:
        return None  # which processes there are, the long way asks

    def _check_input_dim(self, input: Tensor) -> None:
        checks.check_tensor("input", input)
        if input.dim() < 2:
            raise ValueError(
                f"expected at least 2D input (got {input.dim()}D input): `input` of shape "
                f"{tuple(input.shape)} needs the dimensions (N, C, …)"
            )
        if input.shape[1] == 0:
            raise ValueError(
                "SyncBatchNorm number of input channels should be non-zero: `input` has shape "
                f"{tuple(input.shape)}"
            )

    def _statistics_group(self) -> Any:
        own = self._statistics_are_own()
        # torch's own attribute
        return exchange.active_group(self.process_group) if own else None

    @classmethod
    def convert_sync_batchnorm(cls, module: Module, process_group: Any = None) -> Module:
        """Replace every BatchNorm layer below `module` by a truenorm.SyncBatchNorm.

        As torch's method of that name, with new layers; what truenorm's layers have beyond torch's
        stays: frozen statistics, activation, channel axis, a process group where none is given.
        `truenorm.convert(module, sync=True)` changes the layers in place instead.

        Errors: ValueError for a lazy layer that has not seen an input, and for one with
        `on_single`, which asks how many values this process has. Nothing is changed then.
        """
        before = _layers(module)
        checks.check_no_lazy("module", [n for n, m in before.items() if _is_lazy(m)])
        checks.check_may_span({n: options_of(m) for n, m in before.items()}, process_group)
        options = {name: options_of(layer) for name, layer in before.items()}
        groups = {name: getattr(layer, "process_group", None) for name, layer in before.items()}
        converted = _convert(_theirs(cls, module, process_group), only=(torch.nn.SyncBatchNorm,))
        kept = DEFAULTS._asdict().keys() & cls._options.keys()
        for name, layer in _layers(converted).items():
            if name in options:
                own = options[name]._asdict()
                layer._take_options(DEFAULTS._replace(**{k: own[k] for k in kept}))
                if process_group is None:
                    layer.process_group = groups[name]
        return converted  # type: ignore[no-any-return]


_theirs: Any = vars(torch.nn.SyncBatchNorm)["convert_sync_batchnorm"].__func__


def _layers(module: Module) -> dict[str, Any]:
    """The layers that torch's method replaces, by every name that they have."""
    named = module.named_modules(remove_duplicate=False)
    return {name: m for name, m in named if isinstance(m, _BatchNorm)}


def _is_lazy(layer: Any) -> bool:
    return isinstance(layer, BatchForward) and layer.num_features == 0


def _refuse_what_torch_would_drop() -> None:
    """Let torch's own convert_sync_batchnorm, Lightning's too, refuse what it cannot keep.

    It makes new layers from torch's arguments alone: frozen statistics would move again, and an
    activation be gone, without a word.
    """

    @functools.wraps(_theirs)
    def convert_sync_batchnorm(cls: Any, module: Module, process_group: Any = None) -> Any:
        layers = {n: m for n, m in _layers(module).items() if isinstance(m, BatchForward)}
        checks.check_no_lazy("module", [n for n, m in layers.items() if _is_lazy(m)])
        for name, layer in layers.items():
            chosen = layer._chosen()
            chosen.pop("process_group", None)  # the method's own
            checks.check_torch_has(name, chosen)
        return _theirs(cls, module, process_group)

    theirs: Any = torch.nn.SyncBatchNorm
    theirs.convert_sync_batchnorm = classmethod(convert_sync_batchnorm)


def _let_ours_pass() -> None:
    """Let truenorm's SyncBatchNorm through a check of DistributedDataParallel.

    It refuses every SyncBatchNorm whose parameters are on a CPU, since torch's cannot run there.
    """
    parallel = torch.nn.parallel.DistributedDataParallel
    check: Any = getattr(parallel, "_passing_sync_batchnorm_handle", None)
    if check is None:  # another torch, without that check
        return

    @functools.wraps(check)
    def check_theirs(self: Any, module: Module) -> None:
        found = {isinstance(m, SyncBatchNorm) for m in module.modules() if _is_sync(m)}
        if found != {True}:
            check(self, module)

    parallel._passing_sync_batchnorm_handle = check_theirs  # type: ignore[method-assign]


def _is_sync(module: Module) -> bool:
    return isinstance(module, torch.nn.SyncBatchNorm)


_let_ours_pass()
_refuse_what_torch_would_drop()
