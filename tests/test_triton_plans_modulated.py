"""Scale and shift on the short way of CUDA tensors: beside the formula in float64.

The second call of a kind is a plan's, with the bits of the long way.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import pytest
import torch
from on_triton import DEVICE, PRETENDS, needs_triton, plans, triton_kernels
from test_modulation import expected, pair
from test_modulation import made as modulated_layer
from test_triton_plans import long_way, same
from test_triton_plans_given import INPUTS, by_plans, close, randn
from torch import Tensor

import truenorm

pytestmark = [
    needs_triton,
    pytest.mark.skipif(PRETENDS, reason="a pretended GPU's tensors are a subclass"),
]


@pytest.fixture
def made() -> Iterator[list[int]]:
    torch.manual_seed(5)
    with plans() as counts:
        yield counts


MODULATED = (
    "LayerNorm alone", "LayerNorm", "LayerNorm of two", "RMSNorm", "BatchNorm1d", "BatchNorm2d",
    "BatchNorm3d", "InstanceNorm1d", "InstanceNorm2d", "GroupNorm",
)  # fmt: skip
LONG = "BatchNorm2d, long", "GroupNorm, long"
OF = ("sample", "all", "position", "first position", "same dimensions")


def _modulated(layer: Any, x: Tensor, given: list[Tensor], grad: Tensor, **more: Any) -> Any:
    leaves = [t.detach().requires_grad_() for t in (x, *given)]
    y = layer(leaves[0], scale=leaves[1], shift=leaves[2], **more)
    found = torch.autograd.grad(y, [*leaves, *layer.parameters()], grad)
    return [y.detach(), *found, *(b.clone() for b in layer.buffers())]


@pytest.mark.parametrize(
    ("name", "of"), [*product(MODULATED, OF), *((name, "sample") for name in LONG)]
)
def test_scale_and_shift(name: str, of: str, made: list[int]) -> None:
    layer, x = modulated_layer(name)
    layer, x = layer.to(DEVICE), x.to(DEVICE)
    given, against = ([t.to(DEVICE) for t in each] for each in pair(layer, x, of))
    grad = randn(*x.shape)
    with triton_kernels():
        found = by_plans(lambda: _modulated(copy.deepcopy(layer), x, given, grad), 2, made)
        # other values of the same kind
        other = [t * 0.5 for t in given]
        again = _modulated(copy.deepcopy(layer), x, other, grad)
    for values, got in ((against, found), ([t * 0.5 for t in against], again)):
        leaves = [t.double().requires_grad_() for t in (x, *values)]
        y = expected(layer, *leaves)
        exact = [y, *torch.autograd.grad(y, leaves, grad.double())]
        close([t.reshape(e.shape) for t, e in zip(got, exact, strict=False)], exact)


@pytest.mark.parametrize("act", ["relu", "silu"])
@pytest.mark.parametrize("of", ["sample", "position"])
@pytest.mark.parametrize("name", ["LayerNorm alone", "BatchNorm2d"])
def test_scale_and_shift_with_more(name: str, of: str, act: str, made: list[int]) -> None:
    layer, x = modulated_layer(name)
    layer, x = layer.to(DEVICE), x.to(DEVICE)
    layer.activation = act
    given, against = ([t.to(DEVICE) for t in each] for each in pair(layer, x, of))
    grad, residual = randn(*x.shape), randn(*x.shape)
    with triton_kernels():
        found = by_plans(
            lambda: _modulated(copy.deepcopy(layer), x, given, grad, residual=residual), 2, made
        )
        layer.activation = None
    leaves = [t.double().requires_grad_() for t in (x, *against)]
    y = getattr(torch.nn.functional, act)(expected(layer, *leaves) + residual.double())
    exact = [y, *torch.autograd.grad(y, leaves, grad.double())]
    close([t.reshape(e.shape) for t, e in zip(found, exact, strict=False)], exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("of", ["sample", "position", "first position"])
def test_scale_and_shift_in_half_precision(of: str, dtype: torch.dtype, made: list[int]) -> None:
    layer, x = modulated_layer("LayerNorm alone")
    x = x.to(dtype).to(DEVICE)
    given = [t.to(dtype).to(DEVICE) for t in pair(layer, x, of)[0]]
    grad = randn(*x.shape, dtype=dtype)
    with triton_kernels():
        found = by_plans(lambda: _modulated(layer, x, given, grad), 2, made)
    leaves = [t.double().requires_grad_() for t in (x, *given)]
    by, shift = (t if t.dim() == x.dim() else t[:, None] for t in leaves[1:])
    y = torch.nn.functional.layer_norm(leaves[0], (20,)) * (1 + by) + shift
    close(found, [y, *torch.autograd.grad(y, leaves, grad.double())])


def test_pieces_of_one_tensor(made: list[int]) -> None:
    """As a transformer's block has them: six of a sample, none of them dense."""
    layer, x = truenorm.LayerNorm(8, elementwise_affine=False), randn(4, 5, 8)
    six, grad = randn(4, 48), randn(4, 5, 8)

    def run(layer: Any = layer, x: Tensor = x, six: Tensor = six) -> list[Tensor]:
        leaves = [t.detach().requires_grad_() for t in (x, six)]
        shift, scale = leaves[1].chunk(6, 1)[:2]
        y = layer(leaves[0], scale=scale, shift=shift)
        return [y.detach(), *torch.autograd.grad(y, leaves, grad.to(x.dtype))]

    def formula(x: Tensor, *, scale: Tensor, shift: Tensor) -> Tensor:
        return torch.nn.functional.layer_norm(x, (8,)) * (1 + scale[:, None]) + shift[:, None]

    with triton_kernels():
        found = by_plans(run, 2, made)
    close(found, run(formula, x.double(), six.double()))


