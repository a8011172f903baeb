"""Which tests must run on one of pytest-xdist's workers: those that share something."""

from __future__ import annotations

from typing import Any

import processes
import pytest


def group_of(item: pytest.Item) -> str:
    """The name of a test's group; "" where it may run on any worker."""
    if item.get_closest_marker("large"):
        return "large"  # two at a time would need twice the memory
    module: Any = getattr(item, "module", None)
    if getattr(module, "processes", None) is processes.processes:
        return "processes"  # they start once and stay, in the worker that started them
    if {"browser", "pooled", "statistics"} & set(vars(module or object())):
        return module.__name__
    # what a fixture makes for a whole file is made once
    fixtures: Any = getattr(item, "_fixtureinfo", None)
    scopes = {d.scope for of in getattr(fixtures, "name2fixturedefs", {}).values() for d in of}
    return module.__name__ if module and "module" in scopes else ""
