"""`truenorm bench --device cuda`: what runs beside truenorm, the clock, and the floor.

A call on a tensor of 1 MiB or more is timed by events on the device, its inputs out of the L2
cache, with the device kept busy while the host queues the work: the time of the kernels. A smaller
one is all calls, and is timed by the wall clock over many of them.
"""

from __future__ import annotations

import importlib.util
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..clock import Clock, Run
from .cases import CASES, CUDA_CASES, FAMILIES, LARGE_BYTES, Case
from .subject import Subject
from .timing import BACKWARD, BOTH, COMPILE, FORWARD, OURS, TORCH, Plan, Timing, floored

NATIVE, LIGER, QUACK = "torch, cuDNN off", "liger", "quack"
CONTENDERS = (TORCH, NATIVE, COMPILE, LIGER, QUACK)
CUDA_DIRECTIONS = (FORWARD, BACKWARD, BOTH)
ALL_CASES = tuple(sorted((*CASES, *CUDA_CASES), key=lambda case: FAMILIES.index(case.family)))
# registers and shared memory of a multiprocessor, which no kernel can use up; of most data centre
# GPUs the L2 cache
ON_CHIP_BYTES = 2**18


class CudaGoal(NamedTuple):
    """Issue 4's figures, for tensors of 64 MiB and more on an H200.

    forward, backward: share of the floor's speed. both: torch's time over truenorm's, geometric
        mean over all cases, forward and backward.
    """

    forward: float
    backward: float
    both: float


CUDA_GOALS = {
    "InstanceNorm contiguous": CudaGoal(0.85, 0.85, 2.0),
    "InstanceNorm channels_last": CudaGoal(0.85, 0.85, 4.0),
    "BatchNorm training contiguous": CudaGoal(0.85, 0.85, 1.3),
    "BatchNorm training channels_last": CudaGoal(0.85, 0.85, 1.3),
    "GroupNorm contiguous": CudaGoal(0.85, 0.8, 2.0),
    "GroupNorm channels_last": CudaGoal(0.85, 0.8, 2.0),
    "LayerNorm": CudaGoal(0.9, 0.85, 1.3),
    "RMSNorm": CudaGoal(0.9, 0.85, 1.3),
}
GOAL_BYTES = 2**26


