"""How the short way of CUDA tensors is written down and launched again, and what of it is kept.

In Triton's interpreter; what Triton itself does with a compiled kernel is looked at in a process of
its own, which compiles some.
"""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import CASES
from on_triton import in_the_interpreter, triton_kernels
from torch import Tensor

import truenorm
from truenorm._core import by_plan, eager, planned
from truenorm._triton import config

pytestmark = in_the_interpreter
BATCH = CASES[2]


# ---------------------------------------------------------------- what is kept


def test_no_tensor_is_kept() -> None:
    layer, x = BATCH.build(), BATCH.input()
    with triton_kernels():
        for _ in range(2):
            y = layer(x)
            y.sum().backward()
        seen = [weakref.ref(t) for t in (x, y, layer.weight, layer.running_mean)]
        assert config.CALLS
        del layer, x, y
        gc.collect()
        assert [ref() for ref in seen] == [None] * 4


def test_kinds_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(by_plan, "MOST", 3)
    layer = truenorm.LayerNorm(4)
    with triton_kernels(), torch.no_grad():
        for rows in range(1, 9):
            layer(torch.randn(rows, 4))
            assert 0 < len(config.CALLS) <= 3


def test_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each writes down its own call, and a plan serves them all."""
    from triton.runtime.interpreter import GridExecutor

    layer = truenorm.BatchNorm1d(6, track_running_stats=False)
    inputs = [torch.randn(n, 6) for n in (3, 3, 5, 8)]
    expected = [layer(x) for x in inputs]
    barrier, lock, wrong = threading.Barrier(4), threading.Lock(), []
    execute = GridExecutor.__call__

    def one_at_a_time(*args: Any, **kwargs: Any) -> None:
        with lock:
            execute(*args, **kwargs)

    monkeypatch.setattr(GridExecutor, "__call__", one_at_a_time)

    def work(x: Tensor, y: Tensor) -> None:
        barrier.wait()
        for _ in range(4):
            found = planned.call(x, layer.weight, layer.bias, 0, layer.eps, (), None)
            if found is None or not torch.allclose(found, y, atol=1e-5):
                wrong.append(x.shape)

    with triton_kernels():
        layer(inputs[3])
        args = zip(inputs, expected, strict=True)
        threads = [threading.Thread(target=work, args=each) for each in args]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []


# ---------------------------------------------------------------- how it is launched


class _Kernel:
    """A kernel as Triton's JITFunction: what it gives back has a launcher of its own."""

    def __init__(self, compiled: Any) -> None:
        self.arg_names = ["p", "n", "BLOCK"]
        self.compiled, self.calls = compiled, list[Any]()

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        def run(*args: Any, **constants: Any) -> Any:
            self.calls.append((grid, args, constants))
            return self.compiled

        return run


class _Compiled:
    def __init__(self, *names: str) -> None:
        self.src, self.calls = SimpleNamespace(signature=dict.fromkeys(names)), list[Any]()

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        return lambda *args: self.calls.append((grid, args))


def _recorded(kernel: _Kernel, x: Tensor) -> Any:
    from truenorm._triton import replay

    with replay.Recorder(x.device, (x,)) as recorder:
        y = torch.empty(3)
        replay.launch(kernel, (5,), x, 7, BLOCK=16, num_warps=2)
    plan = recorder.plan((y,))
    assert plan is not None
    return plan


def test_a_compiled_kernel_is_launched_by_itself() -> None:
    compiled = _Compiled("p", "n", "BLOCK")
    kernel, x, other = _Kernel(compiled), torch.ones(2), torch.ones(2)
    plan = _recorded(kernel, x)
    for t in (other, x):
        (y,) = plan(t)
        assert y.shape == (3,)
        ((grid, args),) = compiled.calls
        assert grid == (5, 1, 1)
        assert args[0] is t
        assert args[1:] == (7, 16)
        compiled.calls.clear()
    assert len(kernel.calls) == 1


@pytest.mark.parametrize(
    "compiled", [None, object(), _Compiled("p", "BLOCK"), SimpleNamespace(src=None)]
)
def test_what_has_another_form_is_launched_by_triton(compiled: Any) -> None:
    kernel, x, other = _Kernel(compiled), torch.ones(2), torch.ones(2)
    plan = _recorded(kernel, x)
    plan(other)
    first, second = kernel.calls
    assert second[1][0] is other
    assert (first[0], first[1][1:], first[2]) == (second[0], second[1][1:], second[2])


