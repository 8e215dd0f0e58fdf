"""Upload one local file to S3 in parallel parts, verified and resumable.

S3 checks the CRC-32 of every part on arrival. An upload that a killed process left is found again by its key, and each
of its parts counts if it has the size and the checksum of the file's bytes; so no record of this host is needed. The
object appears when the last part is there, or not at all.
"""

from __future__ import annotations

import base64
import contextlib
import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import botocore.exceptions

MAX_PARTS = 10_000
_READ_BYTES = 2**20


def part_size(size_bytes: int, least_bytes: int) -> int:
    """Return the size of a part. S3 takes 10,000 of them."""
    return max(least_bytes, -(-size_bytes // MAX_PARTS))


def upload_file(
    client: Any,
    bucket: str,
    key: str,
    source: Path,
    *,
    part_bytes: int,
    in_flight: int,
    resume: bool,
    metadata: dict[str, str] | None = None,
) -> int:
    """Publish a local file. Returns the bytes that were sent.

    With `resume` an earlier upload is continued, and this one is left for the next attempt if it fails; without, a
    failed one is aborted. Raises OSError for the file, and botocore's errors.
    """
    with open(source, "rb") as file:
        size_bytes = os.fstat(file.fileno()).st_size
        if size_bytes <= part_bytes:
            data = file.read()
            client.put_object(
                Bucket=bucket, Key=key, Body=data, ChecksumCRC32=_encoded(zlib.crc32(data)), Metadata=metadata or {}
            )
            return len(data)
        part_bytes = part_size(size_bytes, part_bytes)
        starts = range(0, size_bytes, part_bytes)
        upload_id, kept = _unfinished(client, bucket, key) if resume else (None, {})
        if upload_id is None:
            created = client.create_multipart_upload(
                Bucket=bucket, Key=key, ChecksumAlgorithm="CRC32", Metadata=metadata or {}
            )
            upload_id, kept = created["UploadId"], {}
        descriptor = file.fileno()

        def send(number: int) -> tuple[dict[str, Any], int]:
            start = starts[number - 1]
            size = min(part_bytes, size_bytes - start)
            old = kept.get(number)
            if old and old["Size"] == size and old["ChecksumCRC32"] == _checksum(descriptor, start, size):
                return {"PartNumber": number, "ETag": old["ETag"], "ChecksumCRC32": old["ChecksumCRC32"]}, 0
            data = os.pread(descriptor, size, start)
            if len(data) != size:
                raise OSError(f"{source} became shorter while it was uploaded")
            checksum = _encoded(zlib.crc32(data))
            reply = client.upload_part(
                Bucket=bucket, Key=key, UploadId=upload_id, PartNumber=number, Body=data, ChecksumCRC32=checksum
            )
            return {"PartNumber": number, "ETag": reply["ETag"], "ChecksumCRC32": checksum}, size

        with ThreadPoolExecutor(min(in_flight, len(starts))) as pool:
            futures = [pool.submit(send, number) for number in range(1, len(starts) + 1)]
            try:
                results = [future.result() for future in futures]
            except BaseException:
                pool.shutdown(cancel_futures=True)
                if not resume:
                    with contextlib.suppress(botocore.exceptions.BotoCoreError, botocore.exceptions.ClientError):
                        client.abort_multipart_upload(Bucket=bucket, Key=key, UploadId=upload_id)
                raise
        client.complete_multipart_upload(
            Bucket=bucket, Key=key, UploadId=upload_id, MultipartUpload={"Parts": [part for part, _ in results]}
        )
        return sum(sent for _, sent in results)


def is_uploaded(client: Any, bucket: str, key: str, source: Path, *, part_bytes: int) -> bool:
    """Return whether the object has the file's size and checksum: that of the parts, or of the whole."""
    head = _head(client, bucket, key)
    size_bytes = source.stat().st_size
    found = head.get("ChecksumCRC32")
    if head.get("ContentLength") != size_bytes or not found:
        return False
    with open(source, "rb") as file:
        if "-" not in found:
            return bool(found == _checksum(file.fileno(), 0, size_bytes))
        part_bytes = part_size(size_bytes, part_bytes)
        parts = [
            _crc(file.fileno(), start, min(part_bytes, size_bytes - start)).to_bytes(4, "big")
            for start in range(0, size_bytes, part_bytes)
        ]
    return bool(found == f"{_encoded(zlib.crc32(b''.join(parts)))}-{len(parts)}")


def metadata(client: Any, bucket: str, key: str) -> dict[str, str]:
    return dict(_head(client, bucket, key).get("Metadata", {}))


def _head(client: Any, bucket: str, key: str) -> dict[str, Any]:
    """Return what S3 says about an object; nothing if it is absent."""
    try:
        return dict(client.head_object(Bucket=bucket, Key=key, ChecksumMode="ENABLED"))
    except botocore.exceptions.ClientError as error:
        if error.response.get("ResponseMetadata", {}).get("HTTPStatusCode") == 404:
            return {}
        raise


def _unfinished(client: Any, bucket: str, key: str) -> tuple[str | None, dict[int, dict[str, Any]]]:
    """Return the newest unfinished upload of a key that has checksums, with its parts by number."""
    try:
        uploads = client.list_multipart_uploads(Bucket=bucket, Prefix=key).get("Uploads", ())
        mine = sorted((item for item in uploads if item["Key"] == key), key=lambda item: item["Initiated"])
        if not mine:
            return None, {}
        upload_id = mine[-1]["UploadId"]
        parts: dict[int, dict[str, Any]] = {}
        for page in client.get_paginator("list_parts").paginate(Bucket=bucket, Key=key, UploadId=upload_id):
            parts |= {part["PartNumber"]: part for part in page.get("Parts", ())}
    except botocore.exceptions.ClientError:  # not allowed to list, or finished by another process meanwhile
        return None, {}
    if any("ChecksumCRC32" not in part for part in parts.values()):
        return None, {}
    return upload_id, parts


def _checksum(descriptor: int, start: int, size: int) -> str:
    return _encoded(_crc(descriptor, start, size))


def _crc(descriptor: int, start: int, size: int) -> int:
    value = 0
    for at in range(start, start + size, _READ_BYTES):
        value = zlib.crc32(os.pread(descriptor, min(_READ_BYTES, start + size - at), at), value)
    return value


def _encoded(crc: int) -> str:
    return base64.b64encode(crc.to_bytes(4, "big")).decode()
