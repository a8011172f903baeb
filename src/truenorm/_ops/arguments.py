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

from .. import _axes
from .._axes import Axes

Check = Callable[[Sequence[Any]], None]
Differs = Callable[[Any, Any], bool]

# one value per statistic of x
_STATISTICS = "mean", "var", "mean_grad", "mean_grad_x_hat"
_PARAMETERS = "weight", "bias"
# what has no moments where it is empty, and the operator's name in the error
_OF_VALUES = {
    "forward": "forward",
    "forward_act": "forward",
    "forward_act_": "forward",
    "moments": "moments",
    "masked_forward": "masked_forward",
    "masked_backward": "masked_backward",
}
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


def _input(x: Tensor, axes: Axes, *, complex_too: bool) -> None:
    _floating("x", x, x, complex_too=complex_too)
    groups, feature_dims, _ = axes
    dim = x.dim()
    if not 0 <= feature_dims <= dim:
        raise RuntimeError(
            f"`feature_dims` (={feature_dims}) must be from 0 to {dim}, the dimensions of `x` of "
            f"{_shape(x)}: pass how many of the last dimensions share a statistic"
        )
    if feature_dims > 0:
        if groups != 1:
            raise RuntimeError(
                f"`num_groups` (={groups}) must be 1 where `feature_dims` (={feature_dims}) is not "
                "0: pass 1"
            )
        return
    if dim < 2:
        raise RuntimeError(
            f"`x` of {_shape(x)} needs the dimensions (N, C, …): add them with x[None]"
        )
    channels = x.shape[1]
    if type(groups) is not int or (type(channels) is not int and groups >= 0):
        return
    if groups < 0 or (groups > 0 and (channels % groups or groups > max(channels, 1))):
        raise RuntimeError(
            f"`num_groups` (={groups}) must be 0, or divide the {channels} channels of `x` of "
            f"{_shape(x)}: pass a divisor of {channels}"
        )


def _parameter(name: str, p: Tensor, x: Tensor, shape: Sequence[int], differs: Differs) -> None:
    _floating(name, p, x)
    if differs(p.shape, shape):
        raise RuntimeError(
            f"`{name}` must have shape {tuple(shape)}, one value per channel of `x` of "
            f"{_shape(x)}, but got {_shape(p)}: pass one of that shape, or None"
        )


def _statistic(name: str, s: Tensor, x: Tensor, count: int, differs: Differs) -> None:
    _floating(name, s, x)
    if differs(s.numel(), count):
        raise RuntimeError(
            f"`{name}` must hold {count} values, one per statistic of `x` of {_shape(x)}, but got "
            f"{_shape(s)}: pass what was returned for this x and these axes"
        )


def _gradient(grad: Tensor, x: Tensor, differs: Differs) -> None:
    _floating("grad", grad, x, complex_too=x.is_complex())
    if differs(grad.shape, x.shape):
        raise RuntimeError(
            f"`grad` must have the shape of `x`, {tuple(x.shape)}, but got {_shape(grad)}: pass "
            "one like x"
        )


def _residual(residual: Tensor, x: Tensor, differs: Differs) -> None:
    _dense("residual", residual, x)
    if residual.dtype != x.dtype or differs(residual.shape, x.shape):
        raise RuntimeError(
            f"`residual` must have the shape of `x`, {tuple(x.shape)} and its dtype, {x.dtype}, "
            f"but got {_shape(residual)} and {residual.dtype}: pass one like x (truenorm: the "
            "residual's shape and dtype must be the input's)"
        )


def _mask(mask: Tensor, x: Tensor, axes: Axes, differs: Differs) -> None:
    _dense("mask", mask, x)
    n, _, s = _axes.ncs(x.shape, axes)
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


def _needs(needs: int, residual: bool, holds: Tensor | None) -> None:
    if residual:
        meaning = (
            "from 0 to 31, the sum of 1 (of x), 2 (of weight), 4 (of bias), 8 (of residual) and "
            "16 (residual holds the output)"
        )
        _number("needs", needs, 0, 31, meaning)
        if needs & 16 and holds is None:
            raise RuntimeError(
                "`needs` (=16) must be less than 16 where `residual` is None: pass the output as "
                "residual"
            )
    else:
        meaning = "from 0 to 7, the sum of 1 (of x), 2 (of weight) and 4 (of bias)"
        _number("needs", needs, 0, 7, meaning)


