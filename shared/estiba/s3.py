"""S3 and whatever speaks its API, through obstore, with credentials from the standard AWS chain.

Endpoint, region and certificates come from the standard variables (AWS_ENDPOINT_URL_S3, AWS_ENDPOINT_URL, AWS_REGION,
AWS_CA_BUNDLE). Requests are retried with backoff for up to three minutes, so an endpoint that is gone for a minute
costs a minute. Credentials are asked for again every few minutes, and at once when the service calls them expired.
"""

from __future__ import annotations

import contextlib
import io
import os
import queue
import re
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast
from urllib.parse import urlsplit

import boto3
import botocore.exceptions
import obstore
from obstore.auth.boto3 import Boto3CredentialProvider
from obstore.exceptions import AlreadyExistsError, BaseError, PreconditionError
from obstore.store import S3Store

from estiba.errors import ConfigError, StoreError
from estiba.s3_errors import first_line, is_denied, may_be_expired
from estiba.store import Entry, Store, exact_reader

CREDENTIAL_TTL = timedelta(minutes=5)
"""boto3 renews temporary credentials ten minutes before they end, so an answer is good for at least that long."""
RETRY_TIMEOUT = timedelta(seconds=180)
PART_BYTES = 16 * 2**20
"""One part of a multipart upload; S3 takes 10,000, so an object may reach 160 GB."""
UPLOADS_IN_FLIGHT = 4
FILE_PARTS_IN_FLIGHT = 16
"""Of one file on disk; one connection carries some 90 MB/s."""
READ_AHEAD_BYTES = 2**20

T = TypeVar("T")


class S3ObjectStore(Store):
    """`s3://bucket/prefix`."""

    is_durable = True

    def __init__(self, url: str) -> None:
        self.bucket, _, prefix = url.partition("://")[2].partition("/")  # a # or ? in a key is part of the key
        if not self.bucket:
            raise ConfigError(f"{url}: names no bucket; write s3://BUCKET/PREFIX")
        self.url = url.rstrip("/")
        self.prefix = prefix.strip("/")
        self.client = self._connect()
        """obstore's client, for requests that this class has no method for."""
        self._renewing = threading.Lock()

    def renew(self, failed: S3Store) -> bool:
        """Connect anew, so with new credentials, unless somebody did since `failed` was the client.

        True where this call did it. Raises ConfigError and StoreError as making a store does.
        """
        with self._renewing:
            if self.client is not failed:
                return False
            self.client = self._connect()
            return True

    def _connect(self) -> S3Store:
        environ = os.environ
        endpoint = environ.get("AWS_ENDPOINT_URL_S3") or environ.get("AWS_ENDPOINT_URL")
        if endpoint and not (urlsplit(endpoint).scheme in ("http", "https") and urlsplit(endpoint).hostname):
            raise ConfigError(
                f"the S3 endpoint {endpoint!r} (AWS_ENDPOINT_URL_S3) is not a URL; write http://HOST:PORT"
            )
        try:
            session = boto3.Session()
        except botocore.exceptions.BotoCoreError as error:
            raise StoreError(f"{self.url}: {error}; correct AWS_PROFILE or the AWS configuration file") from None
        options: dict[str, Any] = {
            "region": environ.get("AWS_REGION") or session.region_name or "us-east-1",
            "virtual_hosted_style_request": endpoint is None and "." not in self.bucket,
        }
        if endpoint:
            options["endpoint"] = endpoint
        if environ.get("AWS_NO_SIGN_REQUEST", "").lower() in ("1", "true", "yes"):
            options["skip_signature"] = True
        else:
            try:
                options["credential_provider"] = Boto3CredentialProvider(session, ttl=CREDENTIAL_TTL)
            except ValueError:
                raise StoreError(
                    f"{self.url}: no AWS credentials found; give the job a role, set AWS_ACCESS_KEY_ID and "
                    "AWS_SECRET_ACCESS_KEY, or AWS_NO_SIGN_REQUEST=1 for a public bucket"
                ) from None
            except botocore.exceptions.BotoCoreError as error:
                raise StoreError(
                    f"{self.url}: no usable AWS credentials ({error}); correct them or give a role"
                ) from None
            options["credential_provider"].config.pop("region", None)  # one source for the region: ours
        client: dict[str, Any] = {
            "allow_http": bool(endpoint and endpoint.startswith("http://")),
            "connect_timeout": timedelta(seconds=10),
            "timeout": timedelta(seconds=120),
        }
        try:
            if environ.get("AWS_CA_BUNDLE"):
                client["root_certificate"] = Path(environ["AWS_CA_BUNDLE"]).read_bytes()
            return S3Store(
                self.bucket,
                prefix=self.prefix or None,
                client_options=cast(Any, client),
                # Jitter makes obstore's ten default retries last two seconds; the clock is the bound here.
                retry_config={
                    "max_retries": 1000,
                    "retry_timeout": RETRY_TIMEOUT,
                    "backoff": {
                        "init_backoff": timedelta(milliseconds=200),
                        "max_backoff": timedelta(seconds=8),
                        "base": 2,
                    },
                },
                **options,
            )
        except (BaseError, OSError, ValueError) as error:
            raise ConfigError(
                f"{self.url}: {first_line(error)}; check the URL, AWS_ENDPOINT_URL_S3 and AWS_CA_BUNDLE"
            ) from error

    def list(self, prefix: str = "") -> list[Entry]:
        def collect() -> list[Entry]:
            found = []
            for chunk in obstore.list(self.client, prefix=prefix or None, chunk_size=1000):
                found += [Entry(meta["path"], meta["size"], meta["e_tag"]) for meta in chunk]
            return found

        # A console-made folder marker is the empty object `a/`, which obstore lists as `a`: nothing is there to read.
        entries = self._do(prefix, collect)
        real = {item.path: item for item in entries if item.size_bytes or (item.path and self.head(item.path))}
        return [real[path] for path in sorted(real)]

    def head(self, path: str) -> Entry | None:
        def look() -> Entry | None:
            try:
                meta = obstore.head(self.client, path)
            except FileNotFoundError:
                return None
            return Entry(path, meta["size"], meta["e_tag"])

        return self._do(path, look)

    def read(self, path: str, start: int = 0, length: int | None = None) -> bytes:
        if length == 0:
            return b""
        if length is None and start == 0:
            return self._do(path, lambda: bytes(obstore.get(self.client, path).bytes()))
        end = length if length is not None else self._size(path) - start
        if end == 0:
            return b""
        data = self._do(path, lambda: bytes(obstore.get_range(self.client, path, start=start, length=end)))
        if len(data) != end:
            raise StoreError(f"{self.url_of(path)}: {len(data)} bytes at {start} where {end} were asked for; try again")
        return data

    def _size(self, path: str) -> int:
        entry = self.head(path)
        if entry is None:
            raise StoreError(f"{self.url_of(path)}: there is no such object; check the prefix")
        return entry.size_bytes

    def open(self, path: str, size_bytes: int | None = None) -> BinaryIO:
        size = self._size(path) if size_bytes is None else size_bytes
        return exact_reader(_RangedFile(self, path, size), READ_AHEAD_BYTES)

    @contextlib.contextmanager
    def writer(self, path: str) -> Iterator[BinaryIO]:
        upload = _Upload(self, path)
        try:
            yield cast(BinaryIO, upload)
        except BaseException:
            upload.abort()
            raise
        upload.finish()

    def put(self, path: str, data: bytes | Iterator[bytes]) -> None:
        """One PUT for bytes; one multipart upload for an iterator, which is never run twice."""
        if isinstance(data, bytes):
            self._do(path, lambda: obstore.put(self.client, path, data, use_multipart=False))
            return

        def upload() -> None:
            obstore.put(
                self.client, path, data, use_multipart=True, chunk_size=PART_BYTES, max_concurrency=UPLOADS_IN_FLIGHT
            )

        self._do(path, upload, may_repeat=False)

    def put_file(self, path: str, source: Path) -> None:
        self._do(
            path,
            lambda: obstore.put(
                self.client,
                path,
                source,
                use_multipart=True,
                chunk_size=PART_BYTES,
                max_concurrency=FILE_PARTS_IN_FLIGHT,
            ),
        )

    def abort_uploads(self) -> int:
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        client = boto3.client("s3", endpoint_url=endpoint)
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
        """Run one request; renew credentials once when they are called expired; explain what fails."""
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
            if "ExpiredToken" in text:
                raise StoreError(f"{url}: {text}; renew the credentials, or give the job a role that does") from error
            if is_denied(error):
                raise StoreError(
                    f"{url}: access denied ({text}); allow this role s3:GetObject, s3:ListBucket and, "
                    "for outputs, s3:PutObject and s3:DeleteObject"
                ) from error
            if re.search("invalid path|parse path|empty path segment", text):
                remedy = "a name with empty, . or .. parts or control characters cannot be used; rename the object"
                raise StoreError(f"{url}: {text}; {remedy}") from error
            raise StoreError(f"{url}: {text}; check the endpoint, the region and the network") from error


