"""One pass for act(norm(x) + r): values, gradients and bits; in place; what it saves."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import CASES, LAYOUTS, Case, eps_of_torch
from pooling import only_native
from tolerances import assert_gradient, assert_output, last_place
from torch import Tensor

import truenorm
from truenorm._core import activation

LAYERS = [case for case in CASES if case.layer != "LocalResponseNorm"]
# rows and columns longer than a step of the kernels, and than a piece of a reduction
LAYERS += [
    Case("BatchNorm2d", (3,), {}, (2, 3, 37, 11)),
    Case("BatchNorm2d", (70,), {}, (3, 70, 9, 7)),
    Case("InstanceNorm1d", (2,), {"affine": True}, (2, 2, 40_001)),
    Case("GroupNorm", (2, 70), {}, (2, 70, 5, 9)),
    Case("LayerNorm", ((131,),), {}, (9, 131)),
    Case("RMSNorm", ((40_001,),), {}, (3, 40_001)),
]
EVERY = pytest.mark.parametrize("case", LAYERS, ids=[case.id for case in LAYERS])
KINDS: list[dict[str, Any]] = [
    {"activation": "relu"},
    {"activation": "leaky_relu", "leaky_relu_slope": 0.2},
    {"activation": "relu6"},
    {"activation": "hardswish"},
    {"activation": "elu", "elu_alpha": 0.7},
    {"activation": "silu"},
    {"activation": "gelu"},
    {"activation": "gelu", "gelu_approximate": "tanh"},
    {},
]


def exact(z: Tensor, options: dict[str, Any]) -> Tensor:
    match options.get("activation"):
        case "relu":
            return z.clamp(min=0)
        case "leaky_relu":
            return torch.where(z > 0, z, 0.2 * z)
        case "relu6":
            return z.clamp(0, 6)
        case "hardswish":
            return z * (z + 3).clamp(0, 6) / 6
        case "elu":
            return torch.where(z > 0, z, 0.7 * torch.expm1(z.clamp(max=0)))
        case "silu":
            return z / (1 + (-z).exp())
        case "gelu" if "gelu_approximate" in options:
            u = (2 / torch.pi) ** 0.5 * (z + 0.044715 * z**3)  # 1 + tanh(u) = 2 / (1 + e^(−2 u))
            return z * torch.sigmoid(2 * u)
        case "gelu":
            return z * 0.5 * torch.erfc(-z * 0.5**0.5)
    return z


def wide_twin(layer: Any, case: Case) -> Any:
    """torch's layer in float64, with the same state."""
    twin = getattr(torch.nn, case.layer)(*case.args, **case.kwargs)
    twin.load_state_dict(layer.state_dict())
    if case.layer == "SyncBatchNorm":
        twin.__class__ = torch.nn.BatchNorm1d  # torch's asks for CUDA
    if getattr(twin, "eps", 1) is None:
        twin.eps = eps_of_torch(next(layer.parameters()).dtype)
    return twin.double()


def placed(case: Case, dtype: torch.dtype, offset: float, layout: str) -> Tensor:
    return LAYOUTS[layout](case.input(dtype, offset)).requires_grad_()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@EVERY
