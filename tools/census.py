"""How many models of other libraries convert reaches: each is built on the meta device from its
default config, and surveyed.

    python tools/census.py transformers timm diffusers torchvision --seconds 20

A model that takes longer to build than its seconds, or cannot be built, is left out and counted.
With --json FILE the reasons and classes of what is left are written too.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import inspect
import io
import json
import logging
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.nn import Module

import truenorm

Factory = Callable[[], Module]


def _transformers() -> Iterator[tuple[str, Factory]]:
    from transformers import AutoConfig, AutoModel
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    for name in MODEL_MAPPING_NAMES:

        def make(name: str = name) -> Module:
            config = AutoConfig.for_model(name)
            for part in (config, *(vars(config).get(k) for k in ("text_config", "vision_config"))):
                # a norm of every kind stands in the first layers
                for key in ("num_hidden_layers", "n_layer", "num_layers"):
                    if isinstance(getattr(part, key, None), int):
                        with contextlib.suppress(Exception):
                            setattr(part, key, min(getattr(part, key), 4))
            try:
                return AutoModel.from_config(config)
            except Exception:
                return AutoModel.from_config(AutoConfig.for_model(name))

        yield name, make


def _timm() -> Iterator[tuple[str, Factory]]:
    import timm

    for name in timm.list_models():
        yield name, lambda name=name: timm.create_model(name)  # type: ignore[misc]


def _torchvision() -> Iterator[tuple[str, Factory]]:
    from torchvision import models

    for name in models.list_models():
        yield (
            name,
            lambda name=name: (
                models.get_model(name, weights=None, weights_backbone=None)  # type: ignore[misc]
                if "weights_backbone"
                in inspect.signature(models.get_model_builder(name)).parameters
                else models.get_model(name, weights=None)
            ),
        )


def _diffusers() -> Iterator[tuple[str, Factory]]:
    import diffusers

    for name in sorted(diffusers._import_structure["models"]):
        kind = getattr(diffusers, name, None)
        if inspect.isclass(kind) and issubclass(kind, Module):
            yield name, kind


LIBRARIES = {
    "transformers": _transformers,
    "timm": _timm,
    "torchvision": _torchvision,
    "diffusers": _diffusers,
}


def _too_long(*_: Any) -> None:
    raise TimeoutError


def census(library: str, seconds: int, every: int, limit: float) -> dict[str, Any]:
    """Counts of models and layers, and what is left."""
    counts: Counter[str] = Counter()
    classes: Counter[str] = Counter()
    reasons: dict[str, str] = {}
    start = time.monotonic()
    for index, (_, make) in enumerate(LIBRARIES[library]()):
        if index % every:
            continue
        if time.monotonic() - start > limit:
            counts["not reached in time"] += 1
            continue
        signal.alarm(seconds)
        try:
            with torch.device("meta"), contextlib.redirect_stdout(io.StringIO()):
                model = make()
            found = truenorm.survey(model)
        except (Exception, SystemExit):
            counts["not built"] += 1
            continue
        finally:
            signal.alarm(0)
        if not found.norms:
            counts["without norms"] += 1
            continue
        counts["with norms"] += 1
        which = "all" if not found.left else "some" if found.swappable else "none"
        counts[which] += 1
        counts["layers"] += len(found.norms)
        counts["layers swapped"] += found.swappable
        for kind, reason in {(n.kind, n.reason) for n in found.norms if not n.swappable}:
            classes[kind] += 1
            reasons[kind] = reason
    left = [{"class": k, "models": n, "reason": reasons[k]} for k, n in classes.most_common()]
    return {"library": library, **counts, "left": left}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("library", nargs="+", choices=LIBRARIES)
    parser.add_argument("--seconds", type=int, default=20, help="for each model")
    parser.add_argument("--limit", type=float, default=1e9, help="seconds for each library")
    parser.add_argument("--every", type=int, default=1, help="a sample: every so many models")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    signal.signal(signal.SIGALRM, _too_long)
    rows = []
    print(
        f"{'library':14}{'with norms':>11}{'all':>6}{'some':>6}{'none':>6}"
        f"{'layers':>8}{'swapped':>9}"
    )
    for library in args.library:
        try:
            importlib.import_module(library)
        except Exception as error:
            print(f"{library}: {error}", file=sys.stderr)
            continue
        row = census(library, args.seconds, args.every, args.limit)
        rows.append(row)
        share = row.get("layers swapped", 0) / max(row.get("layers", 0), 1)
        cells = (row.get(k, 0) for k in ("with norms", "all", "some", "none", "layers"))
        widths = (11, 6, 6, 6, 8)
        numbers = "".join(f"{c:>{w}}" for c, w in zip(cells, widths, strict=True))
        print(f"{library:14}{numbers}{share:>9.1%}", flush=True)
        rest = ("not built", "without norms", "not reached in time")
        print("  " + ", ".join(f"{key}: {row.get(key, 0)}" for key in rest))
        for each in row["left"][:25]:
            print(f"  left in {each['models']}: {each['class']}: {each['reason'][:110]}")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
