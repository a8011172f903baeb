"""One combination, held against its formula."""

from __future__ import annotations

import builtins
import copy
import zlib
from collections.abc import Sequence
from typing import Any

import torch
from matrix import BATCH, Case
from matrix_calls import (
    RANKS,
    batches_of,
    carried_out,
    derivatives,
    dtype_of,
    layer_of,
    leaves_of,
    split,
    split_dim,
    state_of,
)
from matrix_oracle import Batch, State, oracle
from processes import Failed, processes
from tolerances import (
    FLOAT32_BETWEEN,
    FLOAT32_FORWARD,
    FLOAT32_GRADIENT,
    FLOAT64,
    last_place,
    relative,
)
from torch import Tensor


def check(case: Case) -> None:
    """The case's outputs, gradients and state are those of the formula."""
    # of its own, so that a case is the same one wherever it stands in a list
    torch.manual_seed(zlib.crc32(case.id.encode()))
    layer, batches = layer_of(case), batches_of(case)
    along = _along(layer, batches) if case.way == "second derivatives" else None
    expected, state = _expected(case, layer, batches, along)
    made = _over_processes if case.has("process_group") else carried_out
    found, state_after = made(case, layer, batches, along)
    assert found.keys() == expected.keys()
    rounded: RoundedBetween | None = None
    for name, value in expected.items():  # outputs before gradients
        each = case.way in ROUNDING_EACH or case.modulation == "scale by position"
        in_steps = rounded is not None or each
        try:
            _compare(case, name, found[name], value, in_steps)
        except RoundedBetween as error:
            rounded = error
    assert (state is None) == (state_after is None)
    if state is not None and state_after is not None:
        _compare_state(case, state_after, state)
    if rounded is not None:
        # last: all else is right
        raise rounded


def _along(layer: Any, batches: Sequence[Batch]) -> dict[str, Tensor]:
    """Directions of second derivatives."""
    of = {**leaves_of(batches), **dict(layer.named_parameters())}
    return {name: torch.randn_like(value.detach().contiguous()) for name, value in of.items()}


def _expected(
    case: Case, layer: Any, batches: Sequence[Batch], along: dict[str, Tensor] | None
) -> tuple[dict[str, Tensor], State | None]:
    wide = [
        Batch(*(t.double() if t is not None and t.is_floating_point() else t for t in batch))
        for batch in batches
    ]
    leaves = leaves_of(wide)
    parameters = {n: p.detach().double().requires_grad_() for n, p in layer.named_parameters()}
    given = [
        b._replace(
            x=leaves[f"x{i}"],
            residual=leaves.get(f"residual{i}"),
            scale=leaves.get(f"scale{i}"),
            shift=leaves.get(f"shift{i}"),
        )
        for i, b in enumerate(wide)
    ]
    ranks = RANKS if case.has("process_group") else ()
    weight, bias = parameters["weight"], parameters.get("bias")
    outputs, state = oracle(case, given, weight, bias, state_of(layer), ranks)
    found = {f"output{i}": y.detach() for i, y in enumerate(outputs)}
    if case.way != "no_grad":
        grads = [b.grad.detach().requires_grad_(along is not None) for b in wide]
        found |= derivatives(outputs, {**leaves, **parameters}, grads, along)
    if case.way == "recompute_outputs":
        products = [g * y.detach() for g, y in zip(grads, outputs, strict=True)]
        found |= {f"gradient of ones{i}": product for i, product in enumerate(products)}
    return found, state


# ---------------------------------------------------------------- processes


def _on_rank(
    rank: int, case: Case, layer: Any, batches: list[Batch], along: dict[str, Tensor] | None
) -> tuple[dict[str, Tensor], State | None]:
    # its buffers came in memory that both ranks share; none moves before all have met
    found = carried_out(case, copy.deepcopy(layer), batches, along)
    torch.compiler.reset()
    return found


