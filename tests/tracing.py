"""A traced model held against the model itself, and against what a trace may hold."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from tolerances import FLOAT32_BETWEEN, relative
from torch import Tensor
from torch.nn import Module

Inputs = tuple[Tensor, ...]


def trace(model: Any, example: Inputs, gradients: bool = True, **options: Any) -> Any:
    """torch.jit.trace, with every warning that torch's own layers are spared being an error."""
    with warnings.catch_warnings(), torch.set_grad_enabled(gradients):
        # the suite's filters make errors of what torch and truenorm ask in their checks of shapes
        for module in ("torch.(?!jit)", "truenorm"):
            warnings.filterwarnings("ignore", category=torch.jit.TracerWarning, module=module)
        return torch.jit.trace(model, example, **options)


def assert_standard(graph: Any) -> None:
    """Nothing but torch's own operators: no truenorm's, and no call of Python (a caret)."""
    text = str(graph)
    assert "truenorm::" not in text
    assert "^" not in text


def twins(model: Module, example: Inputs, **options: Any) -> tuple[Any, Any]:
    """The trace, and a model in the state that tracing has left, with tensors of its own."""
    model = copy.deepcopy(model)
    traced = trace(model, example, **options)
    assert_standard(traced.inlined_graph)
    other = copy.deepcopy(model)
    other.load_state_dict(traced.state_dict())
    return traced, other


def _floating(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [t.requires_grad_() for t in tensors if t.is_floating_point()]


def assert_follows(
    traced: Any, model: Any, inputs: Sequence[Inputs], within: float = FLOAT32_BETWEEN
) -> None:
    """The same outputs, gradients and statistics, call for call."""
    for given in inputs:
        mine, theirs = ([t.detach().clone() for t in given] for _ in range(2))
        at, other_at = _floating(mine), _floating(theirs)
        y, wanted = traced(*mine), model(*theirs)
        assert y.shape == wanted.shape
        assert y.dtype == wanted.dtype
        assert relative(y, wanted) < within
        grad = torch.randn_like(wanted)
        found = torch.autograd.grad(y, [*at, *traced.parameters()], grad, allow_unused=True)
        expected = torch.autograd.grad(
            wanted, [*other_at, *model.parameters()], grad, allow_unused=True
        )
        for one, other in zip(found, expected, strict=True):
            assert (one is None) == (other is None)
            assert one is None or relative(one, other) < within
        state = dict(model.named_buffers())
        for name, value in traced.named_buffers():
            assert not value.requires_grad
            assert relative(value, state[name]) < within, name
