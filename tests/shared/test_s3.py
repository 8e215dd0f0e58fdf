"""S3 over the wire: parts, aborts, outages, expiring credentials, and messages with a remedy."""

from __future__ import annotations

import http.client
import http.server
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

import estiba.storage.s3_client
from estiba.errors import ConfigError, StoreError
from estiba.storage import Store, open_store
from estiba.storage.s3 import S3ObjectStore
from estiba.storage.s3_files import PART_BYTES
from s3server import S3Server, s3_server


@pytest.fixture
def store(s3_url: str) -> S3ObjectStore:
    found = open_store(s3_url)
    assert isinstance(found, S3ObjectStore)
    return found


def unfinished(client: Any, store: S3ObjectStore) -> list[str]:
    """Keys of unfinished multipart uploads, which would be billed."""
    found = client.list_multipart_uploads(Bucket="estiba").get("Uploads", [])
    return [upload["Key"] for upload in found if upload["Key"].startswith(f"{store.prefix}/")]


def etag_of(client: Any, store: S3ObjectStore, key: str) -> str:
    return str(client.head_object(Bucket="estiba", Key=f"{store.prefix}/{key}")["ETag"])


# --- objects in parts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [PART_BYTES - 1, PART_BYTES, PART_BYTES + 1, 2 * PART_BYTES + 12_345])
def test_an_object_of_any_size_comes_back_whole(s3_client: Any, store: S3ObjectStore, size: int) -> None:
    block = os.urandom(1_000_003)  # no divisor of anything
    data = (block * (size // len(block) + 1))[:size]
    with store.writer("large") as file:
        for start in range(0, size, len(block)):
            file.write(data[start : start + len(block)])
        assert file.tell() == size
        assert store.head("large") is None
    assert store.read("large") == data
    assert store.read("large", size - 100, 100) == data[-100:]
    assert ("-" in etag_of(s3_client, store, "large")) == (size >= PART_BYTES)  # in parts, or in one request
    assert unfinished(s3_client, store) == []


@pytest.mark.parametrize(
    ("size", "error"),
    [(10, ValueError), (PART_BYTES + 10, StoreError), (4 * PART_BYTES, ValueError), (PART_BYTES, KeyboardInterrupt)],
)
def test_an_abandoned_writer_leaves_neither_object_nor_upload(
    s3_client: Any, store: S3ObjectStore, size: int, error: type[BaseException]
) -> None:
    def give_up() -> None:
        with store.writer("large") as file:
            file.write(bytes(size))
            raise error("given up")

    store.write("large", b"old")
    with pytest.raises(error, match=r"^given up$"):
        give_up()
    assert store.read("large") == b"old"
    assert unfinished(s3_client, store) == []


def test_an_upload_that_fails_ends_the_writer_with_the_reason(s3: S3Server) -> None:
    store = open_store("s3://no-such-bucket/x")
    for size in (10, 5 * PART_BYTES):
        with pytest.raises(StoreError, match="NoSuchBucket") as caught:
            store.write("large", bytes(size))
        assert "s3://no-such-bucket/x/large" in str(caught.value)


def test_an_object_that_shrinks_while_it_is_read_is_an_error_and_not_an_early_end(store: S3ObjectStore) -> None:
    store.write("x", bytes(3_000_000))
    with store.open("x") as file:
        assert len(file.read(10)) == 10
        store.write("x", bytes(1_500_000))
        with pytest.raises(StoreError, match="/x: "):
            file.read()


def test_small_reads_of_a_file_are_batched_into_large_requests(store: S3ObjectStore) -> None:
    store.write("x", bytes(range(250)) * 1000)
    asked: list[int] = []
    read = store.read

    def count(path: str, start: int = 0, length: int | None = None) -> bytes:
        asked.append(length or 0)
        return read(path, start, length)

    store.read = count  # type: ignore[method-assign]
    with store.open("x") as file:
        assert b"".join(iter(lambda: file.read(1000), b"")) == bytes(range(250)) * 1000
        assert not file.writable()
    assert asked == [250_000]


# --- names ---------------------------------------------------------------------------------------------------------


def test_more_than_a_thousand_objects_are_all_listed(s3_client: Any, store: S3ObjectStore) -> None:
    def put(name: str) -> None:
        s3_client.put_object(Bucket="estiba", Key=f"{store.prefix}/a/{name}", Body=b"x")

    names = [f"{number:05d}.bin" for number in range(1105)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(put, names))
    assert [entry.path for entry in store.list("a")] == [f"a/{name}" for name in names]


def test_an_entry_knows_the_version_of_its_object(s3_client: Any, store: S3ObjectStore) -> None:
    store.write("x", b"1")
    [first] = store.list()
    assert first == store.head("x")
    assert first.etag == etag_of(s3_client, store, "x")
    store.write("x", b"2")
    assert store.list()[0].etag != first.etag


def test_folder_markers_of_the_console_are_not_objects(s3_client: Any, store: S3ObjectStore) -> None:
    for key in ("", "a/", "a/x", "childless/", "both", "both/", "empty"):
        s3_client.put_object(Bucket="estiba", Key=f"{store.prefix}/{key}", Body=b"")
    assert [entry.path for entry in store.list()] == ["a/x", "both", "empty"]
    assert [entry.path for entry in store.list("a")] == ["a/x"]


@pytest.mark.parametrize("key", ["a//b", "./b", "a/../b"])
def test_a_name_that_cannot_be_used_is_refused_with_the_remedy(s3_client: Any, store: S3ObjectStore, key: str) -> None:
    s3_client.put_object(Bucket="estiba", Key=f"{store.prefix}/{key}", Body=b"")
    for act in (store.list, lambda: store.write(key, b""), lambda: store.read(key)):
        with pytest.raises(StoreError, match="rename the object"):
            act()


@pytest.mark.parametrize("tail", ["", "/"])
def test_a_prefix_may_contain_any_character_of_a_key(s3_client: Any, s3_url: str, tail: str) -> None:
    store = open_store(f"{s3_url}/a#b?c=d/100%25 ñ{tail}")
    store.write("x", b"1")
    assert store.url_of("x") == f"{s3_url}/a#b?c=d/100%25 ñ/x"
    prefix = s3_url.removeprefix("s3://estiba/")
    listed = s3_client.list_objects_v2(Bucket="estiba", Prefix=prefix)["Contents"]
    assert [item["Key"] for item in listed] == [f"{prefix}/a#b?c=d/100%25 ñ/x"]


@pytest.mark.parametrize("url", ["s3://", "s3:///prefix"])
def test_a_url_without_a_bucket_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="s3://BUCKET/PREFIX"):
        open_store(url)


def test_a_whole_bucket_is_a_store(s3: S3Server) -> None:
    s3.make_bucket("estiba-whole")
    store = open_store("s3://estiba-whole")
    store.write("a/x", b"1")
    assert [entry.path for entry in store.list()] == ["a/x"]
    assert store.url_of("a/x") == "s3://estiba-whole/a/x"


def test_a_bucket_that_does_not_exist_is_named(s3: S3Server) -> None:
    store = open_store("s3://no-such-bucket/x")
    for act in (store.list, lambda: store.read("y"), lambda: store.write("y", b"")):
        with pytest.raises(StoreError, match=r"s3://no-such-bucket/x.*NoSuchBucket"):
            act()


# --- the endpoint --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"])
def test_the_endpoint_is_the_standard_variable(
    s3: S3Server, s3_client: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv(name, s3.endpoint_url)
    store = open_store("s3://estiba/endpoint")
    store.write(name, b"1")
    key = f"endpoint/{name}"
    assert s3_client.get_object(Bucket="estiba", Key=key)["Body"].read() == b"1"


@pytest.mark.parametrize("endpoint", ["localhost:9000", "http://", "ftp://host", "127.0.0.1"])
def test_an_endpoint_that_is_not_a_url_is_refused_before_any_request(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch, endpoint: str
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", endpoint)
    with pytest.raises(ConfigError, match="http://HOST:PORT") as caught:
        open_store("s3://estiba/x")
    assert repr(endpoint) in str(caught.value)


@pytest.mark.parametrize("content", [None, "not a certificate"])
def test_certificates_that_cannot_be_read_are_a_mistake_of_configuration(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: str | None
) -> None:
    path = tmp_path / "ca.pem"
    if content is not None:
        path.write_text(content)
    monkeypatch.setenv("AWS_CA_BUNDLE", str(path))
    with pytest.raises(ConfigError, match="AWS_CA_BUNDLE"):
        open_store("s3://estiba/x")


@pytest.mark.timeout(60)
def test_an_endpoint_that_is_down_for_five_seconds_costs_five_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    with s3_server() as server:
        server.make_bucket("estiba")
        for name, value in server.environ.items():
            monkeypatch.setenv(name, value)
        store = open_store("s3://estiba/outage")
        store.write("before", b"1")
        server.stop()
        away_s = 5.0
        back = threading.Timer(away_s, server.start)
        back.start()
        started = time.monotonic()
        store.write("during", b"2")
        assert time.monotonic() - started > away_s - 0.5
        back.join()
        assert store.read("during") == b"2"
        assert store.read("before") == b"1"


@pytest.mark.timeout(30)
def test_an_endpoint_that_stays_down_is_an_error_with_the_address(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estiba.storage.s3_client, "RETRY_TIMEOUT", timedelta(seconds=0.3))
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    store = open_store("s3://estiba/x")
    for act in (store.list, lambda: store.head("y"), lambda: store.write("y", b"")):
        with pytest.raises(StoreError, match=r"127\.0\.0\.1:9") as caught:
            act()
        assert str(caught.value).endswith("check the endpoint, the region and the network")
        assert "Debug source" not in str(caught.value)


# --- credentials ---------------------------------------------------------------------------------------------------


@pytest.fixture
def no_credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")


def refuse_without_credentials() -> None:
    with pytest.raises(StoreError, match=r"s3://estiba/x: no AWS credentials found; .*AWS_NO_SIGN_REQUEST=1"):
        open_store("s3://estiba/x")


def test_missing_credentials_are_an_error_with_the_remedy(no_credentials: None) -> None:
    refuse_without_credentials()


@pytest.fixture
def silent_metadata(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[object]]:
    """Instance metadata that takes every call and answers none."""
    calls: list[object] = []
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def take() -> None:
            while True:
                try:
                    calls.append(listening.accept())
                except OSError:
                    return

        threading.Thread(target=take, daemon=True).start()
        host, port = listening.getsockname()
        monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", f"http://{host}:{port}/")
        yield calls
        listening.shutdown(socket.SHUT_RDWR)


@pytest.mark.timeout(60)
def test_metadata_that_never_answers_costs_seconds_and_not_minutes(
    no_credentials: None, silent_metadata: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_EC2_METADATA_DISABLED")
    refuse_without_credentials()
    assert len(silent_metadata) in (1, 2)


def test_metadata_is_left_alone_when_it_is_turned_off(no_credentials: None, silent_metadata: list[object]) -> None:
    refuse_without_credentials()
    assert silent_metadata == []


@pytest.mark.parametrize(
    ("variable", "value", "word"),
    [("AWS_PROFILE", "no-such-profile", "no-such-profile"), ("AWS_ACCESS_KEY_ID", "half", "AWS_SECRET_ACCESS_KEY")],
)
def test_credentials_that_are_configured_wrong_are_explained(
    no_credentials: None, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, word: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(StoreError, match=f"s3://estiba/x: .*{word}"):
        open_store("s3://estiba/x")


def test_a_public_bucket_needs_no_credentials(
    s3: S3Server, no_credentials: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", s3.endpoint_url)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_NO_SIGN_REQUEST", "1")
    open_store("s3://estiba/public").write("x", b"1")
    assert open_store("s3://estiba/public").read("x") == b"1"


class Gate(http.server.BaseHTTPRequestHandler):
    """Stands before the S3 server and lets only some keys through."""

    protocol_version = "HTTP/1.1"
    target: str
    refused_keys: tuple[str, ...] = ()
    status = 403
    code = "ExpiredToken"
    seen: list[tuple[str, str]]
    lock = threading.Lock()

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        key = self.headers.get("Authorization", "").partition("Credential=")[2].partition("/")[0]
        with self.lock:
            self.seen.append((self.command, key))
        if key.startswith(self.refused_keys):
            text = f"<Error><Code>{self.code}</Code><Message>The provided token has &lt;expired&gt;.</Message></Error>"
            self.reply(self.status, {}, text.encode())
            return
        there = http.client.HTTPConnection(self.target)
        there.request(self.command, self.path, body, dict(self.headers))
        reply = there.getresponse()
        self.reply(reply.status, dict(reply.getheaders()), reply.read())
        there.close()

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = answer

    def reply(self, status: int, headers: dict[str, str], body: bytes) -> None:
        headers = {name: value for name, value in headers.items() if name.lower() not in ("transfer-encoding", "date")}
        length = next((value for name, value in headers.items() if name.lower() == "content-length"), str(len(body)))
        headers = {name: value for name, value in headers.items() if name.lower() != "content-length"}
        self.send_response(status)
        for name, value in {**headers, "Content-Length": length if self.command == "HEAD" else str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def gate(s3: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[type[Gate]]:
    """Keys come from a program that gives another one each time, as a role does: KEY1, KEY2, …"""

    class Own(Gate):
        target = urlsplit(s3.endpoint_url).netloc
        seen: list[tuple[str, str]] = []  # noqa: RUF012 (of this test alone)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Own)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{server.server_port}")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    answer = json.dumps({"Version": 1, "AccessKeyId": "KEY$n", "SecretAccessKey": "s", "SessionToken": "t"})
    program = tmp_path / "credentials.sh"
    program.write_text(f"n=$(( $(cat {tmp_path}/n) + 1 )); echo $n > {tmp_path}/n\ncat <<END\n{answer}\nEND\n")
    (tmp_path / "n").write_text("0")
    config = tmp_path / "config"
    config.write_text(f"[default]\ncredential_process = sh {program}\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
    yield Own
    server.shutdown()
    server.server_close()


ACTIONS: dict[str, Callable[[Store], object]] = {
    "read": lambda store: store.read("x"),
    "read a range": lambda store: store.read("x", 1, 2),
    "head": lambda store: store.head("x"),
    "list": lambda store: [(entry.path, entry.size_bytes) for entry in store.list()],
    "write": lambda store: store.write("y", b"new"),
    "create": lambda store: store.write_new("y", b"new"),
    "delete": lambda store: store.delete("x"),
    "rename": lambda store: store.rename("x", "z"),
}


@pytest.mark.parametrize(
    ("action", "status"),  # S3 itself says 400, others 403
    [*((action, 400) for action in ACTIONS), ("head", 403), ("list", 403), ("write", 403)],
)
def test_credentials_that_expired_are_renewed_once(gate: type[Gate], s3_url: str, action: str, status: int) -> None:
    open_store(s3_url).write("x", b"0123")
    expected = ACTIONS[action](open_store(s3_url))
    open_store(s3_url).write("x", b"0123")
    for name in ("y", "z"):
        open_store(s3_url).delete(name)
    gate.seen.clear()
    store = open_store(s3_url)
    [current] = {key for _, key in _seen_by(gate, store)}
    gate.refused_keys, gate.status = (current,), status
    found = ACTIONS[action](store)
    if action == "head":
        assert found is not None
    else:
        assert found == expected
    refused = [key for _, key in gate.seen if key == current]
    assert len(refused) == 1
    assert len({key for _, key in gate.seen} - {current}) == 1


def _seen_by(gate: type[Gate], store: Store) -> list[tuple[str, str]]:
    """The key that a store uses; forgets the request that showed it."""
    store.list("nothing-here")
    seen = list(gate.seen)
    gate.seen.clear()
    return seen


def test_credentials_that_stay_expired_are_an_error_after_the_second_try(gate: type[Gate], s3_url: str) -> None:
    store = open_store(s3_url)
    gate.refused_keys = ("KEY",)
    with pytest.raises(StoreError, match=r"ExpiredToken: The provided token has <expired>.*renew the credentials"):
        store.read("x")
    assert len(gate.seen) == 2


def test_access_that_is_denied_names_the_rights_that_are_missing(gate: type[Gate], s3_url: str) -> None:
    store = open_store(s3_url)
    gate.refused_keys, gate.code = ("KEY",), "AccessDenied"
    for name, act in ACTIONS.items():
        with pytest.raises(StoreError) as caught:
            act(store)
        assert "access denied" in str(caught.value), name
        assert "s3:GetObject" in str(caught.value), name
        assert s3_url in str(caught.value), name


def test_an_upload_in_parts_whose_credentials_expired_is_an_error_and_no_object(
    gate: type[Gate], s3: S3Server, s3_url: str
) -> None:
    store = open_store(s3_url)
    assert isinstance(store, S3ObjectStore)

    def upload() -> None:
        with store.writer("large") as file:
            file.write(bytes(PART_BYTES + 1))
            gate.refused_keys = ("KEY",)
            file.write(bytes(2 * PART_BYTES))

    with pytest.raises(StoreError, match="ExpiredToken"):
        upload()
    gate.refused_keys = ()
    assert store.head("large") is None


def test_the_region_is_the_standard_variable_and_never_missing(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for variables, region in (
        ({"AWS_REGION": "eu-west-1", "AWS_DEFAULT_REGION": "eu-west-2"}, "eu-west-1"),
        ({"AWS_DEFAULT_REGION": "eu-west-2"}, "eu-west-2"),
        ({}, "us-east-1"),
    ):
        for name in ("AWS_REGION", "AWS_DEFAULT_REGION"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        store = open_store("s3://estiba/x")
        assert isinstance(store, S3ObjectStore)
        assert store.client.config.get("region") == region
