"""Every layer on the Triton kernels, forward and backward, against the float64 reference."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from cases import AFFINE, CASES, LAYOUTS, Case
from checking import check_layer, same_layout
from on_triton import DEVICE, needs_triton, small_tiles, triton_kernels
from tolerances import FLOAT32_FORWARD, FLOAT64, assert_gradient, relative
from torch import Tensor

from truenorm._core import plain
from truenorm._core.call import Form
from truenorm._core.geometry import BATCH

pytestmark = needs_triton

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
CUTS: dict[str, Any] = {"whole": nullcontext, "chunks": small_tiles}
# shapes that CASES lacks: several blocks of units and of values, statistics in many chunks
LARGER = [
    Case("BatchNorm1d", (70,), {}, (33, 70)),
    Case("BatchNorm2d", (2,), {}, (3, 2, 9, 31)),
    Case("InstanceNorm2d", (9,), AFFINE, (2, 9, 7, 11)),
    Case("GroupNorm", (2, 10), {}, (2, 10, 9, 7)),
    Case("GroupNorm", (3, 9), {}, (5, 9)),
    Case("LayerNorm", ((300,),), {}, (9, 300)),
    Case("RMSNorm", ((257,),), {}, (7, 257)),
    Case("LocalResponseNorm", (5,), {"alpha": 0.3, "beta": 0.5}, (2, 9, 7, 13)),
    Case("LocalResponseNorm", (4,), {"alpha": 0.3, "beta": 0.6}, (3, 3, 67)),
    Case("LocalResponseNorm", (8,), {"alpha": 0.5, "beta": 1.0}, (1, 19, 30)),
]


def build(case: Case, dtype: torch.dtype = torch.float32) -> Any:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return case.build(dtype=wide).to(DEVICE)


def layouts(case: Case) -> list[str]:
    if len(case.shape) < 3:
        return ["contiguous", "samples_inside", "sliced"]
    return list(LAYOUTS)


def layer_by_rows(case: Case) -> bool:
    return case.layer in ("LayerNorm", "RMSNorm")


def place(x: Tensor, layout: str) -> Tensor:
    return LAYOUTS[layout](x.to(DEVICE))


# float16 and float64 are cut as bfloat16 is, which kernels compute in float64 too;
# LocalResponseNorm never is
KINDS = [
    pytest.param(case, dtype, cut, id=f"{case.id}-{str(dtype).split('.')[1]}-{cut}")
    for case in CASES
    for dtype in DTYPES
    for cut in CUTS
    if cut == "whole" or (dtype in DTYPES[:2] and "Local" not in case.layer)
]


@pytest.mark.parametrize(("case", "dtype", "cut"), KINDS)
def test_layers(case: Case, dtype: torch.dtype, cut: str) -> None:
    """Both modes; the layouts of input and gradient in turn, all of them whole in float32."""
    names = layouts(case)
    training = [True, False] if "Batch" in case.layer else [True]
    for turn, mode in enumerate(training):
        layer = build(case, dtype).train(mode)
        for i, of_x in enumerate(names):
            if (dtype != torch.float32 or cut == "chunks") and i % 2 == turn:
                continue
            x = place(case.input(dtype), of_x)
            of_grad = names[(i + turn + DTYPES.index(dtype)) % len(names)]
            grad = place(torch.randn(case.shape, dtype=torch.float64).to(dtype), of_grad)
            with CUTS[cut](), triton_kernels():
                got = check_layer(layer, x, grad)
            kept = of_x in ("contiguous", "channels_last") and not layer_by_rows(case)
            if kept:
                assert same_layout(got.output, x)
                assert same_layout(got.input, x)


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("case", LARGER, ids=lambda case: case.id)
def test_more_than_one_tile(case: Case, cut: str) -> None:
    kinds = [(torch.float32, "contiguous"), (torch.bfloat16, layouts(case)[1])]
    for dtype, layout in kinds if cut == "whole" else kinds[:1]:
        layer = build(case, dtype)
        with CUTS[cut](), triton_kernels():
            check_layer(layer, place(case.input(dtype, offset=3.0), layout))


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=["float32", "bfloat16"])
def test_several_runs_to_a_chunk(dtype: torch.dtype) -> None:
    """Of two tiles each, and fewer in the last chunk."""
    layer = Case("BatchNorm2d", (3,), {}, (7, 3, 5, 7)).build().to(DEVICE, dtype)
    x = torch.randn(7, 3, 5, 7).to(DEVICE, dtype)
    with small_tiles(forward=0, backward=0, tile=512, steps=6), triton_kernels():
        check_layer(layer, x, torch.randn(x.shape).to(x))


def test_more_blocks_of_rows_than_programs() -> None:
    """A program then adds up the parameters' gradients over several blocks."""
    for case in (Case("LayerNorm", ((20,),), {}, (37, 20)), Case("RMSNorm", ((9,),), {}, (70, 9))):
        layer = build(case)
        with small_tiles(tile=32), triton_kernels():
            check_layer(layer, case.input().to(DEVICE))


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize(
    ("name", "momentum"), [("BatchNorm2d", 0.3), ("BatchNorm2d", None), ("InstanceNorm2d", 0.3)]
)
def test_running_statistics(name: str, momentum: float | None, cut: str) -> None:
    """Several steps in float64 against torch's own, the batches counted."""
    kwargs = {"affine": True, "track_running_stats": True, "momentum": momentum}
    case = Case(name, (5,), kwargs, (3, 5, 7, 3))
    ours, theirs = (layer.to(DEVICE) for layer in case.pair(dtype=torch.float64))
    for _ in range(3):
        x = case.input(torch.float64, offset=4.0).to(DEVICE)
        with CUTS[cut](), triton_kernels():
            ours(x)
        theirs(x)
    for key, wanted in theirs.state_dict().items():
        error = (ours.state_dict()[key].double() - wanted.double()).abs().max()
        assert error <= FLOAT64, key
    if "Batch" in name:
        assert ours.num_batches_tracked.item() == 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_running_statistics_in_half_precision(dtype: torch.dtype) -> None:
    case = Case("BatchNorm1d", (5,), {}, (7, 5))
    layer = case.build(dtype=dtype).to(DEVICE)
    exact = {name: b.double() for name, b in layer.named_buffers()}
    x = case.input(dtype).to(DEVICE)
    with triton_kernels():
        layer(x)
    mean, var = x.double().mean(0), x.double().var(0)
    for name, seen in (("running_mean", mean), ("running_var", var)):
        wanted = (0.9 * exact[name] + 0.1 * seen).to(dtype)
        assert torch.equal(getattr(layer, name), wanted), name


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("needs", ["input", "weight", "bias"])
@pytest.mark.parametrize("case", [CASES[2], CASES[10]], ids=lambda c: c.id)
def test_one_gradient_alone(case: Case, needs: str, cut: str) -> None:
    for training in (True, False):
        layer = build(case).train(training)
        x, grad = place(case.input(), "channels_last"), torch.randn(case.shape).to(DEVICE)
        with CUTS[cut](), triton_kernels():
            wanted = getattr(check_layer(layer, x, grad), needs)
            layer.requires_grad_(False)
            leaf = x.detach()
            (leaf if needs == "input" else getattr(layer, needs)).requires_grad_()
            layer(leaf).backward(grad)
        found = (leaf if needs == "input" else getattr(layer, needs)).grad
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=["float32", "bfloat16"])
def test_a_part_of_a_batch(dtype: torch.dtype, cut: str) -> None:
    """The operators of layers over several processes, against the plain float64 formulas."""
    ops = torch.ops.truenorm
    for layout in ("contiguous", "channels_last", "sliced"):
        x = place((torch.randn(3, 5, 7, 9) * 1.7 + 3.0).to(dtype), layout)
        grad = place(torch.randn(3, 5, 7, 9).to(dtype), "channels_last")
        weight, *both = (torch.randn(5).double().to(DEVICE) for _ in range(3))
        means = torch.stack(both)
        with CUTS[cut](), triton_kernels():
            form = Form(BATCH, 1e-5)
            record = ops.statistics(x, None, form.bits(x))
            nothing = (None,) * 3
            given = record, weight.float(), *nothing, means
            grad_x = ops.norm_backward(grad, x, *given, *form.numbers(x, 1))[0]
        mean, var, _ = record
        wide = x.double().transpose(0, 1).flatten(1)
        assert relative(mean, wide.mean(1)) <= FLOAT32_FORWARD
        assert relative(var, wide.var(1, correction=0)) <= FLOAT32_FORWARD
        tensors = grad.double(), x.double(), weight.float(), *nothing, (mean, var), form
        wanted = plain.norm_backward(*tensors, sums=means).x
        assert grad_x.dtype == dtype
        assert_gradient(grad_x, wanted)


def test_second_derivatives() -> None:
    for name in ("BatchNorm1d", "LayerNorm"):
        case = Case(name, (5,), {}, (4, 5))
        layer = build(case, torch.float64)
        x = case.input(torch.float64).to(DEVICE).requires_grad_()
        with triton_kernels():
            assert torch.autograd.gradgradcheck(
                lambda x, w, layer=layer: torch.func.functional_call(layer, {"weight": w}, (x,)),
                (x, layer.weight.detach().clone().requires_grad_()),
                nondet_tol=0.0,
            )


@pytest.mark.parametrize("cut", CUTS)
def test_64_bit_offsets(cut: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of tensors of 2^31 values and more, on small ones."""
    import triton.language as tl

    from truenorm._triton import view

    monkeypatch.setattr(view, "index", lambda x: tl.int64)
    for case in (CASES[2], CASES[7], CASES[9], CASES[10], CASES[13]):
        layer = build(case)
        with CUTS[cut](), triton_kernels():
            check_layer(layer, place(case.input(), "channels_last"))
