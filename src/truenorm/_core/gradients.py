"""Gradients of the operators, and gradients of those.

First derivatives are a kernel. Second ones differentiate the plain formula of the first, so that
third and higher ones follow by themselves. Several calls whose statistics span processes go through
one node, so that they share an exchange forward and one backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from . import by_plan, operators, plain, recomputed, spanning
from .activation import LEAKY_RELU, RELU, RELU6
from .call import (
    BY_OUTPUT,
    KEEP,
    NEEDS_BIAS,
    NEEDS_INPUT,
    NEEDS_RESIDUAL,
    NEEDS_WEIGHT,
    Form,
    form_of,
)
from .operators import run_masked
from .route import transformed

Grads = tuple[Tensor | None, ...]
_is_compiling = torch.compiler.is_compiling
_is_batch = torch._C._functorch.is_legacy_batchedtensor
_NEEDS = NEEDS_INPUT, NEEDS_WEIGHT, NEEDS_BIAS, NEEDS_RESIDUAL


def _cut(flat: Sequence[Any], size: int) -> Iterator[Any]:
    """A flat list, as autograd wants it, in pieces: one for each call."""
    return (flat[i : i + size] for i in range(0, len(flat), size))


def _flat(pieces: Iterable[Any]) -> list[Any]:
    return [each for piece in pieces for each in piece]


class _Made(NamedTuple):
    """What the backward of some calls knows of them, besides tensors."""

    forms: Sequence[Form]
    by_output: Sequence[bool]
    group: Any


class _Pulled(NamedTuple):
    """What one call's gradients are made of."""

    grad: Tensor
    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    residual: Tensor | None  # or y
    mask: Tensor | None
    record: Tensor


def saves_output(act: int, parameter: float, residual: Tensor | None) -> bool:
    """Whether y is saved rather than the residual: the next layer saves it too."""
    if residual is None or recomputed.asked():
        return False
    # in half precision much of what is below 6 is rounded to 6
    return (
        act == RELU
        or (act == LEAKY_RELU and parameter > 0)
        or (act == RELU6 and residual.element_size() > 2)
    )


def _saved(
    form: Form, by_output: bool, x: Any, weight: Any, bias: Any, residual: Any, mask: Any, y: Any
) -> tuple[Any, ...]:
    """Of a call; without an activation neither bias nor residual is asked for again."""
    if not form.act:
        return x, weight, None, None, mask
    return x, weight, bias, y if by_output else residual, mask


# ---------------------------------------------------------------- first derivatives


def _by_kernel(made: _Made, pulled: Sequence[_Pulled], wanted: Sequence[Any]) -> list[Any]:
    """Gradients of (x, weight, bias, residual), call by call; None for what is not wanted."""
    sums: Sequence[Any] = [None] * len(pulled)
    if made.group is not None:
        sums = spanning.gradient_sums(made.forms, made.by_output, pulled, made.group, wanted)
    found: list[Any] = []
    for form, by_output, p, want, across in zip(
        made.forms, made.by_output, pulled, wanted, sums, strict=True
    ):
        of_x, of_weight, of_bias, of_residual = want
        as_it_is = of_residual and not form.act and p.mask is None
        if across is not None:
            of_weight = of_bias = False
        flags = [of_x, of_weight, of_bias, of_residual and not as_it_is]
        needs = sum(flag for flag, on in zip(_NEEDS, flags, strict=True) if on)
        grads: list[Any] = [None] * 4
        if needs:
            bits, *numbers = form.numbers(p.x, needs | BY_OUTPUT * by_output)
            tensors = p.x, p.record, p.weight, p.bias, p.mask, p.residual
            means = None if across is None else across.means
            made_of = run_masked(
                operators.norm_backward, p.x, p.mask, p.grad, *tensors, means, bits, *numbers
            )
            grads = [g if on else None for g, on in zip(made_of, flags, strict=True)]
        if as_it_is:
            grads[3] = p.grad
        if across is not None:
            grads[1:3] = across.of_parameters
        found += [g if w else None for g, w in zip(grads, want, strict=True)]
    return found


