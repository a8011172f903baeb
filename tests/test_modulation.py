"""scale and shift: y · (1 + scale) + shift, in a layer's call and in truenorm.functional."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import truenorm
from truenorm import functional

LAYERS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "LayerNorm": (lambda: truenorm.LayerNorm(20), (3, 7, 20)),
    "LayerNorm of two": (lambda: truenorm.LayerNorm((5, 20)), (3, 7, 5, 20)),
    "LayerNorm alone": (lambda: truenorm.LayerNorm(20, elementwise_affine=False), (3, 7, 20)),
    "RMSNorm": (lambda: truenorm.RMSNorm(20), (3, 7, 20)),
    "BatchNorm1d": (lambda: truenorm.BatchNorm1d(5), (6, 5)),
    "BatchNorm2d": (lambda: truenorm.BatchNorm2d(5), (4, 5, 6, 7)),
    "BatchNorm3d": (lambda: truenorm.BatchNorm3d(5, affine=False), (4, 5, 3, 2, 3)),
    "InstanceNorm1d": (lambda: truenorm.InstanceNorm1d(5), (4, 5, 31)),
    "InstanceNorm2d": (lambda: truenorm.InstanceNorm2d(5, affine=True), (4, 5, 6, 7)),
    "GroupNorm": (lambda: truenorm.GroupNorm(2, 6), (4, 6, 3, 5)),
    # long enough that the parts have their weights
    "LayerNorm, long": (lambda: truenorm.LayerNorm(384), (3, 50, 384)),
    "BatchNorm2d, long": (lambda: truenorm.BatchNorm2d(5), (4, 5, 40, 50)),
    "GroupNorm, long": (lambda: truenorm.GroupNorm(2, 6), (4, 6, 30, 51)),
}
GIVEN = ("sample", "all", "position", "first position", "same dimensions")


@pytest.fixture(autouse=True)
def _graphs_anew() -> Iterator[None]:
    yield
    torch.compiler.reset()


def made(name: str, training: bool = True) -> tuple[Any, Tensor]:
    torch.manual_seed(len(name))
    make, shape = LAYERS[name]
    layer = make().train(training)
    for p in layer.parameters():
        nn.init.normal_(p, 1.0)
    if getattr(layer, "running_var", None) is not None:
        layer.running_mean.normal_()
        layer.running_var.uniform_(0.5, 2.0)
    return layer, torch.randn(shape) * 2 + 1


def pair(layer: Any, x: Tensor, of: str) -> tuple[list[Tensor], list[Tensor]]:
    """Scale and shift as they are passed, and against x."""
    features = len(getattr(layer, "normalized_shape", ()))
    like = x.shape[-features:] if features else x.shape[1:2]
    n = x.shape[0]
    ones = [1] * (x.dim() - len(like) - 1)
    full = [n, *ones, *like] if features else [n, *like, *ones]
    shape: list[int] = {
        "sample": [n, *like],
        "all": list(like),
        "position": list(x.shape),
        "first position": [1, *x.shape[1:]],
        "same dimensions": full,
    }[of]
    given = [torch.randn(shape).requires_grad_() for _ in range(2)]
    if of == "sample":
        return given, [t.reshape(full) for t in given]
    if of == "all" and not features:
        return given, [t.reshape(1, *like, *ones) for t in given]
    return given, given


def expected(layer: Any, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """In float64, by the layer without them."""
    wide = copy.deepcopy(layer).double()
    y: Tensor = wide(x.double())
    return y * (1.0 + scale.double()) + shift.double()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("of", GIVEN)
@pytest.mark.parametrize("name", LAYERS)
def test_values_and_gradients(name: str, of: str, training: bool) -> None:
    layer, x = made(name, training)
    given, against = pair(layer, x, of)
    x.requires_grad_()
    right = copy.deepcopy(layer)
    wanted = expected(right, x, *against)
    y = layer(x, scale=given[0], shift=given[1])
    torch.testing.assert_close(y, wanted.float(), rtol=2e-6, atol=4e-6)
    grad = torch.randn_like(y)
    leaves = [x, *given]
    for one, other in zip(
        torch.autograd.grad(y, [*leaves, *layer.parameters()], grad, retain_graph=True),
        torch.autograd.grad(wanted, leaves, grad.double(), retain_graph=True),
        strict=False,
    ):
        scale = float(other.abs().max())
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5 * scale)
    # the layer's own weight and bias, from a formula of their own
    if getattr(layer, "weight", None) is not None:
        again = copy.deepcopy(right).double()
        of_parameters = torch.autograd.grad(
            again(x.double()) * (1.0 + against[0].double()) + against[1].double(),
            list(again.parameters()), grad.double(),
        )  # fmt: skip
        found = torch.autograd.grad(y, list(layer.parameters()), grad)
        for one, other in zip(found, of_parameters, strict=True):
            scale = float(other.abs().max())
            torch.testing.assert_close(one, other.float(), rtol=1e-5, atol=1e-5 * scale)


@pytest.mark.parametrize("name", ["BatchNorm2d", "BatchNorm2d, long", "BatchNorm1d"])
def test_running_statistics_move_once(name: str) -> None:
    layer, x = made(name)
    right = copy.deepcopy(layer)
    for of in ("sample", "position"):
        (scale, shift), _ = pair(layer, x, of)
        layer(x, scale=scale, shift=shift)
        right(x)
        for one, other in zip(layer.buffers(), right.buffers(), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("only", ["scale", "shift"])
@pytest.mark.parametrize("name", LAYERS)
def test_one_of_the_two(name: str, only: str) -> None:
    layer, x = made(name)
    for of in ("sample", "position"):
        (one, _), (against, _) = pair(layer, x, of)
        zero = torch.zeros(())
        both = (against, zero) if only == "scale" else (zero, against)
        wanted = expected(layer, x, *both)
        y = layer(x, **{only: one})
        torch.testing.assert_close(y, wanted.float(), rtol=2e-6, atol=4e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", LAYERS)
def test_half_precision_is_rounded_once(name: str, dtype: torch.dtype) -> None:
    """But for float32's rounding; where scale is of x's size, as torch's operators round."""
    layer, x = made(name, training=False)
    x = x.to(dtype)
    for of in ("sample", "all", "position"):
        given, against = pair(layer, x, of)
        scale, shift = (t.detach().to(dtype) for t in given)
        wanted = expected(layer, x, *(t.detach().to(dtype) for t in against))
        y = layer(x, scale=scale, shift=shift)
        assert y.dtype == dtype
        unit = torch.finfo(dtype).eps
        error = (y.double() - wanted).abs()
        if against[0].numel() < x.numel():
            cancelled = 4e-6 * wanted.abs().max()
            assert bool((error <= 0.5 * unit * wanted.abs() * 1.01 + cancelled).all())
        else:
            terms = wanted.abs() + (wanted - against[1].detach().to(dtype)).abs()
            assert bool((error <= 2.0 * unit * terms).all())


