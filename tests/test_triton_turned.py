"""Rows that lie elsewhere than one after the other, read by the Triton kernels where they are:
channels outside of their positions, as in a contiguous image, and heads of an attention.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from on_triton import DEVICE, needs_triton, small_tiles, triton_kernels
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton_calls import KEEP, UNCENTRED, Call, Kind, call_of, check, grad_of

import truenorm
from truenorm._core import geometry
from truenorm._core.call import AS_GIVEN

pytestmark = needs_triton

CUTS: dict[str, Any] = {"whole": nullcontext, "chunks": small_tiles}
BY_CUT = pytest.mark.parametrize("cut", CUTS)
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# seen with the channels last; several blocks of positions, and of channels, odd ones
IMAGES = [
    Kind("image", 1 << 24, (2, 3, 7, 5), 1, 1),
    Kind("sequence", 1 << 24, (2, 11, 17), 1, 1),
    Kind("rms of one image", UNCENTRED | 1 << 24, (1, 3, 6, 20), 1, 1),
    Kind("two dimensions", 2 << 24, (2, 16, 3, 6), 1, 2),
    Kind("volume", 1 << 24, (2, 2, 3, 4, 9), 1, 1),
]
HEADS = [
    Kind("heads", 1 << 24, (2, 3, 5, 16), 1, 1),
    Kind("heads of rms", UNCENTRED | 1 << 24, (2, 4, 3, 32), 1, 1),
]


def ids(value: Any) -> str:
    return value.name if isinstance(value, Kind) else str(value).removeprefix("torch.")


def turned(t: Tensor, features: int = 1) -> Tensor:
    """(N, *positions, *features) in the memory of (N, *features, *positions)."""
    last = range(t.dim() - features, t.dim())
    order = [0, *last, *range(1, t.dim() - features)]
    return t.permute(order).contiguous().permute([order.index(d) for d in range(t.dim())])


def queries(t: Tensor) -> Tensor:
    """(B, H, S, D) as a part of what one product gave, (B, S, 3, H, D)."""
    b, h, s, d = t.shape
    room = torch.full((b, s, 3, h, d), float("nan"), dtype=t.dtype, device=t.device)
    view = room[:, :, 1].transpose(1, 2)
    view.copy_(t)
    return view


def heads_inside(t: Tensor) -> Tensor:
    """(B, S, H, D) as such a part."""
    return queries(t.transpose(1, 2)).transpose(1, 2)


class _Copies(TorchDispatchMode):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.made = size, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        copies = torch.ops.aten.copy_.default, torch.ops.aten.clone.default
        if func in copies and args[0].is_floating_point():  # the interpreter copies bytes
            self.made += args[0].numel() == self.size
        return func(*args, **(kwargs or {}))


@contextmanager
def no_copies(size: int, number: int = 0) -> Iterator[None]:
    """Of tensors of so many values."""
    with _Copies(size) as mode:
        yield
    assert mode.made == number


def check_in_place(call: Call, grad: Tensor, copies: int = 0) -> None:
    """Right, as it promises to lie, and read where it is."""
    check(call, grad)
    strides = geometry.kept_strides(call.x, geometry.Axes(1, call.kind.features, True,
                                                          bool(call.bits & AS_GIVEN)))  # fmt: skip
    with no_copies(call.x.numel(), copies):
        y, record = call.norm()
        of_x = call.backward(grad, record)[0]
    assert y.stride() == of_x.stride() == strides


@BY_CUT
@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("kind", IMAGES, ids=ids)
def test_images_that_stay_as_they_are(kind: Kind, dtype: torch.dtype, cut: str) -> None:
    call = call_of(kind, dtype, masked=dtype.itemsize == 2, offset=2.0)
    call = call._replace(x=turned(call.x, kind.features), bits=KEEP | 7 | AS_GIVEN)
    with CUTS[cut]():
        check_in_place(call, turned(grad_of(call), kind.features))
        if kind is IMAGES[0]:  # a gradient that lies in rows is copied
            check_in_place(call, grad_of(call), 1)


@BY_CUT
@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("kind", IMAGES, ids=ids)
def test_images_whose_results_lie_in_rows(kind: Kind, dtype: torch.dtype, cut: str) -> None:
    """Read where they are if a row fits on chip."""
    more = dtype.itemsize > 2
    call = call_of(kind, dtype, masked=more, residual=more, act=3 * more, offset=2.0)
    call = call._replace(x=turned(call.x, kind.features), bits=KEEP | (15 if more else 7))
    with CUTS[cut]():
        check_in_place(call, grad_of(call), 2 if cut == "chunks" else 0)


@BY_CUT
@pytest.mark.parametrize("flags", [0, AS_GIVEN], ids=["rows", "as given"])
def test_a_sample_among_others(flags: int, cut: str) -> None:
    """Has the bits that it has alone."""
    for kind in IMAGES[:2]:
        call = call_of(kind)._replace(bits=KEEP | 7 | flags)
        call = call._replace(x=turned(call.x))
        grad = turned(grad_of(call))
        last = slice(kind.shape[0] - 1, None)
        alone = call._replace(kind=kind._replace(shape=(1, *kind.shape[1:])), x=call.x[last])
        with CUTS[cut]():
            (y, record), (one, its) = call.norm(), alone.norm()
            of_x, of_one = call.backward(grad, record)[0], alone.backward(grad[last], its)[0]
        assert torch.equal(y[last], one)
        assert torch.equal(of_x[last], of_one)


def test_rows_that_have_the_batch_inside_are_copied() -> None:
    """A row's neighbours would be other samples, and its bits theirs."""
    kind = Kind("batch inside", 1 << 24, (4, 6, 5), 1, 1)
    call = call_of(kind)
    inside = call.x.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    for bits in (KEEP | 7, KEEP | 7 | AS_GIVEN):
        of = call._replace(x=inside, bits=bits)
        check(of, grad_of(of))
        with no_copies(inside.numel(), 2 if bits & AS_GIVEN else 1):
            y, _ = of.norm()
        assert torch.equal(y, call.norm()[0])


