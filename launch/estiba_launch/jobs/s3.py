"""Objects by relative key below an S3 prefix.

The ssh target copies this file to remote hosts, with errors.py, keys.py and mirror.py, and it imports no more.
"""

from __future__ import annotations

import copy
import datetime
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from estiba_launch.errors import AwsUnavailable, HostError, disk_error
from estiba_launch.jobs.keys import paths_below, shown
from estiba_launch.jobs.mirror import KeyRefused, Stored

MODIFIED = "estiba-modified-ns"
"""Metadata of an object that a sync uploaded: when the file was written. S3's own time is that of the upload."""
NOT_THE_KEY = {
    "AccountProblem",
    "AllAccessDisabled",
    "AuthorizationHeaderMalformed",
    "ExpiredToken",
    "InvalidAccessKeyId",
    "InvalidToken",
    "NoSuchBucket",
    "PermanentRedirect",
    "RequestTimeTooSkewed",
    "RequestTimeout",
    "SignatureDoesNotMatch",
    "SlowDown",
    "Throttling",
    "TokenRefreshRequired",
}
"""Error codes below 500 that say nothing about the object: the bucket or the login fails for every one."""


@contextmanager
def disk_errors(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise HostError(f"{what}: {disk_error(error)}") from error


def aws_errors() -> tuple[type[Exception], ...]:
    """What a call to AWS raises, including when something else answers instead."""
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import BotoCoreError, ClientError
    from botocore.parsers import ResponseParserError

    return BotoCoreError, ClientError, Boto3Error, ResponseParserError


@contextmanager
def s3_errors(what: str) -> Iterator[None]:
    # botocore's timeouts are OSErrors too, so they are caught before the disk's.
    try:
        yield
    except aws_errors() as error:
        kind = KeyRefused if _is_about_the_key(error) else AwsUnavailable
        raise kind(f"{what}: {error}; check the address, the login and AWS_ENDPOINT_URL") from error
    except OSError:
        with disk_errors(what):
            raise


def _is_about_the_key(error: Exception) -> bool:
    """S3 answered, and refused this object."""
    # An upload's error wraps the client's.
    response = getattr(error, "response", None) or getattr(error.__context__, "response", None) or {}
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 500)
    return status < 500 and response.get("Error", {}).get("Code") not in NOT_THE_KEY


