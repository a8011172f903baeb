"""What only a GPU can show: graphs, compiling, the host that never waits, tensors on two devices.

The other test_triton_*.py files run on the GPU too, where there is one.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from cases import CASES, IDS, Case
from checking import check_layer
from on_triton import DEVICE, needs_cuda, needs_gpu, triton_kernels

import truenorm

BY_CASE = pytest.mark.parametrize("case", CASES, ids=IDS)


@contextmanager
def no_waiting() -> Iterator[None]:
    """Whatever makes the host wait for the device raises."""
    try:
        with warnings.catch_warnings():
            # that this mode is a prototype, once it is set
            warnings.simplefilter("ignore")
            torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_gpu
def test_waiting_raises() -> None:
    x = torch.ones(3).to(DEVICE)
    with no_waiting(), pytest.raises(RuntimeError, match="called a synchronizing CUDA operation"):
        x.sum().item()
    assert x.sum().item() == 3


@needs_gpu
@BY_CASE
def test_nothing_waits_for_the_device(case: Case) -> None:
    layer = case.build().to(DEVICE)
    x, grad = case.input().to(DEVICE).requires_grad_(), torch.randn(case.shape).to(DEVICE)
    with triton_kernels():
        # compiles and probes what it has to
        layer(x).backward(grad)
        with no_waiting():
            layer(x).backward(grad)


@needs_cuda
@BY_CASE
def test_a_graph_captures_a_training_step(case: Case) -> None:
    layer = case.build().cuda()
    x, grad = case.input().cuda().requires_grad_(), torch.randn(case.shape).cuda()
    wanted = [x, *layer.parameters()]

    def step() -> list[torch.Tensor]:
        y = layer(x)
        return [y, *torch.autograd.grad(y, wanted, grad)]

    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        x.copy_(case.input())
    graph.replay()
    torch.cuda.synchronize()
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    expected = step()
    layer.load_state_dict(state)
    for found, direct in zip(captured, expected, strict=True):
        assert torch.equal(found, direct)


@needs_cuda
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize(
    "case", [c for c in CASES if c.layer != "SyncBatchNorm"], ids=lambda case: case.id
)
def test_compiles_without_a_graph_break(case: Case, mode: str) -> None:
    torch._dynamo.reset()
    layer = case.build().cuda()
    compiled = torch.compile(layer, fullgraph=True, mode=mode)
    x, grad = case.input().cuda().requires_grad_(), torch.randn(case.shape).cuda()
    wanted = [x, *layer.parameters()]
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    expected = [y := layer(x), *torch.autograd.grad(y, wanted, grad)]
    # a graph is captured by the second call, and played by the third
    for _ in range(3):
        layer.load_state_dict(state)
        torch.compiler.cudagraph_mark_step_begin()
        y = compiled(x)
        found = [y.clone(), *torch.autograd.grad(y, wanted, grad)]
    for ours, direct in zip(found, expected, strict=True):
        assert torch.equal(ours, direct)


@needs_gpu
def test_a_parameter_on_another_device() -> None:
    layer, x = truenorm.LayerNorm(8), torch.randn(3, 8).to(DEVICE)
    with pytest.raises(
        RuntimeError, match=f"`weight` is on device cpu, but `input` is on {x.device}"
    ):
        layer(x)
    batch = truenorm.BatchNorm1d(8).to(DEVICE)
    batch.running_mean = batch.running_mean.cpu()
    before = batch.running_var.clone()
    with pytest.raises(RuntimeError, match="`running_mean` is on device cpu"):
        batch(x)
    assert torch.equal(batch.running_var, before)
    # of no harm: a count is read and moved where it is
    batch = truenorm.BatchNorm1d(8).to(DEVICE)
    batch.num_batches_tracked = batch.num_batches_tracked.cpu()
    with triton_kernels():
        check_layer(batch, x)
    assert batch.num_batches_tracked.item() == 1


@needs_cuda
@pytest.mark.large
def test_offsets_of_64_bits() -> None:
    """2^31 values and more, by their first and last statistics."""
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of GPU memory")
    for shape, last in (((3, 1024, 1024, 700), False), ((3, 1024, 1024, 700), True)):
        x = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
        if last:
            x = x.to(memory_format=torch.channels_last)
        y = truenorm.functional.instance_norm(x)
        for n, c in ((0, 0), (2, 1023)):
            part = x[n, c].double()
            exact = (part - part.mean()) / (part.var(correction=0) + 1e-5).sqrt()
            assert (y[n, c].double() - exact).abs().max() < 0.02
        del x, y


@needs_cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_device_that_is_not_current() -> None:
    for case in CASES:
        check_layer(case.build().to("cuda:1"), case.input().to("cuda:1"))
