"""`truenorm bench`: each layer beside torch's and beside copying the tensor, in turn."""

from .command import add_parser

__all__ = ["add_parser"]
