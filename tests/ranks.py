"""What the processes of a group run in tests: functions of the rank, importable by name."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import LAYOUTS, Result, run
from checking import same_layout
from test_convert import ResNet
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import truenorm
from truenorm._core import exchange


def cut(x: Tensor, sizes: list[int], dim: int = 0) -> list[Tensor]:
    """One part for each rank."""
    return list(x.split(sizes, dim))


def layer_of(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], state: Any) -> Any:
    layer = getattr(truenorm, name)(*args, **kwargs)
    if state is not None:
        layer.load_state_dict(state)
    return layer


def step(
    rank: int,
    x: Tensor,
    grad: Tensor,
    name: str,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    state: Any,
    layout: str = "contiguous",
    backend: str = "",
) -> tuple[Result, dict[str, Tensor]]:
    """A layer forward and backward on this rank's part: what it gives, and its state after."""
    layer = layer_of(name, args, kwargs, state)
    if x.dtype == torch.float64:
        layer = layer.double()
    call = torch.compile(layer, fullgraph=True, backend=backend) if backend else layer
    x = LAYOUTS[layout](x).detach().requires_grad_()
    y = call(x)
    parameters = {n: p for n in ("weight", "bias") if (p := getattr(layer, n, None)) is not None}
    found = torch.autograd.grad(y, [x, *parameters.values()], grad)
    by_name = dict(zip(parameters, found[1:], strict=True))
    result = Result(y.detach(), found[0], by_name.get("weight"), by_name.get("bias"))
    if backend:
        torch.compiler.reset()
    assert same_layout(y, x) or layout in ("sliced", "samples_inside"), layout
    return result, {k: v.clone() for k, v in layer.state_dict().items()}


def second_order(
    rank: int, x: Tensor, grad: Tensor, name: str, args: tuple[Any, ...], kwargs: dict[str, Any],
    state: Any, incoming: list[Tensor],
) -> list[Tensor]:  # fmt: skip
    """Gradients of incoming · (gradients of x, weight, bias) with respect to x, weight and grad."""
    layer = layer_of(name, args, kwargs, state).double()
    x, grad = x.requires_grad_(), grad.requires_grad_()
    parameters = list(layer.parameters())
    first = torch.autograd.grad(layer(x), [x, *parameters], grad, create_graph=True)
    along = [incoming[0][rank], *incoming[1:]]
    total = sum((a * b).sum() for a, b in zip(along, first, strict=True))
    return list(torch.autograd.grad(total, [x, parameters[0], grad]))


def raised(rank: int, shapes: list[tuple[int, ...]], features: list[int]) -> None:
    """A step with a layer of this rank's features, the second one of a small network."""
    truenorm.SyncBatchNorm(3)(torch.randn(2, 3))
    layer = truenorm.SyncBatchNorm(features[rank])
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    try:
        layer(torch.randn(shapes[rank]))
    finally:
        assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())


def ghosts(rank: int, shapes: list[tuple[int, ...]]) -> list[int]:
    """Two batches by ghosts of two samples; the second one of this rank's shape."""
    layer = truenorm.SyncBatchNorm(5, virtual_batch_size=2)
    seen = []
    for shape in (shapes[0], shapes[rank]):
        before = {k: v.clone() for k, v in layer.state_dict().items()}
        try:
            layer(torch.randn(shape))
        except ValueError:
            assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())
            raise
        seen.append(int(layer.num_batches_tracked.item()))
    return seen


def leave(rank: int, leaving: int, how: str) -> None:
    """A step in which one rank dies before its forward, before its backward, or never comes."""
    layer = truenorm.SyncBatchNorm(3)
    x = torch.randn(2, 3, requires_grad=True)
    layer(x)
    if rank == leaving and how == "forward":
        os._exit(9)
    if rank == leaving and how == "late":
        time.sleep(8)
        return
    y = layer(x)
    if rank == leaving and how == "backward":
        os._exit(9)
    y.backward(torch.randn(2, 3))


def raised_nothing(rank: int, shapes: list[tuple[int, ...]]) -> None:
    layer = truenorm.SyncBatchNorm(5)
    y = layer(torch.randn(shapes[rank]))
    assert y.shape == shapes[rank]
    assert torch.isfinite(y).all()
    seen = any(shape[0] for shape in shapes)
    assert layer.running_mean.any().item() == seen
    assert (layer.running_var == 1.0).all().item() != seen
    assert layer.num_batches_tracked.item() == 1


def nothing(rank: int) -> None:
    """To wait until every process is there."""
    torch.distributed.barrier()


