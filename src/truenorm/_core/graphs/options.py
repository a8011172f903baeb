"""Which norms of a compiled graph are joined with what follows, and which are the compiler's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from torch.fx import Graph, Node

from . import expanding, joining, nodes, overwriting
from .nodes import X


class CompileOptions(NamedTuple):
    """How truenorm's norms stand in graphs that Inductor compiles from now on."""

    join: bool = True
    own: int = 1 << 17


_options = CompileOptions()


def compile_options(join: bool | None = None, own: int | None = None) -> CompileOptions:
    global _options
    given = {"join": join, "own": own}
    _options = _options._replace(**{k: v for k, v in given.items() if v is not None})
    return _options


def _is_own(norm: Node) -> bool:
    """Whether the compiler's own operators serve a norm better."""
    x = nodes.value(norm.args[X])
    if x is None or not expanding.can(norm):
        return False
    values = x.numel()
    return x.device.type == "cpu" and isinstance(values, int) and values <= _options.own


def change(graph: Graph) -> None:
    """Give each norm of a graph the form in which it is fastest there."""
    changed = False
    for norm in nodes.norms(graph):
        if _is_own(norm):
            expanding.expand(graph, norm)
            changed = True
            continue
        joined = joining.join(graph, norm) if _options.join else None
        overwritten = overwriting.overwrite(graph, joined or norm)
        changed = changed or joined is not None or overwritten
    if changed:
        graph.lint()


def install() -> None:
    """Have Inductor ask `change` of each graph; called as soon as a norm is traced for a compiler."""
    from torch._inductor import config
    from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

    before = config.pre_grad_custom_pass
    if getattr(before, "_truenorm", False):
        return
    here = Path(__file__).parent
    files = tuple(str(path) for path in sorted((*here.glob("*.py"), *here.parent.glob("[ac]*.py"))))

    class Change(CustomGraphPass):
        _truenorm = True

        def __call__(self, graph: Graph) -> None:
            change(graph)

        def uuid(self) -> Any:
            return get_hash_for_files(files, str(_options))

    config.pre_grad_custom_pass = Change()