def _by_formula(made: _Made, pulled: Sequence[_Pulled]) -> list[Tensor]:
    """All gradients, as differentiable functions of what is pulled back."""
    found: list[Tensor] = []
    for form, by_output, p in zip(made.forms, made.by_output, pulled, strict=True):
        # mean and variance are functions of x here, unless they are constant
        given = (p.record[0], p.record[1]) if form.constant else None
        g = plain.norm_backward(
            *(p.grad, p.x, p.weight, p.bias, p.mask, p.residual, given, form),
            by_output=by_output,
            total=spanning.total(made.group),
        )
        shape, dtype = operators.parameter_like(p.x, p.weight, form.axes.feature_dims)
        parameters = (t.view(shape).to(dtype) for t in (g.weight, g.bias))
        found += [g.x, *parameters, g.residual]
    return found


def by_operations(grad: Tensor, *others: Tensor | None) -> bool:
    """Whether torch is to see each operation of the gradients.

    Of a batch of gradients (is_grads_batched) torch differentiates what is inside, which a node
    does not.
    """
    return transformed(grad, *others) or (torch.is_grad_enabled() and _is_batch(grad))


def _pull_back(made: _Made, pulled: Sequence[_Pulled], wanted: Sequence[Any]) -> list[Any]:
    if torch.compiler.is_compiling():
        return _by_kernel(made, pulled, wanted)
    if any(by_operations(p.grad, p.x, p.weight, p.bias, p.residual) for p in pulled):
        found: list[Any] = _by_formula(made, pulled)
        return [g if w else None for g, w in zip(found, _flat(wanted), strict=True)]
    if torch.is_grad_enabled():
        return list(NormBackward.apply(made, wanted, *_flat(pulled)))  # type: ignore[no-untyped-call]
    return _by_kernel(made, pulled, wanted)


def pull_back(
    form: Form, needs: int, grad: Tensor, x: Tensor, weight: Any, bias: Any, residual: Any,
    record: Tensor,
) -> list[Any]:  # fmt: skip
    """Gradients of one call's x, weight, bias and residual, which can themselves be differentiated.

    needs: which, and whether residual is y.
    """
    wanted = [[bool(needs & flag) for flag in _NEEDS]]
    pulled = _Pulled(grad, x, weight, bias, residual, None, record)
    return _pull_back(_Made([form], [bool(needs & BY_OUTPUT)], None), [pulled], wanted)


# ---------------------------------------------------------------- the nodes of a graph


class Norm(Function):
    """Outputs of several calls, then their records; of one call alone its output.

    spec: forms, the group of processes, and a list that takes a lone call's record.
    tensors: for each call x, weight, bias, residual, mask, mean, var.
    """

    @staticmethod
    def forward(ctx: Any, spec: Any, *tensors: Any) -> Any:
        forms, group, record = spec
        if group is None:
            return _forward_alone(ctx, forms[0], record, *tensors)
        calls = list(_cut(tensors, 7))
        across = spanning.statistics(forms, [c[0] for c in calls], [c[4] for c in calls], group)
        outputs, by_output = [], []
        saved: list[Any] = []
        for form, (x, weight, bias, residual, mask, *_), (mean, var, _) in zip(
            forms, calls, across, strict=True
        ):
            y, _ = norm(form, x, weight, bias, residual, mask, mean, var, 0)
            output = saves_output(form.act, form.parameter, residual)
            saved += _saved(form, output, x, weight, bias, residual, mask, y)
            by_output.append(output)
            outputs.append(y)
        ctx.save_for_backward(*saved, *across)
        ctx.made = _Made(forms, by_output, group)
        ctx.bias_dtypes = [None if c[2] is None else c[2].dtype for c in calls]
        ctx.mark_non_differentiable(*across)
        return (*outputs, *across)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        made: _Made = ctx.made
        calls = len(made.forms)
        kept = ctx.saved_tensors  # once: checkpointing gives them out only once
        wanted = ctx.needs_input_grad[1:]
        if made.group is None:
            (grad,), (x, *others) = grads, kept
            if not (_is_compiling() or torch.is_grad_enabled() or transformed(grad, x, *others)):
                return _backward_alone(ctx, grad, kept, wanted)
            kept = *kept, ctx.record
        pulled = [
            _Pulled._make((grad, *saved, record))
            for grad, saved, record in zip(
                grads[:calls], _cut(kept[: 5 * calls], 5), kept[5 * calls :], strict=True
            )
        ]
        found = _pull_back(made, pulled, [needs[:4] for needs in _cut(wanted, 7)])
        result: list[Any] = [None]
        for (of_x, of_weight, of_bias, of_residual), dtype in zip(
            _cut(found, 4), ctx.bias_dtypes, strict=True
        ):
            if of_bias is not None and of_bias.dtype != dtype:
                of_bias = of_bias.to(dtype)
            result += [of_x, of_weight, of_bias, of_residual, None, None, None]
        return tuple(result)


