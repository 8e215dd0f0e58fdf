"""A read-only S3 endpoint with the delay and the bandwidth of a far one, which takes next to nothing of the processor.

    python benchmarks/endpoint/shaped_s3.py FOLDER --port 8080 --latency-ms 25 --mb-per-s 90    # FOLDER/BUCKET/KEY

For benchmarks whose client and server share one machine: what the server costs is not measured with the client. It
lists, and answers HEAD and (ranged, conditional) GET; it does not look at signatures. Bodies go from file to socket by
sendfile, in pieces that keep to the bandwidth of their connection, and with --total-mb-per-s to that of the endpoint.
One line a request of an object goes to standard output; it ends with the bytes that were sent.
"""

from __future__ import annotations

import argparse
import os
import re
import socket
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

PIECE_BYTES = 256 * 1024
DATE = "Wed, 21 Oct 2026 07:28:00 GMT"
REASONS = {200: "OK", 206: "Partial Content", 400: "Bad Request", 404: "Not Found", 412: "Precondition Failed",
           416: "Range Not Satisfiable", 501: "Not Implemented"}  # fmt: skip


@dataclass(frozen=True)
class Shape:
    latency_s: float
    """From a request to the first byte of its answer."""
    bytes_per_s: float
    """Of each connection."""
    total: Total | None = None


class Total:
    """The bandwidth that all connections share: each takes its turn on one time line."""

    def __init__(self, bytes_per_s: float) -> None:
        self._bytes_per_s = bytes_per_s
        self._lock = threading.Lock()
        self._free_at = 0.0

    def wait(self, size_bytes: int) -> None:
        with self._lock:
            self._free_at = max(self._free_at, time.monotonic()) + size_bytes / self._bytes_per_s
            free_at = self._free_at
        time.sleep(max(0.0, free_at - time.monotonic()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--latency-ms", type=float, default=0.0)
    parser.add_argument("--mb-per-s", type=float, default=1e6)
    parser.add_argument("--total-mb-per-s", type=float, help="of all connections together")
    options = parser.parse_args()
    total = Total(options.total_mb_per_s * 1e6) if options.total_mb_per_s else None
    shape = Shape(options.latency_ms / 1000, options.mb_per_s * 1e6, total)
    listener = socket.create_server(("127.0.0.1", options.port), backlog=256)
    while True:
        connection, _ = listener.accept()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        threading.Thread(target=serve, args=(connection, options.folder.resolve(), shape), daemon=True).start()


def serve(connection: socket.socket, folder: Path, shape: Shape) -> None:
    """The requests of one connection, one after another."""
    with connection, connection.makefile("rb") as incoming:
        try:
            while line := incoming.readline(65536).decode("latin-1").strip():
                method, target, _ = line.split(" ", 2)
                headers = {}
                while field := incoming.readline(65536).decode("latin-1").strip():
                    name, _, value = field.partition(":")
                    headers[name.strip().lower()] = value.strip()
                time.sleep(shape.latency_s)
                answer(connection, folder, shape, method, target, headers)
                if headers.get("connection", "").lower() == "close":
                    return
        except (OSError, ValueError):
            return  # a client that went away


def answer(
    connection: socket.socket, folder: Path, shape: Shape, method: str, target: str, headers: dict[str, str]
) -> None:
    parts = urlsplit(target)
    bucket, _, key = unquote(parts.path).lstrip("/").partition("/")
    query = parse_qs(parts.query, keep_blank_values=True)
    if method not in ("GET", "HEAD") or not (folder / bucket).is_dir():
        send(connection, method, 404 if method in ("GET", "HEAD") else 501, error("NoSuchBucket"))
    elif not key:
        send(connection, method, 200, listing(folder / bucket, query.get("prefix", [""])[0]))
    else:
        send_object(connection, shape, method, target, folder / bucket / key, headers)


def send_object(
    connection: socket.socket, shape: Shape, method: str, target: str, path: Path, headers: dict[str, str]
) -> None:
    if not path.is_file() or ".." in path.parts:
        send(connection, method, 404, error("NoSuchKey"))
        return
    with open(path, "rb") as file:
        status = os.fstat(file.fileno())
        size, etag = status.st_size, etag_of(status)
        if headers.get("if-match") not in (None, "*", etag):
            send(connection, method, 412, error("PreconditionFailed"))
            return
        start, end, code = 0, size, 200
        if asked := re.fullmatch(r"bytes=(\d*)-(\d*)", headers.get("range", "")):
            first, last = asked[1], asked[2]
            start = int(first) if first else max(0, size - int(last))
            end = min(size, int(last) + 1) if first and last else size
            code = 206
            if start >= size:
                send(connection, method, 416, error("InvalidRange"))
                return
        fields = [f"ETag: {etag}", f"Last-Modified: {DATE}", "Accept-Ranges: bytes"]
        if code == 206:
            fields.append(f"Content-Range: bytes {start}-{end - 1}/{size}")
        sent = [0]
        try:
            connection.sendall(head(code, end - start, "application/x-hdf5", fields))
            if method == "GET":
                send_paced(connection, file.fileno(), start, end, shape, sent)
        finally:
            os.write(1, f'"{method} {target} HTTP/1.1" {code} {sent[0]}\n'.encode())


def send_paced(connection: socket.socket, descriptor: int, start: int, end: int, shape: Shape, sent: list[int]) -> None:
    began, at = time.monotonic(), start
    while at < end:
        count = os.sendfile(connection.fileno(), descriptor, at, min(PIECE_BYTES, end - at))
        at += count
        sent[0] = at - start
        if shape.total is not None:
            shape.total.wait(count)
        ahead_s = began + (at - start) / shape.bytes_per_s - time.monotonic()
        if ahead_s > 0:
            time.sleep(ahead_s)


def send(connection: socket.socket, method: str, code: int, text: str) -> None:
    body = text.encode()
    connection.sendall(head(code, len(body), "application/xml", []) + (b"" if method == "HEAD" else body))


def head(code: int, length: int, kind: str, fields: list[str]) -> bytes:
    lines = [f"HTTP/1.1 {code} {REASONS[code]}", f"Content-Length: {length}", f"Content-Type: {kind}", *fields]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


def listing(bucket: Path, prefix: str) -> str:
    """ListObjectsV2 of a whole bucket below a prefix, on one page."""
    found = []
    for path in sorted(path for path in bucket.rglob("*") if path.is_file()):
        key, status = path.relative_to(bucket).as_posix(), path.stat()
        if key.startswith(prefix):
            found.append(
                f"<Contents><Key>{escape(key)}</Key><Size>{status.st_size}</Size><ETag>{escape(etag_of(status))}</ETag>"
                "<LastModified>2026-10-21T07:28:00.000Z</LastModified></Contents>"
            )
    return (
        f"<ListBucketResult><Name>{bucket.name}</Name><Prefix>{escape(prefix)}</Prefix><KeyCount>{len(found)}</KeyCount>"
        f"<IsTruncated>false</IsTruncated>{''.join(found)}</ListBucketResult>"
    )


def etag_of(status: os.stat_result) -> str:
    return f'"{status.st_mtime_ns:x}-{status.st_size:x}"'


def error(code: str) -> str:
    return f"<Error><Code>{code}</Code><Message>{code}</Message></Error>"


if __name__ == "__main__":
    main()
