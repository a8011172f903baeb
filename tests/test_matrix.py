"""Every option with every other, against the formula: pairs of all of them, in one process.

Over several: `test_matrix_processes.py`. What is refused today stands in `matrix_refused.py`.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from matrix import NONSENSE, VALUES, Case, committed, missing_pairs, nonsense
from matrix_checks import check
from matrix_refused import REFUSED, TOGETHER, entry_of, marked, refused_rules, said

import truenorm

pytestmark = pytest.mark.filterwarnings(r"ignore:`torch\.jit\.:DeprecationWarning")
CASES = dict.fromkeys([*committed(), *TOGETHER])


@pytest.fixture(autouse=True)
def _graphs_anew() -> Iterator[None]:
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("case", marked(c for c in CASES if not c.has("process_group")))
def test_values_gradients_and_statistics(case: Case) -> None:
    with said(case):
        check(case)


def test_every_pair_is_there() -> None:
    cases = committed()
    for case in cases:
        assert all(v in VALUES[n] for n, v in case._asdict().items()), case
        assert nonsense(case.values) is None, case
    assert not missing_pairs(cases), "python tests/matrix.py adds what is missing"
    # a pair that works today is in a case that works
    assert not missing_pairs(cases, [*NONSENSE, *refused_rules()])


def test_every_entry_is_of_a_case() -> None:
    assert {entry_of(case) for case in CASES} >= set(REFUSED)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"renorm": True, "virtual_batch_size": 2}, r"`virtual_batch_size` \(=2\).*choose one"),
        ({"on_single": "running", "process_group": "world"}, r"`on_single` \(='running'\).*batch"),
        ({"on_single": "skip", "process_group": "world"}, r"`on_single` \(='skip'\) is for the"),
    ],
)
def test_what_stays_refused(options: dict[str, object], words: str) -> None:
    for order in (options, dict(reversed(options.items()))):
        with pytest.raises(ValueError, match=words):
            truenorm.BatchNorm1d(5, **order)
