"""activation= and residual=: y = act(norm(x) + r), against float64 formulas and torch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import CASES, Case, eps_of_torch
from tolerances import relative
from torch import Tensor

import truenorm

LAYERS = [case for case in CASES if case.layer != "LocalResponseNorm"]
EVERY = pytest.mark.parametrize("case", LAYERS, ids=[case.id for case in LAYERS])
ONE = next(case for case in LAYERS if case.layer == "BatchNorm2d")

# by hand, not by the functions that the layers call
FORMULAS: dict[str, tuple[dict[str, Any], Callable[[Tensor], Tensor]]] = {
    "relu": ({}, lambda z: z.clamp(min=0)),
    "relu6": ({}, lambda z: z.clamp(0, 6)),
    "leaky_relu": ({"leaky_relu_slope": 0.2}, lambda z: torch.where(z > 0, z, 0.2 * z)),
    "elu": ({"elu_alpha": 0.7}, lambda z: torch.where(z > 0, z, 0.7 * (z.clamp(max=0).exp() - 1))),
    "gelu": ({}, lambda z: z * 0.5 * (1 + torch.erf(z * 0.5**0.5))),
    "silu": ({}, lambda z: z / (1 + (-z).exp())),
    "hardswish": ({}, lambda z: z * (z + 3).clamp(0, 6) / 6),
}
KINDS = list(FORMULAS)


def _pair(case: Case, activation: str) -> tuple[Any, Any]:
    """A layer with an activation, and torch's layer in float64 with the same state."""
    options, _ = FORMULAS[activation]
    kwargs = {**case.kwargs, "activation": activation, **options}
    ours = case._replace(kwargs=kwargs).build()
    theirs = getattr(torch.nn, case.layer)(*case.args, **case.kwargs)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs.double()


