"""Norms that other libraries write: truenorm's kernels in the order of casts that each one has.

`compute` is the one place that knows how. A call that truenorm cannot serve better (a compiler's,
a tracer's, under autocast, of a dtype that was not proven) is the class's own forward's.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.nn import Module, Parameter

from .. import _triton, functional
from .._core import activation, added, eager, exporting, route
from .._core.call import ONE_PLUS, ROUNDS
from .._core.library import NATIVE
from .._core.normalize import normalize
from .._core.rule import Rule
from . import _unlike
from ._base import Direct
from ._options import STORE, Attribute

_PLAIN = (Parameter, Tensor)
_RMS, _LAYER = eager.rms(1), eager.layer(1)
# values, of which a call's time is what calls cost
_SMALL = 4096
_SMALL_UNLIKE = 65_536

# kinds whose weights have a shape of their own
_UNLIKE = ("l2", "response", "weight")
ACTS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": torch.nn.functional.silu,
    "sigmoid": torch.sigmoid,
}

Pair = tuple[torch.dtype, torch.dtype]  # of the input, and of the weight


# --- what is computed


def _kernel(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, kind: str, flags: int = 0
) -> Tensor:
    """x̂ · weight + bias over the last dimension, in float32 and rounded once.

    flags: ROUNDS for each step in x's dtype, ONE_PLUS for 1 + weight.
    """
    form = flags | (_LAYER if kind == "layer" else _RMS)
    direct = eager.call(eager.OWN, x, weight, bias, form, eps, (), None)
    if direct is not None:
        return direct
    shape = (x.shape[-1],)
    if kind == "layer":
        call = functional.layer_call(x, shape, weight, bias, eps)
    else:
        call = functional.rms_call(x, shape, weight, eps)
    steps = bool(flags & ROUNDS), bool(flags & ONE_PLUS)
    same = call.form._replace(rounds=steps[0], one_plus=steps[1])
    return normalize(call._replace(form=same, bias=bias))


def scaled_by(weight: Tensor | None, rule: Rule) -> Tensor | None:
    """What x̂ is multiplied by."""
    if weight is None or not rule.offset:
        return weight
    return rule.offset + (weight.float() if rule.wide_offset else weight)


def output_dtype(x: Tensor, weight: Tensor | None, rule: Rule) -> torch.dtype:
    """The dtype that the module's own output has."""
    if weight is None or (rule.rounding == "once" and not rule.wide_output):
        return x.dtype
    if rule.rounding == "to_weight" and weight.dtype in (torch.float16, torch.bfloat16):
        return weight.dtype
    if rule.rounding == "to_weight":
        return torch.promote_types(weight.dtype, torch.float32)
    return torch.promote_types(x.dtype, weight.dtype)


def _one_call(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, rule: Rule
) -> tuple[Tensor | None, int] | None:
    """The weight and the flags by which a kernel does all of it; None where it does not."""
    out = output_dtype(x, weight, rule)
    if out != x.dtype:
        return None
    plus = ONE_PLUS if rule.offset == 1.0 and rule.wide_offset else 0
    if rule.rounding == "once" and (plus or not rule.offset):
        if bias is None or rule.kind == "layer":
            return weight, plus
    elif (
        out.itemsize == 2
        and not rule.offset
        and all(t is None or t.dtype == out for t in (weight, bias))
    ):
        return weight, ROUNDS
    if rule.rounding == "once" or out == torch.float32:
        return scaled_by(weight, rule), 0
    return None


def compute(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, rule: Rule
) -> Tensor:
    """A norm over the last dimension, in the rule's order of casts.

    In float32 every order of casts is the same. Where half precision meets weights of another
    dtype, x̂ is a kernel's result, and the affine step torch's own.
    """
    if (one := _one_call(x, weight, bias, rule)) is not None:
        return _kernel(x, one[0], bias, eps, rule.kind, one[1])
    out, by = output_dtype(x, weight, rule), scaled_by(weight, rule)
    if rule.rounding == "once":
        y = _kernel(x.float(), by, bias, eps, rule.kind)
        return y if y.dtype == out else y.to(out)
    if rule.rounding == "to_weight" and out == torch.float32:
        return _kernel(x.float(), by, bias, eps, rule.kind)
    if rule.rounding == "to_weight" and out != x.dtype:
        y = _kernel(x.float(), None, None, eps, rule.kind).to(out)
    else:
        y = _kernel(x, None, None, eps, rule.kind)
    y = y if by is None else by * y
    return y if bias is None else y + bias


def groups_of(module: Any, rule: Rule, features: int) -> int:
    """How many groups the features are normalized in."""
    if rule.group_size is not None:
        size = rule.group_size
        return features // (getattr(module, size) if isinstance(size, str) else size)
    groups = rule.groups
    return int(getattr(module, groups) if isinstance(groups, str) else groups or 1)


def _in_groups(x: Tensor, weight: Tensor | None, eps: float, rule: Rule, groups: int) -> Tensor:
    if groups == 1:
        return compute(x, weight, None, eps, rule)
    rows = x.unflatten(-1, (groups, -1))
    y = compute(rows, None, None, eps, rule).flatten(-2)
    return y if weight is None else weight * y


