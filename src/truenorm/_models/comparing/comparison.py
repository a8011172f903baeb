"""`compare`: the table of differences, and the first layer where they are more than rounding."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from ..._core import checks
from ..running import Call, check_model, is_batch, tensors, untouched
from .taps import Key, original, record

# What roundings grow to in a network of some hundred layers: relative, by norm.
TOLERANCES = {
    torch.float64: 1e-10,
    torch.float32: 1e-5,
    torch.float16: 1e-2,
    torch.bfloat16: 5e-2,
}


@dataclass(frozen=True)
class LayerDifference:
    """How far the outputs of a layer are apart in the two models.

    name, call: the layer, and which of its calls this is (0 where it is called once).
    kind_a, kind_b: the layer's class in each model.
    shape, dtype_a, dtype_b: of its output, the first of several.
    relative: ‖a − b‖ / ‖a‖; infinite where shapes differ, or NaN and Inf stand elsewhere.
    largest: the largest |a − b| of a value, in standard deviations of a.
    parts: whether `relative` is above the tolerance.
    """

    name: str
    call: int
    kind_a: str
    kind_b: str
    shape: tuple[int, ...]
    dtype_a: str
    dtype_b: str
    relative: float
    largest: float
    parts: bool

    @property
    def label(self) -> str:
        """The name; with the number of the call from the second on."""
        return f"{self.name} (call {self.call + 1})" if self.call else self.name


@dataclass(frozen=True)
class Comparison:
    """What `compare` found; print it for a table.

    layers: in the order in which the first model calls them; the last is the models' output.
    first: the first layer whose outputs differ by more than rounding; None where none does.
    only_a, only_b: layers that only one of the models called.
    folded: layers that `fold` joined with another, whose outputs have no counterpart.
    """

    layers: tuple[LayerDifference, ...]
    first: LayerDifference | None
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    folded: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def to_json(self) -> str:
        """The same as JSON, with null where a difference is not finite."""
        return json.dumps(_finite(self.to_dict()), indent=1)

    def save_picture(self, path: str | Path, *, force: bool = False) -> None:
        """Draw the differences along the layers, as a PNG, whole or not at all (needs matplotlib).

        Errors: FileExistsError where the file exists, unless `force`; FileNotFoundError where its
        folder does not.
        """
        from ..._tools.extras import require

        require("matplotlib", purpose="a picture")
        from .picture import save

        checks.check_writable(Path(path), force=force)
        save(self, path, force=force)

    def __str__(self) -> str:
        width = max(len(row.label) for row in self.layers)
        lines = [f"{'layer':<{width}}  {'relative':>9}  {'largest':>9}  class"]
        for row in self.layers:
            kinds = row.kind_a if row.kind_a == row.kind_b else f"{row.kind_a}, {row.kind_b}"
            mark = "  ← they part here" if row is self.first else ""
            lines.append(
                f"{row.label:<{width}}  {row.relative:>9.1e}  {row.largest:>9.1e}  {kinds}{mark}"
            )
        for name, only in (("first", self.only_a), ("second", self.only_b)):
            if only:
                lines.append(f"only in the {name} model: {', '.join(only)}")
        if self.folded:
            lines.append(f"not compared, for they were folded: {', '.join(self.folded)}")
        where = "nowhere" if self.first is None else f"at {self.first.label}"
        lines.append(f"they part {where}; relative: ‖a − b‖ / ‖a‖, largest: in deviations of a")
        return "\n".join(lines)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return [_finite(v) for v in value]
    return value


def _difference(a: list[Tensor], b: list[Tensor]) -> tuple[float, float]:
    """(relative, largest) over the tensors of two outputs."""
    if [t.shape for t in a] != [t.shape for t in b]:
        return math.inf, math.inf
    squares = norm = 0.0
    largest = 0.0
    for one, other in zip(a, b, strict=True):
        x, y = one.detach().double(), other.detach().to(one.device).double()
        # NaN and Inf in the same places are no difference
        odd = ~(x.isfinite() & y.isfinite())
        if bool(odd.any()):
            if not torch.equal(x[odd].nan_to_num(0.5), y[odd].nan_to_num(0.5)):
                return math.inf, math.inf
            x, y = x.masked_fill(odd, 0.0), y.masked_fill(odd, 0.0)
        if not x.numel():
            continue
        apart = (x - y).abs()
        squares += apart.square().sum().item()
        norm += x.square().sum().item()
        worst = apart.max().item()
        if worst:
            deviation = x.std(correction=0).item()
            largest = max(largest, worst / deviation if deviation else math.inf)
    if not squares:
        return 0.0, largest
    return math.sqrt(squares / norm) if norm else math.inf, largest


def _without_counterpart(model: Module) -> Iterator[str]:
    """Layers of a folded model whose outputs are none of the model's before folding."""
    last: dict[str, str] = {}
    for name, module in original(model).named_modules():
        into, side = getattr(module, "folded_into", None), getattr(module, "folded_side", None)
        if isinstance(into, str) and side == "before":
            # only the last of the layers folded into it has its output
            yield last.get(into, into)
            last[into] = name
        elif isinstance(into, str):
            yield name


