"""A diffusion transformer's blocks learn to draw digits, with the norms as written and truenorm's.

The blocks are DiT's: a LayerNorm without weights, scaled and shifted by what the class and the time
say, and an RMSNorm of the queries and keys written by hand, as such models have it. The images are
scikit-learn's scans; the network learns the velocity from noise to image (flow matching). One
network is trained as it is written, one after `truenorm.convert`, a step of each in turn, from the
same weights on the same batches; a third as the first but with one weight moved by its last bit,
which is how far rounding alone takes two runs apart.

    python examples/diffusion_block.py [--steps 60]
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import mse_loss, scaled_dot_product_attention

import truenorm

WIDTH, HEADS, BLOCKS, PATCH, BATCH = 128, 4, 3, 2, 64


class HeadRMSNorm(nn.Module):
    """y = x / sqrt(E[x²] + eps), cast to x's dtype, · weight; for each head's queries and keys."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = 1e-6

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


class Block(nn.Module):
    """(N, tokens, WIDTH) and a condition (N, WIDTH) to the shape of the first."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.norm2 = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.modulate = nn.Linear(WIDTH, 6 * WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.q_norm, self.k_norm = HeadRMSNorm(WIDTH // HEADS), HeadRMSNorm(WIDTH // HEADS)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(approximate="tanh"), nn.Linear(4 * WIDTH, WIDTH)
        )
        # each block begins as the identity
        nn.init.zeros_(self.modulate.weight)
        nn.init.zeros_(self.modulate.bias)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        said = self.modulate(condition).unsqueeze(1).chunk(6, dim=-1)
        scale1, shift1, gate1, scale2, shift2, gate2 = said
        y = self.norm1(x) * (1 + scale1) + shift1
        q, k, v = self.qkv(y).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        y = scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v)
        x = x + gate1 * self.out(y.transpose(1, 2).flatten(2))
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class Network(nn.Module):
    """Velocity of images (N, 64) at times (N,), for classes (N,)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(PATCH * PATCH, WIDTH)
        self.place = nn.Parameter(0.02 * torch.randn(64 // PATCH**2, WIDTH))
        self.time = nn.Sequential(nn.Linear(1, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
        self.label = nn.Embedding(10, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, PATCH * PATCH)

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        side = 8 // PATCH
        patches = x.reshape(-1, side, PATCH, side, PATCH).transpose(2, 3).flatten(3).flatten(1, 2)
        y = self.embed(patches) + self.place
        condition = self.time(t[:, None]) + self.label(label)
        for block in self.blocks:
            y = block(y, condition)
        y = self.head(self.norm(y))
        return y.reshape(-1, side, side, PATCH, PATCH).transpose(2, 3).reshape(x.shape)


class Run:
    """A network, its losses, and its steps' times in milliseconds."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
        self.losses: list[float] = []
        self.times: list[float] = []

    def step(self, x: Tensor, label: Tensor, noise: Tensor, t: Tensor) -> None:
        begin = time.perf_counter()
        at = torch.lerp(x, noise, t[:, None])
        loss = mse_loss(self.model(at, t, label), noise - x)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.losses.append(loss.item())
        self.times.append(1e3 * (time.perf_counter() - begin))


def apart(one: Run, other: Run) -> float:
    return max(abs(a - b) for a, b in zip(one.losses, other.losses, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args()
    digits = load_digits()
    images = torch.as_tensor(digits.data, dtype=torch.float32) / 8 - 1
    labels = torch.as_tensor(digits.target)
    torch.manual_seed(0)
    theirs = Network()
    ours = truenorm.convert(copy.deepcopy(theirs), report=True)
    nudged = copy.deepcopy(theirs)
    with torch.no_grad():
        weight = nudged.embed.weight  # type: ignore[union-attr]
        weight.copy_(torch.nextafter(weight, torch.ones(())))  # type: ignore[operator,arg-type]
    before, after, moved = Run(theirs), Run(ours), Run(nudged)
    runs: tuple[Run, ...] = before, after, moved
    for _ in range(options.steps):
        at = torch.randint(len(images), (BATCH,))
        batch = images[at], labels[at], torch.randn(BATCH, 64), torch.rand(BATCH)
        for run in runs:
            run.step(*batch)
        # the first to see a batch waits for it: each in turn
        runs = *runs[1:], runs[0]
    for name, run in (("as written", before), ("converted", after)):
        print(
            f"{name}: loss {run.losses[0]:.3f} to {run.losses[-1]:.3f}, "
            f"{statistics.median(run.times):.2f} ms a step"
        )
    print(
        f"losses at most {apart(before, after):.1e} apart; by a last bit {apart(before, moved):.1e}"
    )


if __name__ == "__main__":
    main()
