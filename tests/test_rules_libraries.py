"""Norms of detectron2, MONAI, segment-anything, torchtitan and ultralytics.

Where a library is here, its own class is tried. Elsewhere a class of the same qualified name stands
in for it, with the formula that the library documents, written for this test.
"""

from __future__ import annotations

import copy
import importlib
import subprocess
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_rules import BF16, F32, Holder, close, drawn
from torch import Tensor, nn
from torch.nn import Module
from torch.nn.functional import rms_norm, silu

import truenorm
from truenorm.nn._ruled import Ruled

SIZE = 24


class Weights(Module):
    """A stand-in's tensors."""

    def __init__(self, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(SIZE))
        self.eps = eps


class OverChannels(Weights):
    """Mean and variance over dimension 1, step by step."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(SIZE))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(1, keepdim=True)
        x = x - mean
        x = x / torch.sqrt((x * x).mean(1, keepdim=True) + self.eps)
        return self.weight.view(-1, 1, 1) * x + self.bias.view(-1, 1, 1)


class OverChannelsByTorch(OverChannels):
    def forward(self, x: Tensor) -> Tensor:
        last = x.movedim(1, -1)
        y = nn.functional.layer_norm(last, (SIZE,), self.weight, self.bias, self.eps)
        return y.movedim(-1, 1)


class Frozen(Module):
    """x · scale + shift in x's dtype; torch's operator where no gradient is wanted."""

    def __init__(self) -> None:
        super().__init__()
        self.eps = 1e-5
        for name, start in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0)):
            self.register_buffer(name, torch.full((SIZE,), start))
        self.register_buffer("running_var", torch.ones(SIZE) - self.eps)
        self.register_buffer("num_batches_tracked", None)

    def forward(self, x: Tensor) -> Tensor:
        held: Any = self
        if not x.requires_grad:
            stats = held.running_mean, held.running_var, held.weight, held.bias
            return nn.functional.batch_norm(x, *stats, training=False, eps=self.eps)
        scale = held.weight * (held.running_var + self.eps).rsqrt()
        shift = (held.bias - held.running_mean * scale).view(-1, 1, 1)
        return x * scale.view(-1, 1, 1).to(x.dtype) + shift.to(x.dtype)


class Groups(nn.GroupNorm):
    """In float32, and so is its output; of volumes alone."""

    def __init__(self) -> None:
        super().__init__(4, SIZE)
        self.norm_float16 = False

    def forward(self, input: Tensor) -> Tensor:
        if input.dim() != 5:
            raise ValueError("Expected a 5D tensor")
        rows = input.float().reshape(len(input), self.num_groups, -1)
        rows = rows - rows.mean(-1, keepdim=True)
        rows = rows / rows.var(-1, unbiased=False, keepdim=True).add(self.eps).sqrt()
        y = rows.reshape(input.shape)
        return y * self.weight.view(-1, 1, 1, 1) + self.bias.view(-1, 1, 1, 1)


class Offset(Weights):
    def forward(self, x: Tensor) -> Tensor:
        wide = rms_norm(x.float(), (SIZE,), None, self.eps)
        return ((1.0 + self.weight.float()) * wide).to(x.dtype)


class Gated(Weights):
    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        y = (self.weight.float() * rms_norm(x.float(), (SIZE,), None, self.eps)).to(x.dtype)
        return (y * silu(gate.float())).to(x.dtype)


class GainCenter(nn.RMSNorm):
    def __init__(self) -> None:
        super().__init__(SIZE, eps=1e-5)
        self.gain_center = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, (SIZE,), self.weight + self.gain_center, self.eps)


class Inherited(nn.RMSNorm):
    """A configurable torch.nn.RMSNorm: the forward is torch's."""

    def __init__(self) -> None:
        super().__init__(SIZE, eps=1e-5)