def copy_rate(clock: Clock, device: str = "cuda", size: int = 2**30) -> float:
    """Bytes a second, read and written, of copying a tensor of that many bytes."""
    x = torch.empty(size, dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    for _ in range(3):
        y.copy_(x)
    times = sorted(clock(lambda: y.copy_(x), small=False) for _ in range(11))
    return 2 * size / times[5]


def floor_bytes(case: Case, itemsize: int, direction: str, l2_bytes: int) -> int:
    """Bytes that must move at least.

    Each tensor once, and x (and the gradient) once more where a statistic's values exceed what a
    multiprocessor holds and the tensor exceeds the L2 cache.
    """
    whole = case.numel * itemsize
    own = whole // case.statistics
    if case.family.startswith("BatchNorm training"):
        again = whole > l2_bytes
    else:
        again = own > ON_CHIP_BYTES and whole > l2_bytes
    if case.family in ("BatchNorm eval", "LocalResponseNorm"):
        again = False
    forward = (3 if again else 2) * whole
    backward = (5 if again else 3) * whole
    return {FORWARD: forward, BACKWARD: backward, BOTH: forward + backward}[direction]


def _functional(case: Case, layer: Any) -> dict[str, Callable[[Tensor], Tensor]]:
    """Other libraries' kernels for this layer, where they are installed."""
    found: dict[str, Callable[[Tensor], Tensor]] = {}
    weight, bias = getattr(layer, "weight", None), getattr(layer, "bias", None)
    if importlib.util.find_spec("liger_kernel") is not None:
        if case.layer == "LayerNorm":
            from liger_kernel.ops.layer_norm import LigerLayerNormFunction as LayerNorm

            found[LIGER] = lambda x: LayerNorm.apply(x, weight, bias, layer.eps)
        elif case.layer == "RMSNorm":
            from liger_kernel.ops.rms_norm import LigerRMSNormFunction as RMSNorm

            eps = layer.eps or 1e-6
            # not in place: the output's gradient is used again
            found[LIGER] = lambda x: RMSNorm.apply(x, weight, eps, 0.0, "llama", False)
    if importlib.util.find_spec("quack") is not None and case.layer == "RMSNorm":
        import quack

        found[QUACK] = lambda x: quack.rmsnorm(x, weight, eps=layer.eps or 1e-6)
    return found


@contextmanager
def _without_cudnn() -> Iterator[None]:
    with torch.backends.cudnn.flags(enabled=False):
        yield


def _native(layer: Any) -> Callable[[Tensor], Tensor]:
    def run(x: Tensor) -> Tensor:
        with _without_cudnn():
            return layer(x)  # type: ignore[no-any-return]

    return run


def contenders(subject: Subject, *, compiled: bool) -> dict[str, Callable[[Tensor], Tensor]]:
    """truenorm first."""
    case, theirs = subject.case, subject.theirs
    found: dict[str, Callable[[Tensor], Tensor]] = {OURS: subject.ours, TORCH: theirs}
    if case.layer.startswith(("BatchNorm", "InstanceNorm")):
        found[NATIVE] = _native(theirs)
    if compiled:
        torch._dynamo.reset()
        found[COMPILE] = torch.compile(theirs, dynamic=False)
    try:
        found.update(_functional(case, theirs))
    except ImportError as error:
        # installed, but of another version
        warnings.warn(f"left out: {error}", RuntimeWarning, stacklevel=2)
    return found


def run_of(call: Callable[[Tensor], Tensor], layer: Any, subject: Subject, direction: str) -> Run:
    """One call of a contender in that direction."""
    if direction == FORWARD:
        return lambda: call(subject.x)
    leaf = subject.x.detach().requires_grad_()
    wanted, grad = [leaf, *layer.parameters()], subject.grad
    if direction == BOTH:
        return lambda: torch.autograd.grad(call(leaf), wanted, grad)
    output = call(leaf)
    return lambda: torch.autograd.grad(output, wanted, grad, retain_graph=True)


def time_case(
    subject: Subject, plan: Plan, clock: Clock, rate: float, l2_bytes: int, *, compiled: bool
) -> dict[str, Timing]:
    """Every contender in every direction, in turn."""
    small = subject.x.nbytes < LARGE_BYTES
    calls = contenders(subject, compiled=compiled)
    timings = {}
    for direction in CUDA_DIRECTIONS:
        runs: dict[str, Run] = {}
        with (
            torch.set_grad_enabled(direction != FORWARD),
            warnings.catch_warnings(),
        ):
            # torch and its compiler warn where they take a slow path, which is what is measured
            warnings.simplefilter("ignore")
            for name, call in calls.items():
                layer = subject.ours if name == OURS else subject.theirs
                try:
                    run = run_of(call, layer, subject, direction)
                    for _ in range(3):
                        run()
                except Exception:  # a contender may refuse in any way; truenorm is validated
                    if name == OURS:
                        raise
                    continue
                runs[name] = run
            seconds = _in_turn(runs, plan, clock, small)
        moved = floor_bytes(subject.case, subject.x.element_size(), direction, l2_bytes)
        timings[direction] = floored(direction, seconds, moved / rate)
    return timings


def _in_turn(
    runs: Mapping[str, Run], plan: Plan, clock: Clock, small: bool
) -> dict[str, list[float]]:
    names = list(runs)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    start = time.perf_counter()
    for turn in range(plan.maximum):
        if turn >= plan.minimum and time.perf_counter() - start > plan.seconds:
            break
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            seconds[name].append(clock(runs[name], small=small))
    return seconds


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    from ... import _triton

    properties = torch.cuda.get_device_properties(0)
    return {
        "device": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "cuda": torch.version.cuda,
        "triton": _triton.TRITON,
        "torch": str(torch.__version__),
    }


def eager(timing: Timing) -> str:
    """torch's faster way, cuDNN on or off; plain torch where it refused both."""
    ways = [name for name in (TORCH, NATIVE) if name in timing.seconds]
    return min(ways, key=timing.median, default=TORCH)


def plan(quick: bool) -> Plan:
    return Plan(minimum=5, maximum=9, seconds=0.2) if quick else Plan(15, 51, 1.0)
