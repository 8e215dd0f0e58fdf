"""The interface through which a host reaches the others, and the port of their ranks. Standard library only."""

from __future__ import annotations

import fcntl
import socket
import struct
from collections.abc import Sequence

_SIOCGIFADDR = 0x8915
_ANY_PORT = 9
MASTER_PORT = "7777"
"""Where the first host's first rank listens for the others. AWS's toolkit uses it too."""


def interface_to(peers: Sequence[str]) -> str | None:
    """Return the interface on the route to the first peer that resolves; None if there is none."""
    for peer in peers:
        try:
            address = socket.getaddrinfo(peer, _ANY_PORT, socket.AF_INET, socket.SOCK_DGRAM)[0][4]
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
                probe.connect(address)  # sends nothing; the kernel chooses the route
                own = probe.getsockname()[0]
        except OSError:
            continue
        if own.startswith("127."):
            return "lo" if "lo" in interfaces() else None
        return next((name for name in interfaces() if _address_of(name) == own), None)
    return None


def interfaces() -> list[str]:
    try:
        return [name for _, name in socket.if_nameindex()]
    except OSError:
        return []


def _address_of(interface: str) -> str | None:
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", interface.encode()[:15]))
        return socket.inet_ntoa(answer[20:24])
    except OSError:
        return None
