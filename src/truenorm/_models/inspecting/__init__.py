"""`truenorm.inspect`: the normalization layers of a model on real data, and what is wrong."""

from .inspection import inspect
from .result import Inspection
from .tables import Channels, Finding, Histogram, LayerTable

__all__ = ["Channels", "Finding", "Histogram", "Inspection", "LayerTable", "inspect"]
