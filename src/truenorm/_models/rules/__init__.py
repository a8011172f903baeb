"""Norms that other libraries write: what each is, the proof of it, and the class that it gets."""

from ..._core.rule import Rule
from .finding import find, swappable
from .register import register_norm

__all__ = ["Rule", "find", "register_norm", "swappable"]
