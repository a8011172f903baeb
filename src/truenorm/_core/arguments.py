"""What an operator may be given: the twin of csrc/checks.h for all that is not a C++ kernel.

A layer words every error before an operator is called. A graph from disk, an exported program or a
person calls the operator itself, and what does not fit must not reach a kernel, which would read
past its end. So every operator is defined, implemented and given its shape rule through one
`Library`, and whatever it registers first looks at the arguments, by their names in the schema.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import geometry, plain_gated
from .call import (
    ACT,
    AS_GIVEN,
    BY_OUTPUT,
    FEATURES,
    GROUPS,
    NEEDS_RESIDUAL,
    PER_CHANNEL,
    ROUNDS,
    axes_of,
)
from .geometry import Axes

Check = Callable[[Sequence[Any]], None]
Differs = Callable[[Any, Any], bool]

# one value per statistic of x
_STATISTICS = "mean", "var"
_PARAMETERS = "weight", "bias"
# what has no moments where it is empty
_OF_VALUES = "norm", "norm_", "norm_below", "add_norm", "gated_norm"
_ACTIVATIONS = 8  # the last number of activation.py


def _differs(given: Any, wanted: Any) -> bool:
    """Whether two sizes or shapes differ, as far as a trace knows them: the rest is a kernel's."""
    if isinstance(wanted, Sequence):
        return len(given) != len(wanted) or any(map(_differs, given, wanted))
    return type(given) is int and type(wanted) is int and given != wanted


def _shape(t: Tensor) -> str:
    return f"shape {tuple(t.shape)}"


# ---------------------------------------------------------------- one argument each


def _dense(name: str, t: Tensor, x: Tensor) -> None:
    if t.layout is not torch.strided or t.is_nested:
        kind = "nested tensor" if t.is_nested else f"tensor of layout {t.layout}"
        raise RuntimeError(f"`{name}` is a {kind}: pass a dense one, e.g. {name}.to_dense()")
    if t.device != x.device:
        raise RuntimeError(
            f"`{name}` is on device {t.device}, but `x` is on {x.device}: move both to one device, "
            f"e.g. {name}.to({str(x.device)!r})"
        )


def _floating(name: str, t: Tensor, x: Tensor, *, complex_too: bool = False) -> None:
    _dense(name, t, x)
    # float8 inputs have plain formulas; torch's own operators do little with such parameters
    narrow = t.itemsize < 2 and name not in ("x", "grad")
    if narrow or not (t.is_floating_point() or (complex_too and t.is_complex())):
        raise RuntimeError(
            f"`{name}` has dtype {t.dtype}: truenorm has no kernel for this dtype; pass "
            f"{name}.float()"
        )


def _wrong_form(form: int) -> str:
    if form < 0:
        return "is negative: pass a sum of its flags"
    if form & 0xF000:
        return "has bits from 12 to 15, which mean nothing here: pass a sum of its flags"
    features, groups = form >> FEATURES & 0xFF, form >> GROUPS
    if groups and (features or form & PER_CHANNEL):
        return "has a `num_groups` beside `feature_dims` or PER_CHANNEL: pass 0"
    if features and form & PER_CHANNEL:
        return "has PER_CHANNEL and `feature_dims`: pass one of them"
    if form & AS_GIVEN and not features:
        return "has AS_GIVEN without `feature_dims`: pass it for trailing dimensions"
    if form & ROUNDS and not features:
        return "has ROUNDS without `feature_dims`: pass it for trailing dimensions"
    return ""


def _record(record: Tensor, meaning: str, wrong: bool) -> None:
    wide = torch.float32 if record.device.type == "mps" else torch.float64
    if record.dtype != wide or record.dim() != 2 or record.shape[0] != 3 or wrong:
        raise RuntimeError(
            f"`record` must be a contiguous float64 tensor, {meaning}, but got {_shape(record)} "
            f"and dtype {record.dtype}: pass the forward's second result"
        )
    if not record.is_contiguous():
        _record(record.T[:1], meaning, True)


