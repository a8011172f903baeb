"""tools/measure_threads.py: what it times, and what it calls a loss."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from truenorm._tools.bench.cases import Case

sys.path.append(str(Path(__file__).parent.parent / "tools"))


def test_every_case_on_every_count(monkeypatch: pytest.MonkeyPatch) -> None:
    import measure_threads as tool

    case = Case("LayerNorm", {"normalized_shape": 8}, (4, 8), "")
    monkeypatch.setattr(tool, "CASES", [case])
    before = torch.get_num_threads()
    try:
        times = tool.timed([1, 2], 0.0)
    finally:
        torch.set_num_threads(before)
    names = {f"{case.name}, {dtype}" for dtype in ("float32", "bfloat16")}
    assert set(times) == {(name, count) for name in names for count in (1, 2)}
    for of in times.values():
        assert {who: len(found) for who, found in of.items()} == {"truenorm": 3, "torch": 3}
    found = tool.ratios(times)
    assert found.keys() == names
    assert all(by[count] > 0 for by in found.values() for count in (1, 2))


def test_a_loss_is_a_tenth_below_two_threads() -> None:
    from measure_threads import fallen

    found = {"a": {1: 9.0, 2: 2.0, 16: 1.9}, "b": {1: 1.0, 2: 2.0, 16: 1.7}, "c": {1: 3.0, 2: 1.0}}
    assert fallen(found) == ["b"]
