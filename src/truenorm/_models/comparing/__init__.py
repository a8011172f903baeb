"""`truenorm.compare`: where two versions of a model part, layer by layer."""

from .comparison import Comparison, LayerDifference, compare

__all__ = ["Comparison", "LayerDifference", "compare"]