def test_another_device_is_made_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from truenorm._triton import replay

    compiled = _Compiled("p", "n", "BLOCK")
    plan = _recorded(_Kernel(compiled), torch.ones(2))
    entered: list[int] = []
    monkeypatch.setattr(replay, "_current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "device", lambda i: nullcontext(entered.append(i)))
    for plan.index in (1, 0):
        plan(torch.ones(2))
    assert entered == [0]


def test_another_threads_launches_are_its_own() -> None:
    from truenorm._triton import replay

    kernel, x = _Kernel(None), torch.ones(2)
    with replay.Recorder(x.device, (x,)) as recorder:
        args = kernel, (1,), torch.ones(2), 7
        thread = threading.Thread(target=replay.launch, args=args, kwargs={"BLOCK": 16})
        thread.start()
        thread.join()
    assert len(kernel.calls) == 1
    assert recorder.steps == []


def test_what_torch_computes_is_no_plan() -> None:
    from truenorm._triton import replay

    kernel, foreign = _Kernel(None), torch.ones(2)
    for extra in (
        lambda x: replay.launch(kernel, (1,), x * 2, 7, BLOCK=16),
        lambda x: x.mul_(2),
        lambda x: x.copy_(foreign),
        lambda x: foreign.copy_(x),
        lambda x: foreign.clone(),
        lambda x: x[1:].copy_(x[:1]),
        lambda x: x.add_(x, alpha=2),
        lambda x: x.add_(torch.ones(2)),
        lambda x: x.sum(),
        lambda x: x.sum().item(),
        lambda x: replay.launch(kernel, (1,), foreign, 7, BLOCK=16),
    ):
        x = torch.ones(2)
        with replay.Recorder(x.device, (x,)) as recorder:
            y = torch.empty(3)
            extra(x)
        assert recorder.plan((y,)) is None
    with replay.Recorder(x.device, (x,)) as recorder:
        y, view = torch.empty(3), torch.empty(4).view(2, 2)
    assert recorder.plan((y,)) is not None
    # not what it was asked for as, and not its own
    assert recorder.plan((view,)) is None
    assert recorder.plan((x,)) is None
    assert recorder.plan((), (x.view(2, 1),)) is None
    plan = recorder.plan((), (view,))
    assert plan is not None
    assert plan(x)[0].shape == (2, 2)


def _apart(t: Tensor) -> Tensor:
    return t.new_empty_strided(t.shape, (1, t.shape[0])).copy_(t)


COPIED: list[Callable[[Tensor, Tensor], Tensor]] = [
    lambda x, out: x.clone(),
    lambda x, out: x.t().contiguous(),
    lambda x, out: x.to(torch.float64),
    lambda x, out: x.view(2, 6).to(torch.bfloat16),
    lambda x, out: x.view(torch.int32).clone(),
    lambda x, out: _apart(x),
    lambda x, out: _apart(x.t()).clone(memory_format=torch.contiguous_format),
    lambda x, out: torch.empty(1).expand(4, 3).clone().copy_(x).add_(x),
    lambda x, out: x.clone().add_(1),
    lambda x, out: torch.add(x, x, out=torch.empty(4, 3)),
    lambda x, out: out.copy_(x.view(-1)).view(4, 3).clone(),
    lambda x, out: out.view(3, 4).add_(x.view(3, 4)).clone(),
    lambda x, out: out.view(torch.int32).copy_(x.view(12)).clone(),
]


@pytest.mark.parametrize("run", COPIED)
def test_copies_are_made_again(run: Callable[[Tensor, Tensor], Tensor]) -> None:
    """From what lies as it did, and into what lies as it did; of other values."""
    from truenorm._triton import replay

    first, room = torch.randn(4, 3), torch.zeros(12)
    with replay.Recorder(first.device, (first, room)) as recorder:
        made = run(first, room)
    plan = recorder.plan((made,))
    assert plan is not None
    for leaf in (False, True):
        x, out, alone = torch.randn(4, 3, requires_grad=leaf), torch.zeros(12), torch.zeros(12)
        with torch.no_grad():
            wanted = run(x, alone)
        (found,) = plan(x, out)
        assert torch.equal(found, wanted)
        assert (found.dtype, found.stride()) == (wanted.dtype, wanted.stride())
        # some of it is no number as a float
        assert torch.equal(out.view(torch.int32), alone.view(torch.int32))
        assert not found.requires_grad
        assert not found._is_view()


def test_a_kernel_is_given_the_dtype_it_was_given() -> None:
    from truenorm._triton import replay

    kernel, mask = _Kernel(None), torch.tensor([[True, False]])
    with replay.Recorder(mask.device, (mask,)) as recorder:
        replay.launch(kernel, (1,), mask.view(-1).view(torch.uint8), 7, BLOCK=16)
        y = torch.empty(3)
    plan = recorder.plan((y,))
    assert plan is not None
    plan(torch.tensor([[False, True]]))
    given = kernel.calls[1][1][0]
    assert given.dtype == torch.uint8
    assert given.tolist() == [0, 1]


def test_triton_launches_the_same() -> None:
    """Its own way to a launcher, and a plan's, give it the same."""
    script = Path(__file__).parent / "triton_launches.py"
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["LayerNorm 3", "BatchNorm1d 3"]


def test_cuda_tensors_are_for_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(planned, "call", lambda *args: asked.append(args))
    rest = None, None, eager.layer(1), 1e-5, (), None
    for why_not, kind, wanted in (("", True, 1), ("no Triton", True, 0), ("", False, 0)):
        monkeypatch.setattr(eager, "WHY_NOT", why_not)
        x: Any = SimpleNamespace(is_cpu=False, is_cuda=kind)
        eager.call(eager.OWN, x, *rest)
        assert asked == [(x, *rest)] * wanted
        asked.clear()