def _input(x: Tensor, form: Any, *, complex_too: bool) -> Axes:
    """Which values of x share a statistic, by a number that call.py makes."""
    _floating("x", x, x, complex_too=complex_too)
    dim = x.dim()
    if type(form) is int and (wrong := _wrong_form(form)):
        raise RuntimeError(f"`form` (={form}) {wrong}")
    if dim < 2 and not form >> FEATURES & 0xFF:
        raise RuntimeError(
            f"`x` of {_shape(x)} needs the dimensions (N, C, …): add them with x[None]"
        )
    axes = axes_of(form, x)
    groups, feature_dims, *_ = axes
    if feature_dims > dim:
        raise RuntimeError(
            f"`feature_dims` (={feature_dims}) must be from 0 to {dim}, the dimensions of `x` of "
            f"{_shape(x)}: pass how many of the last dimensions share a statistic"
        )
    if feature_dims:
        return axes
    channels = x.shape[1]
    if type(groups) is not int or type(channels) is not int or form & PER_CHANNEL:
        return axes
    if groups > 0 and (channels % groups or groups > max(channels, 1)):
        raise RuntimeError(
            f"`num_groups` (={groups}) must be 0, or divide the {channels} channels of `x` of "
            f"{_shape(x)}: pass a divisor of {channels}"
        )
    return axes


def _parameter(
    name: str, p: Tensor, x: Tensor, shape: Sequence[int], rows: Any, differs: Differs
) -> None:
    """rows: how many samples there are, where a row of p may be one part's; else None."""
    _floating(name, p, x)
    if differs(p.shape if rows is None else p.shape[1:], shape) or _no_parts(p, rows):
        raise RuntimeError(
            f"`{name}` must have shape {tuple(shape)}, one value per channel of `x` of "
            f"{_shape(x)}, but got {_shape(p)}: pass one of that shape, or None"
            + (
                ""
                if rows is None
                else ", or as many rows of it as divide the samples, for weight and bias alike"
            )
        )


def _no_parts(p: Tensor, rows: Any) -> bool:
    if rows is None or type(rows) is not int or type(p.shape[0]) is not int:
        return False
    return bool(rows % p.shape[0] if p.shape[0] else rows)


def _as_many_parts(weight: Tensor, bias: Tensor | None, differs: Differs) -> None:
    if bias is not None and differs(bias.shape[0], weight.shape[0]):
        raise RuntimeError(
            f"`bias` must have as many rows as `weight`, {weight.shape[0]}, but got "
            f"{_shape(bias)}: pass one for each"
        )


def _statistic(name: str, s: Tensor, x: Tensor, count: int, differs: Differs) -> None:
    _floating(name, s, x)
    if differs(s.numel(), count):
        raise RuntimeError(
            f"`{name}` must hold {count} values, one per statistic of `x` of {_shape(x)}, but got "
            f"{_shape(s)}: pass what was returned for this x and these axes"
        )


def _sums(sums: Tensor, x: Tensor, count: int, differs: Differs) -> None:
    _floating("sums", sums, x)
    if differs(sums.numel(), 2 * count):
        raise RuntimeError(
            f"`sums` must hold 2 values for each of the {count} statistics of `x` of {_shape(x)}, "
            f"but got {_shape(sums)}: pass two rows, the means of weight · grad · x̂ and of "
            "weight · grad"
        )


def _gradient(grad: Tensor, x: Tensor, differs: Differs, name: str = "grad") -> None:
    _floating(name, grad, x, complex_too=x.is_complex())
    if differs(grad.shape, x.shape):
        raise RuntimeError(
            f"`{name}` must have the shape of `x`, {tuple(x.shape)}, but got {_shape(grad)}: pass "
            "one like x"
        )


def _alike(name: str, t: Tensor, x: Tensor, differs: Differs) -> None:
    _dense(name, t, x)
    if t.dtype != x.dtype or differs(t.shape, x.shape):
        raise RuntimeError(
            f"`{name}` must have the shape of `x`, {tuple(x.shape)} and its dtype, {x.dtype}, "
            f"but got {_shape(t)} and {t.dtype}: pass one like x (truenorm: the "
            f"{name}'s shape and dtype must be the input's)"
        )


def _mask(mask: Tensor, x: Tensor, axes: Axes, differs: Differs) -> None:
    _dense("mask", mask, x)
    n, _, s = geometry.ncs(x.shape, axes)
    if mask.dtype != torch.bool or differs(mask.numel(), n * s):
        raise RuntimeError(
            "truenorm: a mask must be a contiguous boolean tensor (N, *positions): `mask` must "
            f"hold {n * s} values for `x` of {_shape(x)}, but got {_shape(mask)} and dtype "
            f"{mask.dtype}; pass mask.bool().contiguous()"
        )


def _written(name: str, t: Tensor) -> None:
    sizes = zip(t.stride(), t.shape, strict=True)
    if any(type(step) is int and step == 0 and size != 1 for step, size in sizes):
        raise RuntimeError(
            f"`{name}` of {_shape(t)} is expanded: several of its elements are one in memory, and "
            f"it is written to; pass {name}.contiguous()"
        )