class S3Store:
    """A prefix in a bucket. Endpoint, region and credentials are boto3's own (AWS_ENDPOINT_URL works).

    `report` is told, once in a row, that S3 does not answer and is asked again.
    """

    def __init__(self, uri: str, *, attempts: int = 8, report: Callable[[str], None] = lambda _: None) -> None:
        self.uri = uri.rstrip("/")
        self.bucket, _, prefix = uri.removeprefix("s3://").partition("/")
        self.prefix = prefix.strip("/")
        self.attempts = attempts
        self._report = report
        self._timed_out = False

    @cached_property
    def client(self) -> Any:
        import boto3
        from botocore.config import Config

        config = Config(retries={"mode": "standard", "total_max_attempts": self.attempts})
        client = boto3.client("s3", config=config)
        client.meta.events.register("needs-retry.s3", self._report_timeout)
        return client

    def _report_timeout(self, caught_exception: Exception | None = None, **_: Any) -> None:
        from botocore.exceptions import ConnectTimeoutError, ReadTimeoutError

        # The attempts of one call go on for minutes, a minute each.
        timed_out = isinstance(caught_exception, ConnectTimeoutError | ReadTimeoutError)
        if timed_out and not self._timed_out:
            self._report(f"S3 does not answer, trying again: {caught_exception}")
        self._timed_out = timed_out

    def key(self, relative: str) -> str:
        return f"{self.prefix}/{relative}" if self.prefix else relative

    def list(self) -> dict[str, int]:
        return self._list(self.key(""))

    def matching(self) -> tuple[S3Store, dict[str, int]]:
        """The objects below the prefix; where there are none, those whose key starts with it: s3://b/tr finds train/a.

        Returns key and size of each, and the store that the keys are relative to.
        """
        if found := self.list():
            return self, found
        above = copy.copy(self)
        above.prefix, _, name = self.prefix.rpartition("/")
        return above, {name + rest: size for rest, size in self._list(self.prefix).items()}

    def _list(self, prefix: str) -> dict[str, int]:
        return {key: one["Size"] for key, one in self._entries(prefix).items()}

    def objects(self) -> dict[str, Stored]:
        return {
            key: Stored(one["Size"], _end_of_second_ns(one["LastModified"]), one["ETag"])
            for key, one in self._entries(self.key("")).items()
        }

    def _entries(self, prefix: str) -> dict[str, dict[str, Any]]:
        with s3_errors(self.uri):
            pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=prefix)
            entries = [entry for page in pages for entry in page.get("Contents", [])]
        return {one["Key"][len(prefix) :]: one for one in entries if not one["Key"].endswith("/")}

    def head(self, key: str) -> Stored | None:
        from botocore.exceptions import ClientError

        with s3_errors(f"s3://{self.bucket}/{shown(self.key(key))}"), _key_errors(key):
            try:
                found = self.client.head_object(Bucket=self.bucket, Key=self.key(key))
            except ClientError as error:
                if error.response["ResponseMetadata"]["HTTPStatusCode"] == 404:
                    return None
                raise
        written = found["Metadata"].get(MODIFIED)
        modified_ns = int(written) if written else _end_of_second_ns(found["LastModified"])
        return Stored(found["ContentLength"], modified_ns, found["ETag"])

    def get(self, key: str, path: Path) -> None:
        with s3_errors(f"s3://{self.bucket}/{self.key(key)}"):
            path.parent.mkdir(parents=True, exist_ok=True)
            self.client.download_file(self.bucket, self.key(key), str(path))

    def get_changed(self, objects: Mapping[str, int], into: Path) -> None:
        """Download objects (key to size) that differ in size from the file that is there."""
        for key, path in paths_below(into, objects, self.uri).items():
            if not path.exists() or path.stat().st_size != objects[key]:
                self.get(key, path)

    def holds(self, key: str, size_bytes: int) -> bool:
        """Whether an object of this size is there. False also without the permission to see it."""
        from botocore.exceptions import ClientError

        with s3_errors(f"s3://{self.bucket}/{self.key(key)}"):
            try:
                found = self.client.head_object(Bucket=self.bucket, Key=self.key(key))
            except ClientError as error:
                if error.response["ResponseMetadata"]["HTTPStatusCode"] in (403, 404):
                    return False
                raise
        return bool(found["ContentLength"] == size_bytes)

    def put(self, path: Path, key: str, modified_ns: int | None = None) -> None:
        extra = {} if modified_ns is None else {"ExtraArgs": {"Metadata": {MODIFIED: str(modified_ns)}}}
        what = f"s3://{self.bucket}/{shown(self.key(key))}"
        with s3_errors(what), _key_errors(key):
            try:
                self.client.upload_file(str(path), self.bucket, self.key(key), **extra)
            except aws_errors():
                raise
            except OSError as error:
                # The file's own: botocore's timeouts, which are OSErrors too, say nothing about it.
                raise KeyRefused(f"{path}: {error.strerror or error}") from error

    def delete(self, key: str) -> None:
        with s3_errors(f"s3://{self.bucket}/{shown(self.key(key))}"), _key_errors(key):
            self.client.delete_object(Bucket=self.bucket, Key=self.key(key))

    def tidy(self, key: str) -> None:
        """An upload that was cut off leaves nothing that can be seen."""


@contextmanager
def _key_errors(key: str) -> Iterator[None]:
    try:
        yield
    except UnicodeError as error:
        raise KeyRefused(f"{shown(key)}: is not UTF-8, and S3 takes no other names; rename the file") from error


def _end_of_second_ns(moment: datetime.datetime) -> int:
    """S3 cuts times to the second; the object is no newer than the end of it."""
    return int(moment.timestamp()) * 10**9 + 999_999_999