@pytest.mark.parametrize("name", ["scale", "shift"])
def test_one_of_the_two(name: str, made: list[int]) -> None:
    layer, x, by = truenorm.LayerNorm(8, elementwise_affine=False), randn(4, 5, 8), randn(4, 8)
    grad = randn(4, 5, 8)

    def run() -> list[Tensor]:
        leaves = [t.detach().requires_grad_() for t in (x, by)]
        y = layer(leaves[0], **{name: leaves[1]})
        return [y.detach(), *torch.autograd.grad(y, leaves, grad)]

    with triton_kernels():
        found = by_plans(run, 2, made)
    leaves = [t.double().requires_grad_() for t in (x, by)]
    y, of_sample = torch.nn.functional.layer_norm(leaves[0], (8,)), leaves[1][:, None]
    y = y * (1 + of_sample) if name == "scale" else y + of_sample
    close(found, [y, *torch.autograd.grad(y, leaves, grad.double())])


FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "layer_norm": lambda x, **more: truenorm.functional.layer_norm(x, (8,), **more),
    "rms_norm": lambda x, **more: truenorm.functional.rms_norm(x, (8,), **more),
    "group_norm": lambda x, **more: truenorm.functional.group_norm(x, 4, **more),
    "instance_norm": lambda x, **more: truenorm.functional.instance_norm(x, **more),
    "batch_norm": lambda x, **more: truenorm.functional.batch_norm(
        x, torch.zeros(8, device=DEVICE), torch.ones(8, device=DEVICE), training=True, **more
    ),
}


