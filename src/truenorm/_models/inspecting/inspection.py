"""`inspect`: hooks on every normalization layer, a few batches, and the tables that follow."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from torch.nn import Module

from ..._core import checks
from .. import running
from ..layers import kind_of, norms_of
from ..running import Call
from .findings import find, left_in_training
from .histograms import histograms
from .layer import table
from .observer import Observer
from .result import Inspection
from .tables import SEVERITIES

Progress = Callable[[int], None]


def inspect(
    model: Module,
    data: Any,
    *,
    batches: int = 8,
    training: bool = False,
    call: Call | None = None,
    progress: Progress | None = None,
) -> Inspection:
    """Look at the input of every normalization layer of a model, on a few batches of real data.

    For each layer and channel: mean and standard deviation, |mean| / std (large ones cost low
    precision its digits), the share of eps in the denominator (near 1 a channel is constant or
    dead), the running statistics against those of the data, as a z-score and as a KL divergence of
    two Gaussians, how many values a statistic spans, weights near zero, NaN and Inf, and the error
    of torch's own kernel there against float64. What a person should know becomes a `Finding`, with
    a line of code that helps.

    Layers of torch and of truenorm and subclasses of them are seen, and RMSNorm and frozen
    BatchNorm as other libraries write them. The model runs without gradients and is left as it
    was, also after an error: modes, buffers, hooks and random state.

    data: a batch (a tensor, a dictionary passed by keywords, a tuple or list whose first item is
        the input), or a loader, an iterable of batches.
    batches: the most that are run.
    training: run the model in training mode instead of evaluation.
    call: how to run it on a batch, (model, batch) → anything.
    progress: called with the number of batches done.

    Errors: TypeError where `model` is no module or `data` no batch or loader; ValueError for a
    model without normalization layers or one that fails on a batch, a loader without a batch, and
    batches that reach no normalization layer; RuntimeError for a loader that raises.
    """
    running.check_model("model", model)
    checks.check_positive("batches", batches)
    # torch.compile's wrapper does not call hooks that came after it
    inner = model._modules.get("_orig_mod") or model
    norms = norms_of(inner)
    if not norms:
        checks.fail_no_norms("model", model)
    observers = [Observer(name, m, kind_of(m) or "") for name, m in norms]
    order: list[Observer] = []
    in_training = [o for o in observers if o.module.training and not inner.training]
    with running.untouched(inner, training=training) as stack:
        for observer in observers:
            _hook(observer, order, stack)
        count = _run_all(inner, data, batches, call, progress)
        if not order:
            checks.fail_not_reached("model", [o.name for o in observers])
        before = histograms([o.before for o in order])
        after = histograms([o.after for o in order])
        layers = tuple(map(table, order, before, after))
    findings = [f for o, layer in zip(order, layers, strict=True) for f in find(o, layer)]
    findings += [left_in_training(o.name) for o in in_training]
    findings.sort(key=lambda f: SEVERITIES.index(f.severity))
    not_called = tuple(o.name for o in observers if not o.calls)
    return Inspection(type(inner).__name__, training, count, layers, not_called, tuple(findings))


def _run_all(
    model: Module, data: Any, limit: int, call: Call | None, progress: Progress | None
) -> int:
    count = 0
    for batch in running.batches(data, limit):
        running.run(model, batch, call)
        count += 1
        if progress is not None:
            progress(count)
    return count


def _hook(observer: Observer, order: list[Observer], stack: ExitStack) -> None:
    def before(module: Module, args: Any, kwargs: Any) -> None:
        x = args[0] if args else next(iter(kwargs.values()), None)
        observer.see_input(x, kwargs)
        if observer.calls == 1 and observer not in order:
            order.append(observer)

    def after(module: Module, args: Any, output: Any) -> None:
        observer.see_output(output)

    # first and last, so that what other hooks change is seen as the layer sees it
    stack.callback(observer.module.register_forward_pre_hook(before, with_kwargs=True).remove)
    stack.callback(observer.module.register_forward_hook(after).remove)
