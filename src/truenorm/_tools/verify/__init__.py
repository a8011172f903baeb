"""`truenorm verify`: the numerical promises, measured on this machine against float64."""

from .command import add_parser

__all__ = ["add_parser"]
