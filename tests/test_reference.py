"""The oracle itself: numbers checked by hand, torch's layers in float64, and torch's autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import CASES, IDS, Case, eps_of_torch, exact, randomize, run
from tolerances import FLOAT64, relative

from truenorm import reference


def f64(values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def close(actual: torch.Tensor, expected: Any) -> bool:
    return torch.allclose(
        actual, torch.as_tensor(expected, dtype=torch.float64), rtol=FLOAT64, atol=FLOAT64
    )


# Two samples, two channels, two positions; eps is chosen so that every root is a whole number.
X = [[[1.0, 3.0], [0.0, 8.0]], [[5.0, 7.0], [4.0, 4.0]]]


def test_batch_norm_by_hand() -> None:
    # channel 0: 1 3 5 7, mean 4, variance (9 + 1 + 1 + 9) / 4 = 5; with eps 4 divide by 3
    # channel 1: 0 8 4 4, mean 4, variance (16 + 16) / 4 = 8; with eps 4 divide by sqrt(12)
    y = reference.batch_norm(f64(X), weight=f64([3.0, 12.0**0.5]), bias=f64([1.0, -1.0]), eps=4.0)
    assert close(y, [[[-2.0, 0.0], [-5.0, 3.0]], [[2.0, 4.0], [-1.0, -1.0]]])


def test_batch_norm_in_evaluation_by_hand() -> None:
    y = reference.batch_norm(f64(X), f64([1.0, 4.0]), f64([3.0, 15.0]), training=False, eps=1.0)
    assert close(y, [[[0.0, 1.0], [-1.0, 1.0]], [[2.0, 3.0], [0.0, 0.0]]])


def test_instance_norm_by_hand() -> None:
    # each pair lies one (or four, or zero) to either side of its mean
    y = reference.instance_norm(f64(X), f64([2.0, 5.0]), f64([0.0, 1.0]), eps=3.0)
    a = 4.0 / 19.0**0.5 * 5.0
    assert close(y, [[[-1.0, 1.0], [1.0 - a, 1.0 + a]], [[-1.0, 1.0], [1.0, 1.0]]])


def test_group_norm_by_hand() -> None:
    # sample 0: 1 3 0 8, mean 3, variance (4 + 0 + 9 + 25) / 4 = 9.5; sample 1: 5 7 4 4, mean 5, 1.5
    y = reference.group_norm(f64(X), 1, eps=6.5)
    b = 8.0**0.5
    assert close(y, [[[-0.5, 0.0], [-0.75, 1.25]], [[0.0, 2.0 / b], [-1.0 / b, -1.0 / b]]])


def test_layer_norm_by_hand() -> None:
    y = reference.layer_norm(f64([[1.0, 3.0, 5.0, 7.0]]), (4,), f64([3.0, 3.0, 6.0, 0.0]), eps=4.0)
    assert close(y, [[-3.0, -1.0, 2.0, 0.0]])


def test_rms_norm_by_hand() -> None:
    y = reference.rms_norm(f64([[1.0, 7.0], [3.0, 1.0]]), (2,), f64([1.0, 2.0]), eps=0.0)
    assert close(y, [[0.2, 2.8], [3.0 / 5.0**0.5, 2.0 / 5.0**0.5]])


def test_local_response_norm_by_hand() -> None:
    # size 2 looks one channel back: 3, 3² + 4², 4² + 0
    y = reference.local_response_norm(f64([[[3.0], [4.0], [0.0]]]), 2, alpha=2.0, beta=0.5, k=0.0)
    assert close(y[0, :2], [[1.0], [0.8]])
    assert y[0, 2].item() == 0.0


def test_running_update_by_hand() -> None:
    # unbiased variances: 20 / 3 and 32 / 3; per sample: means 2 and 6, 4 and 4, variances 2 2, 32 0
    mean, var = reference.running_update(f64([0.0, 8.0]), f64([1.0, 1.0]), f64(X), 0.75)
    assert close(mean, [3.0, 5.0])
    assert close(var, [0.25 + 5.0, 0.25 + 8.0])
    mean, var = reference.running_update(
        f64([0.0, 8.0]), f64([1.0, 1.0]), f64(X), 0.75, per_sample=True
    )
    assert close(mean, [3.0, 5.0])
    assert close(var, [0.25 + 1.5, 0.25 + 12.0])


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_agrees_with_torch_in_float64(case: Case, training: bool) -> None:
    layer = case.build(torch.nn, dtype=torch.float64).train(training)
    x, grad = case.input(torch.float64, offset=3.0), torch.randn(case.shape, dtype=torch.float64)
    wanted = exact(layer, x, grad)
    got = run(layer, x, grad)
    for name, actual in got._asdict().items():
        expected = getattr(wanted, name)
        if actual is None:
            assert expected is None
        else:
            assert relative(actual, expected) < FLOAT64, name


FORMULAS = {
    "batch": (reference.batch_norm, reference.batch_norm_backward, (None, None)),
    "instance": (reference.instance_norm, reference.instance_norm_backward, ()),
    "group": (reference.group_norm, reference.group_norm_backward, (3,)),
    "layer": (reference.layer_norm, reference.layer_norm_backward, ((5,),)),
}


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("affine", ["none", "weight", "bias", "both"])
def test_backward_is_the_derivative_of_forward(name: str, affine: str) -> None:
    """The forward formula is differentiated numerically: the backward is written by hand."""
    forward, backward, spec = FORMULAS[name]
    x, grad = torch.randn(3, 6, 5, dtype=torch.float64), torch.randn(3, 6, 5, dtype=torch.float64)
    size = 5 if name == "layer" else 6
    weight = randomize(torch.nn.BatchNorm1d(size)).weight.double().detach()
    inputs = {
        "input": x,
        "weight": weight if affine in ("weight", "both") else None,
        "bias": torch.randn(size, dtype=torch.float64) if affine in ("bias", "both") else None,
    }

    def value(**changed: Any) -> torch.Tensor:
        at = {**inputs, **changed}
        return (forward(at["input"], *spec, at["weight"], at["bias"]) * grad).sum()

    found = backward(grad, x, *spec, inputs["weight"], inputs["bias"])
    for argument, at in inputs.items():
        actual = getattr(found, argument)
        if at is None:
            assert actual is None
            continue
        step, direction = 1e-5, torch.randn_like(at)
        slope = value(**{argument: at + step * direction}) - value(
            **{argument: at - step * direction}
        )
        # central differences are true to the square of the step
        assert (actual * direction).sum().item() == pytest.approx(
            slope.item() / (2 * step), rel=1e-6
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_eps_none_of_rms_norm_is_that_of_torch(dtype: torch.dtype) -> None:
    x = (torch.randn(3, 5) * 0.03).to(dtype)
    y = reference.rms_norm(x, (5,))
    assert close(y, F.rms_norm(x.double(), (5,), eps=eps_of_torch(dtype)))
    assert not close(y, F.rms_norm(x.double(), (5,)))


def test_statistics_are_taken_about_the_mean() -> None:
    x = torch.randn(2, 3, 101, dtype=torch.float64)
    assert (reference.instance_norm(x + 2.0**30) - reference.instance_norm(x)).abs().max() < 1e-6
