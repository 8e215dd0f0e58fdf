"""Where the agent of each host of a job listens. Standard library only.

Most schedulers name hosts that resolve, and all agents listen on one port. AWS Batch and torchrun tell only the first
host's address: its agent learns the others' from their calls and tells them to all.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Mapping, Sequence
from typing import Any

Address = tuple[str, int]


class Addresses:
    """The addresses that one host knows. Thread-safe."""

    def __init__(self, hosts: Sequence[str], current: str, port: int, *, first_address: str | None = None) -> None:
        """With `first_address` the names are made up, and `port` is the first host's; others listen on a free one."""
        self._hosts, self._current, self._port = list(hosts), current, port
        self._are_learned = first_address is not None
        known = {hosts[0]: first_address} if first_address is not None else {host: host for host in hosts}
        self._known: dict[str, Address] = {host: (address, port) for host, address in known.items()}
        self._lock = threading.Lock()

    @property
    def depend_on(self) -> str | None:
        """The host without which the others stay unknown; None if all are known."""
        return self._hosts[0] if self._are_learned else None

    @property
    def port(self) -> int:
        """Where this host listens, once it does."""
        return self._port

    def of(self, host: str) -> Address | None:
        """Return where a host is called; None as long as that is not known."""
        with self._lock:
            return self._known.get(host)

    def listen(self) -> socket.socket:
        """Return this host's listening socket. Raises OSError if its port is taken."""
        if self._are_learned:
            address, port = "0.0.0.0", self._port if self._current == self._hosts[0] else 0
        else:
            address, port = _address_to_bind(self._current, self._hosts), self._port
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((address, port))
        listener.listen(128)
        self._port = listener.getsockname()[1]
        return listener

    def message(self) -> dict[str, Any]:
        """Return what this host tells the others about addresses."""
        if not self._are_learned:
            return {}
        if self._current != self._hosts[0]:
            return {"port": self._port}
        with self._lock:
            return {"addresses": dict(self._known)}

    def learn(self, host: str, message: Mapping[str, Any], caller: str | None) -> None:
        """Note what another host's message says; `caller` is the address it called from, if it called.

        Raises KeyError, TypeError, ValueError or AttributeError for a message that is none.
        """
        if not self._are_learned:
            return
        found: dict[str, Address] = {}
        if host == self._hosts[0]:
            found = {name: (str(address), int(port)) for name, (address, port) in message["addresses"].items()}
            found = {name: found[name] for name in self._hosts[1:] if name in found}
        elif caller is not None:
            found = {host: (caller, int(message["port"]))}
        with self._lock:
            self._known |= found


def _address_to_bind(current: str, hosts: Sequence[str]) -> str:
    """All interfaces, but only this host's own address where the hosts share one machine's loopback network."""
    own = _resolved(current)
    found = [address for address in map(_resolved, hosts) if address is not None]
    is_loopback = len(found) > 1 and all(address.startswith("127.") for address in found)
    return own if is_loopback and own is not None else "0.0.0.0"


def _resolved(host: str) -> str | None:
    try:
        return socket.gethostbyname(host)
    except OSError:
        return None
