"""`truenorm.fold`: normalization by running statistics, as part of the layer beside it."""

from .folding import FoldedLayer, Folding, KeptLayer, fold

__all__ = ["FoldedLayer", "Folding", "KeptLayer", "fold"]
