"""Models of transformers, trained as they are and converted: the same weights, the same data.

    python tools/compare_models.py [--steps N] [--threads N] [WORD …]

A row for each model and dtype: how far the converted model's logits are from the original's, and
how far its losses of N steps are (root mean square), each beside how far the original's own go when
64 of its weights begin one unit in the last place off: the most of three such nudges for the
logits, of two for the losses. Small models with random weights, on the text that scikit-learn ships
about its data sets, letter by letter, and on its images of digits.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import logging
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from sklearn import datasets
from torch import Tensor
from torch.nn import Module

import truenorm

BATCH, LENGTH = 4, 48
# names of sizes, whatever a config calls them; those that it has are set
_SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embedding_size", "dim"), 64),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "hidden_dim", "n_inner"), 128),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("head_dim", "d_kv"), 16),
    "num_key_value_heads": 2,
    "num_decoder_layers": 2,
    "num_stages": 4,
    "state_size": 16,
    "expand": 2,
    "n_groups": 2,
    "word_embed_proj_dim": 64,
    "sliding_window": 32,
    "max_position_embeddings": 128,
    "image_size": 32,
    "patch_size": 4,
    "num_labels": 10,
    "problem_type": "single_label_classification",
}
_OWN: dict[str, dict[str, Any]] = {
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "convnext": {"hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 2, 1], "patch_size": 2},
    "convnextv2": {"hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 2, 1], "patch_size": 2},
    "resnet": {"embedding_size": 16, "hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 1, 1]},
    "regnet": {"embedding_size": 16, "hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 1, 1],
               "groups_width": 8},
    "swin": {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4},
    "deberta-v2": {"relative_attention": True, "position_biased_input": False},
    "cohere": {"use_qk_norm": True, "logit_scale": 1.0},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "gemma3_text": {"query_pre_attn_scalar": 16},
    "gemma2": {"query_pre_attn_scalar": 16},
    "phi3": {"pad_token_id": 0},
    "stablelm": {"qk_layernorm": True},
}  # fmt: skip
CAUSAL = (
    "llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3_text", "phi3", "olmo", "olmo2",
    "cohere", "stablelm", "glm", "granite", "nemotron", "starcoder2", "smollm3", "gpt2", "gpt_neox",
    "opt", "bloom", "falcon", "mamba", "mamba2",
)  # fmt: skip
MASKED = "bert", "roberta", "electra", "deberta-v2", "modernbert"
OTHERS = "t5", "mt5"
IMAGES = "vit", "dinov2", "swin", "convnext", "convnextv2", "resnet", "regnet"


class Subject(NamedTuple):
    model: Module
    batch: Callable[[torch.Generator], dict[str, Tensor]]


def _text() -> Tensor:
    loaders = datasets.load_iris, datasets.load_wine, datasets.load_digits
    text = "\n".join(load()["DESCR"] for load in (*loaders, datasets.load_breast_cancer))
    letters = {letter: i for i, letter in enumerate(sorted(set(text)), start=2)}
    return torch.tensor([letters[letter] for letter in text])


def subject(name: str, dtype: torch.dtype) -> Subject:
    import transformers

    config = transformers.AutoConfig.for_model(name)
    for key, value in {**_SIZES, **_OWN.get(name, {})}.items():
        if hasattr(config, key):
            with contextlib.suppress(AttributeError):  # what follows from others
                setattr(config, key, value)
    for key, value in vars(config).items():
        if "drop" in key and isinstance(value, float):
            setattr(config, key, 0.0)
    kinds = {
        **dict.fromkeys(CAUSAL, transformers.AutoModelForCausalLM),
        **dict.fromkeys(MASKED, transformers.AutoModelForMaskedLM),
        **dict.fromkeys(OTHERS, transformers.AutoModelForSeq2SeqLM),
        **dict.fromkeys(IMAGES, transformers.AutoModelForImageClassification),
    }
    if name not in IMAGES:
        tokens = _text()
        config.vocab_size = int(tokens.max()) + 1
        for key in ("pad_token_id", "bos_token_id", "eos_token_id"):
            if getattr(config, key, None) is not None:
                setattr(config, key, 0)
        config.decoder_start_token_id = 0

        def batch(generator: torch.Generator) -> dict[str, Tensor]:
            at = torch.randint(0, len(tokens) - LENGTH, (BATCH,), generator=generator)
            given = torch.stack([tokens[i : i + LENGTH] for i in at])
            return {"input_ids": given, "labels": given}

    else:
        config.num_channels = 1
        images, labels = (torch.as_tensor(t) for t in datasets.load_digits(return_X_y=True))
        images = images.float().div(8).sub(1).reshape(-1, 1, 8, 8)
        images = torch.nn.functional.interpolate(images, scale_factor=4.0).to(dtype)

        def batch(generator: torch.Generator) -> dict[str, Tensor]:
            at = torch.randint(0, len(images), (2 * BATCH,), generator=generator)
            return {"pixel_values": images[at], "labels": labels[at]}

    torch.manual_seed(0)
    model = kinds[name].from_config(config, attn_implementation="eager")
    return Subject(model.to(dtype).train(), batch)


def nudged(model: Module, seed: int) -> Module:
    """The model with 64 weights of one matrix a unit in the last place off."""
    made = copy.deepcopy(model)
    matrices = [p for p in made.parameters() if p.dim() > 1 and p.numel() >= 64]
    weight = matrices[seed % len(matrices)].detach().view(-1)
    some = torch.randperm(len(weight), generator=torch.Generator().manual_seed(seed))[:64]
    weight[some] = torch.nextafter(weight[some], torch.full((64,), torch.inf).to(weight))
    return made


def losses(model: Module, of: Subject, steps: int) -> Tensor:
    model, generator = copy.deepcopy(model), torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)
    found = []
    for _ in range(steps):
        loss = model(**of.batch(generator)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.detach().double())
    return torch.stack(found)


def _apart(one: Tensor, other: Tensor) -> float:
    return float((one.double() - other.double()).square().mean().sqrt())


def compare(name: str, dtype: torch.dtype, steps: int) -> str:
    of = subject(name, dtype)
    ours = truenorm.convert(copy.deepcopy(of.model))
    found = truenorm.survey(ours)
    inputs = of.batch(torch.Generator().manual_seed(2))

    def logits(model: Module) -> Tensor:
        with torch.no_grad():
            return copy.deepcopy(model)(**inputs).logits  # type: ignore[no-any-return]

    as_it_was = logits(of.model)
    nudges = [nudged(of.model, seed) for seed in (1, 2, 3)]
    most = max(_apart(logits(each), as_it_was) for each in nudges)
    apart = _apart(logits(ours), as_it_was)
    curve = losses(of.model, of, steps)
    lost = _apart(losses(ours, of, steps), curve)
    own = max(_apart(losses(each, of, steps), curve) for each in nudges[:2])
    swapped = sum(row.swapped for row in found.norms)
    return (
        f"| {name} | {str(dtype)[6:]} | {swapped} of {len(found.norms)} | {apart:.1e} | {most:.1e} "
        f"| {lost:.1e} | {own:.1e} | {float(curve[-20:].mean()):.2f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("words", nargs="*", help="names of models")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    print("| model | dtype | swapped | logits | nudge | losses | nudge | last loss |")
    print("| --- | --- | --- | --: | --: | --: | --: | --: |", flush=True)
    for name in options.words or (*CAUSAL, *MASKED, *OTHERS, *IMAGES):
        for dtype in (torch.float32, torch.bfloat16):
            try:
                print(compare(name, dtype, options.steps), flush=True)
            except Exception as error:  # a config of another version, say
                said = str(error).splitlines()[0][:100] if str(error) else ""
                print(f"| {name} | {str(dtype)[6:]} | {type(error).__name__}: {said} |", flush=True)


if __name__ == "__main__":
    main()
