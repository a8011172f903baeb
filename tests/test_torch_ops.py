"""torch's own OpInfo database: every sample of every norm operator, through truenorm.functional.

What torch.testing's TestCommon, TestGradients, TestFwdGradients and TestMathBits check is checked
here: values in every dtype, noncontiguous and lazily negated or conjugated inputs, error inputs,
and every kind of derivative that the database says is supported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cases import eps_of_torch
from checking import same_layout
from counts import passed
from tolerances import last_place
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck, gradgradcheck
from torch.testing._comparison import default_tolerances
from torch.testing._internal.common_methods_invocations import op_db
from torch.utils._pytree import tree_map_only

import truenorm.functional as F

Op = Callable[..., torch.Tensor]

# The functional counterparts, with each operator's own order of arguments.
OURS: dict[str, Op] = {
    "nn.functional.batch_norm": F.batch_norm,
    "nn.functional.instance_norm": F.instance_norm,
    "nn.functional.group_norm": F.group_norm,
    "nn.functional.layer_norm": F.layer_norm,
    "nn.functional.rms_norm": F.rms_norm,
    "nn.functional.local_response_norm": F.local_response_norm,
    "native_group_norm": lambda x, w, b, n, c, s, groups, eps: F.group_norm(x, groups, w, b, eps),
    "native_layer_norm": F.layer_norm,
    "native_batch_norm": lambda x, w, b, rm, rv, *rest: F.batch_norm(x, rm, rv, w, b, *rest),
    "_native_batch_norm_legit": lambda x, w, b, *rest: F.batch_norm(
        x, *(rest[:2] if len(rest) == 5 else (None, None)), w, b, *rest[-3:]
    ),
    "torch.ops.aten._batch_norm_with_update": lambda x, w, b, rm, rv, momentum, eps: F.batch_norm(
        x, rm, rv, w, b, True, momentum, eps
    ),
}
# The variant without cuDNN lists no dtype for CPU.
ENTRIES = {op.name: op for op in op_db if op.name in OURS and op.supported_dtypes("cpu")}
NAMES = list(ENTRIES)
EVERY_DTYPE = [
    (name, dtype)
    for name, op in ENTRIES.items()
    for dtype in sorted(op.supported_dtypes("cpu"), key=str)
]
WIDE = {torch.float64, torch.complex128}
DIFFERENTIABLE = [(name, dtype) for name, dtype in EVERY_DTYPE if dtype in WIDE]


def over(cases: list[tuple[str, torch.dtype]]) -> pytest.MarkDecorator:
    ids = [f"{name}-{str(dtype).removeprefix('torch.')}" for name, dtype in cases]
    return pytest.mark.parametrize(("name", "dtype"), cases, ids=ids)


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.complex128 if dtype.is_complex else torch.float64


def samples(name: str, dtype: torch.dtype, grad: bool = False) -> Iterator[Any]:
    op = ENTRIES[name]
    yield from op.sample_inputs("cpu", dtype, requires_grad=grad)


def call(op: Op, sample: Any) -> torch.Tensor:
    """One result: native operators return their statistics too."""
    result = op(sample.input, *sample.args, **sample.kwargs)
    return result[0] if isinstance(result, tuple) else result


def copies(sample: Any, dtype: torch.dtype | None = None) -> Any:
    """The sample with tensors of its own: running statistics are changed in place."""

    def copy(t: torch.Tensor) -> torch.Tensor:
        return t.detach().clone().to(dtype or t.dtype).requires_grad_(t.requires_grad)

    return sample.transform(lambda value: tree_map_only(torch.Tensor, copy, value))


def tensors(sample: Any) -> list[torch.Tensor]:
    every = [sample.input, *sample.args, *sample.kwargs.values()]
    return [t for t in every if isinstance(t, torch.Tensor)]


def largest(t: torch.Tensor) -> float:
    return t.abs().max().item() if t.numel() else 0.0


def assert_same(actual: torch.Tensor, exact: torch.Tensor) -> None:
    """Up to the promised error; NaN where torch has NaN (samples with a negative eps)."""
    actual = actual.detach()
    exact = exact.detach()
    if actual.dtype in (torch.bfloat16, torch.float16):
        defined = ~exact.isnan()
        assert torch.equal(actual.isnan(), ~defined)
        exact = exact[defined]
        unit = last_place(exact.to(actual.dtype), actual.dtype)
        assert ((actual[defined].double() - exact).abs() <= unit).all()
        return
    bound = 1e-11 if actual.dtype in WIDE else 4e-6
    scale = exact.abs().nan_to_num(0.0).max().clamp(min=1.0) if exact.numel() else 1.0
    assert torch.allclose(
        actual.to(exact.dtype), exact, rtol=0.0, atol=float(bound * scale), equal_nan=True
    )


@over(EVERY_DTYPE)
def test_values(name: str, dtype: torch.dtype) -> None:
    op, count = ENTRIES[name], 0
    for sample in samples(name, dtype):
        ours, theirs = copies(sample), copies(sample, wide(dtype))
        if name == "nn.functional.rms_norm" and theirs.kwargs.get("eps") is None:
            theirs.kwargs["eps"] = eps_of_torch(dtype)  # in the wide dtype None means another
        y = call(OURS[name], ours)
        assert_same(y, call(op.op, theirs))
        same = call(op.op, copies(sample))
        assert y.dtype == same.dtype
        if name == "nn.functional.rms_norm":
            # eps=None with no eps handed to torch: two results, each rounded once
            rtol, atol = default_tolerances(dtype)
            torch.testing.assert_close(y, same, rtol=2 * rtol, atol=2 * atol, equal_nan=True)
        for changed, exact in zip(tensors(ours), tensors(theirs), strict=True):
            # running statistics moved alike, all else stayed
            assert_same(changed, exact)
        count += 1
    passed("OpInfo", "values", count)


@over([(n, d) for n, d in EVERY_DTYPE if d in ENTRIES[n].supported_backward_dtypes("cpu")])
def test_gradients_against_torch(name: str, dtype: torch.dtype) -> None:
    op, count = ENTRIES[name], 0
    for sample in samples(name, dtype, grad=True):
        ours, theirs = copies(sample), copies(sample, wide(dtype))
        if name == "nn.functional.rms_norm" and theirs.kwargs.get("eps") is None:
            theirs.kwargs["eps"] = eps_of_torch(dtype)  # in the wide dtype None means another
        y, exact = call(OURS[name], ours), call(op.op, theirs)
        if not exact.requires_grad:
            continue
        grad = torch.randn_like(y)
        found, wanted = (
            torch.autograd.grad(
                out, [t for t in tensors(s) if t.requires_grad], g, allow_unused=True
            )
            for out, s, g in ((y, ours, grad), (exact, theirs, grad.to(exact.dtype)))
        )
        for actual, expected in zip(found, wanted, strict=True):
            if actual is None or expected is None:
                # an empty sample may leave the graph out
                assert sample.input.numel() == 0
                continue
            # torch.testing's own tolerances; where a statistic has one value or two, the input's
            # gradient is all cancellation: also the rounding of terms of grad · weight / sqrt(eps)
            few = actual.shape == sample.input.shape and sample.input.numel() < 5
            weights = [largest(t) for t in tensors(theirs)[1:] if t.requires_grad]
            terms = largest(grad) * max(weights, default=1.0) * 1e-5**-0.5
            rtol, atol = default_tolerances(actual.dtype)
            torch.testing.assert_close(
                actual,
                expected.to(actual.dtype),
                rtol=rtol,
                atol=max(atol, 1.2e-7 * terms) if few else atol,
                equal_nan=True,
            )
        count += 1
    passed("OpInfo", "gradients", count)


@over(EVERY_DTYPE)
def test_noncontiguous(name: str, dtype: torch.dtype) -> None:
    count = 0
    for sample in samples(name, dtype):
        expected = call(OURS[name], copies(sample))
        actual = call(OURS[name], sample.noncontiguous())
        assert_same(actual, expected.to(wide(expected.dtype)))
        count += 1
    passed("OpInfo", "noncontiguous", count)


@over(DIFFERENTIABLE)
def test_lazy_negation_and_conjugation(name: str, dtype: torch.dtype) -> None:
    count = 0
    for sample in samples(name, dtype):
        lazy = copies(sample)
        for lazily, really in (
            (torch._neg_view, torch.Tensor.neg),
            (torch.Tensor.conj, torch.conj_physical),
        ):
            lazy.input, sample_input = lazily(sample.input), really(sample.input)
            expected = copies(sample)
            expected.input = sample_input
            y = call(OURS[name], copies_of_rest(lazy))
            assert_same(y, call(OURS[name], expected))
        count += 1
    passed("OpInfo", "neg and conj views", count)


def copies_of_rest(sample: Any) -> Any:
    """Copies, but of the input, which would lose its lazy bit."""
    result = copies(sample)
    result.input = sample.input
    return result


@over(EVERY_DTYPE)
def test_fake_tensors(name: str, dtype: torch.dtype) -> None:
    count = 0
    for sample in samples(name, dtype):
        expected = call(OURS[name], copies(sample))
        with FakeTensorMode() as mode:
            fake = sample.transform(
                lambda value, mode=mode: tree_map_only(torch.Tensor, mode.from_tensor, value)
            )
            actual = call(OURS[name], fake)
        assert actual.dtype == expected.dtype
        assert same_layout(actual, expected)
        count += 1
    passed("OpInfo", "fake tensors", count)


@pytest.mark.parametrize("name", [n for n in NAMES if ENTRIES[n].error_inputs_func])
def test_error_inputs(name: str) -> None:
    count = 0
    for error in ENTRIES[name].error_inputs("cpu"):
        with pytest.raises(error.error_type, match=error.error_regex):
            call(OURS[name], error.sample_input)
        count += 1
    passed("OpInfo", "errors", count)


def derivative_inputs(name: str, dtype: torch.dtype) -> Iterator[tuple[Op, list[torch.Tensor]]]:
    """The call as a function of the tensors that require a gradient, as TestGradients makes it."""
    for sample in samples(name, dtype, grad=True):
        wanted = [t for t in tensors(sample) if t.requires_grad]
        if not wanted:
            continue

        def of(*values: torch.Tensor, sample: Any = sample) -> torch.Tensor:
            given = iter(values)

            def replace(tensor: torch.Tensor) -> torch.Tensor:
                return next(given) if tensor.requires_grad else tensor.clone()

            return call(
                OURS[name],
                sample.transform(lambda value: tree_map_only(torch.Tensor, replace, value)),
            )

        yield of, wanted


# Derivatives in fast mode, random directions in place of every entry, as torch's own runs of them.


@over(DIFFERENTIABLE)
def test_first_derivatives(name: str, dtype: torch.dtype) -> None:
    op, count = ENTRIES[name], 0
    for of, inputs in derivative_inputs(name, dtype):
        assert gradcheck(
            of,
            inputs,
            check_batched_grad=op.check_batched_grad,
            check_forward_ad=op.supports_forward_ad,
            check_batched_forward_grad=op.check_batched_forward_grad and op.supports_forward_ad,
            check_undefined_grad=True,
            fast_mode=True,
        )
        count += 1
    passed("OpInfo", "gradcheck", count)


@over(DIFFERENTIABLE)
def test_second_derivatives(name: str, dtype: torch.dtype) -> None:
    op, count = ENTRIES[name], 0
    for of, inputs in derivative_inputs(name, dtype):
        if op.supports_gradgrad:
            assert gradgradcheck(
                of,
                inputs,
                gen_non_contig_grad_outputs=True,
                check_batched_grad=op.check_batched_gradgrad,
                check_fwd_over_rev=op.supports_fwgrad_bwgrad,
                fast_mode=True,
            )
            count += 1
    passed("OpInfo", "gradgradcheck", count)
