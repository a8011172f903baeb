"""The operators: schema, plain kernel, shape rule. gradients.py makes them differentiable.

The schemas stand here, not in C++: without a native library the plain kernels still need them. What
`form` holds, call.py says; a record is (3, statistics): means, biased variances, counts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._functorch import pyfunctorch

from .. import _triton
from . import (
    arguments,
    geometry,
    library,  # noqa: F401  (loads the native kernels)
    plain,
    plain_gated,
)
from .call import (
    BY_OUTPUT,
    KEEP,
    NEEDS_BIAS,
    NEEDS_INPUT,
    NEEDS_RESIDUAL,
    NEEDS_WEIGHT,
    axes_of,
    form_of,
)
from .geometry import BATCH
from .graphs.options import install

_CALL = (
    "Tensor? weight, Tensor? bias, Tensor? mask, Tensor? residual, Tensor? mean, Tensor? var,"
    " int form, float eps, float parameter, float padding"
)
_PULLED = (
    "Tensor grad, Tensor x, Tensor record, Tensor? weight, Tensor? bias, Tensor? mask,"
    " Tensor? residual"
)
_RUNNING = "Tensor(a!) running_mean, Tensor(b!) running_var, Tensor(c!)? num_batches_tracked"
_WINDOW = "int size, float alpha, float beta, float k"
_NORM = f"(Tensor x, {_CALL}) -> (Tensor, Tensor)"
# sums: means over all of which x is a part, where there are others
_BACKWARD = (
    f"({_PULLED}, Tensor? sums, int form, float eps, float parameter)"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)
_SCHEMAS = {
    "norm": _NORM,
    "norm_": f"(Tensor(a!) x, {_CALL}) -> Tensor",
    "norm_backward": _BACKWARD,
    # the same in compiled graphs, where nothing is to be differentiated any more: autograd's part
    # of an operator takes longer than a small kernel
    "norm_below": _NORM,
    "norm_backward_below": _BACKWARD,
    # norm(h), h = x + other, and the record; the backward takes the gradients of both. Never in a
    # graph, where a sum and a norm stand apart
    "add_norm": "(Tensor x, Tensor other, Tensor? weight, Tensor? bias, int form, float eps)"
    " -> (Tensor, Tensor, Tensor)",
    "add_norm_backward": "(Tensor grad, Tensor? grad_h, Tensor x, Tensor record, Tensor? weight,"
    " int form, float eps) -> (Tensor, Tensor, Tensor)",
    # beside a gate, of rows (N, C) and the groups of these; order: as call.py has it. Never in a
    # graph either
    "gated_norm": "(Tensor x, Tensor gate, Tensor? weight, int form, float eps, int order)"
    " -> (Tensor, Tensor)",
    "gated_norm_backward": "(Tensor grad, Tensor x, Tensor gate, Tensor record, Tensor? weight,"
    " int form, float eps, int order) -> (Tensor, Tensor, Tensor)",
    "statistics": "(Tensor x, Tensor? mask, int form) -> Tensor",
    "gradient_sums": f"({_PULLED}, int form, float eps, float parameter) -> Tensor",
    "move_": f"({_RUNNING}, Tensor record, float? momentum, bool skip_nonfinite) -> ()",
    # the same once a batch, for compiled graphs: see move_once
    "move_once_": f"({_RUNNING}, Tensor record, float? momentum, bool skip_nonfinite) -> ()",
    "response": f"(Tensor x, {_WINDOW}) -> Tensor",
    "response_backward": f"(Tensor grad, Tensor x, {_WINDOW}) -> Tensor",
}

# The short way's (eager.py): on a CPU alone and never compiled, so without plain kernel and shape
# rule. All three forwards are one function, for each argument takes time. Running statistics move
# unless the form is CONSTANT; momentum NaN averages over all batches. The second output is what the
# backward needs; what is not asked for is undefined, None in Python.
_EAGER = {
    "eager_norm": "(Tensor x, Tensor? weight, Tensor? bias, int form, float eps)"
    " -> (Tensor, Tensor)",
    "eager_norm_given": "(Tensor x, Tensor? weight, Tensor? bias, int form, float eps, Tensor mean,"
    " Tensor var) -> (Tensor, Tensor)",
    "eager_norm_more": "(Tensor x, Tensor? weight, Tensor? bias, int form, float eps,"
    " Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked,"
    " float momentum, Tensor? residual=None, float parameter=0.0) -> (Tensor, Tensor)",
    "eager_norm_backward": "(Tensor grad, Tensor x, Tensor record, Tensor? weight,"
    " Tensor? bias=None, Tensor? residual=None) -> (Tensor, Tensor, Tensor, Tensor)",
    # norm(h), h = x + other, and what the backward needs, which takes the gradients of both
    "eager_add_norm": "(Tensor x, Tensor other, Tensor? weight, Tensor? bias, int form, float eps)"
    " -> (Tensor, Tensor, Tensor)",
    "eager_add_norm_backward": "(Tensor grad, Tensor grad_h, Tensor x, Tensor record,"
    " Tensor? weight) -> (Tensor, Tensor, Tensor)",
    "eager_gated_norm": "(Tensor x, Tensor gate, Tensor? weight, int form, float eps, int order)"
    " -> (Tensor, Tensor)",
    "eager_gated_norm_backward": "(Tensor grad, Tensor x, Tensor gate, Tensor record,"
    " Tensor? weight) -> (Tensor, Tensor, Tensor)",
}

defined = arguments.Library("truenorm")
for _name, _schema in _SCHEMAS.items():
    # a compiler may hand on whatever layout it has: what comes out lies as x does
    defined.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout))
for _name, _schema in _EAGER.items():
    defined.define(_name + _schema)
    # called below autograd only: so no guard is needed to get there
    defined.impl(_name, torch.library.fallthrough_kernel, "Autograd")

# ---------------------------------------------------------------- plain kernels, any device


def parameter_like(
    x: Tensor, weight: Tensor | None, feature_dims: int
) -> tuple[torch.Size, torch.dtype]:
    """Shape and dtype of the gradients of weight and bias."""
    if weight is not None:
        return weight.shape, weight.dtype
    shape = x.shape[-feature_dims:] if feature_dims else x.shape[1:2]
    return shape, torch.promote_types(x.dtype, torch.float32)


def _norm(
    x: Tensor, weight: Any, bias: Any, mask: Any, residual: Any, mean: Any, var: Any, *form: Any
) -> tuple[Tensor, Tensor]:
    bits, *numbers = form
    given = None if mean is None else (mean, var)
    y, record = plain.norm(x, weight, bias, mask, residual, given, form_of(bits, x, *numbers))
    return y, record if bits & KEEP else record.new_empty(0)


def _norm_(x: Tensor, *rest: Any) -> Tensor:
    y, record = _norm(x, *rest)
    x.copy_(y)
    return record


def _norm_backward(
    grad: Tensor, x: Tensor, record: Tensor, weight: Any, bias: Any, mask: Any, residual: Any,
    sums: Any, bits: int, eps: float, parameter: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    form = form_of(bits, x, eps, parameter)
    found = plain.norm_backward(
        *(grad, x, weight, bias, mask, residual, (record[0], record[1]), form),
        by_output=bool(bits & BY_OUTPUT),
        sums=sums,
    )
    shape, dtype = parameter_like(x, weight, form.axes.feature_dims)
    parameters = (
        g.view(shape).to(dtype) if bits & needed else x.new_empty(0, dtype=dtype)
        for g, needed in ((found.weight, NEEDS_WEIGHT), (found.bias, NEEDS_BIAS))
    )
    of_x = found.x if bits & NEEDS_INPUT else x.new_empty(0)
    # without an activation it is grad itself
    of_residual = found.residual.clone() if bits & NEEDS_RESIDUAL else x.new_empty(0)
    return of_x, *parameters, of_residual


def _add_norm(
    x: Tensor, other: Tensor, weight: Any, bias: Any, bits: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    h = geometry.laid_out(x + other, geometry.kept_strides(x, axes_of(bits, x)))
    y, record = _norm(h, weight, bias, *[None] * 4, bits, eps, 0.0, 0.0)
    return y, h, record


def _add_norm_backward(
    grad: Tensor, grad_h: Tensor | None, x: Tensor, record: Tensor, weight: Any, bits: int,
    eps: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    of_x, *parameters, _ = _norm_backward(
        grad, x, record, weight, None, None, None, None, bits, eps, 0.0
    )
    if grad_h is not None and bits & NEEDS_INPUT:
        of_x += grad_h
    return of_x, *parameters


def _statistics(x: Tensor, mask: Tensor | None, bits: int) -> Tensor:
    return plain.statistics(x, mask, axes_of(bits, x))


def _gradient_sums(
    grad: Tensor, x: Tensor, record: Tensor, weight: Any, bias: Any, mask: Any, residual: Any,
    bits: int, eps: float, parameter: float,
) -> Tensor:  # fmt: skip
    return plain.gradient_sums(
        *(grad, x, weight, bias, mask, residual, (record[0], record[1])),
        form_of(bits, x, eps, parameter),
        by_output=bool(bits & BY_OUTPUT),
    )


# Activation checkpointing computes a forward again within the backward pass, which is how that
# is told from a first one, in both of torch's forms of it.
_graph_task = torch._C._current_graph_task_id


def within_backward() -> bool:
    """Whether this runs within a backward pass, on its thread."""
    return _graph_task() != -1


def move_once(*args: Any) -> None:
    """Move running statistics, unless the batch is computed again within a backward pass."""
    if within_backward():
        return
    if torch._C._are_functorch_transforms_active():
        _move_within(pyfunctorch.retrieve_current_functorch_interpreter(), args)
        return
    with torch._C._AutoDispatchBelowAutograd():
        move(*args)


def _move_within(transform: Any, args: tuple[Any, ...]) -> None:
    """The same within a function transform, whose errors are torch's."""
    if not isinstance(transform, (pyfunctorch.GradInterpreter, pyfunctorch.JvpInterpreter)):
        with torch.no_grad():
            plain.move(*args)
        return
    # below it, as torch's own operators: it takes no write to what was not given to it
    unwrap, level = torch._C._functorch._unwrap_for_grad, transform.level()
    below = [unwrap(a, level) if isinstance(a, Tensor) else a for a in args]
    with transform.lower():
        move_once(*below)


