"""The stages of gpu_check.py."""

from __future__ import annotations

import copy
import importlib.util
import itertools
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import gpu_composed
import torch

import truenorm
from truenorm import info
from truenorm._tools.bench import cuda
from truenorm._tools.bench.cases import Case
from truenorm._tools.bench.subject import Subject, validate
from truenorm._tools.bench.timing import BACKWARD, BOTH, FORWARD, OURS, Plan
from truenorm._tools.clock import Clock, DeviceClock

ROOT = Path(__file__).parent.parent
AFFINE = {"affine": True}


def _both(layer: str, kwargs: dict[str, Any], shape: tuple[int, ...]) -> list[Case]:
    return [Case(layer, kwargs, shape, "", last) for last in (False, True)]


CASES = [
    *_both("InstanceNorm3d", {"num_features": 32, **AFFINE}, (2, 32, 128, 128, 128)),
    *_both("BatchNorm2d", {"num_features": 64}, (256, 64, 112, 112)),
    *_both("BatchNorm2d", {"num_features": 256}, (32, 256, 56, 56)),
    *_both("BatchNorm2d", {"num_features": 2048}, (256, 2048, 7, 7)),
    *_both("GroupNorm", {"num_groups": 32, "num_channels": 320}, (2, 320, 64, 64)),
    *_both("GroupNorm", {"num_groups": 32, "num_channels": 1280}, (2, 1280, 16, 16)),
    Case("LayerNorm", {"normalized_shape": 4096}, (16384, 4096), ""),
    Case("RMSNorm", {"normalized_shape": 4096}, (16384, 4096), ""),
    Case("LayerNorm", {"normalized_shape": 768}, (8192, 768), ""),
]
SMALL = [
    Case("LayerNorm", {"normalized_shape": 8}, (4, 8), ""),
    Case("BatchNorm1d", {"num_features": 16}, (8, 16), ""),
]
TINY = [
    *_both("InstanceNorm2d", {"num_features": 3, **AFFINE}, (2, 3, 4, 5)),
    Case("LayerNorm", {"normalized_shape": 8}, (4, 8), ""),
]
DTYPES = (torch.bfloat16, torch.float32)


class WrongError(Exception):
    """Results are not what is promised: nothing after this is worth measuring."""


class Setup:
    """Where and how long: cases, clock, and what the stages before have found."""

    def __init__(self, tiny: bool, device: str, end: float) -> None:
        self.tiny, self.device, self.end = tiny, device, end
        self.cases = TINY if tiny else CASES
        self.small = TINY[-1:] if tiny else SMALL
        self.clock: Clock = _wall if tiny else DeviceClock()
        self.plan = Plan(2, 2, 0.0) if tiny else Plan(7, 15, 0.3)
        self.rate, self.l2 = 1.0, 2**20
        self.workers = 2 if tiny else max(2, min(14, (os.cpu_count() or 2) - 2))

    def left(self) -> float:
        return self.end - time.monotonic()


def _wall(run: Callable[[], object], *, small: bool) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def kernels(interpret: bool) -> AbstractContextManager[Any]:
    """The interpreter's, in which the suite runs them; on a GPU they serve by themselves."""
    if not interpret:
        return nullcontext()
    from on_triton import triton_kernels

    return triton_kernels()


_children: list[subprocess.Popen[str]] = []


def _start(*args: str) -> subprocess.Popen[str]:
    path = os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH")]))
    child = subprocess.Popen(
        [sys.executable, *args],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    _children.append(child)
    return child


def end_children() -> None:
    """With all that they started."""
    for child in _children:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)


def machine(setup: Setup, found: dict[str, Any]) -> None:
    """Versions, and the rate of a copy, which speeds are compared with."""
    found["info"] = str(info())
    if setup.tiny:
        setup.rate = cuda.copy_rate(setup.clock, setup.device, 2**12)
    else:
        found |= cuda.machine()
        setup.l2 = found["l2_bytes"]
        if info().cuda != "triton":
            raise WrongError(f"the kernels do not serve here: {info().cuda_words}")
        setup.rate = cuda.copy_rate(setup.clock, setup.device)
    found["copy bytes a second"] = setup.rate
    found["said"] = f"{found.get('device', 'interpreter')}, copies {setup.rate / 1e12:.3g} TB/s"


def warm(device: str, tiny: bool, index: int, count: int) -> int:
    """This process's share of the cases run once, which leaves the kernels in Triton's cache."""
    cases = TINY if tiny else CASES + SMALL
    for case in [(case, dtype) for case in cases for dtype in DTYPES][index::count]:
        subject = Subject(*case, device)
        leaf = subject.x.detach().requires_grad_()
        subject.ours(leaf).backward(subject.grad)
        del subject, leaf
    for case, dtype in itertools.product(gpu_composed.COMPOSED, DTYPES):
        if index == 0:
            ours, _, leaves = gpu_composed.made(case, dtype, device, tiny)
            for step in gpu_composed.steps(ours, leaves):
                step()
    return 0


