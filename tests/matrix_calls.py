"""A combination's layer and tensors, and its call in each way: what truenorm makes of it."""

from __future__ import annotations

import builtins
import contextlib
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from cases import LAYOUTS
from matrix import BATCH, INSTANCE, ROWS, Case
from matrix_oracle import (
    ALPHA,
    DMAX,
    EPS,
    GHOST,
    GROUPS,
    MOMENTUM,
    PADDING,
    RMAX,
    SLOPE,
    Batch,
    State,
    axis_of,
    valid_of,
)
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from tracing import trace

import truenorm

POSITIONS = {"1d": (9,), "2d": (5, 3), "3d": (5, 2, 3)}
LENGTHS = [9, 4, 2, 6, 3, 7, 8, 5, 2, 9, 3]
CHANNELS = 6  # of three groups
# of each process: samples for statistics over the batch, else positions of the first dimension
RANKS = (5, 6)
POSITIONS_OF_RANKS = {"1d": (4, 5), "2d": (2, 3), "3d": (2, 3)}
_OPTIONS: dict[str, dict[str, Any]] = {
    "frozen": {"statistics_frozen": True},
    "ghost batches": {"virtual_batch_size": GHOST},
    "renorm": {"renorm": True, "rmax": RMAX, "dmax": DMAX},
    "on_single": {"on_single": "running"},
    "skip_nonfinite": {"skip_nonfinite": True},
    "process_group": {"process_group": "world"},
}


def dtype_of(case: Case) -> torch.dtype:
    return getattr(torch, case.dtype)  # type: ignore[no-any-return]


def tracks(case: Case) -> bool:
    return case.layer in (*BATCH, "InstanceNorm tracking")


def layer_of(case: Case) -> Any:
    """The layer, with parameters and statistics that no shortcut can guess."""
    kind = case.layer.removesuffix(" tracking")
    options: dict[str, Any] = {"eps": EPS}
    if case.activation != "no activation":
        options["activation"] = case.activation
    options |= {"leaky_relu": {"leaky_relu_slope": SLOPE}, "elu": {"elu_alpha": ALPHA}}.get(
        case.activation, {}
    )
    if case.channel_axis != "axis 1":
        options["channel_axis"] = -1
    for policy in case.policy.split(" + "):
        if (policy, kind) != ("process_group", "SyncBatchNorm"):  # which asks for no group
            options |= _OPTIONS.get(policy, {})
    if kind in ("BatchNorm", "InstanceNorm"):
        kind += case.rank
    if case.layer in INSTANCE:
        options |= {"affine": True, "track_running_stats": tracks(case)}
    if tracks(case):
        options["momentum"] = MOMENTUM
    args: dict[str, tuple[Any, ...]] = {
        "GroupNorm": (GROUPS, CHANNELS),
        **dict.fromkeys(ROWS, (POSITIONS[case.rank],)),
    }
    layer = getattr(truenorm, kind)(*args.get(kind, (CHANNELS,)), **options)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_().add_(0.3)
        if tracks(case):
            layer.running_mean.copy_(_offsets() + 0.6 * torch.randn(CHANNELS))
            layer.running_var.uniform_(1.5, 4.0)
    return layer.to(dtype_of(case)).train(not case.has("eval"))


def _offsets() -> Tensor:
    return 3.0 + 0.5 * torch.arange(CHANNELS)


def state_of(layer: Any) -> State | None:
    mean, var = getattr(layer, "running_mean", None), getattr(layer, "running_var", None)
    if mean is None or var is None:
        return None
    return State(mean.detach().double(), var.detach().double(), int(layer.num_batches_tracked))


# ---------------------------------------------------------------- tensors


def batches_of(case: Case) -> list[Batch]:
    """One call's tensors; two calls' for micro-batches, and for what vmap maps over."""
    several = 2 if case.has("accumulate") or case.way == "vmap" else 1
    return [_batch(case) for _ in range(several)]