def _over_processes(
    case: Case, layer: Any, batches: Sequence[Batch], along: dict[str, Tensor] | None
) -> tuple[dict[str, Tensor], State | None]:
    """Each process with its part of the input, put together again."""
    parts = list(zip(*(split(case, batch) for batch in batches), strict=True))
    alongs: list[Any] = [along] * len(parts)
    if along is not None:
        sizes = [part[0].x.shape[split_dim(case)] for part in parts]
        cut = {
            n: a.split(sizes, split_dim(case)) for n, a in along.items() if not _is_whole(case, n)
        }
        alongs = [{**along, **{n: c[i] for n, c in cut.items()}} for i in range(len(parts))]
    each = [(case, layer, list(p), a) for p, a in zip(parts, alongs, strict=True)]
    try:
        found = processes(len(parts)).run(_on_rank, each=each)
    except Failed as failed:
        kind = getattr(builtins, failed.kind, None)
        raise (failed if kind is None else kind(failed.text)) from failed
    values = [value for value, _ in found]
    states = [state for _, state in found]
    for state in states[1:]:
        # the same bits everywhere
        assert (state is None) == (states[0] is None)
        if state is not None:
            assert all(map(torch.equal, state[:2], states[0][:2]))
            assert state.batches == states[0].batches
    whole = {}
    for name in values[0]:
        own = [value[name] for value in values]
        # a gradient of what each has whole is a share
        shares = _is_whole(case, name)
        whole[name] = sum(own[1:], own[0]) if shares else torch.cat(own, split_dim(case))
    return whole, states[0]


def _is_whole(case: Case, name: str) -> bool:
    """Whether each process has all of a tensor of this name, or of which this is the gradient."""
    if name.endswith(("weight", "bias")):
        return True
    of_sample = name.rstrip("0").endswith(("scale", "shift")) and "by sample" in case.modulation
    return of_sample and case.layer not in BATCH


# ---------------------------------------------------------------- tolerances

# in a graph and in a trace what follows the norm are operators that round each
ROUNDING_EACH = ("compiled", "jit.trace")
KINKED = ("relu", "relu6", "leaky_relu", "hardswish", "elu")
# second derivatives are made of several times as many roundings, and of a statistic's of few values
SECOND = 20.0


def _compare(case: Case, name: str, actual: Tensor, exact: Tensor, in_steps: bool) -> None:
    dtype = dtype_of(case)
    assert actual.shape == exact.shape, name
    assert actual.dtype == dtype, name
    finite = exact.isfinite()
    # torch's elu, say, has a gradient at NaN, where the formula has none
    same = actual.isfinite() == finite if name.startswith("output") else actual[finite].isfinite()
    assert bool(same.all()), f"{name}: finite elsewhere"
    actual, exact = actual.double()[finite], exact[finite]
    if name.startswith("output"):
        _compare_output(case, actual, exact, in_steps)
        return
    if dtype == torch.float64:
        bound = FLOAT64
    elif dtype == torch.float32:
        # torch's own operators in a trace
        bound = FLOAT32_BETWEEN if case.way == "jit.trace" else FLOAT32_GRADIENT
    elif in_steps and case.activation in KINKED and case.residual == "residual":
        # a few values that rounding has moved to the other side, whose gradient is all or nothing
        bound = 0.1
    else:
        bound = 2 * torch.finfo(dtype).eps
    bound *= SECOND if case.way == "second derivatives" else 1.0
    error = relative(actual, exact)
    assert error <= bound, f"{name} off by {error:.2e}, allowed {bound:.2e}"


class RoundedBetween(AssertionError):
    """Right, but for a half's rounding between norm, residual and activation."""


def _compare_output(case: Case, actual: Tensor, exact: Tensor, in_steps: bool) -> None:
    dtype = dtype_of(case)
    error = (actual - exact).abs()
    if dtype.itemsize == 2:
        # by norm: where norm and residual cancel, what was rounded was larger than what is left
        off = relative(actual, exact)
        assert off <= torch.finfo(dtype).eps, f"output off by {off:.2e}"
        if in_steps:
            return
        # and there float32's promise is left
        unit = last_place(exact.to(dtype), dtype)
        excess = ((error - 2e-6 * (1 + exact.abs())) / unit).max().item()
        if excess > 0.501:
            raise RoundedBetween(f"output {excess:.3f} units off")
        return
    if dtype == torch.float64:
        bound = FLOAT64
    else:
        bound = FLOAT32_BETWEEN if case.way == "jit.trace" else FLOAT32_FORWARD
    scale = exact.abs().max().clamp(min=1.0)
    assert error.max() <= bound * scale, f"output off by {error.max():.2e}"


def _compare_state(case: Case, actual: State, exact: State) -> None:
    assert actual.batches == exact.batches
    # running statistics stay float32 beside a half's parameters
    bound = FLOAT64 if case.dtype == "float64" else 1e-6
    for name in ("mean", "var"):
        error = relative(getattr(actual, name), getattr(exact, name))
        assert error <= bound, f"running {name} off by {error:.2e}"