def _number(name: str, value: int, least: int, most: int | None, meaning: str) -> None:
    if type(value) is int and (value < least or (most is not None and value > most)):
        raise RuntimeError(f"`{name}` (={value}) must be {meaning}")


# ---------------------------------------------------------------- all of an operator's


def _running_check(places: dict[str, int], differs: Differs) -> Check:
    """Of running statistics that are moved."""

    def check(args: Sequence[Any]) -> None:
        at = {name: args[place] for name, place in places.items()}
        mean, var = at["running_mean"], at["running_var"]
        features = mean.numel()
        for name, t in (("running_mean", mean), ("running_var", var)):
            _floating(name, t, mean)
            if t.dim() != 1 or features == 0 or differs(t.numel(), features):
                raise RuntimeError(
                    f"`{name}` must be of shape (C,), one value per channel, but got {_shape(t)} "
                    f"and dtype {t.dtype}"
                )
            _written(name, t)
        batches = at["num_batches_tracked"]
        if batches is None:
            if at["momentum"] is None:
                raise RuntimeError(
                    "`num_batches_tracked` must be a tensor where `momentum` is None: pass the "
                    "count of batches, or a momentum"
                )
        elif batches.dtype != torch.int64 or differs(batches.numel(), 1):
            raise RuntimeError(
                "`num_batches_tracked` must be one torch.int64 value, but got "
                f"{_shape(batches)} and dtype {batches.dtype}"
            )
        else:
            _dense("num_batches_tracked", batches, mean)
        record = at["record"]
        _dense("record", record, mean)
        known = type(record.numel()) is int and type(features) is int
        meaning = (
            "whose columns are as many as the channels of `running_mean`, or as many for each "
            "sample"
        )
        _record(record, meaning, known and record.numel() % (3 * features) != 0)

    return check


def _check_of(name: str, places: dict[str, int], differs: Differs) -> Check:
    """What looks at the arguments of an operator with these names."""
    if "running_mean" in places:
        return _running_check(places, differs)
    at_x = places["x"]
    at_form = places.get("form")
    parameters = [(n, places[n]) for n in _PARAMETERS if n in places]
    statistics = [(n, places[n]) for n in _STATISTICS if n in places]
    at_record, at_sums = places.get("record"), places.get("sums")
    at_grad, at_residual, at_mask = (places.get(n) for n in ("grad", "residual", "mask"))
    at_size, overwrites, operator_name = places.get("size"), name == "norm_", name
    of_values = name in _OF_VALUES
    # what an operator of a sum and its norm has beside a norm's
    at_other, at_grad_h = places.get("other"), places.get("grad_h")
    of_sum = name.startswith("add_")
    at_gate = places.get("gate")

    def check(args: Sequence[Any]) -> None:
        x: Tensor = args[at_x]
        form = 0 if at_form is None else args[at_form]
        # a window's formula holds of complex values too, in plain operators
        axes = _input(x, form, complex_too=at_size is not None)
        asked = of_values and ("mean" not in places or args[places["mean"]] is None)
        if asked and any(type(size) is int and size == 0 for size in x.shape):
            raise RuntimeError(
                f"truenorm::norm takes no empty tensor: it has no moments, and `x` has "
                f"{_shape(x)}; pass a tensor that holds values"
            )
        features = axes.feature_dims
        shape = x.shape[x.dim() - features :] if features else x.shape[1:2]
        if at_grad is not None:
            _gradient(args[at_grad], x, differs)
        if at_other is not None:
            _alike("other", args[at_other], x, differs)
        if at_grad_h is not None and args[at_grad_h] is not None:
            _gradient(args[at_grad_h], x, differs, "grad_h")
        if at_gate is not None:
            plain_gated.check(x, form, args[places["order"]])
            _alike("gate", args[at_gate], x, differs)
        if of_sum and (not axes.feature_dims or form >> ACT & 0xFF):
            raise RuntimeError(
                f"`form` (={form}) must be one over trailing dimensions, without an activation: "
                "pass a norm alone"
            )
        if at_mask is not None and args[at_mask] is not None:
            _mask(args[at_mask], x, axes, differs)
        if at_form is not None:
            count = geometry.num_statistics(x.shape, axes)
        given = {name: args[place] for name, place in statistics if args[place] is not None}
        if len(given) == 1:
            there, other = ("mean", "var") if "mean" in given else ("var", "mean")
            raise RuntimeError(f"`{there}` is given and `{other}` is not: pass both, or neither")
        for each_name, each in given.items():
            _statistic(each_name, each, x, count, differs)
        weight = args[places["weight"]] if parameters else None
        samples = None
        if weight is not None and weight.dim() == len(shape) + 1 and at_gate is None:
            samples = geometry.ncs(x.shape, axes)[0]
        for each, place in parameters:
            if args[place] is not None:
                _parameter(each, args[place], x, shape, samples, differs)
        if weight is not None and samples is not None:
            _as_many_parts(weight, args[places["bias"]], differs)
            if operator_name == "gradient_sums":
                _parameter("weight", weight, x, shape, None, differs)
        residual = None if at_residual is None else args[at_residual]
        more = residual is not None or (parameters and form >> ACT & 0xFF)
        more = more or (at_grad is not None and form & NEEDS_RESIDUAL)
        if form & AS_GIVEN and (more or samples is not None):
            raise RuntimeError(
                "`form` has AS_GIVEN beside an activation, a residual, or weights for parts of "
                "the samples: pass a norm alone"
            )
        if residual is not None:
            _alike("residual", residual, x, differs)
        if at_form is not None:
            _number(
                "act", form >> ACT & 0xFF, 0, _ACTIVATIONS,
                "from 0 to 8 (truenorm: no such activation): see csrc/activation.h",
            )  # fmt: skip
            if form & BY_OUTPUT and at_residual is not None and args[at_residual] is None:
                raise RuntimeError(
                    "`needs` (=16) must be less than 16 where `residual` is None: pass the output "
                    "as residual"
                )
        if at_sums is not None and args[at_sums] is not None:
            _sums(args[at_sums], x, count, differs)
        if at_record is not None:
            _dense("record", args[at_record], x)
            meaning = "of three rows with one value per statistic of x"
            _record(args[at_record], meaning, differs(args[at_record].numel(), 3 * count))
        if operator_name == "gradient_sums" and axes.feature_dims:
            raise RuntimeError(
                f"`form` (={form}) has `feature_dims`, whose statistics lie in one process: pass 0"
            )
        if at_size is not None:
            _number("size", args[at_size], 1, None, "at least 1, the channels of a window")
        if overwrites:
            _written("x", x)

    return check


