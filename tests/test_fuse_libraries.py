"""fuse on blocks of transformers: what is found, and that they stay what they were."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import randomize
from test_fuse_sums import passes
from torch import Tensor, nn

import truenorm
from truenorm._models.fusing.classes import PLAN

transformers = pytest.importorskip("transformers")

TOKENS = 32, 260  # of 128 features: past 4 MiB in float32
SIZES = {
    "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 2, "vocab_size": 50, "max_position_embeddings": 2048,
}  # fmt: skip
NONE_OF_THESE = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}


def llama() -> nn.Module:
    config = transformers.LlamaConfig(**SIZES, num_key_value_heads=1, **NONE_OF_THESE)
    return transformers.LlamaModel(config)  # type: ignore[no-any-return]


def gemma() -> nn.Module:
    config = transformers.Gemma2Config(**SIZES, num_key_value_heads=1, head_dim=64, **NONE_OF_THESE)
    return transformers.Gemma2Model(config)  # type: ignore[no-any-return]


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        n_embd=128, n_layer=2, n_head=2, vocab_size=50, n_positions=2048, resid_pdrop=0.0,
        attn_pdrop=0.0, embd_pdrop=0.0, **NONE_OF_THESE,
    )  # fmt: skip
    return transformers.GPT2Model(config)  # type: ignore[no-any-return]


def bert() -> nn.Module:
    config = transformers.BertConfig(
        **SIZES, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    return transformers.BertModel(config, add_pooling_layer=False)  # type: ignore[no-any-return]


# how many sums and norms are one pass in two blocks
FOUND: dict[Callable[[], nn.Module], int] = {llama: 2, gemma: 2, gpt2: 2, bert: 4}


def pair(make: Callable[[], nn.Module], dtype: torch.dtype) -> tuple[Any, Any]:
    torch.manual_seed(0)
    theirs = truenorm.convert(randomize(make()).to(dtype))
    return theirs, truenorm.fuse(copy.deepcopy(theirs))


def trained(model: Any, grad: Tensor, **given: Any) -> list[Tensor]:
    tokens = torch.arange(grad.shape[0] * grad.shape[1]).view(grad.shape[:2]) % 50
    y = model(tokens, **given).last_hidden_state
    y.backward(grad)
    found = [y.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]
    model.zero_grad()
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", FOUND)
def test_models(make: Callable[[], nn.Module], dtype: torch.dtype) -> None:
    as_it_was, fused = pair(make, dtype)
    grad = torch.randn(*TOKENS, 128, dtype=dtype)
    ours: list[Tensor] = []
    two = 1 if dtype == torch.float32 else 2  # samples, for as many bytes
    grad = grad.repeat(two, 1, 1)
    assert passes(lambda: ours.extend(trained(fused, grad))) == FOUND[make]
    theirs = trained(as_it_was, grad)
    assert torch.equal(ours[0], theirs[0])
    bound = 1e-4 if dtype == torch.float32 else 0.05
    for one, other in zip(ours, theirs, strict=True):
        assert (one - other).norm() <= bound * other.norm()
    padded = torch.ones(grad.shape[:2], dtype=torch.int64)
    padded[:, -7:] = 0
    assert passes(lambda: trained(fused, grad, attention_mask=padded)) == FOUND[make]


def test_a_cache_is_handed_on() -> None:
    config = transformers.LlamaConfig(**SIZES, num_key_value_heads=1, **NONE_OF_THESE)
    torch.manual_seed(0)
    model = truenorm.convert(transformers.LlamaForCausalLM(config)).eval()
    fused = truenorm.fuse(copy.deepcopy(model))
    tokens = torch.arange(8).view(1, 8)
    made = [
        m.generate(tokens, max_new_tokens=5, do_sample=False, pad_token_id=0)
        for m in (model, fused)
    ]
    assert torch.equal(*made)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*requires_grad=True:UserWarning")
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_goes_on(reentrant: bool) -> None:
    as_it_was, fused = pair(llama, torch.float32)
    layer = fused.layers[0]
    assert PLAN in vars(layer)
    grad = torch.randn(1, 12, 128)
    ran: list[int] = []
    counted = layer.self_attn.register_forward_hook(lambda *_: ran.append(1))
    for model in (as_it_was, fused):
        model.train()
        options = {"use_reentrant": reentrant}
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    theirs, ours = trained(as_it_was, grad), trained(fused, grad)
    assert len(ran) == 2  # once more in the backward pass
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)
    fused.gradient_checkpointing_disable()
    trained(fused, grad)
    assert len(ran) == 3
    counted.remove()
    kind = type(as_it_was.layers[0])
    assert type(truenorm.unfuse(fused).layers[0]) is kind


def test_said_in_the_survey() -> None:
    as_it_was, fused = pair(llama, torch.float32)
    of_blocks = {row.name.rpartition(".")[2]: row.fuse for row in truenorm.survey(fused).norms[:4]}
    assert of_blocks == {
        "input_layernorm": "followed by LlamaAttention",
        "post_attention_layernorm": "fused with the sum before it",
    }
    rows = truenorm.survey(llama()).norms
    assert (
        rows[1].fuse == truenorm.survey(as_it_was).norms[1].fuse == "fuses with the sum before it"
    )
    assert rows[4].fuse.startswith("forward of LlamaModel")
