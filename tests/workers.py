"""Which tests run on one of pytest-xdist's workers: those of a file that shares something.

pytest-xdist's own marks are lost on pytest 9.2, which keeps the names of tests elsewhere; what a
file shares can be read off its text as well.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest

# what a file says, and the group of its tests; "" stands for a group of its own
SHARED = (
    (r"pytest\.mark\.large", "large"),  # two at a time would need twice the memory
    (r"^from processes import", "processes"),  # which start once and stay, in one worker
    (r"^from pooling import", ""),  # statistics of one worker's memory
    (r"^from browser import", ""),  # one browser at a time
    (r'scope="module"', ""),  # made once
)


@cache
def group_of(path: Path) -> str:
    """The name of a file's group; "" where each of its tests may run on any worker."""
    text = path.read_text(encoding="utf-8")
    for said, group in SHARED:
        if re.search(said, text, re.MULTILINE):
            return group or path.stem
    return ""


def scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler.loadscope import LoadScopeScheduling

    class Scheduler(LoadScopeScheduling):
        """Hands out groups, the largest first, and then single tests."""

        def _split_scope(self, nodeid: str) -> str:
            return group_of(config.rootpath / nodeid.partition("::")[0]) or nodeid

    return Scheduler(config, log)
