"""The API's pages: every public name with its signature and docstring, as Python has them.

Read at run time and not off the source, because the layers' signatures are put together there:
torch's own arguments, and truenorm's.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch

import truenorm
from truenorm import distributed, functional, nn, reference

_INTRODUCTION = {
    "layers": (
        "Layers",
        "Each is a subclass of the layer of the same name in `torch.nn`. "
        "`truenorm.BatchNorm2d` and `truenorm.nn.BatchNorm2d` are one.",
    ),
    "functions": ("Functions", ""),
    "models": ("Models and tools", ""),
}


def _escaped(line: str) -> str:
    """A docstring's line as Markdown: stars are stars, and code stays code."""
    parts = re.split(r"(`[^`]*`)", line)
    parts[::2] = [re.sub(r"([*<_\[\]$])", r"\\\1", part) for part in parts[::2]]
    return "".join(parts)


def _docstring(thing: Any, names: set[str]) -> str:
    """Its text; lines that begin with an argument or a field become a list."""
    lines, listed = [], False
    for line in (inspect.getdoc(thing) or "").splitlines():
        named = re.match(r"(\w+(?:, \w+)*): (.*)", line)
        if named and names.issuperset(named[1].split(", ")):
            lines += [] if listed else [""]
            arguments = ", ".join(f"`{name}`" for name in named[1].split(", "))
            lines.append(f"- {arguments}: {_escaped(named[2])}")
            listed = True
        elif line.startswith("    ") and not listed:
            lines.append(line)
        else:
            listed = listed and bool(line.strip())
            lines.append("    " * listed + _escaped(line.strip()))
    return "\n".join(lines)


def _signature(name: str, thing: Any) -> tuple[str, set[str]]:
    try:
        signature = inspect.signature(thing)
    except (TypeError, ValueError):
        return "", set()
    plain = signature.replace(
        parameters=[p.replace(annotation=p.empty) for p in signature.parameters.values()],
        return_annotation=inspect.Signature.empty,
    )
    text = f"{name}{plain}"
    if len(text) > 90:
        inside = ",\n    ".join(str(p) for p in plain.parameters.values())
        text = f"{name}(\n    {inside},\n)"
    return f"```python\n{text}\n```\n", set(signature.parameters)


def _members(thing: Any) -> Iterator[tuple[str, Any]]:
    """What a class of truenorm's adds, in the order of its source."""
    for name, member in vars(thing).items():
        if not name.startswith("_") and inspect.isfunction(getattr(member, "__func__", member)):
            yield name, getattr(member, "__func__", member)


def entry(name: str, thing: Any, level: int = 2) -> str:
    """One name: heading, signature, docstring, and a class's methods."""
    signature, arguments = _signature(name.rpartition("truenorm.")[2], thing)
    if dataclasses.is_dataclass(thing):
        signature = ""  # such an object comes from a function; its fields are what matters
    parts = [f"{'#' * level} {name}", "", signature, _docstring(thing, arguments), ""]
    if inspect.isclass(thing) and not issubclass(thing, torch.nn.Module):
        shown = [(n, m) for n, m in _members(thing) if inspect.getdoc(m)]
        parts += [entry(f"{name}.{n}", m, level + 1) for n, m in shown]
    return "\n".join(parts)


def _public(module: ModuleType) -> list[tuple[str, Any]]:
    names = getattr(module, "__all__", None) or [
        name for name, thing in vars(module).items()
        if not name.startswith("_") and getattr(thing, "__module__", "") == module.__name__
    ]  # fmt: skip
    return [(f"{module.__name__}.{name}", getattr(module, name)) for name in names]


def _returned() -> Iterator[tuple[str, Any]]:
    """The objects that the functions give, which have methods of their own."""
    from truenorm import _compare, _explain, _inspect
    from truenorm._fold import folding

    for module in (_compare, _explain, _inspect, folding):
        for name in getattr(module, "__all__", dir(module)):
            thing = getattr(module, name)
            if dataclasses.is_dataclass(thing) and thing.__module__.startswith(module.__name__):
                yield name, thing


def pages() -> dict[str, str]:
    """Each page's path and Markdown."""
    layers = [(n.replace("nn.", ""), t) for n, t in _public(nn)]
    modules = (functional, distributed, reference)
    functions = [found for module in modules for found in _public(module)]
    others = [
        (name, thing) for name, thing in _public(truenorm)
        if not isinstance(thing, ModuleType) and name not in dict(layers)
    ]  # fmt: skip
    made = {}
    for page, things in {"layers": layers, "functions": functions, "models": others}.items():
        title, introduction = _INTRODUCTION[page]
        body = "\n".join(entry(name, thing) for name, thing in things)
        made[f"api/{page}.md"] = f"# {title}\n\n{introduction}\n\n{body}"
    returned = "\n".join(entry(name, thing) for name, thing in dict(_returned()).items())
    made["api/models.md"] += f"\n## What they return\n\n{returned}" * bool(returned)
    return made
