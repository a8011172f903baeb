"""Calls of the operators on the Triton kernels, and the float64 formula that they are held to."""

from __future__ import annotations

from math import pi, prod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from cases import LAYOUTS
from on_triton import DEVICE, launches
from tolerances import assert_gradient, assert_output, relative
from torch import Tensor

NEEDS_ALL, BY_OUTPUT, CONSTANT, UNCENTRED, PER_CHANNEL, KEEP = 15, 16, 32, 64, 128, 256
ONE_PLUS = 1024
ACTIVATIONS: list[Any] = [
    lambda z, p: z,
    lambda z, p: F.relu(z),
    lambda z, p: F.leaky_relu(z, p),
    lambda z, p: F.hardswish(z),
    lambda z, p: F.elu(z, p),
    lambda z, p: F.silu(z),
    # torch's lose a tail: they add 1 to erf, and to tanh
    lambda z, p: z * torch.special.erfc(-z * 0.5**0.5) * 0.5,
    lambda z, p: z * (z * (1 + 0.044715 * z * z) * (8 / pi) ** 0.5).sigmoid(),
    lambda z, p: F.relu6(z),
]
EPS, PARAMETER, PADDING = 1e-3, 0.3, -7.0


class Kind(NamedTuple):
    """Axes, as the operators' number has them and as the formula does."""

    name: str
    bits: int
    shape: tuple[int, ...]
    groups: int = 0  # 0: over the batch
    features: int = 0

    @property
    def split(self) -> int:
        return len(self.shape) - self.features

    def view(self, t: Tensor) -> Tensor:
        """(samples, groups, channels of a group, positions)"""
        if self.features:
            return t.reshape(prod(self.shape[: self.split]), 1, -1, 1)
        return t.reshape(len(t), self.groups or t.shape[1], -1, prod(self.shape[2:]))

    def parameter(self, p: Tensor) -> Tensor:
        if p.dim() > max(self.features, 1):  # a row for each part of the samples
            rows = prod(self.shape[: self.split]) if self.features else self.shape[0]
            each = p.repeat_interleave(rows // len(p), 0)
            if self.features:
                return self.view(each.reshape(self.shape))
            return self.view(
                each.reshape(*each.shape, *[1] * (len(self.shape) - 2)).expand(self.shape)
            )
        if not self.features:
            p = p.reshape(-1, *[1] * (len(self.shape) - 2))
        return self.view(p.expand(self.shape))

    @property
    def dims(self) -> list[int]:
        return [2, 3] if self.groups else [0, 2, 3]

    @property
    def of_mask(self) -> tuple[int, ...]:
        return self.shape[: self.split] if self.features else (self.shape[0], *self.shape[2:])

    @property
    def of_parameters(self) -> tuple[int, ...]:
        return self.shape[self.split :] if self.features else self.shape[1:2]


BATCH = Kind("batch", 0, (3, 5, 4, 3))
INSTANCE = Kind("instance", PER_CHANNEL, (2, 3, 5, 7), 3)
GROUP = Kind("group", 2 << 32, (2, 6, 3, 5), 2)
LAYER = Kind("layer", 1 << 24, (7, 21), 1, 1)
LAYERS = Kind("layer of two", 2 << 24, (3, 2, 4, 5), 1, 2)
RMS = Kind("rms", UNCENTRED | 1 << 24, (5, 19), 1, 1)
KINDS = [BATCH, INSTANCE, GROUP, LAYER, LAYERS, RMS]


def run(name: str, *args: Any) -> Any:
    from truenorm._triton import host

    with launches():
        return host.KERNELS[name](*args)


class Call(NamedTuple):
    kind: Kind
    x: Tensor
    weight: Tensor | None = None
    bias: Tensor | None = None
    mask: Tensor | None = None
    residual: Tensor | None = None
    given: tuple[Tensor, Tensor] | None = None
    act: int = 0
    bits: int = KEEP | NEEDS_ALL

    @property
    def form(self) -> int:
        return self.kind.bits | self.bits | self.act << 16

    def norm(self, name: str = "norm") -> Any:
        mean, var = self.given or (None, None)
        tensors = self.x, self.weight, self.bias, self.mask, self.residual, mean, var
        return run(name, *tensors, self.form, EPS, PARAMETER, PADDING)

    def statistics(self) -> Any:
        return run("statistics", self.x, self.mask, self.form)

    def backward(
        self, grad: Tensor, record: Tensor, sums: Tensor | None = None, y: Tensor | None = None
    ) -> Any:
        """y: in the residual's place."""
        form = self.form if y is None else self.form | BY_OUTPUT
        tensors = grad, self.x, record, self.weight, self.bias, self.mask
        residual = self.residual if y is None else y
        return run("norm_backward", *tensors, residual, sums, form, EPS, PARAMETER)

    def sums(self, grad: Tensor, record: Tensor) -> Any:
        tensors = grad, self.x, record, self.weight, self.bias, self.mask, self.residual
        return run("gradient_sums", *tensors, self.form, EPS, PARAMETER)

    @property
    def valid(self) -> Tensor:
        """Against x's view."""
        if self.mask is None:
            return torch.ones(self.x.shape, dtype=torch.bool).reshape(
                self.kind.view(self.x.cpu()).shape
            )
        v = self.kind.view(torch.empty(self.x.shape))
        return self.mask.cpu().reshape(len(v), 1, 1, -1).expand(v.shape)

    def exact(self, grad: Tensor) -> tuple[Tensor, Tensor, list[Tensor | None]]:
        """y, the record, and the gradients of x, weight, bias and residual, in float64."""
        tensors = self.x, self.weight, self.bias, self.residual
        leaves = [None if t is None else t.cpu().double().requires_grad_() for t in tensors]
        x, weight, bias, residual = leaves
        assert x is not None
        kind, dims, valid = self.kind, self.kind.dims, self.valid
        v = torch.where(valid, kind.view(x), 0.0)
        count = valid.sum(dims, keepdim=True).double()
        some = count.clamp(min=1)
        if self.given is not None:
            mean, var = (t.cpu().double().reshape(count.shape) for t in self.given)
            if not self.bits & CONSTANT:
                # as if they were x's own
                own = v.sum(dims, keepdim=True) / some
                mean = mean + own - own.detach()
                of_var = (torch.where(valid, v - mean, 0.0) ** 2).sum(dims, keepdim=True) / some
                var = var + of_var - of_var.detach()
        else:
            mean = v.sum(dims, keepdim=True) / some * (not kind.bits & UNCENTRED)
            var = (torch.where(valid, v - mean, 0.0) ** 2).sum(dims, keepdim=True) / some
        z = (v - mean) / (var + EPS).sqrt()
        one = float(bool(self.bits & ONE_PLUS))
        z = z if weight is None else z * kind.parameter(weight + one)
        z = z if bias is None else z + kind.parameter(bias)
        z = z if residual is None else z + torch.where(valid, kind.view(residual), 0.0)
        y = torch.where(valid, ACTIVATIONS[self.act](z, PARAMETER), PADDING)
        record = torch.stack([t.detach().reshape(-1) for t in (mean, var, count)])
        of_y = torch.where(valid, kind.view(grad.cpu().double()), 0.0)
        wanted = [t for t in leaves if t is not None]
        found = iter(torch.autograd.grad(y, wanted, of_y))
        gradients = [None if t is None else next(found) for t in leaves]
        return y.detach().reshape(self.x.shape), record, gradients


def place(t: Tensor, layout: str = "contiguous") -> Tensor:
    if layout == "rows":  # of a layer norm, in another order
        return t.to(DEVICE).transpose(0, 1).contiguous().transpose(0, 1)
    return LAYOUTS[layout](t.to(DEVICE))


def call_of(
    kind: Kind, dtype: torch.dtype = torch.float32, layout: str = "contiguous", *,
    masked: bool = False, residual: bool = False, act: int = 0, offset: float = 0.0,
    scale: float = 1.0, parts: int = 0,
) -> Call:  # fmt: skip
    """Random values, NaN where they are not valid; of the first sample or row nothing is.

    parts: of the samples, with weights of their own.
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x = (torch.randn(kind.shape, dtype=torch.float64) * scale + offset).to(dtype)
    sizes = (parts,) * (parts > 0) + kind.of_parameters
    weight, bias = (torch.randn(sizes, dtype=wide).to(DEVICE) for _ in range(2))
    other = torch.randn(kind.shape, dtype=torch.float64).to(dtype)
    mask = None
    if masked:
        mask = torch.rand(kind.of_mask) < 0.6
        mask[0] = False
        mask.view(-1)[-1] = True
        mask = mask.to(DEVICE)
        hole = ~Call(kind, x, mask=mask).valid.reshape(kind.shape)
        x[hole] = other[hole] = float("nan")
    return Call(
        kind, place(x, layout), weight, None if kind is RMS else bias, mask,
        place(other, layout) if residual else None, act=act,
    )  # fmt: skip


def grad_of(call: Call, layout: str = "contiguous") -> Tensor:
    grad = torch.randn(call.x.shape, dtype=torch.float64).to(call.x.dtype)
    grad[~call.valid.reshape(call.x.shape)] = float("nan")
    return place(grad, layout)


def check_gradients(call: Call, found: Any, wanted: list[Tensor | None]) -> None:
    names = "x", "weight", "bias", "residual"
    for name, got, exact in zip(names, (t.cpu() for t in found), wanted, strict=True):
        if exact is None:
            continue
        # sums of what is computed in float32 are no better in a wider dtype
        if got.dtype in (torch.float32, torch.float64):
            bound = 1e-11 if call.x.dtype == torch.float64 else 5e-6
            assert relative(got, exact) <= bound, (name, relative(got, exact))
        else:
            assert_gradient(got, exact)
        assert got.dtype == (call.x if name in ("x", "residual") else call.weight).dtype  # type: ignore[union-attr]
        if name in ("x", "residual"):
            assert not call.kind.view(got)[~call.valid].any(), name


def check(call: Call, grad: Tensor) -> None:
    """Output, record and gradients are the formula's."""
    y, record = call.norm()
    exact, of_record, wanted = call.exact(grad)
    # that small a number is not normal in float32, or nearly not
    tail = (exact.abs() < 1e-30) & (y.cpu().abs() < 1e-30)
    assert_output(torch.where(tail, 0.0, y.cpu()), torch.where(tail, 0.0, exact))
    assert record.shape == of_record.shape
    assert torch.equal(record[2].cpu(), of_record[2])
    for got, right in zip(record[:2].cpu(), of_record, strict=False):
        assert relative(got, right) <= (1e-12 if call.x.dtype == torch.float64 else 2e-6)
    check_gradients(call, call.backward(grad, record), wanted)
