"""How many of torch's own test samples ran, for the line at the end of a test run."""

from __future__ import annotations

from collections import Counter

# (database, check): samples that ran and passed
PASSED: Counter[tuple[str, str]] = Counter()


def passed(database: str, check: str, samples: int) -> None:
    """Record them; a check that met no sample is a defect of the test."""
    assert samples > 0, f"{database} has no sample for {check}"
    PASSED[database, check] += samples
