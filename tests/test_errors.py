"""Bad input: torch's exception type, argument, value and remedy in the message, no change."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional
from bad_input import FUNCTIONS, LAYERS, NO_TENSOR, V4, V5, Bad, X
from cases import CASES, IDS, Case, randomize
from torch import nn

import truenorm
import truenorm.functional


def raised(call: Callable[[], Any]) -> Exception | None:
    with warnings.catch_warnings():
        # torch's InstanceNorm only warns about a wrong number of channels
        warnings.simplefilter("ignore", UserWarning)
        try:
            call()
        except Exception as error:
            return error
    return None


def assert_refused(ours: Callable[[], Any], theirs: Callable[[], Any], message: str) -> None:
    """truenorm refuses with this message, and with torch's exception type where torch refuses."""
    of_torch = raised(theirs)
    # only truenorm refuses: negative eps, a momentum out of range, a wrong number of channels
    kind = (ValueError, RuntimeError) if of_torch is None else type(of_torch)
    with pytest.raises(kind, match=message) as caught:
        ours()
    # a user never sees a kernel's names
    assert not re.search(r"aten|native|::|kernel", str(caught.value))


@pytest.mark.parametrize("bad", LAYERS, ids=[f"{b.layer}-{b.id}" for b in LAYERS])
def test_layers(bad: Bad) -> None:
    ours, theirs = (getattr(m, bad.layer)(*bad.args, **bad.kwargs) for m in (truenorm, nn))
    if not bad.layer.startswith("Lazy"):
        randomize(ours)
    before = {k: v.clone() for k, v in ours.state_dict().items()} if "Lazy" not in bad.layer else {}
    x = bad.input()
    assert_refused(lambda: ours(x), lambda: theirs(x), bad.message)
    for name, value in before.items():
        assert torch.equal(ours.state_dict()[name], value), name


@pytest.mark.parametrize("value", [[[1.0, 2.0]], None, 3.0, np.zeros((2, 5), np.float32)], ids=type)
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_an_input_that_is_no_tensor(case: Case, value: Any) -> None:
    ours, theirs = case.pair()
    before = {k: v.clone() for k, v in ours.state_dict().items()}
    of_torch = raised(lambda: theirs(value))
    assert of_torch is not None
    # torch fails over a list with whatever comes first, often an AttributeError
    with pytest.raises(TypeError, match=NO_TENSOR.format(type(value).__name__)):
        ours(value)
    assert all(torch.equal(v, before[k]) for k, v in ours.state_dict().items())


@pytest.mark.parametrize(
    "case", [c for c in CASES if c.layer != "LocalResponseNorm"], ids=lambda c: c.id
)
def test_parameters_on_another_device(case: Case) -> None:
    ours, x = case.build(), case.input()
    ours.weight = nn.Parameter(ours.weight.to("meta"))
    before = {k: v.clone() for k, v in ours.state_dict().items()}
    with pytest.raises(
        RuntimeError, match=r"`weight` is on device meta, but `input` is on cpu: .*to\('cpu'\)"
    ):
        ours(x)
    for name, value in before.items():
        if name != "weight":
            assert torch.equal(ours.state_dict()[name], value)


@pytest.mark.parametrize("cls", [truenorm.BatchNorm2d, truenorm.InstanceNorm2d])
@pytest.mark.parametrize("training", [True, False])
def test_statistics_on_another_device(cls: Any, training: bool) -> None:
    layer = cls(5, track_running_stats=True).train(training)
    layer.running_mean = layer.running_mean.to("meta")
    with pytest.raises(
        RuntimeError, match=r"`running_mean` is on device meta, but `input` is on cpu"
    ):
        layer(torch.randn(2, 5, 3, 3))
    assert layer.num_batches_tracked.item() == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            (3, 10),
            r"num_channels \(10\) must be divisible by num_groups \(3\): choose a divisor of 10",
        ),
        ((0, 10), r"`num_groups` must be at least 1, but got 0"),
        ((-2, 10), r"`num_groups` must be at least 1, but got -2"),
    ],
)
def test_groups_of_a_layer(arguments: tuple[int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        truenorm.GroupNorm(*arguments)


@pytest.mark.parametrize(("name", "arguments", "message"), FUNCTIONS)
def test_functions(name: str, arguments: tuple[Any, ...], message: str) -> None:
    copies = [a.clone() if isinstance(a, torch.Tensor) else a for a in arguments]
    assert_refused(
        lambda: getattr(truenorm.functional, name)(*arguments),
        lambda: getattr(torch.nn.functional, name)(*copies),
        message,
    )
    assert (V5 == 1.0).all()
    assert (V4 == 1.0).all()


@pytest.mark.parametrize("name", truenorm.functional.__all__)
def test_functions_of_no_tensor(name: str) -> None:
    extra: tuple[Any, ...] = {"batch_norm": (None, None), "instance_norm": ()}.get(name, (1,))
    if name.startswith("add_"):
        extra = X, (3,)
    with pytest.raises(TypeError, match=NO_TENSOR.format("list")):
        getattr(truenorm.functional, name)([[1.0]], *extra)


@pytest.mark.parametrize(
    "name", ["batch_norm", "instance_norm", "group_norm", "layer_norm", "rms_norm"]
)
def test_a_parameter_that_is_no_tensor(name: str) -> None:
    extra = {"group_norm": (5,), "layer_norm": ((3,),), "rms_norm": ((3,),)}.get(name, (None, None))
    with pytest.raises(TypeError, match=r"`weight` must be a torch.Tensor, but got list"):
        getattr(truenorm.functional, name)(X, *extra, weight=[1.0] * 5)
