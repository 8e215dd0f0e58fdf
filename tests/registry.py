"""A small image registry for tests: the part of the distribution API that `docker push` and buildx use.

`immutable` refuses to move a tag, as ECR does with immutable tags, with ECR's message.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

BLOB = re.compile(r"/v2/.+/blobs/(sha256:[0-9a-f]{64})")
UPLOAD = re.compile(r"/v2/.+/blobs/uploads/([0-9a-f]*)")
MANIFEST = re.compile(r"/v2/(.+)/manifests/(.+)")


@dataclass
class Registry:
    """The state of a running registry."""

    immutable: bool
    host: str = ""
    blobs: dict[str, bytes] = field(default_factory=dict)
    uploads: dict[str, bytes] = field(default_factory=dict)
    manifests: dict[tuple[str, str], tuple[str, bytes]] = field(default_factory=dict)
    """(repository, tag or digest) -> (media type, content)."""
    replaces: dict[tuple[str, str], tuple[str, bytes]] = field(default_factory=dict)
    """What is stored instead of a manifest that is pushed."""
    pushes: list[str] = field(default_factory=list)
    """repository:tag of each accepted manifest, in order."""


def digest_of(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    default_request_version = "HTTP/1.1"
    """An engine tries TLS first and recognizes plain HTTP by the status line of the refusal."""
    registry: Registry

    def log_message(self, *_: object) -> None:
        pass

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        content = b""
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def answer(self, status: int, content: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def refuse(self, status: int, code: str, message: str) -> None:
        self.answer(status, json.dumps({"errors": [{"code": code, "message": message}]}).encode())

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        if path == "/v2/":
            self.answer(200)
        elif (match := BLOB.fullmatch(path)) and match[1] in self.registry.blobs:
            self.answer(200, self.registry.blobs[match[1]], Docker_Content_Digest=match[1])
        elif (match := MANIFEST.fullmatch(path)) and (match[1], match[2]) in self.registry.manifests:
            kind, content = self.registry.manifests[match[1], match[2]]
            self.answer(200, content, Docker_Content_Digest=digest_of(content), Content_Type=kind)
        else:
            self.refuse(404, "MANIFEST_UNKNOWN", "not found")

    do_HEAD = do_GET

    def do_POST(self) -> None:
        self.body()
        number = uuid.uuid4().hex
        self.registry.uploads[number] = b""
        self.answer(202, Location=f"{urlsplit(self.path).path}{number}", Range="0-0")

    def do_PATCH(self) -> None:
        match = UPLOAD.fullmatch(urlsplit(self.path).path)
        assert match is not None
        self.registry.uploads[match[1]] += self.body()
        self.answer(202, Location=self.path, Range=f"0-{len(self.registry.uploads[match[1]]) - 1}")

    def do_PUT(self) -> None:
        url = urlsplit(self.path)
        content = self.body()
        if upload := UPLOAD.fullmatch(url.path):
            blob = self.registry.uploads.pop(upload[1]) + content
            assert parse_qs(url.query)["digest"] == [digest_of(blob)]
            self.registry.blobs[digest_of(blob)] = blob
            self.answer(201, Docker_Content_Digest=digest_of(blob))
            return
        match = MANIFEST.fullmatch(url.path)
        assert match is not None
        repository, tag = match.groups()
        if self.registry.immutable and not tag.startswith("sha256:") and (repository, tag) in self.registry.manifests:
            self.refuse(
                400,
                "TAG_INVALID",
                f"The image tag '{tag}' already exists in the '{repository}' repository and cannot be overwritten "
                "because the tag is immutable.",
            )
            return
        stored = self.registry.replaces.get((repository, tag), (self.headers["Content-Type"], content))
        for name in (tag, digest_of(stored[1])):
            self.registry.manifests[repository, name] = stored
        self.registry.pushes.append(f"{repository}:{tag}")
        self.answer(201, Docker_Content_Digest=digest_of(content))


@contextmanager
def serve(*, immutable: bool = False) -> Iterator[Registry]:
    """A registry at `Registry.host`, to which Docker connects without TLS."""
    registry = Registry(immutable=immutable)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"registry": registry}))
    registry.host = f"127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield registry
    finally:
        server.shutdown()
        server.server_close()


if __name__ == "__main__":
    with serve() as running:
        print(running.host, flush=True)
        threading.Event().wait()