def test_values_and_gradients(case: Case, dtype: torch.dtype, training: bool, layout: str) -> None:
    if layout != "contiguous" and len(case.shape) != 4:
        layout = "sliced"
    # every activation, with and without a residual, meets every dtype over the cases
    place = LAYERS.index(case) + 3 * training + len(layout)
    options, with_residual = KINDS[place % len(KINDS)], place % 3 > 0
    offset = 0.0 if dtype.itemsize == 2 else 1e3 if dtype == torch.float32 else 10.0
    layer = case._replace(kwargs={**case.kwargs, **options}).build()
    if case.layer in ("LayerNorm", "RMSNorm", "GroupNorm"):
        layer.to(dtype)
    if not training and getattr(layer, "running_mean", None) is not None:
        layer.running_mean += offset
    twin = wide_twin(layer, case).train(training)
    layer.train(training)
    x = placed(case, dtype, offset, layout)
    r = placed(case, dtype, 0.0, layout) if with_residual else None
    inputs = [t for t in (x, r) if t is not None]
    wide = [t.detach().double().requires_grad_() for t in inputs]
    y = layer(x, residual=r)
    z = twin(wide[0])
    expected = exact(z + wide[1] if with_residual else z, options)
    assert y.dtype == dtype
    if "L" not in case.layer and "RMS" not in case.layer and layout != "sliced":
        assert y.stride() == x.stride()
    if dtype.itemsize == 2:
        # where an activation crosses zero, or norm and residual cancel, float32's promise is left
        unit = last_place(expected.detach().to(dtype), dtype)
        error = (y.double() - expected).abs() - 2e-6 * (1 + expected.abs())
        assert bool((error <= 0.501 * unit).all()), f"{(error / unit).max():.3f} units off"
    else:
        assert_output(y, expected.detach())
    g = torch.randn(case.shape, dtype=torch.float64).to(dtype)
    got = torch.autograd.grad(y, [*inputs, *layer.parameters()], g)
    want = torch.autograd.grad(expected, [*wide, *twin.parameters()], g.double())
    for place, (one, other) in enumerate(zip(got, want, strict=True)):
        if dtype.itemsize == 2:
            # of the sum's gradient rounded to the dtype, as what is between two of torch's
            # operators; a parameter's is a sum of all, in which what is large may cancel
            size = other.norm() + (g.double().norm() if place >= len(inputs) else 0.0)
            assert (one.double() - other).norm() < 2 * torch.finfo(dtype).eps * size
        else:
            assert_gradient(one, other)
    for one, other in zip(layer.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(one.double(), other.double(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("options", KINDS, ids=lambda o: "-".join(map(str, o.values())))
def test_every_activation_over_its_range(options: dict[str, Any]) -> None:
    # an identity before it: z is x, over all exponents
    layer = truenorm.BatchNorm1d(1, eps=0.0, affine=False, dtype=torch.float64, **options).eval()
    for dtype in (torch.float32, torch.float64):
        size = torch.logspace(-30, 2.3, 4001, dtype=torch.float64)
        x = torch.cat([-size.flip(0), size]).to(dtype)[:, None].requires_grad_()
        wide = x.detach().double().requires_grad_()
        y, expected = layer.to(dtype)(x), exact(wide, options)
        unit = torch.finfo(dtype).eps
        error = (y.double() - expected).abs() / (expected.abs() + 1e-30)
        # in gelu's tail the rounding of the exponent grows as the exponent does; beyond, the
        # reference has no such small numbers
        bound = 3 * unit if dtype == torch.float32 else 64 * unit
        allowed, inside = bound + 0 * error, wide.detach().abs() < 12
        if options.get("activation") == "gelu":
            allowed = allowed + unit * wide.detach().abs() ** 3 / 8
        assert bool((error <= allowed)[inside].all())
        assert (y.double() - expected).abs().max() < 1e-6 * expected.abs().max()
        (got,) = torch.autograd.grad(y, x, torch.ones_like(y))
        (want,) = torch.autograd.grad(expected, wide, torch.ones_like(expected))
        assert (got.double() - want).abs().max() < (1e-6 if dtype == torch.float32 else 1e-13)


def test_infinities_and_nan_go_through() -> None:
    values = torch.tensor([float("inf"), float("-inf"), float("nan"), 1.0, -1.0, 0.0])
    x = values.repeat(8)[:, None]
    for options in KINDS:
        layer = truenorm.BatchNorm1d(1, eps=0.0, affine=False, **options).eval()
        reference = activation.act(values, *layer._act())
        y = layer(x)[:6, 0]
        torch.testing.assert_close(y[3:], reference[3:])
        assert torch.equal(y[:3].isfinite(), reference[:3].isfinite())
        assert y[2].isnan()


@only_native
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("options", KINDS, ids=lambda o: "-".join(map(str, o.values())))
def test_bits_do_not_depend_on_threads(options: dict[str, Any], layout: str) -> None:
    layer = truenorm.BatchNorm2d(70, **options)
    x, r, g = (LAYOUTS[layout](torch.randn(3, 70, 41, 40)) for _ in range(3))
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            leaves = [t.detach().clone().requires_grad_() for t in (x, r)]
            y = layer(leaves[0], residual=leaves[1])
            found.append([y, *torch.autograd.grad(y, [*leaves, *layer.parameters()], g)])
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(one, two) for one, two in zip(found[0], other, strict=True))


@only_native
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_without_a_residual_it_is_the_activation_of_the_same_bits(layout: str) -> None:
    x = LAYOUTS[layout](torch.randn(3, 70, 41, 40) + 100)
    for make in (truenorm.BatchNorm2d, truenorm.InstanceNorm2d):
        plain, fused = make(70), make(70, activation="relu")
        assert torch.equal(fused(x), F.relu(plain(x)))


# ---------------------------------------------------------------- in place


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@EVERY
def test_in_place_without_gradients(case: Case, layout: str) -> None:
    if layout == "channels_last" and len(case.shape) != 4:
        layout = "sliced"
    options = KINDS[LAYERS.index(case) % len(KINDS)]
    layer = case._replace(kwargs={**case.kwargs, **options, "overwrite_input": True}).build()
    usual = copy.deepcopy(layer)
    usual.overwrite_input = False
    x, r = (placed(case, torch.float32, 0.0, layout).detach() for _ in range(2))
    for training in (True, False):
        layer.train(training), usual.train(training)
        with torch.no_grad():
            expected = usual(x, residual=r)
            given = LAYOUTS[layout](x.clone())
            version = given._version
            y = layer(given, residual=r)
        assert torch.equal(y, expected)
        if layer.weight is not None and case.shape[0] != 5:  # an unbatched one has a copy
            assert y is given or y._base is given or y.data_ptr() == given.data_ptr()
            assert given._version > version


def test_in_place_keeps_what_the_gradient_needs() -> None:
    layer = truenorm.BatchNorm2d(5, activation="silu", overwrite_input=True)
    usual = copy.deepcopy(layer)
    usual.overwrite_input = False
    leaf = torch.randn(3, 5, 7, 9, requires_grad=True)
    g = torch.randn(3, 5, 7, 9)
    made = [torch.autograd.grad(m(leaf * 2), leaf, g)[0] for m in (layer, usual)]
    assert torch.equal(*made)


def test_in_place_is_refused() -> None:
    layer = truenorm.BatchNorm2d(5, activation="relu", overwrite_input=True)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(RuntimeError, match=r"`input` \(3, 5, 7, 9\) is a leaf that requires grad"):
        layer(torch.randn(3, 5, 7, 9, requires_grad=True))
    with pytest.raises(RuntimeError, match="is expanded: several of its elements are one in mem"):
        layer(torch.randn(3, 5, 1, 9).expand(3, 5, 7, 9))
    with pytest.raises(TypeError, match="`overwrite_input` m"):
        layer.overwrite_input = "yes"
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name]), name


