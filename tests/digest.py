"""Prints a digest of the bits that every layer computes, a line for each kind of input.

test_instruction_sets.py runs it once under each instruction set. What the tests of the promises
hold of one set's results then holds of all, so the inputs here are theirs: promises.py has them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from cases import run
from promises import (
    CASES,
    LARGE,
    LARGEST,
    NOT_FINITE,
    OFFSETS,
    SCALES,
    Drawn,
    alone_and_among,
    at_offset,
    at_scale,
    cancelling_channels,
    cancelling_rows,
    layouts,
    misaligned,
    not_finite,
    over_float16,
    rounded_together,
    rounded_together_below_the_normal_floats,
    same_values,
    trainings,
)
from torch import Tensor

import truenorm
import truenorm.functional as F
from truenorm._core.call import KEEP, Form
from truenorm._core.geometry import BATCH, Axes, instance, layer, rms

Parts = Iterator[Iterable[Tensor | None]]
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
HALVES = (torch.bfloat16, torch.float16)
KINDS: dict[str, Callable[[], Parts]] = {}


def kind(function: Callable[[], Parts]) -> Callable[[], Parts]:
    KINDS[function.__name__] = function
    return function


def layer_parts(layer: Any, x: Tensor, grad: Tensor) -> list[Tensor | None]:
    """Output, gradients and running statistics, from a fixed state."""
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    parts = [*run(layer, x, grad), *(value.clone() for value in layer.state_dict().values())]
    layer.load_state_dict(state)
    return parts


def everywhere(drawn: Drawn) -> Parts:
    """In every layout, in training and, where that is another thing, in evaluation."""
    case, layer, x, grad = drawn
    for training in trainings(case):
        layer.train(training)
        for place in layouts(x.shape).values():
            yield layer_parts(layer, place(x), place(grad))


@kind
def plain() -> Parts:
    for case in CASES:
        for dtype in DTYPES:
            layer = case.build(dtype=torch.float64 if dtype == torch.float64 else torch.float32)
            grad = torch.randn(case.shape, dtype=torch.float64).to(dtype)
            yield from everywhere(Drawn(case, layer, case.input(dtype), grad))


@kind
def offsets() -> Parts:
    for case in CASES:
        for offset in OFFSETS:
            yield from everywhere(at_offset(case, offset))


@kind
def scales() -> Parts:
    for case in CASES:
        for scale in SCALES:
            yield from everywhere(at_scale(case, scale))
        for largest in LARGEST:
            yield from everywhere(over_float16(case, largest))
    # what float32 cannot hold beside what it can: the results of two kernels in one tile
    layer = truenorm.LocalResponseNorm(5, alpha=0.3)
    x = torch.randn(2, 19, 301) * 10.0 ** torch.empty(2, 19, 301).uniform_(-30, 30)
    yield layer_parts(layer, x, torch.randn(2, 19, 301))


@kind
def nan_and_infinity() -> Parts:
    for case in CASES:
        for bad in NOT_FINITE:
            for dtype in (torch.float32, *HALVES):
                yield from everywhere(not_finite(case, bad, dtype)[0])


@kind
def alignments() -> Parts:
    for case in CASES:
        for dtype in (torch.float32, torch.bfloat16):
            layer, x, grad = case.build(), case.input(dtype), torch.randn(case.shape).to(dtype)
            for elsewhere in misaligned(x):
                yield layer_parts(layer, elsewhere, grad)


@kind
def batches() -> Parts:
    for case in CASES:
        for dtype in (torch.float64, torch.float32):
            for pair in alone_and_among(case, dtype):
                for drawn in pair:
                    drawn.layer.train("Batch" not in case.layer)
                    yield layer_parts(drawn.layer, drawn.x, drawn.grad)


@kind
def past_the_caches() -> Parts:
    for case in LARGE:
        layer = case.build().eval()
        for dtype in (torch.float32, torch.bfloat16):
            shape = (case.shape[0] * (4 // dtype.itemsize), *case.shape[1:])
            x, grad = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
            yield layer_parts(layer, x, grad)
            if len(shape) > 2:
                last = {"memory_format": torch.channels_last}
                yield layer_parts(layer, x.contiguous(**last), grad.contiguous(**last))


@kind
def half_precision() -> Parts:
    for dtype in HALVES:
        for offset in (0.0, 0.4, 40.0):
            x, weight, bias = cancelling_rows(dtype, offset)
            yield (F.layer_norm(x, (96,), weight, bias),)
            x, weight, bias = cancelling_channels(dtype, offset)
            for place in layouts(x.shape).values():
                yield (F.batch_norm(place(x), None, None, weight, bias, training=True),)
        x, weight, bias = same_values(dtype)
        yield (F.instance_norm(x, weight=weight, bias=bias),)
    for norm, x in (rounded_together(), rounded_together_below_the_normal_floats()):
        yield (norm(x).detach(),)


@kind
def masked() -> Parts:
    # lengths, random positions, and runs of a few, in short rows and long ones
    for shape in ((3, 5, 37), (4, 3, 5000), (3, 70, 23, 31)):
        size = torch.Size(shape[2:]).numel()
        lengths = torch.arange(size) < torch.tensor([size, 5, size // 2, 0])[: shape[0], None]
        few = (torch.arange(size) // 20 % 3 == 1).repeat(shape[0], 1)
        for mask in (lengths, torch.rand(shape[0], size) < 0.5, few):
            for dtype in DTYPES:
                for groups in (0, 1, shape[1]):
                    for offset in (0.0, 30.0):
                        x = (torch.randn(shape) + offset).to(dtype)
                        for place in layouts(shape).values():
                            yield from masked_parts(place(x), mask, groups)
            # what a mask leaves out may be anything, and what it leaves in too
            for bad in NOT_FINITE:
                x = torch.randn(shape)
                x[1, 1] = bad
                x.flatten(2).transpose(0, 1)[:, ~mask] = bad
                for place in layouts(shape).values():
                    yield from masked_parts(place(x), mask, shape[1])


def masked_parts(x: Tensor, mask: Tensor, groups: int) -> Parts:
    return called(Axes(groups, 0, True), x, x, mask=mask)


@kind
def activated() -> Parts:
    # each activation, with and without a residual, by rows, by columns and element by element
    special = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0, -0.0, 1e-40, 3e38, -3e38])
    for act in range(9):
        for dtype in DTYPES:
            for make, shape in (("BatchNorm2d", (3, 70, 9, 7)), ("LayerNorm", (5, 131))):
                axes = BATCH if make == "BatchNorm2d" else layer(1)
                for hard in (False, True):
                    x, r = ((4 * torch.randn(shape)).to(dtype) for _ in range(2))
                    if hard:
                        r.view(-1)[11 : 11 + 8] = special.to(dtype)
                        x.view(-1)[-8:] = special.to(dtype)
                    for place in layouts(shape).values():
                        for residual in (place(r), None) if act else (place(r),):
                            yield from called(axes, place(x), place(r), residual=residual, act=act)


@kind
def masked_and_activated() -> Parts:
    of_axes = (BATCH, (3, 7, 90)), (instance(7), (3, 7, 90)), (layer(1), (6, 131))
    for act in range(9):
        for dtype in DTYPES:
            for axes, shape in of_axes:
                x, r = ((4 * torch.randn(shape)).to(dtype) for _ in range(2))
                mask = torch.rand(shape[0], *shape[2:] if not axes.feature_dims else ()) < 0.6
                residual = r if act % 2 else None
                yield from called(axes, x, r, mask=mask, residual=residual, act=act)


@kind
def in_steps() -> Parts:
    ops: Any = torch.ops.truenorm
    for dtype in DTYPES:
        for axes in (layer(1), rms(1)):
            for act in (0, 5):
                x, r = ((4 * torch.randn(6, 131)).to(dtype) for _ in range(2))
                weight, bias = torch.randn(131).to(dtype), torch.randn(131).to(dtype)
                form = Form(axes, 1e-5, act=act, rounds=True, one_plus=act > 0)
                given = weight, bias, None, r if act else None
                y, record = ops.norm(x, *given, None, None, *form.numbers(x, KEEP), 0.0)
                yield y, record
                yield ops.norm_backward(r, x, record, *given, None, *form.numbers(x, 7))


def called(
    axes: Axes,
    x: Tensor,
    grad: Tensor,
    *,
    mask: Tensor | None = None,
    residual: Tensor | None = None,
    act: int = 0,
) -> Parts:
    ops: Any = torch.ops.truenorm
    form = Form(axes, 1e-5, act=act, parameter=0.3)
    given = None, None, mask, residual
    y, record = ops.norm(x, *given, None, None, *form.numbers(x, KEEP), 1.5)
    yield y, record
    needs = 15 if residual is not None else 7
    yield ops.norm_backward(grad, x, record, *given, None, *form.numbers(x, needs))


def add(digest: Any, part: Tensor | None) -> None:
    if part is None:
        return
    part = part.detach().contiguous()
    if part.is_floating_point() and bool(part.isnan().any()):
        # that it is a NaN is promised, and not which one of the many
        part = torch.where(part.isnan(), torch.nan, part)
    digest.update(part.view(-1).view(torch.uint8).numpy())


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name, make in KINDS.items():
        torch.manual_seed(3)
        found = hashlib.sha256()
        for parts in make():
            for part in parts:
                add(found, part)
        print(name, found.hexdigest(), flush=True)