def compiling(setup: Setup, found: dict[str, Any]) -> None:
    """Every kernel of the cases, in as many processes as there are processors."""
    interpret = ["--interpret"] if setup.tiny else []
    script = str(ROOT / "tools" / "gpu_check.py")
    children = [
        _start(script, *interpret, "--warm", str(i), str(setup.workers))
        for i in range(setup.workers)
    ]
    said = [child.communicate()[0] for child in children]
    found["said"] = f"{len(children)} processes"
    wrong = [text for child, text in zip(children, said, strict=True) if child.returncode]
    if wrong:
        found["output"] = wrong[0][-4000:]
        raise WrongError(f"{len(wrong)} processes failed: {wrong[0].strip().splitlines()[-1]}")


def correctness(setup: Setup, found: dict[str, Any]) -> None:
    """The suite's tests of the kernels."""
    kinds = (
        "layers", "calls", "parts", "added", "gated", "gated_calls", "turned", "promises", "half",
        "cuda", "tune",
    )  # fmt: skip
    files = [f"tests/test_triton_{name}.py" for name in kinds]
    args = ["-m", "pytest", "-o", "addopts=-q", "-p", "no:cacheprovider", *files]
    if importlib.util.find_spec("xdist") is not None:
        args += ["-n", str(setup.workers)]
    if setup.tiny:
        args += ["-k", "test_layers and BatchNorm1d-7x5-float32"]
    else:
        os.environ["FAIL_WITHOUT_CUDA"] = "1"
    # as many as tell what is wrong
    child = _start(*args, "--maxfail=40", "--tb=short")
    said = child.communicate()[0]
    counts = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|skipped|error)", said)}
    found |= counts
    found["said"] = ", ".join(f"{n} {word}" for word, n in counts.items())
    if child.returncode or not counts.get("passed"):
        found["output"] = said[-40_000:]
        raise WrongError(found["said"] or said[-400:])


# (layer, its arguments, shape, what else it is given)
GIVEN: list[tuple[str, dict[str, Any], tuple[int, ...], str]] = [
    (layer, {**kwargs, "activation": activation}, shape, more)
    for layer, kwargs, shape in (
        ("InstanceNorm2d", {"num_features": 3, **AFFINE}, (2, 3, 5, 7)),
        ("BatchNorm2d", {"num_features": 5}, (3, 5, 4, 3)),
        ("GroupNorm", {"num_groups": 2, "num_channels": 6}, (2, 6, 3, 5)),
    )
    for activation, more in (("gelu", "mask"), ("relu", "residual"), (None, ""))
]


def extras(setup: Setup, found: dict[str, Any]) -> None:
    """Masks, activations and residuals of layers, against the same on a CPU in float64."""
    wrong = []
    for name, kwargs, shape, more in GIVEN[:3] if setup.tiny else GIVEN:
        layer = getattr(truenorm, name)(**kwargs)
        for dtype, last in itertools.product(DTYPES[: 2 - setup.tiny], (False, True)):
            values = [torch.randn(shape).to(dtype) for _ in range(3)]
            mask = torch.rand(shape[0], *shape[2:]) < 0.7
            results = []
            for device, kind in (("cpu", torch.float64), (setup.device, dtype)):
                x, grad, residual = (t.to(device, kind) for t in values)
                if last:
                    x = x.contiguous(memory_format=torch.channels_last)
                leaf = x.requires_grad_()
                given = {"mask": mask.to(device), "residual": residual}.get(more)
                placed = {more: given} if more else {}
                y = copy.deepcopy(layer).to(device, kind)(leaf, **placed)
                y.backward(grad)
                results.append((y.detach(), leaf.grad))
            for exact, got in zip(*results, strict=True):
                error = ((got.cpu().double() - exact).norm() / exact.norm()).item()
                if not error <= 4 * torch.finfo(dtype).eps:
                    wrong.append(f"{name} {kwargs} {dtype}: off by {error:.1e}")
    found["said"] = f"{len(wrong)} wrong"
    if wrong:
        raise WrongError("; ".join(wrong))


def speed(setup: Setup, found: dict[str, Any]) -> None:
    """Beside torch's, of what moving the bytes takes; what is wrong is not timed."""
    timed: list[dict[str, Any]] = []
    found["cases"] = timed
    for dtype in DTYPES:
        for case in setup.cases:
            name = f"{case.name}, {str(dtype).removeprefix('torch.')}"
            subject = Subject(case, dtype, setup.device)
            row: dict[str, Any] = {"name": name, "wrong": validate(subject)}
            timed.append(row)
            if row["wrong"]:
                continue
            timings = cuda.time_case(
                subject, setup.plan, setup.clock, setup.rate, setup.l2, compiled=False
            )
            for direction, word in ((FORWARD, "forward"), (BACKWARD, "backward"), (BOTH, "both")):
                row[f"{word} us"] = timings[direction].median(OURS) * 1e6
                row[f"{word} of floor"] = timings[direction].of_floor().median
                row[word] = timings[direction].as_dict()
            ratio = timings[BOTH].ratio(cuda.eager(timings[BOTH]))
            row["torch over ours"] = ratio.median if ratio else float("nan")
            print(f"  {name}: {row['both us']:.1f} us", flush=True)
    wrong = [row["name"] for row in timed if row["wrong"]]
    found["said"] = f"{len(timed)} cases, {len(wrong)} wrong"
    if wrong:
        raise WrongError(f"{', '.join(wrong)}")


