"""Uploads: what arrives is what was there, verified by S3, and a killed upload is continued."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from estiba.errors import ConfigError, StoreError
from estiba.staging import upload
from estiba.storage import open_store, s3
from s3server import S3Server

SHARED = Path(__file__).resolve().parents[2] / "shared"
PART = 2**18


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "PART_BYTES", PART)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A directory with odd names, and files of no, one and several parts."""
    found = tmp_path / "model"
    for number, name in enumerate(("a b.bin", "c#1?.bin", "ñandú/é+x.bin", "large.bin")):
        (found / name).parent.mkdir(parents=True, exist_ok=True)
        (found / name).write_bytes(os.urandom(number * PART + number))
    return found


def objects_at(url: str) -> dict[str, bytes]:
    store = open_store(url)
    return {entry.path: store.read(entry.path) for entry in store.list()}


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_is_uploaded_equals_the_files(folder: Path, s3_url: str) -> None:
    result = upload(folder, s3_url)
    assert objects_at(s3_url) == content(folder)
    assert result.sent_bytes == result.size_bytes


def test_a_second_upload_sends_only_what_changed(folder: Path, s3_url: str) -> None:
    upload(folder, s3_url)
    assert upload(folder, s3_url).sent_bytes == 0
    data = bytearray((folder / "large.bin").read_bytes())
    data[5] ^= 1  # size and name stay
    (folder / "large.bin").write_bytes(data)
    assert upload(folder, s3_url).sent_bytes == len(data)
    assert objects_at(s3_url) == content(folder)


def test_an_object_that_another_tool_uploaded_in_one_piece_is_recognised(
    folder: Path, s3_url: str, s3_client: Any
) -> None:
    key = s3_url.removeprefix("s3://estiba/")
    data = (folder / "large.bin").read_bytes()
    s3_client.put_object(Bucket="estiba", Key=f"{key}/large.bin", Body=data, ChecksumAlgorithm="CRC32")
    assert upload(folder / "large.bin", s3_url).sent_bytes == 0


def test_a_killed_upload_is_continued_and_sends_only_what_was_missing(
    s3: S3Server, s3_url: str, s3_client: Any, tmp_path: Path, until: Callable[[Callable[[], Any]], Any]
) -> None:
    (tmp_path / "large.bin").write_bytes(os.urandom(40 * PART))
    program = f"""
import time
from estiba.storage import s3, s3_upload
s3.PART_BYTES = {PART}
import estiba.staging.uploads as engine
engine.PARTS_IN_FLIGHT = 1
import botocore.client
original = botocore.client.BaseClient._make_api_call
def slow(self, name, arguments):
    if name == "UploadPart":
        time.sleep(0.05)
    return original(self, name, arguments)
botocore.client.BaseClient._make_api_call = slow
engine.upload({str(tmp_path / "large.bin")!r}, {s3_url!r})
"""
    environ = {**os.environ, **s3.environ, "PYTHONPATH": str(SHARED)}
    process = subprocess.Popen([sys.executable, "-c", program], env=environ)

    def parts() -> int:
        found = s3_client.list_multipart_uploads(Bucket="estiba").get("Uploads", [])
        mine = [item for item in found if s3_url.endswith(item["Key"].partition("/")[0])]
        if not mine:
            return 0
        listed = s3_client.list_parts(Bucket="estiba", Key=mine[0]["Key"], UploadId=mine[0]["UploadId"])
        return len(listed.get("Parts", ()))

    until(lambda: parts() >= 10)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert objects_at(s3_url) == {}
    assert upload(tmp_path / "large.bin", s3_url).sent_bytes <= 31 * PART
    assert objects_at(s3_url) == {"large.bin": (tmp_path / "large.bin").read_bytes()}


def test_parts_of_another_version_of_the_file_are_not_used(s3_url: str, s3_client: Any, tmp_path: Path) -> None:
    key = s3_url.removeprefix("s3://estiba/") + "/large.bin"
    started = s3_client.create_multipart_upload(Bucket="estiba", Key=key, ChecksumAlgorithm="CRC32")
    s3_client.upload_part(
        Bucket="estiba",
        Key=key,
        UploadId=started["UploadId"],
        PartNumber=1,
        Body=bytes(PART),
        ChecksumAlgorithm="CRC32",
    )
    (tmp_path / "large.bin").write_bytes(os.urandom(2 * PART))
    assert upload(tmp_path / "large.bin", s3_url).sent_bytes == 2 * PART
    assert objects_at(s3_url) == {"large.bin": (tmp_path / "large.bin").read_bytes()}


def test_files_named_last_appear_after_all_others(folder: Path, s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    lock = threading.Lock()
    original = s3.S3ObjectStore.upload

    def noted(self: s3.S3ObjectStore, path: str, source: Path, **options: Any) -> int:
        sent = original(self, path, source, **options)
        with lock:
            order.append(path)
        return sent

    monkeypatch.setattr(s3.S3ObjectStore, "upload", noted)
    upload(folder, s3_url, last=["a b.bin"])
    assert order[-1] == "a b.bin" and len(order) == 4


def test_sagemakers_markers_and_temporary_files_stay_here(folder: Path, s3_url: str) -> None:
    expected = content(folder)
    for name in ("large.bin.sagemaker-uploading", "large.bin.sagemaker-uploaded", ".x.estiba-tmp"):
        (folder / name).write_bytes(b"")
    upload(folder, s3_url)
    assert objects_at(s3_url) == expected


def test_a_path_without_files_and_a_bucket_that_is_not_there_are_one_message_each(
    folder: Path, s3_url: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"none: nothing there to upload"):
        upload(tmp_path / "none", s3_url)
    with pytest.raises(StoreError, match=r"s3://no-such-bucket/x/.*check the bucket"):
        upload(folder, "s3://no-such-bucket/x")
    with pytest.raises(ConfigError, match="is not on S3"):
        upload(folder, str(tmp_path / "elsewhere"))


def test_a_failed_upload_of_a_checkpoint_leaves_no_parts_to_be_billed(
    s3_url: str, s3_client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "state").write_bytes(bytes(4 * PART))
    real = os.pread

    def failing(descriptor: int, size: int, start: int) -> bytes:
        if start >= 2 * PART:
            raise OSError(5, "Input/output error")
        return real(descriptor, size, start)

    monkeypatch.setattr(os, "pread", failing)
    with pytest.raises(OSError, match="Input/output error"):
        open_store(s3_url).put_file("state", tmp_path / "state")
    assert s3_client.list_multipart_uploads(Bucket="estiba", Prefix=s3_url[12:]).get("Uploads", []) == []
