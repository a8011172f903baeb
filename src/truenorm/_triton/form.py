"""What a call computes, from the one number that operators take."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .._core.call import (
    ACT,
    AS_GIVEN,
    BY_OUTPUT,
    CONSTANT,
    FEATURES,
    GROUPS,
    KEEP,
    ONE_PLUS,
    ROUNDS,
    UNCENTRED,
    axes_of,
)
from .._core.geometry import Axes


class Form(NamedTuple):
    """needs: the gradients that are wanted, as flags.

    by_output: whether the residual's place holds y, whose sign is that of what the activation took.
    constant: whether statistics that are given do not depend on x.
    keep: whether the record is wanted.
    act: by the numbers of activation.py.
    rounds: whether each step is rounded to x's dtype.
    one_plus: whether 1 + weight is what is meant by weight.
    """

    axes: Axes
    needs: int
    by_output: bool
    constant: bool
    keep: bool
    act: int
    rounds: bool
    one_plus: bool


def unpack(bits: int, x: Tensor) -> Form:
    """The form in a number, of a call with that x."""
    return Form(
        axes_of(bits, x),
        bits & 15,
        bool(bits & BY_OUTPUT),
        bool(bits & CONSTANT),
        bool(bits & KEEP),
        bits >> ACT & 0xFF,
        bool(bits & ROUNDS),
        bool(bits & ONE_PLUS),
    )


def pack(axes: Axes) -> int:
    """The number of a form with these axes, and nothing else."""
    groups = 0 if axes.feature_dims else axes.num_groups
    flags = (0 if axes.centred else UNCENTRED) | (AS_GIVEN if axes.as_given else 0)
    return groups << GROUPS | axes.feature_dims << FEATURES | flags