PLAIN: dict[str, Callable[..., Any]] = {
    "norm": _norm,
    "norm_": _norm_,
    "norm_backward": _norm_backward,
    "norm_below": _norm,
    "norm_backward_below": _norm_backward,
    "add_norm": _add_norm,
    "add_norm_backward": _add_norm_backward,
    "gated_norm": plain_gated.gated_norm,
    "gated_norm_backward": plain_gated.gated_norm_backward,
    "statistics": _statistics,
    "gradient_sums": _gradient_sums,
    "move_": plain.move,
    "response": plain.response,
    "response_backward": plain.response_backward,
}
for _name, _kernel in PLAIN.items():
    defined.impl(_name, _kernel, "CompositeExplicitAutograd")
    if _name.endswith("_below") or _name.startswith(("add_", "gated_")):
        defined.impl(_name, torch.library.fallthrough_kernel, "Autograd")
# asks, and calls move_, which looks at the arguments: the same on every device
defined.own.impl("move_once_", move_once, "CompositeExplicitAutograd")
_triton.register(defined, PLAIN)

# ---------------------------------------------------------------- shape rules, for the compiler


def statistic_dtype(x: Tensor) -> torch.dtype:
    return torch.float32 if x.device.type == "mps" else torch.float64


def _record_like(x: Tensor, bits: int) -> Tensor:
    shape = 3, geometry.num_statistics(x.shape, axes_of(bits, x))
    return x.new_empty(shape, dtype=statistic_dtype(x))