def _on_memory(names: Sequence[str], kernel: Callable[..., Any]) -> Callable[..., Any]:
    """A kernel that is not called on a storage that was freed, which torch's operators read."""

    @functools.wraps(kernel)
    def on_memory(*args: Any) -> Any:
        for name, each in zip(names, args, strict=True):
            if isinstance(each, Tensor) and each.numel() > 0 and each.data_ptr() == 0:
                raise RuntimeError(
                    f"`{name}` of {_shape(each)} has no memory: its storage was freed; pass a "
                    "tensor that holds its values"
                )
        return kernel(*args)

    return on_memory


class Library:
    """A torch.library.Library, all of whose operators look at their arguments first."""

    def __init__(self, namespace: str) -> None:
        self.namespace = namespace
        self.own = torch.library.Library(namespace, "DEF")
        self._places: dict[str, dict[str, int]] = {}
        self._required: dict[str, tuple[int, ...]] = {}

    def define(self, schema: str, *, tags: Any = ()) -> None:
        parsed = torch._C.parse_schema(schema)
        self._places[parsed.name] = {a.name: i for i, a in enumerate(parsed.arguments)}
        # for which the dispatcher lets None pass
        required = (i for i, a in enumerate(parsed.arguments) if str(a.type) == "Tensor")
        self._required[parsed.name] = tuple(required)
        self.own.define(schema, tags=tags)

    def _checked(self, name: str, body: Callable[..., Any], differs: Differs) -> Any:
        check = _check_of(name, self._places[name], differs)
        names, required = list(self._places[name]), self._required[name]

        @functools.wraps(body)
        def checked(*args: Any) -> Any:
            for place in required:
                if args[place] is None:
                    raise RuntimeError(f"`{names[place]}` is None, and may not be: pass a tensor")
            check(args)
            return body(*args)

        return checked

    def checked(self, name: str, kernel: Callable[..., Any]) -> Any:
        """A kernel of this operator that looks at its arguments first."""
        return self._checked(name, _on_memory(list(self._places[name]), kernel), operator.ne)

    def impl(self, name: str, kernel: Callable[..., Any], key: str) -> None:
        if kernel is not torch.library.fallthrough_kernel:
            kernel = self.checked(name, kernel)
        self.own.impl(name, kernel, key)

    def register_fake(self, name: str, rule: Callable[..., Any]) -> None:
        """The operator's shape rule; sizes that a trace does not know are passed over."""
        checked = self._checked(name, rule, _differs)
        torch.library.register_fake(f"{self.namespace}::{name}", checked)
