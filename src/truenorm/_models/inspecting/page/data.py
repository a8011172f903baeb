"""What the page shows, as small as it can be: four digits a number, findings with layer numbers."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from .... import __version__
from ..tables import Histogram, LayerTable, grouped, plain

if TYPE_CHECKING:
    from ..result import Inspection

# more channels of a layer than this are not drawn
MAX_CHANNELS = 4096


def four(value: float) -> float | None:
    """Four significant digits; None for NaN and Inf, which JSON does not know."""
    return float(f"{value:.4g}") if math.isfinite(value) else None


def _bins(h: Histogram | None) -> list[Any] | None:
    return None if h is None else [h.low, h.high, list(h.counts)]


def _layer(t: LayerTable) -> dict[str, Any]:
    channels = {k: v[:MAX_CHANNELS] for k, v in asdict(t.channels).items() if v}
    return {
        "name": t.name,
        "kind": t.kind,
        "shape": t.shape,
        "dtype": t.dtype,
        "channelsLast": t.channels_last,
        "numChannels": t.num_channels,
        "calls": t.calls,
        "eps": t.eps,
        "usesRunning": t.uses_running,
        "values": t.values_per_statistic,
        "offset": t.offset,
        "epsShare": t.eps_share,
        "nan": t.nan,
        "inf": t.inf,
        "zeroWeights": len(t.zero_weights),
        "torchError": t.torch_error,
        "ourError": t.truenorm_error,
        "before": _bins(t.before),
        "after": _bins(t.after),
        "channels": channels,
    }


def page_data(inspection: Inspection) -> dict[str, Any]:
    """Plain dictionaries and lists for the page's script."""
    import torch

    index = {t.name: i for i, t in enumerate(inspection.layers)}
    findings = [
        {
            "severity": group[0].severity,
            "measure": group[0].measure,
            "layers": [index[f.layer] for f in group if f.layer in index],
            "items": [
                {"layer": index.get(f.layer), "text": f.text, "remedy": f.remedy} for f in group
            ],
        }
        for group in grouped(inspection.findings)
    ]
    data = {
        "model": inspection.model,
        "training": inspection.training,
        "batches": inspection.batches,
        "layers": [_layer(t) for t in inspection.layers],
        "notCalled": inspection.not_called,
        "findings": findings,
        "truenorm": __version__,
        "torch": str(torch.__version__),
    }
    made: dict[str, Any] = plain(data, four)
    return made