IMAGE, VOLUME, ROWS = (2, SIZE, 10, 8), (2, SIZE, 3, 5, 4), (3, 9, SIZE)
CASES: dict[str, tuple[type[Module], tuple[Any, ...], tuple[int, ...], str]] = {
    "detectron2.layers.batch_norm.FrozenBatchNorm2d": (
        Frozen, (SIZE,), IMAGE, "frozen, steps, over channels",
    ),
    "detectron2.layers.batch_norm.LayerNorm": (
        OverChannels, (SIZE,), IMAGE, "layer, steps, over channels",
    ),
    "segment_anything.modeling.common.LayerNorm2d": (
        OverChannels, (SIZE,), IMAGE, "layer, steps, over channels",
    ),
    "ultralytics.nn.modules.transformer.LayerNorm2d": (
        OverChannelsByTorch, (SIZE,), IMAGE, "layer, once, over channels",
    ),
    "monai.apps.generation.maisi.networks.autoencoderkl_maisi.MaisiGroupNorm3D": (
        Groups, (4, SIZE), VOLUME, "group, steps, over channels",
    ),
    "torchtitan.models.qwen3_5.model.OffsetRMSNorm": (Offset, (), ROWS, "rms, once, 1 + weight"),
    "torchtitan.models.qwen3_5.model.RMSNormGated": (
        Gated, (), ROWS, "rms, once, then · silu(gate)",
    ),
    "torchtitan.models.muse_glimmer.model.RMSGainCenterNorm": (
        GainCenter, (), ROWS, "rms, once, 1 + weight",
    ),
    "torchtitan.models.common.nn_modules.RMSNorm": (Inherited, (), ROWS, "rms"),
}  # fmt: skip


def made(path: str, stands: type[Module], args: tuple[Any, ...]) -> Module:
    where, _, name = path.rpartition(".")
    kind: Callable[..., Module]
    try:
        if not args:
            raise ImportError("built from a config of its own")
        kind = getattr(importlib.import_module(where), name)
    except Exception:  # not here, or not with what it needs
        kind, args = types.new_class(name, (stands,)), ()
        vars_of: Any = kind
        vars_of.__module__, vars_of.__qualname__ = where, name
        if "forward" in vars(stands):
            vars_of.forward = stands.forward  # the class that a forward is from is the library's
    return drawn(kind(*args))


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[Module, tuple[int, ...], str]:
    stands, args, shape, formula = CASES[request.param]
    return made(request.param, stands, args), shape, formula


def test_the_same_numbers(case: tuple[Module, tuple[int, ...], str]) -> None:
    theirs, shape, formula = case
    row = truenorm.survey(Holder(theirs)).norms[0]
    assert (row.formula, row.swappable) == (formula, True)
    for dtype in (F32, BF16):
        theirs = theirs.to(dtype)
        ours = truenorm.convert(Holder(copy.deepcopy(theirs))).norm
        generator = torch.Generator().manual_seed(5)
        count = 2 if "gate" in formula else 1
        inputs = [torch.randn(shape, generator=generator).to(dtype) for _ in range(count)]
        layouts = [inputs]
        if len(shape) == 4:
            layouts.append([x.to(memory_format=torch.channels_last) for x in inputs])
        for given in layouts:
            if isinstance(ours, Ruled) and dtype == F32:
                assert "over channels" in formula or ours._serve(*given) is not None
            outputs, gradients = [], []
            for module in (ours, theirs):
                leaves = [x.detach().requires_grad_() for x in given]
                outputs.append(module(*leaves))
                grad = torch.randn(shape, generator=torch.Generator().manual_seed(6))
                wanted = [*leaves, *module.parameters()]
                found = torch.autograd.grad(outputs[-1], wanted, grad.to(outputs[-1].dtype))
                gradients.append(found)
            close(*outputs)
            for actual, expected in zip(*gradients, strict=True):
                bound = 2e-5 if dtype == F32 else 3e-2
                error = (actual.double() - expected.double()).norm()
                assert error <= bound * expected.double().norm()


def test_no_library_is_imported() -> None:
    """The readers go by names."""
    names = sorted({path.partition(".")[0] for path in CASES})
    code = f"import truenorm, sys; print([n for n in {names} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
