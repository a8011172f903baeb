"""Masks, activations, residuals and what is given, in the Triton kernels, against float64."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from on_triton import DEVICE, needs_triton, small_tiles, triton_kernels
from tolerances import assert_gradient, assert_output, relative
from triton_calls import (
    ACTIVATIONS,
    BATCH,
    CONSTANT,
    GROUP,
    INSTANCE,
    KINDS,
    LAYER,
    LAYERS,
    PADDING,
    RMS,
    Kind,
    call_of,
    check,
    check_gradients,
    grad_of,
    run,
)

from truenorm import reference
from truenorm._core.call import KEEP, Form
from truenorm._core.geometry import Axes

OPS = torch.ops.truenorm
pytestmark = needs_triton

CUTS: dict[str, Any] = {"whole": nullcontext, "chunks": small_tiles}
BY_CUT = pytest.mark.parametrize("cut", CUTS)
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
KINKS = {1: "relu", 2: "leaky_relu", 8: "relu6"}


def ids(value: Any) -> str:
    return value.name if isinstance(value, Kind) else str(value).removeprefix("torch.")


def by_kind(*kinds: Kind) -> Any:
    return pytest.mark.parametrize("kind", kinds or KINDS, ids=ids)


# every kind under a mask and with a residual, as it lies in memory and as its dtype come in turn
MIXED = [
    (kind, layout, DTYPES[i % 4], 1 + i % 8)
    for i, (kind, layout) in enumerate(
        [(kind, layout) for kind in (BATCH, INSTANCE, GROUP) for layout in
         ("contiguous", "channels_last", "swapped", "sliced")]
        + [(LAYER, "contiguous"), (LAYER, "sliced"), (LAYERS, "rows"), (RMS, "contiguous")]
    )
]  # fmt: skip


@BY_CUT
@pytest.mark.parametrize(("kind", "layout", "dtype", "act"), MIXED, ids=ids)
def test_mask_residual_and_activation(
    kind: Kind, layout: str, dtype: torch.dtype, act: int, cut: str
) -> None:
    call = call_of(kind, dtype, layout, masked=True, residual=True, act=act)
    with CUTS[cut]():
        check(call, grad_of(call, "contiguous" if layout == "channels_last" else layout))


@pytest.mark.parametrize("dtype", [DTYPES[i] for i in (0, 1, 3)], ids=ids)
@pytest.mark.parametrize("act", range(1, len(ACTIVATIONS)))
def test_activations(act: int, dtype: torch.dtype) -> None:
    """Far out on both sides too, where exponentials leave the range of numbers."""
    kind = Kind("instance", INSTANCE.bits, (1, 2, 3, 33), 2)
    call = call_of(kind, dtype, act=act)
    far = torch.tensor([1.0, 25.0]).to(call.weight)
    check(call._replace(weight=far), grad_of(call))


@pytest.mark.parametrize("act", KINKS, ids=KINKS.get)
@by_kind(INSTANCE, LAYER)
def test_the_sign_of_the_output_stands_in_for_the_residual(kind: Kind, act: int) -> None:
    call = call_of(kind, residual=True, act=act)
    grad = grad_of(call)
    y, record = call.norm()
    check_gradients(call, call.backward(grad, record, y=y), call.exact(grad)[2])


@BY_CUT
@by_kind(BATCH, GROUP, LAYER)
@pytest.mark.parametrize("constant", [True, False])
def test_statistics_that_are_given(kind: Kind, constant: bool, cut: str) -> None:
    """In their own dtype; gradients are followed through them, or not. Under a mask and without."""
    for masked in (True, False):
        call = call_of(kind, masked=masked, residual=True, act=5)
        if constant:
            call = call._replace(bits=call.bits | CONSTANT)
        record = call.exact(grad_of(call))[1]
        mean, var = (record[i].float().to(DEVICE) for i in (0, 1))
        call = call._replace(given=(mean + constant * 0.5, var * (1 + constant)))
        with CUTS[cut]():
            check(call, grad_of(call))


@by_kind()
def test_a_record_that_is_not_wanted(kind: Kind) -> None:
    call = call_of(kind)
    y, record = call.norm()
    assert torch.equal(call.statistics(), record)
    with small_tiles():
        wide = call.norm()[0], call.statistics()
    for given, cut, right in ((None, nullcontext, y), (None, small_tiles, wide[0])):
        less = call._replace(bits=0, given=given)
        with cut():
            got, empty = less.norm()
        assert torch.equal(got, right)
        assert empty.shape == (0,)
        assert empty.dtype == torch.float64
    assert relative(wide[1], record) <= 1e-6


@BY_CUT
@by_kind(BATCH, INSTANCE, LAYERS)
def test_two_halves_are_a_whole(kind: Kind, cut: str) -> None:
    """By the statistics and the sums of both: what processes exchange."""
    whole = call_of(kind, masked=True, residual=True, act=6)
    grad = grad_of(whole)
    with CUTS[cut]():
        exact, _, wanted = whole.exact(grad)
        size = kind.shape[0]
        spans = [slice(0, size // 2), slice(size // 2, size)]
        halves, grads = [], [grad[s] for s in spans]
        for s in spans:
            part = kind._replace(shape=whole.x[s].shape)
            halves.append(
                whole._replace(
                    kind=part, x=whole.x[s], mask=whole.mask[s].clone(), residual=whole.residual[s]
                )
            )
        records = [half.statistics() for half in halves]
        given: list[torch.Tensor] = records
        sums: list[torch.Tensor | None] = [None, None]
        if kind is BATCH:
            counts = [r[2] for r in records]
            total = sum(counts)
            mean = sum(r[0] * r[2] for r in records) / total
            var = sum((r[1] + (r[0] - mean) ** 2) * r[2] for r in records) / total
            given = [torch.stack([mean, var, count]) for count in counts]
            halves = [half._replace(given=(mean, var)) for half in halves]
            found = [half.sums(g, r) for half, g, r in zip(halves, grads, given, strict=True)]
            assert found[0].shape == (2, kind.shape[1])
            weighted = (found[0] + found[1]) * whole.weight.double() / total
            sums = [weighted, weighted]
        made = []
        for half, g, r, s in zip(halves, grads, given, sums, strict=True):
            y, kept = half.norm()
            assert relative(kept, r) <= 1e-6
            made.append((y, *half.backward(g, r, s)))
    y, of_x, of_weight, of_bias, of_residual = zip(*made, strict=True)
    assert relative(torch.cat(y).cpu(), exact) <= 1e-6
    parts = torch.cat(of_x), sum(of_weight), sum(of_bias), torch.cat(of_residual)
    check_gradients(whole, parts, wanted)


@BY_CUT
def test_sums_of_samples(cut: str) -> None:
    """Where statistics are a sample's: one for each of its channels."""
    call = call_of(GROUP, layout="channels_last", masked=True, act=4)
    grad = grad_of(call)
    with CUTS[cut]():
        record = call.norm()[1]
        sums = call.sums(grad, record)
        _, of_weight, of_bias, _ = call.backward(grad, record)
    assert sums.shape == (2, 12)
    assert relative(sums.view(2, 2, 6).sum(1), torch.stack([of_weight, of_bias])) <= 1e-6


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@BY_CUT
def test_in_place(layout: str, cut: str) -> None:
    for kind in (BATCH, INSTANCE):
        call = call_of(kind, torch.bfloat16, layout, masked=True, residual=True, act=2)
        with CUTS[cut]():
            y, record = call.norm()
            again = call.norm("norm_")
        assert torch.equal(call.x, y)
        assert torch.equal(again, record)


