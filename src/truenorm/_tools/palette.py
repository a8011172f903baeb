"""Colours that stay apart for colour-blind eyes (Paul Tol's muted scheme), for groups."""

from __future__ import annotations

# ordered so that neighbours differ in lightness as well as in hue
COLORS = (
    "#88CCEE",
    "#CC6677",
    "#44AA99",
    "#DDCC77",
    "#7A6FC0",
    "#117733",
    "#EE9A6A",
    "#AA4499",
    "#999933",
    "#4477AA",
    "#B7A3D9",
    "#882255",
)
INK = "#1F2430"
QUIET = "#6B7280"
FAINT = "#E5E7EB"
PAPER = "#FCFCFA"


def _rgb(color: str) -> tuple[float, float, float]:
    red, green, blue = (int(color[i : i + 2], 16) / 255.0 for i in (1, 3, 5))
    return red, green, blue


def mix(color: str, other: str, share: float) -> str:
    """`color` with `share` of `other` in it."""
    mixed = (
        round(255 * ((1.0 - share) * a + share * b))
        for a, b in zip(_rgb(color), _rgb(other), strict=True)
    )
    return "#" + "".join(f"{part:02X}" for part in mixed)


def ink_on(color: str) -> str:
    """Black or white, whichever is easier to read on this colour."""
    red, green, blue = _rgb(color)
    return INK if 0.299 * red + 0.587 * green + 0.114 * blue > 0.55 else "#FFFFFF"
