"""Training steps of other libraries' models: the original's time over the converted one's.

    python tools/measure_steps.py [--rounds N] [--threads N] [WORD …]

The model as it is, converted, fused besides, and with nothing in the place of its norms take turns
in one process; what is printed are the medians of the ratios of processor time, the share of the
way to the step without norms that the better of the two has, and how far the logits of the
converted model are from the original's, beside how far these go when 64 weights move by one unit in
the last place. Small models of real shapes, random weights.
"""

from __future__ import annotations

import argparse
import copy
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

import truenorm

Step = Callable[[Module], Tensor]
_TEXT = {
    "vocab_size": 512,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
}


_KV = {"num_key_value_heads": 8}


def _of_text(config: str, model: str, **more: Any) -> tuple[Module, Step]:
    import transformers

    made = getattr(transformers, model)(getattr(transformers, config)(**_TEXT, **more))
    tokens = torch.randint(0, 512, (4, 128), generator=torch.Generator().manual_seed(1))
    return made, lambda m: m(input_ids=tokens).logits


def _mamba2() -> tuple[Module, Step]:
    import transformers

    config = transformers.Mamba2Config(
        **{**_TEXT, "num_attention_heads": None}, num_heads=16, head_dim=64, state_size=32,
        n_groups=2, chunk_size=64,
    )  # fmt: skip
    made = transformers.Mamba2ForCausalLM(config)
    tokens = torch.randint(0, 512, (2, 128), generator=torch.Generator().manual_seed(1))
    return made, lambda m: m(input_ids=tokens).logits


def _efficientnet() -> tuple[Module, Step]:
    import timm

    made = timm.create_model("efficientnet_b0", drop_rate=0.0)
    pixels = torch.randn(4, 3, 128, 128, generator=torch.Generator().manual_seed(1))

    def step(m: Module) -> Tensor:
        return m(pixels.to(next(m.parameters()).dtype))  # type: ignore[no-any-return]

    return made, step


def _convnext() -> tuple[Module, Step]:
    import transformers

    config = transformers.ConvNextConfig(hidden_sizes=[48, 96, 192, 384], depths=[2, 2, 4, 2])
    made = transformers.ConvNextForImageClassification(config)
    pixels = torch.randn(4, 3, 128, 128, generator=torch.Generator().manual_seed(1))
    return made, lambda m: m(pixel_values=pixels.to(next(m.parameters()).dtype)).logits


class _DiTBlock(Module):
    """Peebles and Xie 2023: scale, shift and gate of each sample by what it is conditioned on."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = torch.nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.norm2 = torch.nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.qkv, self.out = torch.nn.Linear(width, 3 * width), torch.nn.Linear(width, width)
        self.mlp = torch.nn.Sequential(
            torch.nn.Linear(width, 4 * width),
            torch.nn.GELU("tanh"),
            torch.nn.Linear(4 * width, width),
        )
        self.modulation = torch.nn.Sequential(torch.nn.SiLU(), torch.nn.Linear(width, 6 * width))
        self.heads = heads

    def attention(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out(mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        given = self.modulation(condition).unsqueeze(1).chunk(6, dim=-1)
        x = x + given[2] * self.attention(self.norm1(x) * (1 + given[1]) + given[0])
        return x + given[5] * self.mlp(self.norm2(x) * (1 + given[4]) + given[3])


class _DiT(Module):
    def __init__(self, width: int = 384, depth: int = 6) -> None:
        super().__init__()
        self.into = torch.nn.Linear(16, width)
        self.blocks = torch.nn.ModuleList(_DiTBlock(width, 6) for _ in range(depth))
        self.norm, self.back = torch.nn.LayerNorm(width), torch.nn.Linear(width, 16)

    def forward(self, patches: Tensor, condition: Tensor) -> Tensor:
        x = self.into(patches)
        for block in self.blocks:
            x = block(x, condition)
        return self.back(self.norm(x))  # type: ignore[no-any-return]


def _dit() -> tuple[Module, Step]:
    generator = torch.Generator().manual_seed(1)
    patches = torch.randn(4, 256, 16, generator=generator)
    condition = torch.randn(4, 384, generator=generator)

    def step(m: Module) -> Tensor:
        dtype = next(m.parameters()).dtype
        return m(patches.to(dtype), condition.to(dtype))  # type: ignore[no-any-return]

    return _DiT(), step


MODELS: dict[str, Callable[[], tuple[Module, Step]]] = {
    "Llama": lambda: _of_text("LlamaConfig", "LlamaForCausalLM"),
    "Qwen3": lambda: _of_text("Qwen3Config", "Qwen3ForCausalLM", head_dim=64, **_KV),
    "Gemma": lambda: _of_text("GemmaConfig", "GemmaForCausalLM", head_dim=64, **_KV),
    "BERT": lambda: _of_text("BertConfig", "BertForMaskedLM"),
    "ConvNeXt": _convnext,
    "EfficientNet": _efficientnet,
    "DiT": _dit,
    "Mamba2": _mamba2,
}


def _passed(norm: Module, x: Tensor, *_: Any, **__: Any) -> Tensor:
    """What a norm's own module does after it, in the place of all of it."""
    for module in norm.children():
        x = module(x)
    return x


