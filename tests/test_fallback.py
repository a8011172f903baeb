"""Torch's own operators in the place of kernels: without the library, and on other devices."""

from __future__ import annotations

import copy
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import CASES, LAYOUTS, Case, exact, randomize, run
from tolerances import FLOAT32_BETWEEN, FLOAT64, relative
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import truenorm
from truenorm import reference
from truenorm._core import eager, library, plain, route

EVERY = pytest.mark.parametrize("case", CASES, ids=[case.id for case in CASES])
MODES = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
# of float32 with the channels inside, at any offset: as `truenorm.info()` says
ANY_OFFSET = 3e-5
CUMULATIVE = Case("BatchNorm2d", (5,), {"momentum": None}, (3, 5, 7, 9))


@pytest.fixture(autouse=True)
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As on a machine for which there is no native library."""
    for module in (library, eager):
        monkeypatch.setattr(module, "NATIVE", None)
    monkeypatch.setattr(library, "FORMULA", False)
    yield
    torch.compiler.reset()


@pytest.fixture
def formula(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was left to the formula."""
    asked: list[str] = []

    def watched(name: str) -> Callable[..., Any]:
        original = getattr(plain, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            asked.append(name)
            return original(*args, **kwargs)

        return call

    for name in ("norm", "norm_backward", "response", "response_backward"):
        monkeypatch.setattr(plain, name, watched(name))
    return asked


def by_the_long_way(function: Callable[[], Any]) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(eager, "call", lambda *_: None)
        return function()


def assert_close(got: Any, wanted: Any, bound: float = FLOAT32_BETWEEN) -> None:
    """Outputs by their largest error, gradients by norm, as the suite does elsewhere."""
    for name, one, other in zip(("output", "input", "weight", "bias"), got, wanted, strict=True):
        assert (one is None) == (other is None), name
        if one is None:
            continue
        limit = FLOAT64 if got[0].dtype == torch.float64 and one.dtype == torch.float64 else bound
        if got[0].dtype.itemsize == 2:
            limit = 4 * torch.finfo(got[0].dtype).eps  # torch's sums of half precision
        assert relative(one, other) <= limit, name


@MODES
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("of_grad", ["contiguous", "channels_last"])
@EVERY
def test_the_formula_is_kept(
    case: Case, of_grad: str, layout: str, training: bool, formula: list[str]
) -> None:
    layer = case.build().train(training)
    x = LAYOUTS[layout](case.input(offset=1.5))
    grad = LAYOUTS[of_grad](torch.randn(case.shape))
    wanted = exact(layer, x, grad)
    state = copy.deepcopy(layer.state_dict())
    assert_close(run(layer, x, grad), wanted)
    moved = {k: v.clone() for k, v in layer.state_dict().items()}
    layer.load_state_dict(state)
    assert_close(by_the_long_way(lambda: run(layer, x, grad)), wanted)
    for name, value in layer.state_dict().items():
        torch.testing.assert_close(value, moved[name], rtol=1e-6, atol=1e-6)
    assert not formula


@MODES
@pytest.mark.parametrize("of_parameters", ["same", "float32"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@EVERY
def test_every_dtype(
    case: Case, dtype: torch.dtype, of_parameters: str, training: bool, formula: list[str]
) -> None:
    layer = case.build().train(training)
    if of_parameters == "same":
        layer.to(dtype)
    x, grad = case.input(dtype), torch.randn(case.shape).to(dtype)
    wanted = exact(layer, x, grad)
    state = copy.deepcopy(layer.state_dict())
    for get in (lambda: run(layer, x, grad), lambda: by_the_long_way(lambda: run(layer, x, grad))):
        layer.load_state_dict(state)
        got = get()
        assert got.output.dtype == dtype
        assert_close(got, wanted)
    assert not formula


ALONE: dict[str, tuple[Any, Any]] = {
    "batch_norm": (None, reference.batch_norm_backward),
    "instance_norm": (None, reference.instance_norm_backward),
    "group_norm": (2, reference.group_norm_backward),
    "layer_norm": ((4,), reference.layer_norm_backward),
}


@pytest.mark.parametrize("parameter", ["weight", "bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ALONE)
def test_one_parameter_alone(name: str, dtype: torch.dtype, parameter: str) -> None:
    x, grad = (torch.randn(3, 4, 5, 4).to(dtype) for _ in range(2))
    p = torch.randn(4)
    given: dict[str, Any] = {parameter: p.requires_grad_()}
    if name == "batch_norm":
        given.update(running_mean=None, running_var=None, training=True)
    what = [] if ALONE[name][0] is None else [ALONE[name][0]]
    y = getattr(truenorm.functional, name)(x, *what, **given)
    for other in ("running_mean", "running_var", "training"):
        given.pop(other, None)
    wanted = ALONE[name][1](grad, x, *what, **given)
    (found,) = torch.autograd.grad(y, [p], grad)
    bound = FLOAT32_BETWEEN if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    assert found.dtype == torch.float32
    assert relative(found, getattr(wanted, parameter)) <= bound


# ---------------------------------------------------------------- what torch gets wrong


@pytest.mark.parametrize("of_grad", ["contiguous", "channels_last"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("channels", [2, 8])
def test_an_instance_norm_of_one_sample(channels: int, layout: str, of_grad: str) -> None:
    """torch's own gradients are off by 100% where the output's is channels_last."""
    layer = randomize(truenorm.InstanceNorm2d(channels, affine=True))
    x = LAYOUTS[layout](torch.randn(1, channels, 9, 11))
    grad = LAYOUTS[of_grad](torch.randn(1, channels, 9, 11))
    assert_close(run(layer, x, grad), exact(layer, x, grad))


OFFSETS = [
    Case("BatchNorm2d", (16,), {}, (4, 16, 17, 13)),
    Case("BatchNorm1d", (16,), {}, (301, 16)),
    Case("InstanceNorm2d", (16,), {"affine": True}, (4, 16, 17, 13)),
    Case("InstanceNorm2d", (16,), {"affine": True, "track_running_stats": True}, (4, 16, 17, 13)),
    Case("GroupNorm", (4, 16), {}, (4, 16, 17, 13)),
    Case("GroupNorm", (2, 4), {}, (2, 4, 5, 7, 9)),
    Case("LayerNorm", ((96,),), {}, (7, 9, 96)),
    Case("LayerNorm", ((9, 96),), {}, (7, 9, 96)),
]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "swapped"])
@pytest.mark.parametrize("offset", [0.0, 3.9, 29.0, 1e3, 1e5, 1e7])
@pytest.mark.parametrize("case", OFFSETS, ids=[f"{c.id}-{i}" for i, c in enumerate(OFFSETS)])
def test_any_offset(case: Case, offset: float, layout: str) -> None:
    if layout == "swapped" and len(case.shape) < 3:
        pytest.skip("has no positions")
    layer, theirs = case.pair()
    # each statistic's own, in both directions
    sign = torch.randint(2, (*case.shape[:2], *[1] * (len(case.shape) - 2))) * 2 - 1
    if "Batch" in case.layer:
        sign = sign[:1]
    elif "Layer" in case.layer or "Group" in case.layer:
        sign = sign[:, :1]
    x = torch.randn(case.shape, dtype=torch.float64) + offset * sign
    x = LAYOUTS[layout](x.float())
    grad = torch.randn(case.shape)
    wanted = exact(layer, x, grad)
    for get in (run, lambda *args: by_the_long_way(lambda: run(*args))):
        got = get(layer, x, grad)
        scale = wanted.output.abs().max()
        assert (got.output - wanted.output).abs().max() <= ANY_OFFSET * scale
        for one, other in zip(got[1:], wanted[1:], strict=True):
            assert relative(one, other) <= ANY_OFFSET
    if getattr(layer, "running_mean", None) is not None:
        for _ in range(2):
            theirs.double()(x.double())
        # a few roundings of what the mean moves by
        error = (layer.running_mean - theirs.running_mean).abs().max()
        assert error <= 4e-7 * max(offset, 1.0)
        assert relative(layer.running_var, theirs.running_var) <= 5e-6


# ---------------------------------------------------------------- running statistics


@pytest.mark.parametrize("short", [True, False], ids=["short", "long"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("momentum", [0.1, 1.0, None])
@pytest.mark.parametrize("name", ["BatchNorm2d", "InstanceNorm2d"])
def test_running_statistics_move_as_torchs(
    name: str, momentum: float | None, layout: str, short: bool
) -> None:
    if name == "InstanceNorm2d" and momentum is None:
        momentum = 0.3
    case = Case(name, (5,), {"momentum": momentum, "track_running_stats": True}, (3, 5, 7, 9))
    ours, theirs = case.pair()
    theirs.double()
    for offset in (0.0, 2.0, 1e4):
        x = LAYOUTS[layout](case.input(offset=offset))
        ours(x) if short else by_the_long_way(lambda x=x: ours(x))
        theirs(x.double())
    for key, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[key], value.to(ours.state_dict()[key]))


def test_a_checkpoint_moves_them_once() -> None:
    untracked = Case("BatchNorm2d", (5,), {"track_running_stats": False}, (3, 5, 7, 9))
    for case in (CASES[2], CASES[5], CUMULATIVE, untracked):
        once, twice = case.build(), case.build()
        twice.load_state_dict(once.state_dict())
        x = case.input().requires_grad_()
        once(x)
        checkpoint(twice, x, use_reentrant=False).backward(torch.randn(case.shape))
        for key, value in once.state_dict().items():
            assert torch.equal(twice.state_dict()[key], value), key


def test_what_is_not_finite_is_skipped() -> None:
    layer = randomize(truenorm.BatchNorm2d(5, skip_nonfinite=True))
    before = copy.deepcopy(layer.state_dict())
    x = torch.randn(3, 5, 7, 9)
    x[1, 2, 3, 4] = torch.inf
    layer(x)
    for key, value in before.items():
        assert torch.equal(layer.state_dict()[key], value)


def test_statistics_in_other_dtypes() -> None:
    """Wider than torch takes beside the input, or as narrow as they were asked for."""
    x = torch.randn(6, 5, 7).mul(2).add(1)
    for dtype in (torch.float64, torch.float16):
        layer = randomize(truenorm.BatchNorm1d(5))
        layer.running_mean, layer.running_var = (
            torch.zeros(5, dtype=dtype),
            torch.ones(5, dtype=dtype),
        )
        layer(x)
        mean = 0.1 * x.double().mean((0, 2))
        torch.testing.assert_close(layer.running_mean, mean.to(dtype), rtol=1e-3, atol=1e-3)
        layer.eval()
        assert_output_near(layer(x), layer, x)


def assert_output_near(y: Tensor, layer: Any, x: Tensor) -> None:
    assert relative(y.detach(), exact(layer, x, torch.zeros_like(x)).output) <= FLOAT32_BETWEEN


# ---------------------------------------------------------------- options, and what is left


@pytest.mark.parametrize("name", ["BatchNorm2d", "GroupNorm", "LayerNorm", "RMSNorm"])
def test_activation_residual_scale_and_shift(name: str, formula: list[str]) -> None:
    args = {"GroupNorm": (2, 6), "LayerNorm": ((6,),), "RMSNorm": ((6,),)}.get(name, (6,))
    layer = randomize(getattr(truenorm, name)(*args, activation="silu"))
    x, residual = torch.randn(4, 6, 5, 6), torch.randn(4, 6, 5, 6)
    features = name in ("LayerNorm", "RMSNorm")
    scale, shift = (
        torch.randn(4, 1, 1, 6) if features else torch.randn(4, 6, 1, 1),
        torch.randn((4, 1, 1, 6) if features else (4, 6, 1, 1)),
    )
    normed = exact(layer, x, torch.zeros_like(x)).output
    wanted = F.silu(normed * (1 + scale.double()) + shift.double() + residual.double())
    got = layer(x, residual=residual, scale=scale, shift=shift)
    assert relative(got.detach(), wanted) <= FLOAT32_BETWEEN
    assert relative(layer(x).detach(), F.silu(normed)) <= FLOAT32_BETWEEN
    assert not formula


@EVERY
def test_second_derivatives(case: Case) -> None:
    layer = case.build(dtype=torch.float64)
    x = case.input(torch.float64).requires_grad_()
    assert torch.autograd.gradgradcheck(layer, (x,))


_ASKED = """
import sys, torch, truenorm
from truenorm._core import operators, plain

asked, norm = [], plain.norm
plain.norm = lambda *args: (asked.append(1), norm(*args))[1]
x = torch.randn(3, 5, 7)
truenorm.BatchNorm1d(5)(x)
truenorm.functional.layer_norm(x, (7,))
plainly = len(asked)
truenorm.BatchNorm1d(5)(x, lengths=torch.tensor([7, 2, 5]))
masked = len(asked) - plainly
torch.func.vmap(lambda row: truenorm.functional.layer_norm(row, (7,)))(x)
print(truenorm.info().cpu, plainly, masked, len(asked) > plainly + masked)
"""


@pytest.mark.parametrize(
    ("backend", "said"), [("torch", "torch 0 1 True"), ("plain", "plain 2 1 True")]
)
def test_what_the_formula_serves(backend: str, said: str) -> None:
    """Masks, transforms, and all where it is asked for by name."""
    environment = {**os.environ, "TRUENORM_BACKEND": backend}
    command = [sys.executable, "-c", _ASKED]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    assert done.stdout.strip() == said


@EVERY
def test_under_a_compiler(case: Case, formula: list[str]) -> None:
    layer = case.build()
    x, grad = case.input(), torch.randn(case.shape)
    wanted = exact(layer, x, grad)
    state = copy.deepcopy(layer.state_dict())
    run(layer, x, grad)
    moved = copy.deepcopy(layer.state_dict())
    layer.load_state_dict(state)
    assert_close(run_compiled(layer, x, grad), wanted)
    for name, value in layer.state_dict().items():
        torch.testing.assert_close(value, moved[name], rtol=1e-5, atol=1e-5)
    assert not formula


@pytest.mark.parametrize("case", [CASES[2], CASES[5], CASES[9]], ids=lambda case: case.id)
def test_a_compiled_batch_of_any_size(case: Case) -> None:
    layer = case.build()
    compiled = torch.compile(copy.deepcopy(layer), fullgraph=True, backend="aot_eager")
    for size in (3, 5, 8):
        x = torch.randn(size, *case.shape[1:])
        torch._dynamo.mark_dynamic(x, 0)
        assert relative(compiled(x).detach(), layer(x).detach()) <= FLOAT32_BETWEEN


def test_a_row_alone() -> None:
    for layer in (truenorm.LayerNorm((7,)), truenorm.RMSNorm((7,))):
        x = torch.randn(7)
        y = by_the_long_way(lambda layer=layer, x=x: randomize(layer)(x))
        assert relative(y.detach(), exact(layer, x, torch.zeros(7)).output) <= FLOAT32_BETWEEN


def run_compiled(layer: Any, x: Tensor, grad: Tensor) -> Any:
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = x.detach().requires_grad_()
    y = compiled(x)
    names = [n for n in ("weight", "bias") if getattr(layer, n, None) is not None]
    found = torch.autograd.grad(y, [x, *(getattr(layer, n) for n in names)], grad)
    by_name = dict(zip(names, found[1:], strict=True))
    return y.detach(), found[0], by_name.get("weight"), by_name.get("bias")


def test_a_device_of_another_kind() -> None:
    """Only the choice can be tried here."""
    x = torch.empty(2, 3, device="meta")
    assert not route.lacks_kernel(x)
    assert route.lacks_kernel(torch.empty(2, 3))


WRONG = [
    ("BatchNorm1d", (5,), torch.zeros(3, 7, 7), "5"),
    ("BatchNorm1d", (5,), torch.zeros(1, 5), "more than 1 value"),
    ("BatchNorm1d", (5,), torch.zeros(3, 5, 4, dtype=torch.int64), "int64"),
    ("InstanceNorm2d", (5,), torch.zeros(2, 5, 1, 1), "more than 1"),
    ("GroupNorm", (2, 4), torch.zeros(3, 5, 7), "num_groups|divisible|4"),
    ("LayerNorm", ((5,),), torch.zeros(3, 7), "normalized_shape"),
    ("RMSNorm", ((5,),), torch.zeros(3, 7), "normalized_shape"),
]


@pytest.mark.parametrize(("name", "arguments", "x", "words"), WRONG)
def test_bad_input_is_refused_in_the_same_words(
    name: str, arguments: Any, x: Tensor, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = getattr(truenorm, name)(*arguments)
    state = copy.deepcopy(layer.state_dict())
    said = refusal(layer, x)
    assert re.search(words, said), said
    monkeypatch.setattr(library, "FORMULA", True)
    assert said == refusal(layer, x)
    for key, value in layer.state_dict().items():
        assert torch.equal(value, state[key])


def refusal(layer: Any, x: Tensor) -> str:
    with pytest.raises(
        (ValueError, RuntimeError, TypeError), match=r"input|shape|group"
    ) as refused:
        layer(x)
    return str(refused.value)


def test_info_says_what_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "KERNELLESS", "torch")
    found = truenorm.info()
    assert found.cpu == "torch"
    assert "cpu: torch's own operators (" in str(found)
    assert str(found).endswith(found.without_kernels)
    assert "within 3e-5 of the formula at any offset" in found.without_kernels
    monkeypatch.setattr(library, "FORMULA", True)
    assert not truenorm.info().without_kernels