def _batch(case: Case) -> Batch:
    samples = sum(RANKS) if case.has("process_group") else 5
    positions = POSITIONS[case.rank]
    single = case.has("on_single")
    if single and case.mask == "no mask":
        positions = tuple(1 for _ in positions)
        samples = 1 if case.layer in BATCH else samples
    shape = (samples, CHANNELS, *positions)
    offsets = _offsets().view(1, -1, *(1 for _ in positions))
    x = torch.randn(shape) * 1.7 + offsets
    mask, lengths = None, None
    if case.mask == "lengths":
        lengths = torch.tensor(LENGTHS[:samples])
        if single:
            lengths = torch.arange(samples) == 2 if case.layer in BATCH else lengths > 0
            lengths = lengths.long()
    elif case.mask != "no mask":
        mask = _mask(case, shape)
    tensors = [x, torch.randn(shape)]
    if case.residual == "residual":
        tensors.append(torch.randn(shape) * 1.3)
    modulation = _modulation(case, shape)
    if case.channel_axis == "axis -1":
        modulation = [t.movedim(1, -1) for t in modulation]
        tensors = [t.movedim(1, -1) for t in tensors]
        mask = mask.movedim(1, -1) if mask is not None and mask.dim() == len(shape) else mask
    tensors = [t.to(dtype_of(case)) for t in tensors]
    batch = Batch(tensors[0], tensors[1], *tensors[2:3], mask=mask, lengths=lengths)
    valid = valid_of(case, batch)
    # what is not valid is never read
    nothing = [torch.where(valid, t, float("nan")) for t in (batch.x, *tensors[2:3])]
    if case.has("skip_nonfinite"):
        channel, counts = (t.select(axis_of(case, x), 1) for t in (nothing[0], valid))
        channel[tuple(counts.nonzero()[0].tolist())] = float("inf")
    placed = [LAYOUTS[case.layout](t) for t in nothing]
    scale, shift = modulation or (None, None)
    if scale is not None and scale.shape == x.shape:
        scale, shift = (
            LAYOUTS[case.layout](torch.where(valid, t, float("nan"))) for t in (scale, shift)
        )
    residual = placed[1] if len(placed) > 1 else None
    return batch._replace(x=placed[0], residual=residual, scale=scale, shift=shift)


def _modulation(case: Case, shape: tuple[int, ...]) -> list[Tensor]:
    """Scale and shift, of x's size or of one value for each sample and channel or feature."""
    if case.modulation == "no modulation":
        return []
    if case.modulation == "scale by sample":
        ones = [1] * (len(shape) - 2)
        # of a row the features are the last dimensions
        shape = (shape[0], 1, *shape[2:]) if case.layer in ROWS else (*shape[:2], *ones)
    return [torch.randn(shape).mul(0.5).to(dtype_of(case)) for _ in range(2)]


def _mask(case: Case, shape: tuple[int, ...]) -> Tensor:
    """At least two values of each statistic in each process, or one alone for `on_single`."""
    if case.layer in ROWS:
        shown = shape if case.mask == "mask per channel" else shape[:2]
    else:
        shown = shape if case.mask == "mask per channel" else (shape[0], *shape[2:])
    if case.has("on_single"):
        lead = shown[: 2 if case.mask == "mask per channel" else 1]
        mask = torch.zeros(*lead, math.prod(shape[2:]), dtype=torch.bool)
        place = torch.randint(mask.shape[-1], lead).unsqueeze(-1)
        mask.scatter_(-1, place, True)
        if case.layer in BATCH:
            mask &= (torch.arange(shape[0]) == 2).view(-1, *(1 for _ in mask.shape[1:]))
        return mask.view(shown)
    mask = torch.rand(shown) < 0.6
    # the first two and the last two positions, or rows, or elements
    flat = mask.view(shape[0], shape[1], -1) if mask.dim() == len(shape) else mask.flatten(1)
    flat[..., :2] = flat[..., -2:] = True
    return mask


