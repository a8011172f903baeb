"""`fold`: what is folded into what, with which error, and what is kept and why."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.utils import parametrize

from ... import nn as ours
from ..._core import activation, checks
from ...nn._options import options_of
from ...nn._ruled import Ruled
from ..fusing import unfuse
from ..layers import BATCH, INSTANCE, has_hooks, kind_of, norms_of, uses_running
from ..rules.recognise import recognise
from ..running import Call, check_model, is_batch, run, tensors, untouched
from . import arithmetic
from .graph import LINEAR, Order, find_order, passes
from .measure import pair_errors, share_of_largest

_NORM_FORWARDS = {
    _BatchNorm.forward,
    _InstanceNorm.forward,
    torch.nn.SyncBatchNorm.forward,
    ours.BatchNorm1d.forward,
    ours.InstanceNorm1d.forward,
    ours.SyncBatchNorm.forward,
}
_PLAIN = (
    torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d,
    torch.nn.ConvTranspose1d, torch.nn.ConvTranspose2d, torch.nn.ConvTranspose3d,
)  # fmt: skip
# an activation of a layer's own, which stays
_ACTS: dict[int, Callable[[float], Module]] = {
    activation.RELU: lambda _: torch.nn.ReLU(),
    activation.LEAKY_RELU: lambda slope: torch.nn.LeakyReLU(slope),
    activation.HARDSWISH: lambda _: torch.nn.Hardswish(),
    activation.ELU: lambda alpha: torch.nn.ELU(alpha),
    activation.SILU: lambda _: torch.nn.SiLU(),
    activation.GELU: lambda _: torch.nn.GELU(),
    activation.GELU_TANH: lambda _: torch.nn.GELU("tanh"),
    activation.RELU6: lambda _: torch.nn.ReLU6(),
}
# torchvision's and detectron2's: BatchNorm by fixed statistics, in training too
_FROZEN = "FrozenBatchNorm2d"


@dataclass(frozen=True)
class FoldedLayer:
    """A normalization layer that is now part of another layer.

    name, kind: of the normalization layer, whose place an Identity has taken, or what its own class
        does after the normalization, as timm's activations.
    into: name of the layer that does its work.
    side: "before" where that layer runs before it, else "after".
    error: largest error of that layer's output on a random input, against the layers before
        folding in float64, as a share of the largest output.
    error_before: the same for the layers before folding, in their own dtype.
    """

    name: str
    kind: str
    into: str
    side: str
    error: float
    error_before: float


@dataclass(frozen=True)
class KeptLayer:
    """A normalization layer that stays, and the reason."""

    name: str
    kind: str
    reason: str


@dataclass(frozen=True)
class Folding:
    """What `fold` did; print it for a table.

    model: the folded model.
    error: largest error of its output for the given batch, against the model before folding in
        float64, as a share of the largest output; None without a batch.
    error_before: the same for the model before folding, in its own dtype.
    """

    model: Module
    folded: tuple[FoldedLayer, ...]
    kept: tuple[KeptLayer, ...]
    error: float | None = None
    error_before: float | None = None

    def __str__(self) -> str:
        count = len(self.folded)
        lines = [f"{count} layer{'s' * (count != 1)} folded, {len(self.kept)} kept"]
        for f in self.folded:
            into = f"{f.name} ({f.kind}) into {f.into}, which runs {f.side} it"
            lines.append(f"  {into}: error {f.error:.1e}, before folding {f.error_before:.1e}")
        lines += [f"  {k.name} ({k.kind}) is kept: {k.reason}" for k in self.kept]
        if self.error is not None:
            lines.append(
                f"error of the output {self.error:.1e}, before folding {self.error_before:.1e}"
            )
        return "\n".join(lines)


class TwoDimensional(torch.nn.Identity):
    """In the place of a layer that was folded into a Linear: (N, C) alone means the same there."""

    def forward(self, input: Tensor) -> Tensor:
        checks.check_folded_linear(input)
        return input


def _followers(norm: Any) -> list[Module] | None:
    """What a layer does after a BatchNorm; None where its class is not known to be one."""
    if type(norm).forward in _NORM_FORWARDS:
        act, parameter = norm._act() if options_of(norm).activation is not None else (0, 0.0)
        return [_ACTS[act](parameter)] if act else []
    if type(norm).__name__ == _FROZEN:
        return []
    if isinstance(norm, Ruled):
        rule = norm._read
    elif (found := recognise(norm)) is not None and found.kind is not None:
        assert found.rule is not None
        rule = found.rule
    else:
        return None
    if rule.kind not in ("batch", "frozen"):
        return None
    return [getattr(norm, name) for name in rule.after]


def _why_not_norm(norm: Any, kind: str) -> str:
    """Why this layer cannot be folded, whatever is beside it; "" where it can."""
    own = "it normalizes each input by that input's own statistics"
    if kind not in (BATCH, INSTANCE) or not isinstance(norm.running_mean, Tensor):
        return own
    if parametrize.is_parametrized(norm):
        return "its parameters are parametrized: remove_parametrizations first"
    if _followers(norm) is None:
        return f"its class {type(norm).__name__} has a forward of its own"
    if not uses_running(norm, kind):
        return (
            "it is in training mode, or does not use its running statistics"
            if norm.training
            else own
        )
    if (axis := options_of(norm).channel_axis) != 1:
        return f"its channels are dimension {axis}, and not those of a layer beside it"
    if has_hooks(norm):
        return "it has hooks, which would see other values"
    scale, shift = arithmetic.affine(norm)
    if not bool(scale.isfinite().all() and shift.isfinite().all()):
        return "its statistics or parameters hold NaN or Inf"
    return ""


def _why_not_linear(layer: Any, names: Counter[int], holders: Counter[int]) -> str:
    """Why nothing can be folded into this layer; "" where it can."""
    if parametrize.is_parametrized(layer):
        return "is parametrized: remove_parametrizations first"
    if type(layer) not in _PLAIN:
        return f"has a class of its own, {type(layer).__name__}"
    if has_hooks(layer):
        return "has hooks, which would see other values"
    if layer.weight.is_meta or not layer.weight.is_floating_point():
        return "has no floating point weights"
    if names[id(layer)] > 1:
        return "stands in the model under several names"
    if any(holders[id(p)] > 1 for p in (layer.weight, layer.bias) if p is not None):
        return "shares its weights with another layer"
    return ""


class _Plan:
    """What is to be folded, in float64, before anything is changed."""

    def __init__(self, model: Module) -> None:
        self.model = model
        self.modules = dict(model.named_modules())
        self.order: Order = find_order(model)
        self.preceding = self.order.preceding()
        every = dict(model.named_modules(remove_duplicate=False))
        self.names = Counter(id(m) for m in every.values())
        self.holders = Counter(
            id(p) for m in model.modules() for p in m._parameters.values() if p is not None
        )
        # of each linear layer: the weight and bias so far, and the layers that ran around it
        self.values: dict[str, tuple[Tensor, Tensor]] = {}
        self.before: dict[str, list[Any]] = {}
        self.after: dict[str, list[Any]] = {}
        self.into: dict[str, tuple[str, str]] = {}
        # what stays of a folded layer
        self.stays: dict[str, list[Module]] = {}

    def _once(self, name: str) -> bool:
        return self.order.calls[name] == 1 and name not in self.order.read

    def _neighbour(self, name: str, step: dict[str, str]) -> str | None:
        """The next linear layer in one direction, over modules that change nothing."""
        at = step.get(name)
        while at is not None and self._once(at) and self._passes(at):
            at = step.get(at)
        if at is None or not isinstance(self.modules[at], LINEAR):
            return None
        return at

    def _passes(self, name: str) -> bool:
        return passes(self.modules[name]) or (name in self.into and name not in self.stays)

    def try_fold(self, name: str, norm: Any, kind: str) -> str:
        """Fold a layer into one beside it, or say why not."""
        reason = _why_not_norm(norm, kind)
        if reason:
            return reason
        if self.names[id(norm)] > 1 or self.order.calls[name] > 1:
            return "it is used in several places"
        if not self._once(name):
            parent = name.rpartition(".")[0] or "the model itself"
            said = self.order.untraced.get(parent)
            return "its place in the model could not be traced" + (f": {said}" if said else "")
        stays = _followers(norm) or []
        stays = [] if all(map(passes, stays)) else stays
        why: list[str] = []
        for side, step in (("before", self.preceding), ("after", self.order.following)):
            into = self._neighbour(name, step)
            if into is None:
                continue
            if side == "after" and stays:
                continue
            no = self._try(into, side, norm, kind)
            if not no:
                self.into[name] = into, side
                if stays:
                    self.stays[name] = stays
                return ""
            why.append(no)
        return "; ".join(why) or "no convolution or linear layer stands alone before or after it"

    def _try(self, into: str, side: str, norm: Any, kind: str) -> str:
        layer: Any = self.modules[into]
        no = _why_not_linear(layer, self.names, self.holders)
        if no or not self._once(into):
            return f"{into}, {side} it, " + (no or "is used in several places")
        if kind == INSTANCE and isinstance(layer, torch.nn.Linear):
            return f"{into}, {side} it, is a Linear, whose output has its channels elsewhere"
        scale, shift = arithmetic.affine(norm)
        w, b = self.values.get(into) or _wide(layer)
        channels = b.numel() if side == "before" else _inputs(layer)
        if scale.numel() != channels:
            return f"{into}, {side} it, has {channels} channels and not {scale.numel()}"
        if side == "before":
            w, b = arithmetic.fold_after(layer, w, b, scale, shift)
        else:
            no = arithmetic.why_not_before(layer, shift)
            if no:
                return no
            w, b = arithmetic.fold_before(layer, w, b, scale, shift)
        dtype = layer.weight.dtype
        if not bool(w.to(dtype).isfinite().all() and b.to(dtype).isfinite().all()):
            return f"the folded weights leave the range of {dtype}"
        self.values[into] = w, b
        if side == "before":
            self.after.setdefault(into, []).append(norm)
        else:
            self.before.setdefault(into, []).insert(0, norm)
        return ""

    def errors(self) -> dict[str, tuple[float, float]]:
        last = {self.into[name][0]: stays for name, stays in self.stays.items()}
        return {
            into: pair_errors(
                self.modules[into],
                self.before.get(into, []),
                self.after.get(into, []),
                last.get(into, []),
                *values,
            )
            for into, values in self.values.items()
        }

    def apply(self) -> Callable[[], None]:
        """Change the model; what is returned changes it back."""
        undo: list[Callable[[], None]] = []
        for into, (w, b) in self.values.items():
            layer: Any = self.modules[into]
            undo.append(_set(layer, layer.weight.detach().clone(), layer.bias))
            with torch.no_grad():
                layer.weight.copy_(w)
                if layer.bias is None:
                    bias = b.to(layer.weight.device, layer.weight.dtype)
                    layer.bias = torch.nn.Parameter(bias, layer.weight.requires_grad)
                else:
                    layer.bias.copy_(b)
        for name, (into, side) in self.into.items():
            parent, _, child = name.rpartition(".")
            holder = self.model.get_submodule(parent)
            was = self.modules[name]
            undo.append(_put(holder, child, was))
            linear = isinstance(self.modules[into], torch.nn.Linear)
            identity: Any = TwoDimensional() if linear else torch.nn.Identity()
            if name in self.stays:
                first = [identity] if linear else []
                identity = torch.nn.Sequential(*first, *self.stays[name])
            # compare() looks for these
            identity.folded_into, identity.folded_side = into, side
            holder._modules[child] = identity.train(was.training)

        def back() -> None:
            for step in reversed(undo):
                step()

        return back


def _wide(layer: Any) -> tuple[Tensor, Tensor]:
    w = layer.weight.detach().double()
    if layer.bias is not None:
        return w, layer.bias.detach().double()
    return w, w.new_zeros(getattr(layer, "out_channels", getattr(layer, "out_features", 0)))


def _inputs(layer: Any) -> int:
    return int(getattr(layer, "in_channels", getattr(layer, "in_features", 0)))


def _set(layer: Any, weight: Tensor, bias: Tensor | None) -> Callable[[], None]:
    kept = None if bias is None else bias.detach().clone()

    def back() -> None:
        with torch.no_grad():
            layer.weight.copy_(weight)
            if kept is None:
                layer.bias = None
            else:
                layer.bias.copy_(kept)

    return back


def _put(holder: Module, child: str, module: Module) -> Callable[[], None]:
    def back() -> None:
        holder._modules[child] = module

    return back


def _exact(model: Module, batch: Any, call: Call | None) -> tuple[list[Tensor], list[Tensor]]:
    """The model's output for a batch, in float64 and in its own dtype."""
    with untouched(model, training=False):
        own = [t.double() for t in tensors(run(model, batch, call))]
        # truenorm's statistics stay wide of themselves; float64 is wider
        wide = copy.deepcopy(model).double()
        return tensors(run(wide, batch, call)), own


