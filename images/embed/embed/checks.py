"""What can be checked before the model is loaded: the environment, the job's locations, and whether they answer."""

from __future__ import annotations

import contextlib
import os
import re
from itertools import combinations
from pathlib import Path

from embed.config import EmbedConfig
from estiba.errors import ConfigError, StoreError
from estiba.paths import writable
from estiba.platform.stop import seconds
from estiba.prices import price_of
from estiba.storage import FileStore, Store, open_store


def check_environment() -> None:
    """Raise ConfigError if a variable of the job layer cannot be used; it would be read only after the model."""
    for name in ("ESTIBA_LOG_INTERVAL_S", "ESTIBA_STOP_GRACE_S", "ESTIBA_MAX_RUNTIME_S"):
        seconds(os.environ, name)
    name = "ESTIBA_PRICE_USD_PER_H"
    value = os.environ.get(name, "").strip()
    if value and not ((price := price_of("any")) is not None and 0 <= price.usd_per_h < float("inf")):
        raise ConfigError(f"environment variable {name} is {value!r}: must be a number of dollars, such as 0.526")


def locations_of(config: EmbedConfig) -> dict[str, str]:
    locations = {"--input-path": config.input_path, "--output-path": config.output_path}
    if not config.no_checkpoint:
        locations["--checkpoint-path"] = config.checkpoint_path
    if config.reuse is not None:
        locations["--reuse"] = config.reuse
    return locations


def check_locations(config: EmbedConfig) -> None:
    """Raise ConfigError if one of the job's locations contains another, so that it would read what it writes."""
    for (flag, first), (other_flag, second) in combinations(locations_of(config).items(), 2):
        a, b = _comparable(first), _comparable(second)
        if _contains(a, b) or _contains(b, a):
            raise ConfigError(f"{flag} {first} and {other_flag} {second} overlap; give each a separate location")


def _comparable(location: str) -> str | Path:
    """An S3 address as its bucket and prefix, or the real path of a local one, whatever links lead to it."""
    if location.startswith("s3://"):
        bucket, _, prefix = location.removeprefix("s3://").partition("/")
        return f"{bucket}/{prefix.strip('/')}".rstrip("/")
    store = open_store(location)
    return Path(os.path.realpath(store.root)) if isinstance(store, FileStore) else store.url


def _contains(folder: str | Path, other: str | Path) -> bool:
    if isinstance(folder, Path) and isinstance(other, Path):
        inode = _inode(folder)  # one directory that is mounted at two places has two paths
        return any(path == folder or (inode and inode == _inode(path)) for path in (other, *other.parents))
    if isinstance(folder, Path) or isinstance(other, Path):
        return False
    return folder == other or other.startswith(f"{folder}/")


def _inode(path: Path) -> tuple[int, int] | None:
    with contextlib.suppress(OSError):
        found = path.stat()
        return (found.st_dev, found.st_ino) if found.st_ino else None
    return None


def check_buckets(config: EmbedConfig) -> None:
    """Raise ConfigError if a bucket does not exist or there are no credentials for it."""
    for flag, location in {**locations_of(config), "--model": config.model}.items():
        if location.startswith("s3://"):
            answering(flag, location)


def answering(flag: str, location: str) -> None:
    """Send the first request. A bucket or credentials that do not exist are the configuration's fault."""
    try:
        open_store(location).list(".estiba")  # a HEAD request does not tell a missing bucket from a missing object
    except StoreError as error:
        text = str(error)
        if re.search(r"NoSuchBucket|credentials|InvalidAccessKeyId|AWS_PROFILE", text):
            bucket = location.partition("://")[2].partition("/")[0]
            raise ConfigError(f"{flag} {location}: bucket {bucket!r} cannot be used: {text}") from error
        raise


def check_writable(store: Store, flag: str) -> None:
    """Raise ConfigError now rather than after an hour. S3 is not probed, since that needs permission to delete."""
    if isinstance(store, FileStore):
        part = next((each for each in (store.root, *store.root.parents) if each.exists()), Path("/"))
        if not part.is_dir():
            raise ConfigError(f"{flag} {store.root}: {part} is a file, and a directory is needed; name another one")
        writable(store.root, flag)