@pytest.mark.parametrize("of", ["sample", "position"])
@pytest.mark.parametrize("name", ["LayerNorm", "BatchNorm2d", "GroupNorm", "LayerNorm, long"])
def test_with_an_activation_and_a_residual(name: str, of: str) -> None:
    layer, x = made(name)
    residual = torch.randn_like(x)
    (scale, shift), against = pair(layer, x, of)
    wanted = torch.nn.functional.silu(expected(layer, x, *against) + residual.double())
    layer.activation = "silu"
    y = layer(x, residual=residual, scale=scale, shift=shift)
    torch.testing.assert_close(y, wanted.float(), rtol=4e-6, atol=4e-6)


@pytest.mark.parametrize("of", ["sample", "position"])
@pytest.mark.parametrize("name", ["LayerNorm", "BatchNorm2d", "GroupNorm", "InstanceNorm1d"])
def test_what_is_masked_counts_nothing(name: str, of: str) -> None:
    layer, x = made(name)
    mask = torch.rand(x.shape[:-1] if "Layer" in name else (x.shape[0], *x.shape[2:])) < 0.6
    (scale, shift), against = pair(layer, x, of)
    valid = mask[..., None] if "Layer" in name else mask[:, None]
    wide = copy.deepcopy(layer).double()
    plain = wide(x.double(), mask=mask)
    wanted = torch.where(valid, plain * (1 + against[0]) + against[1], 0.25)
    x = torch.where(valid, x, torch.nan).requires_grad_()
    if of == "position":
        scale, shift = (torch.where(valid, t, torch.nan) for t in (scale, shift))
    y = layer(x, mask=mask, padding_value=0.25, scale=scale, shift=shift)
    torch.testing.assert_close(y, wanted.float(), rtol=2e-6, atol=4e-6)
    (of_x,) = torch.autograd.grad(y, x, torch.randn_like(y))
    assert bool(of_x.isfinite().all())


