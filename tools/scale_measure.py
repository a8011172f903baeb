"""What docs/scale.md reports of real gloo processes on this machine.

    python tools/scale_measure.py equality            differences from one process, layer by layer
    python tools/scale_measure.py collectives         time of an all-gather, by ranks and length
    python tools/scale_measure.py layers              time of a layer's step, alone and synchronized
    python tools/scale_measure.py compute             time of a training step of whole networks

Addresses of several hosts: RANKS=3 RANK=0 MASTER=10.7.0.1:29500 before `collectives` or `layers`
runs one rank alone, and the others elsewhere.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from scale_networks import UNet3d, resnet50
from torch import Tensor

import truenorm
from truenorm import reference

CUTS = {"2": [3, 3], "2, uneven": [1, 5], "2, one empty": [0, 6], "3": [2, 2, 2],
        "4, one empty": [1, 2, 0, 3], "8, three empty": [1, 1, 0, 2, 1, 1, 0, 0]}  # fmt: skip


def _started(rank: int, ranks: int, path: str, work: Callable[..., Any], args: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=ranks)
    result = work(rank, *args)
    torch.save(result, f"{path}.{rank}")
    dist.barrier()
    dist.destroy_process_group()


def in_processes(ranks: int, work: Callable[..., Any], *args: Any) -> list[Any]:
    """work(rank, *args) in so many new processes; every rank's result."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "rendezvous")
        mp.spawn(_started, (ranks, path, work, args), nprocs=ranks)
        return [torch.load(f"{path}.{rank}", weights_only=False) for rank in range(ranks)]


# ---------------------------------------------------------------- equality


def _layers(process_group: str | None) -> dict[str, tuple[Any, tuple[int, ...], int]]:
    """A layer, an input, and the dimension that is cut."""
    group = {"process_group": process_group}
    return {
        "SyncBatchNorm, images": (truenorm.SyncBatchNorm(16), (6, 16, 14, 14), 0),
        "BatchNorm1d, vectors": (truenorm.BatchNorm1d(64, **group), (6, 64), 0),
        "BatchNorm3d, volumes": (truenorm.BatchNorm3d(8, **group), (6, 8, 6, 6, 6), 0),
        "InstanceNorm3d, space": (
            truenorm.InstanceNorm3d(8, affine=True, track_running_stats=True, **group),
            (2, 8, 6, 9, 9), 2,
        ),
        "GroupNorm, space": (truenorm.GroupNorm(4, 16, **group), (2, 16, 6, 20), 2),
    }  # fmt: skip


def _filled(layer: Any, seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) + 0.3)
    return layer


def _part_of_layers(rank: int, cut: list[int], dtype: torch.dtype, offset: float) -> Any:
    results = {}
    for seed, (name, (layer, shape, dim)) in enumerate(_layers("world").items()):
        x, grad = _data(shape, dtype, offset, seed)
        own = x.split(cut, dim)[rank].requires_grad_()
        y = _filled(layer, seed).to(dtype)(own)
        y.backward(grad.split(cut, dim)[rank])
        parameters = [p.grad for p in layer.parameters()]
        buffers = [b for n, b in layer.named_buffers() if n.startswith("running")]
        results[name] = y.detach(), own.grad, parameters, buffers
    return results


def _data(shape: Any, dtype: torch.dtype, offset: float, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64) * 1.7 + offset
    return x.to(dtype), torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def _exact(layer: Any, x: Tensor, grad: Tensor) -> tuple[Tensor, Any]:
    if isinstance(layer, truenorm.GroupNorm):
        arguments = layer.num_groups, layer.weight, layer.bias
        back = reference.group_norm_backward(grad, x, *arguments)
        return reference.group_norm(x, *arguments), back
    if isinstance(layer, torch.nn.InstanceNorm3d):
        return (
            reference.instance_norm(x, layer.weight, layer.bias),
            reference.instance_norm_backward(grad, x, layer.weight, layer.bias),
        )
    arguments = None, None, layer.weight, layer.bias
    return reference.batch_norm(x, *arguments), reference.batch_norm_backward(grad, x, *arguments)


