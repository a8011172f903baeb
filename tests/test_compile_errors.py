"""An error within a graph says what it says without the compiler: argument, value and remedy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_compile import _fresh_compiler  # noqa: F401  (a fixture)
from test_trace import batch, instance
from torch import Tensor

import truenorm
import truenorm.functional as F

X = (2, 5, 7, 9)
WRONG: dict[str, tuple[Callable[[Any], Callable[[Tensor], Tensor]], tuple[int, ...]]] = {
    "channels": (lambda _: batch(), (2, 4, 7, 9)),
    "channels-instance": (lambda _: instance(), (2, 4, 7, 9)),
    "rank": (lambda _: batch(), (2, 5, 7)),
    "one-value": (lambda _: truenorm.BatchNorm1d(5), (1, 5)),
    "one-position": (lambda _: truenorm.InstanceNorm1d(5), (3, 5, 1)),
    "momentum": (lambda _: truenorm.BatchNorm2d(5, momentum=1.5), X),
    "eps": (lambda _: truenorm.GroupNorm(1, 5, eps=-1.0), X),
    "groups": (lambda _: lambda x: F.group_norm(x, 3), X),
    "normalized_shape": (lambda _: truenorm.LayerNorm(8), X),
    "weight": (lambda w: lambda x: F.group_norm(x, 5, weight=w(4)), X),
    "running": (lambda w: lambda x: F.batch_norm(x, w(4), w(4)), X),
    "size": (lambda _: lambda x: F.local_response_norm(x, 0), X),
    "dtype": (lambda _: lambda x: F.layer_norm(x.long(), (9,)), X),
    "mask-dtype": (lambda w: _with(mask=w(2, 7, 9)), X),
    "mask-shape": (lambda w: _with(mask=w(2, 7, 8) > 0), X),
    "mask-and-lengths": (lambda w: _with(mask=w(2, 7, 9) > 0, lengths=w(2).long()), X),
    "lengths": (lambda w: _with(lengths=w(2).long()), X),
    "padding_value": (lambda w: _with(mask=w(2, 7, 9) > 0, padding_value="a"), X),
    "residual": (lambda w: _with(residual=w(2, 5, 7)), X),
    "residual-dtype": (lambda w: _with(residual=w(*X).double()), X),
    "channel_axis": (lambda _: truenorm.BatchNorm2d(5, channel_axis=5), X),
    "rows": (lambda w: _rows(lengths=w(2).long()), X),
}


def _with(*flags: str, **given: Any) -> Callable[[Tensor], Tensor]:
    layer = batch(**dict.fromkeys(flags, True))
    return lambda x: layer(x, **given)  # type: ignore[no-any-return]


def _rows(**given: Any) -> Callable[[Tensor], Tensor]:
    layer = truenorm.LayerNorm(9)
    return lambda x: layer(x, **given)  # type: ignore[no-any-return]


# without a full graph torch tries frames of its own choice, of the eager way too
@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace:UserWarning")
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("wrong", WRONG)
def test_the_words_reach_the_user(wrong: str, dynamic: bool) -> None:
    build, shape = WRONG[wrong]
    call, x = build(torch.ones), torch.randn(shape)
    with pytest.raises((ValueError, RuntimeError, TypeError)) as said:
        call(x)
    words = str(said.value)
    assert words
    torch.compiler.reset()
    compiled = torch.compile(call, fullgraph=True, dynamic=dynamic, backend="eager")
    with pytest.raises(torch._dynamo.exc.Unsupported) as told:
        compiled(x)
    # torch shows them within quotes
    assert words in str(told.value).replace("\\'", "'").replace("\\n", "\n")
    # and where a graph may be left, the error is the same one
    torch.compiler.reset()
    with pytest.raises(type(said.value)) as raised:
        torch.compile(call, dynamic=dynamic, backend="eager")(x)
    assert str(raised.value) == words
