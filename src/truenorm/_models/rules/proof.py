"""A rule is proven before it is applied: the class is run, and must give what its rule says.

On random weights and rows of several sizes, in four pairs of dtypes of input and weight and in
those of the model, a class's output must have the dtype of the formula's and its values: within
float32's own rounding, since a class may take its sums in another order or divide where another
multiplies; in half precision so that no value is off by more than one unit in the last place and
at most one in two hundred is off at all (which float32's rounding does to a few of ten thousand;
another order of casts to every fourth). Gradients must be close. Then truenorm's own result is
held against the class's in the same way.
"""

from __future__ import annotations

import inspect
from types import BuiltinFunctionType, FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.functional import layer_norm
from torch.overrides import TorchFunctionMode

from ..._core.rule import Rule
from ...nn._ruled import Pair
from ...nn._unlike import convolved
from . import trial
from .formulas import formula, standardized

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
# float32 weights first: those of half precision are rounded from them
PAIRS: tuple[Pair, ...] = ((F32, F32), (BF16, F32), (F16, F32), (F16, F16), (BF16, BF16))

# float32: a few roundings of 6e-8, of sums and of what is cancelled in x − E[x]
FLOAT32 = 4e-6
# and of gradients, by norm; classes add those of half-precision weights up in half precision, which
# is off by several hundredths: in float32 a wrong one is found
GRADIENT = {F32: 2e-5, BF16: 0.2, F16: 0.05}
# units in the last place of half precision: relative sizes, and float16's least number
_UNIT = {BF16: (2.0**-7, 1e-38), F16: (2.0**-10, 6e-8)}
_SHARE = 1 / 200
# attributes that truenorm's layer reads as its class does
_AT_EACH_CALL = {
    "batch": ("momentum", "track_running_stats"),
    "weight": ("in_channels", "out_channels", "scale", "stride", "padding", "dilation", "groups"),
}
_VALUES = 4096  # at least so many of an output, so that the share means something


class Proof(NamedTuple):
    """What was found: dtypes and ranks that the rule holds for, or why it does not.

    keeps: whether the output lies in memory as the input does, as elementwise operators leave it;
        else it is contiguous, or channels_last.
    is_torchs: whether all that the class calls is torch's layer_norm.
    asked: by name, the attributes that the forward goes by, as `told` says them.
    """

    pairs: frozenset[Pair] = frozenset()
    ranks: frozenset[int] = frozenset()
    keeps: bool = True
    reason: str = ""
    is_torchs: bool = False
    asked: tuple[tuple[str, Any], ...] = ()


def apart(
    actual: Tensor,
    expected: Tensor,
    steep: bool = False,
    step: torch.dtype | None = None,
    terms: int = 1,
) -> str:
    """How two outputs differ by more than float32's rounding; "" where they do not.

    steep: an activation or a sum came after, whose result near its zeros has the units of what it
        took.
    step: the dtype that x̂ is rounded to before the affine step: a tie there is decided by float32's
        rounding.
    terms: how many products a value is the sum of, whose roundings add up.
    """
    if not isinstance(actual, Tensor):
        return f"its output is a {type(actual).__name__}"
    if actual.shape != expected.shape:
        return f"its output has shape {tuple(actual.shape)}, not {tuple(expected.shape)}"
    if actual.dtype != expected.dtype:
        return f"its output is {actual.dtype}, not {expected.dtype}"
    one, other = actual.detach().double(), expected.detach().double()
    error = (one - other).abs()
    dtype = actual.dtype if step is None else step
    if dtype not in _UNIT:
        scale = other.abs().amax().clamp(min=1.0)
        worst = float((error / scale).max())
        bound = FLOAT32 * max(1.0, terms / 1024) ** 0.5
        return "" if worst <= bound else f"its output is off by {worst:.1e}"
    unit, least = _UNIT[dtype]
    if step is not None:
        unit *= 2  # x̂'s, and where its product is rounded too
    # where terms of the largest size cancel, float32's rounding of these is what is left
    least += FLOAT32 * float(other.abs().amax())
    size = torch.maximum(one.abs(), other.abs())
    if bool((error > unit * (size.clamp(min=4.0) if steep else size) + least).any()):
        return f"its output is off by more than {2 if step else 1} unit(s) in the last place"
    share = float((error > 0).double().mean())
    return "" if share <= _SHARE else f"{share:.0%} of its output's values are rounded otherwise"


