"""Other libraries' norms: the class's own time over truenorm's, forward, then with the backward.

    python tools/measure_rules.py [--rounds N] [--bound] [WORD …]

The two take turns in one process, on one thread; what is printed is the median of the pairs' ratios
(above 1: truenorm is faster), by the thread's own clock. --bound has in truenorm's place a product
of the input and a number, the least that a call can be. Words pick the cases whose name has one of
them; a library that is not installed is left out.
"""

from __future__ import annotations

import argparse
import copy
import functools
import importlib
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Module

import truenorm

F32, BF16 = torch.float32, torch.bfloat16
Input = Callable[[torch.dtype], Tensor]


class Case(NamedTuple):
    name: str
    make: Callable[[], Module]
    input: Input
    dtypes: tuple[torch.dtype, ...] = (F32, BF16)
    training: bool = True
    gate: bool = False  # whether a second input of the same shape goes with it


def _of(path: str, *args: Any, **kwargs: Any) -> Callable[[], Module]:
    """A class by its module and name, built."""
    where, _, name = path.rpartition(".")
    kind = getattr(importlib.import_module(where), name)
    return lambda: kind(*args, **kwargs)  # type: ignore[no-any-return]


def _rows(*shape: int) -> Input:
    return lambda dtype: torch.randn(shape).to(dtype)


def _heads(dtype: torch.dtype) -> Tensor:
    return torch.randn(2, 128, 8, 64).to(dtype).transpose(1, 2)


def _last(*shape: int) -> Input:
    return lambda dtype: torch.randn(shape).to(dtype, memory_format=torch.channels_last)


def _transformers() -> Iterator[Case]:
    models = "transformers.models."
    wide, small = _rows(4, 64, 1024), _rows(2, 16, 64)
    llama, gemma = "llama.modeling_llama.LlamaRMSNorm", "gemma.modeling_gemma.GemmaRMSNorm"
    t5, cohere = "t5.modeling_t5.T5LayerNorm", "cohere.modeling_cohere.CohereLayerNorm"
    for path in (llama, gemma, t5, cohere):
        kind = path.rpartition(".")[2]
        yield Case(f"{kind} (4, 64, 1024)", _of(models + path, 1024), wide)
        yield Case(f"{kind} (2, 16, 64)", _of(models + path, 64), small)
    for shape in ((2, 128, 64, 128), (2, 32, 16, 64), (2, 16, 4, 8), (1, 1, 64, 128)):
        per_head = _of(models + cohere, shape[-2:])
        yield Case(f"CohereLayerNorm of heads {shape}", per_head, _rows(*shape))
    yield Case("LlamaRMSNorm of heads, strided", _of(models + llama, 64), _heads)
    gated = {
        "mamba2.modeling_mamba2.MambaRMSNormGated": {"group_size": 512},
        "qwen3_next.modeling_qwen3_next.Qwen3NextRMSNormGated": {},
        "kimi_linear.modeling_kimi_linear.KimiLinearRMSNormGated": {},
    }
    for path, options in gated.items():
        kind = path.rpartition(".")[2]
        for rows, size in (((4, 64, 1024), 1024), ((2, 16, 64), 64), ((2, 64), 64)):
            few = {key: min(value, size) for key, value in options.items()}
            made = _of(models + path, size, **few)
            yield Case(f"{kind} {rows}", made, _rows(*rows), gate=True)
    deberta = _of(models + "deberta.modeling_deberta.DebertaLayerNorm", 768)
    yield Case("DebertaLayerNorm (4, 64, 768)", deberta, _rows(4, 64, 768))
    convnext = models + "convnext.modeling_convnext.ConvNextLayerNorm"
    over = _of(convnext, 96, data_format="channels_first")
    yield Case("ConvNextLayerNorm (2, 96, 56, 56)", over, _rows(2, 96, 56, 56))
    yield Case("ConvNextLayerNorm channels_last", over, _last(2, 96, 56, 56))
    grn = _of(models + "convnextv2.modeling_convnextv2.ConvNextV2GRN", 384)
    yield Case("ConvNextV2GRN (4, 28, 28, 384)", grn, _rows(4, 28, 28, 384), (F32,))
    yield Case("ConvNextV2GRN (1, 4, 4, 384)", grn, _rows(1, 4, 4, 384), (F32,))


