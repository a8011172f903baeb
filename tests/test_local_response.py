"""LocalResponseNorm: windows of channels, every layout and rank."""

from __future__ import annotations

import pytest
import torch
from cases import LAYOUTS
from checking import check_layer, same_layout
from tolerances import assert_output

from truenorm import LocalResponseNorm, functional


def data(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.randn(shape, dtype=torch.float64) * 2.3 + 0.7).to(dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 5, 9), (3, 7, 5, 3), (2, 3, 3, 5, 3), (1, 1, 7, 1)])
@pytest.mark.parametrize("size", [1, 2, 3, 5, 12])
def test_every_window_rank_and_layout(size: int, shape: tuple[int, ...], layout: str) -> None:
    # sizes even (one channel more before than after), and wider than the channels
    layer = LocalResponseNorm(size, alpha=0.9, beta=0.6, k=1.3)
    x = LAYOUTS[layout](data(*shape))
    got = check_layer(layer, x)
    if layout in ("contiguous", "channels_last"):
        assert same_layout(got.output, x)
        assert same_layout(got.input, x)


@pytest.mark.parametrize("of_grad", LAYOUTS)
@pytest.mark.parametrize("of_input", LAYOUTS)
def test_every_mix_of_formats_of_input_and_grad(of_input: str, of_grad: str) -> None:
    x, grad = data(3, 5, 7, 3), torch.randn(3, 5, 7, 3)
    layer = LocalResponseNorm(4, alpha=0.9)
    check_layer(layer, LAYOUTS[of_input](x), LAYOUTS[of_grad](grad))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("beta", [0.75, 0.5, 1.0, 2.0])
def test_every_dtype_and_exponent(dtype: torch.dtype, beta: float) -> None:
    check_layer(LocalResponseNorm(3, alpha=0.9, beta=beta), data(2, 5, 7, 3, dtype=dtype))


@pytest.mark.parametrize("shape", [(2, 5, 9), (3, 7, 5, 3)])
@pytest.mark.parametrize("size", [2, 5])
def test_agrees_with_torch_in_float64(size: int, shape: tuple[int, ...]) -> None:
    x = data(*shape, dtype=torch.float64)
    spec = (size, 0.9, 0.6, 1.3)
    assert_output(
        functional.local_response_norm(x, *spec),
        torch.nn.functional.local_response_norm(x, *spec),
    )


def test_integers_become_the_default_dtype_as_in_torch() -> None:
    x = torch.randint(-9, 9, (2, 5, 7))
    y = LocalResponseNorm(3, alpha=0.9)(x)
    theirs = torch.nn.LocalResponseNorm(3, alpha=0.9)
    assert y.dtype == theirs(x).dtype
    assert_output(y, theirs(x.double()))


def test_an_empty_input_comes_back() -> None:
    x = torch.randn(0, 5, 7, requires_grad=True)
    y = LocalResponseNorm(3)(x)
    assert y.shape == x.shape
    (grad,) = torch.autograd.grad(y, [x], torch.randn(0, 5, 7))
    assert grad.shape == x.shape


def test_more_than_65535_samples() -> None:
    check_layer(LocalResponseNorm(3, alpha=0.9), data(65_537, 3, 1))


def test_the_same_in_training_and_evaluation() -> None:
    layer, x = LocalResponseNorm(3), data(2, 5, 7)
    assert torch.equal(layer(x), layer.eval()(x))
