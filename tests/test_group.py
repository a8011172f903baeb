"""GroupNorm: statistics of each sample's groups, every layout, its relatives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import LAYOUTS, randomize
from checking import check_layer, same_layout, takes_bias
from tolerances import assert_output

from truenorm import GroupNorm, InstanceNorm2d, LayerNorm

SHAPES = [
    (3, 9, (2, 9, 5, 7)),
    (1, 5, (3, 5, 7)),
    (5, 5, (3, 5, 7, 9)),
    (3, 9, (4, 9)),
    (2, 6, (1, 6, 1, 7)),
    (3, 3, (5, 3, 3, 1, 3)),
    (2, 34, (3, 34, 5, 5)),
]


def build(groups: int, channels: int, **kwargs: Any) -> Any:
    return randomize(GroupNorm(groups, channels, **kwargs))


def data(*shape: int, dtype: torch.dtype = torch.float32, offset: float = 5.0) -> torch.Tensor:
    return (torch.randn(shape, dtype=torch.float64) * 2.3 + offset).to(dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("groups", "channels", "shape"), SHAPES)
def test_every_layout(groups: int, channels: int, shape: tuple[int, ...], layout: str) -> None:
    x = LAYOUTS[layout](data(*shape))
    got = check_layer(build(groups, channels), x)
    if layout in ("contiguous", "channels_last"):
        assert same_layout(got.output, x)
        assert same_layout(got.input, x)


@pytest.mark.parametrize("of_grad", LAYOUTS)
@pytest.mark.parametrize("of_input", LAYOUTS)
@pytest.mark.parametrize("shape", [(3, 6, 7, 9), (1, 6, 7, 3)])
def test_every_mix_of_formats_of_input_and_grad(
    shape: tuple[int, ...], of_input: str, of_grad: str
) -> None:
    layer = build(2, shape[1])
    check_layer(layer, LAYOUTS[of_input](data(*shape)), LAYOUTS[of_grad](torch.randn(shape)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("of_parameters", ["float32", "same"])
def test_every_dtype(dtype: torch.dtype, of_parameters: str) -> None:
    layer = build(3, 9)
    if of_parameters == "same":
        layer.to(dtype)
    for layout in ("contiguous", "channels_last"):
        check_layer(layer, LAYOUTS[layout](data(2, 9, 5, 7, dtype=dtype)))


@pytest.mark.parametrize(
    "kwargs", [{"affine": False}, pytest.param({"bias": False}, marks=takes_bias)]
)
def test_without_parameters(kwargs: dict[str, bool]) -> None:
    layer = build(3, 9, **kwargs)
    assert layer.bias is None
    assert (layer.weight is None) == ("affine" in kwargs)
    check_layer(layer, data(2, 9, 5, 7))


def test_the_same_in_training_and_evaluation() -> None:
    layer, x = build(3, 9), data(2, 9, 5, 7)
    assert torch.equal(layer(x), layer.eval()(x))


def test_groups_of_one_channel_are_instance_norm() -> None:
    group, instance = build(5, 5), InstanceNorm2d(5, affine=True)
    instance.load_state_dict(group.state_dict())
    for layout in ("contiguous", "channels_last"):
        x = LAYOUTS[layout](data(3, 5, 7, 9))
        assert_output(group(x).detach(), instance(x.double()).detach())


def test_one_group_without_weight_is_layer_norm() -> None:
    x = data(3, 5, 7, 9)
    exact = LayerNorm((5, 7, 9), elementwise_affine=False)(x.double())
    assert_output(GroupNorm(1, 5, affine=False)(x), exact)


def test_a_large_mean_in_channels_last() -> None:
    # where torch 2.13 takes the difference of two large squares
    x = LAYOUTS["channels_last"](data(2, 6, 33, 31, offset=3e4))
    check_layer(build(2, 6), x)


def test_no_samples_as_torch() -> None:
    shape = (0, 6, 7)
    ours, theirs = build(2, 6), torch.nn.GroupNorm(2, 6)
    theirs.load_state_dict(ours.state_dict())
    results = []
    for layer in (ours, theirs):
        x = torch.randn(shape, requires_grad=True)
        y = layer(x)
        results.append((y, *torch.autograd.grad(y, [x, *layer.parameters()], torch.randn(shape))))
    for actual, expected in zip(*results, strict=True):
        assert torch.equal(actual, expected)


def test_no_positions() -> None:
    # the weight's gradient is a sum over nothing (torch 2.13 gives NaN)
    layer = build(2, 6)
    x = torch.randn(3, 6, 0, requires_grad=True)
    y = layer(x)
    gradients = torch.autograd.grad(y, [x, layer.weight, layer.bias], torch.randn(3, 6, 0))
    assert y.shape == x.shape
    for gradient, like in zip(gradients, (x, layer.weight, layer.bias), strict=True):
        assert torch.equal(gradient, torch.zeros_like(like))


def test_more_than_65535_samples() -> None:
    check_layer(build(3, 6), data(65_537, 6))


def test_a_sample_does_not_depend_on_its_batch() -> None:
    layer, x = build(3, 9), data(5, 9, 5, 7)
    y = layer(x)
    for i in range(5):
        assert torch.equal(layer(x[i : i + 1])[0], y[i])
