"""The directories and S3 prefixes that a job writes to, checked before anything slow starts."""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import xxhash

from estiba.errors import CheckpointError, ConfigError, StoreError
from estiba.log import get_logger
from estiba.storage import FileStore, Store, open_store

logger = get_logger(__name__)

LOCK_TIMEOUT_S = 3.0
"""A job killed while it starts a process leaves a forked child that holds its locks until it has called exec."""
WRITE_CHECK = ".estiba-write-check"
ORIGIN = ".estiba-origin"
"""At an S3 prefix and in its copy on this host: the same random number. Otherwise the copy is of another history."""


def writable(folder: Path, flag: str) -> Path:
    """Create `folder` if it is missing and check that it is writable. Returns it. Raises ConfigError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(
            f"{folder}: cannot be written ({error.strerror}) by user {os.getuid()}; mount a directory that this user "
            f"may write, or pass another {flag}"
        ) from None
    return folder


def check_writable_url(url: str, flag: str) -> None:
    """Write an empty object below an S3 URL and delete it. Raises ConfigError; in seconds if nothing answers."""
    store = open_store(url)
    if isinstance(store, FileStore):
        return
    logger.info(f"{url}: checking that it can be written")
    try:
        store.answers()
        store.write(WRITE_CHECK, b"")
    except StoreError as error:
        raise ConfigError(f"{flag} {url}: cannot be written: {error}") from None
    with contextlib.suppress(StoreError):  # a role that may only write
        store.delete(WRITE_CHECK)


@contextlib.contextmanager
def only_job_in(folder: Path, flag: str) -> Iterator[None]:
    """Lock an output directory for this process. Raises CheckpointError if another one on this host holds it.

    The directory itself is locked, so that no file is left in it.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        held = f"{folder}: another job is writing its outputs there; wait for it, or give this one another {flag}"
        lock(descriptor, timeout_s=LOCK_TIMEOUT_S, held=held)
        yield
    finally:
        os.close(descriptor)


def lock(descriptor: int, *, timeout_s: float, held: str) -> None:
    """Lock a file or a directory, where the file system has locks.

    Raises CheckpointError with the message `held` if another process still holds it after `timeout_s`.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise CheckpointError(held) from None
        except OSError:
            return
        time.sleep(0.05)


def local_output(url: str, flag: str) -> Path:
    """Return the local directory for outputs: `url` itself, or for S3 a temporary directory that the caller uploads.

    Raises ConfigError if it cannot be written.
    """
    store = open_store(url)
    if isinstance(store, FileStore):
        return writable(store.root, flag)
    if int(os.environ.get("RANK", "0")) == 0:
        check_writable_url(url, flag)
    return writable(Path(tempfile.mkdtemp(prefix="estiba-")), flag)


def upload_output(folder: Path, url: str) -> None:
    """Copy what `local_output` collected to `url` if that is on S3, results.json last. Raises StoreError."""
    if not isinstance(open_store(url), FileStore) and any(folder.iterdir()):
        from estiba.staging import upload  # boto3 takes a moment to import

        upload(folder, url, last=["results.json"])


def checkpoint_locations(path: str, upload: str | None) -> tuple[Path, str | None]:
    """Return the local checkpoint directory, and the URL to copy checkpoints to. Raises ConfigError.

    If `path` is on S3, the directory is a temporary one on this host, the same for every attempt.
    """
    store = open_store(path)
    if isinstance(store, FileStore):
        return writable(store.root, "--checkpoint-path"), upload
    if upload is not None:
        raise ConfigError(f"--checkpoint-path {path} is on S3 already; leave --checkpoint-upload out")
    name = xxhash.xxh3_64_hexdigest(path.rstrip("/").encode())
    return Path(tempfile.gettempdir()) / f"estiba-checkpoints-{name}", path


def match_local_copy(folder: Path, url: str) -> None:
    """Move this host's copy of an S3 checkpoint prefix away unless it is a copy of what is there now.

    After the prefix was deleted, a run must start anew, not from the copy. Raises ConfigError, StoreError.
    """
    check_writable_url(url, "--checkpoint-path")
    store: Store = open_store(url)
    there = store.read(ORIGIN).decode() if store.head(ORIGIN) is not None else None
    here = (folder / ORIGIN).read_text() if (folder / ORIGIN).exists() else None
    if here is not None and here != there:
        old = folder.with_name(f"{folder.name}-{here}")
        folder.rename(old)
        logger.warning(f"{url} is not what {folder} is a copy of; the copy was moved to {old}. Delete it to free space")
    if there is None:
        there = uuid.uuid4().hex
        store.write(ORIGIN, there.encode())
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ORIGIN).write_text(there)
