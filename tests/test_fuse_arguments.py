"""fuse: forwards are read as they are called, with what they only hand on as it comes."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import randomize
from test_fuse import calls
from torch import Tensor, nn

import truenorm

SHAPE = 2, 6, 9, 7


class Inner(nn.Module):
    """What arguments are handed on to."""

    def forward(self, x: Tensor, mask: Any = None, by: Any = 1.0, **more: Any) -> Any:
        x = x * by if mask is None else x * by + mask
        return x + sum(more.values())


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm, self.act = Inner(), nn.BatchNorm2d(6), nn.ReLU()


class HandsOn(Outer):
    def forward(self, x: Any, mask: Any = None, by: Any = 1.0, *, last: Any = None) -> Any:
        return self.inner(self.act(self.norm(x)), mask, by=by), last


class HandsOnMore(Outer):
    def forward(self, x: Any, *rest: Any, mask: Any = None, **more: Any) -> Any:
        return self.inner(self.act(self.norm(x)), mask, **more)


class Asks(Outer):
    def forward(self, x: Any, mask: Any = None, **more: Any) -> Any:
        y = self.act(self.norm(x)) if mask is None else self.norm(x)
        if "double" in more:
            more["by"] = more.pop("double")
        return self.inner(y, mask, **more)


def renamed(forward: Callable[..., Any]) -> Callable[..., Any]:
    """As libraries deprecate the name of an argument."""

    @functools.wraps(forward)
    def wrapper(*args: Any, **given: Any) -> Any:
        if "old" in given:
            given["by"] = given.pop("old") * 2.0
        return forward(*args, **given)

    return wrapper


class Decorated(Outer):
    @renamed
    def forward(self, x: Any, by: Any = 1.0, **more: Any) -> Any:
        return self.inner(self.act(self.norm(x)), by=by, **more)


def pair(model: nn.Module) -> tuple[Any, Any]:
    theirs = truenorm.convert(randomize(model)).eval()
    return theirs, truenorm.fuse(copy.deepcopy(theirs))


def check(kind: type[nn.Module], given: dict[str, Any], found: int) -> None:
    as_it_was, fused = pair(kind())
    assert type(fused) is not kind
    x = torch.randn(SHAPE)
    count = calls(lambda x: fused(x, **given), x)
    wanted = as_it_was(x, **given)
    torch.testing.assert_close(fused(x, **given), wanted, rtol=1e-5, atol=1e-5)
    assert count == found, given


MASK = torch.randn(SHAPE)


@pytest.mark.parametrize(
    ("kind", "given", "found"),
    [
        (HandsOn, {}, 1),
        (HandsOn, {"mask": MASK}, 1),
        (HandsOn, {"mask": 2.0, "by": MASK, "last": (1, MASK)}, 1),
        (HandsOn, {"by": 3}, 1),
        (HandsOnMore, {}, 1),
        (HandsOnMore, {"mask": MASK}, 1),
        (HandsOnMore, {"mask": MASK, "by": 2.0, "extra": MASK}, 1),
        (Asks, {}, 1),
        (Asks, {"mask": MASK}, 0),
        (Asks, {"extra": MASK}, 1),
        (Asks, {"by": 3.0}, 0),  # its code has that name
        (Asks, {"double": 3.0}, 0),
        (Decorated, {}, 1),
        (Decorated, {"by": 3.0}, 1),
        (Decorated, {"extra": 2.0}, 1),
        (Decorated, {"old": 2.0}, 0),
    ],
)
def test_handed_on(kind: type[nn.Module], given: dict[str, Any], found: int) -> None:
    check(kind, given, found)


def test_errors_are_the_forwards_own() -> None:
    as_it_was, fused = pair(HandsOnMore())
    x = torch.randn(SHAPE)
    assert calls(lambda x: fused(x, 1, 2), x) == 0
    torch.testing.assert_close(fused(x, 1, 2), as_it_was(x, 1, 2))
    with pytest.raises(TypeError, match="multiple values for argument 'x'"):
        fused(x, x=x)
    _, strict = pair(HandsOn())
    with pytest.raises(TypeError, match=r"takes from 2 to 4 positional arguments but 5"):
        strict(x, None, 1.0, None)
    with pytest.raises(TypeError, match="unexpected keyword argument 'other'"):
        strict(x, other=1)


class ByIdentity(Outer):
    def forward(self, x: Any, mask: Any = None) -> Any:
        y = self.act(self.norm(x))
        if mask is math:
            return y
        return self.inner(y, mask)


class ByClass(Outer):
    def forward(self, x: Any, mask: Any = None) -> Any:
        y = self.act(self.norm(x))
        return y if isinstance(mask, str) else self.inner(y, mask)


class ByMatch(Outer):
    def forward(self, x: Any, mask: Any = None) -> Any:
        y = self.act(self.norm(x))
        match mask:
            case [_, _]:
                return y
        return self.inner(y)


class ByTruth(Outer):
    def forward(self, x: Any, mask: Any = None) -> Any:
        y = self.act(self.norm(x))
        return self.inner(y, mask) if mask else y


@pytest.mark.parametrize(
    ("kind", "odd"), [(ByIdentity, math), (ByClass, "one"), (ByMatch, (1, 2)), (ByTruth, 3.0)]
)
def test_what_is_asked_for_is_not_handed_on(kind: type[nn.Module], odd: Any) -> None:
    check(kind, {}, 1)
    check(kind, {"mask": odd}, 0)


class LooksThrough(Outer):
    def forward(self, x: Any, **more: Any) -> Any:
        y = self.act(self.norm(x))
        for name in more:
            if name.startswith("plain"):
                return y
        return self.inner(y, **more)


class Counts(Outer):
    def forward(self, x: Any, **more: Any) -> Any:
        y = self.act(self.norm(x))
        return y if len(more) == 3 else self.inner(y, **more)


class MakesNames(Outer):
    def forward(self, x: Any, **more: Any) -> Any:
        y = self.act(self.norm(x))
        name = "_".join(("plain", "one"))
        return y if name in more else self.inner(y, **more)


@pytest.mark.parametrize("kind", [LooksThrough, Counts, MakesNames])
def test_more_that_is_looked_through(kind: type[nn.Module]) -> None:
    check(kind, {}, 1)
    check(kind, {"a": 1.0}, 0)
    check(kind, {"plain_one": 1.0, "b": 2.0, "c": MASK}, 0)


def test_an_argument_by_the_name_of_what_a_plan_holds() -> None:
    class Named(Outer):
        def forward(self, x: Any, type: Any = None) -> Any:
            return self.inner(self.act(self.norm(x)), type)

    as_it_was, fused = pair(Named())
    x = torch.randn(SHAPE)
    assert type(fused) is Named
    torch.testing.assert_close(fused(x, MASK), as_it_was(x, MASK))


def test_compiled() -> None:
    as_it_was, fused = pair(HandsOnMore())
    x = torch.randn(SHAPE)
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    for given in ({}, {"mask": MASK, "extra": 2.0}):
        torch.testing.assert_close(compiled(x, **given), as_it_was(x, **given))
    torch.compiler.reset()
