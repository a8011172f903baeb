"""Hugging Face's `kernels`: kernelize puts truenorm into norms, each in its own order of casts."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from test_rules import BF16, HF, HandRMSNorm, Holder, close, of
from torch import nn
from torch.nn import Module

import truenorm
from truenorm._models import kernelizing
from truenorm.nn import _orders

kernels: Any = pytest.importorskip("kernels")
SIZE = 48
NORMS: dict[str, Any] = {
    "Llama": lambda: of(f"{HF}.llama.modeling_llama.LlamaRMSNorm", SIZE),
    "GptOss": lambda: of(f"{HF}.gpt_oss.modeling_gpt_oss.GptOssRMSNorm", SIZE),
    "Qwen3.5": lambda: of(f"{HF}.qwen3_5.modeling_qwen3_5.Qwen3_5RMSNorm", SIZE),
    "Qwen3-Next, gated": lambda: of(
        f"{HF}.qwen3_next.modeling_qwen3_next.Qwen3NextRMSNormGated", SIZE
    ),
    "Mamba2, gated": lambda: of(f"{HF}.mamba2.modeling_mamba2.MambaRMSNormGated", SIZE, 12),
    "none that is known": lambda: HandRMSNorm(SIZE, change="eps outside"),
}


def is_gated(norm: Module) -> bool:
    return "Gated" in type(norm).__name__


@pytest.fixture(autouse=True)
def named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The classes as transformers decorates them where it finds the `kernels` that it wants."""
    for make in NORMS.values():
        norm = make()
        name = "RMSNormGated" if is_gated(norm) else "RMSNorm"
        if "Qwen3_5" in type(norm).__name__:
            name = "RMSNormZeroCentered"
        monkeypatch.setattr(type(norm), "kernel_layer_name", name, raising=False)
        monkeypatch.setattr(type(norm), "kernel_condition", lambda module: True, raising=False)


def kernelized(model: Module, mode: Any = None) -> Module:
    with kernels.use_kernel_mapping(truenorm.kernel_mapping(), inherit_mapping=False):
        made: Module = kernels.kernelize(
            model, mode=kernels.Mode.TRAINING if mode is None else mode, device="cpu",
            use_fallback=mode is not None,
        )  # fmt: skip
    return made


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_each_has_its_own_order_of_casts(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one model, by one mapping, where a name stands for several orders."""
    theirs = nn.ModuleList([make() for make in NORMS.values()]).to(dtype)
    ours = kernelized(copy.deepcopy(theirs))
    called = []
    real = _orders._kernel
    monkeypatch.setattr(_orders, "_kernel", lambda *args: called.append(1) or real(*args))
    torch.manual_seed(0)
    x, gate = (torch.randn(7, 5, SIZE).to(dtype) for _ in range(2))
    for norm, own in zip(ours, theirs, strict=True):  # type: ignore[call-overload]
        given = (x, gate) if is_gated(norm) else (x,)
        # the class as it was, its forward another: what kernelize does
        assert type(norm) is type(own)
        leaves = [[t.clone().requires_grad_() for t in given] for _ in range(2)]
        before = len(called)
        actual, expected = norm(*leaves[0]), own(*leaves[1])
        known = type(norm) is not HandRMSNorm
        assert (len(called) > before) == known
        close(actual, expected)
        grad = torch.randn(actual.shape).to(actual.dtype)
        one = torch.autograd.grad(actual, [*leaves[0], norm.weight], grad)
        other = torch.autograd.grad(expected, [*leaves[1], own.weight], grad)
        for a, b in zip(one, other, strict=True):
            assert (a - b).norm() <= (2e-5 if dtype != BF16 else 3e-2) * b.norm()


def test_the_modules_state_is_the_one_that_counts() -> None:
    norm: Any = kernelized(Holder(NORMS["Llama"]())).norm
    x = torch.randn(3, SIZE)
    first = norm(x)
    norm.weight = nn.Parameter(2 * norm.weight.detach())
    torch.testing.assert_close(norm(x), 2 * first)
    norm.register_forward_hook(lambda *args: torch.zeros(1))
    assert torch.equal(norm(x), torch.zeros(1))
    assert list(norm.state_dict()) == ["weight"]


def test_with_torch_compile_the_classes_own_forward_stays() -> None:
    model = Holder(NORMS["Llama"]())
    own = copy.deepcopy(model)
    kernelized(model, kernels.Mode.TRAINING | kernels.Mode.TORCH_COMPILE)
    x = torch.randn(3, SIZE)
    assert torch.equal(torch.compile(model, backend="eager", fullgraph=True)(x), own(x))


def test_converted_before() -> None:
    model = truenorm.convert(Holder(NORMS["Llama"]()))
    x = torch.randn(3, SIZE)
    expected = model(x)
    assert torch.equal(kernelized(model)(x), expected)
    with pytest.warns(UserWarning, match="forward of its own"):
        truenorm.revert(model)


def test_nothing_is_loaded_from_anywhere() -> None:
    mapping = truenorm.kernel_mapping()
    assert copy.deepcopy(mapping) == mapping
    assert mapping["RMSNorm"]["cpu"].load() is kernelizing.Norm
    assert str(mapping["RMSNormGated"]["cpu"]) == "truenorm, layer `GatedNorm`"


def test_calls_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    norm = kernelized(Holder(NORMS["Mamba2, gated"]())).norm
    x, gate = torch.randn(2, 3, SIZE)
    assert torch.equal(norm(hidden_states=x, gate=gate), norm(x, gate))
    assert norm(x).shape == x.shape
    with pytest.raises(RuntimeError, match="must match the size"):
        norm(x, gate[:, :5])


def test_an_attribute_that_the_forward_goes_by_is_changed() -> None:
    theirs = nn.ModuleList([HandRMSNorm(SIZE)])
    ours = kernelized(copy.deepcopy(theirs))
    x = torch.randn(64, SIZE)
    for change in ("", "unbiased"):
        for model in (theirs, ours):
            model[0].change = change
        torch.testing.assert_close(ours[0](x), theirs[0](x))
