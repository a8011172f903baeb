"""Weights of their own for parts of the samples: the operators, part by part and by the formula."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from truenorm._core import geometry, operators, plain
from truenorm._core.call import KEEP, Form
from truenorm._core.geometry import Axes

KERNELS: dict[str, tuple[Axes, tuple[int, ...]]] = {
    "batch": (geometry.BATCH, (6, 5, 7, 3)),
    "batch of rows": (geometry.BATCH, (6, 35)),
    "batch past a piece": (geometry.BATCH, (4, 3, 211, 199)),
    "instance": (geometry.instance(5), (6, 5, 7, 3)),
    "group": (geometry.group(3), (6, 12, 5, 3)),
    "group of rows": (geometry.group(3), (6, 12)),
    "group past a piece": (geometry.group(2), (4, 4, 131, 130)),
    "layer": (Axes(1, 1, True), (6, 4, 37)),
    "rms of two": (Axes(1, 2, False), (6, 3, 5, 9)),
    "layer of many": (Axes(1, 1, True), (6, 90, 130)),
}
ALL = 15


def call(
    name: str, parts: int, *, dtype: torch.dtype = torch.float32, last: bool = False,
    act: int = 0, masked: bool = False, residual: bool = False, constant: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """The arguments of a call; more than the parts' weights where asked."""
    axes, shape = KERNELS[name]
    generator = torch.Generator().manual_seed(parts)

    def drawn(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator)

    x = (drawn(*shape) * 3 + 1).to(dtype)
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    features = axes.feature_dims
    like = shape[-features:] if features else shape[1:2]
    n, c, s = geometry.ncs(shape, axes)
    assert n % parts == 0
    valid = torch.rand(n, s, generator=generator) < 0.7
    given = (drawn(c), drawn(c).abs() + 0.2) if constant else None
    return {
        "x": x,
        "weight": (drawn(parts, *like) + 1).to(torch.promote_types(dtype, torch.float32)),
        "bias": drawn(parts, *like).to(torch.promote_types(dtype, torch.float32)),
        "mask": valid if masked else None,
        "residual": drawn(*shape).to(x) if residual else None,
        "given": given,
        "form": Form(axes, 1e-5, constant, act=act, padding=0.5),
        "grad": drawn(*shape).to(x),
    }


def forward(of: dict[str, Any]) -> tuple[Tensor, Tensor]:
    bits, eps, parameter = of["form"].numbers(of["x"], KEEP)
    given = of["given"] or (None, None)
    tensors = of["weight"], of["bias"], of["mask"], of["residual"], *given
    made: tuple[Tensor, Tensor] = operators.norm(of["x"], *tensors, bits, eps, parameter, 0.5)
    return made


def backward(of: dict[str, Any], record: Tensor) -> tuple[Tensor, ...]:
    numbers = of["form"].numbers(of["x"], ALL)
    tensors = of["weight"], of["bias"], of["mask"], of["residual"], None
    made: tuple[Tensor, ...] = operators.norm_backward(
        of["grad"], of["x"], record, *tensors, *numbers
    )
    return made


def near(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    narrow = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3, torch.float64: 1e-13}
    scale = float(expected.abs().max()) or 1.0
    assert actual.shape == expected.shape
    error = float((actual.double() - expected.double()).abs().max()) / scale
    assert error <= narrow[dtype], error


def against_the_formula(of: dict[str, Any]) -> None:
    x, dtype = of["x"], of["x"].dtype
    with torch.no_grad():
        y, record = forward(of)
        tensors = x.double(), of["weight"], of["bias"], of["mask"]
        residual = None if of["residual"] is None else of["residual"].double()
        expected, of_record = plain.norm(*tensors, residual, of["given"], of["form"])
        near(y, expected, dtype)
        near(record, of_record, torch.float64)
        assert y.stride() == geometry.kept_strides(x, of["form"].axes)
        given = (of_record[0], of_record[1]) if of["form"].constant else None
        found = backward(of, record)
        wanted = plain.norm_backward(of["grad"].double(), *tensors, residual, given, of["form"])
        for one, other in zip(found, wanted, strict=True):
            near(one.reshape(-1), other.reshape(-1), dtype)
        assert found[1].shape == found[2].shape == of["weight"].shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("parts", [1, 2, 6])