@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@EVERY
def test_against_the_formula(case: Case, training: bool, residual: bool) -> None:
    activation = KINDS[LAYERS.index(case) % len(KINDS)]
    ours, theirs = _pair(case, activation)
    ours.train(training), theirs.train(training)
    if case.layer == "SyncBatchNorm" and training:
        theirs.__class__ = torch.nn.BatchNorm1d  # torch's asks for CUDA
    if getattr(theirs, "eps", 1) is None:
        theirs.eps = eps_of_torch(torch.float32)
    x = case.input(offset=2.0).requires_grad_()
    r = case.input().requires_grad_() if residual else None
    wide = [t.detach().double().requires_grad_() for t in (x, r) if t is not None]
    y = ours(x, residual=r)
    z = theirs(wide[0])
    expected = FORMULAS[activation][1](z + wide[1] if residual else z)
    assert y.dtype == torch.float32
    assert relative(y, expected) < 1e-5
    g = torch.randn(case.shape)
    inputs = [t for t in (x, r) if t is not None]
    got = torch.autograd.grad(y, [*inputs, *ours.parameters()], g)
    want = torch.autograd.grad(expected, [*wide, *theirs.parameters()], g.double())
    for one, other in zip(got, want, strict=True):
        assert relative(one, other) < 1e-4
    for one, other in zip(ours.buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(one.double(), other.double(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("activation", KINDS)
def test_every_activation(activation: str) -> None:
    options, formula = FORMULAS[activation]
    layer = truenorm.GroupNorm(3, 9, dtype=torch.float64, activation=activation, **options)
    plain = torch.nn.GroupNorm(3, 9, dtype=torch.float64)
    x, r = torch.randn(2, 2, 9, 5, 7, dtype=torch.float64) * 2
    x = x.to(memory_format=torch.channels_last)
    y = layer(x, residual=r)
    torch.testing.assert_close(y, formula(plain(x) + r))
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(layer(x), formula(plain(x)))


def test_gelu_by_tanh() -> None:
    x = torch.randn(4, 7)
    layer = truenorm.LayerNorm(7, activation="gelu", gelu_approximate="tanh")
    expected = F.gelu(F.layer_norm(x, (7,)), approximate="tanh")
    torch.testing.assert_close(layer(x), expected)
    assert not torch.equal(layer(x), F.gelu(F.layer_norm(x, (7,))))


@pytest.mark.parametrize("activation", ["leaky_relu", "gelu"])
def test_second_derivatives(activation: str) -> None:
    layer = truenorm.BatchNorm1d(3, dtype=torch.float64, activation=activation)
    layer.track_running_stats = False
    x, r = (torch.randn(5, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def call(x: Tensor, r: Tensor) -> Any:
        return layer(x, residual=r)

    assert torch.autograd.gradcheck(call, (x, r))
    assert torch.autograd.gradgradcheck(call, (x, r))


@pytest.mark.parametrize("way", ["compile", "vmap", "export", "fx", "copy"])
def test_every_way_to_call(way: str) -> None:
    layer: Any = truenorm.GroupNorm(3, 9, activation="silu")
    x, r = torch.randn(2, 4, 2, 9, 5)
    if way == "vmap":
        got = torch.vmap(lambda x, r: layer(x, residual=r))(x, r)
        torch.testing.assert_close(
            got, torch.stack([layer(*p[:1], residual=p[1]) for p in zip(x, r, strict=True)])
        )
        return
    x, r = x[0], r[0]
    expected = F.silu(F.group_norm(x, 3) + r)

    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = layer

        def forward(self, x: Tensor, r: Tensor) -> Any:
            return self.norm(x, residual=r)

    block: Any = Block()
    if way == "compile":
        block = torch.compile(block, fullgraph=True, backend="aot_eager")
    elif way == "export":
        block = torch.export.export(block, (x, r)).module()
    elif way == "fx":
        block = torch.fx.symbolic_trace(block)
        assert [n.op for n in block.graph.nodes].count("call_module") == 1
    else:
        block = copy.deepcopy(block)
    torch.testing.assert_close(block(x, r), expected)


def test_padded_outputs_are_padding_in_the_end() -> None:
    layer = truenorm.BatchNorm1d(5, activation="elu")
    x, r = torch.randn(2, 3, 5, 9)
    lengths = torch.tensor([9, 4, 6])
    valid = torch.arange(9) < lengths[:, None]
    r[~valid[:, None].expand_as(r)] = float("nan")
    leaves = [t.requires_grad_() for t in (x, r)]
    y = layer(x, residual=r, lengths=lengths, padding_value=-3.0)
    rows = [t.movedim(1, -1)[valid] for t in (y, x, r)]
    expected = F.elu(F.batch_norm(rows[1], None, None, training=True) + rows[2])
    torch.testing.assert_close(rows[0], expected)
    assert bool((y.movedim(1, -1)[~valid] == -3.0).all())
    for gradient in torch.autograd.grad(y, leaves, torch.randn_like(y)):
        assert bool((gradient.movedim(1, -1)[~valid] == 0).all())
        assert bool(gradient.isfinite().all())


def test_padded_rows() -> None:
    layer = truenorm.LayerNorm(7, activation="silu")
    x, r = torch.randn(2, 3, 5, 7)
    mask = torch.rand(3, 5) > 0.4
    y = layer(x, residual=r, mask=mask, padding_value=2.0)
    expected = torch.where(mask[..., None], F.silu(F.layer_norm(x, (7,)) + r), 2.0)
    torch.testing.assert_close(y, expected)


def test_channel_axis_and_unbatched() -> None:
    layer = truenorm.InstanceNorm1d(5, channel_axis=-1, activation="relu")
    x, r = torch.randn(2, 9, 5)
    mask = torch.rand(9) > 0.3
    y = layer(x, residual=r, mask=mask)
    var, mean = torch.var_mean(x[mask], 0, correction=0)
    expected = ((x[mask] - mean) / (var + 1e-5).sqrt() + r[mask]).clamp(min=0)
    torch.testing.assert_close(y[mask], expected)
    assert not y[~mask].any()


def test_nested() -> None:
    layer = truenorm.InstanceNorm1d(5, channel_axis=-1, activation="hardswish")
    parts = [torch.randn(n, 5) for n in (4, 7)]
    x = torch.nested.nested_tensor(parts, layout=torch.jagged)
    r = torch.nested.nested_tensor_from_jagged(torch.randn(11, 5), x.offsets())
    for part, s, y in zip(parts, r.unbind(), layer(x, residual=r).unbind(), strict=True):
        var, mean = torch.var_mean(part, 0, correction=0)
        torch.testing.assert_close(y, F.hardswish((part - mean) / (var + 1e-5).sqrt() + s))
    with pytest.raises(ValueError, match="nested tensor and `input` is"):
        layer(x, residual=torch.randn(2, 7, 5))


def test_options_of_a_layer() -> None:
    layer = truenorm.BatchNorm1d(5)
    held = set(vars(layer))
    layer.activation, layer.leaky_relu_slope = "leaky_relu", 0.3
    assert repr(layer).endswith("activation='leaky_relu', leaky_relu_slope=0.3)")
    x = torch.randn(4, 5)
    torch.testing.assert_close(
        layer(x), F.leaky_relu(F.batch_norm(x, None, None, training=True), 0.3)
    )
    layer.activation, layer.leaky_relu_slope = None, 0.01
    assert set(vars(layer)) == held
    assert set(layer.state_dict()) == set(torch.nn.BatchNorm1d(5).state_dict())


def test_options_are_checked() -> None:
    with pytest.raises(ValueError, match=r"`activation` must be None or one of \"relu\".*'swish'"):
        truenorm.BatchNorm2d(5, activation="swish")
    layer = truenorm.LayerNorm(5)
    for value in (float("nan"), "0.1", True):
        with pytest.raises(ValueError, match="`leaky_relu_slope` must be a finite number"):
            layer.leaky_relu_slope = value
    with pytest.raises(
        ValueError, match=r"`gelu_approximate` must be .none. or .tanh., but got 'erf'"
    ):
        layer.gelu_approximate = "erf"
    assert not layer._chosen()


@pytest.mark.parametrize(
    ("residual", "error", "match"),
    [
        (torch.randn(3, 5, 1, 9), ValueError, r"`residual` must have the shape of `input`.*expand"),
        (torch.randn(3, 5, 7, 9).double(), ValueError, r"dtype of `input`, torch.float32, but got"),
        (torch.randn(3, 5, 7, 9, device="meta"), ValueError, r"`residual` is on device meta"),
        (1.0, TypeError, r"`residual` must be a torch.Tensor, but got float"),
    ],
)
def test_residual_is_checked_first(residual: Any, error: type[Exception], match: str) -> None:
    layer = ONE.build()
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(error, match=match):
        layer(ONE.input(), residual=residual)
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_half_precision_keeps_its_dtype() -> None:
    layer = truenorm.RMSNorm(64, dtype=torch.bfloat16, activation="gelu")
    x, r = torch.randn(2, 8, 64).bfloat16()
    y = layer(x, residual=r)
    assert y.dtype == torch.bfloat16
    wide = F.gelu(F.rms_norm(x.double(), (64,), eps=eps_of_torch(torch.bfloat16)) + r.double())
    # the norm's output, the sum and the activation are rounded one by one
    assert relative(y, wide) < 3 * 2.0**-8


def test_autocast_lets_a_wide_residual_through() -> None:
    x, r = torch.randn(3, 5, 7, 9).bfloat16(), torch.randn(3, 5, 7, 9)
    layer = truenorm.BatchNorm2d(5, activation="relu").eval()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x, residual=r)
    torch.testing.assert_close(y.float(), (x + r).relu().float(), rtol=1e-2, atol=1e-2)


def test_fold_leaves_the_activation_in_the_layers_place() -> None:
    norm = truenorm.BatchNorm2d(4, activation="silu")
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2.0)
    torch.nn.init.normal_(norm.weight)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), norm).eval()
    folding = truenorm.fold(model)
    assert [f.name for f in folding.folded] == ["1"]
    assert [type(m) for m in folding.model.modules()][-1] is torch.nn.SiLU
    x = torch.randn(2, 3, 6, 5)
    torch.testing.assert_close(folding.model(x), model(x), rtol=1e-5, atol=1e-5)


def test_revert_refuses_an_activation_and_forgets_its_coefficients() -> None:
    model = torch.nn.Sequential(truenorm.LayerNorm(4, activation="elu", elu_alpha=2.0))
    with pytest.raises(ValueError, match=r"`model` has 1 layer\(s\) with an activation.*'0'"):
        truenorm.revert(model)
    assert type(model[0]) is truenorm.LayerNorm
    model[0].activation = None
    assert type(truenorm.revert(model)[0]) is torch.nn.LayerNorm
    assert "elu_alpha" not in vars(model[0])
