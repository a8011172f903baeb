"""`truenorm.fuse`: Norm → activation and Norm → add → activation in one pass."""

from .fusing import fuse, unfuse

__all__ = ["fuse", "unfuse"]
