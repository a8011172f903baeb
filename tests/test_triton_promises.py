"""The numerical promises on the Triton kernels, whole statistics on chip and cut into chunks."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from cases import AFFINE, LAYOUTS, TRACKING, Case, exact, run
from checking import check_layer
from on_triton import DEVICE, needs_triton, small_tiles, triton_kernels
from promises import bits, same
from tolerances import FLOAT32_FORWARD, FLOAT32_GRADIENT, relative
from torch import Tensor

from truenorm._core import geometry
from truenorm._core.call import Form

pytestmark = needs_triton

CASES = [
    Case("BatchNorm2d", (3,), {}, (4, 3, 5, 7)),
    Case("InstanceNorm2d", (3,), AFFINE, (2, 3, 11, 13)),
    Case("GroupNorm", (3, 6), {}, (2, 6, 5, 13)),
    Case("LayerNorm", ((140,),), {}, (4, 140)),
    Case("RMSNorm", ((140,),), {}, (4, 140)),
]
RESPONSES = [
    Case("LocalResponseNorm", (5,), {"alpha": 0.3}, (2, 9, 7, 3)),
    Case("LocalResponseNorm", (4,), {"alpha": 0.3, "beta": 1.0}, (2, 7, 5)),
]
CUTS: dict[str, Any] = {"whole": nullcontext, "chunks": small_tiles}
BY_CUT = pytest.mark.parametrize("cut", CUTS)
BY_CASE = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)


def layouts(case: Case) -> tuple[str, ...]:
    return ("contiguous", "channels_last") if len(case.shape) > 2 else ("contiguous",)


@BY_CUT
@BY_CASE
@pytest.mark.parametrize("offset", [1e4, 1e6])
def test_offsets(case: Case, offset: float, cut: str) -> None:
    layer = case.build().to(DEVICE)
    x, grad = case.input(offset=offset).to(DEVICE), torch.randn(case.shape).to(DEVICE)
    wanted = exact(layer, x, grad)
    unit = layer.weight.abs().max().item()
    for name in layouts(case):
        with CUTS[cut](), triton_kernels():
            got = run(layer, LAYOUTS[name](x), grad)
        error = (got.output.double() - wanted.output).abs().max().item()
        assert error <= FLOAT32_FORWARD * unit, name
        for part in ("input", "weight", "bias"):
            if offset <= 1e4 and getattr(wanted, part) is not None:
                off = relative(getattr(got, part), getattr(wanted, part))
                assert off <= FLOAT32_GRADIENT, (name, part)


@BY_CUT
@pytest.mark.parametrize("case", CASES[:4], ids=lambda case: case.id)
def test_values_that_start_far_from_their_mean(case: Case, cut: str) -> None:
    """A first value, and a whole first tile, far out: what sums about it would lose."""
    for far in (slice(0, 1), slice(0, 40)):
        layer = case.build().to(DEVICE)
        x = case.input()
        x.view(-1)[far] += 3e5
        with CUTS[cut](), triton_kernels():
            check_layer(layer, x.to(DEVICE))


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Of each row."""
    with triton_kernels():
        form = Form(geometry.layer(1), 0.0).bits(x)
        mean, var, _ = torch.ops.truenorm.statistics(x, None, form)
        return mean, var


def test_a_pivot_far_from_the_mean_of_its_chunk() -> None:
    """Those sums are made again in float64: nothing of float32's rounding is left."""
    x = torch.randn(3, 256).to(DEVICE)
    x[1, :16] += 1e4
    # a chunk of 16 tiles of 16 values
    with small_tiles(forward=0, tile=64, few_steps=16):
        mean, var = moments(x)
    wide = x.double()[1]
    assert relative(mean[1], wide.mean()) <= 1e-14
    assert relative(var[1], wide.var(correction=0)) <= 1e-14


@BY_CUT
def test_neighbours_in_a_tile(cut: str) -> None:
    """What is summed again for one statistic leaves the others of its tile as they were."""
    x = torch.randn(8, 9).to(DEVICE)
    with CUTS[cut]():
        before = moments(x)
        x[3] *= 1e25
        after = moments(x)
    for a, b in zip(before, after, strict=True):
        assert torch.isfinite(b).all()
        assert [i for i in range(8) if a[i] != b[i]] == [3]


