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
from truenorm.nn._base import BESIDE

_INTRODUCTION = {
    "layers": (
        "Layers",
        "Each is a subclass of the layer of the same name in `torch.nn`, with torch's arguments; "
        "`truenorm.BatchNorm2d` and `truenorm.nn.BatchNorm2d` are one.",
    ),
    "functions": (
        "Functions",
        "The layers without state (`truenorm.functional`), what several processes need beyond "
        "them (`truenorm.distributed`), and the formulas in float64 (`truenorm.reference`).",
    ),
    "models": ("Models and tools", "What works on whole models, and on this machine."),
}
# what the layers take beyond torch's arguments, and where it is told; when they are built ...
_OPTIONS = {
    "statistics_frozen": "the running statistics normalize in training too, and stay as they are "
    "([frozen statistics](../howto/statistics.md#fine-tuning-with-frozen-statistics))",
    "on_single": "what one value per channel does in training "
    "([one value](../howto/statistics.md#one-value-per-channel))",
    "skip_nonfinite": "a batch with NaN or Inf moves no running statistics "
    "([NaN and Inf](../howto/statistics.md#nan-and-inf))",
    "virtual_batch_size": "samples that are normalized together in training "
    "([ghost batches](../howto/small-batches.md#ghost-batches))",
    "renorm": "Batch Renormalization ([small batches](../howto/small-batches.md))",
    "rmax": "its bound of the factor r",
    "dmax": "its bound of the shift d",
    "process_group": "the processes that share statistics "
    "([several processes](../howto/distributed.md))",
    "channel_axis": "the dimension of the channels "
    "([channels in another place](../howto/channel-axis.md))",
    "activation": "what is applied to the result ([activation](../howto/activation.md))",
    "leaky_relu_slope": "leaky_relu's slope below zero",
    "elu_alpha": "elu's value far below zero",
    "gelu_approximate": "how gelu is computed",
    "overwrite_input": "the input may be overwritten where no gradient needs it "
    "([in place](../howto/activation.md#in-place))",
}
# ... and when they are called
_CALL = {
    "mask": "which values count ([padded data](../howto/masks.md))",
    "lengths": "how many leading positions of each sample count",
    "padding_value": "what the output holds elsewhere",
    "scale": "y times 1 + scale ([scale and shift](../howto/scale-and-shift.md))",
    "shift": "what is added to that",
    "add": "what is added to the input first; the sum is given back too "
    "([a sum before the norm](../howto/activation.md#a-sum-before-the-norm))",
    "residual": "what is added before the activation ([residual](../howto/activation.md))",
}


def _escaped(line: str) -> str:
    """A docstring's line as Markdown: stars are stars, and code stays code."""
    parts = re.split(r"(`[^`]*`)", line)
    parts[::2] = [re.sub(r"([*<_\[\]$])", r"\\\1", part) for part in parts[::2]]
    return re.sub(r"https://[\w./-]*\w", r"<\g<0>>", "".join(parts))


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
        parameters=[
            p.replace(annotation=p.empty)
            for p in signature.parameters.values()
            if p.name not in ("self", "cls")  # a method's, which a caller does not write
        ],
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
    from truenorm._models import comparing, inspecting, surveying
    from truenorm._models.folding import folding
    from truenorm._tools import explain

    for module in (comparing, explain, inspecting, folding, surveying):
        for name in getattr(module, "__all__", dir(module)):
            thing = getattr(module, name)
            if dataclasses.is_dataclass(thing) and thing.__module__.startswith(module.__name__):
                yield name, thing


def _beyond_torch(layers: list[tuple[str, Any]]) -> str:
    """Tables of the layers' own options and of forward's; one that is told nowhere is an error."""
    found: dict[str, dict[str, list[str]]] = {"built": {}, "called": {}}
    for name, layer in layers:
        keywords = inspect.signature(layer.forward).parameters.values()
        called = {p.name: p.default for p in keywords if p.kind is p.KEYWORD_ONLY}
        if any(p.kind is p.VAR_KEYWORD for p in keywords):  # RMSNorm hands all of them on
            called |= BESIDE
        called = {n: d for n, d in called.items() if n != "_then"}
        options = {option: held.default for option, held in layer._options.items()}
        for table, having in (("built", options), ("called", called)):
            for option, default in having.items():
                takers = found[table].setdefault(f"{option}={default!r}", [])
                family = re.sub(r"[123]d$", "", name.rpartition(".")[2])
                takers += [] if family in takers or family.startswith("Lazy") else [family]
    parts = []
    for table, told in (("built", _OPTIONS), ("called", _CALL)):
        missing = {option.partition("=")[0] for option in found[table]} - told.keys()
        if missing:
            raise LookupError(f"{__file__}: say what {', '.join(sorted(missing))} is for")
        parts += [f"| when {table} | for | meaning |", "| --- | --- | --- |"]
        for option, takers in found[table].items():
            parts.append(f"| `{option}` | {', '.join(takers)} | {told[option.partition('=')[0]]} |")
        parts.append("")
    return "## Beyond torch's arguments\n\n" + "\n".join(parts) + "\n"


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
        beyond = _beyond_torch(layers) if page == "layers" else ""
        made[f"api/{page}.md"] = f"# {title}\n\n{introduction}\n\n{beyond}{body}"
    returned = "\n".join(entry(name, thing) for name, thing in dict(_returned()).items())
    made["api/models.md"] += f"\n## What they return\n\n{returned}" * bool(returned)
    return made