@by_kind(INSTANCE, GROUP, LAYER)
@BY_CUT
def test_a_sample_among_others(kind: Kind, cut: str) -> None:
    """Has the bits that it has alone."""
    for layout in ("contiguous", "channels_last"):
        call = call_of(kind, layout=layout, masked=True, residual=True, act=7)
        grad = grad_of(call, layout)
        last = slice(kind.shape[0] - 1, None)
        alone = call._replace(
            kind=kind._replace(shape=(1, *kind.shape[1:])), x=call.x[last],
            mask=call.mask[last].clone(), residual=call.residual[last],
        )  # fmt: skip
        with CUTS[cut]():
            (y, record), (one, its) = call.norm(), alone.norm()
            of_x, of_one = call.backward(grad, record)[0], alone.backward(grad[last], its)[0]
        assert torch.equal(y[last], one)
        assert torch.equal(of_x[last], of_one)


@pytest.mark.parametrize("offset", [1e4, 1e7])
def test_large_offsets(offset: float) -> None:
    """Though the first tile of a chunk has nothing that is valid, and so no mean."""
    kind = Kind("instance", INSTANCE.bits, (1, 2, 9, 40), 2)
    call = call_of(kind, offset=offset, masked=True)
    call.mask.view(-1)[:40] = False
    grad = grad_of(call)
    for cut in CUTS.values():
        with cut():
            y, record = call.norm()
        exact, of_record, _ = call.exact(grad)
        assert (y.cpu() - exact).abs().max() <= 5e-6 * exact.abs().max()
        assert relative(record[1].cpu(), of_record[1]) <= 2e-6


