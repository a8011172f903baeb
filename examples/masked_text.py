"""Lines of text of every length in one batch: which of six data sets does a line describe?

A small convolutional network reads characters. One network's InstanceNorm knows the lengths, the
other's takes the padding for text. Both learn; then each reads the lines it has not seen, once in
batches as they come and once alone. Without lengths the answer depends on the company of a line.

    python examples/masked_text.py
"""

from __future__ import annotations

import torch
from sklearn import datasets
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

import truenorm

NAMES = ("iris", "digits", "wine", "breast_cancer", "diabetes", "linnerud")


class Reader(nn.Module):
    """Characters to data sets; `masked` says whether its norms are told the lengths."""

    def __init__(self, masked: bool) -> None:
        super().__init__()
        self.masked = masked
        self.embed = nn.Embedding(128, 32, padding_idx=0)
        self.convs = nn.ModuleList(nn.Conv1d(32, 32, 5, padding=2) for _ in range(2))
        self.norms = nn.ModuleList(truenorm.InstanceNorm1d(32, affine=True) for _ in range(2))
        self.answer = nn.Linear(32, len(NAMES))

    def forward(self, text: Tensor, lengths: Tensor) -> Tensor:
        x = self.embed(text).transpose(1, 2)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = norm(conv(x), lengths=lengths) if self.masked else norm(conv(x))
            x = torch.relu(x)
            if self.masked:  # the convolution reads over the end of a line
                x = x * (torch.arange(x.shape[2]) < lengths[:, None]).unsqueeze(1)
        answer: Tensor = self.answer(x.amax(2))
        return answer


def lines() -> tuple[list[Tensor], Tensor]:
    """Every line of text as characters, and the data set whose description it stands in."""
    texts, names = [], []
    for i, name in enumerate(NAMES):
        description: str = getattr(datasets, f"load_{name}")().DESCR
        for line in description.splitlines():
            if len(line.strip()) >= 8:
                texts.append(torch.tensor([min(ord(c), 127) for c in line.strip()]))
                names.append(i)
    return texts, torch.tensor(names)


def batch(texts: list[Tensor], which: list[int]) -> tuple[Tensor, Tensor]:
    chosen = [texts[i] for i in which]
    return pad_sequence(chosen, batch_first=True), torch.tensor([len(t) for t in chosen])


def train(model: Reader, texts: list[Tensor], names: Tensor, seen: list[int]) -> None:
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(12):
        order = torch.randperm(len(seen))
        for i in range(0, len(seen), 32):
            which = [seen[k] for k in order[i : i + 32]]
            loss = nn.functional.cross_entropy(model(*batch(texts, which)), names[which])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def main() -> None:
    torch.manual_seed(0)
    texts, names = lines()
    order = torch.randperm(len(texts)).tolist()
    unseen, seen = order[: len(order) // 4], order[len(order) // 4 :]
    sizes = [len(t) for t in texts]
    print(f"{len(texts)} lines of {min(sizes)} to {max(sizes)} characters")
    for masked in (True, False):
        torch.manual_seed(0)
        model = Reader(masked)
        train(model, texts, names, seen)
        with torch.no_grad():
            together = torch.cat(
                [model(*batch(texts, unseen[i : i + 32])) for i in range(0, len(unseen), 32)]
            )
            alone = torch.cat([model(*batch(texts, [i])) for i in unseen])
        right = (together.argmax(1) == names[unseen]).double().mean().item()
        apart = (together - alone).abs().max().item()
        changed = int((together.argmax(1) != alone.argmax(1)).sum())
        print(
            f"{'with' if masked else 'without'} lengths: {100 * right:.1f}% right in batches; "
            f"alone, {changed} of {len(unseen)} answers change, outputs by up to {apart:.1e}"
        )


if __name__ == "__main__":
    main()
