"""Other libraries' norms in one call: the bits of the long look, and only where one call is all."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from norms_by_hand import UnitNorm
from test_rules import BF16, F16, F32, HF, Holder, drawn, of
from test_rules_heads import COHERE, HandHeadNorm
from torch import Tensor, nn
from torch.library import opcheck
from torch.nn import Module
from torch.nn.utils import parametrize

import truenorm
from truenorm._core import eager, library, operators, recomputed
from truenorm._core.call import AS_GIVEN, ONE_PLUS, ROUNDS
from truenorm.nn._ruled import Ruled

pytestmark = pytest.mark.skipif(library.NATIVE is None, reason="needs the native library")

HEADS, SIZE = 3, 44
SHAPE = 2, 5, HEADS, SIZE
CLASSES: dict[str, Callable[[], Module]] = {
    "Llama": lambda: of(f"{HF}.llama.modeling_llama.LlamaRMSNorm", SIZE),
    "Gemma": lambda: of(f"{HF}.gemma.modeling_gemma.GemmaRMSNorm", SIZE),
    "T5": lambda: of(f"{HF}.t5.modeling_t5.T5LayerNorm", SIZE),
    "no weight": lambda: of(f"{HF}.llama4.modeling_llama4.Llama4TextL2Norm", 1e-5),
    "Cohere": lambda: of(COHERE, SIZE),
    "unit": lambda: drawn(UnitNorm(SIZE)),
    "heads": lambda: of(COHERE, (HEADS, SIZE)),
    "heads, 1 + weight": lambda: of(f"{HF}.gemma.modeling_gemma.GemmaRMSNorm", (HEADS, SIZE)),
    "heads with a bias": lambda: drawn(HandHeadNorm(HEADS, SIZE)),
    "gate before": lambda: of(f"{HF}.mamba2.modeling_mamba2.MambaRMSNormGated", SIZE, 11),
    "gate after": lambda: of(f"{HF}.qwen3_next.modeling_qwen3_next.Qwen3NextRMSNormGated", SIZE),
    "gate within": lambda: of(
        f"{HF}.kimi_linear.modeling_kimi_linear.KimiLinearRMSNormGated", SIZE
    ),
}  # fmt: skip


def converted(theirs: Module) -> Any:
    ours = truenorm.convert(Holder(copy.deepcopy(theirs))).norm
    assert isinstance(ours, Ruled)
    return ours


def given(layer: Any, dtype: torch.dtype = F32, shape: tuple[int, ...] = SHAPE) -> list[Tensor]:
    torch.manual_seed(3)
    return [(torch.randn(shape) + 0.3).to(dtype) for _ in range(1 + (layer._rule.gate is not None))]


def at_once(layer: Any, x: Tensor, gate: Tensor | None = None) -> Tensor | None:
    return layer._at_once(x, gate)  # type: ignore[no-any-return]


def step(layer: Any, inputs: list[Tensor], *, directly: bool) -> list[Tensor]:
    """Output and gradients."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    with pytest.MonkeyPatch.context() as patch:
        if not directly:
            patch.setattr(Ruled, "_at_once", lambda *_: None)
        y = layer(*leaves)
    torch.manual_seed(4)
    grad = torch.randn(y.shape).to(y.dtype)
    return [y, *torch.autograd.grad(y, [*leaves, *layer.parameters()], grad)]


@pytest.mark.parametrize(
    ("name", "dtype"),
    # whose every step in half precision rounds
    [(n, d) for n in CLASSES for d in (F32, BF16, F16) if n != "unit" or d == F32],
)
def test_the_bits_of_the_long_look(name: str, dtype: torch.dtype) -> None:
    ours = converted(CLASSES[name]().to(dtype))
    inputs = given(ours, dtype)
    assert at_once(ours, *inputs) is not None
    one, other = (step(ours, inputs, directly=directly) for directly in (True, False))
    for a, b in zip(one, other, strict=True):
        assert a.shape == b.shape
        assert a.stride() == b.stride()
        assert torch.equal(a, b)
    with torch.no_grad():
        assert torch.equal(ours(*inputs), one[0])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("name", ["Llama", "heads", "gate after"])
