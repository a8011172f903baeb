"""What the processes of a group run in tests of DTensors: functions of the rank."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from cases import randomize
from tolerances import FLOAT32_GRADIENT, assert_gradient, assert_output, relative
from torch import Tensor

import truenorm
from truenorm._core import exchange

LENGTHS = torch.tensor([6, 2, 4])


def mesh_of(sizes: tuple[int, ...]) -> Any:
    from torch.distributed.tensor import init_device_mesh

    return init_device_mesh("cpu", sizes)


def placed(code: str) -> list[Any]:
    """One letter for each dimension of the mesh: R the same everywhere, P summed up, or a cut."""
    from torch.distributed.tensor import Partial, Replicate, Shard

    return [{"R": Replicate(), "P": Partial()}.get(c) or Shard(int(c)) for c in code]


def distributed(t: Tensor, mesh: Any, code: str) -> Any:
    from torch.distributed.tensor import DTensor, distribute_tensor

    if "P" in code:
        # every process has a share of it
        parts = torch.randn(mesh.size(), *t.shape, dtype=t.dtype)
        parts = parts - parts.mean(0) + t / mesh.size()
        part = parts[torch.distributed.get_rank()]
        return DTensor.from_local(part, mesh, placed(code), run_check=False)
    return distribute_tensor(t, mesh, placed(code), src_data_rank=None)


def full(t: Any) -> Tensor:
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def unsharded(
    rank: int,
    sizes: tuple[int, ...],
    layers: list[tuple[str, tuple[Any, ...], dict[str, Any], tuple[int, ...]]],
    codes: list[str],
    modes: tuple[bool, ...] = (True, False),
    holding: tuple[str, ...] = ("dtensors", "plain"),
    residual: bool = False,
    backend: str = "",
    calls: dict[str, Any] | None = None,
) -> int:
    """Every layer, its input and output gradient placed by every code, against the same unsharded.

    holding: whether parameters and buffers are DTensors, the same everywhere, or plain tensors.
    Gives the number of comparisons.
    """
    from torch.distributed.tensor import DTensor, distribute_module

    mesh, done = mesh_of(sizes), 0
    for name, args, kwargs, shape in layers:
        original = randomize(getattr(truenorm, name)(*args, **kwargs))
        x, grad, more = torch.randn(3, *shape).unbind()
        x = x * 1.7 + 3.0
        for training in modes:
            layer = copy.deepcopy(original).double().train(training)
            if hasattr(layer, "process_group"):
                layer.process_group = exchange.ALONE if name == "SyncBatchNorm" else None
            expected_in = [t.double().requires_grad_() for t in (x, more)]
            added = {"residual": expected_in[1]} if residual else {}
            expected = layer(expected_in[0], **added, **(calls or {}))
            expected.backward(grad.double())
            for code in codes:
                for held in holding:
                    where = f"{name} {args} {kwargs} training={training} {code} {held}"
                    own = copy.deepcopy(original).train(training)
                    if held == "dtensors":
                        own = distribute_module(own, mesh)
                    call = torch.compile(own, backend=backend, fullgraph=True) if backend else own
                    inputs = [distributed(t, mesh, code).requires_grad_() for t in (x, more)]
                    added = {"residual": inputs[1]} if residual else {}
                    y = call(inputs[0], **added, **(calls or {}))
                    y.backward(distributed(grad, mesh, code))
                    try:
                        assert isinstance(y, DTensor)
                        assert y.shape == x.shape
                        assert_output(full(y), expected)
                        pairs = [(inputs[0].grad, expected_in[0].grad)]
                        pairs += [(inputs[1].grad, expected_in[1].grad)] if residual else []
                        for p, q in zip(own.parameters(), layer.parameters(), strict=True):
                            assert isinstance(p.grad, DTensor) == isinstance(p, DTensor)
                            pairs.append((p.grad, q.grad))
                        for got, wanted in pairs:
                            assert_gradient(full(got), wanted)
                        for b, c in zip(own.buffers(), layer.buffers(), strict=True):
                            assert_output(full(b) * 1.0, c.double())
                    except Exception as error:
                        raise AssertionError(where) from error
                    if backend:
                        torch.compiler.reset()
                    done += 1
    return done


def in_parallel(rank: int, dim: int) -> None:
    """Norms under torch's SequenceParallel, against the same ones whole."""
    from torch.distributed.tensor.parallel import SequenceParallel, parallelize_module

    mesh = mesh_of((torch.distributed.get_world_size(),))
    whole = torch.nn.Sequential(torch.nn.LayerNorm(8), torch.nn.GELU(), torch.nn.RMSNorm(8, 1e-6))
    randomize(whole)
    own = truenorm.convert(copy.deepcopy(whole))
    rows = SequenceParallel(sequence_dim=dim)
    own = parallelize_module(own, mesh, {"0": rows, "2": rows})
    x, grad = torch.randn(3, 5, 8), torch.randn(3, 5, 8)
    expected_in = x.double().requires_grad_()
    expected = whole.double()(expected_in)
    expected.backward(grad.double())
    given = distributed(x, mesh, str(dim)).requires_grad_()
    y = own(given)
    y.backward(distributed(grad, mesh, str(dim)))
    assert y.placements == tuple(placed(str(dim)))
    assert_output(full(y), expected)
    # two norms deep: twice the promise of one
    assert relative(full(given.grad), expected_in.grad) <= 2.0 * FLOAT32_GRADIENT
    for p, q in zip(own.parameters(), whole.parameters(), strict=True):
        assert relative(full(p.grad), q.grad) <= 2.0 * FLOAT32_GRADIENT


def refused(rank: int) -> list[str]:
    from torch.distributed.tensor import distribute_module

    mesh, found = mesh_of((2,)), []
    other = mesh_of((1, 2))
    layer = distribute_module(truenorm.BatchNorm1d(3), mesh)
    for x in (torch.randn(4, 3), distributed(torch.randn(4, 3), other, "R0")):
        before = [full(b).clone() for b in layer.buffers()]
        with pytest.raises((TypeError, ValueError)) as caught:
            layer(x)
        found.append(str(caught.value))
        assert all(torch.equal(full(b), c) for b, c in zip(layer.buffers(), before, strict=True))
    return found
