"""Options that meet: the values of each, what makes no sense together, and a cover of all pairs.

`python tests/matrix.py` adds cases to `matrix.txt` until every pair of values that can meet does so
in one of them, and every pair that is not refused in one that is not; those that are there stay as
they are, so that a new value leaves the others alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import combinations, product
from pathlib import Path
from typing import NamedTuple


class Case(NamedTuple):
    """One value of each option; every value's name is its own."""

    layer: str = "BatchNorm"
    rank: str = "2d"
    mask: str = "no mask"
    activation: str = "no activation"
    residual: str = "no residual"
    channel_axis: str = "axis 1"
    policy: str = "no policy"  # or several, joined by " + ": see TOGETHER
    dtype: str = "float32"
    layout: str = "contiguous"
    way: str = "eager"
    modulation: str = "no modulation"

    @property
    def id(self) -> str:
        shown = (v for v in self if not v.startswith("no ") and v != "axis 1")
        return "-".join(v.replace(" ", "_") for v in shown)

    @property
    def policies(self) -> list[str]:
        return self.policy.split(" + ")

    def has(self, policy: str) -> bool:
        return policy in self.policies

    @property
    def values(self) -> list[str]:
        return [*self._replace(policy=""), *self.policies]


MASKS = ("mask", "lengths", "mask per channel")
ACTIVATIONS = ("relu", "gelu", "elu", "silu", "relu6", "leaky_relu", "hardswish")
ROWS = ("LayerNorm", "RMSNorm")
BATCH = ("BatchNorm", "SyncBatchNorm")
INSTANCE = ("InstanceNorm", "InstanceNorm tracking")
VALUES: dict[str, tuple[str, ...]] = {
    "layer": (*BATCH, *INSTANCE, "GroupNorm", *ROWS),
    "rank": ("1d", "2d", "3d"),
    "mask": ("no mask", *MASKS),
    "activation": ("no activation", *ACTIVATIONS),
    "residual": ("no residual", "residual"),
    "channel_axis": ("axis 1", "axis -1"),
    "policy": (
        "no policy",
        "frozen",
        "eval",
        "ghost batches",
        "renorm",
        "on_single",
        "skip_nonfinite",
        "accumulate",
        "process_group",
    ),
    "dtype": ("float64", "float32", "bfloat16", "float16"),
    "layout": ("contiguous", "channels_last", "sliced"),
    "way": (
        "eager",
        "compiled",
        "checkpoint",
        "recompute_outputs",
        "no_grad",
        "functional_call",
        "vmap",
        "second derivatives",
        "jit.trace",
    ),
    "modulation": ("no modulation", "scale by sample", "scale by position"),
}

Several = Sequence[str]
_NO_RUNNING = ("InstanceNorm", "GroupNorm", *ROWS)
_OF_RUNNING = ("frozen", "renorm", "on_single", "skip_nonfinite", "accumulate")
# none of these together, and why
NONSENSE: list[tuple[tuple[Several, ...], str]] = [
    ((ROWS, ("axis -1",)), "it is told by normalized_shape where its values are, not by channels"),
    (
        (ROWS, ("lengths",)),
        "its rows lie in several dimensions: there is no one length to a sample",
    ),
    ((("lengths",), ("2d", "3d")), "a length says where one dimension of positions ends"),
    ((_NO_RUNNING, _OF_RUNNING), "it is about running statistics, which this layer has none of"),
    ((_NO_RUNNING, ("ghost batches",)), "its statistics span no batch to make smaller"),
    ((("InstanceNorm tracking",), ("ghost batches", "renorm")), "its statistics span no batch"),
    (
        (("SyncBatchNorm",), ("ghost batches", "renorm", "on_single")),
        "torch's class for the batch of all processes has no options for small ones: BatchNorm "
        "with a process_group has",
    ),
    ((ROWS, ("process_group",)), "no row spans processes"),
    (
        (("vmap",), ("ghost batches", "renorm", "on_single", "skip_nonfinite", "accumulate")),
        "running statistics do not move under vmap, in torch's layers neither",
    ),
    ((("vmap",), (*BATCH, "InstanceNorm tracking"), ("no policy",)), "the same"),
    ((("vmap",), ("process_group",)), "torch's collectives have no rule for vmap"),
    (
        (("jit.trace",), ("ghost batches", "on_single")),
        "it asks for numbers of values, and a trace keeps the answer of its example",
    ),
    ((("jit.trace",), ("accumulate",)), "a trace holds nothing that Python gathers"),
    ((("jit.trace",), ("process_group",)), "a trace is of operators that one process runs"),
]