@BY_CUT
@pytest.mark.parametrize("lay", [queries, heads_inside])
@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("kind", HEADS, ids=ids)
def test_heads(kind: Kind, dtype: torch.dtype, lay: Callable[..., Tensor], cut: str) -> None:
    """Bits of rows that follow one another, of which no copy is made where they fit on chip."""
    call = call_of(kind, dtype, residual=True, act=5, offset=0.5)
    apart = call._replace(x=lay(call.x))
    grad = grad_of(call)
    with CUTS[cut]():
        check_in_place(apart, grad, 2 if cut == "chunks" else 0)
        (y, record), (right, its) = apart.norm(), call.norm()
        assert torch.equal(y, right)
        assert torch.equal(record, its)
        found, wanted = apart.backward(grad, record), call.backward(grad, record)
        assert all(map(torch.equal, found, wanted))


def test_rows_that_no_pattern_has_are_copied() -> None:
    """Features that 16 does not divide, or steps; features apart; more than three dimensions."""
    for shape, lay in (
        ((2, 3, 5, 20), queries),
        ((2, 3, 16), lambda t: torch.cat([t, t[..., :8]], -1)[..., :16]),
        ((2, 3, 5, 16), lambda t: torch.stack([t, t], -1)[..., 0]),
        ((2, 2, 2, 2, 16), lambda t: t.repeat(1, 2, 2, 2, 1)[:, :2, :2, :2]),
    ):
        call = call_of(Kind("rows", 1 << 24, shape, 1, 1))
        right = call.norm()[0]
        apart = lay(call.x)
        apart.copy_(call.x)
        call = call._replace(x=apart)
        check(call, grad_of(call))
        with no_copies(apart.numel(), 1):
            y, _ = call.norm()
        assert torch.equal(y, right)


def test_heads_that_have_weights_by_part() -> None:
    call = call_of(HEADS[0], parts=2)
    apart = call._replace(x=queries(call.x))
    grad = grad_of(call)
    check(apart, grad)
    with no_copies(call.x.numel()):
        y, record = apart.norm()
    assert torch.equal(y, call.norm()[0])
    found, wanted = apart.backward(grad, record), call.backward(grad, record)
    assert all(map(torch.equal, found[:3], wanted[:3]))


def test_in_place_and_given() -> None:
    for kind, lay in ((IMAGES[0], turned), (HEADS[0], queries)):
        call = call_of(kind)
        y, record = call.norm()
        for flags in (0, AS_GIVEN):
            placed = call._replace(x=lay(call.x), bits=call.bits | flags)
            # float32 sums, which may have another order
            torch.testing.assert_close(placed.statistics().float(), record.float())
            given = placed._replace(given=(record[0], record[1]))
            torch.testing.assert_close(given.norm()[0], y)
            placed.norm("norm_")
            torch.testing.assert_close(placed.x, y)


def test_layers() -> None:
    """In torch's layouts, by autograd."""
    layer = truenorm.LayerNorm(6).to(DEVICE)
    torch.nn.init.normal_(layer.weight)
    image, grad = (torch.randn(2, 6, 5, 7).to(DEVICE) for _ in range(2))
    for memory in (torch.contiguous_format, torch.channels_last):
        x = image.contiguous(memory_format=memory).requires_grad_()
        wide = x.detach().double().requires_grad_()
        weight, bias = layer.weight.double(), layer.bias.double()
        exact = torch.nn.functional.layer_norm(wide.permute(0, 2, 3, 1), (6,), weight, bias)
        with triton_kernels():
            y = layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            (found,) = torch.autograd.grad(y, x, grad)
        right = torch.autograd.grad(exact.permute(0, 3, 1, 2), wide, grad.double())[0]
        torch.testing.assert_close(y.double(), exact.permute(0, 3, 1, 2), rtol=1e-6, atol=2e-6)
        torch.testing.assert_close(found.double(), right, rtol=1e-5, atol=1e-5)
