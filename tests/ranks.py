"""What the processes of a group run in tests: functions of the rank, importable by name."""

from __future__ import annotations

from typing import Any

import torch
from cases import LAYOUTS, Result
from torch import Tensor

import truenorm


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
    compiled: bool = False,
) -> tuple[Result, dict[str, Tensor]]:
    """A layer forward and backward on this rank's part: what it gives, and its state after."""
    layer = layer_of(name, args, kwargs, state)
    if x.dtype == torch.float64:
        layer = layer.double()
    call = torch.compile(layer, fullgraph=True) if compiled else layer
    x = LAYOUTS[layout](x).detach().requires_grad_()
    y = call(x)
    parameters = {n: p for n in ("weight", "bias") if (p := getattr(layer, n, None)) is not None}
    found = torch.autograd.grad(y, [x, *parameters.values()], grad)
    by_name = dict(zip(parameters, found[1:], strict=True))
    result = Result(y.detach(), found[0], by_name.get("weight"), by_name.get("bias"))
    assert y.stride() == x.stride() or layout in ("sliced", "samples_inside"), layout
    return result, {k: v.clone() for k, v in layer.state_dict().items()}