# ---------------------------------------------------------------- all of an operator's


def _running_check(places: dict[str, int], differs: Differs) -> Check:
    """Of running statistics that are moved; of x only the shape counts."""

    def check(args: Sequence[Any]) -> None:
        at = {name: args[place] for name, place in places.items()}
        mean, var, x = at["running_mean"], at["running_var"], at["x"]
        _dense("x", x, mean)
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
        count, spans = at["mean"].numel(), at.get("count")
        for name in ("mean", "var"):
            t = at[name]
            _floating(name, t, mean)
            known = type(count) is int and type(features) is int
            wrong = known and (count % features != 0 or (spans is None and count > x.numel()))
            if wrong or differs(t.numel(), count):
                raise RuntimeError(
                    f"`{name}` must hold {features} values, one per channel of `running_mean`, or "
                    f"as many for each sample of `x` of {_shape(x)}, but got {_shape(t)}: pass "
                    "what was returned for this x"
                )
        values = x.numel()
        if spans is None and type(values) is int and type(count) is int and 0 < values < 2 * count:
            raise RuntimeError(
                f"`x` of {_shape(x)} has one value per statistic, which has no variance: pass more "
                "than one"
            )
        if spans is not None and differs(spans.numel(), 1) and differs(spans.numel(), features):
            raise RuntimeError(
                f"`count` must hold one value or {features}, one per channel, but got "
                f"{_shape(spans)}: pass how many values each statistic spans"
            )

    return check


def _check_of(name: str, places: dict[str, int], differs: Differs) -> Check:
    """What looks at the arguments of an operator with these names."""
    if "running_mean" in places:
        return _running_check(places, differs)
    at_x = places["x"]
    at_groups, at_features, at_centred = (
        places.get(n) for n in ("num_groups", "feature_dims", "centred")
    )
    parameters = [(n, places[n]) for n in _PARAMETERS if n in places]
    statistics = [(n, places[n]) for n in _STATISTICS if n in places]
    at_grad, at_residual, at_mask = (places.get(n) for n in ("grad", "residual", "mask"))
    at_needs, at_act, at_size = (places.get(n) for n in ("needs", "act", "size"))
    overwrites = name.endswith("act_")
    of_values = _OF_VALUES.get(name)

    def check(args: Sequence[Any]) -> None:
        x: Tensor = args[at_x]
        axes = Axes(
            0 if at_groups is None else args[at_groups],
            0 if at_features is None else args[at_features],
            True if at_centred is None else args[at_centred],
        )
        # a window's formula holds of complex values too, in plain operators
        _input(x, axes, complex_too=at_size is not None)
        if of_values is not None and any(type(size) is int and size == 0 for size in x.shape):
            raise RuntimeError(
                f"truenorm::{of_values} takes no empty tensor: it has no moments, and `x` has "
                f"{_shape(x)}; pass a tensor that holds values"
            )
        features = axes.feature_dims
        shape = x.shape[x.dim() - features :] if features else x.shape[1:2]
        if at_grad is not None:
            _gradient(args[at_grad], x, differs)
        if at_mask is not None:
            _mask(args[at_mask], x, axes, differs)
        if statistics:
            count = _axes.num_statistics(x.shape, axes)
            for each, place in statistics:
                _statistic(each, args[place], x, count, differs)
        for each, place in parameters:
            if args[place] is not None:
                _parameter(each, args[place], x, shape, differs)
        if at_residual is not None and args[at_residual] is not None:
            _residual(args[at_residual], x, differs)
        if at_needs is not None:
            held = None if at_residual is None else args[at_residual]
            _needs(args[at_needs], at_residual is not None, held)
        if at_act is not None:
            _number(
                "act", args[at_act], 0, _ACTIVATIONS,
                "from 0 to 8 (truenorm: no such activation): see csrc/activation.h",
            )  # fmt: skip
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

    def impl(self, name: str, kernel: Callable[..., Any], key: str) -> None:
        if kernel is not torch.library.fallthrough_kernel:
            kernel = self._checked(name, _on_memory(list(self._places[name]), kernel), operator.ne)
        self.own.impl(name, kernel, key)

    def register_fake(self, name: str, rule: Callable[..., Any]) -> None:
        """The operator's shape rule; sizes that a trace does not know are passed over."""
        checked = self._checked(name, rule, _differs)
        torch.library.register_fake(f"{self.namespace}::{name}", checked)