# A small input's time is all Python: the usual call, which stands alone, takes few steps.


def _forward_alone(
    ctx: Any, form: Form, keep: list[Tensor], x: Tensor, weight: Any, bias: Any, residual: Any,
    mask: Any, mean: Any, var: Any,
) -> Tensor:  # fmt: skip
    bits, eps, parameter = form.numbers(x, KEEP)
    tensors, numbers = (x, weight, bias, mask, residual, mean, var), (bits, eps, parameter)
    y, record = by_plan.run(operators.norm, tensors, (*numbers, form.padding), 1)
    keep.append(record)
    by_output = form.act > 0 and saves_output(form.act, form.parameter, residual)
    ctx.save_for_backward(*_saved(form, by_output, x, weight, bias, residual, mask, y))
    # neither an input nor an output: as a saved tensor it would be copied twice
    ctx.record = record
    ctx.made = _Made((form,), (by_output,), None)
    ctx.bias_dtypes = (None if bias is None else bias.dtype,)
    return y  # type: ignore[no-any-return]


def _backward_alone(ctx: Any, grad: Tensor, saved: Any, wanted: Any) -> Any:
    x, weight, bias, residual, mask = saved
    (form,), (by_output,), _ = ctx.made
    as_it_is = wanted[3] and not form.act and mask is None
    needs = (
        NEEDS_INPUT * wanted[0]
        | NEEDS_WEIGHT * wanted[1]
        | NEEDS_BIAS * wanted[2]
        | NEEDS_RESIDUAL * (wanted[3] and not as_it_is)
        | BY_OUTPUT * by_output
    )
    numbers = form.numbers(x, needs)
    tensors = grad, x, ctx.record, weight, bias, mask, residual, None
    found = by_plan.run(operators.norm_backward, tensors, numbers, 4)
    of_x, of_weight, of_bias, of_residual = found
    dtype = ctx.bias_dtypes[0]
    return (
        None,
        of_x if wanted[0] else None,
        of_weight if wanted[1] else None,
        (of_bias if of_bias.dtype == dtype else of_bias.to(dtype)) if wanted[2] else None,
        grad if as_it_is else of_residual if wanted[3] else None,
        None,
        None,
        None,
    )


