"""Real processes with a gloo group, kept for the whole run: one pool for each number of them."""

from __future__ import annotations

import contextlib
import datetime
import os
import tempfile
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.multiprocessing as mp

# generous: the machine may be busy with other tests
TIMEOUT = datetime.timedelta(seconds=120)


def _serve(rank: int, ranks: int, path: str, timeout: datetime.timedelta, pipe: Any) -> None:
    # the other tests' processors stay free, and nothing leaves this machine
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{path}", rank=rank, world_size=ranks, timeout=timeout
    )
    while (task := pipe.recv()) is not None:
        function, args = task
        torch.manual_seed(20)
        try:
            pipe.send((True, function(rank, *args)))
        except Exception as error:
            pipe.send((False, (type(error).__name__, str(error), traceback.format_exc())))
    torch.distributed.destroy_process_group()


class Failed(Exception):
    """What a process raised: .kind and .text, and its traceback as the message."""

    def __init__(self, rank: int, kind: str, text: str, trace: str) -> None:
        super().__init__(f"rank {rank}:\n{trace}")
        self.kind, self.text = kind, text


class Processes:
    """`ranks` processes that run functions of test modules, each on its own rank."""

    def __init__(self, ranks: int, timeout: datetime.timedelta = TIMEOUT) -> None:
        # one process imports torch, and the others are forked from it
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(["torch", "truenorm", "torch.distributed"])
        self._folder = tempfile.TemporaryDirectory(prefix="truenorm-ranks-")
        path = os.path.join(self._folder.name, "rendezvous")
        self.ranks, self.processes, self._pipes = ranks, [], []
        for rank in range(ranks):
            here, there = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, ranks, path, timeout, there), daemon=True
            )
            process.start()
            there.close()
            self.processes.append(process)
            self._pipes.append(here)

    def outcomes(self, function: Callable[..., Any], *args: Any, each: Sequence[Any] = ()) -> list:
        """function(rank, *args), or function(rank, *each[rank], *args): what every rank gave.

        An exception stands in the place of what a rank did not give.
        """
        for rank, pipe in enumerate(self._pipes):
            own = each[rank] if each else ()
            pipe.send((function, (*own, *args)))
        found: list[Any] = []
        for rank, pipe in enumerate(self._pipes):
            try:
                fine, result = pipe.recv()
            except EOFError:
                self.processes[rank].join(10)
                found.append(ProcessLookupError(f"ended: {self.processes[rank].exitcode}"))
                continue
            found.append(result if fine else Failed(rank, *result))
        return found

    def run(self, function: Callable[..., Any], *args: Any, each: Sequence[Any] = ()) -> list:
        """What every rank gave; the first exception is raised."""
        found = self.outcomes(function, *args, each=each)
        for result in found:
            if isinstance(result, Exception):
                raise result
        return found

    def close(self) -> None:
        for pipe in self._pipes:
            with contextlib.suppress(OSError):
                pipe.send(None)
        for process in self.processes:
            process.join(5)
            if process.is_alive():
                process.kill()
        self._folder.cleanup()


_KEPT: dict[int, Processes] = {}


def processes(ranks: int) -> Processes:
    """The pool of so many processes, started at first use."""
    if ranks not in _KEPT:
        _KEPT[ranks] = Processes(ranks)
    return _KEPT[ranks]


def close_all() -> None:
    while _KEPT:
        _KEPT.popitem()[1].close()