def gated(
    x: Tensor, gate: Tensor, weight: Tensor | None, eps: float, rule: Rule, groups: int
) -> Tensor:
    """An RMSNorm of x · act(gate), or one of x, times act(gate): act in float32."""
    by = ACTS[rule.gate_act](gate.float())
    if rule.gate == "within":
        weight = None if weight is None else weight.float()
        return (_in_groups(x.float(), weight, eps, rule, groups) * by).to(x.dtype)
    if rule.gate == "after":
        return (_in_groups(x, weight, eps, rule, groups) * by).to(x.dtype)
    wide = x * by
    if rule.rounding == "once" or x.dtype == output_dtype(x, weight, rule) == torch.float32:
        weight = None if weight is None else weight.float()
        return _in_groups(wide, weight, eps, rule, groups).to(output_dtype(x, weight, rule))
    y = _in_groups(wide, None, eps, rule, groups).to(x.dtype)
    return y if weight is None else weight * y


def _in_order(x: Tensor) -> tuple[list[int], list[int]] | None:
    """The dimensions by falling stride, and the way back; None where the last is not innermost.

    Elementwise operators, which the classes are made of, leave their output so.
    """
    if 0 in x.stride():
        return None
    order = sorted(range(x.dim()), key=x.stride, reverse=True)
    if order[-1] != x.dim() - 1:
        return None
    back = [0] * len(order)
    for place, d in enumerate(order):
        back[d] = place
    return order, back


# --- the activation behind it


def _act_of(module: Module) -> tuple[int, float, bool] | None:
    """(number, parameter, whether rounding before it changes nothing) of an activation."""
    match module:
        case torch.nn.Identity():
            return activation.NONE, 0.0, True
        case torch.nn.ReLU():
            return activation.RELU, 0.0, True
        case torch.nn.ReLU6():
            return activation.RELU6, 0.0, True
        case torch.nn.LeakyReLU():
            return activation.LEAKY_RELU, module.negative_slope, False
        case torch.nn.SiLU():
            return activation.SILU, 0.0, False
        case torch.nn.Hardswish():
            return activation.HARDSWISH, 0.0, False
        case torch.nn.ELU():
            return activation.ELU, module.alpha, False
        case torch.nn.GELU():
            tanh = module.approximate == "tanh"
            return activation.GELU_TANH if tanh else activation.GELU, 0.0, False
    return None


