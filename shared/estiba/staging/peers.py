"""The connections between hosts that stage together: each serves its verified pieces to the others.

A connection opens with a challenge in both directions under a key that only hosts of this job with the same listing of
the source can compute; data of another job or of another version is never exchanged. After that the client sends
requests: `G` and a piece's number for its digest and bytes, `S` and this host's status for the other's.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
import socket
import socketserver
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from estiba.staging.assignments import Assignments
from estiba.staging.files import StagedFiles

BUFFER_BYTES = 2**18
TIMEOUT_S = 5.0
HOLD_WAIT_S = 1.0
"""How long a request for a piece waits at its owner before the answer is `not yet`."""
_MAX_LINE_BYTES = 2**22
_HEAD = struct.Struct("!c16s")


@dataclass(frozen=True, kw_only=True)
class Status:
    """What a host tells the others."""

    host: int
    is_done: bool = False
    failure: str | None = None
    is_fatal: bool = False
    """The failure concerns every host: the source changed."""
    held: str = "0"
    """The held pieces, as the bits of a hexadecimal number."""
    done_hosts: str = "0"
    """The hosts that are known to be done, likewise. A late host does not wait for one that has left."""


@dataclass(frozen=True, kw_only=True)
class Identity:
    """What two hosts must agree on before they exchange pieces."""

    source: str
    """A digest of the source's URL: two stagings of one job that follow each other are told apart."""
    key: bytes
    """From the job's name, its hosts, the listing, and ESTIBA_STAGING_TOKEN if that is set."""

    @classmethod
    def of(cls, *, source: str, fingerprint: str, job: str, hosts: tuple[str, ...], token: str) -> Identity:
        text = json.dumps([job, list(hosts), fingerprint, token])
        return cls(source=hashlib.sha256(source.encode()).hexdigest(), key=hashlib.sha256(text.encode()).digest())

    def proof(self, nonce: str, side: str) -> str:
        return hmac.new(self.key, f"{side} {nonce}".encode(), "sha256").hexdigest()


class OtherVersion(Exception):
    """The peer stages the same source and has another listing of it, or another token."""


class NotYet(Exception):
    """The peer does not hold the piece so far, or is busy with another source."""


class Server(socketserver.ThreadingTCPServer):
    """Serves this host's pieces. `on_status` learns what a peer reports and returns this host's status."""

    allow_reuse_address = True
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(
        self,
        address: tuple[str, int],
        identity: Identity,
        assignments: Assignments,
        files: StagedFiles,
        digests: dict[int, bytes],
        on_status: Callable[[Status], Status],
    ) -> None:
        self.identity, self.assignments, self.files, self.digests = identity, assignments, files, digests
        self.on_status = on_status
        super().__init__(address, _Handler)
        threading.Thread(target=self.serve_forever, args=(0.1,), name="estiba-stage-server", daemon=True).start()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A peer that went away is the monitor's business."""


class _Handler(socketserver.BaseRequestHandler):
    server: Server

    def handle(self) -> None:
        connection: socket.socket = self.request
        connection.settimeout(60.0)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        identity = self.server.identity
        hello = _receive_line(connection)
        if hello.get("source") != identity.source:
            _send_line(connection, {"refused": "source"})
            return
        nonce = secrets.token_hex(16)
        _send_line(connection, {"nonce": nonce, "proof": identity.proof(str(hello.get("nonce")), "server")})
        if not hmac.compare_digest(str(_receive_line(connection).get("proof")), identity.proof(nonce, "client")):
            _send_line(connection, {"refused": "version"})
            return
        _send_line(connection, {"accepted": True})
        while command := connection.recv(1):
            if command == b"S":
                theirs = Status(**_receive_line(connection))
                _send_line(connection, asdict(self.server.on_status(theirs)))
            elif command == b"G":
                (index,) = struct.unpack("!I", _receive(connection, 4))
                self._send_piece(connection, index)
            else:
                return

    def _send_piece(self, connection: socket.socket, index: int) -> None:
        server = self.server
        if index >= len(server.files.table.pieces) or not server.assignments.wait_held(index, HOLD_WAIT_S):
            connection.sendall(_HEAD.pack(b"N", bytes(16)))
            return
        descriptor, at, size = server.files.location(server.files.table.pieces[index])
        connection.sendall(_HEAD.pack(b"D", server.digests[index]))
        end = at + size
        with open(os.dup(descriptor), "rb") as file:
            connection.sendfile(file, at, end - at)


class Link:
    """A client's connection to one peer. Used by one thread. All methods raise OSError when the peer is away."""

    def __init__(self, address: tuple[str, int], identity: Identity) -> None:
        """Raises OtherVersion, NotYet, OSError."""
        self._socket = socket.create_connection(address, timeout=TIMEOUT_S)
        self._buffer = memoryview(bytearray(BUFFER_BYTES))
        try:
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._open(identity)
        except BaseException:
            self.close()
            raise

    def _open(self, identity: Identity) -> None:
        nonce = secrets.token_hex(16)
        _send_line(self._socket, {"source": identity.source, "nonce": nonce})
        reply = _receive_line(self._socket)
        if reply.get("refused") == "source":
            raise NotYet
        _send_line(self._socket, {"proof": identity.proof(str(reply.get("nonce")), "client")})
        is_same = hmac.compare_digest(str(reply.get("proof")), identity.proof(nonce, "server"))
        if not is_same or not _receive_line(self._socket).get("accepted"):
            raise OtherVersion

    def exchange(self, mine: Status) -> Status:
        """Send this host's status and return the peer's."""
        self._socket.sendall(b"S")
        _send_line(self._socket, asdict(mine))
        return Status(**_receive_line(self._socket))

    def piece(self, index: int, size_bytes: int) -> tuple[bytes, Iterator[memoryview]]:
        """Return the peer's digest of a piece, and its bytes as they arrive. Raises NotYet."""
        self._socket.sendall(b"G" + struct.pack("!I", index))
        kind, digest = _HEAD.unpack(_receive(self._socket, _HEAD.size))
        if kind != b"D":
            raise NotYet
        return digest, self._chunks(size_bytes)

    def close(self) -> None:
        self._socket.close()

    def _chunks(self, size_bytes: int) -> Iterator[memoryview]:
        while size_bytes:
            filled, wanted = 0, min(BUFFER_BYTES, size_bytes)
            while filled < wanted:
                count = self._socket.recv_into(self._buffer[filled:wanted])
                if not count:
                    raise ConnectionError("the peer closed the connection")
                filled += count
            size_bytes -= wanted
            yield self._buffer[:wanted]


def _send_line(connection: socket.socket, value: dict[str, Any]) -> None:
    connection.sendall(json.dumps(value).encode() + b"\n")


def _receive_line(connection: socket.socket) -> dict[str, Any]:
    """Return one JSON object. Raises OSError if there is none."""
    line = bytearray()
    while not line.endswith(b"\n"):
        chunk = connection.recv(65536, socket.MSG_PEEK)
        at = chunk.find(b"\n") + 1 or len(chunk)
        if not chunk or len(line) + at > _MAX_LINE_BYTES:
            raise ConnectionError("the peer closed the connection")
        line += _receive(connection, at)
    try:
        value = json.loads(line)
    except ValueError:
        raise ConnectionError("what the peer sent is not JSON") from None
    if not isinstance(value, dict):
        raise ConnectionError("what the peer sent is not an object")
    return value


def _receive(connection: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        chunk = connection.recv(size - len(data))
        if not chunk:
            raise ConnectionError("the peer closed the connection")
        data += chunk
    return bytes(data)
