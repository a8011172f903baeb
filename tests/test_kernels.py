"""The six numerical promises, on every layer, path and layout of the CPU kernels.

`make sanitize` runs this file under AddressSanitizer and UndefinedBehaviorSanitizer;
`make mutate` breaks the kernels on purpose, one place at a time, and expects it to fail.
"""

from __future__ import annotations

import pytest
import torch
from cases import Case, exact, run
from checking import check_layer, same_layout
from promises import (
    ALONE,
    CASES,
    IDS,
    LARGE,
    LARGEST,
    NOT_FINITE,
    OFFSETS,
    SCALES,
    SHAPES,
    alone_and_among,
    at_offset,
    at_scale,
    bits,
    layouts,
    misaligned,
    not_finite,
    over_float16,
    same,
    threads,
    trainings,
)
from tolerances import FLOAT32_FORWARD, FLOAT32_GRADIENT, relative

import truenorm

only_native = pytest.mark.skipif(
    truenorm.info().cpu != "native", reason="a promise of the native kernels, not of plain ops"
)

ALL = pytest.mark.parametrize("case", CASES, ids=IDS)


# ------------------------------------------------------------- 1. true at any offset, every layout


@ALL
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_every_mix_of_memory_formats(case: Case, dtype: torch.dtype) -> None:
    for training in trainings(case):
        layer = case.build(dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        layer.train(training)
        x, grad = case.input(dtype), torch.randn(case.shape, dtype=torch.float64).to(dtype)
        wanted = exact(layer, x, grad)
        for x_name, place_x in layouts(case.shape).items():
            for grad_name, place_grad in layouts(case.shape).items():
                # the dtypes share the code that lays tensors out: all mixes for one of them
                if dtype == torch.float32 or x_name == grad_name:
                    check_layer(layer, place_x(x), place_grad(grad), wanted)


@ALL
@pytest.mark.parametrize("offset", OFFSETS)
def test_offsets(case: Case, offset: float) -> None:
    _, layer, x, grad = at_offset(case, offset)
    for training in trainings(case):
        layer.train(training)
        wanted = exact(layer, x, grad)
        # in units of the output's standard deviation, which the largest weight sets; where nothing
        # is subtracted and no weight applied, of the values themselves
        weights = getattr(layer, "weight", None)
        unit = (wanted.output if weights is None else weights).abs().max().item()
        for name, place in layouts(case.shape).items():
            got = run(layer, place(x), grad)
            error = (got.output.double() - wanted.output).abs().max().item()
            assert error <= FLOAT32_FORWARD * unit, name
            for part in ("input", "weight", "bias"):
                if offset <= 1e4 and getattr(wanted, part) is not None:
                    off = relative(getattr(got, part), getattr(wanted, part))
                    assert off <= FLOAT32_GRADIENT, (name, part)


@ALL
def test_the_output_keeps_the_memory_format(case: Case) -> None:
    layer = case.build()
    for name, place in layouts(case.shape).items():
        x = place(case.input()).requires_grad_()
        y = layer(x)
        (grad,) = torch.autograd.grad(y, x, torch.randn(case.shape))
        trailing = case in SHAPES["trailing"]
        moved = name in ("sliced", "samples_inside") or (trailing and name != "contiguous")
        assert moved or (same_layout(y, x) and same_layout(grad, x)), name


# ------------------------------------------------------------- 2. finite in, finite out


@pytest.mark.parametrize("case", [c for c in CASES if "Local" not in c.layer])
@pytest.mark.parametrize("scale", SCALES)
def test_scales(case: Case, scale: float) -> None:
    _, layer, x, grad = at_scale(case, scale)
    wanted = exact(layer, x, grad)
    for place in layouts(case.shape).values():
        got = run(layer, place(x), grad)
        for actual, true in zip(got, wanted, strict=True):
            if true is not None:
                assert torch.isfinite(actual).all()
                assert relative(actual, true) <= FLOAT32_GRADIENT


@pytest.mark.parametrize("case", SHAPES["response"], ids=lambda c: c.id)
@pytest.mark.parametrize("scale", [1e-30, 1e18, 1e30])
def test_local_response_scales(case: Case, scale: float) -> None:
    # at 1e30 the result itself is 1e30 / 1e60^0.75: small, but never an infinity on the way
    _, layer, x, grad = at_scale(case, scale)
    for layer.k in (1.0, 0.0):
        wanted = exact(layer, x, grad)
        for name in ("contiguous", "channels_last"):
            got = run(layer, layouts(case.shape)[name](x), grad)
            assert torch.isfinite(got.output).all()
            assert relative(got.output, wanted.output) <= FLOAT32_FORWARD
            # where it is within the range of normal float32 numbers
            if 1e-35 < wanted.input.abs().median() < 1e35:
                assert torch.isfinite(got.input).all()
                assert relative(got.input, wanted.input) <= FLOAT32_GRADIENT


@pytest.mark.parametrize("case", [c for c in CASES if "Local" not in c.layer])
@pytest.mark.parametrize("largest", LARGEST)
def test_the_whole_range_of_float16(case: Case, largest: float) -> None:
    _, layer, x, grad = over_float16(case, largest)
    check_layer(layer, x, grad)


# ------------------------------------------------------------- 4. bit for bit the same


@only_native
# float64 shows the last bit of a sum, which a float32 output would round away
@ALL
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_same_bits_for_any_number_of_threads(case: Case, dtype: torch.dtype) -> None:
    layer = case.build(dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    for place in layouts(case.shape).values():
        x, grad = place(case.input(dtype)), place(torch.randn(case.shape).to(dtype))
        with threads(1):
            expected = bits(layer, x, grad)
        for count in (2, 3):
            with threads(count):
                assert same(bits(layer, x, grad), expected), count


@only_native
@ALL
def test_the_same_bits_every_time_and_at_every_alignment(case: Case) -> None:
    layer = case.build()
    x, grad = case.input(), torch.randn(case.shape)
    expected = bits(layer, x, grad)
    for elsewhere in misaligned(x):
        assert same(bits(layer, elsewhere, grad), expected)


@only_native
@pytest.mark.parametrize("case", ALONE, ids=lambda c: c.id)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_sample_does_not_depend_on_the_batch(case: Case, dtype: torch.dtype) -> None:
    for one, all_of_it in alone_and_among(case, dtype):
        alone = run(one.layer, one.x, one.grad)
        among = run(all_of_it.layer, all_of_it.x, all_of_it.grad)
        assert torch.equal(among.output[-1:], alone.output)
        assert torch.equal(among.input[-1:], alone.input)


@only_native
@pytest.mark.parametrize("kwargs", [{"num_groups": 70}, {"num_groups": 7}])
def test_a_sample_among_so_few_that_each_is_cut_for_two_threads(kwargs: dict[str, int]) -> None:
    # three samples leave one of two threads idle, so that they are not a task each
    layer = truenorm.GroupNorm(num_channels=70, **kwargs)
    place = layouts((3, 70, 41, 40))["channels_last"]
    x, grad = torch.randn(3, 70, 41, 40), torch.randn(3, 70, 41, 40)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        alone = run(layer, place(x[2:]), place(grad[2:]))
        among = run(layer, place(x), place(grad))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(among.output[2:], alone.output)
    assert torch.equal(among.input[2:], alone.input)


@only_native
@pytest.mark.parametrize("case", SHAPES["batch"], ids=lambda c: c.id)
def test_a_sample_does_not_depend_on_the_batch_in_evaluation(case: Case) -> None:
    layer = case.build().eval()
    others = torch.randn(6, *case.shape[1:])
    for place in layouts(case.shape).values():
        x = case.input()[:1]
        assert torch.equal(layer(place(torch.cat([others, x])))[-1:], layer(place(x)))


@only_native
@pytest.mark.parametrize("case", LARGE, ids=lambda c: c.id)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits_past_the_caches(case: Case, dtype: torch.dtype) -> None:
    layer = case.build().eval()
    copies = 4 // dtype.itemsize
    shape = (case.shape[0] * copies, *case.shape[1:])
    for name in ("contiguous", "channels_last"):
        place = layouts(case.shape)[name] if len(shape) > 2 else torch.Tensor.contiguous
        x, grad = place(torch.randn(shape).to(dtype)), place(torch.randn(shape).to(dtype))
        assert x.nbytes >= 2**25
        large, parts = run(layer, x, grad), []
        for few, of_few in zip(x.chunk(3), grad.chunk(3), strict=True):
            assert few.nbytes < 2**25
            parts.append(run(layer, few, of_few))
        assert torch.equal(large.output, torch.cat([part.output for part in parts]))
        assert torch.equal(large.input, torch.cat([part.input for part in parts]))


# ------------------------------------------------------------- 5. NaN and Inf stay where they are


@pytest.mark.parametrize("bad", NOT_FINITE)
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_nan_and_inf_stay_in_their_own_statistic(case: Case, bad: float) -> None:
    axes = {"Batch": (1,), "Insta": (0, 1), "Group": (0, 1), "Layer": (0,), "RMSNo": (0,)}
    for place in layouts(case.shape).values():
        (_, layer, spoilt, grad), clean, where = not_finite(case, bad)
        # which values may differ: those that share the statistic, or the window
        touched = torch.zeros(case.shape, dtype=torch.bool)
        if "Local" in case.layer:
            # the gradient reaches a window of windows
            low, high = max(0, where[1] - layer.size + 1), where[1] + layer.size
            touched[(where[0], slice(low, high), *where[2:])] = True
        elif "Group" in case.layer:
            wide = case.shape[1] // layer.num_groups
            first = where[1] // wide * wide
            touched[where[0], first : first + wide] = True
        elif case in SHAPES["trailing"]:
            touched[where[: len(case.shape) - len(layer.normalized_shape)]] = True
        else:
            index = [slice(None)] * len(case.shape)
            for axis in axes[case.layer[:5]]:
                index[axis] = where[axis]  # type: ignore[call-overload]
            touched[tuple(index)] = True
        before, after = run(layer, place(clean), grad), run(layer, place(spoilt), grad)
        for name in ("output", "input"):
            a, b = getattr(before, name), getattr(after, name)
            assert torch.equal(a[~touched], b[~touched]), name
        if "Local" not in case.layer:
            assert not torch.isfinite(after.output[touched]).all()
