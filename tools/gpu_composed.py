"""What torch composes of several operators and a kernel does at once, for gpu_stages.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from truenorm import functional
from truenorm._core.call import AS_GIVEN
from truenorm._core.rule import Rule
from truenorm.nn import _orders

Made = tuple[Callable[[], Any], Callable[[], Any], list[Tensor]]


class Composed(NamedTuple):
    """make: (ours, torch's, what has a gradient), of a shape's tensors."""

    name: str
    make: Callable[[tuple[int, ...], Callable[..., Tensor]], Made]
    shape: tuple[int, ...]
    tiny: tuple[int, ...]


def _modulated(shape: tuple[int, ...], drawn: Callable[..., Tensor]) -> Made:
    """AdaLN: (N, T, C), a scale and a shift for each sample."""
    n, _, c = shape
    x, scale, shift = drawn(*shape), drawn(n, c), drawn(n, c)

    def theirs() -> Tensor:
        return F.layer_norm(x, (c,)) * (1 + scale[:, None]) + shift[:, None]

    return lambda: functional.layer_norm(x, (c,), scale=scale, shift=shift), theirs, [
        x, scale, shift,
    ]  # fmt: skip


def _added(shape: tuple[int, ...], drawn: Callable[..., Tensor]) -> Made:
    size = shape[-1:]
    x, r, weight, bias = drawn(*shape), drawn(*shape), drawn(*size), drawn(*size)

    def theirs() -> tuple[Tensor, Tensor]:
        h = x + r
        return F.layer_norm(h, size, weight, bias), h

    return lambda: functional.add_layer_norm(x, r, size, weight, bias), theirs, [x, r, weight, bias]


def _of_image(shape: tuple[int, ...], drawn: Callable[..., Tensor]) -> Made:
    """Over the channels of (N, C, H, W), by way of two permutations."""
    x, weight, bias = drawn(*shape), drawn(shape[1]), drawn(shape[1])

    def by(norm: Callable[..., Tensor]) -> Callable[[], Tensor]:
        args = (shape[1],), weight, bias
        return lambda: norm(x.permute(0, 2, 3, 1), *args).permute(0, 3, 1, 2)

    return by(functional.layer_norm), by(F.layer_norm), [x, weight, bias]


def _as_given(shape: tuple[int, ...], drawn: Callable[..., Tensor]) -> Made:
    """The same, of which the result is contiguous too, as people write it by hand."""
    x, weight, bias = drawn(*shape), drawn(shape[1]), drawn(shape[1])

    def ours() -> Tensor:
        y = _orders._kernel(x.movedim(1, -1), weight, bias, 1e-5, "layer", AS_GIVEN)
        return y.movedim(-1, 1)

    def theirs() -> Tensor:
        mean, var = x.mean(1, keepdim=True), x.var(1, unbiased=False, keepdim=True)
        y = (x - mean) / torch.sqrt(var + 1e-5)
        return y * weight[:, None, None] + bias[:, None, None]

    return ours, theirs, [x, weight, bias]


def _of_heads(shape: tuple[int, ...], drawn: Callable[..., Tensor]) -> Made:
    """Of queries (B, H, S, D), a part of what one product gave."""
    b, h, s, d = shape
    product, weight = drawn(b, s, 3, h, d), drawn(d)
    q = product[:, :, 0].transpose(1, 2)

    return (
        lambda: functional.rms_norm(q, (d,), weight, 1e-6),
        lambda: F.rms_norm(q, (d,), weight, 1e-6),
        [product, weight],
    )


def _gate_before(shape: tuple[int, ...], drawn: Callable[..., Tensor]) -> Made:
    """Mamba2's: x and gate are parts of what one product gave."""
    n, c = shape
    product, weight = drawn(n, 2 * c), drawn(c)
    x, gate = product.chunk(2, 1)
    rule = Rule("rms", "cast_first", gate="before")

    def theirs() -> Tensor:
        h = x.float() * F.silu(gate.float())
        return weight * (h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-5)).to(x.dtype)

    return lambda: _orders.gated(x, gate, weight, 1e-5, rule, 1), theirs, [product, weight]


def _gate_after(shape: tuple[int, ...], drawn: Callable[..., Tensor]) -> Made:
    """Qwen3-Next's, of heads."""
    x, gate, weight = drawn(*shape), drawn(*shape), drawn(shape[-1])
    rule = Rule("rms", "cast_first", gate="after")

    def theirs() -> Tensor:
        wide = x.float()
        x_hat = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)
        return (weight * x_hat.to(x.dtype) * F.silu(gate.float())).to(x.dtype)

    return lambda: _orders.gated(x, gate, weight, 1e-6, rule, 1), theirs, [x, gate, weight]


COMPOSED = [
    Composed("scale and shift", _modulated, (32, 1024, 1152), (2, 3, 8)),
    Composed("sum and norm", _added, (16384, 4096), (3, 8)),
    Composed("channels of an image", _of_image, (32, 192, 56, 56), (2, 6, 3, 5)),
    Composed("channels of an image, as given", _as_given, (32, 192, 56, 56), (2, 6, 3, 5)),
    Composed("heads", _of_heads, (4, 32, 2048, 128), (2, 3, 5, 16)),
    Composed("gate before the norm", _gate_before, (8192, 8192), (3, 16)),
    Composed("gate after the norm", _gate_after, (262144, 128), (3, 16)),
]


def made(case: Composed, dtype: torch.dtype, device: str, tiny: bool) -> Made:
    generator = torch.Generator(device).manual_seed(20)

    def drawn(*shape: int) -> Tensor:
        values = torch.randn(shape, generator=generator, device=device).to(dtype)
        return values.requires_grad_()

    return case.make(case.tiny if tiny else case.shape, drawn)


def outputs(run: Callable[[], Any]) -> tuple[Tensor, ...]:
    found = run()
    return found if isinstance(found, tuple) else (found,)


def steps(run: Callable[[], Any], leaves: list[Tensor]) -> list[Callable[[], object]]:
    """Forward, and forward with the backward."""
    grads = [torch.randn_like(y) for y in outputs(run)]
    return [run, lambda: torch.autograd.grad(outputs(run), leaves, grads)]


def difference(ours: Callable[[], Any], theirs: Callable[[], Any]) -> float:
    """Between the outputs, of the larger value."""
    pairs = zip(outputs(ours), outputs(theirs), strict=True)
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)
