"""Small batches on several processes: local statistics, and statistics over all processes.

    torchrun --standalone --nproc-per-node=2 examples/distributed_digits.py

Trains a small network on scikit-learn's handwritten digits three times: on the processes with
their own batch statistics each, on the processes with common ones (`convert(model, sync=True)`),
and in one process on the whole batches, which is what the second is meant to equal. Needs
scikit-learn; runs on CPUs (gloo).
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import truenorm

PER_PROCESS, EPOCHS, TRAINING_SET = 4, 2, 1400


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(128, 10),
    ).double()  # fmt: skip


def train(model: nn.Module, images: Tensor, labels: Tensor, rank: int, ranks: int) -> None:
    """SGD, each process on its part of every batch."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    batch = PER_PROCESS * dist.get_world_size()
    order = torch.Generator().manual_seed(2)
    for _ in range(EPOCHS):
        for chosen in torch.randperm(TRAINING_SET, generator=order).split(batch):
            if len(chosen) == batch:
                mine = chosen.chunk(ranks)[rank]
                optimizer.zero_grad()
                cross_entropy(model(images[mine]), labels[mine]).backward()
                optimizer.step()


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        right = model.eval()(images[TRAINING_SET:]).argmax(1) == labels[TRAINING_SET:]
    return 100.0 * right.double().mean().item()


def main() -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    digits = load_digits()
    images = torch.from_numpy(digits.images)[:, None] / 16.0
    labels = torch.from_numpy(digits.target)

    local = truenorm.convert(network())
    train(DistributedDataParallel(local), images, labels, rank, ranks)

    common = truenorm.convert(network(), sync=True)
    train(DistributedDataParallel(common), images, labels, rank, ranks)

    if rank == 0:
        whole = truenorm.convert(network())
        train(whole, images, labels, 0, 1)
        print(f"{ranks} processes, {PER_PROCESS} digits on each")
        for name, model in (("own", local), ("common", common)):
            pairs = zip(model.state_dict().values(), whole.state_dict().values(), strict=True)
            apart = max((a - b).abs().max().item() for a, b in pairs)
            right = accuracy(model, images, labels)
            print(f"{name:>7} statistics: {right:.1f}% right, {apart:.0e} from one process")
        print(f"one process, whole batches: {accuracy(whole, images, labels):.1f}% right")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
