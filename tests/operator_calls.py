"""Calls of truenorm's operators with arguments that do not fit, one random change or a few each.

    python operator_calls.py FIRST COUNT [OPERATOR …]

makes COUNT calls of each operator (all of torch.ops.truenorm), numbered from FIRST, which is a
call's seed. It prints a call's operator and seed before it is made, so that the last line says what
ended the process, and a line that begins with WRONG for what neither succeeded in order nor raised
an error that names an argument. Run by test_operator_checks.py.
"""

from __future__ import annotations

import math
import random
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, UnsupportedFakeTensorException

import truenorm

OPS = torch.ops.truenorm
LIBRARY = truenorm._core.operators.defined
# of `form`: call.py
CONSTANT, UNCENTRED, PER_CHANNEL, KEEP, AS_GIVEN = 32, 64, 128, 256, 2048
ACT, FEATURES, GROUPS = 16, 24, 32
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
INTEGERS = (-1, 0, 1, 2, 3, 5, 7, 9, 16, 99, 2**31, 2**40, -(2**40), 2**62, -(2**63))
FLOATS = (0.0, -1.0, 1e-30, 1e30, math.inf, -math.inf, math.nan)


def names_of(operator: str) -> list[str]:
    schema = getattr(OPS, operator).default._schema
    return [argument.name for argument in schema.arguments]


def operators(backend: str = truenorm.info().cpu) -> list[str]:
    """All that there are; the short way's have no plain kernel."""
    return [n for n in sorted(LIBRARY._places) if backend == "native" or "eager_" not in n]


def _shapes(draw: random.Random, names: list[str]) -> tuple[tuple[int, ...], tuple[int, int, bool]]:
    """A shape of x, and axes that fit it: (num_groups, feature_dims, centred)."""
    shape = tuple(draw.choice((1, 2, 3, 4, 6, 33)) for _ in range(draw.choice((2, 3, 4, 4, 5))))
    shape = (shape[0], draw.choice((2, 4, 6)), *shape[2:])
    if "gate" in names:
        return (*shape[:1], draw.choice((4, 6, 20))), (draw.choice((1, 2)), 0, False)
    if "form" not in names:
        return shape, (0, 0, True)
    groups = draw.choice((0, 1, 2, shape[1]))
    of_rows = "other" in names or "grad_h" in names
    if of_rows or ("sums" not in names and draw.random() < 0.4):
        return shape, (1, draw.randint(1, len(shape)), draw.random() < 0.5)
    return shape, (groups, 0, True)


def _form(draw: random.Random, operator: str, axes: tuple[int, int, bool]) -> int:
    groups, dims, centred = axes
    if operator == "eager_norm_given":
        return CONSTANT | 7
    if operator == "eager_norm_more":
        return draw.choice((0, PER_CHANNEL)) | draw.randint(0, 15) | draw.randint(0, 8) << ACT
    if "gated" in operator:
        keep = 0 if operator.startswith("eager_") else draw.choice((0, KEEP))
        return draw.randint(1, 3) | keep | UNCENTRED | groups << GROUPS
    flags = draw.randint(0, 15) | draw.choice((0, KEEP)) | (0 if centred else UNCENTRED)
    if dims and operator in ("eager_norm", "statistics"):
        flags |= draw.choice((0, AS_GIVEN))
    if operator == "eager_norm_backward":
        flags |= draw.randint(0, 8) << ACT
    if operator == "eager_add_norm_backward":
        flags |= 1
    if operator.startswith("add_"):
        return flags | dims << FEATURES
    if not operator.startswith("eager_"):
        flags |= draw.choice((0, CONSTANT)) | draw.randint(0, 8) << ACT
    return flags | dims << FEATURES | (0 if dims else groups) << GROUPS


