"""Real training over several processes ends with the weights of one process."""

from __future__ import annotations

import pytest
import torch
from processes import processes
from tolerances import FLOAT64, relative
from torch import Tensor
from training import train

_ONE: dict[tuple[str, torch.dtype], tuple[list[float], dict[str, Tensor]]] = {}


def one_process(kind: str, dtype: torch.dtype) -> tuple[list[float], dict[str, Tensor]]:
    key = kind, dtype
    if key not in _ONE:
        _ONE[key] = train(0, kind, "", dtype)
    return _ONE[key]


def difference(state: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    assert state.keys() == wanted.keys()
    return max(relative(state[k], v) for k, v in wanted.items())


@pytest.mark.parametrize(
    ("kind", "sync", "ranks"),
    [
        ("ddp", "truenorm", 2),
        ("ddp", "torch", 4),
        ("fsdp", "truenorm", 2),
        ("fsdp", "torch", 3),
        ("ddp accumulate", "truenorm", 3),
        ("ddp checkpoint", "truenorm", 2),
    ],
)
def test_the_weights_of_one_process(kind: str, sync: str, ranks: int) -> None:
    losses, wanted = one_process(kind.replace("ddp", "one").replace("fsdp", "one"), torch.float64)
    found = processes(ranks).run(train, kind, sync)
    assert losses[-1] < 0.6 * losses[0]
    mean = [sum(each) / ranks for each in zip(*(own for own, _ in found), strict=True)]
    assert mean == pytest.approx(losses, rel=1e-9)
    for _, state in found:
        # roundings grow by the step
        assert difference(state, wanted) < 1e3 * FLOAT64
        assert all(torch.equal(v, found[0][1][k]) for k, v in state.items())


def test_mixed_precision() -> None:
    losses, wanted = train(0, "one", "", torch.float32, 3)
    found = processes(2).run(train, "fsdp bfloat16", "truenorm", torch.float32, 3)
    mean = [sum(each) / 2 for each in zip(*(own for own, _ in found), strict=True)]
    # bfloat16 has 3 digits, and each step adds its roundings
    assert mean == pytest.approx(losses, rel=0.02)
    for _, state in found:
        assert {v.dtype for k, v in state.items() if "num" not in k} == {torch.float32}
        # these start at 0: all that they are is rounded gradients
        zero = {k for k in wanted if k.endswith(("norm.bias", "1.bias"))}
        for some, bound in ((zero, 0.2), (wanted.keys() - zero, 0.05)):
            assert difference({k: state[k] for k in some}, {k: wanted[k] for k in some}) < bound
        assert all(torch.equal(v, found[0][1][k]) for k, v in state.items())
