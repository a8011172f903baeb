"""What `inspect` gives back: to print, to write as JSON, and to save as a page."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .tables import Finding, LayerTable, grouped, median, plain


@dataclass(frozen=True)
class Inspection:
    """What `inspect` found; print it, or save it as a page.

    model: class of the model.
    training: the mode that it was run in.
    batches: how many were run.
    layers: in the order of their first call.
    not_called: normalization layers that these batches did not reach.
    findings: the most severe first.
    """

    model: str
    training: bool
    batches: int
    layers: tuple[LayerTable, ...]
    not_called: tuple[str, ...]
    findings: tuple[Finding, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def to_json(self) -> str:
        """The same as JSON: numbers to six digits, null for those that are not finite."""
        return json.dumps(plain(self.to_dict(), _six), indent=1)

    def save(self, path: str | Path, *, force: bool = False) -> None:
        """Write it as one self-contained HTML page, whole or not at all (needs truenorm[report]).

        Errors: FileExistsError where the file exists, unless `force`; FileNotFoundError where its
        folder does not.
        """
        from .page.writing import save

        save(self, path, force=force)

    def __str__(self) -> str:
        mode = "training" if self.training else "evaluation"
        lines = [
            f"{self.model}: {len(self.layers)} normalization layers, in {mode} mode, "
            f"{self.batches} batch{'es' * (self.batches != 1)}"
        ]
        for first, *others in grouped(self.findings):
            lines.append(f"\n{first.severity.upper()} {first.layer or 'the model'}: {first.text}")
            lines.append(f"    {first.remedy}")
            if others:
                names = ", ".join(f.layer for f in others[:4])
                more = f" and {len(others) - 4} more" * (len(others) > 4)
                lines.append(f"    the like in {names}{more}")
        if not self.findings:
            lines.append("nothing to report")
        width = max(len(row.name) for row in self.layers)
        head = f"{'layer':<{width}}  {'class':<17} {'channels':>8} {'values':>8} {'|mean|/std':>10}"
        lines.append(f"\n{head} {'eps share':>9} {'median KL':>9} {'torch error':>11}")
        for row in self.layers:
            kl = median(row.channels.kl)
            error = "" if row.torch_error is None else f"{row.torch_error:.1e}"
            lines.append(
                f"{row.name:<{width}}  {row.kind:<17} {row.num_channels:>8} "
                f"{row.values_per_statistic:>8} {row.offset:>10.2g} {row.eps_share:>9.1e} "
                f"{'' if kl is None else f'{kl:.1e}':>9} {error:>11}"
            )
        return "\n".join(lines)


def _six(value: float) -> float | None:
    return float(f"{value:.6g}") if math.isfinite(value) else None