def matches(values: Sequence[str], rule: tuple[Several, ...]) -> bool:
    """Whether there is one value of each of the rule's sets."""
    return all(any(value in values for value in several) for several in rule)


Rules = Sequence[tuple[tuple[Several, ...], str]]


def nonsense(values: Sequence[str], rules: Rules = NONSENSE) -> str | None:
    """Why these values, of some of the options or all of them, do not meet."""
    return next((why for rule, why in rules if matches(values, rule)), None)


def _completions(chosen: dict[str, str], names: Sequence[str], rules: Rules) -> Iterator[None]:
    if nonsense(list(chosen.values()), rules):
        return
    if not names:
        yield
        return
    for value in VALUES[names[0]]:
        yield from _completions({**chosen, names[0]: value}, names[1:], rules)


def can_meet(chosen: dict[str, str], rules: Rules) -> bool:
    """Whether a whole case can have these values."""
    rest = [name for name in VALUES if name not in chosen]
    return any(True for _ in _completions(chosen, rest, rules))


Pair = frozenset[str]


def pairs_of(values: Sequence[str]) -> set[Pair]:
    return {frozenset(pair) for pair in combinations(values, 2)}


def possible(rules: Rules = NONSENSE) -> list[Pair]:
    """Every pair of two options' values that can meet, in order."""
    return [
        frozenset(pair)
        for one, other in combinations(VALUES, 2)
        for pair in product(VALUES[one], VALUES[other])
        if can_meet({one: pair[0], other: pair[1]}, rules)
    ]


def _grown(seed: Pair, missing: set[Pair], used: Counter[str], rules: Rules) -> Case:
    """A case with this pair, and value by value with as many other missing ones as can be."""
    chosen = {n: v for n, several in VALUES.items() for v in several if v in seed}
    # those with the most values have the most pairs to meet
    for name in sorted(VALUES, key=lambda n: -len(VALUES[n])):
        if name in chosen:
            continue
        fitting = [v for v in VALUES[name] if can_meet({**chosen, name: v}, rules)]
        chosen[name] = max(
            fitting,
            key=lambda v: (
                sum(frozenset((v, other)) in missing for other in chosen.values()),
                v != "compiled",  # which takes longest
                -used[v],
            ),
        )
    return Case(**chosen)


def missing_pairs(cases: Sequence[Case], rules: Rules = NONSENSE) -> list[Pair]:
    """Those that can meet and do so in none of the cases that the rules leave."""
    met = {p for case in cases if not nonsense(case.values, rules) for p in pairs_of(case.values)}
    return [pair for pair in possible(rules) if pair not in met]


def cover(cases: Sequence[Case], rules: Rules = NONSENSE) -> list[Case]:
    """These cases, and others until every possible pair is in one of them."""
    found = list(cases)
    used = Counter(value for case in found for value in case)
    missing = dict.fromkeys(missing_pairs(cases, rules))
    while missing:
        left = set(missing)
        grown = (_grown(seed, left, used, rules) for seed in list(missing)[:12])
        best = max(grown, key=lambda case: len(pairs_of(case) & left))
        found.append(best)
        used.update(best)
        for pair in pairs_of(best):
            missing.pop(pair, None)
    return found


_LIST = Path(__file__).with_name("matrix.txt")


def committed() -> list[Case]:
    lines = _LIST.read_text(encoding="utf-8").splitlines() if _LIST.exists() else []
    return [Case(*line.split(", ")) for line in lines]


if __name__ == "__main__":
    from matrix_refused import refused_rules

    covering = cover(cover(committed()), [*NONSENSE, *refused_rules()])
    _LIST.write_text("".join(", ".join(case) + "\n" for case in covering), encoding="utf-8")
    print(f"{len(covering)} cases, {len(possible())} pairs")