def test_what_is_not_for_one_call(name: str) -> None:
    theirs = CLASSES[name]()
    ours = converted(theirs)
    inputs = given(ours)
    assert at_once(ours, *inputs) is not None
    refused = {
        "another dtype": [x.double() for x in inputs],
        "strided": [x.transpose(0, 1) for x in inputs],
        "another size": [x[..., 1:].contiguous() for x in inputs],
        "empty": [x[:0] for x in inputs],
        "of no layout": [x.to_sparse() for x in inputs],
        "nested": [torch.nested.nested_tensor(list(x)) for x in inputs],
        "elsewhere": [x.to("meta") for x in inputs],
        "a subclass's": [x.as_subclass(type("Own", (Tensor,), {})) for x in inputs],
    }  # fmt: skip
    for case, wrong in refused.items():
        assert at_once(ours, *wrong) is None, case
    with torch.autocast("cpu"):
        assert at_once(ours, *inputs) is None
    with torch.autograd.forward_ad.dual_level():
        assert at_once(ours, *inputs) is None
    other = converted(theirs)
    other.weight = nn.Parameter(ours.weight.detach().double())
    assert at_once(other, *inputs) is None
    other = converted(theirs)
    parametrize.register_parametrization(other, "weight", nn.Identity())
    assert at_once(other, *inputs) is None
    torch.testing.assert_close(other(*inputs), theirs(*inputs))
    eps = ours._rule.eps
    for value in (None, -1e-5, torch.tensor(1e-5), 1):
        setattr(ours, eps, value)
        assert at_once(ours, *inputs) is None


def test_ranks_that_were_not_proven() -> None:
    ours = converted(CLASSES["heads"]())
    assert at_once(ours, torch.randn(HEADS, SIZE)) is None
    assert at_once(ours, torch.randn(1, 1, 1, HEADS, SIZE)) is None


def test_one_row_for_all_heads() -> None:
    theirs = of(COHERE, (1, SIZE))
    ours = converted(theirs)
    x = torch.randn(SHAPE)
    assert at_once(ours, x) is None
    torch.testing.assert_close(ours(x), theirs(x))


# --- groups of trailing dimensions, which the short way's operators have


@pytest.mark.parametrize("dtype", [F32, BF16, F16, torch.float64])
@pytest.mark.parametrize("kind", [eager.rms, eager.layer])
def test_groups_of_trailing_dimensions(kind: Any, dtype: torch.dtype) -> None:
    torch.manual_seed(5)
    x, grad = ((torch.randn(SHAPE) + 1.0).to(dtype) for _ in range(2))
    weight, bias = (torch.randn(HEADS, SIZE).to(dtype) for _ in range(2))
    rows = x.reshape(-1, HEADS * SIZE)
    by_rows = kind(1) & ~eager.layer(1) | eager.group(HEADS)
    made = []
    for given, form, like in (
        (x, kind(2) | eager.group(HEADS), weight.shape),
        (rows, by_rows, (HEADS * SIZE,)),
    ):
        w, b = weight.reshape(like), bias.reshape(like)
        y, record = operators.eager_norm(given, w, b, form | 7, 1e-4)
        pulled = operators.eager_norm_backward(grad.view(given.shape), given, record, w)
        made.append([y, *pulled[:3]])
    for of_dims, of_rows in zip(*made, strict=True):
        assert torch.equal(of_dims.reshape(of_rows.shape), of_rows)
    assert made[0][0].shape == x.shape
    assert made[0][2].shape == weight.shape
    # and in another memory format, with the same bits
    turned = x.transpose(0, 1).contiguous().transpose(0, 1)
    y, _ = operators.eager_norm(turned, weight, bias, kind(2) | eager.group(HEADS), 1e-4)
    assert torch.equal(y, made[0][0])


def test_groups_that_do_not_fit() -> None:
    x = torch.randn(SHAPE)
    refused = {
        eager.rms(2) | eager.group(5): "`num_groups` .* must divide the values of the last 2",
        eager.rms(2) | eager.group(HEADS) | ROUNDS: "has ROUNDS or AS_GIVEN",
        eager.layer(2) | eager.group(HEADS) | AS_GIVEN: "has ROUNDS or AS_GIVEN",
    }
    for form, words in refused.items():
        with pytest.raises(RuntimeError, match=words):
            operators.eager_norm(x, None, None, form, 1e-4)
    with pytest.raises(RuntimeError, match="`form` must be one over trailing dimensions"):
        operators.eager_add_norm(x, x, None, None, eager.rms(2) | eager.group(HEADS), 1e-4)
    with pytest.raises(RuntimeError, match="beside `feature_dims`"):
        operators.norm(x, *[None] * 6, eager.rms(2) | eager.group(HEADS), 1e-4, 0.0, 0.0)
    check: dict[str, Any] = {"test_utils": "test_schema"}
    form = eager.rms(2) | eager.group(HEADS) | ONE_PLUS | 3
    opcheck(operators.eager_norm, (x, torch.randn(HEADS, SIZE), None, form, 1e-4), **check)


def test_second_derivatives_of_groups() -> None:
    ours = converted(CLASSES["heads with a bias"]())
    theirs = CLASSES["heads with a bias"]()
    found = []
    for layer in (ours, theirs):
        torch.manual_seed(6)
        x = torch.randn(SHAPE, requires_grad=True)
        wanted = [x, *layer.parameters()]
        y = layer(x)
        grad = torch.randn(y.shape, requires_grad=True)
        first = torch.autograd.grad(y, wanted, grad, create_graph=True)
        found.append(torch.autograd.grad(sum(g.sin().sum() for g in first), [x, grad]))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