@pytest.mark.parametrize("name", KERNELS)
def test_by_the_formula(name: str, parts: int, dtype: torch.dtype) -> None:
    if KERNELS[name][1][0] % parts:
        parts = 4
    against_the_formula(call(name, parts, dtype=dtype))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("act", [0, 1, 4])
@pytest.mark.parametrize("name", ["batch", "batch of rows", "instance", "group", "layer"])
def test_with_all_else(name: str, act: int, masked: bool) -> None:
    for parts in (2, 6):
        of = call(name, parts, act=act, masked=masked, residual=True)
        against_the_formula(of)
        against_the_formula(call(name, parts, act=act, masked=masked))


@pytest.mark.parametrize("name", ["batch", "instance", "group"])
@pytest.mark.parametrize("act", [0, 4])
def test_channels_last(name: str, act: int) -> None:
    for parts in (3, 6):
        against_the_formula(call(name, parts, last=True, act=act))
        against_the_formula(call(name, parts, last=True, act=act, masked=True, residual=True))


@pytest.mark.parametrize("last", [False, True])
def test_by_constant_statistics(last: bool) -> None:
    for act in (0, 1):
        against_the_formula(call("batch", 3, constant=True, last=last, act=act))


def test_rows_of_every_token() -> None:
    against_the_formula(call("layer", 24))


def test_rows_that_do_not_lie_in_order() -> None:
    of = call("layer", 6)
    x = of["x"].transpose(0, 1).contiguous().transpose(0, 1)
    for act in (0, 4):
        form = of["form"]._replace(act=act)
        one = forward(of | {"form": form})
        other = forward(of | {"form": form, "x": x})
        assert torch.equal(one[0], other[0])
        pair = [backward(of | {"x": t, "form": form}, one[1]) for t in (of["x"], x)]
        assert all(map(torch.equal, *pair))


@pytest.mark.parametrize("name", ["instance", "group", "layer", "rms of two", "layer of many"])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_part_is_a_call_of_its_own(name: str, threads: int) -> None:
    """Bit for bit, whatever the threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        of = call(name, 3, act=4)
        y, record = forward(of)
        found = backward(of, record)
        of_parts = []
        for k in range(3):
            part = {
                key: value.tensor_split(3)[k] if key in ("x", "grad") else value
                for key, value in of.items()
            }
            part |= {key: of[key][k] for key in ("weight", "bias")}
            of_part, kept = forward(part)
            assert torch.equal(of_part, y.tensor_split(3)[k])
            of_parts.append(backward(part, kept))
        for i in (0, 3):
            assert torch.equal(found[i], torch.cat([each[i] for each in of_parts]))
        for i in (1, 2):
            assert torch.equal(found[i], torch.stack([each[i] for each in of_parts]))
    finally:
        torch.set_num_threads(before)


def test_an_empty_batch() -> None:
    of = call("layer", 2)
    form, weight = of["form"], torch.ones(0, 37)
    grads = backward(of | {"x": of["x"][:0], "grad": of["grad"][:0], "weight": weight,
                           "bias": weight}, torch.zeros(3, 0, dtype=torch.float64))  # fmt: skip
    assert form.axes.feature_dims == 1
    assert [g.shape for g in grads[:3]] == [(0, 4, 37), (0, 37), (0, 37)]


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"weight": (4, 5)}, r"`weight` must have shape \(5,\), .* \(4, 5\): .*divide the samples"),
        ({"weight": (2, 4)}, r"`weight` must have shape \(5,\)"),
        ({"bias": (5,)}, r"`bias` must have shape \(5,\), .* got shape \(5,\): .*alike"),
        ({"bias": (3, 5)}, r"`bias` must have as many rows as `weight`, 2, but got .*\(3, 5\)"),
        ({"weight": (0, 5)}, r"`weight` must have shape \(5,\)"),
    ],
)
def test_what_does_not_fit(device: str, changed: dict[str, Any], words: str) -> None:
    of = call("batch", 2)
    of |= {name: torch.zeros(shape) for name, shape in changed.items()}
    of = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in of.items()}
    with pytest.raises(RuntimeError, match=words):
        forward(of)


def test_sums_of_processes_have_none() -> None:
    of = call("batch", 2)
    _, record = forward(of)
    tensors = of["grad"], of["x"], record, of["weight"], of["bias"], None, None
    with pytest.raises(RuntimeError, match=r"`weight` must have shape \(5,\)"):
        operators.gradient_sums(*tensors, *of["form"].numbers(of["x"]))
