"""S3 and every service with its API, through obstore.

Credentials are renewed every few minutes, and at once when the service reports that they expired.
"""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

import boto3
import botocore.exceptions
import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, PreconditionError
from obstore.store import S3Store

from estiba.errors import ConfigError, ObjectChangedError, StoreError
from estiba.storage import s3_upload
from estiba.storage.base import Entry, Store, exact_reader
from estiba.storage.s3_client import PROBE_TIMEOUT, boto_client, connect, endpoint_url
from estiba.storage.s3_errors import first_line, is_denied, may_be_expired, remedy_for
from estiba.storage.s3_files import PART_BYTES, READ_AHEAD_BYTES, RangedFile, Upload

UPLOADS_IN_FLIGHT = 4
FILE_PARTS_IN_FLIGHT = 16
"""Parts of one local file that are uploaded at a time; one connection carries some 90 MB/s."""

T = TypeVar("T")

_RENAME = "a name with empty, . or .. parts or control characters cannot be used; rename the object"
_UNUSABLE = re.compile(r"(^|/)(/|\.{1,2}(/|$))|[\x00-\x1f\x7f]")


class S3ObjectStore(Store):
    """`s3://bucket/prefix`."""

    is_durable = True

    def __init__(self, url: str) -> None:
        self.bucket, _, prefix = url.partition("://")[2].partition("/")  # a # or ? in a key is part of the key
        if not self.bucket:
            raise ConfigError(f"{url}: names no bucket; write s3://BUCKET/PREFIX")
        self.url = url.rstrip("/")
        self.prefix = prefix.strip("/")
        self.client = connect(self.url, self.bucket, self.prefix)
        """obstore's client, for requests that this class has no method for."""
        self._renewing = threading.Lock()
        self._boto: Any = None

    def renew(self, failed: S3Store) -> bool:
        """Reconnect with new credentials, unless another thread has already replaced the `failed` client.

        Returns whether this call reconnected. Raises ConfigError and StoreError, as the constructor does.
        """
        with self._renewing:
            if self.client is not failed:
                return False
            self.client = connect(self.url, self.bucket, self.prefix)
            return True

    def list(self, prefix: str = "") -> list[Entry]:
        def collect() -> list[Entry]:
            found = []
            for chunk in obstore.list(self.client, prefix=prefix or None, chunk_size=1000):
                found += [Entry(meta["path"], meta["size"], meta["e_tag"]) for meta in chunk]
            return found

        # A folder created in the S3 console is the empty object `a/`, which obstore lists as `a`; it cannot be read.
        try:
            entries = self._do(prefix, collect)
        except StoreError as error:
            if _RENAME not in str(error):
                raise
            raise self._unusable_keys(prefix) from error
        real = {item.path: item for item in entries if item.size_bytes or (item.path and self.head(item.path))}
        return [real[path] for path in sorted(real)]

    def _unusable_keys(self, prefix: str) -> StoreError:
        """Return the error that names all keys that obstore cannot parse, not only the first."""
        below = "".join(f"{part}/" for part in (self.prefix, prefix) if part)
        pages = boto_client().get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=below)
        keys = [item["Key"] for page in pages for item in page.get("Contents", ())]
        names = [key for key in keys if _UNUSABLE.search(key)]
        shown = ", ".join(repr(name) for name in names[:100]) + (", ..." if len(names) > 100 else "")
        return StoreError(f"{self.url_of(prefix)}: {len(names)} keys cannot be used: {shown}; {_RENAME}")

    def head(self, path: str) -> Entry | None:
        def request() -> Entry | None:
            try:
                meta = obstore.head(self.client, path)
            except FileNotFoundError:
                return None
            return Entry(path, meta["size"], meta["e_tag"])

        return self._do(path, request)

    def read(self, path: str, start: int = 0, length: int | None = None, *, etag: str | None = None) -> bytes:
        """Return the bytes. With an `etag`, raises ObjectChangedError if the object is another version, or gone."""
        if length == 0:
            return b""
        if etag is not None and length is not None:
            return self._read_version(path, start, length, etag)
        if length is None and start == 0:
            return self._do(path, lambda: bytes(obstore.get(self.client, path).bytes()))
        count = length if length is not None else self._size(path) - start
        if count == 0:
            return b""
        data = self._do(path, lambda: bytes(obstore.get_range(self.client, path, start=start, length=count)))
        if len(data) != count:
            raise StoreError(
                f"{self.url_of(path)}: {len(data)} bytes at {start} where {count} were asked for; try again"
            )
        return data

    def read_chunks(
        self, path: str, start: int, length: int, *, etag: str | None, chunk_bytes: int
    ) -> Iterator[memoryview]:
        """Yield a range as it arrives, in chunks of about `chunk_bytes`, of the version with this `etag`.

        Raises obstore's PreconditionError if the object has another one, and StoreError.
        """
        options: Any = {"range": (start, start + length)}
        if etag is not None:
            options["if_match"] = etag
        chunks = iter(
            self._do(path, lambda: obstore.get(self.client, path, options=options).stream(min_chunk_size=chunk_bytes))
        )
        while (chunk := self._do(path, lambda: next(chunks, None), may_repeat=False)) is not None:
            yield memoryview(chunk)

    def _read_version(self, path: str, start: int, length: int, etag: str) -> bytes:
        def request() -> tuple[bytes, str | None]:
            found = obstore.get(self.client, path, options={"if_match": etag, "range": (start, start + length)})
            return bytes(found.bytes()), found.meta["e_tag"]

        try:
            data, found_etag = self._do(path, request, missing_is_error=False)
        except PreconditionError:
            raise ObjectChangedError(f"{self.url_of(path)}: changed since it was listed") from None
        except FileNotFoundError:
            raise ObjectChangedError(f"{self.url_of(path)}: deleted since it was listed") from None
        if found_etag is not None and found_etag != etag:  # a server that ignores If-Match
            raise ObjectChangedError(f"{self.url_of(path)}: changed since it was listed")
        if len(data) != length:
            raise ObjectChangedError(f"{self.url_of(path)}: {len(data)} bytes at {start} where {length} were listed")
        return data

    def _size(self, path: str) -> int:
        entry = self.head(path)
        if entry is None:
            raise StoreError(f"{self.url_of(path)}: no such object; check the prefix")
        return entry.size_bytes

    def open(self, path: str, size_bytes: int | None = None, *, etag: str | None = None) -> BinaryIO:
        size = self._size(path) if size_bytes is None else size_bytes
        return exact_reader(RangedFile(self, path, size, etag), READ_AHEAD_BYTES)

    @contextlib.contextmanager
    def writer(self, path: str) -> Iterator[BinaryIO]:
        upload = Upload(self, path)
        try:
            yield cast(BinaryIO, upload)
        except BaseException:
            upload.abort()
            raise
        upload.finish()

    def put(self, path: str, data: bytes | Iterator[bytes]) -> None:
        """Publish bytes with one PUT, an iterator with one multipart upload. An iterator is never retried."""
        if isinstance(data, bytes):
            self._do(path, lambda: obstore.put(self.client, path, data, use_multipart=False))
            return

        def upload() -> None:
            obstore.put(
                self.client, path, data, use_multipart=True, chunk_size=PART_BYTES, max_concurrency=UPLOADS_IN_FLIGHT
            )

        self._do(path, upload, may_repeat=False)

    def put_file(self, path: str, source: Path) -> None:
        if source.stat().st_size <= PART_BYTES:
            self._do(path, lambda: obstore.put(self.client, path, source, use_multipart=False))
        else:
            self.upload(path, source, resume=False)

    def upload(
        self,
        path: str,
        source: Path,
        *,
        resume: bool,
        in_flight: int = FILE_PARTS_IN_FLIGHT,
        metadata: dict[str, str] | None = None,
    ) -> int:
        """Publish a local file in verified parts (`s3_upload.upload_file`). Returns the bytes that were sent."""

        def send(client: Any, key: str) -> int:
            return s3_upload.upload_file(
                client,
                self.bucket,
                key,
                source,
                part_bytes=PART_BYTES,
                in_flight=in_flight,
                resume=resume,
                metadata=metadata,
            )

        return self._do_with_boto(path, send)

    def is_uploaded(self, path: str, source: Path) -> bool:
        """Return whether the object has the size and the checksum of a local file."""

        def compare(client: Any, key: str) -> bool:
            return s3_upload.is_uploaded(client, self.bucket, key, source, part_bytes=PART_BYTES)

        return self._do_with_boto(path, compare)

    def metadata(self, path: str) -> dict[str, str]:
        """Return the object's metadata of its uploader; empty if there is none, or no object."""
        return self._do_with_boto(path, lambda client, key: s3_upload.metadata(client, self.bucket, key))

    def _do_with_boto(self, path: str, action: Callable[[Any, str], T]) -> T:
        """Run an action with boto3's client, which renews credentials itself, and the object's key."""
        key = f"{self.prefix}/{path}" if self.prefix else path
        try:
            with self._renewing:
                self._boto = self._boto or boto_client()
            return action(self._boto, key)
        except (botocore.exceptions.BotoCoreError, botocore.exceptions.ClientError) as error:
            text = first_line(error)
            if "AccessDenied" in text or "(403)" in text:
                remedy = "allow this role s3:PutObject, s3:GetObject and s3:AbortMultipartUpload"
            elif "ExpiredToken" in text:
                remedy = "renew the credentials, or give the job a role that does"
            else:
                remedy = "check the bucket, the endpoint, the region and the network"
            raise StoreError(f"{self.url_of(path)}: {text}; {remedy}") from error

    def answers(self) -> None:
        client = connect(self.url, self.bucket, self.prefix, retry_timeout=PROBE_TIMEOUT)

        def first() -> None:
            for _ in obstore.list(client, chunk_size=1):
                break

        self._do("", first)

    def abort_uploads(self) -> int:
        client = boto3.client("s3", endpoint_url=endpoint_url())
        below = f"{self.prefix}/" if self.prefix else ""
        count = 0
        try:
            for page in client.get_paginator("list_multipart_uploads").paginate(Bucket=self.bucket, Prefix=below):
                for upload in page.get("Uploads", ()):
                    client.abort_multipart_upload(Bucket=self.bucket, Key=upload["Key"], UploadId=upload["UploadId"])
                    count += 1
        except (botocore.exceptions.BotoCoreError, botocore.exceptions.ClientError) as error:
            raise StoreError(
                f"{self.url}: unfinished uploads were not aborted ({first_line(error)}); allow this role "
                "s3:ListBucketMultipartUploads and s3:AbortMultipartUpload, or give the bucket a lifecycle rule"
            ) from error
        return count

    def write_new(self, path: str, data: bytes) -> bool:
        try:
            self._do(path, lambda: obstore.put(self.client, path, data, mode="create"))
        except (AlreadyExistsError, PreconditionError):
            return False
        return True

    def delete(self, path: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._do(path, lambda: obstore.delete(self.client, path), missing_is_error=False)

    def rename(self, path: str, new_path: str) -> None:
        self._do(path, lambda: obstore.rename(self.client, path, new_path))

    def _do(self, path: str, action: Callable[[], T], *, missing_is_error: bool = True, may_repeat: bool = True) -> T:
        """Run one request. Renews expired credentials once and turns errors into StoreError."""
        url, client = self.url_of(path), self.client
        try:
            try:
                return action()
            except (BaseError, OSError) as error:
                if not may_repeat or not may_be_expired(error):
                    raise
                self.renew(client)
                return action()
        except (AlreadyExistsError, PreconditionError):
            raise
        except FileNotFoundError as error:
            if not missing_is_error:
                raise
            raise StoreError(f"{url}: {first_line(error)}; check the bucket and the prefix") from error
        except (BaseError, OSError, ValueError, botocore.exceptions.BotoCoreError) as error:
            text = first_line(error)
            if remedy := remedy_for(text):
                raise StoreError(f"{url}: {text}; {remedy}") from error
            if is_denied(error):
                raise StoreError(
                    f"{url}: access denied ({text}); allow this role s3:GetObject, s3:ListBucket and, "
                    "for outputs, s3:PutObject and s3:DeleteObject"
                ) from error
            if re.search("invalid path|parse path|empty path segment", text):
                raise StoreError(f"{url}: {text}; {_RENAME}") from error
            raise StoreError(f"{url}: {text}; check the endpoint, the region and the network") from error