def step_in_pairs(rank: int, x: Tensor, grad: Tensor, state: Any) -> Result:
    """SyncBatchNorm over ranks 0 and 1, and over 2 and 3; another rank's group is refused."""
    groups = [torch.distributed.new_group([first, first + 1]) for first in (0, 2)]
    layer = truenorm.SyncBatchNorm(5, process_group=groups[rank // 2])
    layer.load_state_dict(state)
    result = run(layer, x, grad)
    other = truenorm.SyncBatchNorm(5, process_group=groups[1 - rank // 2])
    with pytest.raises(ValueError, match="a group that this process is not a member of"):
        other(x)
    return result


def recalibrated(rank: int, data: list[Tensor], state: Any) -> dict[str, Tensor]:
    """The state of test_convert.py's ResNet after its statistics were those of all ranks' data."""
    model = truenorm.convert(ResNet(), sync=True)
    model.load_state_dict(state)
    before = {k: v.clone() for k, v in state.items()}
    try:
        truenorm.recalibrate(model, data)
    except Exception:
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        raise
    return {k: v.clone() for k, v in model.state_dict().items()}


def counted(step: Callable[[], Any]) -> list[int]:
    """Numbers in each all-gather of a step."""
    sizes: list[int] = []
    real = exchange._all_gather

    def counting(into: Tensor, message: Tensor, group: Any) -> None:
        sizes.append(message.numel())
        real(into, message, group=group)

    exchange._all_gather = counting
    try:
        step()
    finally:
        exchange._all_gather = real
    return sizes


def exchanges(rank: int) -> dict[str, list[int]]:
    """What a step of each kind of layer sends, its second one."""
    found = {}
    for name, layer, shape in (
        ("batch", truenorm.SyncBatchNorm(5), (2, 5, 3)),
        ("instance", truenorm.InstanceNorm1d(5, process_group="world"), (2, 5, 3)),
        ("group", truenorm.GroupNorm(2, 6, process_group="world"), (3, 6, 3)),
        ("eval", truenorm.SyncBatchNorm(5).eval(), (2, 5, 3)),
    ):
        for _ in range(2):
            x = torch.randn(shape, requires_grad=True)
            found[name] = counted(lambda x=x, f=layer: f(x).backward(torch.randn(x.shape)))
    layer, x = truenorm.SyncBatchNorm(5), torch.randn(2, 5)
    layer(x)
    found["parameters alone"] = counted(lambda: layer(x).backward(torch.randn(2, 5)))
    return found


def together(rank: int, states: list[Any], xs: list[Tensor], grads: list[Tensor]) -> list[Any]:
    """Three layers with one exchange, then each by itself: results, states, sizes of messages."""
    found = []
    for at_once in (True, False):
        layers = [
            truenorm.SyncBatchNorm(5),
            truenorm.BatchNorm1d(3, process_group="world"),
            truenorm.InstanceNorm1d(4, process_group="world"),
        ]
        for layer, state in zip(layers, states, strict=True):
            layer.load_state_dict(state)
        inputs = [x.clone().requires_grad_() for x in xs]
        outputs: list[Tensor] = []

        def forward(
            layers: Any = layers, inputs: Any = inputs, outputs: Any = outputs, at: bool = at_once
        ) -> None:
            if at:
                outputs += truenorm.distributed.call_together(layers, inputs)
            else:
                outputs += [layer(x) for layer, x in zip(layers, inputs, strict=True)]

        forward()
        outputs.clear()
        sizes = [counted(forward)]
        sizes.append(counted(lambda o=outputs: torch.autograd.backward(o, grads)))
        values = [t.detach() for t in outputs] + [x.grad for x in inputs]
        values += [p.grad for layer in layers for p in layer.parameters()]
        values += [b for layer in layers for b in layer.buffers()]
        found.append((values, sizes))
    return found


class NoReading(TorchDispatchMode):
    """An error where a value is read on the host, as .item() and `if tensor` do."""

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert op is not torch.ops.aten._local_scalar_dense.default, "read on the host"
        return op(*args, **(kwargs or {}))


def step_as_on_a_device(rank: int, x: Tensor, grad: Tensor, name: str, args: Any) -> bool:
    """A step in which nothing may be read on the host, as on a GPU, gives what it else gives."""
    kwargs = {} if name == "SyncBatchNorm" else {"process_group": "world"}
    layer = getattr(truenorm, name)(*args, **kwargs)
    state = {k: v.clone() for k, v in layer.state_dict().items()}
    found = []
    for reading in (True, False):
        layer.load_state_dict(state)
        real = exchange._is_readable
        try:
            if reading:
                result = run(layer, x, grad)
            else:
                exchange._is_readable = lambda values: False
                with NoReading():
                    result = run(layer, x, grad)
        finally:
            exchange._is_readable = real
        values = [t for t in result if t is not None] + list(layer.state_dict().values())
        found.append([v.clone() for v in values])
    return all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def one_value_on_a_device(rank: int) -> None:
    layer = truenorm.SyncBatchNorm(5)
    layer(torch.randn(2, 5))
    exchange._is_readable, real = lambda values: False, exchange._is_readable
    try:
        layer(torch.randn(1 - rank, 5))
    finally:
        exchange._is_readable = real


def eager_on_one_rank(rank: int) -> bool:
    """A compiled layer that one rank then calls without its graph: the ranks stay in step."""
    x = torch.randn(3, 5)
    # the second layer's graph could be the first one's, but for what is noted of each
    layers = [truenorm.SyncBatchNorm(5), truenorm.SyncBatchNorm(5)]
    compiled = [torch.compile(layer, fullgraph=True, backend="aot_eager") for layer in layers]
    for call in compiled:
        call(x)
    made = [(layers if rank else compiled)[i](x) for i in range(2)]
    torch.compiler.reset()
    same = [torch.equal(y, call(x)) for y, call in zip(made, compiled, strict=True)]
    return all(same)
