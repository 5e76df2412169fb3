"""A network link of a bench's own: two network namespaces, a rate, and a latency.

Many kernels have no netem, as that of our machines. So this process carries the packets between two
TUN devices, one in each namespace. A packet leaves when those before it have left at the rate, and
arrives half of the round trip later. A buffer of one round trip at the rate stands before the link,
and what finds it full is dropped. TCP is the kernel's, with its slow start and its losses. Frames
have 9,000 bytes, since a process in Python does not carry 80,000 small ones a second.
Needs Linux, root, and `ip` (iproute2).
"""

from __future__ import annotations

import contextlib
import fcntl
import multiprocessing
import os
import select
import struct
import subprocess
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

MTU = 9_000
ADDRESS = {"near": "10.213.0.1", "far": "10.213.0.2"}
_SET_NAME, _TUN_WITHOUT_HEADER = 0x400454CA, 0x0001 | 0x1000  # of linux/if_tun.h


@dataclass
class Direction:
    """Packets from one device to the other."""

    source: int
    target: int
    bytes_per_s: float
    delay_s: float
    free_at: float = 0.0  # when the last packet has left
    carried: deque[tuple[float, bytes]] = field(default_factory=deque)  # time of arrival, packet

    def take(self) -> None:
        """Take what the source has sent, or drop it where the buffer is full."""
        with contextlib.suppress(BlockingIOError):
            while packet := os.read(self.source, MTU + 100):
                now = time.perf_counter()
                if self.free_at - now > 2 * self.delay_s:
                    continue
                self.free_at = max(now, self.free_at) + len(packet) / self.bytes_per_s
                self.carried.append((self.free_at + self.delay_s, packet))

    def give(self) -> None:
        """Hand over what has arrived."""
        while self.carried and self.carried[0][0] <= time.perf_counter():
            with contextlib.suppress(OSError):  # the device is full, so the packet is lost
                os.write(self.target, self.carried.popleft()[1])


@contextlib.contextmanager
def link(bytes_per_s: float, round_trip_s: float) -> Iterator[dict[str, list[str]]]:
    """Yield the words before a command that run it at the "near" and at the "far" end."""
    spaces = {end: f"dc-{end}-{os.getpid()}" for end in ADDRESS}
    with contextlib.ExitStack() as after:
        after.callback(_delete, spaces.values())
        devices = []
        for end, space in spaces.items():
            devices.append(_end(space, f"dc{end}{os.getpid()}", ADDRESS[end]))
            after.callback(os.close, devices[-1])
        there = Direction(*devices, bytes_per_s, round_trip_s / 2)
        back = Direction(*devices[::-1], bytes_per_s, round_trip_s / 2)
        context = multiprocessing.get_context("fork")
        carrier = context.Process(target=_carry, args=((there, back),), daemon=True)
        carrier.start()
        after.callback(carrier.join)
        after.callback(carrier.kill)  # before the devices go
        yield {end: ["ip", "netns", "exec", space] for end, space in spaces.items()}


def _delete(spaces: Iterable[str]) -> None:
    for space in spaces:
        _ip("netns", "delete", space, check=False)


def _end(space: str, name: str, address: str) -> int:
    """Make a namespace with a TUN device in it, and return the device's descriptor."""
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(device, _SET_NAME, struct.pack("16sH22x", name.encode(), _TUN_WITHOUT_HEADER))
    _ip("netns", "add", space)
    _ip("link", "set", name, "netns", space)
    for words in (
        ("link", "set", "lo", "up"),
        ("address", "add", f"{address}/30", "dev", name),
        ("link", "set", name, "mtu", str(MTU), "txqueuelen", "5000", "up"),
    ):
        _ip("-n", space, *words)
    return device


def _ip(*words: str, check: bool = True) -> None:
    subprocess.run(["ip", *words], check=check)


def _carry(directions: tuple[Direction, Direction]) -> None:
    """Carry packets until this process is killed; before all others, for a wire needs no CPU."""
    os.nice(-20)
    while True:
        due = [way.carried[0][0] for way in directions if way.carried]
        wait = max(0.0, min(due) - time.perf_counter()) if due else None
        select.select([way.source for way in directions], [], [], wait)
        for way in directions:
            way.take()
            way.give()
