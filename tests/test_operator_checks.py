"""Operators called by themselves, with arguments that do not fit: an error, never a crash."""

from __future__ import annotations

import os
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
AXES = (0, 0, True)
RUNNING = (torch.zeros(4), torch.ones(4), torch.tensor(3), X, DOUBLES, DOUBLES, 0.1)
# operator, arguments, the words of the error: the same of C++ kernel, plain kernel and shape rule
REFUSED: dict[str, tuple[str, tuple[Any, ...], str]] = {
    "short weight": (
        "forward",
        (X, torch.ones(3), None, *AXES, 1e-5),
        "`weight` must have shape (4,), one value per channel of `x` of shape (2, 4, 3), but got "
        "shape (3,): pass one of that shape, or None",
    ),
    "bias of integers": (
        "forward",
        (X, None, FOUR.long(), *AXES, 1e-5),
        "`bias` has dtype torch.int64: truenorm has no kernel for this dtype; pass bias.float()",
    ),
    "weight of features": (
        "forward",
        (X, FOUR, None, 1, 2, True, 1e-5),
        "`weight` must have shape (4, 3), one value per channel of `x` of shape (2, 4, 3), but got "
        "shape (4,): pass one of that shape, or None",
    ),
    "groups that do not divide": (
        "forward",
        (X, None, None, 3, 0, True, 1e-5),
        "`num_groups` (=3) must be 0, or divide the 4 channels of `x` of shape (2, 4, 3): pass a "
        "divisor of 4",
    ),
    "groups past all memory": (
        "masked_forward",
        (X, torch.ones(2, 3, dtype=torch.bool), None, None, 2**40, 1e-5, 0.0),
        f"`num_groups` (={2**40}) must be 0, or divide the 4 channels of `x` of shape (2, 4, 3): "
        "pass a divisor of 4",
    ),
    "features past the dimensions": (
        "forward",
        (X, None, None, 1, 4, True, 1e-5),
        "`feature_dims` (=4) must be from 0 to 3, the dimensions of `x` of shape (2, 4, 3): pass "
        "how many of the last dimensions share a statistic",
    ),
    "features in groups": (
        "forward",
        (X, None, None, 2, 1, True, 1e-5),
        "`num_groups` (=2) must be 1 where `feature_dims` (=1) is not 0: pass 1",
    ),
    "one dimension": (
        "moments",
        (FOUR,),
        "`x` of shape (4,) needs the dimensions (N, C, …): add them with x[None]",
    ),
    "nothing": (
        "moments",
        (X[:0],),
        "truenorm::moments takes no empty tensor: it has no moments, and `x` has shape (0, 4, 3); "
        "pass a tensor that holds values",
    ),
    "short mean": (
        "apply",
        (X, FOUR[:3], FOUR, None, None, 1e-5),
        "`mean` must hold 4 values, one per statistic of `x` of shape (2, 4, 3), but got shape "
        "(3,): pass what was returned for this x and these axes",
    ),
    "gradient of another shape": (
        "backward",
        (X[:, :2], X, FOUR, FOUR, None, *AXES, 1e-5, False, 7),
        "`grad` must have the shape of `x`, (2, 4, 3), but got shape (2, 2, 3): pass one like x",
    ),
    "needs that there is not": (
        "backward",
        (X, X, FOUR, FOUR, None, *AXES, 1e-5, False, 8),
        "`needs` (=8) must be from 0 to 7, the sum of 1 (of x), 2 (of weight) and 4 (of bias)",
    ),
    "an output that is not given": (
        "backward_act",
        (X, X, FOUR, FOUR, None, None, None, *AXES, 1e-5, False, 1, 0.0, 17),
        "`needs` (=16) must be less than 16 where `residual` is None: pass the output as residual",
    ),
    "activation that there is not": (
        "apply_act",
        (X, FOUR, FOUR, None, None, None, 1e-5, 9, 0.0),
        "`act` (=9) must be from 0 to 8 (truenorm: no such activation): see csrc/activation.h",
    ),
    "residual of another dtype": (
        "apply_act",
        (X, FOUR, FOUR, None, None, X.double(), 1e-5, 1, 0.0),
        "`residual` must have the shape of `x`, (2, 4, 3) and its dtype, torch.float32, but got "
        "shape (2, 4, 3) and torch.float64: pass one like x (truenorm: the residual's shape and "
        "dtype must be the input's)",
    ),
    "expanded input in place": (
        "apply_act_",
        (X[:1].expand(2, 4, 3), FOUR, FOUR, None, None, None, 1e-5, 1, 0.0),
        "`x` of shape (2, 4, 3) is expanded: several of its elements are one in memory, and it is "
        "written to; pass x.contiguous()",
    ),
    "mask of another shape": (
        "masked_forward",
        (X, torch.ones(2, 4, dtype=torch.bool), None, None, 0, 1e-5, 0.0),
        "truenorm: a mask must be a contiguous boolean tensor (N, *positions): `mask` must hold 6 "
        "values for `x` of shape (2, 4, 3), but got shape (2, 4) and dtype torch.bool; pass "
        "mask.bool().contiguous()",
    ),
    "window of nothing": (
        "local_response_norm",
        (X, 0, 1e-4, 0.75, 1.0),
        "`size` (=0) must be at least 1, the channels of a window",
    ),
    "no running statistics": (
        "update_running_",
        (FOUR[:0], *RUNNING[1:]),
        "`running_mean` must be of shape (C,), one value per channel, but got shape (0,) and dtype "
        "torch.float32",
    ),
    "running statistics of two dimensions": (
        "update_running_",
        (torch.zeros(2, 2), *RUNNING[1:]),
        "`running_mean` must be of shape (C,), one value per channel, but got shape (2, 2) and "
        "dtype torch.float32",
    ),
    "expanded running statistics": (
        "update_running_",
        (RUNNING[0], torch.ones(1).expand(4), *RUNNING[2:]),
        "`running_var` of shape (4,) is expanded: several of its elements are one in memory, and "
        "it is written to; pass running_var.contiguous()",
    ),
    "a count of another dtype": (
        "update_running_",
        (*RUNNING[:2], torch.tensor(3.0), *RUNNING[3:]),
        "`num_batches_tracked` must be one torch.int64 value, but got shape () and dtype "
        "torch.float32",
    ),
    "no count": (
        "update_running_",
        (*RUNNING[:2], None, *RUNNING[3:6], None),
        "`num_batches_tracked` must be a tensor where `momentum` is None: pass the count of "
        "batches, or a momentum",
    ),
    "statistics that are no multiple": (
        "update_running_",
        (*RUNNING[:4], DOUBLES[:3], DOUBLES[:3], 0.1),
        "`mean` must hold 4 values, one per channel of `running_mean`, or as many for each sample "
        "of `x` of shape (2, 4, 3), but got shape (3,): pass what was returned for this x",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_the_words(case: str) -> None:
    name, arguments, words = REFUSED[case]
    call = getattr(OPS, name).default
    with pytest.raises(RuntimeError) as error:
        call(*arguments)
    assert str(error.value).split("\n")[0] == words
    on_meta = [
        torch.empty_strided(a.shape, a.stride(), dtype=a.dtype, device="meta")
        if isinstance(a, torch.Tensor)
        else a
        for a in arguments
    ]
    with pytest.raises(RuntimeError) as error:
        call(*on_meta)
    assert str(error.value).split("\n")[0] == words


def test_devices_that_differ() -> None:
    with pytest.raises(RuntimeError, match="`weight` is on device meta, but `x` is on cpu"):
        OPS.forward(X, FOUR.to("meta"), None, *AXES, 1e-5)


def test_a_window_of_more_than_all_channels() -> None:
    for x in (X, X.double()):
        expected = OPS.local_response_norm(x, 9, 1e-1 * 9, 0.75, 1.0)
        huge = 2**40
        made = OPS.local_response_norm(x, huge, 1e-1 * huge, 0.75, 1.0)
        assert torch.allclose(made, expected)