@BY_CUT
@BY_CASE
@pytest.mark.parametrize("scale", [1e-30, 1e18, 1e30])
def test_scales(case: Case, scale: float, cut: str) -> None:
    layer = case.build().to(DEVICE)
    layer.eps = 1e-5 * scale * scale
    x = (case.input(torch.float64) * scale).float().to(DEVICE)
    grad = torch.randn(case.shape).to(DEVICE)
    wanted = exact(layer, x, grad)
    for name in layouts(case):
        with CUTS[cut](), triton_kernels():
            got = run(layer, LAYOUTS[name](x), grad)
        for actual, true in zip(got, wanted, strict=True):
            if true is not None:
                assert torch.isfinite(actual).all()
                assert relative(actual, true) <= FLOAT32_GRADIENT


@pytest.mark.parametrize("case", RESPONSES, ids=lambda case: case.id)
@pytest.mark.parametrize("scale", [1e-30, 1e18, 1e30])
def test_local_response_scales(case: Case, scale: float) -> None:
    layer = case.build()
    x = (case.input(torch.float64) * scale).float().to(DEVICE)
    grad = torch.randn(case.shape).to(DEVICE)
    for layer.k in (1.0, 0.0):
        wanted = exact(layer, x, grad)
        for name in layouts(case):
            with triton_kernels():
                got = run(layer, LAYOUTS[name](x), grad)
            assert torch.isfinite(got.output).all()
            # where it is within the range of normal float32 numbers
            if 1e-35 < wanted.output.abs().median() < 1e35:
                assert relative(got.output, wanted.output) <= FLOAT32_FORWARD
            if 1e-35 < wanted.input.abs().median() < 1e35:
                assert torch.isfinite(got.input).all()
                assert relative(got.input, wanted.input) <= FLOAT32_GRADIENT


@BY_CASE
@pytest.mark.parametrize("largest", [65504.0, 1.0, 6e-5])
def test_the_whole_range_of_float16(case: Case, largest: float) -> None:
    layer = case.build().to(DEVICE)
    layer.eps = 1e-5 * min(largest, 1.0) ** 2
    x = torch.empty(case.shape).uniform_(-largest, largest).half().to(DEVICE)
    with triton_kernels():
        check_layer(layer, x, (torch.randn(case.shape) * largest / 8).half().to(DEVICE))


@BY_CUT
@pytest.mark.parametrize("bad", [float("nan"), -float("inf")])
@pytest.mark.parametrize("case", CASES + RESPONSES[:1], ids=lambda case: case.id)
def test_nan_and_inf_stay_in_their_own_statistic(case: Case, bad: float, cut: str) -> None:
    layer = case.build().to(DEVICE)
    # one layout for each cut: a value reaches its statistic, wherever that lies
    for name in layouts(case)[-1 if cut == "chunks" else 0 :][:1]:
        clean, grad = case.input(), torch.randn(case.shape).to(DEVICE)
        spoilt = clean.clone()
        where = tuple(size // 2 for size in case.shape)
        spoilt[where] = bad
        touched = torch.zeros(case.shape, dtype=torch.bool)
        if "Local" in case.layer:
            # the gradient reaches a window of windows
            low, high = max(0, where[1] - layer.size + 1), where[1] + layer.size
            touched[(where[0], slice(low, high), *where[2:])] = True
        elif "Batch" in case.layer:
            touched[:, where[1]] = True
        elif "Instance" in case.layer:
            touched[where[0], where[1]] = True
        elif "Group" in case.layer:
            touched[where[0], 2:4] = True
        else:
            touched[where[0]] = True
        with CUTS[cut](), triton_kernels():
            before = run(layer, LAYOUTS[name](clean).to(DEVICE), grad)
            after = run(layer, LAYOUTS[name](spoilt).to(DEVICE), grad)
        for part in ("output", "input"):
            a, b = getattr(before, part), getattr(after, part)
            assert torch.equal(a[~touched], b[~touched]), part
        if "Local" not in case.layer:
            assert not torch.isfinite(after.output[touched]).all()


@BY_CUT
@pytest.mark.parametrize("case", CASES + RESPONSES[:1], ids=lambda case: case.id)
def test_the_same_bits_every_time(case: Case, cut: str) -> None:
    layer = case.build().to(DEVICE)
    x, grad = case.input().to(DEVICE), torch.randn(case.shape).to(DEVICE)
    with CUTS[cut](), triton_kernels():
        assert same(bits(layer, x, grad), bits(layer, x, grad))


@BY_CUT
@pytest.mark.parametrize("case", CASES[1:] + RESPONSES[:1], ids=lambda case: case.id)
def test_a_sample_does_not_depend_on_the_batch(case: Case, cut: str) -> None:
    layer = case.build().to(DEVICE)
    others = torch.randn(3, *case.shape[1:]) * 1e3
    # values that one kernel computes again in float64, which must not change their neighbours
    others[0] *= 1e25
    for name in layouts(case):
        place = LAYOUTS[name]
        x, grad = case.input()[:1], torch.randn(1, *case.shape[1:])
        with CUTS[cut](), triton_kernels():
            alone = run(layer, place(x).to(DEVICE), place(grad).to(DEVICE))
            many = place(torch.cat([others, x])).to(DEVICE)
            among = run(layer, many, place(torch.cat([others * 0 + 1, grad])).to(DEVICE))
        assert torch.equal(among.output[-1:], alone.output)
        assert torch.equal(among.input[-1:], alone.input)


def misaligned(x: Tensor) -> Tensor:
    """The same values and strides, one value further than where torch puts tensors."""
    room = torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)
    return room[1:].as_strided(x.shape, x.stride(), 1).copy_(x)


