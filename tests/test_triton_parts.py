"""Weights of their own for parts of the samples, in the Triton kernels."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from on_triton import DEVICE, needs_triton, small_tiles, triton_kernels
from test_modulation import expected, made, pair
from torch import Tensor
from triton_calls import (
    BATCH,
    CONSTANT,
    GROUP,
    INSTANCE,
    LAYER,
    LAYERS,
    ONE_PLUS,
    RMS,
    Call,
    Kind,
    call_of,
    check,
    grad_of,
)

from truenorm._core import modulation

pytestmark = needs_triton

CUTS: dict[str, Any] = {"whole": nullcontext, "chunks": small_tiles}
BY_CUT = pytest.mark.parametrize("cut", CUTS)
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SHAPES = {
    BATCH: (6, 5, 4, 3), INSTANCE: (6, 3, 5, 7), GROUP: (6, 6, 3, 5), LAYER: (6, 4, 21),
    LAYERS: (6, 2, 4, 5), RMS: (6, 19),
}  # fmt: skip
KINDS = [
    kind._replace(shape=shape, groups=3 if kind is INSTANCE else kind.groups)
    for kind, shape in SHAPES.items()
]
MIXED = [
    (kind, layout, parts, DTYPES[i % 4], i % 8)
    for i, (kind, layout, parts) in enumerate(
        [(kind, layout, parts) for kind in KINDS[:3] for layout, parts in
         (("contiguous", 1), ("contiguous", 2), ("channels_last", 3), ("contiguous", 6),
          ("channels_last", 6), ("swapped", 3), ("sliced", 2))]
        + [(kind, layout, parts) for kind in KINDS[3:5] for layout, parts in
           (("contiguous", 1), ("contiguous", 3), ("rows", 6))]
        + [(KINDS[3], "contiguous", 24), (KINDS[4], "sliced", 12), (KINDS[5], "contiguous", 3)]
    )
]  # fmt: skip


def ids(value: Any) -> str:
    return value.name if isinstance(value, Kind) else str(value).removeprefix("torch.")


@BY_CUT
@pytest.mark.parametrize(("kind", "layout", "parts", "dtype", "act"), MIXED, ids=ids)
def test_by_the_formula(
    kind: Kind, layout: str, parts: int, dtype: torch.dtype, act: int, cut: str
) -> None:
    with CUTS[cut]():
        call = call_of(kind, dtype, layout, parts=parts)
        call = call._replace(bits=call.bits | ONE_PLUS * (act % 2))
        check(call, grad_of(call, "contiguous" if layout == "channels_last" else layout))
        more = call_of(kind, dtype, layout, parts=parts, masked=True, residual=True, act=act)
        check(more, grad_of(more))


@BY_CUT
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("constant", [True, False])
def test_statistics_that_are_given(
    constant: bool, layout: str, cut: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a batch, whose parts share them: in the record, of which nothing is left as it was."""
    from truenorm._triton.inputs import Inputs

    empty = Inputs.record
    monkeypatch.setattr(Inputs, "record", lambda call: empty(call).fill_(torch.nan))
    for masked in (True, False):
        call = call_of(KINDS[0], layout=layout, masked=masked, residual=True, act=5, parts=3)
        call = call._replace(bits=call.bits | CONSTANT * constant)
        record = call.exact(grad_of(call))[1]
        mean, var = (record[i].float().to(DEVICE) for i in (0, 1))
        call = call._replace(given=(mean + constant * 0.5, var * (1 + constant)))
        with CUTS[cut]():
            check(call, grad_of(call))


def test_more_blocks_of_rows_than_programs() -> None:
    """Of a part, with few rows in its last tile; and no more programs where there are more parts,
    whose sums would have another order.
    """
    kind = LAYER._replace(shape=(3, 71, 9))
    with small_tiles(tile=64):
        call = call_of(kind, parts=3)
        grad = grad_of(call)
        check(call, grad)
        found = call.backward(grad, call.norm()[1])
        fewer = call._replace(
            kind=kind._replace(shape=(2, 71, 9)), x=call.x[:2], weight=call.weight[:2],
            bias=call.bias[:2],
        )  # fmt: skip
        of = fewer.backward(grad[:2], fewer.norm()[1])
    assert torch.equal(found[1][:2], of[1])
    assert torch.equal(found[2][:2], of[2])


@BY_CUT
@pytest.mark.parametrize("kind", KINDS[1:], ids=ids)
def test_a_part_is_a_call_of_its_own(kind: Kind, cut: str) -> None:
    """Bit for bit, in each of its rows, whatever other parts there are; and so are its weights'
    gradients, which do not depend on how many there are.
    """
    for layout in ("contiguous", "channels_last") if not kind.features else ("contiguous",):
        call = call_of(kind, layout=layout, act=7, residual=True, parts=6)
        grad = grad_of(call, layout)
        with CUTS[cut]():
            y, record = call.norm()
            found = call.backward(grad, record)
            for k in range(6):
                part = slice(k, k + 1)
                alone = Call(
                    kind._replace(shape=call.x[part].shape), call.x[part], call.weight[k],
                    None if call.bias is None else call.bias[k], None, call.residual[part],
                    act=7,
                )  # fmt: skip
                one, its = alone.norm()
                of = alone.backward(grad[part], its)
                assert torch.equal(y[part], one)
                assert torch.equal(found[0][part], of[0])
                assert torch.equal(found[3][part], of[3])
            fewer = call._replace(
                kind=kind._replace(shape=call.x[:2].shape), x=call.x[:2], weight=call.weight[:2],
                bias=None if call.bias is None else call.bias[:2], residual=call.residual[:2],
            )  # fmt: skip
            of = fewer.backward(grad[:2], fewer.norm()[1])
        for i in (1, 2):
            assert torch.equal(found[i][:2], of[i])


@pytest.mark.parametrize(
    "name", ["LayerNorm alone", "LayerNorm, long", "BatchNorm2d, long", "GroupNorm, long"]
)
def test_layers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """scale and shift for each sample, in a layer's call: into the kernels, and nothing after."""
    applied: list[Tensor] = []
    monkeypatch.setattr(modulation, "finished", lambda y, call: applied.append(y))
    layer, x = made(name)
    layer, x = layer.to(DEVICE), x.to(DEVICE).requires_grad_()
    given, against = (
        [t.detach().to(DEVICE).requires_grad_() for t in each] for each in pair(layer, x, "sample")
    )
    wanted = expected(layer, x, *against)
    with triton_kernels():
        y = layer(x, scale=given[0], shift=given[1])
        grad = torch.randn(x.shape).to(DEVICE)
        found = torch.autograd.grad(y, [x, *given], grad)
    assert not applied
    torch.testing.assert_close(y, wanted.float(), rtol=2e-6, atol=4e-6)
    right = torch.autograd.grad(wanted, [x, *against], grad.double())
    for one, other in zip(found, right, strict=True):
        bound = 1e-5 * float(other.abs().max())
        torch.testing.assert_close(one, other.float().view(one.shape), rtol=1e-5, atol=bound)
