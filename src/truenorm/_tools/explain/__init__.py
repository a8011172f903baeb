"""One layer on one input, explained: who shares a statistic, by hand, and as a picture."""

from .explanation import Explanation, explain

__all__ = ["Explanation", "explain"]
