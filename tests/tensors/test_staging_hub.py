"""A model of the hub to S3: verified against the hub's digests, and only once."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import threading
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

from estiba.errors import StoreError
from estiba.staging.hub import upload_model
from estiba.storage import open_store

pytest.importorskip("huggingface_hub", reason="this image has no huggingface_hub")
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(http.server.ThreadingHTTPServer):
    """What huggingface_hub asks a hub for, with one model, org/tiny."""

    def __init__(self) -> None:
        self.files = {"config.json": b'{"a": 1}', "a b/model.safetensors": os.urandom(300_000)}
        self.listed = dict(self.files)
        """The content that the digests are of."""
        self.downloads: list[str] = []
        super().__init__(("127.0.0.1", 0), Handler)

    def digest(self, name: str) -> str:
        data = self.listed[name]
        if name.endswith(".json"):
            return hashlib.sha1(f"blob {len(data)}\0".encode() + data, usedforsecurity=False).hexdigest()
        return hashlib.sha256(data).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.answer(is_head=True)

    def do_GET(self) -> None:
        self.answer(is_head=False)

    def answer(self, *, is_head: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        name = path.partition(f"/resolve/{COMMIT}/")[2]
        if path.startswith("/api/models/org/tiny"):
            siblings = []
            for file, data in self.server.listed.items():
                digest = self.server.digest(file)
                entry: dict[str, Any] = {"rfilename": file, "size": len(data), "blobId": digest}
                if len(digest) == 64:
                    entry["lfs"] = {"sha256": digest, "size": len(data), "pointerSize": 100}
                siblings.append(entry)
            self.reply(200, json.dumps({"id": "org/tiny", "sha": COMMIT, "siblings": siblings}).encode(), is_head)
        elif name in self.server.files:
            if not is_head:
                self.server.downloads.append(name)
            self.reply(200, self.server.files[name], is_head, etag=self.server.digest(name))
        else:
            self.reply(404, b"{}", is_head)

    def reply(self, status: int, body: bytes, is_head: bool, etag: str = "x") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{etag}"')
        self.send_header("X-Repo-Commit", COMMIT)
        if status == 404:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.end_headers()
        if not is_head:
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    from huggingface_hub import constants

    with Hub() as server:
        endpoint = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)  # HF_ENDPOINT, which it reads when it is imported
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def objects_at(url: str) -> dict[str, bytes]:
    store = open_store(url)
    return {entry.path: store.read(entry.path) for entry in store.list()}


def test_a_model_of_the_hub_arrives_on_s3_and_a_second_run_downloads_nothing(hub: Hub, s3_url: str) -> None:
    result = upload_model("hf://org/tiny", s3_url)
    assert objects_at(s3_url) == hub.files
    assert result.sent_bytes == sum(map(len, hub.files.values()))
    hub.downloads.clear()
    assert upload_model("hf://org/tiny", s3_url).sent_bytes == 0
    assert hub.downloads == []


def test_bytes_that_differ_from_the_hubs_digest_are_not_uploaded(hub: Hub, s3_url: str) -> None:
    damaged = bytearray(hub.files["a b/model.safetensors"])
    damaged[7] ^= 1
    hub.files["a b/model.safetensors"] = bytes(damaged)
    with pytest.raises(StoreError, match="differs from the hub's digest"):
        upload_model("hf://org/tiny", s3_url)
    assert "a b/model.safetensors" not in objects_at(s3_url)


def test_a_model_that_is_not_there_is_one_message(hub: Hub, s3_url: str) -> None:
    with pytest.raises(StoreError, match=r"hf://org/none: .*check its name and revision"):
        upload_model("hf://org/none", s3_url)
