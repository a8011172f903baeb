"""`truenorm.fuse`: norms in one pass with what stands before and after them."""

from .fusing import fuse, unfuse

__all__ = ["fuse", "unfuse"]
