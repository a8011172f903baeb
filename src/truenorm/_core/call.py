"""What a layer asks for, as one value: made once, and carried from the layer to the kernel.

y = act(norm(x) · weight + bias + residual), and `padding` where nothing is valid by the mask.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from . import geometry
from .geometry import Axes

NEEDS_INPUT, NEEDS_WEIGHT, NEEDS_BIAS, NEEDS_RESIDUAL = 1, 2, 4, 8
# the residual's place holds y, whose sign is that of what the activation took
BY_OUTPUT = 16
CONSTANT, UNCENTRED, PER_CHANNEL = 32, 64, 128
# the statistics are wanted too
KEEP = 256
ROUNDS, ONE_PLUS, AS_GIVEN = 512, 1024, 2048
ACT, FEATURES, GROUPS = 16, 24, 32  # where in the number these begin
# of a gate, in a number of its own: where it comes in, whether it is g · σ(g) or σ(g), and what is
# rounded to x's dtype before the last step
BEFORE, SWISH, ROUNDS_X_HAT, ROUNDS_PRODUCT = 1, 2, 4, 8


class Form(NamedTuple):
    """What a call computes, apart from its tensors: hashable, and for an operator one number.

    constant: whether statistics that are given do not depend on x, as those of evaluation; those of
        several processes do.
    parameter: of the activation: leaky_relu's slope, elu's alpha.
    padding: what y holds where nothing is valid.
    rounds: whether x̂, its product with weight and the sum with bias and residual are each rounded
        to x's dtype, as by operators of that dtype one after the other. Elsewhere than over
        trailing dimensions the norm is one such operator, and an activation comes after it.
    one_plus: whether 1 + weight is what is meant by weight.
    """

    axes: Axes
    eps: float
    constant: bool = False
    act: int = 0
    parameter: float = 0.0
    padding: float = 0.0
    rounds: bool = False
    one_plus: bool = False

    def bits(self, x: Tensor, flags: int = 0) -> int:
        """This form of a call with that x, as csrc/call.h reads it."""
        groups, feature_dims, centred, as_given = self.axes
        if feature_dims:
            groups = 0
        elif groups and groups == x.shape[1]:
            # so that a compiler's unknown number of channels is no part of it
            groups, flags = 0, flags | PER_CHANNEL
        if self.constant:
            flags |= CONSTANT
        if not centred:
            flags |= UNCENTRED
        if as_given:
            flags |= AS_GIVEN
        if self.rounds:
            flags |= ROUNDS
        if self.one_plus:
            flags |= ONE_PLUS
        return flags | self.act << ACT | feature_dims << FEATURES | groups << GROUPS

    def numbers(self, x: Tensor, flags: int = 0) -> tuple[int, float, float]:
        return self.bits(x, flags), self.eps, self.parameter


def axes_of(bits: int, x: Tensor) -> Axes:
    """Which values share a statistic, by a number that `Form.bits` made."""
    feature_dims = bits >> FEATURES & 0xFF
    if feature_dims:
        return Axes(1, feature_dims, not bits & UNCENTRED, bool(bits & AS_GIVEN))
    groups = x.shape[1] if bits & PER_CHANNEL else bits >> GROUPS
    return Axes(groups, 0, not bits & UNCENTRED)


def form_of(bits: int, x: Tensor, eps: float, parameter: float = 0.0, padding: float = 0.0) -> Form:
    """The form that `Form.bits` made a number of."""
    constant, act = bool(bits & CONSTANT), bits >> ACT & 0xFF
    steps = bool(bits & ROUNDS), bool(bits & ONE_PLUS)
    return Form(axes_of(bits, x), eps, constant, act, parameter, padding, *steps)


class Running(NamedTuple):
    """Running statistics to update, and how."""

    mean: Tensor
    var: Tensor
    num_batches_tracked: Tensor | None
    momentum: float | None
    # whether a batch whose statistics are not finite leaves them where they are
    skip_nonfinite: bool = False
    # where the batch's moments are gathered instead, until `accumulate` ends
    gathered: Any = None


class Call(NamedTuple):
    """One layer's input, and what to do with it.

    x: (N, C, *positions), or (*, *features).
    weight, bias: like the channels, or the features; with one dimension more, a row for each of as
        many parts of the samples, or of the leading indices, which follow one another.
    mask: (N, *positions), one for each leading index where the last dimensions are the features;
        or of x's shape, where each channel or element has a mask of its own.
    residual: of x's shape and dtype.
    given: mean and biased variance, instead of x's own.
    running: moves towards x's own statistics.
    group: the processes over which statistics span.
    inplace: whether y may be written over x; it is not where a gradient is to come.
    layer: whose call it is, for what is remembered of it.
    scale, shift: norm(x) · weight + bias times 1 + scale, and shift added to that; each of as many
        dimensions as x, and of its size or 1 along each.
    """

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    form: Form
    mask: Tensor | None = None
    residual: Tensor | None = None
    given: tuple[Tensor, Tensor] | None = None
    running: Running | None = None
    group: Any = None
    inplace: bool = False
    layer: Any = None
    scale: Tensor | None = None
    shift: Tensor | None = None

    def differentiated(self) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        return self.x, self.weight, self.bias, self.residual

    def by_part(self) -> bool:
        """Whether parts of the samples have weights of their own."""
        features = self.form.axes.feature_dims
        return self.weight is not None and self.weight.dim() > max(features, 1)

    def own_mask(self) -> bool:
        """Whether channels, or elements of a row, have masks of their own."""
        return self.mask is not None and self.mask.dim() == self.x.dim()

    def num_statistics(self) -> int:
        return geometry.num_statistics(self.x.shape, self.form.axes)

    def values_per_statistic(self) -> int:
        """Where nothing is masked."""
        return geometry.values_per_statistic(self.x.shape, self.form.axes)
