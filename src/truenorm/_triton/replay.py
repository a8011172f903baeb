"""The launches of a call, written down once and made again.

What host_*.py works out follows from a call's sizes, strides, dtypes, addresses and form. So a
`Recorder` looks on while they serve a call, and what it has seen is a `Plan`: the memory to ask
for, and the launches. An operator of torch's other than these needs the long way every time, and
such a call has no plan.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_aten = torch.ops.aten
_ROOMS = (
    _aten.empty.memory_format,
    _aten.empty_strided.default,
    _aten.new_empty.default,
    _aten.new_empty_strided.default,
)
_OF_DTYPES = _aten.promote_types.default
_room = torch.empty_strided
_current_device = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)
# a backward runs on a thread of its own
_local = threading.local()


class Launch(NamedTuple):
    """run: takes `args`, once the tensors are put where `places` (place, slot) says."""

    run: Callable[..., Any]
    args: list[Any]
    places: tuple[tuple[int, int], ...]


def _by_triton(kernel: Any, grid: tuple[int], constants: dict[str, Any], *args: Any) -> None:
    kernel[grid](*args, **constants)


def _direct(
    kernel: Any, compiled: Any, grid: tuple[int], args: Sequence[Any], constants: dict[str, Any]
) -> tuple[Callable[..., Any], list[Any]] | None:
    """What launches a compiled kernel, and all that it takes; None where Triton has another form.

    Its own way looks up what it has compiled at each launch, which takes longer than all else. It
    goes by dtypes, by addresses and numbers that 16 divides and by numbers that are 1, all of which
    a plan is for.
    """
    try:
        names = list(kernel.arg_names)
        if list(compiled.src.signature) != names:
            return None
        # with a profiler's hooks, on the current stream
        run = compiled[grid[0], 1, 1]
        return run, [*args, *(constants[name] for name in names[len(args) :])]
    except (AttributeError, KeyError, TypeError):
        return None


def launch(kernel: Any, grid: tuple[int], *args: Any, **constants: Any) -> None:
    recorder: Recorder | None = getattr(_local, "recorder", None)
    if recorder is None:
        kernel[grid](*args, **constants)
    else:
        recorder.launch(kernel, grid, args, constants)


class Plan:
    """Memory to ask for and launches; called with what the recorder was given, gives the outputs.

    Tensors are numbered: those it is given, then its rooms.
    """

    def __init__(
        self, device: torch.device, rooms: Any, launches: list[Launch], outputs: Any
    ) -> None:
        self.device, self.index = device, device.index
        self.rooms, self.launches, self.outputs = rooms, launches, outputs

    def __call__(self, *given: Any) -> list[Any]:
        if self.index is None or self.index == _current_device():
            return self._made(given)
        with torch.cuda.device(self.index):
            return self._made(given)

    def _made(self, given: Any) -> list[Any]:
        slots, device = [*given], self.device
        for shape, strides, dtype in self.rooms:
            slots.append(_room(shape, strides, dtype=dtype, device=device))
        for run, template, places in self.launches:
            args = template.copy()
            for place, slot in places:
                args[place] = slots[slot]
            run(*args)
        return [None if slot is None else slots[slot] for slot in self.outputs]


class Recorder(TorchDispatchMode):
    """Looks on while a call is served, on this thread."""

    def __init__(self, device: torch.device, given: Sequence[Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device, self.given = device, given
        # held, or another could have its id
        self.held: list[Any] = []
        self.slots = {id(t): slot for slot, t in enumerate(given) if t is not None}
        self.rooms: list[Any] = []
        self.launches: list[Launch] = []
        self.whole, self.launching = True, False

    def __enter__(self) -> Any:
        _local.recorder = self
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *raised: Any) -> None:
        _local.recorder = None
        super().__exit__(*raised)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if self.launching or func is _OF_DTYPES:
            return made
        self.held.append(made)
        # what holds nothing is the same for all
        empty = isinstance(made, Tensor) and (made.is_meta or made.numel() == 0)
        if empty and not func._schema.is_mutable:
            return made
        if func in _ROOMS and made.device == self.device:
            self.slots[id(made)] = len(self.given) + len(self.rooms)
            self.rooms.append((made.shape, made.stride(), made.dtype))
        elif self._is_same(made, func, *args[:1]):
            self.slots[id(made)] = self.slots[id(args[0])]
        else:
            self.whole = False
        return made

    def _is_same(self, made: Any, func: Any, base: Any = None) -> bool:
        """Whether this is what it was, or a view: a kernel is given no more than the address."""
        if func._schema.is_mutable or id(base) not in self.slots or not isinstance(made, Tensor):
            return False
        at = made.data_ptr()
        return at != 0 and at == base.data_ptr() and made.dtype == base.dtype

    def launch(
        self, kernel: Any, grid: tuple[int], args: Sequence[Any], constants: dict[str, Any]
    ) -> None:
        self.launching = True
        try:
            compiled = kernel[grid](*args, **constants)
        finally:
            self.launching = False
        places, template = [], list(args)
        for place, value in enumerate(args):
            if not isinstance(value, Tensor):
                continue
            slot = self.slots.get(id(value))
            if slot is not None:
                places.append((place, slot))
                template[place] = None
            elif value.numel():
                self.whole = False
        direct = _direct(kernel, compiled, grid, template, constants)
        run, template = direct or (partial(_by_triton, kernel, grid, constants), template)
        self.launches.append(Launch(run, template, tuple(places)))

    def plan(self, outputs: Sequence[Tensor | None]) -> Plan | None:
        """What makes these again; None where that takes more than memory and launches."""
        first, wanted = len(self.given), []
        for each in outputs:
            slot = None if each is None else self.slots.get(id(each), -1)
            # a view of a room has its number, and perhaps another shape
            if each is not None and slot is not None and slot >= first:
                if self.rooms[slot - first] != (each.shape, each.stride(), each.dtype):
                    slot = -1
            if slot is not None and slot < first:
                return None
            wanted.append(slot)
        return Plan(self.device, self.rooms, self.launches, wanted) if self.whole else None
