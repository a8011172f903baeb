"""`truenorm.explain`: the arithmetic of one layer on one input, gathered in one object."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..._core import checks
from . import by_hand
from .groups import Group, Sharing
from .layers import Subject, prepare, seeded_input
from .running import Running, running_updates

FORMULAS = {
    "rms": "y = x / sqrt(mean(x²) + eps)",
    "local response": "y = x / (k + alpha / size · Σ x²)^beta",
}
CENTRED = "y = (x − mean) / sqrt(var + eps)"


@dataclass(frozen=True)
class Mistake:
    """What dividing the variance by n − 1 (torch.var's default) in place of n would give."""

    result: Tensor
    largest_error: float
    factor: float


@dataclass(frozen=True)
class Explanation:
    """One layer on one input, worked out. print() it, or read its fields.

    layer: the layer, as its repr; name: its class.
    sentence: which values share a statistic, in words.
    formula, settings: what is computed, and with which eps (or alpha, beta, k).
    x: the input. by_hand, truenorm, torch: the result in float64 by hand, and each layer's own.
    groups: the statistics of every group (of LocalResponseNorm: the windows at the first position).
    code: the loop that computed `by_hand`; worked: one value of it, with the numbers put in.
    differences: the largest absolute difference between each two of the results.
    mistake: what the unbiased variance would give; None where there is no variance, or one value.
    running: what running_mean and running_var become; empty where the layer tracks none.
    """

    layer: str
    name: str
    sentence: str
    formula: str
    settings: dict[str, float]
    x: Tensor
    sharing: Sharing
    groups: list[Group]
    code: str
    worked: list[str]
    by_hand: Tensor
    truenorm: Tensor
    torch: Tensor
    differences: dict[str, float]
    mistake: Mistake | None
    running: list[Running] = field(default_factory=list)

    @property
    def title(self) -> str:
        return f"{self.name}: {self.sentence}"

    def __str__(self) -> str:
        from .text import plain

        return plain(self)

    def save_picture(self, path: str | Path, *, force: bool = False) -> None:
        """Draw which values share a statistic, and the values before and after, as a PNG.

        Errors: ImportError where matplotlib is missing; FileExistsError where the file exists,
        unless `force`; OSError where `path` cannot be written otherwise.
        """
        from ..extras import require

        require("matplotlib", purpose="a picture")
        from .picture import save

        checks.check_writable(Path(path), force=force)
        save(self, path, force=force)

    def to_dict(self, *, limit: int = 1000) -> dict[str, Any]:
        """Everything as JSON's types. Of tensors and groups larger than `limit`, the first."""

        def numbers(t: Tensor) -> Any:
            t = t.detach().cpu().double()
            return t.tolist() if t.numel() <= limit else t.flatten()[:limit].tolist()

        groups = [
            {k: v for k, v in asdict(group).items() if v is not None}
            for group in self.groups[:limit]
        ]
        return {
            "layer": self.layer,
            "title": self.title,
            "formula": self.formula,
            "settings": self.settings,
            "shape": list(self.x.shape),
            "dtype": str(self.x.dtype).removeprefix("torch."),
            "num_statistics": self.sharing.num_statistics,
            "how_many_statistics": self.sharing.how_many_statistics,
            "how_many_values": self.sharing.how_many_values,
            "groups": groups,
            "worked": self.worked,
            "input": numbers(self.x),
            "by_hand": numbers(self.by_hand),
            "truenorm": numbers(self.truenorm),
            "torch": numbers(self.torch),
            "differences": self.differences,
            "unbiased_mistake": self.mistake and self.mistake.largest_error,
            "running": [asdict(r) for r in self.running],
        }


def largest_difference(a: Tensor, b: Tensor) -> float:
    """The largest absolute difference, in float64."""
    return (a.detach().cpu().double() - b.detach().cpu().double()).abs().max().item()


def _loop(subject: Subject) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """The loop that works this layer out: as a function of x, and as it stands in the source."""
    sharing = subject.sharing
    # each loop's own numbers, by name
    settings: dict[str, Any] = dict(subject.settings)
    normalized = len(sharing.shape) - sharing.leading
    if sharing.kind == "batch":
        return partial(by_hand.batch_norm, **settings), by_hand.batch_norm
    if sharing.kind == "instance":
        return partial(by_hand.instance_norm, **settings), by_hand.instance_norm
    if sharing.kind == "group":
        bound = partial(by_hand.group_norm, num_groups=sharing.num_groups, **settings)
        return bound, by_hand.group_norm
    if sharing.kind == "layer":
        return partial(
            by_hand.layer_norm, normalized_dims=normalized, **settings
        ), by_hand.layer_norm
    if sharing.kind == "rms":
        return partial(by_hand.rms_norm, normalized_dims=normalized, **settings), by_hand.rms_norm
    bound = partial(by_hand.local_response_norm, size=sharing.size, **settings)
    return bound, by_hand.local_response_norm


def _worked(subject: Subject, group: Group, x: Tensor, y: Tensor) -> list[str]:
    """y's first value, with the numbers put into the formula."""
    first = (0,) * x.dim()
    value, result = x[first].item(), y[first].item()
    name = f"y[{', '.join('0' * x.dim())}]"
    s = subject.settings
    if group.mean is not None and group.variance is not None:
        minus = f"− {group.mean:.6g}" if group.mean >= 0 else f"+ {-group.mean:.6g}"
        top, below = value - group.mean, (group.variance + s["eps"]) ** 0.5
        lines = [
            f"{name} = (x − mean) / sqrt(var + eps)",
            f"= ({value:.6g} {minus}) / sqrt({group.variance:.6g} + {s['eps']:.3g})",
            f"= {top:.6g} / {below:.6g} = {top / below:.6g}",
        ]
        plain_result = top / below
    elif group.mean_square is not None:
        below = (group.mean_square + s["eps"]) ** 0.5
        lines = [
            f"{name} = x / sqrt(mean(x²) + eps)",
            f"= {value:.6g} / sqrt({group.mean_square:.6g} + {s['eps']:.3g})",
            f"= {value:.6g} / {below:.6g} = {value / below:.6g}",
        ]
        plain_result = value / below
    else:
        total, size = group.sum_of_squares or 0.0, subject.sharing.size
        base = s["k"] + s["alpha"] / size * total
        lines = [
            f"{name} = x / (k + alpha / size · Σ x²)^beta",
            f"= {value:.6g} / ({s['k']:g} + {s['alpha']:g} / {size} · {total:.6g})^{s['beta']:g}",
            f"= {value:.6g} / {base:.8g}^{s['beta']:g} = {value / base ** s['beta']:.6g}",
        ]
        plain_result = value / base ** s["beta"]
    if abs(result - plain_result) > 1e-12 * abs(plain_result):
        w, b = subject.first_weight(), subject.first_bias()
        lines.append(f"· weight + bias = {plain_result:.6g} · {w:.6g} + {b:.6g} = {result:.6g}")
    return lines


def explain(
    layer: torch.nn.Module,
    x_or_shape: Tensor | Sequence[int],
    *,
    picture: str | Path | None = None,
    force: bool = False,
    seed: int = 0,
) -> Explanation:
    """Work one normalization layer out by hand on one input, beside truenorm's result and torch's.

    Layers with running statistics are explained in training mode, with the statistics of this
    input, and with what becomes of the running ones. The layer that is passed in is not changed.

    layer: a normalization layer of torch.nn or truenorm.
    x_or_shape: an input, or a shape, for which one is drawn from `seed`, its samples and channels
        of different means and spreads.
    picture: where to save a PNG of it as well; `force` replaces a file that exists.

    Errors: TypeError for another layer or an input that is not of a real floating dtype; those of
    the layer for an input that does not fit it; FileExistsError for a picture that exists.
    """
    if picture is not None:
        checks.check_writable(Path(picture), force=force)
    if isinstance(x_or_shape, Tensor):
        x = x_or_shape.detach()
    else:
        x = seeded_input(x_or_shape, seed, next(layer.parameters(), None))
    subject, truenorm_layer, torch_layer = prepare(layer, x)
    # truenorm's first: its errors name the argument and the remedy
    ours, theirs = truenorm_layer(x).detach(), torch_layer(x).detach()

    x64 = x.cpu().double()
    loop, source = _loop(subject)

    def result(**correction: int) -> Tensor:
        batched = x64.unsqueeze(0) if subject.unbatched else x64
        y = loop(batched, **correction)
        y = by_hand.scale_and_shift(y, subject.weight, subject.bias, subject.parameter_dim)
        return y.squeeze(0) if subject.unbatched else y

    y = result()
    groups = subject.sharing.statistics(x64)
    mistake, n = None, groups[0].count
    if groups[0].unbiased_variance is not None:
        wrong = result(correction=1)
        mistake = Mistake(wrong, largest_difference(wrong, y), ((n - 1) / n) ** 0.5)
    code = by_hand.body_of(source)
    if subject.weight is not None or subject.bias is not None:
        code += "\ny = y" + " * weight" * (subject.weight is not None)
        code += " + bias" * (subject.bias is not None)
        code += "  # " + ("each channel's" if subject.parameter_dim == 1 else "element by element")
    explanation = Explanation(
        layer=repr(torch_layer),
        name=type(torch_layer).__name__,
        sentence=subject.sharing.sentence,
        formula=FORMULAS.get(subject.sharing.kind, CENTRED),
        settings=subject.settings,
        x=x.cpu(),
        sharing=subject.sharing,
        groups=groups,
        code=code,
        worked=_worked(subject, groups[0], x64, y),
        by_hand=y,
        truenorm=ours.cpu(),
        torch=theirs.cpu(),
        differences={
            "truenorm and by hand": largest_difference(ours, y),
            "torch and by hand": largest_difference(theirs, y),
            "truenorm and torch": largest_difference(ours, theirs),
        },
        mistake=mistake,
        running=running_updates(layer, subject, truenorm_layer, groups),
    )
    if picture is not None:
        explanation.save_picture(picture, force=force)
    return explanation
