"""Masks and lengths: as if the padding had never been there."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import truenorm
from truenorm._core import geometry, plain
from truenorm._core.call import KEEP, Form

LAYERS: dict[str, Any] = {
    "InstanceNorm1d": lambda: truenorm.InstanceNorm1d(5, affine=True),
    "InstanceNorm2d": lambda: truenorm.InstanceNorm2d(19, affine=True),
    "InstanceNorm3d": lambda: truenorm.InstanceNorm3d(3, affine=True),
    "BatchNorm1d": lambda: truenorm.BatchNorm1d(5),
    "BatchNorm2d": lambda: truenorm.BatchNorm2d(19),
    "BatchNorm3d": lambda: truenorm.BatchNorm3d(3),
    "GroupNorm": lambda: truenorm.GroupNorm(3, 6),
}
POSITIONS = {"1": (611,), "2": (9, 13), "3": (4, 5, 7)}
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-13, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def make(name: str, dtype: torch.dtype = torch.float32) -> Any:
    layer = LAYERS[name]().to(dtype)
    with torch.no_grad():
        layer.weight.uniform_(-1.5, 1.5)
        layer.bias.uniform_(-1.5, 1.5)
    return layer


def shape_of(name: str, samples: int = 4) -> tuple[int, ...]:
    channels = LAYERS[name]().weight.numel()
    return samples, channels, *POSITIONS.get(name[-2], (23,))


def masks(shape: tuple[int, ...]) -> dict[str, Tensor]:
    """Lengths, random positions, runs of a few; a sample all valid, and one without values."""
    n, positions = shape[0], shape[2:]
    size = torch.Size(positions).numel()
    lengths = torch.tensor([size, size // 2 + 1, 0, 5])[:n]
    leading = torch.arange(size) < lengths[:, None]
    random = torch.rand(n, size) < 0.5
    runs = (torch.arange(size) // 40 % 2 == 0).repeat(n, 1)
    runs[0] = True
    found = {"lengths": leading, "random": random, "runs": runs}
    return {name: mask.view(n, *positions) for name, mask in found.items()}


def laid_out(x: Tensor, channels_last: bool) -> Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if channels_last else x.contiguous()


def padded_with(x: Tensor, mask: Tensor, value: float) -> Tensor:
    return torch.where(mask.unsqueeze(1), x, torch.full((), value, dtype=x.dtype))


def by_hand(x: Tensor, mask: Tensor, layer: Any) -> Tensor:
    """In float64, from the valid values taken out; zero elsewhere. Differentiable."""
    valid = mask.unsqueeze(1).expand(x.shape)
    y = torch.zeros(x.shape, dtype=torch.float64)
    groups = getattr(layer, "num_groups", x.shape[1])
    over_batch = isinstance(layer, nn.modules.batchnorm._BatchNorm)
    weight, bias = layer.weight, layer.bias
    for n in range(1 if over_batch else x.shape[0]):
        for g in range(groups):
            here = torch.zeros(x.shape, dtype=torch.bool)
            per = x.shape[1] // groups
            here[slice(None) if over_batch else n, g * per : (g + 1) * per] = True
            here &= valid
            values = x[here]
            if values.numel():
                centred = values - values.mean()
                y = y.masked_scatter(
                    here, centred / torch.sqrt((centred * centred).mean() + layer.eps)
                )
    broadcast = (1, -1, *(1 for _ in x.shape[2:]))
    return torch.where(valid, y * weight.view(broadcast) + bias.view(broadcast), 0.0)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("kind", ["lengths", "random", "runs"])
def test_outputs_and_gradients_by_hand(name: str, kind: str, channels_last: bool) -> None:
    shape = shape_of(name)
    mask = masks(shape)[kind]
    layer = make(name)
    exact = copy.deepcopy(layer).double()
    values = torch.randn(shape) * 3 + torch.randn(shape[1]).view(-1, *(1 for _ in shape[2:])) * 1e3
    # what stands in the padding is never read, in the input or in the output's gradient
    x = laid_out(padded_with(values, mask, float("nan")), channels_last).requires_grad_()
    wide = values.double().requires_grad_()
    grad = torch.randn(shape)
    y = layer(x, mask=mask)
    y.backward(laid_out(padded_with(grad, mask, float("inf")), not channels_last))
    expected = by_hand(wide, mask, exact)
    expected.backward(padded_with(grad, mask, 0.0).double())
    assert y.stride() == x.stride()
    torch.testing.assert_close(y.double(), expected, rtol=2e-6, atol=2e-6)
    assert x.grad is not None
    assert wide.grad is not None
    scale = wide.grad.abs().max()
    torch.testing.assert_close(x.grad.double() / scale, wide.grad / scale, rtol=0, atol=3e-6)
    assert (x.grad[~mask.unsqueeze(1).expand(shape)] == 0).all()
    for ours, theirs in ((layer.weight, exact.weight), (layer.bias, exact.bias)):
        scale = theirs.grad.abs().max()
        torch.testing.assert_close(
            ours.grad.double() / scale, theirs.grad / scale, rtol=0, atol=2e-6
        )


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", ["InstanceNorm1d", "BatchNorm2d", "GroupNorm"])
def test_other_dtypes(name: str, dtype: torch.dtype) -> None:
    shape = shape_of(name)
    mask = masks(shape)["random"]
    layer = make(name, dtype)
    x = torch.randn(shape, dtype=dtype) + 3
    expected = by_hand(x.double(), mask, copy.deepcopy(layer).double())
    y = layer(x, mask=mask)
    assert y.dtype == dtype
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ["InstanceNorm1d", "BatchNorm2d"])
def test_parameters_that_float32_does_not_hold(name: str) -> None:
    layer, shape = make(name, torch.float64), shape_of(name)
    with torch.no_grad():
        layer.weight.mul_(1e60)
    mask = masks(shape)["random"]
    x = torch.randn(shape).to(torch.bfloat16) * 1e-30
    y = layer(x, mask=mask)
    expected = by_hand(x.double(), mask, layer)
    assert expected.abs().max() > 1e30
    assert y.dtype == x.dtype
    torch.testing.assert_close(y, expected.to(x.dtype), rtol=1e-2, atol=1e20)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("kind", ["lengths", "random", "runs"])
def test_instance_norm_has_the_bits_of_the_unpadded_sample(kind: str, channels_last: bool) -> None:
    # long enough for rows of their own, for several pieces, and for packing
    for size in (41, 700, 80_000):
        shape = (2, 3, size)
        mask = masks(shape)[kind]
        layer = truenorm.InstanceNorm1d(3, affine=True)
        x = laid_out(torch.randn(shape) * 2 + 50, channels_last).requires_grad_()
        grad = laid_out(torch.randn(shape), channels_last)
        y = layer(x, mask=mask)
        y.backward(grad)
        assert x.grad is not None
        for n in range(2):
            alone = laid_out(x.detach()[n : n + 1, :, mask[n]], channels_last).requires_grad_()
            y_alone = layer(alone)
            y_alone.backward(laid_out(grad[n : n + 1, :, mask[n]], channels_last))
            assert torch.equal(y[n : n + 1, :, mask[n]], y_alone)
            assert alone.grad is not None
            assert torch.equal(x.grad[n : n + 1, :, mask[n]], alone.grad)


@pytest.mark.parametrize("name", LAYERS)
def test_the_same_bits_for_any_number_of_threads(name: str) -> None:
    shape = shape_of(name, 4)
    layer, x, grad = make(name), torch.randn(shape), torch.randn(shape)
    for mask in masks(shape).values():
        found = []
        before = torch.get_num_threads()
        try:
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                leaf = x.clone().requires_grad_()
                y = layer(leaf, mask=mask)
                found.append((y, *torch.autograd.grad(y, [leaf, layer.weight, layer.bias], grad)))
        finally:
            torch.set_num_threads(before)
        for others in found[1:]:
            assert all(torch.equal(a, b) for a, b in zip(found[0], others, strict=True))


@pytest.mark.parametrize(
    "name", ["InstanceNorm1d", "BatchNorm1d", "GroupNorm", "LayerNorm", "RMSNorm"]
)
def test_second_derivatives(name: str) -> None:
    x = torch.randn(3, 4, 6, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(3, 6) < 0.6
    layer: Any = {
        "InstanceNorm1d": lambda: truenorm.InstanceNorm1d(4, affine=True),
        "BatchNorm1d": lambda: truenorm.BatchNorm1d(4, track_running_stats=False),
        "GroupNorm": lambda: truenorm.GroupNorm(2, 4),
        "LayerNorm": lambda: truenorm.LayerNorm(6),
        "RMSNorm": lambda: truenorm.RMSNorm(6),
    }[name]().double()
    if name in ("LayerNorm", "RMSNorm"):
        mask = torch.rand(3, 4, 6) < 0.6
    weight = torch.randn_like(layer.weight).requires_grad_()

    def call(x: Tensor, weight: Tensor) -> Tensor:
        found: Tensor = torch.func.functional_call(layer, {"weight": weight}, x, {"mask": mask})
        return found

    assert torch.autograd.gradcheck(call, (x, weight))
    assert torch.autograd.gradgradcheck(call, (x, weight))


@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm"])
def test_rows_that_lie_in_another_order(name: str) -> None:
    layer = getattr(truenorm, name)(7)
    torch.nn.init.uniform_(layer.weight, 0.5, 1.5)
    x = torch.randn(5, 3, 7).transpose(0, 1).requires_grad_()
    mask = torch.rand(3, 5) < 0.5
    y = layer(x, mask=mask, residual=torch.ones(3, 5, 7))
    whole = layer(x.detach().contiguous()) + 1.0
    expected = torch.where(mask[..., None], whole, 0.0)
    torch.testing.assert_close(y, expected)
    grad = torch.randn(3, 5, 7)
    (of_x,) = torch.autograd.grad(y, x, grad)
    leaf = x.detach().contiguous().requires_grad_()
    (exact,) = torch.autograd.grad(layer(leaf), leaf, torch.where(mask[..., None], grad, 0.0))
    torch.testing.assert_close(of_x, exact)


@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm"])
def test_elements_of_a_single_row(name: str) -> None:
    layer = getattr(truenorm, name)(7)
    x, mask = torch.randn(7), torch.tensor([True, False, True, True, False, True, True])
    assert torch.equal(layer(x, mask=mask), layer(x[None], mask=mask[None])[0])


@pytest.mark.parametrize("groups", [0, 2, 4])
def test_kernels_and_plain_formulas_agree(groups: int) -> None:
    ops: Any = torch.ops.truenorm
    x, grad, weight = torch.randn(3, 4, 50), torch.randn(3, 4, 50), torch.randn(4)
    form = Form(geometry.Axes(groups, 0, True), 1e-5, padding=2.0)
    for mask in masks((3, 4, 50)).values():
        y, record = ops.norm(
            *(x, weight, weight, mask, None, None, None), *form.numbers(x, KEEP), 2.0
        )
        by_formula = plain.norm(x, weight, weight, mask, None, None, form)
        for a, b in zip((y, record), by_formula, strict=True):
            torch.testing.assert_close(a, b.to(a.dtype), rtol=1e-6, atol=1e-6)
        tensors = grad, x, record, weight, weight, mask, None, None
        ours = ops.norm_backward(*tensors, *form.numbers(x, 7))
        theirs = plain.norm_backward(grad, x, weight, weight, mask, None, None, form)
        for a, b in zip(ours[:3], theirs[:3], strict=True):
            torch.testing.assert_close(a, b.to(a.dtype), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("momentum", [0.3, None])
def test_running_statistics_of_batch_norm(momentum: float | None) -> None:
    layer = truenorm.BatchNorm1d(5, momentum=momentum)
    plain = truenorm.BatchNorm1d(5, momentum=momentum)
    for lengths in ([3, 7, 0], [1, 2, 9]):
        x = torch.randn(3, 5, 9) + 4
        layer(x, lengths=torch.tensor(lengths))
        plain(torch.cat([sample[:, :size] for sample, size in zip(x, lengths, strict=True)], 1).t())
        torch.testing.assert_close(layer.running_mean, plain.running_mean)
        torch.testing.assert_close(layer.running_var, plain.running_var)
        assert layer.num_batches_tracked == plain.num_batches_tracked
    before = copy.deepcopy(layer.state_dict())
    y = layer(torch.randn(3, 5, 9), lengths=torch.zeros(3, dtype=torch.int64), padding_value=-1.0)
    assert (y == -1).all()
    for name in ("running_mean", "running_var"):
        assert torch.equal(layer.state_dict()[name], before[name])


def test_running_statistics_of_instance_norm() -> None:
    layer = truenorm.InstanceNorm1d(5, track_running_stats=True, momentum=1.0)
    x, lengths = torch.randn(4, 5, 9) + 4, [3, 7, 0, 1]
    layer(x, lengths=torch.tensor(lengths))
    # a sample without values says nothing, and one value no unbiased variance
    counted = [
        sample[:, :size].double() for sample, size in zip(x, lengths, strict=True) if size > 1
    ]
    mean = torch.stack([sample.mean(1) for sample in counted]).mean(0)
    var = torch.stack([sample.var(1) for sample in counted]).mean(0)
    torch.testing.assert_close(layer.running_mean, mean.float())
    torch.testing.assert_close(layer.running_var, var.float())


def test_a_checkpointed_call_moves_running_statistics_once() -> None:
    layer, again = truenorm.BatchNorm1d(5), truenorm.BatchNorm1d(5)
    x, mask = torch.randn(3, 5, 9, requires_grad=True), torch.rand(3, 9) < 0.5
    layer(x, mask=mask)
    made: Any = torch.utils.checkpoint.checkpoint(
        lambda x: again(x, mask=mask), x, use_reentrant=False
    )
    made.backward(torch.randn_like(made))
    assert torch.equal(layer.running_var, again.running_var)  # type: ignore[arg-type]
    assert again.num_batches_tracked == 1


@pytest.mark.parametrize("name", ["BatchNorm1d", "InstanceNorm1d"])
def test_evaluation_by_running_statistics(name: str) -> None:
    layer = getattr(truenorm, name)(5, affine=True, track_running_stats=True).eval()
    layer.running_mean.normal_()
    x, mask = torch.randn(3, 5, 9), torch.rand(3, 9) < 0.5
    leaf = padded_with(x, mask, float("nan")).requires_grad_()
    y = layer(leaf, mask=mask, padding_value=3.0)
    assert torch.equal(y, padded_with(layer(x), mask, 3.0))
    y.backward(torch.randn(3, 5, 9))
    assert leaf.grad is not None
    assert leaf.grad.isfinite().all()
    assert layer.weight.grad.isfinite().all()


def test_a_sample_of_one_value() -> None:
    # among others it has no variance: what is left is the bias, and no gradient but its own
    layer = make("InstanceNorm1d")
    x = torch.randn(3, 5, 9, requires_grad=True)
    y = layer(x, lengths=torch.tensor([9, 1, 4]))
    assert torch.equal(y[1, :, 0], layer.bias)
    y.backward(torch.randn(3, 5, 9))
    assert x.grad is not None
    assert (x.grad[1] == 0).all()


def test_without_eps_what_has_no_values_leaves_no_nan() -> None:
    axes, mask = geometry.instance(3), torch.arange(9) < torch.tensor([[0], [9]])
    x, weight = torch.randn(2, 3, 9, requires_grad=True), torch.randn(3, requires_grad=True)
    grad = torch.randn(2, 3, 9)
    form = Form(axes, 0.0)
    y, _ = plain.norm(x, weight, None, mask, None, None, form)
    by_autograd = torch.autograd.grad(y, (x, weight), grad)
    alone = torch.nn.functional.instance_norm(x[1:], weight=weight, eps=0.0)
    expected = torch.autograd.grad(alone, (x, weight), grad[1:])
    by_formula = plain.norm_backward(grad, x, weight, None, mask, None, None, form)
    for found in (by_autograd, by_formula):
        for ours, theirs in zip(found, expected, strict=False):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5, check_dtype=False)


def test_a_mask_per_channel() -> None:
    layer = make("InstanceNorm1d")
    x, mask = torch.randn(3, 5, 30), torch.rand(3, 5, 30) < 0.5
    y = layer(x, mask=mask)
    for n in range(3):
        for c in range(5):
            values = x[n, c][mask[n, c]].double()
            centred = values - values.mean()
            expected = centred / torch.sqrt((centred * centred).mean() + layer.eps)
            expected = expected * layer.weight[c] + layer.bias[c]
            torch.testing.assert_close(y[n, c][mask[n, c]].double(), expected, rtol=2e-6, atol=2e-6)
    assert (y[~mask] == 0).all()
    # one channel's mask for all of them, and the channel dimension's size 1
    assert torch.equal(layer(x, mask=mask[:, :1]), layer(x, mask=mask[:, 0]))


@pytest.mark.parametrize("make_layer", [truenorm.LayerNorm, truenorm.RMSNorm])
def test_rows_and_elements_of_trailing_dimensions(make_layer: Any) -> None:
    layer = make_layer(6)
    with torch.no_grad():
        layer.weight.normal_()
    x, rows = torch.randn(3, 4, 6), torch.rand(3, 4) < 0.5
    leaf = torch.where(rows.unsqueeze(2), x, float("nan")).requires_grad_()
    y = layer(leaf, mask=rows, padding_value=2.0)
    assert torch.equal(y, torch.where(rows.unsqueeze(2), layer(x), 2.0))
    y.backward(torch.randn(3, 4, 6))
    assert leaf.grad is not None
    assert leaf.grad.isfinite().all()
    assert layer.weight.grad.isfinite().all()
    elements = torch.rand(3, 4, 6) < 0.7
    y = layer(x, mask=elements)
    values = x[1, 2][elements[1, 2]].double()
    if isinstance(layer, torch.nn.LayerNorm):
        values = values - values.mean()
    eps = torch.finfo(torch.float32).eps if layer.eps is None else layer.eps
    expected = values / torch.sqrt((values * values).mean() + eps)
    expected = expected * layer.weight[elements[1, 2]]
    torch.testing.assert_close(y[1, 2][elements[1, 2]].double(), expected, rtol=2e-6, atol=2e-6)


def test_unbatched_two_dimensional_and_nested_inputs() -> None:
    instance = make("InstanceNorm1d")
    x, mask = torch.randn(2, 5, 9), torch.tensor([[1] * 9, [1] * 4 + [0] * 5]).bool()
    assert torch.equal(instance(x[1], mask=mask[1]), instance(x, mask=mask)[1])
    assert torch.equal(instance(x[1], lengths=torch.tensor(4)), instance(x, mask=mask)[1])
    batch = make("BatchNorm1d")
    rows, valid = torch.randn(6, 5), torch.tensor([1, 0, 1, 1, 0, 1]).bool()
    torch.testing.assert_close(batch(rows, mask=valid)[valid], batch(rows[valid]))
    for make_layer in (truenorm.InstanceNorm1d, truenorm.BatchNorm1d):
        layer = make_layer(5, channel_axis=-1)
        parts = [torch.randn(size, 5) for size in (7, 3)]
        nested = torch.nested.nested_tensor(parts, layout=torch.jagged, requires_grad=True)
        y = layer(nested)
        assert y.is_nested
        assert torch.equal(y.offsets(), nested.offsets())
        padded = torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)
        expected = layer(padded, lengths=torch.tensor([7, 3]))
        torch.testing.assert_close(y.values(), torch.cat([expected[0], expected[1, :3]]))
        y.values().backward(torch.randn(10, 5))
        assert nested.grad is not None
        assert nested.grad.is_nested


@pytest.mark.parametrize("make_layer", [truenorm.LayerNorm, truenorm.RMSNorm])
@pytest.mark.parametrize("ragged", [1, 2])
def test_rows_of_a_nested_tensor(make_layer: Any, ragged: int) -> None:
    layer = make_layer(5)
    with torch.no_grad():
        layer.weight.normal_()
    parts = [torch.randn(size, 2, 5) for size in (7, 3)]
    nested = torch.nested.nested_tensor(parts, layout=torch.jagged, requires_grad=True)
    x = nested if ragged == 1 else nested.transpose(1, 2)
    y, grad = layer(x), torch.randn(10, 2, 5)
    assert y.shape == x.shape
    assert (y + x).is_nested  # the same ragged size
    rows = torch.cat(parts).requires_grad_()
    expected = layer(rows)
    values = y.values() if ragged == 1 else y.transpose(1, 2).values()
    torch.testing.assert_close(values, expected, rtol=0, atol=0)
    values.backward(grad)
    expected.backward(grad)
    assert nested.grad is not None
    torch.testing.assert_close(nested.grad.values(), rows.grad, rtol=0, atol=0)


def test_nested_tensors_that_do_not_fit() -> None:
    jagged = torch.nested.nested_tensor([torch.randn(4), torch.randn(3)], layout=torch.jagged)
    with pytest.raises(ValueError, match="ragged in none of the dimensions of normalized_shape"):
        truenorm.LayerNorm(4)(jagged)
    rows = torch.nested.nested_tensor([torch.randn(4, 5), torch.randn(3, 5)], layout=torch.jagged)
    for layer in (truenorm.BatchNorm1d(5), truenorm.InstanceNorm1d(4, channel_axis=-2)):
        with pytest.raises(
            ValueError, match=r"`channel_axis` is .*build the layer with channel_axis=-1"
        ):
            layer(rows)
    with pytest.raises(ValueError, match="leave `mask` and `lengths` out"):
        truenorm.RMSNorm(5)(rows, mask=torch.ones(2, 4, dtype=torch.bool))


def test_compiled_for_every_size() -> None:
    layer = make("GroupNorm")
    shape = shape_of("GroupNorm")
    x, mask = torch.randn(shape), masks(shape)["random"]
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    assert torch.equal(compiled(x, mask=mask), layer(x, mask=mask))


@pytest.mark.parametrize("name", ["InstanceNorm1d", "BatchNorm1d", "GroupNorm"])
def test_compiled_whole(name: str) -> None:
    layer = make(name)
    shape = shape_of(name)
    x, mask, grad = torch.randn(shape), masks(shape)["random"], torch.randn(shape)
    ours = copy.deepcopy(layer)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    expected_x, compiled_x = (x.clone().requires_grad_() for _ in range(2))
    expected, made = layer(expected_x, mask=mask), compiled(compiled_x, mask=mask)
    expected.backward(grad)
    made.backward(grad)
    assert torch.equal(made, expected)
    assert torch.equal(compiled_x.grad, expected_x.grad)  # type: ignore[arg-type]
    for key, value in layer.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value)


def test_under_vmap_and_fx() -> None:
    layer = make("InstanceNorm1d")
    x, mask = torch.randn(2, 3, 5, 9), torch.rand(2, 3, 9) < 0.5
    mapped = torch.func.vmap(lambda x, m: layer(x, mask=m))(x, mask)
    expected = torch.stack([layer(x[i], mask=mask[i]) for i in range(2)])
    torch.testing.assert_close(mapped, expected)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = layer

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return self.norm(x, mask=mask)  # type: ignore[no-any-return]

    traced = torch.fx.symbolic_trace(Net())
    assert torch.equal(traced(x[0], mask[0]), layer(x[0], mask=mask[0]))


ONE = torch.ones(3, 9, dtype=torch.bool)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"mask": torch.ones(3, 9)}, TypeError, r"`mask` must be boolean.*float32: convert it"),
        ({"mask": torch.ones(3, 8).bool()}, ValueError, r"`mask` has shape \(3, 8\).*\(3, 9\) or"),
        ({"mask": [True]}, TypeError, r"`mask` must be a torch.Tensor, but got list"),
        ({"lengths": torch.tensor([1, 2, 10])}, ValueError, r"`lengths` holds 10, .*0 to 9"),
        ({"lengths": torch.tensor([1, -2, 3])}, ValueError, r"`lengths` holds -2, .*0 to 9"),
        ({"lengths": torch.tensor([1, 2])}, ValueError, r"`lengths` has shape \(2,\).*\(3,\)"),
        ({"lengths": torch.tensor([1.0, 2, 3])}, TypeError, r"`lengths` must be integers.*long"),
        ({"lengths": torch.ones(3).long(), "mask": ONE}, ValueError, r"`mask` and `lengths` were"),
        ({"mask": ONE, "padding_value": "0"}, TypeError, r"`padding_value` must be a number.*'0'"),
        ({"padding_value": "0"}, TypeError, r"`padding_value` must be a number.*'0'"),
    ],
)
def test_bad_input_changes_nothing(
    given: dict[str, Any], error: type[Exception], message: str
) -> None:
    layer = truenorm.BatchNorm1d(5)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(error, match=message):
        layer(torch.randn(3, 5, 9), **given)
    assert all(torch.equal(before[k], v) for k, v in layer.state_dict().items())


def test_what_takes_no_mask_says_so() -> None:
    x, lengths = torch.randn(3, 5, 9), torch.tensor([1, 2, 3])
    with pytest.raises(ValueError, match=r"`lengths` goes with inputs of one dimension.*mask"):
        truenorm.InstanceNorm2d(5)(torch.randn(3, 5, 9, 2), lengths=lengths)
    with pytest.raises(ValueError, match=r"LayerNorm takes no `lengths`.*give a `mask`"):
        truenorm.LayerNorm(9)(x, lengths=lengths)


def test_recalibrate_says_that_it_sees_no_mask() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = truenorm.BatchNorm1d(5)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x, lengths=torch.tensor([1, 2, 3]))  # type: ignore[no-any-return]

    net = Net()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(NotImplementedError, match=r"'norm' is called with a `mask`.*recalibrate"):
        truenorm.recalibrate(net, [torch.randn(3, 5, 9)])
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())


def test_an_exported_call_holds_no_operator_of_truenorm() -> None:
    layer, x, mask = make("GroupNorm"), torch.randn(2, 6, 23), torch.rand(2, 23) < 0.5
    with truenorm.standard_ops():
        program = torch.export.export(layer, (x,), {"mask": mask})
    assert "truenorm" not in str(program.graph)
    torch.testing.assert_close(program.module()(x, mask=mask), layer(x, mask=mask))
