"""An S3 server in this process that misbehaves on request: errors, slow and short responses, expired keys, restarts.

It implements the part of S3 that the reader uses: listings, HEAD, ranged GET with If-Match, PUT with If-None-Match.
"""

from __future__ import annotations

import hashlib
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

import pytest

NAME = "brain"
Fault = Callable[[int, str], "tuple[str, float] | None"]
"""(number of the ranged GET, key) -> None or (kind, seconds).

Kinds: 'error', 'denied', 'slow', 'short', 'cut'; 'missing' and 'precondition' although the object is there; 'html' from
a proxy; 'no etag'; 'late error', a slow 404; or an S3 error code, sent with 403.
"""


class Bucket:
    """Objects by key, the faults to inject, and the requests received."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.etags: dict[str, str] = {}
        """ETags of objects whose ETag is not the digest of their content."""
        self.fault: Fault = lambda *_: None
        self.good_keys: set[str] | None = None
        """Access keys that are accepted; None accepts all."""
        self.is_read_only = False
        self.gets: list[tuple[str, str]] = []
        self.payers: set[str | None] = set()
        """Who pays for the ranged GETs."""
        self.sent_bytes = 0
        self.lock = threading.Lock()
        self.server: ThreadingHTTPServer | None = None
        self.port = 0

    def put_folder(self, folder: Path, prefix: str = "data") -> str:
        for path in sorted(folder.rglob("*")):
            if path.is_file() and ".estiba-index" not in path.parts:
                self.objects[f"{prefix}/{path.relative_to(folder).as_posix()}"] = path.read_bytes()
        return f"s3://{NAME}/{prefix}"

    def start(self) -> None:
        bucket = self

        class Handler(_Handler):
            pass

        Handler.bucket = bucket
        self.server = _Server(("127.0.0.1", self.port), Handler)
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        assert self.server is not None
        self.server.shutdown()
        self.server.server_close()
        self.server.drop()

    def environ(self, key: str = "first") -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL_S3": f"http://127.0.0.1:{self.port}",
            "AWS_ACCESS_KEY_ID": key,
            "AWS_SECRET_ACCESS_KEY": "not-a-secret",
            "AWS_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": "/dev/null",
            "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
            "NO_PROXY": "127.0.0.1",
        }


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 256

    def __init__(self, *arguments: object) -> None:
        self.connections: set[object] = set()
        super().__init__(*arguments)  # type: ignore[arg-type]

    def process_request(self, request: object, client_address: object) -> None:
        self.connections.add(request)
        super().process_request(request, client_address)  # type: ignore[arg-type]

    def drop(self) -> None:
        for connection in self.connections:
            try:
                connection.shutdown(2)  # type: ignore[attr-defined]
            except OSError:
                pass

    def handle_error(self, *_: object) -> None:
        """Ignore clients that disconnect."""


class _Handler(BaseHTTPRequestHandler):
    bucket: Bucket
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Log nothing."""

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        key = unquote(parts.path).removeprefix(f"/{NAME}").lstrip("/")
        if self._is_denied():
            return
        if not key:
            self._list(parse_qs(parts.query).get("prefix", [""])[0])
            return
        self._get(key, body=True)

    def do_HEAD(self) -> None:
        if not self._is_denied():
            self._get(unquote(urlsplit(self.path).path).removeprefix(f"/{NAME}/"), body=False)

    def do_PUT(self) -> None:
        data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        key = unquote(urlsplit(self.path).path).removeprefix(f"/{NAME}/")
        bucket = self.bucket
        if bucket.is_read_only:
            self._error(403, "AccessDenied")
            return
        with bucket.lock:
            if self.headers.get("If-None-Match") == "*" and key in bucket.objects:
                self._error(412, "PreconditionFailed")
                return
            bucket.objects[key] = data
        self._respond(200, b"", {"ETag": etag_of(data)})

    def _is_denied(self) -> bool:
        keys = self.bucket.good_keys
        if keys is None or any(f"Credential={key}/" in self.headers.get("Authorization", "") for key in keys):
            return False
        self._error(400, "ExpiredToken")
        return True

    def _get(self, key: str, *, body: bool) -> None:
        bucket = self.bucket
        data = bucket.objects.get(key)
        if data is None:
            self._error(404, "NoSuchKey")
            return
        etag = bucket.etags.get(key) or etag_of(data)
        if self.headers.get("If-Match") not in (None, etag):
            self._error(412, "PreconditionFailed")
            return
        headers = {"ETag": etag, "Last-Modified": "Wed, 21 Oct 2026 07:28:00 GMT"}
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not body or match is None:
            self._respond(200, data, headers, body=body)
            return
        start, end = int(match[1]), min(int(match[2] or len(data) - 1) + 1, len(data))
        fault = None
        if key.endswith(".hdf5"):
            with bucket.lock:
                bucket.gets.append((key, match[0]))
                bucket.payers.add(self.headers.get("x-amz-request-payer"))
                number = len(bucket.gets)
            fault = bucket.fault(number, key)
        if fault and fault[0] == "error":
            self._error(503, "SlowDown")
            return
        if fault and fault[0] in ("missing", "precondition"):
            self._error(*((404, "NoSuchKey") if fault[0] == "missing" else (412, "PreconditionFailed")))
            return
        if fault and fault[0] == "html":
            self._respond(200, b"<html>signed in elsewhere</html>", {"Content-Type": "text/html"})
            return
        if fault and (fault[0] == "denied" or fault[0][0].isupper()):
            self._error(403, "AccessDenied" if fault[0] == "denied" else fault[0])
            return
        if fault and fault[0] in ("slow", "late error"):
            time.sleep(fault[1])
        if fault and fault[0] == "late error":
            self._error(404, "NoSuchKey")
            return
        part = data[start:end]
        if fault and fault[0] == "no etag":
            del headers["ETag"]
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(data)}"
        if fault and fault[0] == "short":  # a valid HTTP response with too few bytes
            part = part[: len(part) // 2]
        if fault and fault[0] == "cut":
            self._respond(206, part, headers, send=len(part) // 2)
            self.close_connection = True
            return
        bucket.sent_bytes += len(part)
        self._respond(206, part, headers)

    def _list(self, prefix: str) -> None:
        items = "".join(
            f"<Contents><Key>{escape(key)}</Key><Size>{len(data)}</Size>"
            f"<ETag>{escape(self.bucket.etags.get(key) or etag_of(data))}</ETag>"
            "<LastModified>2026-10-21T07:28:00.000Z</LastModified></Contents>"
            for key, data in sorted(self.bucket.objects.items())
            if key.startswith(prefix)
        )
        text = f"<ListBucketResult><IsTruncated>false</IsTruncated>{items}</ListBucketResult>"
        self._respond(200, text.encode(), {"Content-Type": "application/xml"})

    def _error(self, status: int, code: str) -> None:
        self._respond(status, f"<Error><Code>{code}</Code><Message>as requested</Message></Error>".encode(), {})

    def _respond(
        self, status: int, data: bytes, headers: dict[str, str], *, body: bool = True, send: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body and self.command != "HEAD":
            self.wfile.write(data[:send])


def etag_of(data: bytes) -> str:
    return f'"{hashlib.md5(data).hexdigest()}"'


@contextmanager
def bucket_for(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    bucket = Bucket()
    bucket.start()
    for name, value in bucket.environ().items():
        monkeypatch.setenv(name, value)
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name, raising=False)
    try:
        yield bucket
    finally:
        bucket.stop()
