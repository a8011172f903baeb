"""What becomes of the norms of a graph that Inductor compiles, and how Inductor comes to ask."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.fx import Graph, Node

from .. import checks, imports
from . import expanding, joining, looping, nodes, overwriting
from .nodes import X


class CompileOptions(NamedTuple):
    """How truenorm's norms stand in graphs that are compiled from now on."""

    join: bool = True
    own: int = 0


_options = CompileOptions()


def compile_options(*, join: bool | None = None, own: int | None = None) -> CompileOptions:
    """What `torch.compile` makes of truenorm's layers: the options that hold from now on.

    join: whether an activation, or a sum and an activation, that follow a layer become part of its
        kernel, as `fuse` makes them, wherever in the model they stand; True at first. The output is
        then rounded once, where eager layers round after each.
    own: norms of at most this many values, on a CPU, become operators of the compiler's own, which
        it fuses with what stands around them; 0, for none, at first. They are computed in float64
        and rounded once, but are not the same to the bit as eager ones, nor from one number of
        threads to another. It pays where whole inputs are small, as 100,000 values.

    What is None stays as it is. Compiled already is compiled: `torch.compiler.reset()` forgets it.

    Errors: TypeError for a join that is no bool or an own that is no int, ValueError for one below
    zero.
    """
    global _options
    checks.check_compile_options(join, own)
    given: dict[str, Any] = {"join": join, "own": own}
    _options = _options._replace(**{k: v for k, v in given.items() if v is not None})
    return _options


def joins() -> bool:
    """Whether what follows a norm is taken in by `change`; while a compiler traces, a constant."""
    return _options.join


imports.constant_in_graphs("whether graphs join norms", joins)


def _is_own(norm: Node) -> bool:
    x = nodes.value(norm.args[X])
    if x is None or x.device.type != "cpu" or not expanding.can(norm):
        return False
    values: Any = x.numel()
    return isinstance(values, int) and values <= _options.own


def change(graph: Graph) -> None:
    """Give each norm of a graph the form in which it is fastest there."""
    changed = False
    for norm in nodes.norms(graph):
        if _is_own(norm):
            expanding.expand(graph, norm)
            changed = True
            continue
        if looping.serves(norm):
            continue
        joined = joining.join(graph, norm) if _options.join else None
        overwritten = overwriting.overwrite(graph, joined or norm)
        changed = changed or joined is not None or overwritten
    if changed:
        graph.lint()


def install() -> None:
    """Have Inductor ask `change` of each graph, after what it was told to ask before.

    Called as soon as a norm is traced for a compiler, so that an import alone changes nothing.
    """
    from torch._inductor import config
    from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

    before: Any = config.pre_grad_custom_pass
    if getattr(before, "_truenorm", False):
        return
    earlier = list(before) if isinstance(before, (list, tuple)) else [before] if before else []
    here = Path(__file__).parent
    files = tuple(map(str, sorted((*here.glob("*.py"), here.parent / "activation.py"))))

    class Change(CustomGraphPass):
        _truenorm = True

        def __call__(self, graph: Graph) -> None:
            for each in earlier:
                each(graph)
            change(graph)

        def _own(self) -> Any:
            return get_hash_for_files(files, str(_options))

        def uuid(self) -> Any:
            others = [each.uuid() if hasattr(each, "uuid") else None for each in earlier]
            # None: what an earlier one does is not known, and no graph is kept on disk
            return None if None in others else (self._own(), *others) if others else self._own()

        def __reduce__(self) -> Any:
            # torch 2.11 does not ask for uuid(): its key to a graph on disk has every pass pickled
            return tuple, ((self._own(), *earlier),)

    config.pre_grad_custom_pass = Change()
    _call_below_autograd()


def _call_below_autograd() -> None:
    """Have what Inductor makes of a graph call the operators that autograd knows nothing of."""
    from torch._inductor.lowering import fallback_handler, lowerings

    ours = torch.ops.truenorm
    norm, backward = ours.norm_below.default, ours.norm_backward_below.default
    lowerings[ours.norm.default] = looping.lowered(fallback_handler(norm))
    lowerings[ours.norm_backward.default] = fallback_handler(backward)
