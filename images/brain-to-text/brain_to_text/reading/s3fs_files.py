"""Objects as files for h5py, by s3fs: the version that was indexed and no other, whole answers, counted requests."""

from __future__ import annotations

import asyncio
import os
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

from brain_to_text.indexing.index import Pin
from brain_to_text.reading.h5py_files import Again, Refused, Replaced
from estiba.errors import StoreError

BLOCK_BYTES = 2 * 2**20
"""About a trial. s3fs's own 50 MiB would fetch 47 times what is used."""
SPARE_BLOCKS = 3
"""Of each file, beyond a trial's own: it begins inside of one, one comes in the background, one has tables."""
POLL_S = 0.1
_WITHOUT = (NoCredentialsError, PartialCredentialsError, CredentialRetrievalError, TokenRetrievalError)


def filesystem() -> S3FileSystem:
    """A new one, with endpoint, region and credentials from where estiba.s3 has them. Raises StoreError."""
    environ = os.environ
    try:
        region = environ.get("AWS_REGION") or boto3.Session().region_name or "us-east-1"
    except BotoCoreError as error:
        raise StoreError(f"{error}; correct AWS_PROFILE or the AWS configuration file") from None
    endpoint = environ.get("AWS_ENDPOINT_URL_S3") or environ.get("AWS_ENDPOINT_URL") or None
    made = S3FileSystem(
        anon=environ.get("AWS_NO_SIGN_REQUEST", "").lower() in ("1", "true", "yes"),
        endpoint_url=endpoint,
        client_kwargs={"region_name": region},
        config_kwargs={
            # Patience is the caller's, who can be stopped in the middle of it.
            "retries": {"total_max_attempts": 2, "mode": "standard"},
            **({"s3": {"addressing_style": "path"}} if endpoint else {}),
        },
        use_listings_cache=False,
        skip_instance_cache=True,
        local_expiry_check=True,  # for a store that does not honour If-Match
    )
    made.retries = 1
    return made


def blocks_for(size_bytes: int) -> int:
    """With fewer, a trial's first blocks would have to be fetched again for its last."""
    return -(-size_bytes // BLOCK_BYTES) + SPARE_BLOCKS


class Short(Exception):
    """An answer with too few bytes."""


class PinnedFile(S3File):
    """One version of an object, with `blocks` of it in memory."""

    def __init__(self, filesystem: S3FileSystem, place: str, pin: Pin, blocks: int, closing: threading.Event) -> None:
        self.blocks, self._closing = blocks, closing
        self.failure: Exception | None = None
        """The verdict on what h5py only calls a read that failed."""
        self._gets = self._bytes = 0
        self._counting = threading.Lock()
        super().__init__(
            filesystem,
            place,
            "rb",
            block_size=BLOCK_BYTES,
            cache_type="background",
            cache_options={"maxblocks": blocks},
            size=pin.size_bytes,
        )
        # Known from the index, so that opening asks for nothing.
        self.details = {"name": place, "size": pin.size_bytes, "type": "file"}
        if pin.mark:
            self.details["ETag"] = pin.mark
            self.read_kw: dict[str, Any] = {**self.read_kw, "IfMatch": pin.mark}

    def take_counts(self) -> tuple[int, int]:
        """(requests, bytes) since this was last asked."""
        with self._counting:
            taken, self._gets, self._bytes = (self._gets, self._bytes), 0, 0
        return taken

    def _fetch_range(self, start: int, end: int) -> bytes:
        """Called by the cache, in this thread or behind it."""
        data = self._fetched(start, end)
        with self._counting:
            self._gets += 1
            self._bytes += len(data)
        if len(data) != min(end, self.size) - start:
            raise Short(f"{len(data):,} bytes came where {min(end, self.size) - start:,} were asked for")
        return data

    def _fetched(self, start: int, end: int) -> bytes:
        """What S3File does, which waits until a slow store has answered even where nobody wants it any more."""
        fetching = asyncio.run_coroutine_threadsafe(
            _inner_fetch(self.fs, self.bucket, self.key, self.version_id, start, end, self.read_kw, self.details),
            self.fs.loop,
        )
        while True:
            try:
                data: bytes = fetching.result(timeout=POLL_S)
                return data
            except TimeoutError:
                if fetching.done():
                    raise  # s3fs's own
                if self._closing.is_set():
                    fetching.cancel()
                    raise Again("closed") from None

    def readinto(self, buffer: Any) -> int:
        """As many bytes as there are: what is missing here, h5py would take for zeros."""
        wanted = max(0, min(memoryview(buffer).nbytes, self.size - self.loc))
        try:
            count: int = super().readinto(buffer)
            if count != wanted:
                raise Short(f"{count:,} bytes came where {wanted:,} were asked for")
        except BaseException as error:
            self.failure = verdict(error)  # not the error, whose traceback would keep h5py's objects in a cycle
            raise
        return count


def verdict(error: BaseException) -> Exception:
    """What to do about a request that failed."""
    said = _said(error)
    code = "" if said is None else str(said.response.get("Error", {}).get("Code", ""))
    text = " ".join(str(error).split())[:400] or type(error).__name__
    if said is not None:
        text = f"{code}: {said.response.get('Error', {}).get('Message', '')}"[:400]
    if isinstance(error, (FileNotFoundError, FileExpired)) or code in ("PreconditionFailed", "412"):
        return Replaced("")
    if isinstance(error, (PermissionError, *_WITHOUT)) or code.startswith("ExpiredToken"):
        return Refused(text)
    return Again(f"{text}" if said is not None or isinstance(error, Short) else f"{type(error).__name__}: {text}")


def _said(error: BaseException | None) -> ClientError | None:
    """The service's own words, behind what s3fs made of them."""
    while error is not None:
        if isinstance(error, ClientError):
            return error
        error = error.__cause__ or error.__context__
    return None