def split(case: Case, batch: Batch) -> list[Batch]:
    """Each process's part: samples, or for statistics of a sample positions."""
    if case.layer in BATCH:
        parts: list[Any] = [[None] * len(RANKS) if t is None else t.split(RANKS) for t in batch]
        return [Batch(*part) for part in zip(*parts, strict=True)]
    sizes = POSITIONS_OF_RANKS[case.rank]
    axis = split_dim(case)

    def of_each(t: Tensor | None) -> Sequence[Any]:
        return [t] * len(sizes) if t is None or t.shape[axis] == 1 else t.split(sizes, axis)

    parts = [of_each(t) for t in batch[:3]]
    masks: Sequence[Any] = [None] * len(sizes)
    if batch.mask is not None:
        dim = axis if batch.mask.dim() == batch.x.dim() else 1
        masks = batch.mask.split(sizes, dim)
    lengths: Sequence[Any] = [None] * len(sizes)
    if batch.lengths is not None:
        starts = [0, sizes[0]]
        lengths = [
            (batch.lengths - start).clamp(0, size)
            for start, size in zip(starts, sizes, strict=True)
        ]
    modulation = [of_each(t) for t in batch[5:]]
    return [Batch(*part) for part in zip(*parts, masks, lengths, *modulation, strict=True)]


def split_dim(case: Case) -> int:
    """Along which dimension processes share an input."""
    if case.layer in BATCH:
        return 0
    return 2 if case.channel_axis == "axis 1" else 1


# ---------------------------------------------------------------- the ways


def leaves_of(batches: Sequence[Batch]) -> dict[str, Tensor]:
    """What each output is differentiated by, besides parameters."""
    found = {}
    for place, batch in enumerate(batches):
        found[f"x{place}"] = batch.x.detach().requires_grad_()
        if batch.residual is not None:
            found[f"residual{place}"] = batch.residual.detach().requires_grad_()
        for name in ("scale", "shift"):
            if (value := getattr(batch, name)) is not None:
                found[f"{name}{place}"] = value.detach().requires_grad_()
    return found


