"""LocalResponseNorm: windows of channels, every layout and rank."""

from __future__ import annotations

import pytest
import torch
from cases import LAYOUTS, run
from checking import check_layer, same_layout
from tolerances import assert_output
from torch import Tensor

from truenorm import LocalResponseNorm, functional, reference


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


# ------------------------------------------------------------- the float32 kernel and its limits

FORMATS = ("contiguous", "channels_last")


def mixed(*shape: int) -> Tensor:
    """Values of every size from 1e-30 to 1e30, beside one another and in runs of ordinary ones."""
    ordinary = torch.rand(shape[0], 1, *shape[2:]) < 0.5
    return torch.where(
        ordinary, data(*shape), data(*shape) * 10.0 ** torch.empty(shape).uniform_(-30, 30)
    )


@pytest.mark.parametrize("size", [1, 2, 5, 8, 9, 100])
@pytest.mark.parametrize("channels", [1, 2, 3, 4, 7, 8, 15, 16, 17, 31, 48, 70])
def test_windows_and_channels_around_the_width_of_a_vector(channels: int, size: int) -> None:
    layer = LocalResponseNorm(size, alpha=0.9)
    for positions in (1, 2, 15, 16, 17, 33, 199):
        for layout in FORMATS:
            check_layer(layer, LAYOUTS[layout](data(2, channels, positions, 1)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("beta", [0.5, 0.75, 1.0, 0.3])
@pytest.mark.parametrize("size", [2, 5, 11])
def test_every_power_in_every_dtype(size: int, beta: float, dtype: torch.dtype) -> None:
    # with k = 0 the gradient is of the size of 1 / x^2, beyond float16
    for k in (0.1 if dtype == torch.float16 else 0.0, 1.0, 2.0):
        layer = LocalResponseNorm(size, alpha=0.9, beta=beta, k=k)
        for layout in FORMATS:
            check_layer(layer, LAYOUTS[layout](data(2, 21, 6, 45, dtype=dtype)))


@pytest.mark.parametrize(
    ("alpha", "k"), [(0.0, 1.0), (-1e-3, 1.0), (3.0, 1.0), (1e-25, 1.0), (0.5, -1e-3), (0.5, 1e20)]
)
def test_parameters_that_float32_does_not_take(alpha: float, k: float) -> None:
    layer = LocalResponseNorm(5, alpha=alpha, beta=1.0, k=k)
    for layout in FORMATS:
        check_layer(layer, LAYOUTS[layout](data(2, 9, 5, 7).abs() + 1.0))


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("beta", [0.5, 0.75, 1.0])
@pytest.mark.parametrize("k", [0.0, 1e-9, 1.0])
def test_every_scale_in_one_tile(k: float, beta: float, layout: str) -> None:
    # value by value: an error by norm would show the largest alone
    spec = (5, 0.9, beta, k)
    x, grad = mixed(2, 21, 31, 9), torch.randn(2, 21, 31, 9)
    got = run(LocalResponseNorm(*spec), LAYOUTS[layout](x), LAYOUTS[layout](grad))
    exact = reference.local_response_norm(x, *spec)
    # some 1e-45 is where float32 ends
    assert bool(((got.output - exact).abs() <= 1e-6 * exact.abs() + 1e-44).all())
    wanted = reference.local_response_norm_backward(grad, x, *spec).input
    # the gradient's two terms, which may cancel: the scale of its rounding
    terms = reference.local_response_norm_backward(-grad.abs(), x.abs(), *spec).input
    first = grad.abs().double() * (exact / x.double()).abs()
    scale = 2.0 * first + terms.abs()
    within = torch.finfo(torch.float32).max
    held = wanted.abs() < within
    error = (got.input - wanted.clamp(-within, within)).abs()
    assert bool((error <= 1e-6 * scale + 1e-37)[held].all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("size", [4, 5, 12])
def test_the_same_bits_whatever_is_beside(size: int, dtype: torch.dtype) -> None:
    layer = LocalResponseNorm(size, alpha=0.9)
    x, grad = mixed(3, 21, 600, 1).to(dtype), torch.randn(3, 21, 600, 1).to(dtype)
    x[1:] *= 1e30  # beyond float32 in part
    x[2, ::3] = float("nan")
    whole = run(layer, x, grad)
    # in the other format, alone, and cut out of its run at another place of its tile
    inside = run(layer, *(LAYOUTS["channels_last"](t) for t in (x, grad)))
    for name in ("output", "input"):
        expected = getattr(whole, name)
        assert torch.equal(getattr(inside, name).nan_to_num(), expected.nan_to_num())
        for low, high in ((0, 600), (3, 20), (77, 600), (255, 257), (590, 591)):
            part = run(layer, x[:1, :, low:high], grad[:1, :, low:high])
            assert torch.equal(getattr(part, name), expected[:1, :, low:high])


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_inf_stay_in_their_windows(bad: float, dtype: torch.dtype, layout: str) -> None:
    layer = LocalResponseNorm(5, alpha=0.9)
    clean, grad = data(2, 21, 31, 9, dtype=dtype), torch.randn(2, 21, 31, 9).to(dtype)
    spoilt = clean.clone()
    spoilt[1, 10, 17, 4] = bad
    before, after = (run(layer, LAYOUTS[layout](x), LAYOUTS[layout](grad)) for x in (clean, spoilt))
    for name, reach in (("output", 2), ("input", 4)):
        a, b = getattr(before, name), getattr(after, name).clone()
        if bad != bad:
            assert bool(b[1, 10 - reach : 11 + reach, 17, 4].isnan().all())
        b[1, 10 - reach : 11 + reach, 17, 4] = a[1, 10 - reach : 11 + reach, 17, 4]
        assert torch.equal(a, b)
    # an infinite neighbour: finite values by an infinite power are zeros
    exact = reference.local_response_norm(spoilt, 5, 0.9).to(dtype)
    window = (1, slice(8, 13), 17, 4)
    torch.testing.assert_close(after.output[window], exact[window], equal_nan=True)


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_results_at_the_end_of_half_precision(dtype: torch.dtype, layout: str) -> None:
    # times 1e-3^-0.75 = 178: some beyond float16's largest number, some near its smallest
    x = (data(2, 21, 31, 9) * 10.0 ** torch.empty(2, 21, 31, 9).uniform_(-9, 3)).to(dtype)
    y = LocalResponseNorm(3, alpha=1e-9, k=1e-3)(LAYOUTS[layout](x))
    assert bool(torch.isinf(y).any()) == (dtype == torch.float16)
    exact = reference.local_response_norm(x, 3, 1e-9, 0.75, 1e-3)
    held = torch.isfinite(y)
    assert torch.equal(held, torch.isfinite(exact.to(dtype)))
    assert_output(y[held], exact[held])
