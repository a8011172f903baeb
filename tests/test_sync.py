"""SyncBatchNorm in one process, on CPU: BatchNorm for any rank."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cases import LAYOUTS, randomize
from checking import check_layer
from tolerances import FLOAT32_BETWEEN, assert_output, relative

import truenorm
from truenorm import BatchNorm2d, SyncBatchNorm, reference


def data(*shape: int) -> torch.Tensor:
    return torch.randn(shape) * 2.3 + 5.0


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "shape", [(7, 5), (3, 5, 9), (3, 5, 7, 3), (2, 5, 3, 3, 3), (2, 5, 1, 3, 1, 3)]
)
def test_every_rank_and_layout(shape: tuple[int, ...], layout: str, training: bool) -> None:
    layer = randomize(SyncBatchNorm(5)).train(training)
    check_layer(layer, LAYOUTS[layout](data(*shape)))


@pytest.mark.parametrize("momentum", [0.3, None])
def test_running_statistics(momentum: float | None) -> None:
    layer = randomize(SyncBatchNorm(5, momentum=momentum))
    mean, var = layer.running_mean.double(), layer.running_var.double()
    for step in range(1, 4):
        x = data(3, 5, 7)
        mean, var = reference.running_update(mean, var, x, momentum or 1.0 / step)
        layer(x)
        assert_output(layer.running_mean, mean)
        assert_output(layer.running_var, var)
    assert layer.num_batches_tracked.item() == 3


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("track", [True, False])
def test_affine_and_tracking(affine: bool, track: bool) -> None:
    layer = randomize(SyncBatchNorm(5, affine=affine, track_running_stats=track))
    for training in (True, False):
        check_layer(layer.train(training), data(3, 5, 7))


def test_in_a_process_group_of_one(tmp_path: Path) -> None:
    layer = randomize(SyncBatchNorm(5))
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1
    )
    try:
        check_layer(layer, data(3, 5, 7))
    finally:
        torch.distributed.destroy_process_group()


def test_convert_sync_batchnorm_makes_truenorm_layers() -> None:
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 5, 3), torch.nn.BatchNorm2d(5), torch.nn.Sequential(BatchNorm2d(5))
    )
    randomize(net)
    weights = list(net.parameters())
    x = data(2, 3, 7, 7)
    expected = net.eval()(x)
    converted = SyncBatchNorm.convert_sync_batchnorm(net)
    assert type(converted[1]) is SyncBatchNorm
    assert type(converted[2][0]) is SyncBatchNorm
    assert all(a is b for a, b in zip(converted.parameters(), weights, strict=True))
    assert relative(converted.eval()(x), expected) < FLOAT32_BETWEEN


def test_torch_layers_convert() -> None:
    layer = randomize(torch.nn.SyncBatchNorm(5, momentum=0.3))
    assert truenorm.convert(layer) is layer
    assert type(layer) is SyncBatchNorm
    check_layer(layer, data(3, 5, 7))


def test_the_process_group_is_kept() -> None:
    layer = SyncBatchNorm(5, process_group="a group")
    assert layer.process_group == "a group"
    check_layer(layer.eval(), data(3, 5, 7))