def _bare(module: Module) -> bool:
    """Whether a submodule's call is its class's forward and nothing else."""
    return type(module).__module__.startswith("torch.nn.") and not (
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
    _ours: ClassVar[type[Direct] | None]  # whose forward serves it, where torch's class is its own

    def of_sum(self, x: Tensor, other: Tensor) -> tuple[Tensor, Tensor] | None:
        """(norm(h), h) of h = x + other, for two that are alike; None where no one pass does it."""
        rule = self._rule
        if rule.kind not in ("rms", "layer") or rule.axis != -1 or rule.after or rule.gate:
            return None
        return None if STORE in vars(self) else self._serve(x, None, other)

    def _serve(self, x: Any, gate: Any = None, other: Any = None) -> Any:
        """The output by truenorm's kernels; None where the class's own forward is to run.

        other: what is added to x first; then the pair, with the sum.
        """
        if STORE in vars(self) and self._ours is not None:
            return self._finished(x)  # of frozen statistics or a process group it knows nothing
        if is_compiling() or type(x) is not Tensor or x.dim() not in self._ranks:
            return None
        rule, parameters = self._rule, self._parameters
        # what is held is found without Module.__getattr__, which takes longer than a check
        weight: Any = rule.weight
        if weight is not None:
            weight = parameters[weight] if weight in parameters else getattr(self, weight)
        bias: Any = rule.bias
        if bias is not None:
            bias = parameters[bias] if bias in parameters else getattr(self, bias)
        if (x.dtype, x.dtype if weight is None else weight.dtype) not in self._pairs:
            return None
        if torch.is_autocast_enabled(x.device.type) or exporting.wanted():
            return None
        if (self._is_torchs or rule.kind in _UNLIKE) and _is_faster_there(self, x, rule):
            return None
        layer: Any = self
        ours = self._ours
        if ours is not None and not rule.after and other is None and layer._direct:
            y = layer._directly(x, None)
            if y is not None:
                return y
        channels = (x.shape[rule.axis],)
        for each in (weight, bias):
            if each is None:
                continue
            if type(each) not in _PLAIN or (each.shape != channels and rule.kind not in _UNLIKE):
                return None
        eps = getattr(self, rule.eps) if isinstance(rule.eps, str) else rule.eps
        if eps is None:
            eps = torch.finfo(x.dtype if x.dtype.itemsize > 2 else torch.float32).eps
        if not eps >= 0 or not x.numel() or not _has_kernel(x):
            return None
        if _is_watched(x, weight, bias, gate):
            return None
        if other is not None and ours is not None:
            return ours.forward(layer, x, add=other)
        if other is not None:
            one = _one_call(x, weight, bias, rule)
            if one is None:
                return None
            bits = one[1] | (_LAYER if rule.kind == "layer" else _RMS)
            return added.by_bits(x, other, one[0], bias, bits, float(eps))
        if rule.gate is not None:
            return self._gated(x, gate, weight, float(eps))
        if ours is not None:
            return self._finished(x)
        y = self._placed(x, weight, bias, float(eps))
        return self._followed(y) if rule.after and y is not None else y

    def _followed(self, y: Tensor) -> Tensor:
        """What comes after the norm, by the submodules' own forwards."""
        for name in self._rule.after:
            y = getattr(self, name)(y)
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
            weight, bias = (None if t is None else t.reshape(-1) for t in (weight, bias))
            eps = eps * eps / x.shape[rule.axis]
        if rule.kind == "group":
            groups = groups_of(self, rule, 0)
            return functional.group_norm(x, groups, weight, bias, eps)
        if rule.axis == 1:
            last = x.movedim(1, -1)
            if self._keeps and not last.is_contiguous():
                return None  # two copies would take longer than what is saved
            return compute(last, weight, bias, eps, rule).movedim(-1, 1)
        if x.is_contiguous() or not self._keeps:
            return compute(x.contiguous(), weight, bias, eps, rule)
        if (orders := _in_order(x)) is None:
            return None
        return compute(x.permute(orders[0]), weight, bias, eps, rule).permute(orders[1])

    def _gated(self, x: Tensor, gate: Any, weight: Tensor | None, eps: float) -> Tensor | None:
        if type(gate) is not Tensor or gate.shape != x.shape or gate.dtype != x.dtype:
            return None
        groups = groups_of(self, self._rule, x.shape[-1])
        if x.is_contiguous() or not self._keeps:
            return gated(x.contiguous(), gate, weight, eps, self._rule, groups)
        if (orders := _in_order(x)) is None:
            return None
        x, gate = x.permute(orders[0]), gate.permute(orders[0])
        return gated(x, gate, weight, eps, self._rule, groups).permute(orders[1])

    def _standardized(self, x: Tensor, gain: Tensor | None, eps: float) -> Tensor | None:
        weight: Any = self.weight
        if type(weight) not in _PLAIN or weight.dtype != x.dtype or _is_watched(weight):
            return None
        gain = None if gain is None else gain * getattr(self, "scale", 1.0)
        return _unlike.convolved(x, self, _unlike.standardized(weight, gain, eps))

    def _finished(self, x: Tensor) -> Tensor:
        """By the layer of truenorm's whose state this one has, with what comes after it."""
        assert self._ours is not None
        behind = [getattr(self, name) for name in self._rule.after]
        acts = [each for each in behind if type(each) is not torch.nn.Identity]
        if len(acts) == 1 and all(map(_bare, behind)):
            act = _act_of(acts[0])
            exact = x.dtype == torch.float32 or self._rounding == "once"
            # torch's exponentials take less time, where no gradient is to pass through both
            if act is not None and (act[2] or (exact and torch.is_grad_enabled())):
                return self._ours.forward(self, x, _then=act[:2])  # type: ignore[arg-type,no-any-return]
        return self._followed(self._ours.forward(self, x))  # type: ignore[arg-type]

    def __prepare_scriptable__(self) -> Any:
        """torch.jit.script compiles the class's own forward."""
        plain = self.__new__(self._theirs)
        vars(plain).update(vars(self))
        return plain


def forward_of(own: Callable[..., Any]) -> Callable[..., Any]:
    """A class's forward with truenorm's before it, which takes the calls of one plain tensor."""

    named = list(inspect.signature(own).parameters)[1]

    @functools.wraps(own)
    def forward(self: Ruled, *args: Any, **kwargs: Any) -> Any:
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
        if len(args) + len(kwargs) == 2:
            given = dict(zip(names, args, strict=False)) | kwargs
            if given.keys() == set(names) and given[names[1]] is not None:
                y = self._serve(given[names[0]], given[names[1]])
                if y is not None:
                    return y
        return own(self, *args, **kwargs)

    return forward


def _is_faster_there(layer: Any, x: Tensor, rule: Rule) -> bool:
    """Whether torch takes less time: its layer_norm, or a class's own steps in small sizes."""
    if not x.is_cpu or rule.kind == "l2":
        return False
    if rule.kind == "weight":
        return bool(layer.weight.numel() < _SMALL_UNLIKE)
    if rule.kind == "response":
        return x.numel() < _SMALL_UNLIKE
    return x.numel() < _SMALL or (rule.axis == 1 and x.dtype == torch.float32)


def _has_kernel(x: Tensor) -> bool:
    if x.is_cpu:
        return NATIVE is not None
    return x.is_cuda and not _triton.why_plain(x.device.index)


def _is_watched(*tensors: Tensor | None) -> bool:
    """Whether somebody records, transforms or recasts the operators of this call."""
    x = tensors[0]
    assert x is not None
    return (
        torch._C._len_torch_dispatch_stack() > 0 or route.standard() or route.transformed(*tensors)
    )
