"""Small models of transformers, converted: their logits, keys and classes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tolerances import FLOAT32_BETWEEN
from torch import Tensor
from torch.nn import Module

import truenorm

transformers: Any = pytest.importorskip("transformers")

TINY = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
}


def _t5() -> Module:
    config = transformers.T5Config(vocab_size=97, d_model=48, d_kv=12, d_ff=64, num_layers=2)
    return transformers.T5ForConditionalGeneration(config)


def _convnext() -> Module:
    config = transformers.ConvNextConfig(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1])
    return transformers.ConvNextForImageClassification(config)


def _cohere() -> Module:
    few = {name: value for name, value in TINY.items() if name != "head_dim"}
    config = transformers.CohereConfig(**few, use_qk_norm=True, pad_token_id=0)
    return transformers.CohereForCausalLM(config)


MODELS: dict[str, Any] = {
    "Cohere": _cohere,  # its queries' and keys' norms have a row of weights for each head
    "Llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY)),
    "Qwen3": lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**TINY)),
    "Gemma": lambda: transformers.GemmaForCausalLM(transformers.GemmaConfig(**TINY)),
    "T5": _t5,
    "ConvNeXt": _convnext,
}


def built(name: str, dtype: torch.dtype) -> Module:
    torch.manual_seed(1)
    model: Module = MODELS[name]().to(dtype).eval()
    for key, parameter in model.named_parameters():
        if parameter.dim() == 1 or "_norm." in key:
            parameter.data.add_(0.2 * torch.randn_like(parameter))
    return model


def logits(model: Module, name: str, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    if name == "ConvNeXt":
        return model(torch.randn(2, 3, 32, 32, generator=generator).to(dtype)).logits
    tokens = torch.randint(97, (2, 9), generator=generator)
    more = {"decoder_input_ids": tokens} if name == "T5" else {}
    return model(tokens, **more).logits


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits(name: str, dtype: torch.dtype) -> None:
    theirs = built(name, dtype)
    ours = truenorm.convert(copy.deepcopy(theirs))
    assert truenorm.survey(ours).left == 0
    assert truenorm.survey(ours).swapped > 3
    assert list(ours.state_dict()) == list(theirs.state_dict())
    actual, expected = logits(ours, name, dtype), logits(theirs, name, dtype)
    assert actual.dtype == expected.dtype
    scale = expected.detach().abs().max().clamp(min=1.0)
    if dtype == torch.float32:
        assert (actual - expected).abs().max() <= FLOAT32_BETWEEN * scale
        gradients = []
        for model in (ours, theirs):
            logits(model, name, dtype).square().mean().backward()
            gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()
                                        if p.grad is not None]))  # fmt: skip
        assert (gradients[0] - gradients[1]).norm() <= 1e-4 * gradients[1].norm()
    else:
        # where float32's rounding turns one value of a layer, a few of the next ones follow
        assert (actual.float() - expected.float()).abs().max() <= 2.0**-5 * scale
        assert (actual != expected).float().mean() <= 0.25
    truenorm.revert(ours)
    assert [type(m) for m in ours.modules()] == [type(m) for m in theirs.modules()]
    assert torch.equal(logits(ours, name, dtype), expected)