def valid(operator: str, draw: random.Random) -> dict[str, Any]:
    """Arguments that fit one another, by name."""
    names = names_of(operator)
    shape, axes = _shapes(draw, names)
    dtype = draw.choice(DTYPES)
    of_parameters = draw.choice((dtype, torch.float32))
    x = torch.randn(shape, dtype=torch.float64).to(dtype)
    if len(shape) == 4 and draw.random() < 0.3:
        x = x.contiguous(memory_format=torch.channels_last)
    elif axes[1] == 1 and draw.random() < 0.5:  # the features outside of the positions
        x = x.movedim(-1, 1).contiguous().movedim(1, -1)
    form = _form(draw, operator, axes)
    if operator in ("eager_norm_given", "eager_norm_more"):
        axes = shape[1] if form & PER_CHANNEL else 0, 0, True
    groups, dims, _ = axes
    features = shape[len(shape) - dims :] if dims else shape[1:2]
    samples = math.prod(shape[: len(shape) - dims]) if dims else shape[0]
    statistics = samples * groups if groups else math.prod(features)

    def per(count: int) -> Tensor:
        return torch.randn(count, dtype=torch.float64).abs() + 0.5

    made: dict[str, Any] = {
        "x": x,
        "other": torch.randn(shape).to(dtype),
        "gate": torch.randn(shape).to(dtype),
        "order": draw.randint(0, 15),
        "grad_h": torch.randn(shape).to(dtype),
        "grad": torch.randn(shape).to(dtype),
        "residual": torch.randn(shape).to(dtype) if draw.random() < 0.7 else None,
        "mask": torch.rand(shape[: len(shape) - dims] if dims else shape[:1] + shape[2:]) < 0.6,
        "weight": torch.randn(features).to(of_parameters) if draw.random() < 0.7 else None,
        "bias": torch.randn(features).to(of_parameters) if draw.random() < 0.7 else None,
        "mean": per(statistics),
        "var": per(statistics),
        "sums": per(2 * statistics).view(2, -1) if draw.random() < 0.3 else None,
        "record": per(3 * statistics).view(3, -1),
        "running_mean": per(shape[1]).float(),
        "running_var": per(shape[1]).float(),
        "num_batches_tracked": torch.tensor(3),
        "eps": 1e-5,
        "parameter": 0.3,
        "momentum": 0.1,
        "skip_nonfinite": draw.random() < 0.3,
        "padding": 1.5,
        "size": draw.randint(1, 7),
        "alpha": 1e-2,
        "beta": 0.75,
        "k": 1.0,
        "form": form,
    }
    if operator in ("norm", "norm_"):
        for name in ("mask",) if draw.random() < 0.5 else ():
            made[name] = None
        if draw.random() < 0.6:
            made["mean"] = made["var"] = None
    if operator == "move_" or operator == "move_once_":
        made["record"] = per(3 * shape[1] * draw.choice((1, 4))).view(3, -1)
    if operator.startswith("eager_") and "record" in names:
        bits = torch.tensor([form]).view(torch.float64)
        last = made["order"] if "gate" in names else 0.3
        rest = torch.tensor([1e-5, last], dtype=torch.float64)
        made["record"] = torch.cat([per(2 * statistics), bits, rest])
    return {name: made[name] for name in names}


def _freed(t: Tensor) -> Tensor:
    gone = t.clone()
    gone.untyped_storage().resize_(0)
    return gone


# what may become of a tensor
CHANGES: dict[str, Callable[[Tensor], Any]] = {
    "absent": lambda t: None,
    "shorter": lambda t: t[..., :-1].clone() if t.dim() else t[None][:0],
    "fewer": lambda t: t[:-1].clone() if t.dim() else t,
    "one": lambda t: t.reshape(-1)[:1].clone(),
    "longer": lambda t: torch.cat([t, t]) if t.dim() else t.expand(2).clone(),
    "empty": lambda t: t.new_empty(0),
    "no samples": lambda t: t[:0] if t.dim() else t,
    "scalar": lambda t: t.new_ones(()),
    "flat": lambda t: t.reshape(-1),
    "one more": lambda t: t[None],
    "expanded": lambda t: (
        t.reshape(-1)[:1].expand(t.numel()).reshape(t.shape)
        if t.dim() < 2
        else t[:1].expand(t.shape)
    ),
    "one value": lambda t: t.new_ones(()).expand(t.shape),
    "backwards": lambda t: t.permute(tuple(reversed(range(t.dim())))),
    "gaps": lambda t: torch.stack([t, t], -1)[..., 0],
    "offset": lambda t: torch.cat([t.reshape(-1)[:1], t.reshape(-1)])[1:].reshape(t.shape),
    "float64": lambda t: t.double(),
    "float16": lambda t: t.half(),
    "int64": lambda t: t.long(),
    "uint8": lambda t: t.to(torch.uint8),
    "bool": lambda t: t.bool(),
    "complex": lambda t: t.to(torch.complex64),
    "float8": lambda t: t.to(torch.float32).to(torch.float8_e4m3fn),
    "meta": lambda t: t.to("meta"),
    "sparse": lambda t: t.to_sparse(),
    "quantized": lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8),
    "nested": lambda t: torch.nested.nested_tensor([t, t]),
    "jagged": lambda t: torch.nested.nested_tensor([t, t], layout=torch.jagged),
    "mkldnn": lambda t: t.float().to_mkldnn(),
    "requires grad": lambda t: t.clone().requires_grad_(),
    "freed": _freed,
    "not finite": lambda t: torch.full_like(t, math.nan) if t.is_floating_point() else t,
    "huge": lambda t: torch.full_like(t, 1e30) if t.is_floating_point() else t,
}