def _without_norms(model: Module) -> Module:
    """A copy whose norms give back their input."""
    made = copy.deepcopy(model)
    for row in truenorm.survey(made).norms:
        norm = made.get_submodule(row.name)
        norm.forward = functools.partial(_passed, norm)
    return made


def _time(model: Module, step: Step) -> float:
    start = time.process_time()
    y = step(model)
    y.float().square().mean().backward()
    took = time.process_time() - start
    for parameter in model.parameters():
        parameter.grad = None
    return took


def _apart(one: Tensor, other: Tensor) -> float:
    one, other = one.double(), other.double()
    return float((one - other).norm() / other.norm())


def _nudged(model: Module, step: Step, logits: Tensor) -> float:
    """How far the logits go when 64 weights move by one unit in the last place."""
    made = copy.deepcopy(model)
    # the first behind the embedding
    weight = [p for p in made.parameters() if p.dim() > 1][1].detach()
    first = weight.view(-1)[:64]
    first.copy_(torch.nextafter(first, torch.full_like(first, torch.inf)))
    return _apart(step(made), logits)


def measure(name: str, dtype: torch.dtype, rounds: int) -> None:
    torch.manual_seed(0)
    model, step = MODELS[name]()
    model = model.to(dtype).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    ours = truenorm.convert(copy.deepcopy(model))
    fused = truenorm.fuse(copy.deepcopy(ours))
    bare = _without_norms(model)
    with torch.no_grad():
        logits = step(model)
        apart, nudge = _apart(step(ours), logits), _nudged(model, step, logits)
    every = model, ours, fused, bare
    for each in every:
        _time(each, step)
    rows = []
    for _ in range(rounds):
        took = [_time(each, step) for each in every]
        rows.append([took[0] / t for t in took[1:]])
    converted, joined, most = map(statistics.median, zip(*rows, strict=True))
    best = max(converted, joined)
    way = (1 - 1 / best) / (1 - 1 / most) if most > 1.005 else float("nan")
    kind = str(dtype).removeprefix("torch.")
    print(
        f"{name}, {kind}: {converted:.2f} times as fast, fused {joined:.2f}, {most:.2f} without "
        f"norms ({way:.2f} of the way); logits {apart:.1e} from the original's, a nudge moves "
        f"these by {nudge:.1e}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("words", nargs="*", help="names of models")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    # without norms values fade, and arithmetic on subnormal numbers takes many times as long
    torch.set_flush_denormal(True)
    for name in MODELS:
        if not options.words or name in options.words:
            for dtype in (torch.float32, torch.bfloat16):
                measure(name, dtype, options.rounds)


if __name__ == "__main__":
    main()
