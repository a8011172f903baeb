"""`survey`: every normalization layer of a model, what it is to truenorm, and why one is left."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch.nn import Module

from .._core import checks
from ..nn._orders import has_pass
from ..nn._ruled import Ruled
from . import rules, swap
from .fusing import patterns, sums
from .fusing.fusing import OWN
from .fusing.outlook import outlook
from .layers import COUNTERPARTS, kind_of

_OURS = tuple(COUNTERPARTS.values())


@dataclass(frozen=True)
class Norm:
    """One normalization layer of a model.

    name, kind: its name in the model and its class, "package.module.Class".
    formula: what it was recognised as: "batch" and its like, torch's own; "rms, cast_first" and its
        like, a rule; "" where it was not.
    swapped: whether it is truenorm's now.
    swappable: whether `convert` would make it so; true of one that is swapped.
    reason: why it is left, or "".
    fuse: what `fuse` does, or would do, in the pass of this layer where it is truenorm's: "fuses
        with activation", "fused with the sum before it"; or why nothing; "" for one that is left.
    """

    name: str
    kind: str
    formula: str
    swapped: bool
    swappable: bool
    reason: str
    fuse: str = ""


@dataclass(frozen=True)
class Survey:
    """What `survey` found; print it, or read its rows.

    model: class of the model.
    norms: in the model's order, a shared one once.
    """

    model: str
    norms: tuple[Norm, ...]

    @property
    def swapped(self) -> int:
        """How many layers are truenorm's."""
        return sum(norm.swapped for norm in self.norms)

    @property
    def swappable(self) -> int:
        """How many are truenorm's or would be, after `convert`."""
        return sum(norm.swappable for norm in self.norms)

    @property
    def left(self) -> int:
        """How many `convert` leaves as they are."""
        return len(self.norms) - self.swappable

    def to_dict(self) -> dict[str, Any]:
        """As plain dictionaries, with the counts."""
        counts = {"swapped": self.swapped, "swappable": self.swappable, "left": self.left}
        return {**asdict(self), **counts}

    def to_json(self) -> str:
        """The same as JSON."""
        return json.dumps(self.to_dict(), indent=1)

    def __str__(self) -> str:
        plural = "s" * (len(self.norms) != 1)
        lines = [
            f"{self.model}: {len(self.norms)} normalization layer{plural}, {self.swapped} of them "
            f"truenorm's, {self.swappable - self.swapped} more with convert, {self.left} left"
        ]
        same: Counter[tuple[str, str, str, str, str]] = Counter()
        first: dict[tuple[str, str, str, str, str], str] = {}
        for norm in self.norms:
            state = "swapped" if norm.swapped else "would be" if norm.swappable else "left"
            row = norm.kind.rpartition(".")[2], norm.formula, state, norm.reason, norm.fuse
            same[row] += 1
            first.setdefault(row, norm.name or "the model itself")
        if not same:
            return lines[0]
        table = [("class", "layers", "recognised as", "state", "fuse", "first, and why it is left")]
        for row, count in same.items():
            kind, formula, state, reason, fuse = row
            said = f"{first[row]}{reason and ': '}{reason}"
            table.append((kind, str(count), formula or "-", state, fuse or "-", said))
        widths = [max(len(row[i]) for row in table) for i in range(5)]
        for kind, count_, formula, state, fuse, said in table:
            cells = (
                kind.ljust(widths[0]),
                count_.rjust(widths[1]),
                formula.ljust(widths[2]),
                state.ljust(widths[3]),
                fuse.ljust(widths[4]),
                said,
            )
            lines.append("  ".join(cells).rstrip())
        return "\n".join(lines)


def _name_of(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def survey(model: Module, *, progress: Callable[[str], None] | None = None) -> Survey:
    """Say of every normalization layer of `model` what it is, and what `convert` does with it.

        print(truenorm.survey(model))

    Nothing is changed. Each class that another library wrote is run once, on random weights of its
    own, against the formula that it is taken for, as `convert` does it.

    model: any torch.nn.Module, converted or not; its weights may be on any device, meta too.
    progress: called with each layer's name, before the layer is looked at.

    Errors: TypeError where `model` is no module.
    """
    checks.check_module("model", model)
    found = rules.find(model, "module", progress)
    unable = {left.name: left.reason for left in rules.swappable(found)[1]}
    torchs, left = swap.targets(model, COUNTERPARTS)
    reasons = {each.name: each.reason for each in left} | unable
    rows = []
    for name, module in model.named_modules():
        kind = swap.core(module)
        if isinstance(module, Ruled):
            rows.append(Norm(name, _name_of(kind), module._read.words(), True, True, ""))
        elif isinstance(module, _OURS):
            theirs = (swap.parts(kind) or (kind, kind))[1]
            rows.append(Norm(name, _name_of(theirs), kind_of(module) or "", True, True, ""))
        elif module in torchs:
            rows.append(Norm(name, _name_of(kind), kind_of(module) or "", False, True, ""))
        elif module in found:
            what = found[module][1]
            formula = "" if what.rule is None else what.rule.words()
            reason = unable.get(name, what.reason)
            if what.kind is None:
                formula = ""
            rows.append(Norm(name, _name_of(kind), formula, False, not reason, reason))
        elif name in reasons:
            rows.append(Norm(name, _name_of(kind), "", False, False, reasons[name]))
    return Survey(type(model).__name__, _with_outlook(model, rows, found))


def _with_outlook(model: Module, rows: list[Norm], found: dict[Module, Any]) -> tuple[Norm, ...]:
    """The rows, with what `fuse` makes of each layer."""
    modules = {row.name: model.get_submodule(row.name) for row in rows if row.swappable}

    def of_sums(module: Module) -> bool:
        if isinstance(module, OWN):
            return sums.takes_sums(module)
        if module not in found:
            return isinstance(module, (torch.nn.LayerNorm, torch.nn.RMSNorm))
        return has_pass(found[module][1].rule)

    def follows(module: Module) -> bool:
        return patterns.is_layer(module) or (not isinstance(module, OWN) and module not in found)

    said = outlook(model, list(modules.values()), follows, of_sums)
    return tuple(
        replace(row, fuse=said[modules[row.name]]) if row.name in modules else row for row in rows
    )
