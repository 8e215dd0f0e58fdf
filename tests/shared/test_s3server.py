"""The S3 server under the other tests behaves as S3 where they rely on it."""

from __future__ import annotations

import hashlib
import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ministack", reason="the S3 test server is not installed: run `make env`")
pytest.importorskip("boto3", reason="boto3 is not installed: run `make env`")

from botocore.exceptions import ClientError

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from s3server import S3Server, s3_server

BUCKET = "estiba"
PART_BYTES = 5 << 20


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with s3_server() as s3:
        s3.make_bucket(BUCKET)
        yield s3


@pytest.fixture
def s3(server: S3Server) -> Any:
    return server.client()


def refused(call: Callable[..., Any], /, **arguments: Any) -> int:
    """The HTTP status of a call that must fail."""
    with pytest.raises(ClientError) as caught:
        call(Bucket=BUCKET, **arguments)
    return int(caught.value.response["ResponseMetadata"]["HTTPStatusCode"])


def upload_parts(s3: Any, key: str, parts: list[bytes]) -> dict[str, Any]:
    """Upload `parts` without completing; returns the arguments of the completing call."""
    upload_id = s3.create_multipart_upload(Bucket=BUCKET, Key=key)["UploadId"]
    sent = [
        {
            "PartNumber": number,
            "ETag": s3.upload_part(Bucket=BUCKET, Key=key, UploadId=upload_id, PartNumber=number, Body=part)["ETag"],
        }
        for number, part in enumerate(parts, 1)
    ]
    return {"Bucket": BUCKET, "Key": key, "UploadId": upload_id, "MultipartUpload": {"Parts": sent}}


@pytest.mark.parametrize(
    ("asked", "start", "stop"),
    [("bytes=0-0", 0, 1), ("bytes=10-19", 10, 20), ("bytes=900-", 900, 1000), ("bytes=-7", 993, 1000)],
)
def test_a_range_returns_those_bytes_and_206(s3: Any, asked: str, start: int, stop: int) -> None:
    body = os.urandom(1000)
    s3.put_object(Bucket=BUCKET, Key="dir/ñ +1%.bin", Body=body)
    reply = s3.get_object(Bucket=BUCKET, Key="dir/ñ +1%.bin", Range=asked)
    assert reply["ResponseMetadata"]["HTTPStatusCode"] == 206
    assert reply["ContentRange"] == f"bytes {start}-{stop - 1}/1000"
    assert reply["Body"].read() == body[start:stop]


def test_a_range_past_the_end_is_416(s3: Any) -> None:
    s3.put_object(Bucket=BUCKET, Key="short", Body=b"0123456789")
    assert refused(s3.get_object, Key="short", Range="bytes=10-") == 416


def test_a_multipart_upload_is_invisible_until_it_is_completed(s3: Any) -> None:
    parts = [os.urandom(PART_BYTES), os.urandom(PART_BYTES), b"tail"]
    completing = upload_parts(s3, "parts", parts)
    assert refused(s3.head_object, Key="parts") == 404
    s3.complete_multipart_upload(**completing)
    digests = b"".join(hashlib.md5(part, usedforsecurity=False).digest() for part in parts)
    etag = hashlib.md5(digests, usedforsecurity=False).hexdigest() + "-3"
    reply = s3.get_object(Bucket=BUCKET, Key="parts")
    assert reply["ETag"] == f'"{etag}"'
    assert reply["Body"].read() == b"".join(parts)


def test_an_aborted_multipart_upload_leaves_nothing(s3: Any) -> None:
    completing = upload_parts(s3, "aborted", [b"x"])
    s3.abort_multipart_upload(Bucket=BUCKET, Key="aborted", UploadId=completing["UploadId"])
    pending = s3.list_multipart_uploads(Bucket=BUCKET).get("Uploads", [])
    assert "aborted" not in [upload["Key"] for upload in pending]
    assert refused(s3.head_object, Key="aborted") == 404


def test_if_none_match_creates_once_and_then_answers_412(s3: Any) -> None:
    s3.put_object(Bucket=BUCKET, Key="once", Body=b"first", IfNoneMatch="*")
    assert refused(s3.put_object, Key="once", Body=b"second", IfNoneMatch="*") == 412
    assert s3.get_object(Bucket=BUCKET, Key="once")["Body"].read() == b"first"


