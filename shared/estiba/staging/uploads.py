"""From local files to S3: results, checkpoints, a model's directory. Verified, resumable, in parallel."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from estiba.errors import ConfigError, StoreError
from estiba.log import format_fields, get_logger
from estiba.storage import TEMPORARY_SUFFIX, FileStore, open_store
from estiba.storage.s3 import S3ObjectStore

logger = get_logger(__name__)

FILES_IN_FLIGHT = 4
PARTS_IN_FLIGHT = 8
"""Of one file. Together 32 parts of 16 MiB are in memory at most."""
MARKERS = (".sagemaker-uploading", ".sagemaker-uploaded")
"""SageMaker writes these beside checkpoints; they are no data."""


@dataclass(frozen=True, kw_only=True)
class UploadResult:
    files: int
    size_bytes: int
    sent_bytes: int
    """Less than `size_bytes` if some of it was there already."""
    seconds: float


def upload(source: str | os.PathLike[str], url: str, *, last: Iterable[str] = ()) -> UploadResult:
    """Copy a file, or everything below a directory, to an s3:// URL. Returns what was done.

    Files that are there already with the right checksum are not sent again, and an unfinished upload is continued. The
    files named in `last` appear after all others. Raises ConfigError, StoreError.
    """
    started = time.monotonic()
    store = open_store(url)
    if not isinstance(store, S3ObjectStore):
        raise ConfigError(f"{url}: is not on S3; the target of an upload is s3://BUCKET/PREFIX")
    files = _files(Path(source))
    if not files:
        raise ConfigError(f"{source}: nothing there to upload; check the path")
    names_last = set(last)
    early = [(path, name) for path, name in files if name not in names_last]
    late = [(path, name) for path, name in files if name in names_last]

    def send(item: tuple[Path, str]) -> int:
        path, name = item
        try:
            if store.is_uploaded(name, path):
                return 0
            return store.upload(name, path, resume=True, in_flight=PARTS_IN_FLIGHT)
        except OSError as error:
            raise StoreError(f"{path}: {error.strerror or error}; nothing was published under {name}") from None

    with ThreadPoolExecutor(FILES_IN_FLIGHT) as pool:
        try:
            sent = list(pool.map(send, early))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    sent += map(send, late)
    sizes = [path.stat().st_size for path, _ in files]
    return report(store.url, files=len(files), size_bytes=sum(sizes), sent_bytes=sum(sent), started=started)


def report(url: str, *, files: int, size_bytes: int, sent_bytes: int, started: float) -> UploadResult:
    """Log what was uploaded, and return it."""
    seconds = time.monotonic() - started
    result = UploadResult(files=files, size_bytes=size_bytes, sent_bytes=sent_bytes, seconds=seconds)
    counts = {
        "files": result.files,
        "gb": round(result.size_bytes / 1e9, 3),
        "sent_gb": round(result.sent_bytes / 1e9, 3),
        "seconds": round(result.seconds, 1),
    }
    logger.info("uploaded to %s: %s", url, format_fields(counts))
    return result


def _files(source: Path) -> list[tuple[Path, str]]:
    """Return the files to upload with their names below the target."""
    if source.is_file():
        return [(source, source.name)]
    entries = FileStore(source).list() if source.is_dir() else []
    return [
        (source / entry.path, entry.path) for entry in entries if not entry.path.endswith((TEMPORARY_SUFFIX, *MARKERS))
    ]