def _timm() -> Iterator[Case]:
    layers = "timm.layers."
    images, last = _rows(8, 64, 28, 28), _last(8, 64, 28, 28)
    for training in (True, False):
        mode = "training" if training else "evaluation"
        for act in (torch.nn.ReLU, torch.nn.SiLU):
            made = _of(layers + "BatchNormAct2d", 64, act_layer=act)
            name = f"BatchNormAct2d {act.__name__} {mode}"
            yield Case(f"{name} (8, 64, 28, 28)", made, images, training=training)
            yield Case(f"{name} channels_last", made, last, training=training)
    tokens = _rows(8, 197, 384)
    yield Case("timm LayerNorm (8, 197, 384)", _of(layers + "LayerNorm", 384), tokens)
    yield Case("timm LayerNorm (2, 16)", _of(layers + "LayerNorm", 16), _rows(2, 16))
    yield Case("timm LayerNorm2d (8, 64, 28, 28)", _of(layers + "LayerNorm2d", 64), images)
    yield Case("timm LayerNorm2d channels_last", _of(layers + "LayerNorm2d", 64), last)
    yield Case("timm RmsNorm (8, 197, 384)", _of(layers + "RmsNorm", 384), tokens)
    for kind in ("StdConv2d", "ScaledStdConv2dSame"):
        for size, side in ((64, 28), (256, 14), (512, 7), (8, 4)):
            conv = _of(f"{layers}std_conv.{kind}", size, size, 3)
            yield Case(
                f"{kind} (4, {size}, {side}, {side})", conv, _rows(4, size, side, side), (F32,)
            )
    grn = _of(layers + "grn.GlobalResponseNorm", 256, channels_last=False)
    yield Case("GlobalResponseNorm (4, 256, 28, 28)", grn, _rows(4, 256, 28, 28), (F32,))
    group = _of(layers + "GroupNormAct", 64, 32, act_layer=torch.nn.SiLU)
    yield Case("GroupNormAct SiLU (8, 64, 28, 28)", group, images)
    yield Case("GroupNorm1 (8, 64, 28, 28)", _of(layers + "GroupNorm1", 64), images)


def _diffusers() -> Iterator[Case]:
    module = "diffusers.models.normalization."
    tokens = _rows(2, 256, 1152)
    yield Case("diffusers RMSNorm", _of(module + "RMSNorm", 1152, 1e-6), tokens)
    wan = _of("diffusers.models.autoencoders.autoencoder_kl_wan.WanRMS_norm", 96)
    yield Case("WanRMS_norm (2, 96, 48, 48)", wan, _rows(2, 96, 48, 48), (F32,))
    yield Case("WanRMS_norm channels_last", wan, _last(2, 96, 48, 48), (F32,))
    yield Case("diffusers FP32LayerNorm", _of(module + "FP32LayerNorm", 1152), tokens)


class UnitNorm(Module):
    """x / ‖x‖ · √C · g over one axis, as many models have it."""

    def __init__(self, axis: int, *shape: int) -> None:
        super().__init__()
        self.gamma = torch.nn.Parameter(torch.ones(shape))
        self.axis = axis

    def forward(self, x: Tensor) -> Tensor:
        return (
            torch.nn.functional.normalize(x, dim=self.axis) * x.shape[self.axis] ** 0.5 * self.gamma
        )