def test_one_of_many_racing_creators_wins(server: S3Server) -> None:
    gate = threading.Barrier(8)

    def create(number: int) -> bool:
        client = server.client()
        gate.wait(timeout=30)
        try:
            client.put_object(Bucket=BUCKET, Key="race", Body=b"%d" % number, IfNoneMatch="*")
        except ClientError as error:
            if error.response["ResponseMetadata"]["HTTPStatusCode"] not in (409, 412):
                raise
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(create, range(8)))
    assert won.count(True) == 1
    assert server.client().get_object(Bucket=BUCKET, Key="race")["Body"].read() == b"%d" % won.index(True)


def test_if_match_replaces_only_the_version_it_names(s3: Any) -> None:
    first = s3.put_object(Bucket=BUCKET, Key="swap", Body=b"1")["ETag"]
    s3.put_object(Bucket=BUCKET, Key="swap", Body=b"2", IfMatch=first)
    assert refused(s3.put_object, Key="swap", Body=b"3", IfMatch=first) == 412
    assert s3.get_object(Bucket=BUCKET, Key="swap")["Body"].read() == b"2"


def test_conditions_hold_for_a_completed_multipart_upload_too(s3: Any) -> None:
    s3.put_object(Bucket=BUCKET, Key="taken", Body=b"first")
    completing = upload_parts(s3, "taken", [b"second"])
    with pytest.raises(ClientError) as caught:
        s3.complete_multipart_upload(**completing, IfNoneMatch="*")
    assert caught.value.response["ResponseMetadata"]["HTTPStatusCode"] == 412
    assert s3.get_object(Bucket=BUCKET, Key="taken")["Body"].read() == b"first"


def test_a_listing_of_more_than_a_thousand_keys_comes_in_ordered_pages(server: S3Server, s3: Any) -> None:
    names = [f"many/{number:05d}" for number in range(1203)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: s3.put_object(Bucket=BUCKET, Key=name, Body=b"x"), names))
    pages = list(s3.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix="many/"))
    assert [len(page["Contents"]) for page in pages] == [1000, 203]
    assert [entry["Key"] for page in pages for entry in page["Contents"]] == names


def test_a_wrong_checksum_is_refused_and_nothing_is_stored(server: S3Server) -> None:
    client = server.client(attempts=1)
    assert refused(client.put_object, Key="corrupt", Body=b"abc", ChecksumCRC32="AAAAAA==") == 400
    assert refused(client.head_object, Key="corrupt") == 404


def test_obstore_reads_writes_and_commits_through_the_same_environment(
    server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    obstore = pytest.importorskip("obstore", reason="obstore is not installed: run `make env`")
    from obstore.exceptions import AlreadyExistsError
    from obstore.store import S3Store

    for name, value in server.environ.items():
        monkeypatch.setenv(name, value)
    store = S3Store(BUCKET)
    body = os.urandom(2 * PART_BYTES + 11)
    obstore.put(store, "obstore/large", body, chunk_size=PART_BYTES, use_multipart=True)
    assert (
        bytes(obstore.get_range(store, "obstore/large", start=PART_BYTES, length=64))
        == (body[PART_BYTES : PART_BYTES + 64])
    )
    obstore.put(store, "obstore/once", b"first", mode="create")
    with pytest.raises(AlreadyExistsError):
        obstore.put(store, "obstore/once", b"second", mode="create")
    assert bytes(obstore.get(store, "obstore/once").bytes()) == b"first"


def test_a_stopped_server_refuses_and_a_restarted_one_has_the_same_objects() -> None:
    with s3_server() as server:
        server.make_bucket(BUCKET)
        etag = server.client().put_object(Bucket=BUCKET, Key="kept", Body=b"bytes")["ETag"]
        port = server.port
        server.stop()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port), timeout=2).close()
        server.start()
        assert server.port == port
        assert server.client().head_object(Bucket=BUCKET, Key="kept")["ETag"] == etag
        server.kill()  # what was acknowledged survives even that
        server.start()
        assert server.client().get_object(Bucket=BUCKET, Key="kept")["Body"].read() == b"bytes"


def test_the_server_and_its_files_are_gone_after_the_block() -> None:
    with s3_server(persist=False) as server:
        process, directory, port = server.process, server.directory, server.port
        assert process is not None
    assert process.poll() is not None
    assert not directory.exists()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=2).close()
