"""Free ports of an address, for a rendezvous or a daemon that is started in a moment."""

from __future__ import annotations

import random
import socket
from contextlib import suppress

from deepclust.errors import ResourceError

PORTS = range(20000, 32768)  # Linux gives connections those above


def free_ports(address: str, count: int) -> list[int]:
    """Return ports of that address that are free at this moment, or raise `ResourceError`.

    They are below those that the kernel gives to connections, and drawn at random. So another
    process hardly ever takes one between now and its use.
    """
    ports: list[int] = []
    for port in random.sample(PORTS, len(PORTS)):
        with suppress(OSError), socket.create_server((address, port)):
            ports.append(port)
        if len(ports) == count:
            return ports
    raise ResourceError(f"{address} has fewer than {count} free ports in {PORTS[0]}-{PORTS[-1]}")


def free_port(address: str) -> int:
    """Return one free port of that address."""
    return free_ports(address, 1)[0]
