"""Memory of tensors and of programs, stricter than a GPU's: see ptx/__init__.py."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

from .traffic import Traffic
from .values import WARP, PtxError

_SEVERAL, _NOBODY = -2, -1


class Room:
    """What one tensor holds, and which program read and wrote each byte of it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        self.held = storage
        self.start, self.size = storage.data_ptr(), storage.nbytes()
        # not by torch: a storage that numpy has seen cannot be resized any more
        memory = (ctypes.c_uint8 * self.size).from_address(self.start)
        self.bytes = np.frombuffer(memory, np.uint8)
        self.writer = np.full(self.size, _NOBODY, np.int32)
        self.reader = np.full(self.size, _NOBODY, np.int32)

    @property
    def touched(self) -> tuple[int, int]:
        """Bytes that some program has read, and that some has written."""
        return int((self.reader != _NOBODY).sum()), int((self.writer != _NOBODY).sum())


class Memory:
    """That of all tensors of a launch, by their addresses on the host."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        rooms = {room.start: room for room in map(Room, tensors) if room.size}
        self.rooms = sorted(rooms.values(), key=lambda room: room.start)
        self.starts = np.array([room.start for room in self.rooms], np.uint64)

    def _parts(self, addresses: Any, size: int, what: str) -> Any:
        """(room, which of the addresses, their places as columns of bytes) for each room met."""
        if (addresses % np.uint64(size)).any():
            raise PtxError(f"{what}: {size} bytes at an address that is no multiple of it")
        found = np.searchsorted(self.starts, addresses, side="right").astype(np.int64) - 1
        for number in np.unique(found):
            which = np.flatnonzero(found == number)
            room = self.rooms[max(number, 0)]
            at = (addresses[which] - np.uint64(room.start)).astype(np.int64)
            if number < 0 or (at < 0).any() or (at + size > room.size).any():
                raise PtxError(f"{what}: outside of all memory that the kernel was given")
            yield room, which, at[:, None] + np.arange(size)

    def sizes(self, addresses: Any) -> Any:
        """Bytes of the tensors that addresses are in."""
        found = np.searchsorted(self.starts, addresses, side="right").astype(np.int64) - 1
        return np.array([room.size for room in self.rooms])[np.maximum(found, 0)]

    def load(self, addresses: Any, size: int, programs: Any, what: str) -> Any:
        """Rows of bytes."""
        loaded = np.empty((len(addresses), size), np.uint8)
        for room, which, places in self._parts(addresses, size, what):
            loaded[which] = room.bytes[places]
            of = np.broadcast_to(programs[which, None], places.shape)
            writer = room.writer[places]
            if ((writer != _NOBODY) & (writer != of)).any():
                raise PtxError(f"{what}: reads what another program writes")
            before = room.reader[places]
            room.reader[places] = np.where((before == _NOBODY) | (before == of), of, _SEVERAL)
            # two programs in one step: the last of them was noted alone
            room.reader[places[room.reader[places] != of]] = _SEVERAL
        return loaded

    def store(self, addresses: Any, values: Any, programs: Any, what: str) -> None:
        size = values.shape[1]
        for room, which, places in self._parts(addresses, size, what):
            of = np.broadcast_to(programs[which, None], places.shape)
            new = values[which] != room.bytes[places]
            reader, writer = room.reader[places], room.writer[places]
            if (new & (reader != _NOBODY) & (reader != of)).any():
                raise PtxError(f"{what}: writes what another program reads")
            if (new & (writer != _NOBODY) & (writer != of)).any():
                raise PtxError(f"{what}: writes what another program writes")
            room.bytes[places] = values[which]
            room.writer[places] = of
            if (room.bytes[places] != values[which]).any():
                raise PtxError(f"{what}: threads write different values to one place")


class Shared:
    """The shared memory of some programs, and which warp last read and wrote each byte, when."""

    def __init__(self, programs: int, size: int) -> None:
        self.size = size
        self.bytes = np.full(programs * size, 0xFF, np.uint8)
        self.barriers = np.zeros(programs, np.int64)
        self.written = np.full(programs * size, -1, np.int64)
        self.writer = np.full(programs * size, _NOBODY, np.int32)
        self.was_read = np.full(programs * size, -1, np.int64)
        self.reader = np.full(programs * size, _NOBODY, np.int32)
        # copies on their way
        self.coming = np.zeros(programs * size, np.bool_)

    def _places(self, addresses: Any, size: int, programs: Any, what: str) -> Any:
        at = addresses.astype(np.int64)
        if (at % size).any():
            raise PtxError(f"{what}: {size} bytes at an address that is no multiple of it")
        if (at + size > self.size).any():
            raise PtxError(f"{what}: outside of the {self.size} bytes of shared memory")
        return (programs * self.size + at)[:, None] + np.arange(size)

    def load(self, addresses: Any, size: int, programs: Any, warps: Any, what: str) -> Any:
        places = self._places(addresses, size, programs, what)
        now = np.broadcast_to(self.barriers[programs][:, None], places.shape)
        of = np.broadcast_to(warps[:, None], places.shape)
        if self.coming[places].any():
            raise PtxError(f"{what}: reads a copy that was not waited for")
        if ((self.written[places] == now) & (self.writer[places] != of)).any():
            raise PtxError(f"{what}: reads what another warp wrote, with no barrier between")
        fresh = (self.was_read[places] != now) | (self.reader[places] == of)
        self.reader[places] = np.where(fresh, of, _SEVERAL)
        # two warps in one step: the last of them was noted alone
        self.reader[places[self.reader[places] != of]] = _SEVERAL
        self.was_read[places] = now
        return self.bytes[places]

    def _note_write(self, places: Any, new: Any, programs: Any, warps: Any, what: str) -> None:
        now = np.broadcast_to(self.barriers[programs][:, None], places.shape)
        of = np.broadcast_to(warps[:, None], places.shape)
        if (self.coming[places] & new).any():
            raise PtxError(f"{what}: writes where a copy is on its way")
        if (new & (self.was_read[places] == now) & (self.reader[places] != of)).any():
            raise PtxError(f"{what}: writes what another warp read, with no barrier between")
        if (new & (self.written[places] == now) & (self.writer[places] != of)).any():
            raise PtxError(f"{what}: writes what another warp wrote, with no barrier between")
        self.written[places], self.writer[places] = now, of

    def store(self, addresses: Any, values: Any, programs: Any, warps: Any, what: str) -> None:
        places = self._places(addresses, values.shape[1], programs, what)
        self._note_write(places, self.bytes[places] != values, programs, warps, what)
        self.bytes[places] = values
        if (self.bytes[places] != values).any():
            raise PtxError(f"{what}: threads write different values to one place")

    def expect(self, addresses: Any, size: int, programs: Any, warps: Any, what: str) -> Any:
        """The places of copies that are on their way from now on."""
        places = self._places(addresses, size, programs, what)
        self._note_write(places, np.True_, programs, warps, what)
        self.coming[places] = True
        return places

    def arrive(self, places: Any, values: Any, programs: Any, warps: Any) -> None:
        self.coming[places] = False
        self.bytes[places] = values
        self.written[places] = self.barriers[programs][:, None]
        self.writer[places] = warps[:, None]


class Copy(NamedTuple):
    """One asynchronous copy of some lanes; group: the number of its group, by lanes."""

    lanes: Any
    places: Any
    values: Any
    group: Any


@dataclass
class State:
    """Some programs in the middle of a kernel."""

    lanes: int
    threads: int
    first: int
    programs: int
    registers: list[Any]
    parameters: dict[str, Any]
    memory: Memory
    shared: Shared
    traffic: Traffic | None = None
    copies: list[Copy] = field(default_factory=list)

    def __post_init__(self) -> None:
        lane = np.arange(self.lanes)
        self.lane = lane
        self.program = lane // self.threads
        self.warp = (lane % self.threads // WARP).astype(np.int32)
        self.groups = np.zeros(self.lanes, np.int64)

    def special(self, name: str) -> Any:
        """%tid.x and the like."""
        whole = {
            "%tid.x": lambda: self.lane % self.threads,
            "%ctaid.x": lambda: self.program + self.first,
            "%nctaid.x": lambda: np.full(self.lanes, self.programs),
            "%ntid.x": lambda: np.full(self.lanes, self.threads),
            "%laneid": lambda: self.lane % WARP,
        }
        if name not in whole:
            raise PtxError(f"a register that is not known: {name}")
        return whole[name]().astype(np.uint32)

    def where(self, mask: Any) -> Any:
        """Numbers of the lanes that are at work."""
        return self.lane if mask is None else np.flatnonzero(mask)