def compare(
    model_a: Module,
    model_b: Module,
    batch: Any,
    *,
    call: Call | None = None,
    tolerance: float | None = None,
) -> Comparison:
    """How far the outputs of two versions of a model are apart, layer by layer.

    Both run on the batch, from the same random state, in the modes and dtypes that they are in
    (floating point inputs are cast to each model's), and layers of the same name are compared:
    relative = ‖a − b‖ / ‖a‖. The first layer above the tolerance is where the models part. For
    torch against truenorm, float32 against bfloat16, eager against compiled (which is compiled once
    more, with the layers' outputs among its own), before and after `fold`.

    batch: a tensor, a dictionary (passed by keywords), or a tuple or list whose first item is the
        input, as loaders give them.
    call: how to run a model on the batch, (model, batch) → output.
    tolerance: of `relative`; None for what roundings grow to in the coarser of the two dtypes:
        1e-10 in float64, 1e-5 in float32, 1e-2 in float16, 5e-2 in bfloat16.

    Errors: TypeError where a model is no module; ValueError where one fails on the batch, or they
    have no layer in common. Modes, buffers and hooks are as before, also after an error.
    """
    for name, model in (("model_a", model_a), ("model_b", model_b)):
        check_model(name, model)
    if not is_batch(batch):
        checks.fail_batch("batch", batch)
    outputs: dict[Key, tuple[str, list[Tensor]]] = {}
    rows: dict[Key, LayerDifference] = {}
    only_b: list[str] = []
    skipped = {*_without_counterpart(model_a), *_without_counterpart(model_b)}

    def keep(key: Key, module: Module, found: list[Tensor]) -> None:
        if found and key.name not in skipped:
            # a copy: a later layer may write into it
            outputs[key] = type(module).__name__, [t.clone() for t in found]

    def match(key: Key, module: Module, found: list[Tensor]) -> None:
        if not found or key.name in skipped:
            return
        if key in outputs:
            rows[key] = _row(key, *outputs[key], type(module).__name__, found, tolerance)
        elif key.name not in only_b:
            only_b.append(key.name)

    whole = Key("the output", 0)
    with untouched(model_a, model_b):
        for model, name, sink in ((model_a, "model_a", keep), (model_b, "model_b", match)):
            torch.manual_seed(0)
            with untouched() as stack:
                found = tensors(record(model, name, batch, call, stack, sink))
            sink(whole, original(model), found)
    ordered = tuple(rows[key] for key in outputs if key in rows)
    if not ordered:
        checks.fail_nothing_in_common()
    first = next((row for row in ordered if row.parts), None)
    only_a = tuple(dict.fromkeys(key.name for key in outputs if key not in rows))
    return Comparison(ordered, first, only_a, tuple(only_b), tuple(sorted(skipped)))


def _row(
    key: Key, kind_a: str, a: list[Tensor], kind_b: str, b: list[Tensor], tolerance: float | None
) -> LayerDifference:
    relative, largest = _difference(a, b)
    coarser = max((a[0].dtype, b[0].dtype), key=lambda dtype: torch.finfo(dtype).eps)
    if tolerance is None:
        tolerance = TOLERANCES.get(coarser, 0.5)
    return LayerDifference(
        name=key.name,
        call=key.call,
        kind_a=kind_a,
        kind_b=kind_b,
        shape=tuple(a[0].shape),
        dtype_a=str(a[0].dtype).removeprefix("torch."),
        dtype_b=str(b[0].dtype).removeprefix("torch."),
        relative=relative,
        largest=largest,
        parts=not relative <= tolerance,
    )
