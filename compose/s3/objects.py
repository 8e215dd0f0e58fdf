"""Copy a folder to or from S3.

    python objects.py put /input s3://estiba/demo/input       # creates the bucket; skips unchanged objects
    python objects.py get s3://estiba/demo/output /output

Endpoint and credentials come from the standard AWS variables. Exit status 0, or 1 with the reason.
"""

from __future__ import annotations

import contextlib
import hashlib
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError


class CopyError(Exception):
    """The copy cannot be made; the message says why."""


def connect() -> Any:
    """A client with path-style addresses: a compose service has no host name per bucket."""
    return boto3.client("s3", config=Config(s3={"addressing_style": "path"}, retries={"total_max_attempts": 5}))


def split(url: str) -> tuple[str, str]:
    """'s3://bucket/a/b' -> ('bucket', 'a/b')."""
    parts = urlsplit(url)
    if parts.scheme != "s3" or not parts.netloc:
        raise CopyError(f"{url!r} is not an s3://BUCKET/PREFIX")
    return parts.netloc, parts.path.strip("/")


def objects(client: Any, bucket: str, prefix: str) -> dict[str, dict[str, Any]]:
    """Every object below a prefix, by its path relative to it."""
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=f"{prefix}/")
    return {item["Key"][len(prefix) + 1 :]: item for page in pages for item in page.get("Contents", [])}


def put(client: Any, folder: Path, url: str) -> str:
    """Upload new and changed files. Returns a summary."""
    bucket, prefix = split(url)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    if not files:
        raise CopyError(f"{folder} holds no files")
    # Some servers, and S3 itself outside us-east-1, raise this if the caller already owns the bucket.
    with contextlib.suppress(client.exceptions.BucketAlreadyOwnedByYou):
        client.create_bucket(Bucket=bucket)
    existing = objects(client, bucket, prefix)
    sent = 0
    for path in files:
        name = path.relative_to(folder).as_posix()
        body = path.read_bytes()
        etag = f'"{hashlib.md5(body, usedforsecurity=False).hexdigest()}"'
        if existing.get(name, {}).get("ETag") != etag:
            client.put_object(Bucket=bucket, Key=f"{prefix}/{name}", Body=body)
            sent += 1
    return f"{len(files)} files in {url}, {sent} uploaded now"


def get(client: Any, url: str, folder: Path) -> str:
    """Download everything below `url`, each file whole or not at all. Returns a summary."""
    bucket, prefix = split(url)
    downloads = objects(client, bucket, prefix)
    if not downloads:
        raise CopyError(f"{url} is empty")
    for name in downloads:
        target = folder / name
        if not target.resolve().is_relative_to(folder.resolve()):
            raise CopyError(f"{url}/{name} would be written outside {folder}")
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.partial")
        client.download_file(bucket, f"{prefix}/{name}", str(partial))
        partial.replace(target)
    return f"{len(downloads)} files from {url} in {folder}"


def main(arguments: list[str]) -> int:
    """Command line; exit status 0 done, 1 failed, 2 wrong usage."""
    if len(arguments) != 3 or arguments[0] not in ("put", "get"):
        print(__doc__, file=sys.stderr)
        return 2
    verb, source, target = arguments
    try:
        client = connect()
        done = put(client, Path(source), target) if verb == "put" else get(client, source, Path(target))
    except (CopyError, BotoCoreError, ClientError, OSError) as error:
        print(f"{verb}: {error}", file=sys.stderr)
        return 1
    print(f"{verb}: {done}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