@pytest.mark.parametrize("name", ["BatchNorm2d", "BatchNorm2d, long", "GroupNorm, long"])
def test_channels_last_stays(name: str) -> None:
    layer, x = made(name)
    last = x.contiguous(memory_format=torch.channels_last)
    for of in ("sample", "position"):
        (scale, shift), _ = pair(layer, x, of)
        y = copy.deepcopy(layer)(last, scale=scale, shift=shift)
        wanted = copy.deepcopy(layer)(x, scale=scale, shift=shift)
        torch.testing.assert_close(y, wanted, rtol=2e-6, atol=4e-6)
        assert y.is_contiguous(memory_format=torch.channels_last)


def test_a_channel_axis_and_no_batch() -> None:
    layer = truenorm.InstanceNorm2d(5, channel_axis=-1, affine=True)
    x, scale, shift = torch.randn(2, 6, 7, 5), torch.randn(2, 1, 1, 5), torch.randn(2, 5)
    wanted = layer(x) * (1 + scale) + shift[:, None, None]
    torch.testing.assert_close(layer(x, scale=scale, shift=shift), wanted, rtol=2e-6, atol=4e-6)
    plain = truenorm.InstanceNorm2d(5)
    alone = torch.randn(5, 6, 7)
    for t in (torch.randn(5), torch.randn(5, 1, 1)):
        wanted = plain(alone) * (1 + t.reshape(5, 1, 1))
        torch.testing.assert_close(plain(alone, scale=t), wanted, rtol=2e-6, atol=4e-6)


@pytest.mark.parametrize("policy", ["renorm", "virtual_batch_size", "frozen"])
def test_policies(policy: str) -> None:
    options: dict[str, Any] = {
        "renorm": {"renorm": True},
        "virtual_batch_size": {"virtual_batch_size": 2},
        "frozen": {},
    }[policy]
    layer = truenorm.BatchNorm2d(5, **options)
    right = truenorm.BatchNorm2d(5, **options)
    if policy == "frozen":
        for each in (layer, right):
            each.statistics_frozen = True
    x = torch.randn(6, 5, 20, 30)
    for shape in ((6, 5), (6, 5, 20, 30), (5,)):
        scale, shift = torch.randn(shape), torch.randn(shape)
        full = [t.reshape(-1, 5, 1, 1) if t.dim() < 4 else t for t in (scale, shift)]
        wanted = right(x) * (1 + full[0]) + full[1]
        y = layer(x, scale=scale, shift=shift)
        torch.testing.assert_close(y, wanted, rtol=4e-6, atol=8e-6)


