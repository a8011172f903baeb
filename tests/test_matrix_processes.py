"""Every option with `process_group`, against the formula on two processes' input together."""

from __future__ import annotations

import pytest
from matrix import Case, committed
from matrix_checks import check
from matrix_refused import TOGETHER, marked, said

# the processes that check() asks for are those of this worker
from processes import processes  # noqa: F401

CASES = dict.fromkeys([*committed(), *TOGETHER])


@pytest.mark.parametrize("case", marked(c for c in CASES if c.has("process_group")))
def test_values_gradients_and_statistics(case: Case) -> None:
    with said(case):
        check(case)
