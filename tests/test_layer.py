"""LayerNorm and RMSNorm: statistics of the trailing dimensions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import LAYOUTS, eps_of_torch, exact, randomize, run
from checking import check_layer, same_layout
from tolerances import FLOAT32_GRADIENT, assert_output

import truenorm
from truenorm import LayerNorm, RMSNorm, functional, reference

SHAPES = [
    ((7,), (3, 5, 7)),
    ((7,), (7,)),
    ((5, 7), (3, 2, 5, 7)),
    ((3, 5, 7), (3, 5, 7)),
    ((129,), (17, 129)),
    ((1025,), (3, 1025)),
]
BOTH = [LayerNorm, RMSNorm]


def build(cls: Any, shape: tuple[int, ...], **kwargs: Any) -> Any:
    return randomize(cls(shape, **kwargs))


def data(*shape: int, dtype: torch.dtype = torch.float32, offset: float = 5.0) -> torch.Tensor:
    return (torch.randn(shape, dtype=torch.float64) * 2.3 + offset).to(dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("normalized", "shape"), SHAPES)
@pytest.mark.parametrize("cls", BOTH)
def test_every_layout(
    cls: Any, normalized: tuple[int, ...], shape: tuple[int, ...], layout: str
) -> None:
    if len(shape) == 1 and layout not in ("contiguous", "sliced"):
        layout = "contiguous"
    x = LAYOUTS[layout](data(*shape))
    got = check_layer(build(cls, normalized), x)
    if layout == "contiguous":
        assert same_layout(got.output, x)


@pytest.mark.parametrize("of_grad", LAYOUTS)
@pytest.mark.parametrize("of_input", LAYOUTS)
@pytest.mark.parametrize("normalized", [(7,), (5, 7)])
@pytest.mark.parametrize("cls", BOTH)
def test_every_mix_of_formats_of_input_and_grad(
    cls: Any, normalized: tuple[int, ...], of_input: str, of_grad: str
) -> None:
    x, grad = data(3, 2, 5, 7), torch.randn(3, 2, 5, 7)
    check_layer(build(cls, normalized), LAYOUTS[of_input](x), LAYOUTS[of_grad](grad))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("of_parameters", ["float32", "same"])
@pytest.mark.parametrize("cls", BOTH)
def test_every_dtype(cls: Any, dtype: torch.dtype, of_parameters: str) -> None:
    layer = build(cls, (33,))
    if of_parameters == "same":
        layer.to(dtype)
    check_layer(layer, data(5, 3, 33, dtype=dtype))


@pytest.mark.parametrize("kwargs", [{"elementwise_affine": False}, {"bias": False}])
def test_layer_norm_without_parameters(kwargs: dict[str, bool]) -> None:
    layer = build(LayerNorm, (5, 7), **kwargs)
    assert layer.bias is None
    assert (layer.weight is None) == ("elementwise_affine" in kwargs)
    check_layer(layer, data(3, 5, 7))


def test_rms_norm_without_weight() -> None:
    layer = build(RMSNorm, (5, 7), elementwise_affine=False)
    assert layer.weight is None
    check_layer(layer, data(3, 5, 7))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("way", ["short", "gradient", "functional", "mask", "compiled", "plain"])
def test_rms_norm_takes_eps_none_as_torch_does(dtype: torch.dtype, way: str) -> None:
    layer, theirs = RMSNorm(33, elementwise_affine=False), torch.nn.RMSNorm(33)
    assert layer.eps is theirs.eps is None
    # values as small as the root of eps, so that eps counts
    x = data(5, 33, offset=0.0, dtype=torch.float64) * eps_of_torch(dtype) ** 0.5
    x = x.to(dtype)
    match way:
        case "short":
            y = layer(x)
        case "gradient":
            y = layer(x.requires_grad_())
        case "functional":
            y = functional.rms_norm(x, (33,))
        case "mask":
            y = layer(x, mask=torch.ones(5, 33, dtype=torch.bool))
        case "compiled":
            y = torch.compile(layer, backend="aot_eager", fullgraph=True)(x)
        case "plain":
            y = torch.func.vmap(layer)(x)
    assert_output(y.detach(), reference.rms_norm(x, (33,)))
    torch.testing.assert_close(y, torch.nn.functional.rms_norm(x, (33,)))
    torch.testing.assert_close(y, theirs.to(dtype)(x))


def test_rms_norm_keeps_the_mean() -> None:
    x = data(3, 33, offset=50.0, dtype=torch.float64)
    assert (RMSNorm(33, dtype=torch.float64)(x).mean(1) > 0.9).all()


@pytest.mark.parametrize("normalized", [7, [7], torch.Size([7])])
@pytest.mark.parametrize("cls", BOTH)
def test_ways_to_name_the_shape(cls: Any, normalized: Any) -> None:
    layer = build(cls, normalized)
    assert layer.normalized_shape == (7,)
    check_layer(layer, data(3, 7))


@pytest.mark.parametrize("cls", BOTH)
def test_the_same_in_training_and_evaluation(cls: Any) -> None:
    layer, x = build(cls, (33,)), data(5, 33)
    assert torch.equal(layer(x), layer.eval()(x))


@pytest.mark.parametrize(("normalized", "shape"), [((5,), (0, 5)), ((3, 5), (2, 0, 3, 5))])
@pytest.mark.parametrize("cls", BOTH)
def test_empty_inputs_as_torch(
    cls: Any, normalized: tuple[int, ...], shape: tuple[int, ...]
) -> None:
    ours, theirs = build(cls, normalized), getattr(torch.nn, cls.__name__)(normalized)
    theirs.load_state_dict(ours.state_dict())
    results = []
    for layer in (ours, theirs):
        x = torch.randn(shape, requires_grad=True)
        y = layer(x)
        results.append((y, *torch.autograd.grad(y, [x, *layer.parameters()], torch.randn(shape))))
    for actual, expected in zip(*results, strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("cls", BOTH)
def test_more_than_65535_rows(cls: Any) -> None:
    check_layer(build(cls, (5,)), data(65_537, 5))


@pytest.mark.parametrize("cls", BOTH)
def test_a_single_value(cls: Any) -> None:
    """LayerNorm of one value is the bias, RMSNorm its sign; both stand still when it changes."""
    layer, x, grad = build(cls, (1,)), data(5, 3, 1), torch.randn(5, 3, 1)
    got, wanted = run(layer, x, grad), exact(layer, x, grad)
    assert_output(got.output, wanted.output)
    # what is left is the rounding of the terms that cancel, each as large as grad · weight · rstd
    rstd = layer.eps**-0.5 if cls is LayerNorm else 1.0 / x.abs().min()
    bound = FLOAT32_GRADIENT * (grad * layer.weight).abs().max() * rstd
    assert (got.input - wanted.input).abs().max() <= bound


@pytest.mark.parametrize("cls", BOTH)
def test_an_expanded_input(cls: Any) -> None:
    layer = build(cls, (33,))
    check_layer(layer, data(1, 33).expand(7, 33), torch.randn(7, 1).expand(7, 33))


@pytest.mark.parametrize("cls", BOTH)
def test_bfloat16_parameter_gradients_over_many_rows(cls: Any) -> None:
    # sums kept in the input's dtype, as torch 2.13 keeps them, lose most of their terms here
    layer = build(cls, (17,)).bfloat16()
    grad = (torch.randn(4096, 17) + 1.0).bfloat16()
    check_layer(layer, data(4096, 17, dtype=torch.bfloat16), grad)


@pytest.mark.parametrize("cls", BOTH)
def test_a_row_does_not_depend_on_the_others(cls: Any) -> None:
    layer, x = build(cls, (33,)), data(7, 33)
    y = layer(x)
    for i in range(7):
        assert torch.equal(layer(x[i : i + 1])[0], y[i])


def test_one_value_has_no_gradient() -> None:
    layer = truenorm.LayerNorm(1, eps=1e-30)
    x = torch.randn(7, 1, requires_grad=True)
    (found,) = torch.autograd.grad(layer(x * 1e3), x, torch.randn(7, 1))
    assert torch.equal(found, torch.zeros(7, 1))


@pytest.mark.parametrize("layer", ["LayerNorm", "RMSNorm"])
@pytest.mark.parametrize("shape", [(2, 6, 4, 8), (2, 3, 5, 4, 8)])
def test_channels_last_as_torch(layer: str, shape: tuple[int, ...]) -> None:
    form = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    x = torch.randn(shape).to(memory_format=form)
    for normalized in (shape[-1:], shape[1:]):
        ours = getattr(truenorm, layer)(normalized)
        theirs = getattr(torch.nn, layer)(normalized)
        wanted = theirs(x).stride()
        assert ours(x).stride() == wanted
        assert torch.equal(ours(x), ours(x.contiguous()))
        assert torch.compile(ours, fullgraph=True, backend="aot_eager")(x).stride() == wanted
        with torch.no_grad():
            assert ours(x).stride() == wanted
