"""A norm as the compiler's own operators: it then makes one loop of it and what stands around it.

In float64, so that the promises hold. The variance is that of distances from a value of the group,
in one pass: (pivot − mean)² is at most n times the variance, so that what cancels costs at most
n · 2⁻⁵³ of it. Rows lie in a cache, and are read twice instead.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node, Proxy
from torch.fx.proxy import GraphAppendingTracer

from .. import activation, geometry
from ..call import CONSTANT, ONE_PLUS, ROUNDS, Form, axes_of, form_of
from . import nodes
from .nodes import BIAS, BITS, EPS, MASK, MEAN, PARAMETER, RESIDUAL, VAR, WEIGHT, X


def can(norm: Node) -> bool:
    """Whether the formula here is that of this call."""
    args: Any = norm.args
    x, bits = nodes.value(args[X]), args[BITS]
    if x is None or args[MASK] is not None or bits & (ROUNDS | ONE_PLUS):
        return False
    axes = axes_of(bits, x)
    if args[MEAN] is not None and (axes != geometry.BATCH or not bits & CONSTANT):
        return False
    weight = nodes.value(args[WEIGHT])
    known = weight is not None or args[WEIGHT] is None
    return known and (weight is None or weight.dim() == max(axes.feature_dims, 1))


def expand(graph: Graph, norm: Node) -> None:
    """Put the formula in a norm's place."""
    args: Any = norm.args
    x = nodes.value(args[X])
    assert x is not None
    form = form_of(args[BITS], x, args[EPS], args[PARAMETER])
    tracer = GraphAppendingTracer(graph)
    of_y, of_record = (nodes.outputs(norm, number) for number in (0, 1))
    with graph.inserting_before(norm):
        given = [Proxy(a, tracer) if isinstance(a, Node) else a for a in args]
        formula = _Formula(given, form, x)
        y = formula.y()
        made = [y, formula.record()] if of_record else [y]
    for taken, new in zip((of_y, of_record), made, strict=False):
        for node in taken:
            new.node.meta = dict(node.meta)
            node.replace_all_uses_with(new.node)
            graph.erase_node(node)
    graph.erase_node(norm)


class _Formula:
    """Of one call; what is here of tensors are proxies, which write down what is asked of them."""

    def __init__(self, args: list[Any], form: Form, like: Tensor) -> None:
        self.args, self.form = args, form
        self.shape, self.dtype = like.shape, like.dtype
        self.wide = torch.float32 if like.device.type == "mps" else torch.float64
        self.axes = form.axes
        self.pivot: Any = None
        groups, features, *_ = self.axes
        # a group of several channels is a dimension of its own
        self.split = 0 if features or groups in (0, like.shape[1]) else groups
        self.x = self._against_x(args[X])
        self.last = len(like.shape) + bool(self.split)
        if features:
            self.dims = list(range(self.last - features, self.last))
        else:
            first = [] if groups else [0]
            self.dims = [*first, *range(2, self.last)]
        self.mean, self.var = self._statistics()

    def _against_x(self, t: Any) -> Any:
        """What is of x's shape, with the groups apart."""
        if self.split:
            t = t.unflatten(1, (self.split, self.shape[1] // self.split))
        return t.to(self.wide)

    def _parameter(self, p: Any) -> Any:
        if not self.axes.feature_dims:
            channels = (self.split, -1) if self.split else (-1,)
            p = p.reshape(1, *channels, *[1] * (len(self.shape) - 2))
        return p.to(self.wide)

    def _statistics(self) -> tuple[Any, Any]:
        """Mean less the pivot, and biased variance; a mean of None is zero."""
        if self.args[MEAN] is not None:
            return self._parameter(self.args[MEAN]), self._parameter(self.args[VAR])
        x, dims = self.x, self.dims
        if not self.axes.centred:
            return None, (x * x).mean(dims, True)
        if self.axes.feature_dims:
            mean = x.mean(dims, True)
            d = x - mean
            return mean, (d * d).mean(dims, True)
        return self._by_pivot()

    def _by_pivot(self) -> tuple[Any, Any]:
        self.pivot = self.x.detach()
        for d in self.dims:
            self.pivot = self.pivot.narrow(d, 0, 1)
        self.x = self.x - self.pivot
        mean = self.x.mean(self.dims, True)
        return mean, ((self.x * self.x).mean(self.dims, True) - mean * mean).clamp(min=0.0)

    def y(self) -> Any:
        weight, bias, residual = (self.args[place] for place in (WEIGHT, BIAS, RESIDUAL))
        scale = (self.var + self.form.eps).rsqrt()
        weight, bias = (p if p is None else self._parameter(p) for p in (weight, bias))
        if self.axes.feature_dims:
            z = (self.x if self.mean is None else self.x - self.mean) * scale
            z = z if weight is None else z * weight
        else:
            # per channel once, so that each value takes a product and a sum
            scale = scale if weight is None else scale * weight
            shift = -(self.mean * scale)
            z, bias = self.x * scale, shift if bias is None else bias + shift
        z = z if bias is None else z + bias
        if residual is not None:
            z = z + self._against_x(residual)
        z = activation.act(z, self.form.act, self.form.parameter).to(self.dtype)
        return z.flatten(1, 2) if self.split else z

    def record(self) -> Any:
        """Means, variances and counts: (3, statistics), as constants."""
        mean = torch.zeros_like(self.var) if self.mean is None else self.mean
        if self.pivot is not None:
            mean = mean + self.pivot
        values = geometry.values_per_statistic(self.shape, self.axes)
        three = mean, self.var, torch.full_like(self.var, values)
        return torch.stack([t.detach().reshape(-1) for t in three])