def _apart(a: Tensor, b: Tensor) -> float:
    a, b = a.double(), b.double()
    return float((a - b).abs().max() / b.abs().max())


SETTINGS = ((torch.float32, 0.0), (torch.float32, 1e4), (torch.float64, 0.0))


def _differences(
    layer: Any, parts: list[Any], x: Tensor, grad: Tensor, dim: int, per_sample: bool
) -> list[float]:
    """Of the output, of x's gradient, of those of weight and bias, and of running statistics."""
    y, (of_x, *of_parameters) = _exact(layer, x, grad)
    shares = [sum(g.double() for g in p) for p in zip(*(p[2] for p in parts), strict=True)]
    found = [
        _apart(torch.cat([p[0] for p in parts], dim), y),
        _apart(torch.cat([p[1] for p in parts], dim), of_x),
        max(map(_apart, shares, of_parameters)),
    ]
    if parts[0][3]:
        start = torch.zeros(x.shape[1]), torch.ones(x.shape[1])
        moved = reference.running_update(*start, x, 0.1, per_sample=per_sample)
        found.append(max(map(_apart, parts[0][3], moved)))
        assert all(torch.equal(a, b) for p in parts for a, b in zip(p[3], parts[0][3], strict=True))
    return found


def _compare(label: str, cut: list[int], gathered: Callable[..., list[Any]]) -> None:
    """Rows of a table: gathered(cut, dtype, offset) gives every rank's part of every layer."""
    rows: dict[str, list[str]] = {}
    for dtype, offset in SETTINGS:
        ranks = gathered(cut, dtype, offset)
        for seed, (name, (layer, shape, dim)) in enumerate(_layers(None).items()):
            x, grad = _data(shape, dtype, offset, seed)
            parts = [r[name] for r in ranks]
            layer = _filled(layer, seed).to(dtype)
            found = _differences(layer, parts, x, grad, dim, "Instance" in name)
            rows.setdefault(name, []).append(" / ".join(f"{d:.0e}" for d in found))
    for name, columns in rows.items():
        print(f"| {name} | {label} | " + " | ".join(columns) + " |", flush=True)


def equality() -> None:
    """Largest differences from float64 on the whole batch, relative to the largest value."""
    print("| layer | ranks |" + "".join(f" {str(d)[6:]}, mean {o:.0e} |" for d, o in SETTINGS))
    for label, cut in CUTS.items():
        _compare(label, cut, lambda *a: in_processes(len(a[0]), _part_of_layers, *a))


def _equality_of_hosts(rank: int, ranks: int) -> None:
    def gathered(*arguments: Any) -> list[Any]:
        found: list[Any] = [None] * ranks
        dist.all_gather_object(found, _part_of_layers(rank, *arguments))
        return found

    with contextlib.redirect_stdout(sys.stdout if rank == 0 else io.StringIO()):
        _compare(f"{ranks} hosts", next(c for c in CUTS.values() if len(c) == ranks), gathered)


# ---------------------------------------------------------------- times


def _median(step: Callable[[], Any], seconds: float) -> float:
    """Microseconds of a step, the median of as many as fit; every rank runs as many."""
    for _ in range(5):
        step()
    start = time.perf_counter()
    for _ in range(10):
        step()
    count = torch.tensor([max(10, int(seconds * 10 / (time.perf_counter() - start)))])
    if dist.is_initialized():
        dist.broadcast(count, 0)
    times = []
    for _ in range(int(count)):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e6


LENGTHS = [4, 64, 256, 1024, 4096, 16384, 65536]


def _all_gathers(rank: int, seconds: float) -> list[float]:
    found = []
    for length in LENGTHS:
        message = torch.randn(length, dtype=torch.float64)
        found.append(
            _median(lambda m=message: truenorm._core.exchange.gather(m, dist.group.WORLD), seconds)
        )
    return found


