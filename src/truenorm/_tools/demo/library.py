"""A model of another library, whose norms are its own classes: a small Qwen3 of transformers'."""

from __future__ import annotations

import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any

import torch
from sklearn import datasets
from torch import Tensor, nn

from ..._models.converting import convert
from ..._models.surveying import survey
from .train import WARM_UP, _largest, _nudged

LENGTH, BATCH = 64, 8
STEPS, QUICK_STEPS = 80, 15


@dataclass(frozen=True)
class LibraryRun:
    """A model's training as its library made it and converted, a step of each in turn.

    losses_nudged: as it was made, from weights that are one rounding away.
    """

    model: str
    norm: str
    layers: int
    losses_library: list[float]
    losses_truenorm: list[float]
    losses_nudged: list[float]
    seconds_library: list[float]
    seconds_truenorm: list[float]

    @property
    def largest_loss_difference(self) -> float:
        return _largest(self.losses_library, self.losses_truenorm)

    @property
    def largest_nudged_difference(self) -> float:
        return _largest(self.losses_library, self.losses_nudged)

    @property
    def ratios(self) -> list[float]:
        """truenorm's time over the library's, for each pair of steps."""
        pairs = zip(self.seconds_truenorm, self.seconds_library, strict=True)
        return [ours / theirs for ours, theirs in pairs]

    @property
    def ratio(self) -> float:
        return median(self.ratios)

    @property
    def ratio_quartiles(self) -> tuple[float, float]:
        low, _, high = quantiles(self.ratios, n=4)
        return low, high


class _Runner:
    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model.train()
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        self.losses: list[float] = []
        self.seconds: list[float] = []

    def step(self, tokens: Tensor) -> None:
        start = time.perf_counter()
        self.optimizer.zero_grad()
        loss = self.model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        self.optimizer.step()
        self.seconds.append(time.perf_counter() - start)
        self.losses.append(loss.item())


def _tokens() -> Tensor:
    """What scikit-learn says of its data sets, letter by letter."""
    loaders = datasets.load_iris, datasets.load_wine, datasets.load_digits
    text = "\n".join(load()["DESCR"] for load in loaders)
    number = {letter: i for i, letter in enumerate(sorted(set(text)))}
    return torch.tensor([number[letter] for letter in text])


def train(steps: int, seed: int, on_step: Callable[[], None]) -> LibraryRun:
    """Train it to write on; needs transformers, and no network."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    tokens = _tokens()
    config = Qwen3Config(
        vocab_size=int(tokens.max()) + 1, hidden_size=128, intermediate_size=256,
        num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=4, head_dim=32,
        max_position_embeddings=LENGTH, pad_token_id=None, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        theirs: nn.Module = Qwen3ForCausalLM(config)
    ours = convert(deepcopy(theirs))
    library, truenorm, nudged = _Runner(theirs), _Runner(ours), _Runner(_nudged(theirs))
    generator = torch.Generator().manual_seed(seed + 1)
    for i in range(steps):
        at = torch.randint(0, len(tokens) - LENGTH, (BATCH,), generator=generator)
        batch = torch.stack([tokens[start : start + LENGTH] for start in at])
        # who goes first alternates: the second finds the batch in the cache
        for run in (library, truenorm) if i % 2 else (truenorm, library):
            run.step(batch)
        nudged.step(batch)
        on_step()
    found = survey(ours)
    return LibraryRun(
        model="Qwen3",
        norm=found.norms[0].kind.rpartition(".")[2],
        layers=found.swapped,
        losses_library=library.losses,
        losses_truenorm=truenorm.losses,
        losses_nudged=nudged.losses,
        seconds_library=library.seconds[WARM_UP:],
        seconds_truenorm=truenorm.seconds[WARM_UP:],
    )
