"""Run a command on several hosts' addresses with latency between them, on one Linux machine.

    sudo python tools/several_hosts.py --hosts 3 --delay-ms 2 \\
        .venv/bin/python tools/scale_measure.py equality

Each host is a network namespace with an address of its own, 10.7.0.1 and on. Packets between them
go through this process, which holds each for the delay: what `tc netem delay` does, for kernels
without it. Every command gets RANK, RANKS, MASTER and GLOO_SOCKET_IFNAME. Needs root and iproute2;
the namespaces are removed at the end.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import ctypes
import fcntl
import os
import select
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

_NAME = "truenorm-host{}"
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
_CLONE_NEWNET = 0x40000000


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


@contextlib.contextmanager
def _inside(host: int) -> Iterator[None]:
    """This thread in the host's namespace."""
    setns = ctypes.CDLL(None, use_errno=True).setns
    here = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    there = os.open(f"/run/netns/{_NAME.format(host)}", os.O_RDONLY)
    try:
        if setns(there, _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "cannot enter the namespace: run this as root")
        yield
    finally:
        setns(here, _CLONE_NEWNET)
        os.close(here)
        os.close(there)


def _tunnel(host: int) -> int:
    """A TUN device in the host's namespace; what it sends is read from the descriptor."""
    with _inside(host):
        descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(descriptor, _TUNSETIFF, struct.pack("16sH14x", b"tun0", _IFF_TUN | _IFF_NO_PI))
        return descriptor


@contextlib.contextmanager
def hosts(count: int, delay: float) -> Iterator[None]:
    """So many namespaces, and a thread that carries packets between them."""
    tunnels: list[int] = []
    stop = threading.Event()
    carrier = threading.Thread(target=_carry, args=(tunnels, delay, stop))
    names = [_NAME.format(host) for host in range(count)]
    try:
        for host, name in enumerate(names):
            _ip("netns", "add", name)
            tunnels.append(_tunnel(host))
            _ip("-n", name, "addr", "add", f"10.7.0.{host + 1}/24", "dev", "tun0")
            for device in ("tun0", "lo"):
                _ip("-n", name, "link", "set", device, "up")
        carrier.start()
        yield
    finally:
        stop.set()
        if carrier.is_alive():
            carrier.join()
        for descriptor in tunnels:
            os.close(descriptor)
        for name in names:
            subprocess.run(["ip", "netns", "del", name], stderr=subprocess.DEVNULL)


def _carry(tunnels: list[int], delay: float, stop: threading.Event) -> None:
    held: collections.deque[tuple[float, int, bytes]] = collections.deque()
    while not stop.is_set():
        wait = 0.05 if not held else max(0.0, held[0][0] - time.monotonic())
        for descriptor in select.select(tunnels, [], [], wait)[0]:
            packet = os.read(descriptor, 65536)
            # IPv4: the destination's last byte
            if packet[0] >> 4 == 4 and 1 <= packet[19] <= len(tunnels):
                held.append((time.monotonic() + delay, tunnels[packet[19] - 1], packet))
        while held and held[0][0] <= time.monotonic():
            _, to, packet = held.popleft()
            with contextlib.suppress(BlockingIOError):  # a full queue drops, as a network does
                os.write(to, packet)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--hosts", type=int, default=3)
    parser.add_argument("--delay-ms", type=float, default=1.0, help="of each packet, one way")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    args = parser.parse_args()
    with hosts(args.hosts, args.delay_ms / 1e3):
        running = []
        for rank in range(args.hosts):
            environment = os.environ | {
                "RANK": str(rank),
                "RANKS": str(args.hosts),
                "MASTER": "10.7.0.1:29500",
                "GLOO_SOCKET_IFNAME": "tun0",
                "OMP_NUM_THREADS": "1",
            }
            command = ["ip", "netns", "exec", _NAME.format(rank), *args.command]
            running.append(subprocess.Popen(command, env=environment))
        return max(process.wait() for process in running)


if __name__ == "__main__":
    sys.exit(main())
