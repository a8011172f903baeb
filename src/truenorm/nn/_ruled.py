"""Norms that other libraries write: layers of their classes, with truenorm's forward before theirs.

A call that truenorm cannot serve better (a compiler's, a tracer's, under autocast, of a dtype that
was not proven) is the class's own forward's.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.nn import Module, Parameter

from .. import functional
from .._core import activation, eager, exporting
from .._core.call import AS_GIVEN
from .._core.library import NATIVE
from .._core.route import has_kernel
from .._core.rule import Rule
from . import _unlike
from ._base import Direct
from ._leaving import is_faster_there, is_watched
from ._options import STORE, Attribute
from ._orders import (
    compute,
    fit_heads,
    form_at_once,
    gated,
    gated_at_once,
    groups_of,
    has_pass,
    in_order,
    of_sum,
    scaled_by,
)

_PLAIN = (Parameter, Tensor)
# takes no argument, whose reading takes longer than the question
_any_autocast = torch._C._is_any_autocast_enabled

# kinds whose weights have a shape of their own, and whose steps a class may take sooner
UNLIKE = ("l2", "response", "weight")
Pair = tuple[torch.dtype, torch.dtype]  # of the input, and of the weight


# --- the activation behind it


# (number, parameter, whether rounding before it changes nothing) of an activation
_ACTS: dict[type[Module], Callable[[Any], tuple[int, float, bool]]] = {
    torch.nn.ReLU: lambda _: (activation.RELU, 0.0, True),
    torch.nn.ReLU6: lambda _: (activation.RELU6, 0.0, True),
    torch.nn.LeakyReLU: lambda act: (activation.LEAKY_RELU, act.negative_slope, False),
    torch.nn.SiLU: lambda _: (activation.SILU, 0.0, False),
    torch.nn.Hardswish: lambda _: (activation.HARDSWISH, 0.0, False),
    torch.nn.ELU: lambda act: (activation.ELU, act.alpha, False),
    torch.nn.GELU: lambda act: (
        activation.GELU_TANH if act.approximate == "tanh" else activation.GELU, 0.0, False,
    ),
}  # fmt: skip


# of half precision: of those with an exponential torch's take less time than a kernel's
_SHORT = activation.LEAKY_RELU, activation.HARDSWISH


def _bare(module: Module) -> bool:
    """Whether the call of one of torch's modules is its class's forward and nothing else."""
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in vars(module)
    )


# --- the layer


class FromModule(Attribute):
    """A name of truenorm's, read off a module that calls it something else."""

    def __init__(self, name: str, read: Callable[[Any], Any]) -> None:
        super().__init__(name)
        self.read = read

    # without __set__: what stands in an instance's __dict__ comes first
    def __get__(self, layer: Any, kind: Any = None) -> Any:
        if layer is None:
            raise AttributeError(self.name)
        return self.read(layer)


class Hidden(Attribute):
    """A name of torch's layer's that the module's own class does not have."""

    def __get__(self, layer: Any, kind: Any = None) -> Any:
        raise AttributeError(self.name)


