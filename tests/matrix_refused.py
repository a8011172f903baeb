"""What is refused today, in one place: whoever makes one of them work deletes its entry.

And the pairs of `TOGETHER`, which have to work in the end, whatever the cover of all pairs meets.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any, NamedTuple

import pytest
from matrix import BATCH, INSTANCE, MASKS, Case, Several, matches, nonsense
from matrix_checks import RoundedBetween


class Refused(NamedTuple):
    """Cases with one value of each set, and the error with these words that they end in."""

    rule: tuple[Several, ...]
    error: type[Exception]
    words: str


_POLICIES = ("renorm", "ghost batches", "on_single", "accumulate", "skip_nonfinite")

# nothing today; renorm with ghost batches, and on_single over processes, make no sense together
REFUSED: list[Refused] = []


def entry_of(case: Case) -> Refused | None:
    return next((entry for entry in REFUSED if matches(case.values, entry.rule)), None)


def refused_rules() -> list[tuple[tuple[Several, ...], str]]:
    """What is not called at all today; what is but rounded more than once is."""
    return [(e.rule, e.words) for e in REFUSED if e.error is not RoundedBetween]


@contextmanager
def said(case: Case) -> Iterator[None]:
    """What the case is refused with has the words of its entry."""
    entry = entry_of(case)
    try:
        yield
    except Exception as error:
        if entry is not None and isinstance(error, entry.error) and entry.words not in str(error):
            pytest.fail(f"refused in other words than {entry.words!r}: {error}")
        raise


def marked(cases: Iterable[Case]) -> list[Any]:
    """The cases, as parameters of a test, with what is refused marked so."""
    found = []
    for case in cases:
        entry, marks = entry_of(case), []
        if entry is not None:
            marks = [pytest.mark.xfail(strict=True, raises=entry.error, reason=entry.words)]
        found.append(pytest.param(case, id=case.id, marks=marks))
    return found


# ---------------------------------------------------------------- what has to work in the end

_PAIRS_OF_POLICIES = [
    "renorm + accumulate",
    "renorm + skip_nonfinite",
    "ghost batches + accumulate",
    "ghost batches + skip_nonfinite",
    "accumulate + skip_nonfinite",
    "ghost batches + process_group",
    "renorm + process_group",
    "accumulate + process_group",
    "skip_nonfinite + process_group",
]


def _together() -> Iterator[Case]:
    layers = (*BATCH, *INSTANCE, "GroupNorm")
    afters = [("silu", "no residual"), ("no activation", "residual"), ("gelu", "residual")]
    for layer, policy in product(layers, ("no policy", *_POLICIES, "process_group")):
        for place, mask in enumerate(MASKS):
            rank = "1d" if mask == "lengths" else ("3d", "2d")[place % 2]
            yield Case(layer, rank, mask, policy=policy)
            yield Case(layer, rank, mask, "silu", "residual", policy=policy, dtype="bfloat16")
        for activation, residual in afters:
            yield Case(layer, "2d", "no mask", activation, residual, policy=policy)
        yield Case(layer, "2d", "no mask", "gelu", "residual", policy=policy, dtype="float16")
        yield Case(layer, "1d", residual="residual", channel_axis="axis -1", policy=policy)
        yield Case(layer, "1d", policy=policy, dtype="bfloat16")
    for layer in layers:
        yield Case(layer, "3d", "no mask", "relu", "residual", "axis -1", dtype="float16")
    for layer, policy in product((*BATCH, "InstanceNorm tracking"), _PAIRS_OF_POLICIES):
        yield Case(layer, policy=policy)
        yield Case(layer, "3d", "mask", "elu", "residual", policy=policy, layout="channels_last")


TOGETHER = [case for case in dict.fromkeys(_together()) if nonsense(case.values) is None]
