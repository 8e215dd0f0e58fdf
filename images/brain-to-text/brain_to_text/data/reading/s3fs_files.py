"""S3 objects as files for h5py, through s3fs: only the indexed version, without short reads, with request counts."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import boto3
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    CredentialRetrievalError,
    NoCredentialsError,
    PartialCredentialsError,
    TokenRetrievalError,
)
from s3fs import S3FileSystem
from s3fs.core import S3File, _inner_fetch
from s3fs.utils import FileExpired

from brain_to_text.data.reading.read_request import AccessDenied, ObjectReplaced, RequestLog, TransientError
from brain_to_text.data.schema import ObjectVersion
from estiba.errors import StoreError
from estiba.storage.s3_client import endpoint_url, is_anonymous, region_of, requester_pays

BLOCK_BYTES = 2 * 2**20
"""About one trial. s3fs's default of 50 MiB would fetch 47 times as many bytes as are used."""
EXTRA_BLOCKS = 3
"""Blocks beyond the size of a trial: it starts inside a block, one block is read ahead, one contains tables."""
POLL_S = 0.1
_NO_CREDENTIALS = (NoCredentialsError, PartialCredentialsError, CredentialRetrievalError, TokenRetrievalError)


def filesystem() -> S3FileSystem:
    """Create a file system with the endpoint, region and credentials of estiba.storage.s3. Raises StoreError."""
    try:
        region = region_of(boto3.Session())
    except BotoCoreError as error:
        raise StoreError(f"{error}; correct AWS_PROFILE or the AWS configuration file") from None
    endpoint = endpoint_url()
    s3 = S3FileSystem(
        anon=is_anonymous(),
        endpoint_url=endpoint,
        client_kwargs={"region_name": region},
        config_kwargs={
            # The caller retries, because it can stop while it waits.
            "retries": {"total_max_attempts": 2, "mode": "standard"},
            **({"s3": {"addressing_style": "path"}} if endpoint else {}),
        },
        use_listings_cache=False,
        skip_instance_cache=True,
        local_expiry_check=True,  # for a store that does not honour If-Match
    )
    s3.retries = 1
    return s3


def blocks_for(size_bytes: int) -> int:
    """Return how many blocks to keep in memory. Fewer would evict blocks of a trial before it is read completely."""
    return -(-size_bytes // BLOCK_BYTES) + EXTRA_BLOCKS


class _ShortResponse(Exception):
    """A response with too few bytes."""


class PinnedFile(S3File):
    """One version of an object, with up to `blocks` blocks in memory. `closing` aborts a read in progress."""

    def __init__(
        self,
        filesystem: S3FileSystem,
        location: str,
        version: ObjectVersion,
        blocks: int,
        log: RequestLog,
        closing: threading.Event,
    ) -> None:
        self.blocks, self._log, self._closing = blocks, log, closing
        super().__init__(
            filesystem,
            location,
            "rb",
            block_size=BLOCK_BYTES,
            cache_type="background",
            cache_options={"maxblocks": blocks},
            size=version.size_bytes,
        )
        # From the index, so opening a file sends no request.
        self.details = {"name": location, "size": version.size_bytes, "type": "file"}
        if version.tag:
            self.details["ETag"] = version.tag
            self.read_kw: dict[str, Any] = {**self.read_kw, "IfMatch": version.tag}
        if requester_pays():
            self.read_kw = {**self.read_kw, "RequestPayer": "requester"}

    def _fetch_range(self, start: int, end: int) -> bytes:
        """Fetch a range. s3fs's cache calls this, in the reading thread or in its own."""
        data = self._fetch_unless_closing(start, end)
        self._log.add(len(data))
        if len(data) != min(end, self.size) - start:
            raise _ShortResponse(f"got {len(data):,} bytes instead of {min(end, self.size) - start:,}")
        return data

    def _fetch_unless_closing(self, start: int, end: int) -> bytes:
        """Fetch like S3File, but stop waiting for a slow store once `closing` is set."""
        future = asyncio.run_coroutine_threadsafe(
            _inner_fetch(self.fs, self.bucket, self.key, self.version_id, start, end, self.read_kw, self.details),
            self.fs.loop,
        )
        while True:
            try:
                data: bytes = future.result(timeout=POLL_S)
                return data
            except TimeoutError:
                if future.done():
                    raise  # raised by s3fs
                if self._closing.is_set():
                    future.cancel()
                    raise TransientError("closed") from None

    def readinto(self, buffer: Any) -> int:
        """Read into `buffer`. Raises OSError for a short read, which h5py would pad with zeros."""
        expected = max(0, min(memoryview(buffer).nbytes, self.size - self.loc))
        try:
            count: int = super().readinto(buffer)
            if count == expected:
                return count
            failure: Exception = TransientError(f"got {count:,} bytes instead of {expected:,}")
        except BaseException as error:
            failure = classify(error)
            _drop_tracebacks(error)
        self._log.failure = failure
        raise OSError("the read failed")


def _drop_tracebacks(error: BaseException | None) -> None:
    """Drop the tracebacks of an error and its causes.

    s3fs keeps errors in reference cycles. With their tracebacks, they would keep h5py's objects alive until a garbage
    collection, which needs h5py's lock.
    """
    while error is not None:
        error.__traceback__ = None
        error = error.__cause__ or error.__context__


def classify(error: BaseException) -> Exception:
    """Turn the error of a failed request into ObjectReplaced, AccessDenied or TransientError."""
    service_error = _service_error(error)
    code = ""
    text = " ".join(str(error).split())[:400] or type(error).__name__
    if service_error is not None:
        details = service_error.response.get("Error", {})
        code = str(details.get("Code", ""))
        text = f"{code}: {details.get('Message', '')}"[:400]
    elif not isinstance(error, _ShortResponse):
        text = f"{type(error).__name__}: {text}"
    if isinstance(error, (FileNotFoundError, FileExpired)) or code in ("PreconditionFailed", "412"):
        return ObjectReplaced("")
    if isinstance(error, (PermissionError, *_NO_CREDENTIALS)) or code.startswith("ExpiredToken"):
        return AccessDenied(text)
    return TransientError(text)


def _service_error(error: BaseException | None) -> ClientError | None:
    """Return the service's error response, which s3fs wraps in its own errors."""
    while error is not None:
        if isinstance(error, ClientError):
            return error
        error = error.__cause__ or error.__context__
    return None
