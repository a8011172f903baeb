"""InstanceNorm1d, 2d, 3d: statistics of a sample's channel, running ones, modes, layouts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import LAYOUTS, randomize, run
from checking import check_layer, same_layout
from tolerances import assert_output

import truenorm
from truenorm import InstanceNorm1d, InstanceNorm2d, InstanceNorm3d, LazyInstanceNorm1d, reference

SHAPES = {
    InstanceNorm1d: [(3, 5, 9), (1, 3, 17), (5, 9)],
    InstanceNorm2d: [(3, 5, 7, 9), (1, 3, 5, 1), (5, 1, 1, 3), (5, 7, 3)],
    InstanceNorm3d: [(2, 3, 5, 3, 7), (3, 5, 1, 1, 3), (3, 5, 3, 7)],
}
ALL = [(cls, shape) for cls, shapes in SHAPES.items() for shape in shapes]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def channels(cls: Any, shape: tuple[int, ...]) -> int:
    return shape[0] if len(shape) == int(cls.__name__[-2]) + 1 else shape[1]


def build(cls: Any, num_features: int, **kwargs: Any) -> Any:
    return randomize(cls(num_features, **{"affine": True, **kwargs}))


def data(*shape: int, dtype: torch.dtype = torch.float32, offset: float = 5.0) -> torch.Tensor:
    return (torch.randn(shape, dtype=torch.float64) * 2.3 + offset).to(dtype)


@pytest.mark.parametrize("mode", ["own", "tracking", "running"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("cls", "shape"), ALL)
def test_every_layout(cls: Any, shape: tuple[int, ...], layout: str, mode: str) -> None:
    """`own`: no running statistics; `tracking`: they move; `running`: they normalize."""
    layer = build(cls, channels(cls, shape), track_running_stats=mode != "own")
    layer.train(mode == "tracking")
    x = LAYOUTS[layout](data(*shape))
    got = check_layer(layer, x)
    batched = len(shape) == int(cls.__name__[-2]) + 2
    if layout == "contiguous" or (layout == "channels_last" and batched):
        assert same_layout(got.output, x)
        assert same_layout(got.input, x)


@pytest.mark.parametrize("of_grad", LAYOUTS)
@pytest.mark.parametrize("of_input", LAYOUTS)
@pytest.mark.parametrize("shape", [(3, 5, 7, 9), (1, 5, 7, 3), (3, 1, 5, 7), (1, 3, 7, 1)])
def test_every_mix_of_formats_of_input_and_grad(
    shape: tuple[int, ...], of_input: str, of_grad: str
) -> None:
    # batch 1 with a channels_last grad is what torch 2.13 gets wrong
    layer = build(InstanceNorm2d, shape[1])
    check_layer(layer, LAYOUTS[of_input](data(*shape)), LAYOUTS[of_grad](torch.randn(shape)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("of_parameters", ["float32", "same"])
def test_every_dtype(dtype: torch.dtype, of_parameters: str) -> None:
    layer = build(InstanceNorm2d, 5)
    if of_parameters == "same":
        layer.to(dtype)
        randomize(layer)
    for layout in ("contiguous", "channels_last"):
        check_layer(layer, LAYOUTS[layout](data(3, 5, 7, 9, dtype=dtype)))


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("track", [True, False])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_affine_and_tracking(affine: bool, track: bool, training: bool) -> None:
    layer = build(InstanceNorm2d, 5, affine=affine, track_running_stats=track).train(training)
    assert (layer.weight is not None) == affine
    assert (layer.running_mean is not None) == track
    check_layer(layer, data(3, 5, 7, 9))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("momentum", [0.1, 0.7, 0.0, 1.0])
def test_running_statistics(momentum: float, layout: str) -> None:
    layer = build(InstanceNorm2d, 5, momentum=momentum, track_running_stats=True)
    mean, var = layer.running_mean.double(), layer.running_var.double()
    for _ in range(3):
        x = LAYOUTS[layout](data(3, 5, 7, 9))
        mean, var = reference.running_update(mean, var, x, momentum, per_sample=True)
        layer(x)
        assert_output(layer.running_mean, mean)
        assert_output(layer.running_var, var)


@pytest.mark.parametrize("momentum", [0.4, None])
@pytest.mark.parametrize("shape", [(3, 5, 9), (5, 9)])
def test_running_statistics_as_torch(shape: tuple[int, ...], momentum: float | None) -> None:
    ours = build(InstanceNorm1d, 5, momentum=momentum, track_running_stats=True).double()
    theirs = torch.nn.InstanceNorm1d(
        5, momentum=momentum, affine=True, track_running_stats=True, dtype=torch.float64
    )
    theirs.load_state_dict(ours.state_dict())
    for _ in range(3):
        x = data(*shape, dtype=torch.float64)
        assert_output(ours(x), theirs(x))
        for name, value in theirs.state_dict().items():
            assert torch.allclose(ours.state_dict()[name], value, rtol=1e-12), name
    x = data(*shape, dtype=torch.float64)
    assert_output(ours.eval()(x), theirs.eval()(x))


def test_backward_in_evaluation_after_the_statistics_changed() -> None:
    layer = build(InstanceNorm2d, 5, track_running_stats=True).eval()
    x, grad = data(3, 5, 7, 9), torch.randn(3, 5, 7, 9)
    wanted = run(layer, x, grad)
    x.requires_grad_()
    y = layer(x)
    layer.train()(data(3, 5, 7, 9, offset=-40.0))
    found = torch.autograd.grad(y, [x, layer.weight, layer.bias], grad)
    for actual, expected in zip(found, wanted[1:], strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_statistics_stay_wide_under_half(dtype: torch.dtype) -> None:
    layer = build(InstanceNorm2d, 5, track_running_stats=True)
    before = layer.running_mean.clone()
    layer.to(dtype)
    assert layer.weight.dtype == dtype
    assert layer.running_mean.dtype == layer.running_var.dtype == torch.float32
    assert torch.equal(layer.running_mean, before)
    check_layer(layer, data(3, 5, 7, 9, dtype=dtype))


def test_an_unbatched_input_is_a_batch_of_one() -> None:
    layer = build(InstanceNorm2d, 5, track_running_stats=True)
    other = build(InstanceNorm2d, 5, track_running_stats=True)
    other.load_state_dict(layer.state_dict())
    x = data(5, 7, 9)
    assert torch.equal(layer(x), other(x[None])[0])
    assert torch.equal(layer.running_var, other.running_var)


def test_a_sample_does_not_depend_on_its_batch() -> None:
    layer = build(InstanceNorm2d, 5)
    x = data(7, 5, 7, 9)
    y = layer(x)
    for i in range(7):
        assert torch.equal(layer(x[i : i + 1])[0], y[i])


@pytest.mark.parametrize("track", [True, False])
@pytest.mark.parametrize("shape", [(0, 5, 7, 9), (3, 5, 0, 9)])
def test_empty_inputs(shape: tuple[int, ...], track: bool) -> None:
    # torch 2.13 treats no positions so, and fails on no samples with an IndexError of its own
    layer = build(InstanceNorm2d, 5, track_running_stats=track)
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    x = torch.randn(shape, requires_grad=True)
    y = layer(x)
    gradients = torch.autograd.grad(y, [x, layer.weight, layer.bias], torch.randn(shape))
    assert y.shape == gradients[0].shape == shape
    assert not any(g.any() for g in gradients)
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())


@pytest.mark.parametrize("shape", [(65_537, 1, 3), (22_001, 3, 2)])
def test_more_than_65535_samples_or_statistics(shape: tuple[int, ...]) -> None:
    check_layer(build(InstanceNorm1d, shape[1]), data(*shape))


def test_an_expanded_input() -> None:
    layer = build(InstanceNorm2d, 5)
    grad = torch.randn(3, 5, 7, 1).expand(3, 5, 7, 9)
    check_layer(layer, data(5, 7, 1).expand(3, 5, 7, 9), grad)


def test_lazy_reads_its_channels_off_the_first_input() -> None:
    layer = LazyInstanceNorm1d(affine=True, track_running_stats=True)
    x = data(3, 5, 9)
    layer(x)
    assert type(layer) is InstanceNorm1d
    assert layer.num_features == 5
    check_layer(randomize(layer), x)


@pytest.mark.parametrize("way", ["layer", "mask", "compiled", "activation", "converted"])
@pytest.mark.parametrize("shape", [(2, 4, 3, 7), (4, 3, 7)], ids=["batched", "unbatched"])
def test_another_channel_count_warns_as_torch(shape: tuple[int, ...], way: str) -> None:
    x = data(*shape)
    theirs = torch.nn.InstanceNorm2d(5)
    with pytest.warns(UserWarning, match="does not match num_features") as of_torch:
        expected = theirs(x)
    layer: Any = InstanceNorm2d(5, activation="relu" if way == "activation" else None)
    if way == "converted":
        layer = truenorm.convert(theirs)
    given = {"mask": torch.ones(shape[-2:], dtype=torch.bool).expand(x.shape[:-3] + shape[-2:])}
    if way == "compiled":
        torch.compiler.reset()
        y = torch.compile(layer, backend="aot_eager", fullgraph=True)(x)
    else:
        with pytest.warns(UserWarning, match="does not match num_features") as seen:
            y = layer(x, **(given if way == "mask" else {}))
        assert len(seen) == len(of_torch) == 1
        # with a mask there is a dimension more by then
        assert way == "mask" or str(seen[0].message) == str(of_torch[0].message)
    expected = expected.relu() if way == "activation" else expected
    torch.testing.assert_close(y, expected)


def test_another_channel_count_is_an_error_where_something_has_that_size() -> None:
    for options in ({"affine": True}, {"track_running_stats": True}):
        layer = InstanceNorm2d(5, **options)
        before = {k: v.clone() for k, v in layer.state_dict().items()}
        with pytest.raises(ValueError, match=r"match num_features \(5\), but got: 4"):
            layer(data(2, 4, 3, 7))
        assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())