def collectives(seconds: float) -> None:
    for ranks in (2, 3, 4, 8):
        for length, each in zip(
            LENGTHS, zip(*in_processes(ranks, _all_gathers, seconds), strict=True), strict=True
        ):
            print(
                json.dumps({"ranks": ranks, "numbers": length, "us": round(max(each), 1)}),
                flush=True,
            )


STEPS = {
    "BatchNorm2d(64), (4, 64, 28, 28)": (truenorm.SyncBatchNorm, 64, (4, 64, 28, 28)),
    "BatchNorm2d(512), (4, 512, 14, 14)": (truenorm.SyncBatchNorm, 512, (4, 512, 14, 14)),
    "BatchNorm1d(16), (8, 16)": (truenorm.SyncBatchNorm, 16, (8, 16)),
}


def _steps(rank: int, seconds: float) -> dict[str, float]:
    found = {}
    for name, (kind, channels, shape) in STEPS.items():
        layer, x = kind(channels), torch.randn(shape, requires_grad=True)
        grad = torch.randn(shape)
        found[name] = _median(lambda f=layer, x=x, g=grad: f(x).backward(g), seconds)
    return found


def _together(rank: int, seconds: float) -> dict[str, float]:
    """Eight branches of 64 channels: one by one, and with one exchange."""
    layers = [truenorm.SyncBatchNorm(64) for _ in range(8)]
    xs = [torch.randn(4, 64, 7, 7, requires_grad=True) for _ in layers]
    grads = [torch.randn(4, 64, 7, 7) for _ in layers]

    def one_by_one() -> None:
        torch.autograd.backward([f(x) for f, x in zip(layers, xs, strict=True)], grads)

    def together() -> None:
        torch.autograd.backward(truenorm.distributed.call_together(layers, xs), grads)

    return {"one by one": _median(one_by_one, seconds), "together": _median(together, seconds)}


def layers(seconds: float) -> None:
    torch.set_num_threads(1)
    print("1 process", {k: round(v) for k, v in _steps(0, seconds).items()})
    for ranks in (2, 3, 4, 8):
        for work in (_steps, _together):
            each = in_processes(ranks, work, seconds)
            print(
                f"{ranks} processes",
                {k: round(max(e[k] for e in each)) for k in each[0]},
                flush=True,
            )


def compute() -> None:
    for name, model, x in (
        ("ResNet-50, (4, 3, 224, 224)", resnet50(), torch.randn(4, 3, 224, 224)),
        ("nnU-Net 3d, (1, 1, 96, 96, 96)", UNet3d(), torch.randn(1, 1, 96, 96, 96)),
    ):
        truenorm.convert(model)
        times = []
        for _ in range(3):
            start = time.perf_counter()
            y = model(x)
            y.backward(torch.randn(y.shape))
            times.append(time.perf_counter() - start)
        sizes = [
            m.num_features for m in model.modules()
            if isinstance(m, torch.nn.modules.batchnorm._NormBase)
        ]  # fmt: skip
        print(f"{name}: {min(times) * 1e3:.0f} ms, {len(sizes)} norm layers, {sum(sizes)} channels")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["equality", "collectives", "layers", "compute"])
    parser.add_argument("--seconds", type=float, default=0.3, help="for each measurement")
    args = parser.parse_args()
    if "RANK" in os.environ:
        rank, ranks = int(os.environ["RANK"]), int(os.environ["RANKS"])
        torch.set_num_threads(1)
        master = f"tcp://{os.environ['MASTER']}"
        dist.init_process_group("gloo", init_method=master, rank=rank, world_size=ranks)
        if args.what == "equality":
            _equality_of_hosts(rank, ranks)
        else:
            work = {"collectives": _all_gathers, "layers": _steps}[args.what]
            result = work(rank, args.seconds)
            if rank == 0:
                print(result)
        dist.barrier()
        dist.destroy_process_group()
    elif args.what in ("collectives", "layers"):
        {"collectives": collectives, "layers": layers}[args.what](args.seconds)
    else:
        {"equality": equality, "compute": compute}[args.what]()


if __name__ == "__main__":
    main()
