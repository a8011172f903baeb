"""A small Llama that learns to write like a data sheet, with its library's norms and truenorm's.

The text is what scikit-learn ships about its data sets, letter by letter. One model is trained as
transformers made it, one after `truenorm.convert`, from the same weights on the same batches, and a
third as the first but with each letter's embedding moved by its last bit, which is how far rounding
alone takes two runs apart. Then the converted one writes.

    python examples/llama_text.py [--dtype bfloat16] [--steps 200]
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time

import torch
import transformers
from sklearn import datasets
from torch import Tensor

import truenorm

LENGTH, BATCH, WIDTH = 64, 8, 128


def text() -> str:
    loaders = datasets.load_iris, datasets.load_wine, datasets.load_diabetes, datasets.load_digits
    return "\n".join(load()["DESCR"] for load in (*loaders, datasets.load_breast_cancer))


def make(letters: int, dtype: torch.dtype) -> torch.nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=letters,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=4 * LENGTH,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    return transformers.LlamaForCausalLM(config).to(dtype)  # type: ignore[no-any-return]


def train(model: torch.nn.Module, tokens: Tensor, steps: int) -> tuple[list[float], float]:
    """The loss of each step, and a step's time in milliseconds."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses, times = [], []
    for _ in range(steps):
        begin = time.perf_counter()
        at = torch.randint(0, len(tokens) - LENGTH, (BATCH,), generator=generator)
        batch = torch.stack([tokens[i : i + LENGTH] for i in at])
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        times.append(1e3 * (time.perf_counter() - begin))
    return losses, statistics.median(times)


def apart(one: list[float], other: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()
    words = text()
    letters = sorted(set(words))
    number = {letter: i for i, letter in enumerate(letters)}
    tokens = torch.tensor([number[letter] for letter in words])
    torch.manual_seed(0)
    theirs = make(len(letters), getattr(torch, options.dtype))
    ours = truenorm.convert(copy.deepcopy(theirs), report=True)
    nudged = copy.deepcopy(theirs)
    with torch.no_grad():
        embedding = next(nudged.parameters())
        embedding.copy_(torch.nextafter(embedding, torch.full_like(embedding, 1.0)))
    before, slow = train(theirs, tokens, options.steps)
    after, fast = train(ours, tokens, options.steps)
    moved, _ = train(nudged, tokens, options.steps)
    print(f"transformers: loss {before[0]:.3f} to {before[-1]:.3f}, {slow:.1f} ms a step")
    print(f"converted: loss {after[0]:.3f} to {after[-1]:.3f}, {fast:.1f} ms a step")
    print(
        f"losses at most {apart(before, after):.1e} apart; by a last bit {apart(before, moved):.1e}"
    )
    prompt = "The data set contains "
    given = torch.tensor([[number[letter] for letter in prompt]])
    with torch.no_grad():
        made = ours.generate(given, max_new_tokens=80, do_sample=False)  # type: ignore[operator]
    print("".join(letters[i] for i in made[0].tolist()))


if __name__ == "__main__":
    main()
