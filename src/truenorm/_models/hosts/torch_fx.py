"""torch.fx.experimental.optimization: `fuse` folds a BatchNorm of truenorm's as one of torch's.

It has no registry; all that it asks of a class it asks in `matches_module_pattern`.
"""

from __future__ import annotations

import functools
from typing import Any

from . import layers


def register(optimization: Any) -> None:
    matches = optimization.matches_module_pattern

    @functools.wraps(matches)
    def matches_ours_too(pattern: Any, node: Any, modules: dict[str, Any]) -> bool:
        if matches(pattern, node, modules):
            return True
        layer: Any = modules.get(node.target) if isinstance(node.target, str) else None
        theirs = layers.TORCHS.get(type(layer))
        if theirs is None or theirs is not pattern[-1] or layers.beyond(layer):
            return False
        # the pattern of the classes that there are
        return bool(matches((*pattern[:-1], type(layer)), node, modules)) and len(node.args) == 1

    optimization.matches_module_pattern = matches_ours_too