class Ruled(Module):
    """A layer of another library's class, computed by truenorm; each class is made for one rule.

    y = x̂ · (offset + weight) + bias, in the order of casts that `_rule` names. Training and
    evaluation as the class has them.
    """

    _theirs: ClassVar[type[Module]]
    _read: ClassVar[Rule]  # the module's own
    _rule: ClassVar[Rule]  # what is computed: that, or a single rounding
    _rounding: ClassVar[str]  # "module" or "once"
    _pairs: ClassVar[frozenset[Pair]]  # of dtypes, proven
    _ranks: ClassVar[frozenset[int]]
    _keeps: ClassVar[bool]  # whether the class's output lies in memory as its input does
    _is_torchs: ClassVar[bool]  # whether the class's own forward is torch's layer_norm
    _may_be_left: ClassVar[bool]  # whether calls may be left to the class's own forward for speed
    _proof: ClassVar[Any]  # what these are from
    _ours: ClassVar[type[Direct] | None]  # whose forward serves it, where torch's class is its own
    _has_one_call: ClassVar[bool]  # whether one call may be all of it, and is not left to the class
    # by dtypes of x, weight and bias: the form of that call, None for none
    _forms: ClassVar[dict[tuple[Any, ...], int | None]]

    def of_sum(self, x: Tensor, other: Tensor) -> tuple[Tensor, Tensor] | None:
        """(norm(h), h) of h = x + other, for two that are alike; None where no one pass does it."""
        rule = self._rule
        if not has_pass(rule):
            return None
        return None if STORE in vars(self) else self._serve(x, None, other)

    def _serve(self, x: Any, gate: Any = None, other: Any = None) -> Any:
        """The output by truenorm's kernels; None where the class's own forward is to run.

        other: what is added to x first; then the pair, with the sum.
        """
        if STORE in vars(self) and self._ours is not None:
            return self._finished(x)  # of frozen statistics or a process group it knows nothing
        if is_dynamo_compiling() or type(x) is not Tensor:
            return None
        rule, parameters = self._rule, self._parameters
        if self._has_one_call and other is None:
            y = self._at_once(x, gate)
            if y is not None:
                return y
        if x.dim() not in self._ranks:
            return None
        if self._may_be_left and is_faster_there(self, x, rule):
            return None
        # what is held is found without Module.__getattr__, which takes longer than a check
        weight: Any = rule.weight
        if weight is not None:
            weight = parameters[weight] if weight in parameters else getattr(self, weight)
        bias: Any = rule.bias
        if bias is not None:
            bias = parameters[bias] if bias in parameters else getattr(self, bias)
        if (x.dtype, x.dtype if weight is None else weight.dtype) not in self._pairs:
            return None
        if _any_autocast() and torch.is_autocast_enabled(x.device.type):
            return None
        layer: Any = self
        ours = self._ours
        if ours is not None and other is None and layer._direct:
            after, behind = self._behind(x) if rule.after else (None, ())
            y = layer._directly(x, after)
            if y is not None:
                for each in behind:
                    y = each(y)
                return y
        # on a GPU not measured
        if rule.heads and not (x.is_cpu and fit_heads(x, weight, bias)):
            return None
        channels = (x.shape[rule.axis],)
        for each in (weight, bias):
            if each is None:
                continue
            if type(each) not in _PLAIN:
                return None
            if each.shape == channels or rule.kind in UNLIKE or rule.heads:
                continue
            if each.dim() == 1 or each.numel() != channels[0]:
                return None
        eps = getattr(self, rule.eps) if isinstance(rule.eps, str) else rule.eps
        if eps is None:
            eps = torch.finfo(x.dtype if x.dtype.itemsize > 2 else torch.float32).eps
        if not eps >= 0 or not x.numel():
            return None
        if not (NATIVE is not None and x.is_cpu and eager.is_plain(x, weight, bias, gate)) and (
            exporting.wanted() or not has_kernel(x) or is_watched(x, weight, bias, gate)
        ):
            return None
        if other is not None and ours is not None:
            return ours.forward(layer, x, add=other)
        if other is not None:
            return of_sum(x, other, weight, bias, float(eps), rule)
        if rule.gate is not None:
            return self._gated(x, gate, weight, float(eps))
        if ours is not None:
            return self._finished(x)
        y = self._placed(x, weight, bias, float(eps))
        return self._followed(y) if rule.after and y is not None else y

    def _at_once(self, x: Tensor, gate: Any) -> Tensor | None:
        """The output where one call is all of it; None where more is to be asked.

        A small input's time is what is asked. What is not plain the call itself refuses.
        """
        rule, held, forms = self._rule, self._parameters, self._forms
        try:
            weight = None if rule.weight is None else held[rule.weight]
            bias = None if rule.bias is None else held[rule.bias]
            of_weight = x.dtype if weight is None else weight.dtype
            key = x.dtype, of_weight, None if bias is None else bias.dtype
            if key not in forms:
                proven = key[:2] in self._pairs
                forms[key] = form_at_once(x, weight, bias, rule) if proven else None
            form = forms[key]
            eps = getattr(self, rule.eps) if type(rule.eps) is str else rule.eps
            dims = 2 if rule.heads else 1
            if (
                form is None
                or NATIVE is None
                or x.dim() not in self._ranks
                or not x.is_contiguous()
                or not (weight is None or (type(weight) in _PLAIN and weight.dim() == dims))
                or not (bias is None or (type(bias) in _PLAIN and bias.dim() == dims))
                or type(eps) is not float
                or not eps >= 0
                or (_any_autocast() and torch.is_autocast_enabled(x.device.type))
            ):
                return None
            if rule.gate is not None:
                groups = groups_of(self, rule, x.shape[-1])
                return gated_at_once(x, gate, weight, eps, rule, groups)
            if rule.heads:
                # on a GPU not measured
                if weight is None or weight.shape[0] == 1 or not x.is_cpu:
                    return None
                form |= eager.group(weight.shape[0])
            elif rule.kind == "l2":
                # F.normalize divides by at least eps: that counts where ‖x‖ is no larger
                eps = eps * eps / x.shape[-1]
        # not held here, or of no dtype or shape
        except (AttributeError, KeyError, RuntimeError):
            return None
        return eager.call(eager.OWN, x, weight, bias, form, eps, (), None)

    def _followers(self) -> Sequence[Module]:
        """What comes after the norm, but for what does nothing."""
        found, modules = [], self._modules
        for name in self._rule.after:
            each: Any = modules[name] if name in modules else getattr(self, name)
            if type(each) is not torch.nn.Identity or not _bare(each):
                found.append(each)
        return found

    def _followed(self, y: Tensor) -> Tensor:
        """What comes after the norm, by the submodules' own forwards."""
        for each in self._followers():
            y = each(y)
        return y

    def _placed(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> Tensor | None:
        rule = self._rule
        if rule.kind == "frozen":
            mean, var = self.running_mean, self.running_var
            return functional.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)  # type: ignore[arg-type]
        if rule.kind == "weight":
            return self._standardized(x, weight, eps)
        if rule.kind == "response":
            assert weight is not None
            assert bias is not None
            return _unlike.response(x, weight, bias, eps, rule.axis)
        if rule.kind == "l2":
            # F.normalize divides by at least eps: that counts where ‖x‖ is no larger
            eps = eps * eps / x.shape[rule.axis]
            by = scaled_by(weight, rule)
            if by is not None and by.numel() != x.shape[rule.axis]:
                # of heads, say: (H, 1, C)
                if rule.axis == 1 or by.shape[-1] != x.shape[-1]:
                    return None
                y = self._along(x, None, None, eps)
                return y if y is None else y * by
        if rule.kind == "group":
            groups = groups_of(self, rule, 0)
            return functional.group_norm(x, groups, weight, bias, eps)
        return self._along(x, weight, bias, eps)

    def _along(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> Tensor | None:
        """Of each vector along the rule's axis, weight and bias being vectors too."""
        rule = self._rule
        if not rule.heads:
            weight, bias = (
                t if t is None or t.dim() == 1 else t.reshape(-1) for t in (weight, bias)
            )
        if rule.axis == 1:
            last = x.movedim(1, -1)
            if not self._keeps or last.is_contiguous():
                return compute(last, weight, bias, eps, rule).movedim(-1, 1)
            if not x.is_contiguous():
                return None
            return compute(last, weight, bias, eps, rule, AS_GIVEN).movedim(-1, 1)
        if x.is_contiguous() or not self._keeps:
            return compute(x.contiguous(), weight, bias, eps, rule)
        if (orders := in_order(x)) is None or (rule.heads and orders[0][-2] != x.dim() - 2):
            return None
        return compute(x.permute(orders[0]), weight, bias, eps, rule).permute(orders[1])

    def _gated(self, x: Tensor, gate: Any, weight: Tensor | None, eps: float) -> Tensor | None:
        if type(gate) is not Tensor or gate.shape != x.shape or gate.dtype != x.dtype:
            return None
        groups = groups_of(self, self._rule, x.shape[-1])
        if x.is_contiguous() or not self._keeps:
            return gated(x.contiguous(), gate, weight, eps, self._rule, groups)
        if (orders := in_order(x)) is None:
            return None
        x, gate = x.permute(orders[0]), gate.permute(orders[0])
        return gated(x, gate, weight, eps, self._rule, groups).permute(orders[1])

    def _standardized(self, x: Tensor, gain: Tensor | None, eps: float) -> Tensor | None:
        weight: Any = self.weight
        if type(weight) not in _PLAIN or weight.dtype != x.dtype or is_watched(weight):
            return None
        gain = None if gain is None else gain * getattr(self, "scale", 1.0)
        return _unlike.convolved(x, self, _unlike.standardized(weight, gain, eps))

    def _finished(self, x: Tensor) -> Tensor:
        """By the layer of truenorm's whose state this one has, with what comes after it."""
        assert self._ours is not None
        after, behind = self._behind(x, False)
        then = None if after is None else after[1:]
        y: Tensor = self._ours.forward(self, x, _then=then)  # type: ignore[arg-type]
        for each in behind:
            y = each(y)
        return y

    def _behind(
        self, x: Tensor, shortly: bool = True
    ) -> tuple[eager.After | None, Sequence[Module]]:
        """What comes after the norm: what of it is part of the call, and the modules that are not.

        shortly: for the short way, which may round in between.
        """
        behind = self._followers() if self._rule.after else ()
        if len(behind) == 1 and type(behind[0]) in _ACTS and _bare(behind[0]):
            act, parameter, alike = _ACTS[type(behind[0])](behind[0])
            exact = x.dtype == torch.float32 or self._rounding == "once"
            # torch's exponentials take less time, where no gradient is to pass through both
            if alike or (exact and torch.is_grad_enabled()):
                return (None, act, parameter), ()
            if shortly and not exact and act in _SHORT and x.is_cpu and NATIVE is not None:
                return (None, act | eager.STEPPED, parameter), ()
        return None, behind

    def __prepare_scriptable__(self) -> Any:
        """torch.jit.script compiles the class's own forward."""
        plain = self.__new__(self._theirs)
        vars(plain).update(vars(self))
        return plain


def forward_of(
    own: Callable[..., Any], leaves: int = 0, counted: str | None = None
) -> Callable[..., Any]:
    """A class's forward with truenorm's before it, which takes the calls of one plain tensor.

    leaves: of fewer values than that, of the input or else of the parameter `counted`, the class's
        own takes less time on a CPU than any look at it.
    """

    named = list(inspect.signature(own).parameters)[1]

    @functools.wraps(own)
    def forward(self: Ruled, *args: Any, **kwargs: Any) -> Any:
        if leaves and len(args) == 1 and not kwargs and not is_dynamo_compiling():
            x = args[0]
            if type(x) is Tensor and x.is_cpu and STORE not in vars(self):
                of = x if counted is None else self._parameters.get(counted)
                if of is not None and of.numel() < leaves:
                    return own(self, x)
        if len(args) + len(kwargs) == 1 and (args or named in kwargs):
            y = self._serve(args[0] if args else kwargs[named])
            if y is not None:
                return y
        return own(self, *args, **kwargs)

    return forward


def gated_forward_of(own: Callable[..., Any]) -> Callable[..., Any]:
    """The same for a class that takes a gate too; without one its own forward serves."""

    names = list(inspect.signature(own).parameters)[1:3]

    @functools.wraps(own)
    def forward(self: Ruled, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 2 and not kwargs and args[1] is not None:
            y = self._serve(*args)
            if y is not None:
                return y
        elif len(args) + len(kwargs) == 2:
            given = dict(zip(names, args, strict=False)) | kwargs
            if given.keys() == set(names) and given[names[1]] is not None:
                y = self._serve(given[names[0]], given[names[1]])
                if y is not None:
                    return y
        return own(self, *args, **kwargs)

    return forward