# ---------------------------------------------------------------- derivatives, compiled


@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("options", KINDS, ids=lambda o: "-".join(map(str, o.values())))
def test_derivatives(options: dict[str, Any], training: bool, residual: bool) -> None:
    layer = truenorm.BatchNorm1d(3, dtype=torch.float64, **options).train(training)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([1.5, -0.5, 0.0]))
        layer.bias.copy_(torch.tensor([0.1, 0.2, -0.3]))
    layer.momentum = 0.0

    def call(x: Tensor, r: Tensor, weight: Tensor, bias: Tensor) -> Any:
        state = {"weight": weight, "bias": bias}
        return torch.func.functional_call(layer, state, (x,), {"residual": r} if residual else {})

    x, r = (torch.randn(5, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    leaves = x, r, layer.weight.detach().requires_grad_(), layer.bias.detach().requires_grad_()
    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves, atol=1e-4)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("options", KINDS[:5], ids=lambda o: "-".join(map(str, o.values())))
def test_compiled(options: dict[str, Any], training: bool) -> None:
    torch._dynamo.reset()
    layer = truenorm.BatchNorm2d(5, **options).train(training)
    twin = copy.deepcopy(layer)
    compiled = torch.compile(lambda x, r: layer(x, residual=r), fullgraph=True, backend="aot_eager")
    inputs = [torch.randn(3, 5, 7, 9, requires_grad=True) for _ in range(2)]
    g = torch.randn(3, 5, 7, 9)
    y, expected = compiled(*inputs), twin(inputs[0], residual=inputs[1])
    assert torch.equal(y, expected)
    got = torch.autograd.grad(y, [*inputs, layer.weight], g)
    want = torch.autograd.grad(expected, [*inputs, twin.weight], g)
    for one, other in zip(got, want, strict=True):
        assert_gradient(one, other.double())
    assert torch.equal(layer.running_var, twin.running_var)


def test_one_tensor_as_input_and_residual() -> None:
    layer = truenorm.GroupNorm(3, 9, activation="relu", dtype=torch.float64)
    x = torch.randn(2, 9, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: layer(x, residual=x), (x,))
    assert torch.autograd.gradgradcheck(lambda x: layer(x, residual=x), (x,))


def test_numbers_are_those_of_the_kernels() -> None:
    # each by its value at -1, told from the others
    z = torch.tensor([-1.0])
    values = [activation.act(z, kind, 0.3).item() for kind in range(9)]
    expected = [-1.0, 0.0, -0.3, -1 / 3, 0.3 * (torch.expm1(z).item()), -0.2689414, -0.1586553]
    assert activation.act(-8 * z, 8, 0.0).item() == 6.0
    assert values[:7] == pytest.approx(expected, rel=1e-6)
    assert values[7] == pytest.approx(-0.1588080, rel=1e-5)