@BY_CUT
@pytest.mark.parametrize("case", CASES + RESPONSES[:1], ids=lambda case: case.id)
def test_bits_do_not_depend_on_where_a_tensor_lies(case: Case, cut: str) -> None:
    """A part of a larger tensor: `triton_kernels` minds that kernels see none of it."""
    layer = case.build().to(DEVICE)
    for name in layouts(case):
        x = LAYOUTS[name](case.input().to(DEVICE))
        grad = LAYOUTS[name](torch.randn(case.shape).to(DEVICE))
        moved = [misaligned(t) for t in (x, grad)]
        assert all(t.data_ptr() % 16 and t.stride() == x.stride() for t in moved)
        with CUTS[cut](), triton_kernels():
            assert same(bits(layer, x, grad), bits(layer, *moved))
    for parameter in layer.parameters():
        parameter.data = misaligned(parameter.data)
    with CUTS[cut](), triton_kernels():
        assert same(bits(layer, x, grad), bits(layer, *moved))


@BY_CUT
def test_a_sample_does_not_depend_on_the_batch_in_evaluation(cut: str) -> None:
    case = CASES[0]
    layer = case.build().eval().to(DEVICE)
    for name in layouts(case):
        x = LAYOUTS[name](case.input()).to(DEVICE)
        with CUTS[cut](), triton_kernels():
            together, alone = layer(x), layer(LAYOUTS[name](x[2:3]))
        assert torch.equal(together[2:3], alone)


@BY_CUT
def test_constant_inputs(cut: str) -> None:
    """No variance at all: the output is the bias, and no gradient is NaN."""
    for case in CASES[:4]:
        layer = case.build().to(DEVICE)
        x = torch.full(case.shape, 7.25).to(DEVICE)
        with CUTS[cut](), triton_kernels():
            check_layer(layer, x)


def test_one_value_to_a_statistic() -> None:
    """It is its own mean: nothing is left of it, and nothing of its gradient."""
    layer = Case("LayerNorm", ((1,),), {}, (5, 1)).build().to(DEVICE)
    x, grad = torch.randn(5, 1).to(DEVICE) * 1e4, torch.randn(5, 1).to(DEVICE)
    with triton_kernels():
        got = run(layer, x, grad)
    assert torch.equal(got.output, layer.bias.detach().expand(5, 1))
    assert not got.input.any()


@BY_CUT
def test_statistics_far_from_one(cut: str) -> None:
    """Running statistics take a batch's unbiased variance, at an offset too."""
    case = Case("InstanceNorm2d", (3,), TRACKING, (4, 3, 9, 11))
    layer = case.build().to(DEVICE)
    before = {name: b.double() for name, b in layer.named_buffers()}
    x = case.input(offset=1e4).to(DEVICE)
    with CUTS[cut](), triton_kernels():
        layer(x)
    wide = x.double().flatten(2)
    for name, seen in (("running_mean", wide.mean(2)), ("running_var", wide.var(2))):
        wanted = 0.9 * before[name] + 0.1 * seen.mean(0)
        assert relative(getattr(layer, name), wanted) <= 1e-6