@pytest.mark.parametrize("name", ["LayerNorm, long", "BatchNorm2d, long", "GroupNorm", "RMSNorm"])
def test_second_derivatives(name: str) -> None:
    layer, x = made(name)
    layer = layer.double()
    x = x[:2, :5].double() if "Norm2d" not in name else x[:2, :, :5, :4].double()
    if "Group" in name:
        layer, x = truenorm.GroupNorm(2, 4).double(), torch.randn(2, 4, 3, dtype=torch.float64)
    for of in ("sample", "position"):
        given, _ = pair(layer, x, of)
        if x.numel() > 400:
            x = x[..., :20] if "Layer" not in name else x[:, :1]
            given, _ = pair(layer, x, of)
        leaves = [t.detach().double().requires_grad_() for t in (x, *given)]

        def run(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
            return layer(x, scale=scale, shift=shift)  # type: ignore[no-any-return]

        assert torch.autograd.gradcheck(run, leaves, fast_mode=True)
        assert torch.autograd.gradgradcheck(run, leaves, fast_mode=True)


@pytest.mark.parametrize("of", ["sample", "position"])
@pytest.mark.parametrize("name", ["LayerNorm, long", "BatchNorm2d, long", "LayerNorm"])
def test_compiled(name: str, of: str) -> None:
    layer, x = made(name)
    given, _ = pair(layer, x, of)
    wanted = copy.deepcopy(layer)(x, scale=given[0], shift=given[1])
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    y = compiled(x, scale=given[0], shift=given[1])
    torch.testing.assert_close(y, wanted, rtol=2e-6, atol=4e-6)
    grad = torch.randn_like(y)
    for one, other in zip(
        torch.autograd.grad(y, given, grad), torch.autograd.grad(wanted, given, grad), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-4)


def test_vmap_and_jacobians() -> None:
    layer, x = made("LayerNorm alone")
    scale, shift = torch.randn(2, 3, 20), torch.randn(2, 3, 20)
    mapped = torch.func.vmap(lambda s, t: layer(x, scale=s, shift=t))(scale, shift)
    for k in range(2):
        wanted = layer(x, scale=scale[k], shift=shift[k])
        torch.testing.assert_close(mapped[k], wanted, rtol=2e-6, atol=4e-6)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_traced_and_exported() -> None:
    layer, x = made("GroupNorm, long")
    (scale, shift), _ = pair(layer, x, "sample")

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = layer

        def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
            return self.norm(x, scale=scale, shift=shift)  # type: ignore[no-any-return]

    inputs = x, scale.detach(), shift.detach()
    model = Model().eval()
    wanted = model(*inputs)
    for traced in (
        torch.jit.trace(model, inputs),
        torch.export.export(model, inputs).module(),
        torch.fx.symbolic_trace(model),
    ):
        torch.testing.assert_close(traced(*inputs), wanted, rtol=4e-6, atol=8e-6)


def test_functional() -> None:
    x, scale, shift = torch.randn(3, 6, 5), torch.randn(3, 6), torch.randn(3, 6)
    given = {"scale": scale, "shift": shift}
    by, to = 1 + scale[..., None], shift[..., None]
    rows = {"scale": scale[:, :5], "shift": shift[:, :5]}
    by_row, to_row = 1 + scale[:, None, :5], shift[:, None, :5]
    mean, var = torch.randn(6), torch.rand(6) + 0.5
    for y, plain in (
        (functional.instance_norm(x, **given), functional.instance_norm(x)),
        (functional.group_norm(x, 2, **given), functional.group_norm(x, 2)),
        (functional.batch_norm(x, mean, var, **given), functional.batch_norm(x, mean, var)),
    ):
        torch.testing.assert_close(y, plain * by + to, rtol=2e-6, atol=4e-6)
    for y, plain in (
        (functional.layer_norm(x, (5,), **rows), functional.layer_norm(x, (5,))),
        (functional.rms_norm(x, (5,), **rows), functional.rms_norm(x, (5,))),
    ):
        torch.testing.assert_close(y, plain * by_row + to_row, rtol=2e-6, atol=4e-6)


@pytest.mark.parametrize("of", ["sample", "position"])
def test_a_residual_that_does_not_fit_moves_nothing(of: str) -> None:
    layer, x = made("BatchNorm2d")
    (scale, shift), _ = pair(layer, x, of)
    before = copy.deepcopy(layer.state_dict())
    for residual, error in ((x[:, :, :1], ValueError), (x[:2], ValueError), ("r", TypeError)):
        with pytest.raises(error, match="`residual`"):
            layer(x, residual=residual, scale=scale, shift=shift)
    for key, value in layer.state_dict().items():
        assert torch.equal(value, before[key])


@pytest.mark.parametrize("name", ["scale", "shift"])
def test_what_does_not_fit(name: str) -> None:
    for layer, x, sizes in (
        (truenorm.LayerNorm(20), torch.randn(3, 7, 20), [(7, 20), (3, 2, 20), (3, 7, 5), (4,)]),
        (truenorm.BatchNorm2d(5), torch.randn(3, 5, 4, 4), [(2, 5), (3, 4), (3, 5, 4), (4,)]),
    ):
        before = copy.deepcopy(layer.state_dict())
        for shape in sizes:
            with pytest.raises(ValueError, match=rf"`{name}` of shape \({shape[0]},.*one for each"):
                layer(x, **{name: torch.zeros(shape)})
        with pytest.raises(TypeError, match=f"`{name}` must be a torch.Tensor, but got float"):
            layer(x, **{name: 1.0})
        with pytest.raises(TypeError, match=rf"`{name}` has dtype torch.int64: pass {name}.float"):
            layer(x, **{name: torch.zeros(x.shape, dtype=torch.int64)})
        with pytest.raises(RuntimeError, match=f"`{name}` is on device meta"):
            layer(x, **{name: torch.zeros(x.shape, device="meta")})
        for key, value in layer.state_dict().items():
            assert torch.equal(value, before[key])
    nested = torch.nested.nested_tensor(
        [torch.randn(2, 20), torch.randn(3, 20)], layout=torch.jagged
    )
    with pytest.raises(ValueError, match=f"`{name}` must be None beside a nested tensor"):
        truenorm.LayerNorm(20)(nested, **{name: torch.zeros(20)})


@pytest.mark.parametrize("shape", [(3, 20), (1, 7, 20), (3, 7, 20)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_an_input_of_integers(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    layer, x = truenorm.LayerNorm(20), torch.ones(3, 7, 20, dtype=dtype)
    with pytest.raises((RuntimeError, TypeError, ValueError)) as plain:
        layer(x)
    with pytest.raises(type(plain.value)) as found:
        layer(x, scale=torch.ones(shape))
    assert str(found.value) == str(plain.value)