class _RangedFile(io.RawIOBase):
    """A read-only file over ranged reads."""

    def __init__(self, store: S3ObjectStore, path: str, size: int) -> None:
        self._store, self._path, self._size, self._position = store, path, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        length = max(0, min(len(buffer), self._size - self._position))
        if length:
            buffer[:length] = self._store.read(self._path, self._position, length)
            self._position += length
        return length


class _Upload(io.RawIOBase):
    """A writer whose object appears when it is finished. Small objects are one PUT, larger ones a multipart upload.

    obstore uploads from an iterator in a thread; a queue of two parts between bounds the memory. An iterator that
    raises makes obstore abort the multipart upload, so that nothing is left behind to be paid for.
    """

    def __init__(self, store: S3ObjectStore, path: str) -> None:
        self._store, self._path = store, path
        self._pending = bytearray()
        self._parts: queue.Queue[bytes | BaseException | None] = queue.Queue(maxsize=2)
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._written = 0

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._written

    def write(self, data: Any) -> int:
        self._pending += data
        size_bytes = memoryview(data).nbytes  # not len: an array of floats has fewer items than bytes
        self._written += size_bytes
        while len(self._pending) >= PART_BYTES:
            self._send(bytes(self._pending[:PART_BYTES]))
            del self._pending[:PART_BYTES]
        return size_bytes

    def finish(self) -> None:
        if self._thread is None:
            self._store.put(self._path, bytes(self._pending))
            return
        if self._pending:
            self._send(bytes(self._pending))
        self._put(None)
        self._thread.join()
        if self._error is not None:
            raise self._error

    def abort(self) -> None:
        if self._thread is not None:
            self._put(_Abandoned())
            self._thread.join()

    def _send(self, part: bytes) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="estiba-upload", daemon=True)
            self._thread.start()
        self._put(part)
        if self._error is not None:
            raise self._error

    def _put(self, item: bytes | BaseException | None) -> None:
        while self._thread is not None and self._thread.is_alive():
            with contextlib.suppress(queue.Full):
                self._parts.put(item, timeout=0.2)
                return

    def _run(self) -> None:
        try:
            self._store.put(self._path, self._drain())
        except _Abandoned:
            pass
        except BaseException as error:
            self._error = error

    def _drain(self) -> Iterator[bytes]:
        while True:
            item = self._parts.get()
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            yield item


class _Abandoned(Exception):
    """The block that wrote the object raised."""