def fold(
    model: Module, batch: Any = None, *, call: Call | None = None, inplace: bool = False
) -> Folding:
    """Make normalization by running statistics part of the convolution or linear layer beside it.

    BatchNorm, SyncBatchNorm and InstanceNorm with tracked statistics are y = scale · x + shift in
    evaluation, with scale = weight / sqrt(running_var + eps) and shift = bias − running_mean ·
    scale. After a layer W x + b this is the layer scale · W, scale · b + shift; before it the layer
    W · scale, b + W · shift, as long as no zeros are padded in between. Convolutions and transposed
    convolutions (1d to 3d, with groups) and Linear are folded into; an Identity stays in the place
    of each folded layer. Products are taken in float64 and rounded once.

    A layer is folded only where the output of the one goes to the other alone, as torch.fx reads
    the forwards of the model or of its parts, or as the order of a Sequential says. What cannot be
    folded exactly is kept, with the reason. What `fuse` has changed is unfused first.

    batch: measure the output's error on it, and raise where folding changed the output; a tensor, a
        dictionary (passed by keywords), or a tuple or list whose first item is the input.
    call: how to run the model on the batch, (model, batch) → output.
    inplace: change `model` itself, whose folded layers are then gone for good; else a copy.

    Returns a `Folding`: the model, what was folded with its error against float64, what was kept.

    Errors: TypeError where `model` is no module or `batch` no batch; ValueError for a model in
    training mode, compiled, without normalization layers, or that fails on the batch; RuntimeError
    where the output changed. The model is unchanged then.
    """
    check_model("model", model)
    checks.check_foldable(model, any(options_of(m).statistics_frozen for m in model.modules()))
    if not norms_of(model):
        checks.fail_no_norms("model", model)
    exact = own = None
    if batch is not None:
        if call is None and not is_batch(batch):
            checks.fail_batch("batch", batch)
        exact, own = _exact(model, batch, call)
    target = unfuse(model if inplace else _copied(model))
    plan = _Plan(target)
    kept = []
    found = [(name, m, kind_of(m)) for name, m in norms_of(target)]
    for name, norm, kind in found:
        assert kind is not None
        reason = plan.try_fold(name, norm, kind)
        if reason:
            kept.append(KeptLayer(name, type(norm).__name__, reason))
    errors = plan.errors()
    folded = tuple(
        FoldedLayer(name, type(norm).__name__, *plan.into[name], *errors[plan.into[name][0]])
        for name, norm, _ in found
        if name in plan.into
    )
    back = plan.apply()
    if exact is None or own is None:
        return Folding(target, folded, tuple(kept))
    try:
        with untouched(target, training=False):
            after = [t.double() for t in tensors(run(target, batch, call))]
        error, error_before = share_of_largest(after, exact), share_of_largest(own, exact)
        checks.check_fold_changed_nothing(error, error_before)
    except BaseException:
        back()
        raise
    return Folding(target, folded, tuple(kept), error, error_before)


def _copied(model: Module) -> Module:
    try:
        return copy.deepcopy(model)
    except Exception as error:
        checks.fail_copy(error)