def _gradients(y: Tensor, tensors: list[Tensor]) -> list[Tensor | None]:
    generator = torch.Generator().manual_seed(22)
    grad = torch.randn(y.shape, generator=generator).to(y.dtype)
    wanted = [t for t in tensors if t.requires_grad]
    found = torch.autograd.grad(y, wanted, grad, allow_unused=True)
    by = dict(zip(map(id, wanted), found, strict=True))
    return [by.get(id(t)) for t in tensors]


def _gradients_apart(
    actual: list[Tensor | None], expected: list[Tensor | None], dtype: torch.dtype
) -> str:
    for one, other in zip(actual, expected, strict=True):
        if (one is None) != (other is None):
            return "another of its gradients is missing"
        if one is None or other is None:
            continue
        size = float(other.double().norm()) or 1.0
        error = float((one.double() - other.double()).norm()) / size
        if not error <= GRADIENT[dtype]:
            return f"a gradient is off by {error:.1e}"
    return ""


def _shape(features: int, rank: int, axis: int) -> tuple[int, ...]:
    rows = max(28, -(-_VALUES // features))
    if axis == 1:
        side = max(6, -(-rows // 12))
        return {2: (rows, features), 3: (7, features, 2 * side)}.get(
            rank, (7, features, *(1,) * (rank - 4), 2, side)
        )
    return {1: (features,), 2: (rows, features), 3: (2, -(-rows // 2), features)}.get(
        rank, (2, *(1,) * (rank - 4), 2, -(-rows // 4), features)
    )


def shapes_of(rule: Rule, module: Any) -> dict[int, tuple[int, ...]]:
    """By rank, the inputs that a class is tried on."""
    if rule.kind == "weight":
        sides = (2 * each + 5 for each in module.kernel_size)
        return {4: (2, module.in_channels, *sides)}
    if rule.heads:
        held = getattr(module, rule.weight or rule.bias or "")
        rows = max(7, -(-_VALUES // held.numel()))
        return {3: (rows, *held.shape), 4: (2, -(-rows // 2), *held.shape)}
    features = features_of(module)
    ranks = {"frozen": (4,), "group": (3, 4, 5), "response": (4,)}.get(rule.kind, (2, 3, 4))
    held = getattr(module, rule.weight) if rule.weight else None
    if held is not None and held.dim() > 1:
        ranks = (_rank_against(held, rule.axis),)
        if not is_vector(held):
            return {
                ranks[0]: (
                    2,
                    *(each if each > 1 else _VALUES // held.numel() + 3 for each in held.shape),
                )
            }
    if rule.axis == 1:
        ranks = tuple(rank for rank in ranks if rank > 2 or rule.kind == "batch")
    return {rank: _shape(features, rank, rule.axis) for rank in ranks}


def _by_running(x: Tensor, tensors: dict[str, Tensor], eps: float) -> Tensor:
    wide = {role: t.float() for role, t in tensors.items()}
    return formula(x.float(), wide, eps, Rule("frozen", axis=1)).to(x.dtype)


class Subject(NamedTuple):
    """A module as its rule reads it."""

    module: Module
    rule: Rule
    eps: float | None
    groups: int
    names: dict[str, str]  # of weight, bias, running_mean and running_var: the module's own

    def expected(self, made: Any, x: Tensor, gate: Tensor | None = None) -> Tensor:
        tensors = {role: getattr(made, name) for role, name in self.names.items()}
        eps = self.eps
        if eps is None:
            eps = torch.finfo(x.dtype if x.dtype.itemsize > 2 else F32).eps
        rule = self.rule
        if rule.kind == "weight":
            gain = None if rule.weight is None else tensors["weight"] * getattr(made, "scale", 1.0)
            return convolved(x, made, standardized(made.weight, gain, eps))
        if rule.kind == "batch" and not made.training:
            y = _by_running(x, tensors, eps)
        else:
            y = formula(x, tensors, eps, rule, self.groups, gate)
        for name in self.rule.after:
            y = getattr(made, name)(y)
        return y


def is_vector(value: Tensor) -> bool:
    """Whether there is one value for each channel, whatever it is broadcast against."""
    return value.dim() > 0 and value.numel() == max(value.shape)


def axis_of(value: Tensor) -> int:
    """The dimension of an input that a weight of more than one is along: the last or the channels.

    (1, 1, C) is along the last one; (1, C, 1, 1), against x, and (C, 1, 1), against a sample, are
    along the channels.
    """
    return -1 if value.shape[-1] > 1 else 1


def _rank_against(value: Tensor, axis: int) -> int:
    """How many dimensions an input has that such a weight is broadcast against."""
    if not is_vector(value):
        return value.dim() + 1
    return value.dim() + (axis == 1 and value.shape[0] > 1)


def is_told(name: str, value: Any) -> bool:
    """Whether a forward may choose by an attribute of this value."""
    if isinstance(value, (tuple, list, torch.Size)):
        return all(is_told("", each) for each in value)
    # functions too: an activation, say, held as an attribute
    kinds = (bool, int, float, str, type(None), FunctionType, BuiltinFunctionType)
    return name != "training" and isinstance(value, kinds)


def told(value: Any, features: int | None = None) -> Any:
    """A value and its type; the number of features is one, whatever it is."""
    if isinstance(value, (tuple, list)):
        return type(value).__name__, *(told(each, features) for each in value)
    return "features" if type(value) is int and value == features else (value, type(value).__name__)


def _asked(module: Module, rule: Rule, names: set[str]) -> tuple[tuple[str, Any], ...]:
    """Of what a forward has asked for, what truenorm's does not ask anew at each call."""
    at_each_call = {rule.eps, rule.groups, rule.group_size, *_AT_EACH_CALL.get(rule.kind, ())}
    features = features_of(module)
    return tuple(
        (name, told(value))
        for name, value in sorted(vars(module).items())
        if name in names - at_each_call
        and is_told(name, value)
        # with another size the weights would not fit
        and told(value) == told(value, features)
    )


def features_of(module: Module) -> int:
    """How many features have a weight each: sizes of a norm's tensors, or what it says."""
    for place in (module._parameters, module._buffers):
        for value in place.values():
            if value is not None and value.dim():
                return value.shape[-1] if value.shape[-1] > 1 else value.numel()
    shape = getattr(module, "normalized_shape", None)
    return int(shape[-1]) if isinstance(shape, (tuple, list)) and shape else 48


def takes(forward: Any, gate: bool) -> bool:
    """Whether a class's forward can be called with an input and a gate, or an input alone."""
    try:
        signature = inspect.signature(forward)
        signature.bind(*(None,) * (3 if gate else 2))
    except (TypeError, ValueError):
        return False
    # one that may have a gate mostly has one
    return gate or "gate" not in signature.parameters


def compared(subject: Subject, made: Module, x: Tensor, against: Module | None = None) -> str:
    """How a stand-in's call differs from the formula's, or from another stand-in's; "" or why.

    Raises what the stand-in's forward raises.
    """
    rule = subject.rule
    grads = []
    outputs = []
    held = [made, made if against is None else against]
    for index, module in enumerate(held):
        given = [x.clone().requires_grad_()]
        if rule.gate is not None:
            given.append(trial.gate(x).requires_grad_())
        tensors = [*given, *(p for p in module._parameters.values() if p is not None)]
        y = subject.expected(module, *given) if index and against is None else module(*given)
        if not isinstance(y, Tensor):
            return f"its output is a {type(y).__name__}"
        outputs.append(y)
        if not y.requires_grad:
            return "its output has no gradient"
        grads.append(_gradients(y, tensors))
    step = {"cast_first": x.dtype, "to_weight": outputs[0].dtype}.get(rule.rounding)
    # where a rounded product and a bias cancel, the product's units are left too
    steep = bool(rule.after) or (step is not None and rule.bias is not None)
    terms = made.weight[0].numel() if rule.kind == "weight" else 1  # type: ignore[index]
    return apart(outputs[0], outputs[1], steep, step, terms) or _gradients_apart(
        grads[0], grads[1], x.dtype
    )


class _Called(TorchFunctionMode):
    """What of torch's a forward calls, but for what it reads off tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.functions: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__ != "__get__":
            self.functions.append(func)
        return func(*args, **(kwargs or {}))


def _given(rule: Rule, x: Tensor) -> tuple[Tensor, ...]:
    return (x,) if rule.gate is None else (x, trial.gate(x))


def _at_extremes(
    subject: Subject, kind: type[Module], tensors: dict[str, Tensor], shape: tuple[int, ...]
) -> str:
    """How a class differs from its rule where it might clamp, replace or refuse; "" or how.

    Without gradients, by which a forward may choose too.
    """
    rule = subject.rule
    made = trial.stand_in(subject.module, kind, tensors).requires_grad_(False)
    for name in tensors:
        getattr(made, name).mul_(1e3)
    given = _given(
        rule, trial.extremes(trial.inputs(shape, rule, subject.eps or 1e-6, F32), rule.axis)
    )
    with torch.no_grad():
        y, expected = made(*given), subject.expected(made, *given)
    if not torch.equal(y.isnan(), expected.isnan()):
        return "it takes a NaN otherwise"
    return apart(y.nan_to_num(), expected.nan_to_num())


def prove(subject: Subject, kind: type[Module], tensors: dict[str, Tensor]) -> Proof:
    """Run the class in every pair of dtypes and every rank; what holds, or why it does not.

    tensors: those that the rule names, by the module's names.
    """
    rule = subject.rule
    if not takes(kind.forward, rule.gate is not None):
        return Proof(reason="its forward takes more than an input")
    pairs, ranks, asked = set(), set(), set()
    with trial.quiet():
        try:
            made = trial.stand_in(subject.module, kind, tensors)
        except (trial.Unfit, RuntimeError, TypeError) as error:
            return Proof(reason=str(error))
        eps = subject.eps or 1e-6
        shapes = shapes_of(rule, subject.module)
        why = ""
        for training in (True, False):
            made.train(training)
            for rank, shape in shapes.items():
                x = trial.inputs(shape, rule, eps, F32)
                try:
                    difference = compared(subject, made, x)
                except Exception as error:  # whatever a class raises
                    why = f"it cannot be run ({type(error).__name__}: {error})"
                    ranks.discard(rank)
                    continue
                if difference:
                    return Proof(reason=f"not what {rule.words()} gives: {difference}")
                names, changed = trial.watched(made, *_given(rule, x))
                if changed:
                    return Proof(reason=f"its forward changes its attribute {min(changed)!r}")
                asked |= names
                ranks.add(rank)
        if not ranks:
            return Proof(reason=why)
        rank = max(ranks)
        if rule.kind in ("rms", "layer", "l2"):
            try:
                difference = _at_extremes(subject, kind, tensors, shapes[rank])
            except Exception as error:  # whatever a class raises
                difference = f"it cannot be run ({type(error).__name__}: {error})"
            if difference:
                said = "of large values, a NaN or without gradients"
                return Proof(reason=f"not what {rule.words()} gives {said}: {difference}")
        x = trial.inputs(shapes[rank], rule, eps, F32)
        if rule.axis == -1 and rank > 2 and rule.kind != "weight":
            x = x.transpose(0, 1).contiguous().transpose(0, 1)
        with _Called() as called:
            y = made(*_given(rule, x))
        keeps = y.stride() == x.stride()
        for pair in PAIRS if rule.rounding != "steps" else PAIRS[:1]:
            if not tensors and pair[0] != pair[1]:
                continue
            trial.cast(made, pair[1])
            x = trial.inputs(shapes[rank], rule, eps, pair[0])
            try:
                difference = compared(subject, made, x)
            except Exception:  # its own error: for such a pair the class's own forward is called
                continue
            if difference:
                said = f"{pair[0]} with weights of {pair[1]}".replace("torch.", "")
                return Proof(reason=f"not what {rule.words()} gives: {said}, {difference}")
            pairs.add(pair)
    is_torchs = called.functions == [layer_norm]
    told_of = _asked(subject.module, rule, asked)
    return Proof(frozenset(pairs), frozenset(ranks), keeps, is_torchs=is_torchs, asked=told_of)


def agrees(
    subject: Subject,
    theirs: type[Module],
    ours: type[Module],
    proof: Proof,
    tensors: dict[str, Tensor],
) -> str:
    """How truenorm's layer differs from the class in what was proven; "" where it does not."""
    shape = shapes_of(subject.rule, subject.module)[max(proof.ranks)]
    with trial.quiet():
        one, other = (trial.stand_in(subject.module, k, tensors) for k in (ours, theirs))
        for pair in (pair for pair in PAIRS if pair in proof.pairs):
            x = trial.inputs(shape, subject.rule, subject.eps or 1e-6, pair[0])
            if subject.rule.axis == 1 and x.dim() == 4 and proof.keeps:
                # the layout that truenorm serves where the output keeps it
                x = x.contiguous(memory_format=torch.channels_last)
            for module in (one, other):
                trial.cast(module, pair[1])
            # torch rounds the statistics of a half-precision BatchNorm, truenorm on purpose not
            coarse = subject.rule.kind == "batch" and pair[1] != F32
            for training in (False,) if coarse else (True, False):
                one.train(training)
                other.train(training)
                try:
                    difference = compared(subject, one, x, other)
                except Exception as error:
                    difference = f"{type(error).__name__}: {error}"
                if difference:
                    said = f"{pair[0]} with weights of {pair[1]}".replace("torch.", "")
                    return f"truenorm's kernels differ from it: {said}, {difference}"
                # the statistics of evaluation: in half precision each step may round them apart
                for name, value in other._buffers.items():
                    mine = one._buffers[name]
                    if value is None or mine is None:
                        continue
                    if not torch.allclose(mine.double(), value.double(), 2e-2, 1e-6):
                        return f"truenorm's kernels leave another {name!r}"
                    mine.copy_(value)
    return ""