@pytest.mark.parametrize("of", ["sample", "position"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_functional(name: str, of: str, made: list[int]) -> None:
    function, x = FUNCTIONS[name], randn(4, 8, 8)
    shape = (4, 8) if of == "sample" else (1, 8, 8)
    given, grad = {"scale": randn(*shape), "shift": randn(*shape)}, randn(4, 8, 8)

    def run(x: Tensor = x, given: Any = given, plain: bool = False) -> list[Tensor]:
        leaves = [t.detach().requires_grad_() for t in (x, *given.values())]
        if plain:
            by, shift = leaves[1:]
            if of == "sample":
                at = 1 if name in ("layer_norm", "rms_norm") else 2
                by, shift = by.unsqueeze(at), shift.unsqueeze(at)
            y = function(leaves[0]) * (1 + by) + shift
        else:
            y = function(leaves[0], scale=leaves[1], shift=leaves[2])
        return [y.detach(), *torch.autograd.grad(y, leaves, grad.to(x.dtype))]

    with triton_kernels():
        found = by_plans(run, 2, made)
    wide = {key: t.double() for key, t in given.items()}
    close(found, run(x.double(), wide, plain=True))


@pytest.mark.parametrize("lies", INPUTS)
def test_scale_and_shift_of_what_is_copied(lies: str, made: list[int]) -> None:
    layer, x = truenorm.LayerNorm(8, elementwise_affine=False), INPUTS[lies](randn(4, 5, 8))
    given, grad = [randn(4, 8), randn(4, 8)], randn(4, 5, 8)
    with triton_kernels():
        found = by_plans(lambda: _modulated(layer, x, given, grad), 2, made)
    leaves = [t.double().requires_grad_() for t in (x, *given)]
    y = torch.nn.functional.layer_norm(leaves[0], (8,))
    y = y * (1 + leaves[1][:, None]) + leaves[2][:, None]
    close(found, [y, *torch.autograd.grad(y, leaves, grad.double())])


@pytest.mark.parametrize("affine", [True, False])
def test_a_weight_of_parts_is_another_kind(affine: bool) -> None:
    """What scale and shift make of a weight, is an error of a caller's."""
    x, by = randn(4, 6, 5), randn(4, 6)
    layer = truenorm.GroupNorm(2, 6, affine=affine).to(DEVICE)
    with triton_kernels(), torch.no_grad():
        for _ in range(2):
            layer(x, scale=by, shift=by)
            with pytest.raises(RuntimeError, match="weight"):
                truenorm.functional.group_norm(x, 2, by, by)


def test_one_sample_whose_rows_lie_otherwise(made: list[int]) -> None:
    layer, x = truenorm.LayerNorm(8, elementwise_affine=False), randn(1, 5, 4, 8).transpose(1, 2)
    by, shift, grad = randn(1, 8), randn(1, 8), randn(1, 4, 5, 8)
    with triton_kernels():
        found = by_plans(lambda: _modulated(layer, x, [by, shift], grad), 2, made)
    y = torch.nn.functional.layer_norm(x.double(), (8,)) * (1 + by.double()) + shift.double()
    close(found[:1], [y])


@pytest.mark.parametrize(
    "shape", [(5, 8), (40,), (2, 4, 5, 8), (4, 5, 1, 8), (4, 5), (1, 1), (4, 1, 7), (2, 1, 8)]
)
@pytest.mark.parametrize("kind", ["LayerNorm", "BatchNorm1d"])
def test_shapes_that_do_not_fit(kind: str, shape: tuple[int, ...]) -> None:
    layer, x = getattr(truenorm, kind)(8), randn(4, 5, 8)
    x = (x if kind == "LayerNorm" else x.transpose(1, 2)).contiguous()
    layer, by = layer.to(DEVICE), randn(*shape)
    before = copy.deepcopy(layer.state_dict())

    def run(name: str) -> Any:
        try:
            return layer(x, **{name: by})
        except (RuntimeError, ValueError, TypeError) as error:
            return type(error), str(error)

    with triton_kernels():
        truenorm.functional.layer_norm(x, x.shape[-1:])
        for name in ("scale", "shift"):
            wanted = long_way(lambda name=name: run(name))  # type: ignore[misc]
            if isinstance(wanted, Tensor):
                assert shape == (1, 1)
                same([run(name)], [wanted])
            else:
                assert run(name) == wanted
                same(layer.state_dict().values(), before.values())


MISFITS: list[tuple[str, Callable[[Any, Tensor], Any]]] = [
    ("shape", lambda layer, x: layer(x, scale=randn(3, 8), shift=randn(4, 8))),
    ("dtype", lambda layer, x: layer(x, scale=torch.ones(4, 8, dtype=torch.int32).to(DEVICE))),
    ("device", lambda layer, x: layer(x, scale=torch.ones(4, 8, device="meta"))),
    ("none", lambda layer, x: layer(x, scale=1.0)),
    ("input", lambda layer, x: layer(x.to(torch.int16), shift=randn(1, 5, 8))),
    ("residual", lambda layer, x: layer(x, shift=randn(1, 5, 8), residual=x[..., :3])),
]


@pytest.mark.parametrize("wrong", [run for _, run in MISFITS], ids=[name for name, _ in MISFITS])
def test_the_same_errors(wrong: Callable[[Any, Tensor], Any]) -> None:
    layer, x = truenorm.LayerNorm(8, elementwise_affine=False), randn(4, 5, 8)
    with triton_kernels():
        for of in (randn(4, 8), randn(1, 5, 8)):
            layer(x, scale=of, shift=of)
        with pytest.raises((RuntimeError, ValueError, TypeError)) as expected:
            long_way(lambda: wrong(layer, x))
        with pytest.raises(type(expected.value)) as found:
            wrong(layer, x)
        assert str(found.value) == str(expected.value)


@pytest.mark.parametrize("of", ["sample", "position"])
def test_a_residual_that_does_not_fit_moves_nothing(of: str) -> None:
    layer, x = modulated_layer("BatchNorm2d")
    layer, x = layer.to(DEVICE), x.to(DEVICE)
    scale, shift = (t.to(DEVICE) for t in pair(layer, x, of)[0])
    with triton_kernels():
        layer(x, scale=scale, shift=shift, residual=x)
        before = copy.deepcopy(layer.state_dict())
        for residual in (x[:, :, :1], x[:2], x.double(), "r"):
            with pytest.raises((ValueError, TypeError)):
                layer(x, residual=residual, scale=scale, shift=shift)
        same(layer.state_dict().values(), before.values())
