"""Inputs that are no ordinary dense tensors: served where torch's layer serves them, or refused."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from cases import randomize
from torch import Tensor

import truenorm

LAYERS = {
    "BatchNorm1d": (6,),
    "LayerNorm": (6,),
    "RMSNorm": (6,),
    "GroupNorm": (2, 6),
}


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    with warnings.catch_warnings():
        # torch: its nested tensors and its quantization are of yesterday
        warnings.simplefilter("ignore")
        yield


def test_a_strided_nested_tensor_through_layer_norm() -> None:
    theirs = randomize(torch.nn.LayerNorm(6))
    ours = truenorm.convert(copy.deepcopy(theirs))
    parts = [torch.randn(2, 6), torch.randn(5, 6)]
    grads: list[list[Tensor]] = []
    for layer in (ours, theirs):
        leaves = [p.clone().requires_grad_() for p in parts]
        nested = torch.nested.as_nested_tensor(leaves)
        y = layer(nested)
        assert y.is_nested
        # a gradient that is not the same everywhere
        y.backward(torch.nested.nested_tensor([p.sin() for p in parts]))
        grads.append([*(p.grad for p in leaves), layer.weight.grad, layer.bias.grad, *y.unbind()])
    for got, wanted in zip(*grads, strict=True):
        torch.testing.assert_close(got, wanted)


def test_a_strided_nested_tensor_through_rms_norm_is_refused_in_words() -> None:
    nested = torch.nested.nested_tensor([torch.randn(2, 6), torch.randn(5, 6)])
    with pytest.raises(ValueError, match=r"must be of layout torch\.jagged"):
        truenorm.RMSNorm(6)(nested)


@pytest.mark.parametrize("activation", [None, "relu"])
def test_an_mkldnn_tensor_through_a_batch_norm_in_evaluation(activation: Any) -> None:
    theirs = randomize(torch.nn.BatchNorm2d(3)).eval()
    ours = truenorm.convert(copy.deepcopy(theirs))
    ours.activation = activation
    x = torch.randn(2, 3, 5, 4)
    y = ours(x.to_mkldnn())
    assert y.layout is torch._mkldnn
    expected = theirs(x).relu() if activation else theirs(x)
    torch.testing.assert_close(y.to_dense(), expected)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize(
    ("dtype", "remedy"),
    [(torch.float8_e4m3fn, "convert it to a floating point dtype"), (torch.int32, "convert it")],
)
def test_dtypes_without_arithmetic(name: str, dtype: torch.dtype, remedy: str) -> None:
    layer = getattr(truenorm, name)(*LAYERS[name])
    x = torch.randn(4, 6).to(dtype)
    with pytest.raises(NotImplementedError, match=f"`input` has dtype {dtype}.*{remedy}"):
        layer(x)
    torchs = "not implemented for '(Float8_e4m3fn|Int)'|mixed dtype"
    with pytest.raises(RuntimeError, match=torchs):
        getattr(torch.nn, name)(*LAYERS[name])(x)


@pytest.mark.parametrize("name", LAYERS)
def test_sparse_and_quantized_tensors_are_refused_in_words(name: str) -> None:
    layer = getattr(truenorm, name)(*LAYERS[name])
    with pytest.raises(RuntimeError, match=r"layout torch\.sparse_coo: pass a dense one"):
        layer(torch.randn(4, 6).to_sparse())
    with pytest.raises(NotImplementedError, match=r"dtype torch\.quint8"):
        layer(torch.quantize_per_tensor(torch.randn(4, 6), 0.1, 0, torch.quint8))
