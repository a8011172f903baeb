"""The command `truenorm explain`."""

from __future__ import annotations

import argparse
import difflib
import re
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch.nn import Module

from ... import nn
from .. import files
from ..extras import CommandError
from .explanation import explain
from .layers import seeded_input
from .text import show

DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
# a random input of this many values takes 1 GB, and its float64 copies more
MAX_VALUES = 2**27

EXAMPLES = """examples:
  truenorm explain InstanceNorm1d 2 3 5
  truenorm explain BatchNorm2d 2 3 5 6 --picture batch.png
  truenorm explain GroupNorm 2 6 4 4 --num-groups 3
  truenorm explain LayerNorm 2 3 4 --normalized-shape 3 4
"""

OPTIONS = {
    "num_groups": ("GroupNorm",),
    "normalized_shape": ("LayerNorm", "RMSNorm"),
    "size": ("LocalResponseNorm",),
    "alpha": ("LocalResponseNorm",),
}


def add_parser(subparsers: Any) -> None:
    """Add `explain` to the command's parsers."""
    parser = subparsers.add_parser(
        "explain",
        help="work one layer out by hand on a small input",
        description="Print which values share a statistic, the result worked out by hand, and "
        "truenorm's and torch's beside it, for a random input of the given shape.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("layer", help="name of the layer, e.g. InstanceNorm1d")
    parser.add_argument("shape", nargs="+", help="sizes of the input, e.g. 2 3 5 (N C L)")
    parser.add_argument("--seed", type=int, default=0, help="of the random input (default 0)")
    parser.add_argument("--dtype", default="float32", help=f"one of {', '.join(DTYPES)}")
    parser.add_argument("--picture", type=Path, metavar="FILE.png", help="save a picture too")
    parser.add_argument("--force", action="store_true", help="replace a picture that exists")
    parser.add_argument("--eps", type=float, help="the layer's eps (default: the layer's own)")
    parser.add_argument("--num-groups", type=int, metavar="G", help="of GroupNorm")
    parser.add_argument(
        "--normalized-shape",
        type=int,
        nargs="+",
        metavar="SIZE",
        help="of LayerNorm and RMSNorm (default: the last dimension)",
    )
    parser.add_argument("--size", type=int, help="of LocalResponseNorm (default 3)")
    parser.add_argument("--alpha", type=float, help="of LocalResponseNorm (default 1e-4)")
    parser.set_defaults(func=run)


def _name(given: str) -> str:
    names = {name.lower(): name for name in nn.__all__}
    if given.lower() in names:
        return names[given.lower()]
    close = [name for name in names if name.startswith(given.lower())]
    close = close or difflib.get_close_matches(given.lower(), names, n=1)
    hint = f"did you mean {names[close[0]]}? " if close else ""
    known = ", ".join(nn.__all__)
    raise CommandError(f"`layer` (={given!r}) is unknown: {hint}choose from {known}")


def _shape(given: list[str]) -> tuple[int, ...]:
    text = " ".join(given)
    sizes = [size for size in re.split(r"[\s,x×()]+", text) if size]
    if not sizes or not all(size.isdecimal() and int(size) > 0 for size in sizes):
        raise CommandError(
            f"`shape` (={text!r}) must be positive whole numbers: e.g. 2 3 5 for 2 samples of "
            "3 channels of 5 values"
        )
    shape = tuple(int(size) for size in sizes)
    if prod(shape) > MAX_VALUES:
        raise CommandError(
            f"`shape` (={text!r}) has {prod(shape):,} values, and explain draws at most "
            f"{MAX_VALUES:,}: choose smaller sizes"
        )
    return shape


def _first_divisor(channels: int) -> int:
    return next((d for d in range(2, channels + 1) if channels % d == 0), 1)


def _build(name: str, shape: tuple[int, ...], args: argparse.Namespace) -> Module:
    for option, layers in OPTIONS.items():
        value = getattr(args, option)
        if value is not None and name not in layers:
            raise CommandError(
                f"--{option.replace('_', '-')} (={value}) is of {' and '.join(layers)}: leave it "
                f"out for {name}"
            )
    kind: Any = getattr(nn, name)
    eps = {} if args.eps is None else {"eps": args.eps}
    if name == "LocalResponseNorm":
        if eps:
            raise CommandError(f"--eps (={args.eps}): LocalResponseNorm has none, leave it out")
        size = 3 if args.size is None else args.size
        layer = kind(size) if args.alpha is None else kind(size, alpha=args.alpha)
    elif name in ("LayerNorm", "RMSNorm"):
        layer = kind(args.normalized_shape or shape[-1:], **eps)
    elif name.startswith("Lazy"):
        layer = kind(**eps)
    elif len(shape) == 1:
        raise CommandError(
            f"`shape` (={shape[0]}) has one dimension, but {name} takes at least two: (N, C, …)"
        )
    elif name == "GroupNorm":
        groups = _first_divisor(shape[1]) if args.num_groups is None else args.num_groups
        layer = kind(groups, shape[1], **eps)
    else:
        # InstanceNorm also takes one sample without the dimension N: (C, L), (C, H, W), …
        unbatched = name.startswith("InstanceNorm") and len(shape) == kind._dims[0]
        layer = kind(shape[0 if unbatched else 1], **eps)
    assert isinstance(layer, Module)
    return layer


def run(args: argparse.Namespace) -> int:
    """Explain the layer that the arguments name."""
    name, shape = _name(args.layer), _shape(args.shape)
    if args.dtype not in DTYPES:
        raise CommandError(f"--dtype (={args.dtype!r}) is unknown: choose from {', '.join(DTYPES)}")
    picture = args.picture
    if picture is not None and picture.suffix.lower() != ".png":
        raise CommandError(f"--picture (={str(picture)!r}) must be a PNG: end its name in .png")
    files.check_option("--picture", picture, force=args.force)
    dtype = DTYPES[args.dtype]
    try:
        layer = _build(name, shape, args).to(dtype)
        explanation = explain(layer, seeded_input(shape, args.seed).to(dtype))
    except (ValueError, TypeError, RuntimeError, NotImplementedError) as error:
        raise CommandError(" ".join(str(error).split())) from error
    if picture is not None:
        try:
            explanation.save_picture(picture, force=args.force)
        except OSError as error:
            raise CommandError(
                f"--picture (={str(picture)!r}) cannot be written: {error.strerror or error}"
            ) from error
    show(explanation)
    if picture is not None:
        print(f"\npicture: {picture}")
    return 0
