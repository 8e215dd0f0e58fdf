"""Where a job writes, looked at before anything slow is begun."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import xxhash

from estiba.errors import ConfigError
from estiba.store import FileStore, open_store


def writable(folder: Path, flag: str) -> Path:
    """Find out now, not after an hour. Returns `folder`, made where it was not there; raises ConfigError."""
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


def checkpoint_places(path: str, upload: str | None) -> tuple[Path, str | None]:
    """The directory that checkpoints are written to, and the URL that they are copied to. Raises ConfigError.

    For `path` on S3 the directory is one of this machine's temporary ones, the same for every attempt here.
    """
    store = open_store(path)
    if isinstance(store, FileStore):
        return writable(store.root, "--checkpoint-path"), upload
    if upload is not None:
        raise ConfigError(f"--checkpoint-path {path} is on S3 already; leave --checkpoint-upload out")
    name = xxhash.xxh3_64_hexdigest(path.rstrip("/").encode())
    return Path(tempfile.gettempdir()) / f"estiba-checkpoints-{name}", path
