"""Formulas as outlines in the page: no script, and no font that a reader's machine may lack.

Browsers draw MathML well only where a font for mathematics is installed.
"""

from __future__ import annotations

import html
import re
from typing import Any

from docutils import nodes
from matplotlib import rc_context
from matplotlib.font_manager import FontProperties
from matplotlib.path import Path
from matplotlib.textpath import TextPath

_LETTERS = {Path.MOVETO: "M", Path.LINETO: "L", Path.CURVE3: "Q", Path.CURVE4: "C"}
_SIZE = 100  # units to an em


def svg(tex: str) -> str:
    """One line of TeX, as large as the text around it and in its colour."""
    with rc_context({"mathtext.fontset": "stix"}):
        outline = TextPath((0, 0), f"${tex}$", size=_SIZE, prop=FontProperties())
    # SVG counts downwards
    steps = [
        _LETTERS[code]
        + " ".join(f"{value:.0f}" for value in points * ([1, -1] * (len(points) // 2)))
        if code in _LETTERS
        else "Z"
        for points, code in outline.iter_segments(simplify=False)
    ]
    box = outline.get_extents()
    sizes = f"width: {box.width / _SIZE:.2f}em; vertical-align: {box.ymin / _SIZE:.2f}em"
    return (
        f'<svg role="img" style="{sizes}" '
        f'viewBox="{box.xmin:.0f} {-box.ymax:.0f} {box.width:.0f} {box.height:.0f}">'
        f"<title>{html.escape(tex)}</title>"
        f'<path fill="currentColor" d="{"".join(steps)}"/></svg>'
    )


def _inline(translator: Any, node: nodes.math) -> None:
    translator.body.append(svg(node.astext()))
    raise nodes.SkipNode


def _block(translator: Any, node: nodes.math_block) -> None:
    tex = " ".join(node.astext().split()).replace(r"\frac", r"\dfrac")
    tex = re.sub(r"\\sum_(\w|\{\w+\})", r"\g<0>\,", tex)
    translator.body.append(f'<div class="formula">{svg(tex)}</div>')
    raise nodes.SkipNode


def _language(app: Any, pagename: str, templatename: str, context: Any, doctree: Any) -> None:
    # fonts, hyphens and screen readers go by it
    context["language"] = "zh" if pagename.startswith("zh/") else "en"


def setup(app: Any) -> dict[str, bool]:
    app.add_html_math_renderer("outlines", (_inline, None), (_block, None))
    app.connect("html-page-context", _language)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