def norm(
    form: Form, x: Any, weight: Any, bias: Any, residual: Any, mask: Any, mean: Any, var: Any,
    flags: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The operator, by its kernel alone."""
    bits, eps, parameter = form.numbers(x, flags)
    args = weight, bias, mask, residual, mean, var, bits, eps, parameter, form.padding
    made: tuple[Tensor, Tensor] = run_masked(operators.norm, x, mask, x, *args)
    return made


class NormBackward(Function):
    """The gradients of `Norm`, differentiable. tensors: those of `_Pulled`, call by call."""

    @staticmethod
    def forward(ctx: Any, made: _Made, wanted: Sequence[Any], *tensors: Any) -> Any:
        ctx.save_for_backward(*tensors)
        ctx.made, ctx.wanted = made, wanted
        ctx.set_materialize_grads(False)
        return tuple(_by_kernel(made, [_Pulled(*p) for p in _cut(tensors, 7)], wanted))

    @staticmethod
    def backward(ctx: Any, *incoming: Any) -> Any:
        made: _Made = ctx.made
        kept = list(_cut(ctx.saved_tensors, 7))

        def gradients(*leaves: Any) -> Sequence[Tensor]:
            five = _cut(leaves, 5)
            return _by_formula(made, [_Pulled(*f, *k[5:]) for f, k in zip(five, kept, strict=True)])

        asked = tuple(g if w else None for g, w in zip(incoming, _flat(ctx.wanted), strict=True))
        leaves = tuple(_flat(k[:5] for k in kept))
        again = differentiate(gradients, leaves, asked)
        return None, None, *_flat((*five, None, None) for five in _cut(again, 5))


def differentiate(
    gradients: Callable[..., Sequence[Tensor]], inputs: Grads, incoming: Grads
) -> Grads:
    """Pull `incoming` back through gradients(*inputs), in a way that is itself differentiable."""
    with torch.enable_grad():
        # views, so that one tensor passed as two inputs counts as two
        views = [i.view_as(i) if i is not None and i.requires_grad else i for i in inputs]
        outputs = gradients(*views)
        used = [
            (output, grad.reshape(output.shape).to(output.dtype))
            for output, grad in zip(outputs, incoming, strict=True)
            if grad is not None and output.requires_grad
        ]
    wanted = [v for v in views if v is not None and v.requires_grad]
    found: Sequence[Tensor | None] = [None] * len(wanted)
    if used and wanted:
        found = torch.autograd.grad(
            [output for output, _ in used],
            wanted,
            [grad for _, grad in used],
            create_graph=torch.is_grad_enabled(),
            allow_unused=True,
        )
    remaining = iter(found)
    return tuple(next(remaining) if v is not None and v.requires_grad else None for v in views)


# ---------------------------------------------------------------- the operators themselves
# The same formulas, for calls of torch.ops.truenorm, as the compiler makes them.


def register(name: str, setup: Callable[..., None], backward: Callable[..., Any]) -> None:
    torch.library.register_autograd(f"truenorm::{name}", backward, setup_context=setup)


def _setup_norm(ctx: Any, inputs: Any, output: Any) -> None:
    x, weight, bias, mask, residual, _, _, bits, *numbers = inputs
    y, record = output
    form = form_of(bits, x, *numbers)
    by_output = saves_output(form.act, form.parameter, residual)
    ctx.mark_non_differentiable(record)
    ctx.save_for_backward(*_saved(form, by_output, x, weight, bias, residual, mask, y), record)
    ctx.made = _Made([form], [by_output], None)
    ctx.bias_dtypes = [None if bias is None else bias.dtype]
    ctx.keeps = bool(bits & KEEP)


def _norm_backward(ctx: Any, grad: Any, *_: Any) -> Any:
    if not ctx.keeps:
        raise RuntimeError(
            "`form` must hold KEEP (=256) where a gradient is to come: the backward reads the "
            "record; pass form | 256"
        )
    of_x, of_weight, of_bias, _mask, of_residual, *_ = ctx.needs_input_grad
    *saved, record = ctx.saved_tensors
    wanted = [[of_x, of_weight, of_bias, of_residual]]
    g_x, g_weight, g_bias, g_residual = _pull_back(
        ctx.made, [_Pulled._make((grad, *saved, record))], wanted
    )
    if g_bias is not None and g_bias.dtype != ctx.bias_dtypes[0]:
        g_bias = g_bias.to(ctx.bias_dtypes[0])
    return g_x, g_weight, g_bias, None, g_residual, *[None] * 6


def _setup_norm_backward(ctx: Any, inputs: Any, output: Any) -> None:
    grad, x, record, weight, bias, mask, residual, sums, bits, eps, parameter = inputs
    ctx.save_for_backward(grad, x, weight, bias, residual, mask, record)
    ctx.set_materialize_grads(False)
    ctx.bits, ctx.alone = bits, sums is None
    ctx.made = _Made([form_of(bits, x, eps, parameter)], [bool(bits & BY_OUTPUT)], None)


def _norm_backward_backward(ctx: Any, *incoming: Any) -> Any:
    if not ctx.alone:
        raise NotImplementedError(
            "`sums` was given: the second derivative needs the other parts of what the statistics "
            "span; call a layer with `process_group`"
        )
    ctx.wanted = [[bool(ctx.bits & flag) for flag in _NEEDS]]
    _, _, grad, x, weight, bias, residual, *_ = NormBackward.backward(ctx, *incoming)
    return grad, x, None, weight, bias, None, residual, *[None] * 4


register("norm", _setup_norm, _norm_backward)
register("norm_backward", _setup_norm_backward, _norm_backward_backward)