def test_nothing_is_valid() -> None:
    """Statistics are zero, and so are gradients, of whatever size eps is."""
    for kind in (BATCH, GROUP, LAYER):
        call = call_of(kind, masked=True, act=1)
        nothing = torch.zeros_like(call.mask)
        for cut in CUTS.values():
            with cut():
                tensors = call.x, call.weight, call.bias, nothing, None, None, None
                y, record = run("norm", *tensors, call.form, 0.0, 0.0, PADDING)
                tensors = call.x, call.x, record, call.weight, call.bias, nothing, None
                found = run("norm_backward", *tensors, None, call.form, 0.0, 0.0)
            assert bool((y == PADDING).all())
            assert not record.any()
            for of in found:
                assert not of.any()


@pytest.mark.parametrize("needs", [1, 2, 4, 8, 9, 14])
def test_what_is_not_needed_is_empty(needs: int) -> None:
    call = call_of(INSTANCE if needs % 2 else LAYER, residual=needs % 4 > 1, act=needs % 5)
    grad = grad_of(call)
    record = call.norm()[1]
    all_of_them = call.backward(grad, record)
    for cut in CUTS.values():
        with cut():
            found = call._replace(bits=needs).backward(grad, record)
        for i, (got, whole) in enumerate(zip(found, all_of_them, strict=True)):
            assert got.dtype == whole.dtype
            if needs & 1 << i:
                assert relative(got, whole) <= 1e-6
            else:
                assert got.shape == (0,)


# ---------------------------------------------------------------- running statistics


@pytest.mark.parametrize("momentum", [0.3, None])
def test_running_statistics(momentum: float | None) -> None:
    """Averaged over samples that have a variance; channels without one stay, and so does all where
    something is not finite and asked for.
    """
    record = torch.rand(3, 12, dtype=torch.float64)
    record[2] = torch.tensor([5, 1, 0, 4, 3, 0, 2, 7, 1, 3, 1, 9])
    mean, var, count = record.view(3, 3, 4)
    there = count > 1
    some = there.sum(0).clamp(min=1)
    seen = [(mean * there).sum(0) / some]
    seen.append(torch.where(there, var * count / (count - 1), 0.0).sum(0) / some)
    for skips, broken in ((False, False), (True, False), (True, True)):
        given = record.clone()
        if broken:
            given[1, 0] = float("inf")
        before = torch.randn(4, dtype=torch.float64), torch.rand(8)[::2]
        running = [t.clone().to(DEVICE) for t in before]
        running[1] = torch.stack([running[1], running[1]], 1)[:, 0]
        batches = torch.tensor(4, device=DEVICE)
        run("move_", *running, batches, given.to(DEVICE), momentum, skips)
        assert batches.item() == 4 + (not broken)
        factor = 1 / 5 if momentum is None else momentum
        for now, was, new in zip(running, before, seen, strict=True):
            moved = torch.where(some * there.any(0) > 0, was + factor * (new - was), was)
            assert torch.allclose(now.cpu(), (was if broken else moved).to(was.dtype), atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_result_that_lies_as_its_input(dtype: torch.dtype) -> None:
    torch.manual_seed(4)
    image, grad = (torch.randn(2, 6, 5, 7).to(dtype).to(DEVICE) for _ in range(2))
    weight = torch.randn(6).to(dtype).to(DEVICE)
    x, g = image.movedim(1, -1), grad.movedim(1, -1)
    form = Form(Axes(1, 1, True, as_given=True), 1e-5).bits(x) | KEEP
    call = weight, None, None, None, None, None
    with triton_kernels():
        y, record = OPS.norm(x, *call, form, 1e-5, 0.0, 0.0)
        found = OPS.norm_backward(g, x, record, *call[:4], None, form | 3, 1e-5, 0.0)
    assert y.stride() == found[0].stride() == x.stride()
    assert_output(y.cpu(), reference.layer_norm(x.cpu(), (6,), weight.cpu()))
    right = reference.layer_norm_backward(g.cpu(), x.cpu(), (6,), weight.cpu())
    for actual, exact in zip(found[:2], right[:2], strict=True):
        assert exact is not None
        assert_gradient(actual.cpu(), exact)