# --- in half precision, with an activation that rounds after the norm has


@pytest.mark.parametrize("act", [nn.Hardswish, nn.LeakyReLU])
@pytest.mark.parametrize("training", [True, False])
def test_an_activation_of_few_instructions(
    act: type[Module], training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = of("timm.layers.norm_act.BatchNormAct2d", 6, act_layer=act).to(BF16).train(training)
    torch.manual_seed(8)
    x, grad = ((2 * torch.randn(5, 6, 12, 11)).to(BF16) for _ in range(2))
    layers = [converted(theirs) for _ in range(2)]
    made = []
    for layer, beside in zip(layers, (False, True), strict=True):
        leaf = x.clone().requires_grad_()
        with monkeypatch.context() as patch:
            if beside:
                patch.setattr(type(layer), "_directly", lambda *_: None)
            else:
                patch.setattr(act, "forward", None)
            y = layer(leaf)
        made.append([y, *torch.autograd.grad(y, [leaf, *layer.parameters()], grad)])
        made[-1] += [layer.running_mean, layer.running_var]
    for a, b in zip(*made, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=2**-7, atol=2**-8)
        assert (a != b).double().mean() <= 0.005 or a.dim() == 1


def test_without_kernels_the_activation_comes_after(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = of("timm.layers.norm_act.BatchNormAct2d", 6, act_layer=nn.Hardswish).to(BF16)
    model = truenorm.convert(Holder(copy.deepcopy(theirs)))
    truenorm.freeze(model)
    x = (2 * torch.randn(5, 6, 12, 11)).to(BF16)
    monkeypatch.setattr(eager, "NATIVE", None)
    monkeypatch.setattr("truenorm.nn._ruled.NATIVE", None)
    torch.testing.assert_close(model(x), theirs.eval()(x), rtol=2**-6, atol=2**-7)


# --- about zero: what a mean takes is left out


@pytest.mark.parametrize("dtype", [F32, BF16, F16, torch.float64])
@pytest.mark.parametrize("size", [1, 3, 20, 64, 100, 1000, 70_000])
def test_sums_that_no_one_asks_for(size: int, dtype: torch.dtype) -> None:
    """A bias's gradient takes the sums of grad, which an RMSNorm leaves out: the rest is the same.

    And a LayerNorm of values whose mean is zero to the bit has an RMSNorm's output.
    """
    torch.manual_seed(7)
    for rows in (1, 8, 21):
        x, grad = (torch.randn(rows, size).to(dtype) for _ in range(2))
        weight = torch.randn(size).to(dtype)
        made = []
        for needs in (3, 7, 1, 2):
            y, record = operators.eager_norm(x, weight, None, eager.rms(1) | needs, 1e-4)
            made.append([y, *operators.eager_norm_backward(grad, x, record, weight)[:3]])
        with_bias, without = made[1], made[0]
        for a, b in zip(without[:3], with_bias[:3], strict=True):
            assert torch.equal(a, b)
        assert without[3] is None
        exact = grad.double().sum(0)
        assert (with_bias[3].double() - exact).norm() <= 4e-3 * exact.norm()
        assert torch.equal(made[2][1], without[1])
        assert torch.equal(made[3][2], without[2])
        if dtype == torch.float64:
            continue  # whose variance is about one of the values
        even = torch.cat([x, -x], 1)
        outputs = [
            operators.eager_norm(even, torch.cat([weight, weight]), None, kind(1), 1e-4)[0]
            for kind in (eager.rms, eager.layer)
        ]
        assert torch.equal(*outputs)


# --- what is made again in the backward pass rather than kept


@pytest.mark.parametrize(
    ("build", "shape"),
    [
        (lambda: of(f"{HF}.convnext.modeling_convnext.ConvNextLayerNorm", 96), (3, 30, 96)),
        (
            lambda: of("timm.layers.norm_act.BatchNormAct2d", 6, act_layer=nn.ReLU),
            (3, 6, 9, 7),
        ),
        (CLASSES["Llama"], (3, 30, SIZE)),
        (CLASSES["Gemma"], (3, 30, SIZE)),
    ],
    ids=["ConvNext", "BatchNormAct2d", "Llama", "Gemma"],
)
def test_within_recompute_outputs_none_is_kept(
    build: Callable[[], Module], shape: tuple[int, ...]
) -> None:
    torch.manual_seed(11)
    layer: Any = converted(build())
    after = nn.Conv1d(shape[1], 2, 1)
    x, grad = torch.randn(shape), torch.randn(shape[0], 2, torch.Size(shape[2:]).numel())
    found = []
    for again in (False, True):
        leaf = x.clone().requires_grad_()
        with truenorm.recompute_outputs() if again else contextlib.nullcontext():
            y = layer(leaf)
            z = after(y.flatten(2))
        assert hasattr(y, recomputed._RECIPE) == again
        found.append((z, *torch.autograd.grad(z, [leaf, *layer.parameters()], grad)))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)
