"""What `fuse` makes of each norm's call, in a few words; nothing is changed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import torch
from torch.fx import Graph, Node
from torch.nn import Module

from ..._core import activation
from . import patterns, sums
from .classes import PLAN
from .codes import Unreadable
from .fusing import may_be_read, undisturbed
from .memory import is_plain, module_of
from .reading import recording
from .tracing import read

Is = Callable[[Module], bool]
_CONTAINERS = torch.nn.ModuleList, torch.nn.ModuleDict


def outlook(model: Module, norms: list[Module], follows: Is, of_sums: Is) -> dict[Module, str]:
    """For each of these layers what is, or would be, done in its pass, or why nothing.

    norms: those that are truenorm's, or would be.
    follows, of_sums: whether one of them takes what comes after it, and a sum before it.
    """
    wanted = set(norms)
    said: dict[Module, str] = {}

    def look() -> None:
        with recording():
            # a norm's call stands in the forward of the nearest module that has one
            for module in reversed(list(model.modules())):
                held = [m for m in module.modules() if m in wanted and m is not module]
                if held and not isinstance(module, _CONTAINERS):
                    for norm, words in _of_module(module, held, follows, of_sums):
                        said.setdefault(norm, words)

    undisturbed(look)
    return {norm: said.get(norm, "not called by a module of the model") for norm in norms}


def _of_module(
    module: Module, norms: list[Module], follows: Is, of_sums: Is
) -> Iterator[tuple[Module, str]]:
    """Of the norms that this forward calls; of all that it may call, where it cannot be read."""
    own = [m for m in norms if _holder(module, m)]
    try:
        if not may_be_read(module):
            raise Unreadable("not written in Python, or the instance's own")
        graph = copy.deepcopy(read(module).graph)
    except Unreadable as error:
        why = f"forward of {type(module).__name__}: {error}".replace(": the forward ", " ")
        yield from ((norm, why) for norm in own)
        return
    patterns.drop_passing(module, graph)
    known = set(norms)
    found = patterns.find(module, graph, lambda m: m in known and follows(m))
    added = sums.find(module, graph, patterns.nodes_of(found), lambda m: m in known and of_sums(m))
    is_fused = vars(module).get(PLAN) is not None
    with_what = {each.norm: _words(each) for each in found}
    with_what.update((each.norm, "the sum before it") for each in added)
    for node in graph.nodes:
        norm = module_of(module, node)
        if norm in known and norm is not None:
            what = with_what.get(node)
            yield (
                norm,
                _why(module, graph, node)
                if what is None
                else (f"{'fused with' if is_fused else 'fuses with'} {what}"),
            )


def _holder(module: Module, norm: Module) -> bool:
    """Whether no module with a forward of its own lies between the two."""
    waiting = [module]
    while waiting:
        for child in waiting.pop().children():
            if child is norm:
                return True
            if isinstance(child, _CONTAINERS):
                waiting.append(child)
    return False


def _words(found: patterns.Found) -> str:
    parts = []
    if "scale" in found.given:
        parts.append("scale and shift" if "shift" in found.given else "scale")
    if "residual" in found.given:
        parts.append("sum")
    if found.act_of[0] != activation.NONE:
        parts.append("activation")
    return ", ".join(parts)


def _why(root: Module, graph: Graph, norm: Node) -> str:
    layer = module_of(root, norm)
    assert layer is not None
    if len(norm.args) != 1 or norm.kwargs:
        return "called with more than its input"
    if not is_plain(layer):
        return "has hooks"
    users = [node for node in norm.users if node.op != "output"]
    if not users:
        return "its output is the module's"
    if len(norm.users) > 1:
        return f"its output is used {len(norm.users)} times"
    after = users[0]
    module = module_of(root, after)
    name = after.target if isinstance(after.target, str) else getattr(after.target, "__name__", "")
    said = type(module).__name__ if module is not None else str(name)
    if patterns.is_sum(norm, after):
        return "a sum without an activation follows"
    return f"followed by {said}"