def composed(setup: Setup, found: dict[str, Any]) -> None:
    """What is one pass here, beside the operators that torch composes it of."""
    found["cases"] = {}
    for case, dtype in itertools.product(gpu_composed.COMPOSED, DTYPES):
        name = f"{case.name}, {str(dtype).removeprefix('torch.')}"
        ours, theirs, leaves = gpu_composed.made(case, dtype, setup.device, setup.tiny)
        error = gpu_composed.difference(ours, theirs)
        if not error <= 16 * torch.finfo(dtype).eps:
            raise WrongError(f"{name}: off by {error:.1e} of torch's largest value")
        row = found["cases"][name] = {}
        for word, run in (("truenorm", ours), ("torch", theirs)):
            for what, step in zip(
                ("forward", "both"), gpu_composed.steps(run, leaves), strict=True
            ):
                step()
                times = [setup.clock(step, small=False) for _ in range(2 if setup.tiny else 9)]
                row[f"{word} {what} us"] = statistics.median(times) * 1e6
    found["said"] = "; ".join(
        f"{name}: {row['torch both us'] / row['truenorm both us']:.2f} times torch's speed"
        for name, row in found["cases"].items()
    )


def host(setup: Setup, found: dict[str, Any]) -> None:
    """Small inputs, which are all calls: eager, and on a GPU played from a graph."""
    for case in setup.small:
        subject = Subject(case, torch.float32, setup.device)
        timings = cuda.time_case(
            subject, setup.plan, setup.clock, setup.rate, setup.l2, compiled=False
        )
        found[case.name] = {d: timing.as_dict() for d, timing in timings.items()}
        if not setup.tiny:
            layers = (("graph", subject.ours), ("torch's graph", subject.theirs))
            for name, layer in layers:
                seconds = setup.clock(_captured(layer, subject), small=True)
                found[case.name][name] = seconds
        ours, theirs = (timings[BOTH].median(name) * 1e6 for name in (OURS, "torch"))
        found["said"] = f"{case.name}: {ours:.1f} us, torch {theirs:.1f} us"


def _captured(layer: Any, subject: Subject) -> Callable[[], object]:
    leaf = subject.x.detach().requires_grad_()
    wanted = [leaf, *layer.parameters()]
    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        for _ in range(3):
            torch.autograd.grad(layer(leaf), wanted, subject.grad)
    torch.cuda.current_stream().wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        torch.autograd.grad(layer(leaf), wanted, subject.grad)
    return graph.replay


def compiled(setup: Setup, found: dict[str, Any]) -> None:
    """Layers compiled by torch, truenorm's beside torch's."""
    for case in setup.cases[-1:] if setup.tiny else setup.cases[::4]:
        if setup.left() < 30 and not setup.tiny:
            break
        subject = Subject(case, DTYPES[0], setup.device)
        row = {}
        for name, layer in (("truenorm", subject.ours), ("torch", subject.theirs)):
            torch._dynamo.reset()
            backend = "eager" if setup.tiny else "inductor"
            run = cuda.run_of(torch.compile(layer, backend=backend), layer, subject, BOTH)
            for _ in range(3):
                run()
            row[name] = sorted(setup.clock(run, small=False) for _ in range(5))[2]
        found[case.name] = row
    found["said"] = f"{sum(name not in ('seconds', 'said') for name in found)} cases"


def sweep(setup: Setup, found: dict[str, Any]) -> None:
    """Other tiles and numbers of warps, on as many cases as there is time for."""
    from truenorm._triton import config
    from truenorm._triton.tune import tune_layer

    faster = 0
    before = dict(config.CHOSEN)
    for case in setup.cases[-1:] if setup.tiny else setup.cases:
        if setup.left() < 60 and not setup.tiny:
            break
        subject = Subject(case, DTYPES[0], setup.device)
        tuned = tune_layer(subject.ours, subject.x, lambda run: setup.clock(run, small=False))
        found[case.name] = [choice.__dict__ for choice in tuned]
        faster += sum(choice.after != choice.before for choice in tuned)
    config.CHOSEN.clear()
    config.CHOSEN.update(before)
    config.CALLS.clear()
    found["said"] = f"{faster} choices have a faster one"


# (stage, whether it runs the kernels in this process); the last takes all the time there is
STAGES = (
    (machine, False),
    (compiling, False),
    (correctness, False),
    (extras, True),
    (speed, True),
    (composed, True),
    (host, True),
    (compiled, True),
    (sweep, True),
)