class ChannelNorm(Module):
    """LayerNorm over an image's channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.g = torch.nn.Parameter(torch.ones(1, channels, 1, 1))
        self.b = torch.nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        mean, var = x.mean(1, keepdim=True), x.var(1, unbiased=False, keepdim=True)
        return (x - mean) / (var + 1e-5).sqrt() * self.g + self.b


def _by_hand() -> Iterator[Case]:
    for shape in ((4, 64, 1024), (2, 16, 64)):
        unit = functools.partial(UnitNorm, -1, shape[-1])
        yield Case(f"by hand, unit {shape}", unit, _rows(*shape), (F32,))
    for shape in ((2, 8, 256, 64), (2, 4, 16, 32)):
        heads = functools.partial(UnitNorm, -1, shape[1], 1, shape[-1])
        yield Case(f"by hand, unit per head {shape}", heads, _rows(*shape), (F32,))
    for shape in ((4, 64, 32, 32), (2, 16, 8, 8)):
        of_channels = functools.partial(UnitNorm, 1, 1, shape[1], 1, 1)
        for name, made in (
            ("unit", of_channels),
            ("layer", functools.partial(ChannelNorm, shape[1])),
        ):
            yield Case(f"by hand, {name} over channels {shape}", made, _rows(*shape), (F32,))
            yield Case(f"by hand, {name} channels_last {shape}", made, _last(*shape), (F32,))


def cases() -> Iterator[Case]:
    for library in (_transformers, _timm, _diffusers, _by_hand):
        try:
            yield from library()
        except ImportError as error:
            print(f"{library.__name__.strip('_')} is left out: {error}")


class Product(Module):
    """One pass forward and one backward, by torch's own nodes."""

    def forward(self, x: Tensor, *_: Tensor) -> Tensor:
        return x * 1.5


def _once(module: Module, given: tuple[Tensor, ...], grad: Tensor | None) -> float:
    begin = time.thread_time()
    y = module(*given)
    if grad is not None:
        y.backward(grad)
    return time.thread_time() - begin


def ratios(theirs: Module, ours: Module, given: tuple[Tensor, ...], rounds: int) -> Iterator[float]:
    """Their time over ours, forward, then with the backward."""
    for backward in (False, True):
        with torch.set_grad_enabled(backward):
            given = tuple(x.detach().requires_grad_(backward) for x in given)
            grad = torch.randn_like(theirs(*given)) if backward else None
            # short calls in bursts, so that a pair is longer than the clock's grain
            start = time.perf_counter()
            for _ in range(3):
                _once(theirs, given, grad)
            times = max(1, int(3e-3 / max((time.perf_counter() - start) / 3, 1e-7)))
            found = []
            for _ in range(rounds):
                pair = [sum(_once(m, given, grad) for _ in range(times)) for m in (theirs, ours)]
                found.append(pair[0] / pair[1])
            yield statistics.median(found[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--bound", action="store_true", help="a product, in truenorm's place")
    parser.add_argument("words", nargs="*")
    options = parser.parse_args()
    torch.set_num_threads(1)
    every: list[list[float]] = [[], []]
    for case in cases():
        if options.words and not any(word in case.name for word in options.words):
            continue
        for dtype in case.dtypes:
            theirs = case.make().to(dtype).train(case.training)
            ours = truenorm.convert(torch.nn.Sequential(copy.deepcopy(theirs)))[0]
            swapped = "" if type(ours) is not type(theirs) else "  (not swapped)"
            given = tuple(case.input(dtype) for _ in range(1 + case.gate))
            second = Product() if options.bound else ours
            pair = list(ratios(theirs, second, given, options.rounds))
            for kept, ratio in zip(every, pair, strict=True):
                kept.append(ratio)
            said = ", ".join(f"{ratio:.2f}" for ratio in pair)
            print(f"{case.name}, {str(dtype).removeprefix('torch.')}: {said}{swapped}", flush=True)
    if every[0]:
        means = ", ".join(f"{statistics.geometric_mean(kept):.2f}" for kept in every)
        print(f"geometric mean: {means}")


if __name__ == "__main__":
    main()
