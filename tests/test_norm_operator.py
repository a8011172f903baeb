"""The operators of one call, against the formula in float64: every feature with every other."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import pytest
import torch
from pooling import only_native
from tolerances import FLOAT32_GRADIENT, FLOAT64, last_place
from torch import Tensor

import truenorm  # noqa: F401  (loads the library)

pytestmark = only_native

# bits of `form`
INPUT, WEIGHT, BIAS, RESIDUAL, BY_OUTPUT, CONSTANT, UNCENTRED, PER_CHANNEL, KEEP = (
    1 << bit for bit in range(9)
)
ALL = INPUT | WEIGHT | BIAS | RESIDUAL

ops: Any = torch.ops.truenorm

PARAMETER = 0.3  # leaky_relu's slope, elu's alpha
PADDING = -3.25  # holds in every dtype
EPS = 1e-3


# ---------------------------------------------------------------- the formula


class Axes(NamedTuple):
    """Which values share a statistic, as `form` says it."""

    groups: int = 0  # 0: over the batch
    features: int = 0
    flags: int = 0

    def form(self, act: int = 0, flags: int = 0) -> int:
        return flags | self.flags | act << 16 | self.features << 24 | self.groups << 32

    def grouped(self, t: Tensor) -> Tensor:
        """(N, G, C / G, S) of t, a group for each statistic of a sample."""
        if self.features:
            return t.reshape(-1, 1, t.shape[-self.features :].numel(), 1)
        n, c = t.shape[:2]
        groups = c if self.flags & PER_CHANNEL else self.groups or c
        return t.reshape(n, groups, c // groups, -1)

    @property
    def shared(self) -> list[int]:
        """Dimensions of that over which a statistic goes."""
        return [2, 3] if self.groups or self.features or self.flags & PER_CHANNEL else [0, 2, 3]

    def per_channel(self, p: Tensor, v: Tensor) -> Tensor:
        return p.double().reshape(1, *v.shape[1:3], 1)


def activated(z: Tensor, act: int) -> Tensor:
    return (
        lambda: z,
        lambda: z.clamp(min=0),
        lambda: torch.where(z > 0, z, PARAMETER * z),
        lambda: z * (z + 3).clamp(0, 6) / 6,
        lambda: torch.where(z > 0, z, PARAMETER * torch.expm1(z.clamp(max=0))),
        lambda: z * torch.sigmoid(z),
        lambda: z * 0.5 * torch.erfc(-z * 0.5**0.5),
        # 1 + tanh(u) = 2 / (1 + e^(−2 u)), in which nothing cancels
        lambda: z * torch.sigmoid(2 * (2 / torch.pi) ** 0.5 * (z + 0.044715 * z**3)),
        lambda: z.clamp(0, 6),
    )[act]()


class Made(NamedTuple):
    y: Tensor
    record: Tensor
    grad_x: Tensor
    grad_weight: Tensor
    grad_bias: Tensor
    grad_residual: Tensor
    sums: Tensor  # of g · x̂ and of g per channel, of each sample where statistics are
    size: Tensor  # by norm, of what the parameters' gradients sum up


def formula(
    axes: Axes,
    x: Tensor,
    grad: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    residual: Tensor | None = None,
    given: tuple[Tensor, Tensor] | None = None,
    act: int = 0,
    constant: bool = False,
    sums: Tensor | None = None,
) -> Made:
    v = axes.grouped(x.double())
    valid = torch.ones(len(v), 1, 1, 1, dtype=torch.bool)
    if mask is not None:
        valid = mask.reshape(len(v), 1, 1, -1)
    valid = valid.expand(v.shape)

    def only(t: Tensor) -> Tensor:
        return torch.where(valid, t, 0.0)

    def total(t: Tensor) -> Tensor:
        return t.sum(axes.shared, keepdim=True)

    v, count = only(v), total(valid.double())
    some = count.clamp(min=1)
    centred = not axes.flags & UNCENTRED
    mean = total(v) / some if centred else torch.zeros_like(count)
    var = total(only(v - mean) ** 2) / some
    if given is not None:
        mean, var = (t.double().reshape(mean.shape) for t in given)
    rstd = torch.where(count > 0, var + EPS, 1.0).rsqrt()
    x_hat = only(v - mean) * rstd
    w = 1.0 if weight is None else axes.per_channel(weight, v)
    z = x_hat * w + (0.0 if bias is None else axes.per_channel(bias, v))
    if residual is not None:
        z = z + only(axes.grouped(residual.double()))
    z = z.requires_grad_()
    y = activated(z, act)
    (g,) = torch.autograd.grad(y, z, only(axes.grouped(grad.double())))
    g = only(g)
    wg = w * g
    if sums is not None:
        mean_gx, mean_g = (t.double().reshape(mean.shape) for t in sums)
    else:
        mean_gx, mean_g = total(wg * x_hat) / some, total(wg) / some
    of_x = wg
    if not constant:
        of_x = wg - (mean_g if centred else 0.0) - x_hat * mean_gx
    by_sample = [0, 3] if 0 in axes.shared else [3]
    per_channel = torch.stack([(g * x_hat).sum(by_sample), g.sum(by_sample)])
    shape = x.shape[-axes.features :] if axes.features else x.shape[1:2]
    return Made(
        torch.where(valid, y.detach(), PADDING).reshape(x.shape),
        torch.stack([t.reshape(-1) for t in (mean, var, count)]),
        only(of_x * rstd).reshape(x.shape),
        (g * x_hat).sum([0, 3]).reshape(shape),
        g.sum([0, 3]).reshape(shape),
        g.reshape(x.shape),
        per_channel.reshape(2, -1),
        (g * g * (1 + x_hat * x_hat)).sum().sqrt(),
    )


@pytest.mark.parametrize("act", range(9))
def test_the_formula_is_what_autograd_differentiates(act: int) -> None:
    axes, shape = Axes(groups=2), (3, 4, 7)
    mask = torch.rand(3, 7) < 0.7
    x, grad, residual = (torch.randn(shape, dtype=torch.float64) for _ in range(3))
    weight, bias = torch.randn(4, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (x, weight, bias, residual)]
    made = formula(axes, x, grad, weight, bias, mask, residual, act=act)
    v, valid = x.reshape(3, 2, 2, 7), mask.reshape(3, 1, 1, 7)
    count = 2 * mask.sum(1).reshape(3, 1, 1, 1)
    mean = torch.where(valid, v, 0.0).sum((2, 3), keepdim=True) / count
    var = torch.where(valid, v - mean, 0.0).square().sum((2, 3), keepdim=True) / count
    z = ((v - mean) / (var + EPS).sqrt()).reshape(shape) * weight[:, None] + bias[:, None]
    y = torch.where(mask[:, None], activated(z + residual, act), PADDING)
    torch.testing.assert_close(made.y, y.detach(), rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(made[2:6], torch.autograd.grad(y, leaves, grad), strict=True):
        torch.testing.assert_close(ours.detach(), theirs, rtol=1e-11, atol=1e-11)


# ---------------------------------------------------------------- inputs


def contiguous(t: Tensor) -> Tensor:
    return t.contiguous()


def channels_last(t: Tensor) -> Tensor:
    return t.movedim(1, -1).contiguous().movedim(-1, 1) if t.dim() > 2 else t.contiguous()


def sliced(t: Tensor) -> Tensor:
    wide = torch.full((*t.shape[:-1], 2 * t.shape[-1] + 1), float("nan"), dtype=t.dtype)
    wide[..., 1::2] = t
    return wide[..., 1::2]


BATCH, INSTANCE = Axes(), Axes(flags=PER_CHANNEL)
# odd sizes; shorter and longer than a step of the kernels, than what is computed whole under a mask
# and than a piece of a reduction; channels that are folded, that fill vectors, and more of them
CASES = [
    (BATCH, (4, 5, 37)),
    (BATCH, (3, 70, 19, 17)),
    (BATCH, (3, 2, 20_001)),
    (BATCH, (19, 7)),
    (INSTANCE, (4, 5, 37)),
    (INSTANCE, (3, 3, 19, 17)),
    (INSTANCE, (2, 2, 40_001)),
    (Axes(groups=2), (4, 6, 37)),
    (Axes(groups=2), (3, 70, 5, 9)),
    (Axes(groups=1), (2, 3, 20_001)),
    (Axes(groups=3), (19, 15)),
    (Axes(features=1), (29, 131)),
    (Axes(features=2), (3, 5, 6, 5)),
    (Axes(features=1), (3, 40_001)),
    (Axes(features=1, flags=UNCENTRED), (29, 131)),
    (Axes(features=1, flags=UNCENTRED), (3, 40_001)),
    (Axes(flags=UNCENTRED), (4, 5, 37)),
    (Axes(flags=UNCENTRED | PER_CHANNEL), (3, 5, 19, 17)),
    (Axes(groups=2, flags=UNCENTRED), (4, 6, 37)),
]
EVERY = pytest.mark.parametrize(("axes", "shape"), CASES, ids=lambda each: str(each))
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
MASKS = ["none", "lengths", "random"]


def masked(axes: Axes, shape: tuple[int, ...], kind: str) -> Tensor | None:
    """None, or the mask, with a sample where nothing is valid."""
    size = shape[2:] if not axes.features else ()
    samples = torch.Size(shape[: -axes.features]).numel() if axes.features else shape[0]
    positions = torch.Size(size).numel()
    if kind == "none":
        return None
    if kind == "lengths" and positions > 1:
        lengths = torch.linspace(0, positions, samples).ceil()
        return (torch.arange(positions) < lengths[:, None]).reshape(samples, *size)
    mask = torch.rand(samples, *size) < 0.5
    mask[0], mask[-1] = False, True
    return mask


class Inputs(NamedTuple):
    x: Tensor
    grad: Tensor
    weight: Tensor | None
    bias: Tensor | None
    mask: Tensor | None
    residual: Tensor | None
    given: tuple[Tensor, Tensor] | None
    act: int
    constant: bool

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.weight, self.bias, self.mask, self.residual

    def exact(self, axes: Axes, sums: Tensor | None = None) -> Made:
        given, act, constant = self.given, self.act, self.constant
        return formula(axes, self.x, self.grad, *self.tensors, given, act, constant, sums)


def drawn(
    axes: Axes, shape: tuple[int, ...], dtype: torch.dtype, layout: Any, mask: str, variant: int
) -> Inputs:
    """Inputs with NaN wherever nothing is valid; the variants are all pairs of options."""
    offset = (3.0 if dtype.itemsize == 2 else 1e3) * (variant % 2)
    kept = masked(axes, shape, mask)

    def tensor(scale: float = 1.0, offset: float = 0.0) -> Tensor:
        t = (torch.randn(shape, dtype=torch.float64) * scale + offset).to(dtype)
        if kept is not None:
            over = kept if axes.features else kept.unsqueeze(1)
            outside = ~over.reshape(*over.shape, *[1] * (t.dim() - over.dim()))
            if axes.features:
                outside = ~kept.reshape(*shape[: -axes.features], *[1] * axes.features)
            t = t.masked_fill(outside.expand(shape), float("nan"))
        return layout(t)

    param = shape[-axes.features :] if axes.features else shape[1:2]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    weight, bias = (torch.randn(param).to(wide) for _ in range(2))
    given = None
    if variant % 3:
        statistics = formula(axes, tensor(2.0, offset), tensor(), mask=kept).record
        given = statistics[0] + 0.1, statistics[1] * 1.1 + 0.1
        if axes.flags & UNCENTRED:
            given = torch.zeros_like(given[0]), given[1]
    return Inputs(
        tensor(2.0, offset),
        tensor(),
        weight if variant % 4 else None,
        bias if variant % 5 else None,
        kept,
        tensor() if variant % 2 or variant % 7 == 0 else None,
        given,
        variant % 9,
        variant % 3 == 1,
    )


VARIANTS = itertools.count()


def run(axes: Axes, i: Inputs, flags: int = KEEP, over: bool = False) -> tuple[Tensor, Tensor]:
    given = i.given or (None, None)
    args = *i.tensors, *given, axes.form(i.act, flags), EPS, PARAMETER, PADDING
    if not over:
        return ops.norm(i.x, *args)  # type: ignore[no-any-return]
    y = i.x.clone() if i.x.is_contiguous() else torch.empty_like(i.x).copy_(i.x)
    if y.stride() != i.x.stride():
        y = sliced(i.x)
    return y, ops.norm_(y, *args)


def back(axes: Axes, i: Inputs, record: Tensor, flags: int, sums: Tensor | None = None) -> Any:
    form = axes.form(i.act, flags | (CONSTANT if i.constant else 0))
    return ops.norm_backward(i.grad, i.x, record, *i.tensors, sums, form, EPS, PARAMETER)


# ---------------------------------------------------------------- judgements


def assert_forward(y: Tensor, exact: Tensor, scale: float) -> None:
    assert not y.isnan().any()
    error = (y.double() - exact).abs()
    if y.dtype.itemsize == 2:
        # rounded once: half a unit, and, where the parts of a sum cancel or an activation crosses
        # zero, what float32 leaves of the parts
        error = error - 2e-6 * scale
        assert bool((error <= 0.501 * last_place(exact.to(y.dtype), y.dtype)).all())
        return
    # the promise: errors relative to a standard deviation times the weight
    bound = FLOAT64 if y.dtype == torch.float64 else 2e-6
    assert error.max() <= bound * scale, f"off by {error.max() / scale:.2e}"


def assert_norm(one: Tensor, exact: Tensor, dtype: torch.dtype, size: Tensor | float = 0.0) -> None:
    """size: the norm of what is summed up, where it may cancel."""
    bound = {torch.float64: FLOAT64, torch.float32: FLOAT32_GRADIENT}.get(dtype)
    if bound is None:
        # rounded to the dtype between activation and norm, and at the end
        bound = 2 * torch.finfo(dtype).eps
    error, scale = (one.double() - exact).norm(), exact.norm() + size
    assert error <= bound * scale, f"off by {error / scale:.2e}"


def assert_made(axes: Axes, i: Inputs, y: Tensor, record: Tensor, found: Any, exact: Made) -> None:
    dtype = i.x.dtype
    weights = 1.0 if i.weight is None else float(i.weight.abs().max())
    assert y.dtype == dtype
    assert_forward(y, exact.y, (1 + weights) * 4)
    # float64 sums of about a thousand deviations from zero
    near = exact.record[0].abs() + exact.record[1].sqrt()
    assert bool(((record[0] - exact.record[0]).abs() <= 1e-11 * near).all())
    torch.testing.assert_close(record[1], exact.record[1], rtol=1e-9, atol=1e-20)
    assert torch.equal(record[2], exact.record[2])
    of_x, of_weight, of_bias, of_residual = found
    assert_norm(of_x, exact.grad_x, dtype)
    assert_norm(of_residual, exact.grad_residual, dtype)
    assert_norm(of_weight, exact.grad_weight, dtype, exact.size)
    assert_norm(of_bias, exact.grad_bias, dtype, exact.size)
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert of_weight.dtype == of_bias.dtype == expected
    if i.mask is not None:
        outside = exact.y == PADDING
        assert bool((of_x[outside] == 0).all())
        assert bool((of_residual[outside] == 0).all())


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("layout", [contiguous, channels_last, sliced], ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@EVERY
def test_values_and_gradients(
    axes: Axes, shape: tuple[int, ...], dtype: torch.dtype, layout: Any, mask: str
) -> None:
    for _ in range(3):
        i = drawn(axes, shape, dtype, layout, mask, next(VARIANTS))
        y, record = run(axes, i)
        assert_made(axes, i, y, record, back(axes, i, record, ALL), i.exact(axes))
        if layout is contiguous or (layout is channels_last and not axes.features):
            assert y.stride() == i.x.stride()


@pytest.mark.parametrize("mask", MASKS)
@EVERY
def test_in_place_it_is_the_same(axes: Axes, shape: tuple[int, ...], mask: str) -> None:
    for layout, dtype in itertools.product((contiguous, channels_last, sliced), DTYPES):
        i = drawn(axes, shape, dtype, layout, mask, next(VARIANTS))
        y, record = run(axes, i)
        over, again = run(axes, i, over=True)
        assert torch.equal(y, over)
        assert torch.equal(record, again)


@pytest.mark.parametrize("mask", MASKS)
@EVERY
def test_only_what_is_wanted_is_made(axes: Axes, shape: tuple[int, ...], mask: str) -> None:
    i = drawn(axes, shape, torch.float32, channels_last, mask, next(VARIANTS))
    y, nothing = run(axes, i, 0)
    kept, record = run(axes, i)
    assert nothing.shape == (0,)
    assert torch.equal(y, kept)
    every = back(axes, i, record, ALL)
    for needs in range(16):
        found = back(axes, i, record, needs)
        for bit, (one, whole) in enumerate(zip(found, every, strict=True)):
            assert one.dtype == whole.dtype
            assert torch.equal(one, whole) if needs >> bit & 1 else one.shape == (0,)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("act", [1, 2, 8])
@EVERY
def test_by_the_output(axes: Axes, shape: tuple[int, ...], act: int, mask: str) -> None:
    # what is a little less than 6 is 6 in half precision
    half = torch.bfloat16 if act < 8 else torch.float64
    for layout, dtype in ((contiguous, torch.float32), (channels_last, half)):
        i = drawn(axes, shape, dtype, layout, mask, next(VARIANTS))._replace(act=act)
        y, record = run(axes, i)
        by_input = back(axes, i, record, ALL)
        by_output = back(axes, i._replace(residual=y), record, ALL | BY_OUTPUT)
        for one, other in zip(by_input, by_output, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("mask", ["none", "random"])
@pytest.mark.parametrize("layout", [contiguous, channels_last, sliced], ids=lambda f: f.__name__)
@pytest.mark.parametrize("axes", [BATCH, INSTANCE, Axes(2), Axes(2, flags=UNCENTRED)], ids=str)
def test_a_part_of_what_the_statistics_span(axes: Axes, layout: Any, mask: str) -> None:
    # cut along the positions, as far as which part is empty in a sample
    for dtype in DTYPES:
        i = drawn(axes, (4, 6, 101), dtype, layout, mask, 3 * next(VARIANTS))
        whole = i.exact(axes)
        _, record = run(axes, i)
        flags = ALL
        own, parts = [], []
        for cut in (slice(0, 40), slice(40, 101)):
            tensors = {
                name: layout(getattr(i, name)[..., cut])
                for name in ("x", "grad", "residual")
                if getattr(i, name) is not None
            }
            if i.mask is not None:
                tensors["mask"] = i.mask[..., cut].contiguous()
            parts.append(i._replace(**tensors))
            form = axes.form(i.act)
            args = parts[-1].grad, parts[-1].x, record, *parts[-1].tensors
            own.append(ops.gradient_sums(*args, form, EPS, PARAMETER))
            part = parts[-1]._replace(given=(record[0], record[1])).exact(axes)
            assert own[-1].dtype == torch.float64
            assert_norm(own[-1], part.sums, dtype, part.size)
        per_channel = sum(own)
        weight = torch.ones(6) if i.weight is None else i.weight
        samples = per_channel.shape[1] // 6
        weighted = (per_channel * weight.double().repeat(samples)).reshape(2, record.shape[1], -1)
        means = weighted.sum(2) / record[2].clamp(min=1)
        found = [back(axes, part, record, flags, means) for part in parts]
        assert_norm(torch.cat([f[0] for f in found], -1), whole.grad_x, dtype)
        assert_norm(torch.cat([f[3] for f in found], -1), whole.grad_residual, dtype)
        assert_norm(found[0][1] + found[1][1], whole.grad_weight, dtype, whole.size)
        assert_norm(found[0][2] + found[1][2], whole.grad_bias, dtype, whole.size)


def test_sums_of_samples_of_one_position() -> None:
    axes, i = Axes(3), drawn(Axes(3), (19, 15), torch.float32, contiguous, "random", 3 * 4)
    _, record = run(axes, i)
    args = i.grad, i.x, record, *i.tensors
    sums = ops.gradient_sums(*args, axes.form(i.act), EPS, PARAMETER)
    exact = i.exact(axes)
    assert_norm(sums, exact.sums, torch.float32, exact.size)


@pytest.mark.parametrize("mask", MASKS)
@EVERY
def test_statistics_alone(axes: Axes, shape: tuple[int, ...], mask: str) -> None:
    for layout, dtype in itertools.product((contiguous, channels_last, sliced), DTYPES):
        i = drawn(axes, shape, dtype, layout, mask, 3 * next(VARIANTS))
        _, record = run(axes, i)
        assert torch.equal(ops.statistics(i.x, i.mask, axes.form()), record)


@EVERY
def test_a_mask_of_ones_is_none(axes: Axes, shape: tuple[int, ...]) -> None:
    per_row = axes.features or (len(shape) == 2 and axes.groups)
    if not per_row and not axes.flags & PER_CHANNEL:
        pytest.skip("summed in other pieces")
    for dtype in DTYPES:
        i = drawn(axes, shape, dtype, contiguous, "none", 3 * next(VARIANTS))
        every = torch.ones_like(masked(axes, shape, "random"))  # type: ignore[arg-type]
        whole, record = run(axes, i)
        y, again = run(axes, i._replace(mask=every))
        assert torch.equal(whole, y)
        assert torch.equal(record, again)
        pairs = zip(back(axes, i, record, ALL), back(axes, i._replace(mask=every), record, ALL))  # noqa: B905
        assert all(torch.equal(one, other) for one, other in pairs)


@pytest.mark.parametrize("axes", [BATCH, INSTANCE, Axes(2), Axes(features=1)], ids=str)
def test_the_same_bits_for_any_number_of_threads(axes: Axes) -> None:
    # two blocks of rows, which three threads cannot share evenly, each read in several steps
    shape = (128, 3000) if axes.features else (5, 4, 60_001)
    before = torch.get_num_threads()
    for layout, mask in itertools.product((contiguous, channels_last), ("random", "lengths")):
        i = drawn(axes, shape, torch.float32, layout, mask, 5)
        found = []
        try:
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                y, record = run(axes, i)
                found.append((y, record, *back(axes, i, record, ALL)))
        finally:
            torch.set_num_threads(before)
        for others in found[1:]:
            assert all(torch.equal(a, b) for a, b in zip(found[0], others, strict=True))


@pytest.mark.parametrize("mask", MASKS)
def test_half_precision_with_parameters_of_float64(mask: str) -> None:
    # computed in float64 and rounded once, residual and padding too
    for dtype in (torch.bfloat16, torch.float16):
        i = drawn(INSTANCE, (4, 5, 37), dtype, contiguous, mask, 7)
        assert i.weight is not None
        i = i._replace(weight=i.weight.double(), bias=torch.randn(5, dtype=torch.float64))
        y, _ = run(INSTANCE, i)
        exact = i.exact(INSTANCE).y
        assert bool(((y.double() - exact).abs() <= 0.5001 * last_place(y, dtype)).all())


@pytest.mark.parametrize("axes", [BATCH, INSTANCE, Axes(2), Axes(features=1)], ids=str)
def test_nothing_valid_at_all(axes: Axes) -> None:
    shape = (3, 4, 6)
    x = torch.full(shape, float("nan"))
    mask = torch.zeros(12 if axes.features else 18, dtype=torch.bool)
    for place in (contiguous, channels_last):
        y, record = ops.norm(
            place(x), None, None, mask, None, None, None, axes.form(flags=KEEP), 0.0, 0.0, 7.0
        )
        assert bool((y == 7).all())
        assert bool((record == 0).all())
        args = None, None, mask, None, None, axes.form(flags=ALL), 0.0, 0.0
        for found in ops.norm_backward(place(x), place(x), record, *args):
            assert bool((found == 0).all())


def test_empty_tensors() -> None:
    x, given = torch.empty(0, 3, 5), (torch.randn(3), torch.rand(3))
    y, record = ops.norm(x, None, None, None, None, *given, KEEP, EPS, 0.0, 0.0)
    assert y.shape == x.shape
    assert torch.equal(record[:2].float(), torch.stack(given))
    assert bool((record[2] == 0).all())
    found = ops.norm_backward(x, x, record, torch.randn(3), None, None, None, None, ALL, EPS, 0.0)
    assert [tuple(f.shape) for f in found] == [(0, 3, 5), (3,), (3,), (0, 3, 5)]
    assert not found[1].any()
    sums = ops.gradient_sums(x, x, record, None, None, None, None, 0, EPS, 0.0)
    assert torch.equal(sums, torch.zeros(2, 3, dtype=torch.float64))
    # a process without a sample has statistics of no value
    assert torch.equal(ops.statistics(x, None, 0), torch.zeros(3, 3, dtype=torch.float64))


# ---------------------------------------------------------------- running statistics


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("momentum", [0.3, None])
def test_running_statistics(momentum: float | None, dtype: torch.dtype) -> None:
    counts = torch.tensor([[7.0, 1.0, 0.0, 4.0], [3.0, 5.0, 1.0, 1.0]], dtype=torch.float64)
    for count in (counts, torch.full((2, 4), 6.0, dtype=torch.float64)):
        mean, var = torch.randn(2, 4, dtype=torch.float64), torch.rand(2, 4, dtype=torch.float64)
        record = torch.stack([mean, var, count]).reshape(3, 8)
        running, seen = [torch.randn(4).to(dtype), torch.rand(4).to(dtype)], torch.tensor(4)
        share = (count > 1).double()
        some = share.sum(0)
        factor = 0.2 if momentum is None else momentum
        expected = []
        for before, new in zip(
            running, (mean, var * count / (count - 1).clamp(min=1)), strict=True
        ):
            average = (new * share).sum(0) / some.clamp(min=1)
            moved = (1 - factor) * before.double() + factor * average
            expected.append(torch.where(some > 0, moved, before.double()))
        ops.move_(*running, seen, record, momentum, False)
        for one, exact in zip(running, expected, strict=True):
            # rounded once to the dtype, of what float64 makes in another order of steps
            rtol = max(torch.finfo(dtype).eps, 4 * torch.finfo(torch.float64).eps)
            torch.testing.assert_close(one.double(), exact, rtol=rtol, atol=0)
        assert seen == 5


def test_statistics_that_are_not_finite_are_skipped() -> None:
    record = torch.ones(3, 2, dtype=torch.float64) * 3
    record[1, 1] = float("inf")
    running, seen = (torch.zeros(2), torch.ones(2)), torch.tensor(0)
    ops.move_(*running, seen, record, 0.1, True)
    assert torch.equal(running[0], torch.zeros(2))
    assert seen == 0
    ops.move_(*running, seen, record, 0.1, False)
    assert bool(running[1].isinf()[1])
    assert seen == 1


# ---------------------------------------------------------------- what does not fit

X = torch.randn(4, 6, 5)
RECORD = torch.rand(3, 6, dtype=torch.float64)
BAD_CALLS: list[tuple[dict[str, Any], str]] = [
    ({"x": torch.ones(4, 6, 5, dtype=torch.int64)}, "`x` has dtype torch.int64"),
    ({"x": torch.ones(4)}, r"`x` of shape \(4,\) needs the dimensions \(N, C, …\)"),
    ({"form": 4 << 32}, r"`num_groups` \(=4\) must be 0, or divide the 6 channels"),
    ({"form": 4 << 24}, r"`feature_dims` \(=4\) must be from 0 to 3"),
    ({"form": -1}, r"`form` \(=-1\) is negative"),
    ({"form": 1 << 12}, "bits from 12 to 15"),
    ({"form": 512}, "has ROUNDS without `feature_dims`"),
    ({"form": 2 << 32 | PER_CHANNEL}, "`num_groups` beside"),
    ({"form": 1 << 24 | PER_CHANNEL}, "pass one of them"),
    ({"form": 9 << 16}, r"`act` \(=9\) must be from 0 to 8"),
    ({"weight": torch.ones(5)}, r"`weight` must have shape \(6,\)"),
    ({"bias": torch.ones(6, 1)}, r"`bias` must have shape \(6,\)"),
    ({"bias": torch.ones(6, dtype=torch.int32)}, "`bias` has dtype torch.int32"),
    ({"mask": torch.ones(4, 4, dtype=torch.bool)}, "`mask` must hold 20 values"),
    ({"mask": torch.ones(4, 5)}, "a mask must be a contiguous boolean tensor"),
    ({"mask": torch.ones(5, 4, dtype=torch.bool).t()}, "a mask must be a contiguous"),
    ({"residual": torch.ones(4, 6, 4)}, "`residual` must have the shape of `x`"),
    ({"residual": torch.ones(4, 6, 5).double()}, "`residual` must have the shape of `x`"),
]
BAD_FORWARD = [
    *BAD_CALLS,
    ({"mean": torch.ones(6)}, "`mean` is given and `var` is not: pass both, or neither"),
    ({"mean": torch.ones(5), "var": torch.ones(6)}, "`mean` must hold 6 values"),
    ({"mean": torch.ones(6), "var": torch.ones(6, 2)}, "`var` must hold 6 values"),
    ({"x": torch.ones(0, 6, 5)}, "truenorm::norm takes no empty tensor"),
]
BAD_BACKWARD = [
    *BAD_CALLS,
    ({"grad": torch.ones(4, 6, 4)}, "`grad` must have the shape of `x`"),
    ({"record": RECORD.float()}, "`record` must be a contiguous float64 tensor"),
    ({"record": RECORD[:2]}, "`record` must be a contiguous float64 tensor"),
    ({"record": RECORD[:, :5]}, "`record` must be a contiguous float64 tensor"),
    ({"sums": torch.ones(2, 5)}, "`sums` must hold 2 values for each of the 6 statistics"),
    ({"form": BY_OUTPUT}, "pass the output as residual"),
]


def named(each: Any) -> str:
    return each[:40] if isinstance(each, str) else " ".join(each)


def arguments(names: str, changed: dict[str, Any]) -> list[Any]:
    usual = {"x": X, "grad": torch.randn(4, 6, 5), "record": RECORD, "form": 0, "padding": 0.0}
    usual |= {"eps": EPS, "parameter": 0.0} | changed
    return [usual.get(name) for name in names.split()]


@pytest.mark.parametrize(("changed", "words"), BAD_FORWARD, ids=named)
def test_a_call_that_does_not_fit(changed: dict[str, Any], words: str) -> None:
    names = "x weight bias mask residual mean var form eps parameter padding"
    for operator in (ops.norm, ops.norm_):
        with pytest.raises(RuntimeError, match=words):
            operator(*arguments(names, changed))


@pytest.mark.parametrize(("changed", "words"), BAD_BACKWARD, ids=named)
def test_a_backward_that_does_not_fit(changed: dict[str, Any], words: str) -> None:
    tensors = "grad x record weight bias mask residual"
    if "x" in changed and changed["x"].dim() == 3:
        changed = changed | {"grad": changed["x"]}
    with pytest.raises(RuntimeError, match=words):
        ops.norm_backward(*arguments(f"{tensors} sums form eps parameter", changed))
    if "sums" not in changed:
        with pytest.raises(RuntimeError, match=words):
            ops.gradient_sums(*arguments(f"{tensors} form eps parameter", changed))


def test_other_calls_that_do_not_fit() -> None:
    with pytest.raises(RuntimeError, match=r"`x` of shape .* is expanded"):
        ops.norm_(torch.ones(1, 6, 5).expand(4, 6, 5), *[None] * 6, 0, EPS, 0.0, 0.0)
    with pytest.raises(RuntimeError, match="`mask` must hold 20 values"):
        ops.statistics(X, torch.ones(4, dtype=torch.bool), 0)
    features = torch.rand(3, 24, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="`feature_dims`, whose statistics lie in one process"):
        ops.gradient_sums(X, X, features, None, None, None, None, 1 << 24, EPS, 0.0)
    running = torch.zeros(6), torch.ones(6)
    with pytest.raises(RuntimeError, match="`record` must be a contiguous float64 tensor"):
        ops.move_(*running, None, RECORD[:, :5].contiguous(), 0.1, False)
    with pytest.raises(RuntimeError, match="`num_batches_tracked` must be a tensor"):
        ops.move_(*running, None, RECORD, None, False)
    with pytest.raises(RuntimeError, match="`running_var` must be of shape"):
        ops.move_(running[0], torch.ones(5), None, RECORD, 0.1, False)
