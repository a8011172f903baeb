"""BatchNorm1d, 2d, 3d: statistics, running statistics, modes, layouts and dtypes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import LAYOUTS, randomize, run
from checking import check_layer, same_layout, takes_bias
from tolerances import FLOAT32_FORWARD, FLOAT64, assert_gradient, assert_output, relative

from truenorm import BatchNorm1d, BatchNorm2d, BatchNorm3d, LazyBatchNorm2d, reference

SHAPES = {
    BatchNorm1d: [(7, 5), (3, 5, 9), (1, 3, 17)],
    BatchNorm2d: [(3, 5, 7, 9), (1, 3, 5, 1), (5, 1, 1, 3), (33, 17, 1, 1)],
    BatchNorm3d: [(2, 3, 5, 3, 7), (3, 5, 1, 1, 3)],
}
ALL = [(cls, shape) for cls, shapes in SHAPES.items() for shape in shapes]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def build(cls: Any, channels: int, **kwargs: Any) -> Any:
    return randomize(cls(channels, **kwargs))


def data(*shape: int, dtype: torch.dtype = torch.float32, offset: float = 5.0) -> torch.Tensor:
    return (torch.randn(shape, dtype=torch.float64) * 2.3 + offset).to(dtype)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("cls", "shape"), ALL)
def test_every_layout(cls: Any, shape: tuple[int, ...], layout: str, training: bool) -> None:
    layer = build(cls, shape[1]).train(training)
    x = LAYOUTS[layout](data(*shape))
    got = check_layer(layer, x)
    if layout in ("contiguous", "channels_last"):
        assert same_layout(got.output, x)
        assert same_layout(got.input, x)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("of_grad", LAYOUTS)
@pytest.mark.parametrize("of_input", LAYOUTS)
@pytest.mark.parametrize("shape", [(3, 5, 7, 9), (1, 5, 7, 3), (3, 1, 5, 7)])
def test_every_mix_of_formats_of_input_and_grad(
    shape: tuple[int, ...], of_input: str, of_grad: str, training: bool
) -> None:
    layer = build(BatchNorm2d, shape[1]).train(training)
    check_layer(layer, LAYOUTS[of_input](data(*shape)), LAYOUTS[of_grad](torch.randn(shape)))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("of_parameters", ["float32", "same"])
def test_every_dtype(dtype: torch.dtype, of_parameters: str, training: bool) -> None:
    layer = build(BatchNorm2d, 5).train(training)
    if of_parameters == "same":
        layer.to(dtype)
        randomize(layer)
    for layout in ("contiguous", "channels_last"):
        check_layer(layer, LAYOUTS[layout](data(3, 5, 7, 9, dtype=dtype)))


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("track", [True, False])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_affine_and_tracking(affine: bool, track: bool, training: bool) -> None:
    layer = build(BatchNorm2d, 5, affine=affine, track_running_stats=track).train(training)
    assert (layer.weight is not None) == affine
    assert (layer.running_mean is not None) == track
    check_layer(layer, data(3, 5, 7, 9))


@takes_bias
def test_without_bias() -> None:
    layer = build(BatchNorm2d, 5, bias=False)
    assert layer.bias is None
    check_layer(layer, data(3, 5, 7, 9))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("momentum", [0.1, 0.7, 0.0, 1.0, None])
def test_running_statistics(momentum: float | None, layout: str) -> None:
    layer = build(BatchNorm2d, 5, momentum=momentum)
    mean, var = layer.running_mean.double(), layer.running_var.double()
    for step in range(1, 4):
        x = LAYOUTS[layout](data(3, 5, 7, 9))
        factor = 1.0 / step if momentum is None else momentum
        mean, var = reference.running_update(mean, var, x, factor)
        layer(x)
        assert layer.num_batches_tracked.item() == step
        assert_output(layer.running_mean, mean)
        assert_output(layer.running_var, var)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("count", [torch.tensor(2.5), torch.tensor([3], dtype=torch.int32)])
def test_a_count_of_batches_in_another_dtype(
    count: torch.Tensor, momentum: float | None, compiled: bool
) -> None:
    """As an average of checkpoints leaves it."""
    layer, of_torch = (cls(5, momentum=momentum) for cls in (BatchNorm1d, torch.nn.BatchNorm1d))
    call = torch.compile(layer, backend="aot_eager", fullgraph=True) if compiled else layer
    for each in (layer, of_torch):
        each.num_batches_tracked = count.clone()
    for x in (data(7, 5), data(3, 5)):
        torch.testing.assert_close(call(x), of_torch(x))
    torch.testing.assert_close(layer.state_dict(), of_torch.state_dict())


def test_cumulative_average_over_batches_of_one_size_is_that_of_all() -> None:
    layer = BatchNorm1d(5, momentum=None).double()
    batches = [data(7, 5, dtype=torch.float64) for _ in range(6)]
    for batch in batches:
        layer(batch)
    means = torch.stack([b.mean(0) for b in batches])
    variances = torch.stack([b.var(0, unbiased=True) for b in batches])
    assert relative(layer.running_mean, means.mean(0)) < FLOAT64
    assert relative(layer.running_var, variances.mean(0)) < FLOAT64


def test_biased_to_normalize_and_unbiased_to_store() -> None:
    layer = BatchNorm1d(3, affine=False, momentum=1.0, eps=1e-12).double()
    x = data(2, 3, dtype=torch.float64)
    y = layer(x)
    # two values: their deviations over the biased deviation are 1 exactly, unbiased 0.707
    assert torch.allclose(y.abs(), torch.ones_like(y), rtol=1e-9)
    assert relative(layer.running_var, ((x[0] - x[1]) ** 2) / 2) < FLOAT64


def test_evaluation_changes_nothing() -> None:
    layer = build(BatchNorm2d, 5).eval()
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    layer(data(3, 5, 7, 9))
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())


def test_backward_in_evaluation_after_the_statistics_changed() -> None:
    layer = build(BatchNorm2d, 5).eval()
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
    layer = build(BatchNorm2d, 5)
    before = layer.running_var.clone()
    layer.to(dtype)
    assert layer.weight.dtype == layer.bias.dtype == dtype
    assert layer.running_mean.dtype == layer.running_var.dtype == torch.float32
    assert torch.equal(layer.running_var, before)
    x = data(3, 5, 7, 9, dtype=dtype)
    _, var = reference.running_update(layer.running_mean, before, x, 0.1)
    check_layer(layer, x)
    assert (layer.running_var.double() - var).abs().max() < FLOAT32_FORWARD * var.max()
    assert layer.double().running_mean.dtype == torch.float64


def test_statistics_built_in_half_stay_half() -> None:
    layer = BatchNorm2d(5, dtype=torch.float16)
    assert layer.half().running_var.dtype == torch.float16
    layer(data(3, 5, 7, 9, dtype=torch.float16))
    assert layer.running_var.dtype == torch.float16
    assert (layer.running_var != 1.0).all()


@pytest.mark.parametrize("shape", [(0, 5, 7, 9), (3, 5, 0, 9)])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_empty_inputs_as_torch(shape: tuple[int, ...], training: bool) -> None:
    results = []
    ours = build(BatchNorm2d, 5)
    theirs = torch.nn.BatchNorm2d(5)
    theirs.load_state_dict(ours.state_dict())
    for layer in (ours, theirs):
        x = torch.randn(shape, requires_grad=True)
        y = layer.train(training)(x)
        gradients = torch.autograd.grad(y, [x, layer.weight, layer.bias], torch.randn(shape))
        results.append((y.shape, *gradients, *layer.state_dict().values()))
    for actual, expected in zip(*results, strict=True):
        assert actual == expected if isinstance(actual, tuple) else torch.equal(actual, expected)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("shape", [(65_537, 3), (70_001, 2, 3)])
def test_more_than_65535_samples(shape: tuple[int, ...], training: bool) -> None:
    check_layer(build(BatchNorm1d, shape[1]).train(training), data(*shape))


def test_an_expanded_input() -> None:
    x = data(3, 5, 1, 9).expand(3, 5, 7, 9)
    layer = build(BatchNorm2d, 5)
    check_layer(layer, x, torch.randn(3, 5, 7, 1).expand(3, 5, 7, 9))


def test_lazy_reads_its_channels_off_the_first_input() -> None:
    layer = LazyBatchNorm2d(momentum=0.5)
    x, grad = data(3, 5, 7, 9), torch.randn(3, 5, 7, 9)
    layer(x)
    assert type(layer) is BatchNorm2d
    assert layer.num_features == 5
    assert layer.num_batches_tracked.item() == 1
    randomize(layer)
    got = check_layer(layer, x, grad)
    assert_gradient(got.bias, grad.sum((0, 2, 3)))
