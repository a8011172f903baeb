"""How often a call's input is handed on between truenorm's own modules, from a layer to its kernel.

    tools/count_handoffs.py
    tools/count_handoffs.py "BatchNorm2d(8, renorm=True)" --shape 4,8,3,5 --mask --residual

A hand-on is a frame of truenorm's that is given the input, or another tensor of the same memory, by
a frame of another of its modules; it goes back up where that module is one that the input had come
through and is still in. Forward alone, at the second call, by what the interpreter tells a profile.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor

import truenorm
import truenorm.functional as F


class Counted(NamedTuple):
    """Frames that the input is handed to: all, those that check it, and those back up."""

    handed: int
    to_checks: int
    back: int
    modules: int
    way: list[str]


def _module(frame: FrameType) -> str | None:
    name = frame.f_globals.get("__name__", "")
    return name if name.split(".")[0] == "truenorm" else None


def _given(frame: FrameType) -> Iterator[Any]:
    """The frame's arguments, and what is in those that hold several."""
    code = frame.f_code
    several = bool(code.co_flags & 4) + bool(code.co_flags & 8)
    for name in code.co_varnames[: code.co_argcount + code.co_kwonlyargcount + several]:
        value = frame.f_locals.get(name)
        yield value
        if isinstance(value, (tuple, list)):
            yield from value
        elif isinstance(value, dict):
            yield from value.values()


def counted(call: Callable[[], Any], x: Tensor) -> Counted:
    memory = x.untyped_storage().data_ptr()
    handed: list[tuple[str, bool, str]] = []

    def is_input(value: Any) -> bool:
        return isinstance(value, Tensor) and value.untyped_storage().data_ptr() == memory

    def seen(frame: FrameType, event: str, _: Any) -> None:
        if event != "call" or (here := _module(frame)) is None:
            return
        if not any(is_input(value) for value in _given(frame)):
            return
        above, passed = frame.f_back, []
        while above is not None:
            if (module := _module(above)) is not None:
                passed.append(module)
            above = above.f_back
        if passed and passed[0] != here:
            name = f"{here.removeprefix('truenorm.')}.{frame.f_code.co_name}"
            handed.append((here, here in passed, name))

    call()
    sys.setprofile(seen)
    try:
        call()
    finally:
        sys.setprofile(None)
    return Counted(
        len(handed),
        sum("checks" in module for module, *_ in handed),
        sum(back for _, back, _ in handed),
        len({module for module, *_ in handed}),
        [name + " (back)" * back for _, back, name in handed],
    )


def _call(layer: Any, x: Tensor, **given: Any) -> Callable[[], Any]:
    return lambda: layer(x, **given)


def cases() -> Iterator[tuple[str, Callable[[], Any], Tensor]]:
    x = torch.randn(4, 8, 6, requires_grad=True)
    mask = torch.rand(4, 6) < 0.7
    mean, var, weight, bias = torch.zeros(8), torch.ones(8), torch.ones(8), torch.zeros(8)
    statistics = mean, var, weight, bias
    batch, residual = truenorm.BatchNorm1d, torch.randn(4, 8, 6)
    yield "functional.batch_norm", lambda: F.batch_norm(x, *statistics, training=True), x
    yield (
        "functional.batch_norm, mask",
        lambda: F.batch_norm(x, *statistics, training=True, mask=mask),
        x,
    )
    yield "functional.batch_norm, evaluation", lambda: F.batch_norm(x, *statistics), x
    yield "BatchNorm1d", _call(batch(8), x), x
    yield "BatchNorm1d, mask", _call(batch(8), x, mask=mask), x
    after = batch(8, activation="relu")
    yield "BatchNorm1d, activation and residual", _call(after, x, residual=residual), x
    yield (
        "BatchNorm1d, mask, activation and residual",
        _call(batch(8, activation="relu"), x, mask=mask, residual=residual),
        x,
    )
    yield "BatchNorm1d, renorm", _call(batch(8, renorm=True), x), x
    yield "BatchNorm1d, process_group=None", _call(batch(8, process_group=None), x), x
    yield "BatchNorm1d, evaluation", _call(batch(8).eval(), x), x
    yield "SyncBatchNorm, one process", _call(truenorm.SyncBatchNorm(8), x), x
    yield "LayerNorm", _call(truenorm.LayerNorm(6), x), x


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("layer", nargs="?", help='a layer to count, "BatchNorm1d(8, renorm=True)"')
    parser.add_argument("--shape", default="4,8,6", help="of the layer's input")
    parser.add_argument("--mask", action="store_true", help="call it with a mask")
    parser.add_argument("--residual", action="store_true", help="call it with a residual")
    parser.add_argument("--eval", action="store_true", help="call it in evaluation")
    parser.add_argument("--way", action="store_true", help="name every frame")
    args = parser.parse_args()
    torch.set_num_threads(1)
    chosen = list(cases()) if args.layer is None else []
    if args.layer is not None:
        layer = eval(args.layer, vars(truenorm)).train(not args.eval)
        x = torch.randn([int(size) for size in args.shape.split(",")], requires_grad=True)
        given: dict[str, Any] = {}
        if args.mask:
            rows = isinstance(layer, (truenorm.LayerNorm, truenorm.RMSNorm))
            trailing = x.shape[: x.dim() - len(layer.normalized_shape)] if rows else ()
            given["mask"] = torch.rand(trailing or (x.shape[0], *x.shape[2:])) < 0.7
        if args.residual:
            given["residual"] = torch.randn(x.shape)
        chosen = [(args.layer, _call(layer, x, **given), x)]
    width = max(len(name) for name, *_ in chosen)
    print(f"{'':{width}}  handed on  to checks  back up  modules")
    for name, call, x in chosen:
        found = counted(call, x)
        numbers = f"{found.handed:9}  {found.to_checks:9}  {found.back:7}  {found.modules:7}"
        print(f"{name:{width}}  {numbers}")
        if args.way:
            print("".join(f"    {step}\n" for step in found.way), end="")


if __name__ == "__main__":
    main()
