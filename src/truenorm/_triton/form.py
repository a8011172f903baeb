"""What a call computes, from the one number that operators take."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .._axes import Axes

NEEDS_INPUT, NEEDS_WEIGHT, NEEDS_BIAS, NEEDS_RESIDUAL = 1, 2, 4, 8
BY_OUTPUT, CONSTANT, UNCENTRED, PER_CHANNEL, KEEP = 16, 32, 64, 128, 256
ACT, FEATURES, GROUPS = 16, 24, 32  # where in the number these begin


class Form(NamedTuple):
    """needs: the gradients that are wanted, as flags.

    by_output: whether the residual's place holds y, whose sign is that of what the activation took.
    constant: whether statistics that are given do not depend on x.
    keep: whether the record is wanted.
    act: by the numbers of activation.py.
    """

    axes: Axes
    needs: int
    by_output: bool
    constant: bool
    keep: bool
    act: int


def unpack(bits: int, x: Tensor) -> Form:
    """The form in a number, of a call with that x."""
    centred, features = not bits & UNCENTRED, bits >> FEATURES & 0xFF
    if features:
        axes = Axes(1, features, centred)
    else:
        axes = Axes(x.shape[1] if bits & PER_CHANNEL else bits >> GROUPS, 0, centred)
    return Form(
        axes,
        bits & 15,
        bool(bits & BY_OUTPUT),
        bool(bits & CONSTANT),
        bool(bits & KEEP),
        bits >> ACT & 0xFF,
    )


def pack(axes: Axes) -> int:
    """The number of a form with these axes, and nothing else."""
    groups = 0 if axes.feature_dims else axes.num_groups
    return groups << GROUPS | axes.feature_dims << FEATURES | (0 if axes.centred else UNCENTRED)
