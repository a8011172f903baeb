"""The steps of a call, written down once and made again.

What host_*.py works out follows from a call's sizes, strides, dtypes, addresses and form. So a
`Recorder` looks on while they serve a call, and what it has seen is a `Plan`: the memory to ask
for, and the launches, with copies and sums of whole tensors between them. Any other operator of
torch's needs the long way every time, and such a call has no plan.
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
# what gives memory of its own, and in it what another tensor holds
_COPIES = _aten.clone.default, _aten._to_copy.default


def _sum_into(one: Tensor, other: Tensor, out: Tensor) -> Tensor:
    return torch.add(one, other, out=out)


# what writes into a tensor that is there: of numbers and whole tensors alone
_WRITES: dict[Any, Callable[..., Any]] = {
    _aten.copy_.default: Tensor.copy_,
    _aten.add_.Tensor: Tensor.add_,
    _aten.add.out: _sum_into,
}
_below_autograd = torch._C._AutoDispatchBelowAutograd
_has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
_room = torch.empty_strided
_current_device = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)
# a backward runs on a thread of its own
_local = threading.local()


class Memory(NamedTuple):
    """A room of its own, or how the tensor of the slot `of` is read."""

    of: int | None
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype


def _read_as(t: Tensor, shape: Any, strides: Any, dtype: torch.dtype) -> Tensor:
    return (t if t.dtype is dtype else t.view(dtype)).as_strided(shape, strides)


class Step(NamedTuple):
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
    """Memory and steps; called with what the recorder was given, gives the outputs.

    Tensors are numbered: those it is given, then its memory. computes: whether a step is an
    operator of torch's, of which autograd is to see nothing.
    """

    def __init__(
        self, device: torch.device, memory: Any, steps: list[Step], outputs: Any, computes: bool
    ) -> None:
        self.device, self.index = device, device.index
        self.memory, self.steps, self.outputs = memory, steps, outputs
        self.computes = computes

    def __call__(self, *given: Any) -> list[Any]:
        if self.computes:
            with _below_autograd():
                return self._on_device(given)
        return self._on_device(given)

    def _on_device(self, given: Any) -> list[Any]:
        if self.index is None or self.index == _current_device():
            return self._made(given)
        with torch.cuda.device(self.index):
            return self._made(given)

    def _made(self, given: Any) -> list[Any]:
        slots, device = [*given], self.device
        for of, shape, strides, dtype in self.memory:
            if of is None:
                slots.append(_room(shape, strides, dtype=dtype, device=device))
            else:
                slots.append(_read_as(slots[of], shape, strides, dtype))
        for run, template, places in self.steps:
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
        self.memory: list[Memory] = []
        self.steps: list[Step] = []
        self.whole, self.launching, self.computes = True, False, False

    def __enter__(self) -> Any:
        _local.recorder = self
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *raised: Any) -> None:
        _local.recorder = None
        super().__exit__(*raised)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.launching or func is _OF_DTYPES:
            return func(*args, **(kwargs or {}))
        if _has_kernel(func.name(), "CompositeImplicitAutograd"):
            # made of others, each of which is known or is not
            with self:
                made = func.decompose(*args, **(kwargs or {}))
            _local.recorder = self
            return made
        made = func(*args, **(kwargs or {}))
        self.held.append(made)
        # what holds nothing is the same for all
        empty = isinstance(made, Tensor) and (made.is_meta or made.numel() == 0)
        if empty and not func._schema.is_mutable:
            return made
        if func in _ROOMS and made.device == self.device:
            self._add_room(made)
        elif func in _COPIES and made.device == self.device and id(args[0]) in self.slots:
            self._add_room(made)
            self._write(_aten.copy_.default, [made, args[0]])
        elif func in _WRITES and not (kwargs and kwargs.keys() != {"out"}):
            self._write(func, [*args, *(kwargs or {}).values()])
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
        return at != 0 and at == base.data_ptr() and made.itemsize == base.itemsize

    def _add_room(self, made: Tensor) -> None:
        self.slots[id(made)] = len(self.given) + len(self.memory)
        self.memory.append(Memory(None, made.shape, made.stride(), made.dtype))

    def _write(self, func: Any, args: list[Any]) -> None:
        """An operator that writes into one of its arguments."""
        self.computes = True
        places = []
        for place, value in enumerate(args):
            if isinstance(value, Tensor):
                slot = self._slot_as(value)
                self.whole = self.whole and slot is not None
                places.append((place, slot))
                args[place] = None
            elif type(value) not in (bool, int, float):
                self.whole = False
        self.steps.append(Step(_WRITES[func], args, tuple(places)))  # type: ignore[arg-type]

    def _slot_as(self, t: Tensor) -> int | None:
        """The number of what lies as t does; None of what is not known."""
        slot = self.slots.get(id(t))
        if slot is None or self._lies(slot) == (t.shape, t.stride(), t.dtype):
            return slot
        self.memory.append(Memory(slot, t.shape, t.stride(), t.dtype))
        self.computes = True
        return len(self.given) + len(self.memory) - 1

    def _lies(self, slot: int) -> tuple[Any, ...]:
        first = len(self.given)
        if slot >= first:
            return self.memory[slot - first][1:]
        t = self.given[slot]
        return t.shape, t.stride(), t.dtype

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
                if self._lies(slot)[2] is not value.dtype:
                    slot = self._slot_as(value)
                places.append((place, slot))
                template[place] = None
            elif value.numel():
                self.whole = False
        direct = _direct(kernel, compiled, grid, template, constants)
        run, template = direct or (partial(_by_triton, kernel, grid, constants), template)
        self.steps.append(Step(run, template, tuple(places)))  # type: ignore[arg-type]

    def plan(self, outputs: Sequence[Any], kept: Sequence[Any] = ()) -> Plan | None:
        """What makes these again; None where that takes more than memory and steps.

        kept: outputs that no caller sees, and that may be views of what the steps have made.
        """
        first = len(self.given)
        wanted: list[int | None] = []
        for number, each in enumerate((*outputs, *kept)):
            if each is None:
                wanted.append(None)
                continue
            made = self.slots.get(id(each))
            slot = self._slot_as(each)
            if made is None or made < first or (slot != made and number < len(outputs)):
                return None
            wanted.append(slot)
        if not self.whole:
            return None
        return Plan(self.device, self.memory, self.steps, wanted, self.computes)
