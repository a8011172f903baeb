"""The page: template, style, script, chart library and data in one HTML file."""

from __future__ import annotations

import base64
import gzip
import json
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from ...._core import checks
from ...._tools import files
from ...._tools.extras import require
from ..tables import SEVERITIES
from .data import page_data

if TYPE_CHECKING:
    from ..result import Inspection


def _packed(text: str) -> str:
    """Compressed, as text: the page's script unpacks it with the browser's own gzip."""
    return base64.b64encode(gzip.compress(text.encode(), 9, mtime=0)).decode()


def _asset(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def page(inspection: Inspection) -> str:
    """The whole page (needs jinja2 and plotly)."""
    require("jinja2", "plotly", purpose="a report", extra="report")
    from jinja2 import Environment, StrictUndefined
    from plotly.offline import get_plotlyjs

    data = page_data(inspection)
    counts = {s: sum(f.severity == s for f in inspection.findings) for s in SEVERITIES}
    template = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    ).from_string(_asset("page.html"))
    return template.render(
        inspection=inspection,
        data=data,
        counts=counts,
        style=_asset("style.css"),
        script=_asset("script.js"),
        packed_data=_packed(json.dumps(data, separators=(",", ":"), ensure_ascii=False)),
        packed_charts=_packed(get_plotlyjs()),
    )


def save(inspection: Inspection, path: str | Path, *, force: bool = False) -> None:
    """Write the page, whole or not at all."""
    # before the work is done
    checks.check_writable(Path(path), force=force)
    files.write(path, page(inspection), force=force)