def _fake_norm(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    install()
    return geometry.empty_result(x, axes_of(rest[-4], x)), _fake_norm_(x, *rest)


def _fake_norm_(x: Tensor, *rest: Any) -> Tensor:
    record = _record_like(x, rest[-4])
    return record if rest[-4] & KEEP else record.new_empty(0)


def _fake_norm_backward(
    grad: Tensor, x: Tensor, record: Any, weight: Any, bias: Any, mask: Any, residual: Any,
    sums: Any, bits: int, *numbers: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    axes = axes_of(bits, x)
    shape, dtype = parameter_like(x, weight, axes.feature_dims)

    def parameter(needed: int) -> Tensor:
        return x.new_empty(shape if bits & needed else 0, dtype=dtype)

    def result(needed: int) -> Tensor:
        return geometry.empty_result(x, axes) if bits & needed else x.new_empty(0)

    pair = parameter(NEEDS_WEIGHT), parameter(NEEDS_BIAS)
    return result(NEEDS_INPUT), *pair, result(NEEDS_RESIDUAL)


def _fake_add_norm(
    x: Tensor, other: Tensor, weight: Any, bias: Any, *numbers: Any
) -> tuple[Tensor, Tensor, Tensor]:
    y, record = _fake_norm(x, *numbers, 0.0, 0.0)
    return y, torch.empty_like(y), record


def _fake_add_norm_backward(
    grad: Tensor, grad_h: Any, x: Tensor, record: Any, weight: Any, *numbers: Any
) -> tuple[Tensor, ...]:
    return _fake_norm_backward(grad, x, record, weight, None, None, None, None, *numbers)[:3]


def _fake_statistics(x: Tensor, mask: Any, bits: int) -> Tensor:
    return _record_like(x, bits)


def _fake_gradient_sums(grad: Tensor, x: Tensor, *rest: Any) -> Tensor:
    n, c, _ = geometry.ncs(x.shape, axes := axes_of(rest[-3], x))
    return x.new_empty((2, n * c if axes.num_groups else c), dtype=statistic_dtype(x))


def _fake_nothing(*args: Any) -> None:
    return None


def _fake_response(x: Tensor, *window: Any) -> Tensor:
    return geometry.empty_result(x, BATCH)


def _fake_response_backward(grad: Tensor, x: Tensor, *window: Any) -> Tensor:
    return geometry.empty_result(x, BATCH)


_RULES: dict[str, Callable[..., Any]] = {
    "norm": _fake_norm,
    "norm_": _fake_norm_,
    "norm_backward": _fake_norm_backward,
    "norm_below": _fake_norm,
    "norm_backward_below": _fake_norm_backward,
    "add_norm": _fake_add_norm,
    "add_norm_backward": _fake_add_norm_backward,
    "gated_norm": plain_gated.fake_gated_norm,
    "gated_norm_backward": plain_gated.fake_gated_norm_backward,
    "statistics": _fake_statistics,
    "gradient_sums": _fake_gradient_sums,
    "move_": _fake_nothing,
    "move_once_": _fake_nothing,
    "response": _fake_response,
    "response_backward": _fake_response_backward,
}
for _name, _rule in _RULES.items():
    defined.register_fake(_name, _rule)


def run(op: Any, *args: Any) -> Any:
    """An operator's kernel: the operator itself in a graph, else straight to what it calls."""
    if torch.compiler.is_compiling():
        return op(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return op._op(*args)


def run_masked(op: Any, x: Tensor, mask: Tensor | None, *args: Any) -> Any:
    """The same of a call with this mask: where each channel has one of its own, the formula."""
    if mask is not None and mask.dim() == x.dim():
        return PLAIN[op._opname](*args)
    return run(op, *args)


_operators = torch.ops.truenorm
norm = _operators.norm.default
norm_ = _operators.norm_.default
norm_backward = _operators.norm_backward.default
add_norm = _operators.add_norm.default
add_norm_backward = _operators.add_norm_backward.default
statistics = _operators.statistics.default
gradient_sums = _operators.gradient_sums.default
move = _operators.move_.default
move_in_graph = _operators.move_once_.default
response = _operators.response.default
response_backward = _operators.response_backward.default
gated_norm = _operators.gated_norm.default
gated_norm_backward = _operators.gated_norm_backward.default
eager_norm = _operators.eager_norm.default
eager_norm_given = _operators.eager_norm_given.default
eager_norm_more = _operators.eager_norm_more.default
eager_norm_backward = _operators.eager_norm_backward.default
eager_add_norm = _operators.eager_add_norm.default
eager_add_norm_backward = _operators.eager_add_norm_backward.default
eager_gated_norm = _operators.eager_gated_norm.default
eager_gated_norm_backward = _operators.eager_gated_norm_backward.default
