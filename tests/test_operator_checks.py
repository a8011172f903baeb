"""Operators called by themselves, with arguments that do not fit: an error, never a crash."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import operator_calls
import pytest
import torch

import truenorm

OPS = torch.ops.truenorm
CALLS = 25  # of each operator; a person with time passes more to operator_calls.py
BACKENDS = ["native", "plain"] if truenorm.info().cpu == "native" else ["plain"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_random_calls(backend: str) -> None:
    script = Path(__file__).with_name("operator_calls.py")
    done = subprocess.run(
        [sys.executable, str(script), "0", str(CALLS)],
        env={**os.environ, "TRUENORM_BACKEND": backend},
        capture_output=True,
        text=True,
        check=False,
    )
    lines = done.stdout.splitlines()
    wrong = [line for line in lines if line.startswith("WRONG")]
    assert not wrong, "\n".join(wrong)
    last = lines[-1] if lines else "nothing"
    assert done.returncode == 0, (
        f"ended with {done.returncode} at {last!r} (operator and seed)\n{done.stderr[-3000:]}"
    )
    assert last == f"{CALLS * len(operator_calls.operators(backend))} calls"


X = torch.arange(24.0).reshape(2, 4, 3)
FOUR, DOUBLES = torch.ones(4), torch.ones(4, dtype=torch.float64)
LAYER, GROUP = 1 << 24, 1 << 32
RUNNING = (torch.zeros(4), torch.ones(4), torch.tensor(3), torch.ones(3, 4).double(), 0.1, False)
NUMBERS = (1e-5, 0.0)  # eps, and the activation's parameter


def norm(x: Any, form: int = 0, **tensors: Any) -> tuple[Any, ...]:
    names = ("weight", "bias", "mask", "residual", "mean", "var")
    return (x, *(tensors.get(name) for name in names), form, *NUMBERS, 0.0)


def pulled(form: int = 7, **tensors: Any) -> tuple[Any, ...]:
    names = ("grad", "x", "record", "weight", "bias", "mask", "residual", "sums")
    default = {"grad": X, "x": X, "record": torch.ones(3, 4).double()}
    return (*({**default, **tensors}.get(name) for name in names), form, *NUMBERS)


# operator, arguments, the words of the error: the same of C++ kernel, plain kernel and shape rule
REFUSED: dict[str, tuple[str, tuple[Any, ...], str]] = {
    "short weight": (
        "norm",
        norm(X, weight=torch.ones(3)),
        "`weight` must have shape (4,), one value per channel of `x` of shape (2, 4, 3), but got "
        "shape (3,): pass one of that shape, or None",
    ),
    "bias of integers": (
        "norm",
        norm(X, bias=FOUR.long()),
        "`bias` has dtype torch.int64: truenorm has no kernel for this dtype; pass bias.float()",
    ),
    "weight of features": (
        "norm",
        norm(X, 2 * LAYER, weight=FOUR),
        "`weight` must have shape (4, 3), one value per channel of `x` of shape (2, 4, 3), but got "
        "shape (4,): pass one of that shape, or None",
    ),
    "groups that do not divide": (
        "norm",
        norm(X, 3 * GROUP),
        "`num_groups` (=3) must be 0, or divide the 4 channels of `x` of shape (2, 4, 3): pass a "
        "divisor of 4",
    ),
    "groups past all memory": (
        "norm",
        norm(X, 2**30 * GROUP, mask=torch.ones(2, 3, dtype=torch.bool)),
        f"`num_groups` (={2**30}) must be 0, or divide the 4 channels of `x` of shape (2, 4, 3): "
        "pass a divisor of 4",
    ),
    "features past the dimensions": (
        "norm",
        norm(X, 4 * LAYER),
        "`feature_dims` (=4) must be from 0 to 3, the dimensions of `x` of shape (2, 4, 3): pass "
        "how many of the last dimensions share a statistic",
    ),
    "features in groups": (
        "norm",
        norm(X, 2 * GROUP | LAYER),
        f"`form` (={2 * GROUP | LAYER}) has a `num_groups` beside `feature_dims` or PER_CHANNEL: "
        "pass 0",
    ),
    "one dimension": (
        "statistics",
        (FOUR, None, 0),
        "`x` of shape (4,) needs the dimensions (N, C, …): add them with x[None]",
    ),
    "nothing": (
        "norm",
        norm(X[:0]),
        "truenorm::norm takes no empty tensor: it has no moments, and `x` has shape (0, 4, 3); "
        "pass a tensor that holds values",
    ),
    "short mean": (
        "norm",
        norm(X, mean=FOUR[:3], var=FOUR),
        "`mean` must hold 4 values, one per statistic of `x` of shape (2, 4, 3), but got shape "
        "(3,): pass what was returned for this x and these axes",
    ),
    "a mean alone": (
        "norm",
        norm(X, mean=FOUR),
        "`mean` is given and `var` is not: pass both, or neither",
    ),
    "short sums": (
        "norm_backward",
        pulled(sums=torch.ones(2, 3).double()),
        "`sums` must hold 2 values for each of the 4 statistics of `x` of shape (2, 4, 3), but got "
        "shape (2, 3): pass two rows, the means of weight · grad · x̂ and of weight · grad",
    ),
    "sums of features": (
        "gradient_sums",
        (*pulled(LAYER, record=torch.ones(3, 8).double())[:7], LAYER, *NUMBERS),
        f"`form` (={LAYER}) has `feature_dims`, whose statistics lie in one process: pass 0",
    ),
    "short record": (
        "norm_backward",
        pulled(record=torch.ones(2, 4).double()),
        "`record` must be a contiguous float64 tensor, of three rows with one value per statistic "
        "of x, but got shape (2, 4) and dtype torch.float64: pass the forward's second result",
    ),
    "gradient of another shape": (
        "norm_backward",
        pulled(grad=X[:, :2]),
        "`grad` must have the shape of `x`, (2, 4, 3), but got shape (2, 2, 3): pass one like x",
    ),
    "a form that there is not": (
        "norm",
        norm(X, -8),
        "`form` (=-8) is negative: pass a sum of its flags",
    ),
    "an output that is not given": (
        "norm_backward",
        pulled(1 << 16 | 17),
        "`needs` (=16) must be less than 16 where `residual` is None: pass the output as residual",
    ),
    "activation that there is not": (
        "norm",
        norm(X, 9 << 16),
        "`act` (=9) must be from 0 to 8 (truenorm: no such activation): see csrc/activation.h",
    ),
    "residual of another dtype": (
        "norm",
        norm(X, 1 << 16, residual=X.double()),
        "`residual` must have the shape of `x`, (2, 4, 3) and its dtype, torch.float32, but got "
        "shape (2, 4, 3) and torch.float64: pass one like x (truenorm: the residual's shape and "
        "dtype must be the input's)",
    ),
    "expanded input in place": (
        "norm_",
        norm(X[:1].expand(2, 4, 3), 1 << 16),
        "`x` of shape (2, 4, 3) is expanded: several of its elements are one in memory, and it is "
        "written to; pass x.contiguous()",
    ),
    "mask of another shape": (
        "norm",
        norm(X, mask=torch.ones(2, 4, dtype=torch.bool)),
        "truenorm: a mask must be a contiguous boolean tensor (N, *positions): `mask` must hold 6 "
        "values for `x` of shape (2, 4, 3), but got shape (2, 4) and dtype torch.bool; pass "
        "mask.bool().contiguous()",
    ),
    "window of nothing": (
        "response",
        (X, 0, 1e-4, 0.75, 1.0),
        "`size` (=0) must be at least 1, the channels of a window",
    ),
    "no running statistics": (
        "move_",
        (FOUR[:0], *RUNNING[1:]),
        "`running_mean` must be of shape (C,), one value per channel, but got shape (0,) and dtype "
        "torch.float32",
    ),
    "running statistics of two dimensions": (
        "move_",
        (torch.zeros(2, 2), *RUNNING[1:]),
        "`running_mean` must be of shape (C,), one value per channel, but got shape (2, 2) and "
        "dtype torch.float32",
    ),
    "expanded running statistics": (
        "move_",
        (RUNNING[0], torch.ones(1).expand(4), *RUNNING[2:]),
        "`running_var` of shape (4,) is expanded: several of its elements are one in memory, and "
        "it is written to; pass running_var.contiguous()",
    ),
    "a count of another dtype": (
        "move_",
        (*RUNNING[:2], torch.tensor(3.0), *RUNNING[3:]),
        "`num_batches_tracked` must be one torch.int64 value, but got shape () and dtype "
        "torch.float32",
    ),
    "no count": (
        "move_",
        (*RUNNING[:2], None, RUNNING[3], None, False),
        "`num_batches_tracked` must be a tensor where `momentum` is None: pass the count of "
        "batches, or a momentum",
    ),
    "a record of no multiple": (
        "move_",
        (*RUNNING[:3], torch.ones(3, 3).double(), 0.1, False),
        "`record` must be a contiguous float64 tensor, whose columns are as many as the channels "
        "of `running_mean`, or as many for each sample, but got shape (3, 3) and dtype "
        "torch.float64: pass the forward's second result",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_the_words(case: str) -> None:
    name, arguments, words = REFUSED[case]
    call = getattr(OPS, name).default
    # the first line, and all of it
    said = rf"^{re.escape(words)}(\n|\Z)"
    with pytest.raises(RuntimeError, match=said):
        call(*arguments)
    on_meta = [
        torch.empty_strided(a.shape, a.stride(), dtype=a.dtype, device="meta")
        if isinstance(a, torch.Tensor)
        else a
        for a in arguments
    ]
    with pytest.raises(RuntimeError, match=said):
        call(*on_meta)


def test_devices_that_differ() -> None:
    with pytest.raises(RuntimeError, match="`weight` is on device meta, but `x` is on cpu"):
        OPS.norm(*norm(X, weight=FOUR.to("meta")))


def test_a_window_of_more_than_all_channels() -> None:
    for x in (X, X.double()):
        expected = OPS.response(x, 9, 1e-1 * 9, 0.75, 1.0)
        huge = 2**40
        made = OPS.response(x, huge, 1e-1 * huge, 0.75, 1.0)
        assert torch.allclose(made, expected)