def changed(value: Any, draw: random.Random) -> Any:
    if isinstance(value, Tensor):
        try:
            return CHANGES[draw.choice(list(CHANGES))](value)
        except (RuntimeError, ValueError, IndexError):
            return value  # there is no such tensor
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return draw.choice(INTEGERS)
    if isinstance(value, float):
        return draw.choice((*FLOATS, None))
    return draw.choice((None, torch.randn(3), torch.randn(4), torch.randn(0)))


def _tensors(made: Any) -> list[Any]:
    return [] if made is None else [made] if isinstance(made, Tensor) else list(made)


def _steps(t: Tensor) -> list[int]:
    """Strides, of which those of a size of one say nothing."""
    return [step for step, size in zip(t.stride(), t.shape, strict=True) if size > 1]


def _as_its_shape_rule(operator: str, arguments: dict[str, Any], outputs: list[Any]) -> str:
    """What differs from the shape rule, or ""."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        try:
            given = [
                mode.from_tensor(a) if isinstance(a, Tensor) else a for a in arguments.values()
            ]
        except UnsupportedFakeTensorException:
            return ""  # there is no such trace
        try:
            expected = _tensors(getattr(OPS, operator).default(*given))
        except RuntimeError as error:
            return f"the shape rule refuses: {error}"
    for made, rule in zip(outputs, expected, strict=True):
        if made.shape != rule.shape or made.dtype != rule.dtype or _steps(made) != _steps(rule):
            return (
                f"{tuple(made.shape)} {made.dtype} {made.stride()} where the shape rule says "
                f"{tuple(rule.shape)} {rule.dtype} {rule.stride()}"
            )
    return ""


def _snapshot(arguments: dict[str, Any]) -> list[tuple[str, Tensor, Tensor]]:
    """Copies of what an operator that refuses may not have changed."""
    kept = []
    for name, value in arguments.items():
        plain = isinstance(value, Tensor) and value.layout is torch.strided
        if plain and not value.is_nested and value.device.type == "cpu" and not value.is_quantized:
            held = value.untyped_storage().nbytes() > 0 or value.numel() == 0
            kept += [(name, value, value.detach().clone())] if held else []
    return kept


def _bytes(t: Tensor) -> Tensor:
    return t.clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8)


def _wrong(operator: str, arguments: dict[str, Any]) -> str:
    """Why a call was not in order, or ""."""
    before = _snapshot(arguments)
    call = getattr(OPS, operator).default
    try:
        with torch.no_grad():
            outputs = _tensors(call(*arguments.values()))
    except (RuntimeError, ValueError, TypeError) as error:
        text = str(error)
        named = any(f"`{n}`" in text or f"'{n}'" in text for n in arguments)
        if not named and f"truenorm::{operator}" not in text and f"truenorm.{operator}" not in text:
            return f"{type(error).__name__} names no argument: {text[:300]}"
        for name, value, copy in before:
            if not torch.equal(_bytes(value.detach()), _bytes(copy)):
                return f"`{name}` was changed by a call that was refused: {text[:200]}"
        return ""
    for output in outputs:
        if output is not None and output.device.type == "cpu":
            output.double().sum().item()  # every byte is there
    if operator.startswith("eager_"):
        return ""  # never compiled
    return _as_its_shape_rule(operator, arguments, outputs)


def main() -> None:
    first, count, *chosen = sys.argv[1:]
    warnings.simplefilter("ignore")
    done = 0
    for operator in chosen or operators():
        for seed in range(int(first), int(first) + int(count)):
            print(operator, seed, flush=True)
            torch.manual_seed(seed)
            draw = random.Random(f"{operator} {seed}")
            arguments = valid(operator, draw)
            # now and then none, which must succeed
            times = draw.choice((0, 1, 1, 1, 2, 3))
            for name in draw.sample(list(arguments), min(times, len(arguments))):
                arguments[name] = changed(arguments[name], draw)
            wrong = _wrong(operator, arguments)
            done += 1
            if wrong:
                print("WRONG", operator, seed, wrong, flush=True)
    print(f"{done} calls")


if __name__ == "__main__":
    main()