def derivatives(
    outputs: Sequence[Tensor],
    leaves: dict[str, Tensor],
    grads: Sequence[Tensor],
    along: dict[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Gradients by each leaf; or with `along`, those of the gradients' product with it."""
    by = list(leaves.values())
    first = torch.autograd.grad(outputs, by, grads, create_graph=along is not None)
    found = {f"gradient of {n}": g for n, g in zip(leaves, first, strict=True)}
    if along is not None:
        # in float64, whose sum no half overflows
        total = sum(
            (along[n].double() * g.double()).sum() for n, g in zip(leaves, first, strict=True)
        )
        of = {**leaves, **{f"gradient{i}": g for i, g in enumerate(grads)}}
        second = torch.autograd.grad(
            total, list(of.values()), allow_unused=True, materialize_grads=True
        )
        found |= {f"second gradient of {n}": g for n, g in zip(of, second, strict=True)}
    return {name: g.detach() for name, g in found.items()}


def carried_out(
    case: Case, layer: Any, batches: Sequence[Batch], along: dict[str, Tensor] | None = None
) -> tuple[dict[str, Tensor], State | None]:
    """What truenorm makes of it: outputs, gradients, and the state afterwards."""
    leaves = leaves_of(batches)
    parameters = {n: p.detach().requires_grad_() for n, p in layer.named_parameters()}
    if case.way != "functional_call":
        parameters = dict(layer.named_parameters())
    grads = [batch.grad for batch in batches]
    if case.way == "second derivatives":
        grads = [g.detach().requires_grad_() for g in grads]
    call = _WAYS.get(case.way, _eager)
    gathering = truenorm.accumulate(layer) if case.has("accumulate") else contextlib.nullcontext()
    with gathering:
        if case.way == "no_grad":
            with torch.no_grad():
                outputs = call(case, layer, parameters, leaves, batches)
            found = {}
        else:
            outputs = call(case, layer, parameters, leaves, batches)
            every = {**leaves, **parameters}
            found = derivatives(outputs, every, grads, along)
    found |= {f"output{i}": y.detach() for i, y in enumerate(outputs)}
    return found, state_of(layer)


def _given(batch: Batch, leaves: dict[str, Tensor], place: int) -> dict[str, Any]:
    """The keyword arguments of a call."""
    found: dict[str, Any] = {}
    if batch.mask is not None:
        found["mask"] = batch.mask
    if batch.lengths is not None:
        found["lengths"] = batch.lengths
    if found:
        found["padding_value"] = PADDING
    if batch.residual is not None:
        found["residual"] = leaves[f"residual{place}"]
    for name in ("scale", "shift"):
        if getattr(batch, name) is not None:
            found[name] = leaves[f"{name}{place}"]
    return found


Way = Callable[[Case, Any, dict[str, Tensor], dict[str, Tensor], Sequence[Batch]], list[Tensor]]


def _each(call: Callable[..., Tensor], leaves: dict[str, Tensor], batches: Any) -> list[Tensor]:
    return [call(leaves[f"x{i}"], **_given(b, leaves, i)) for i, b in enumerate(batches)]


def _eager(case: Case, layer: Any, parameters: Any, leaves: Any, batches: Any) -> list[Tensor]:
    return _each(layer, leaves, batches)


def _compiled(case: Case, layer: Any, parameters: Any, leaves: Any, batches: Any) -> list[Tensor]:
    # which takes many seconds of a C++ compiler
    on_inductor = case.dtype == "float64"
    backend = "inductor" if on_inductor else "aot_eager"
    try:
        return _each(torch.compile(layer, fullgraph=True, backend=backend), leaves, batches)
    except torch._dynamo.exc.Unsupported as told:
        # which quotes what the layer has raised
        said = re.search(r"raised exception (\w+)\([\"'](.*)[\"']\)", str(told))
        if said is None:
            raise
        raise getattr(builtins, said[1])(said[2]) from told


def _checkpoint(case: Case, layer: Any, parameters: Any, leaves: Any, batches: Any) -> list[Tensor]:
    def call(x: Tensor, **given: Any) -> Any:
        return checkpoint(layer, x, use_reentrant=False, **given)

    return _each(call, leaves, batches)


def _recomputed(case: Case, layer: Any, parameters: Any, leaves: Any, batches: Any) -> list[Tensor]:
    with truenorm.recompute_outputs():
        made = _each(layer, leaves, batches)
        # saves its factors: the gradient of the ones needs the output
        ones = [torch.ones_like(y, requires_grad=True) for y in made]
        parameters |= {f"ones{i}": one for i, one in enumerate(ones)}
        return [y * one for y, one in zip(made, ones, strict=True)]


def _functional(case: Case, layer: Any, parameters: Any, leaves: Any, batches: Any) -> list[Tensor]:
    def call(x: Tensor, **given: Any) -> Any:
        return torch.func.functional_call(layer, parameters, (x,), given)

    return _each(call, leaves, batches)


def _vmap(case: Case, layer: Any, parameters: Any, leaves: Any, batches: Any) -> list[Tensor]:
    given = [_given(b, leaves, i) for i, b in enumerate(batches)]
    padding = {"padding_value": PADDING} if "padding_value" in given[0] else {}
    names = [n for n in given[0] if n != "padding_value"]
    stacked = [torch.stack([g[n] for g in given]) for n in names]

    def call(x: Tensor, *tensors: Tensor) -> Any:
        return layer(x, **dict(zip(names, tensors, strict=True)), **padding)

    xs = torch.stack([leaves[f"x{i}"] for i in range(len(batches))])
    return list(torch.func.vmap(call)(xs, *stacked))


def _traced(case: Case, layer: Any, parameters: Any, leaves: Any, batches: Any) -> list[Tensor]:
    (given,) = (_given(b, leaves, i) for i, b in enumerate(batches))
    names = [n for n in given if n != "padding_value"]
    padding = {"padding_value": PADDING} if "padding_value" in given else {}

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = layer

        def forward(self, x: Tensor, *tensors: Tensor) -> Any:
            return self.norm(x, **dict(zip(names, tensors, strict=True)), **padding)

    before = {n: b.clone() for n, b in layer.named_buffers()}
    inputs = [leaves["x0"], *(given[n] for n in names)]
    # another example than what is then given
    example = [t.detach().flip(0) for t in inputs]
    traced = trace(Net(), tuple(example), check_trace=False)
    with torch.no_grad():
        for name, buffer in layer.named_buffers():
            buffer.copy_(before[name])
    return [traced(*inputs)]


_WAYS: dict[str, Way] = {
    "compiled": _compiled,
    "checkpoint": _checkpoint,
    "recompute_outputs": _recomputed,
    "functional_call": _functional,
    "vmap": _vmap,
    "jit.trace": _traced,
}
