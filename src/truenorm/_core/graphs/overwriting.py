"""A norm in place, where nothing else can see its input and no gradient is to come."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, Node

from ..call import KEEP
from . import nodes
from .nodes import BITS, X

# whose result is memory of its own
_MAKERS: set[Any] = {
    torch.conv1d, torch.conv2d, torch.conv3d,
    torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d,
    torch._C._nn.linear, torch.matmul, torch.bmm,
    torch.ops.aten.convolution.default, torch.ops.aten.linear.default,
    *(getattr(torch.ops.aten, f"conv{d}d").default for d in (1, 2, 3)),
}  # fmt: skip


def overwrite(graph: Graph, norm: Node) -> bool:
    """Put the operator that writes over x in a norm's place, where that can be; whether it was.

    Inductor takes its own code's memory again in this way, and spares a new output's pages.
    """
    args: Any = norm.args
    x = args[X]
    alone = isinstance(x, Node) and x.target in _MAKERS and list(x.users) == [norm]
    outputs = nodes.outputs(norm, 0)
    # what a graph gives back has a layout of its own, which may not be x's
    last = any(user.op == "output" for y in outputs for user in y.users)
    if args[BITS] & KEEP or not alone or last or len(outputs) != len(norm.users):
        return False
    with graph.inserting_before(norm):
        graph.call_function(torch.ops.truenorm.norm_.default, norm.args)
    for y in outputs:
        y.replace_all_uses_with(x)
        graph.erase_node(y)
    graph.erase_node(norm)
    return True
