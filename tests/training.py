"""A small network on scikit-learn's digits, trained by one process or by the ranks of a group."""

from __future__ import annotations

from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import truenorm

BATCH, STEPS = 48, 12


class Block(nn.Module):
    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inside, outside, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(outside)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(self.conv(x)))


class Net(nn.Module):
    def __init__(self, checkpointed: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(1, 8), Block(8, 16)])
        self.head = nn.Sequential(nn.Linear(16 * 4, 32), nn.BatchNorm1d(32), nn.Linear(32, 10))
        self.checkpointed = checkpointed

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x)
            x = nn.functional.avg_pool2d(x, 2)
        return self.head(x.flatten(1))


def digits(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    data = load_digits()
    images = torch.from_numpy(data.images).to(dtype)[:, None] / 16.0
    return images, torch.from_numpy(data.target)


def _prepared(kind: str, sync: str, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    """The network as it is called, and itself."""
    torch.manual_seed(5)
    model = Net(checkpointed="checkpoint" in kind).to(dtype)
    if kind.startswith("one"):
        return (truenorm.convert(model),) * 2
    if sync == "torch":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        truenorm.convert(model)
    else:
        truenorm.convert(model, sync=True)
    if kind.startswith("fsdp"):
        policy = MixedPrecisionPolicy()
        if kind == "fsdp bfloat16":
            policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
        for block in model.blocks:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        return (fully_shard(model, mesh=mesh, mp_policy=policy),) * 2
    return DistributedDataParallel(model), model


def train(
    rank: int, kind: str, sync: str = "", dtype: torch.dtype = torch.float64, steps: int = STEPS
) -> tuple[list[float], dict[str, Tensor]]:
    """Losses and the state after a few steps of SGD.

    kind: "one" process with the whole of each batch, or "ddp" or "fsdp", whose ranks share it;
        "accumulate" makes two halves to a step, "checkpoint" computes activations twice, and
        "bfloat16" in half precision.
    """
    ranks = 1 if kind.startswith("one") else torch.distributed.get_world_size()
    images, labels = digits(dtype)
    called, model = _prepared(kind, sync, dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for step in range(steps):
        x, y = (t[step * BATCH : (step + 1) * BATCH].chunk(ranks)[rank] for t in (images, labels))
        optimizer.zero_grad()
        parts = 2 if "accumulate" in kind else 1
        total = 0.0
        for part in range(parts):
            # every second sample: the ranks' halves make up one process's halves
            loss = nn.functional.cross_entropy(called(x[part::parts]), y[part::parts]) / parts
            loss.backward()
            total += loss.item()
        optimizer.step()
        losses.append(total)
    state = {k: full(v) for k, v in model.state_dict().items()}
    return losses, state


def full(value: Any) -> Tensor:
    return (value.full_tensor() if hasattr(value, "full_tensor") else value).detach().clone()
