"""`stage()`: from a source and a directory to verified files."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from estiba.errors import ConfigError
from estiba.log import format_fields, get_logger
from estiba.platform.contract import Job
from estiba.staging.cache import cache_directory, link_files
from estiba.staging.files import StagedFiles, disk_error
from estiba.staging.ledger import Ledger
from estiba.staging.pieces import PIECE_BYTES
from estiba.staging.session import Group, Session
from estiba.staging.source import Source

logger = get_logger(__name__)

PORT = 7799


@dataclass(frozen=True, kw_only=True)
class StageResult:
    """What one host did."""

    folder: Path
    files: int
    size_bytes: int
    source_bytes: int
    """Read from the source by this host."""
    peer_bytes: int
    """Got from other hosts."""
    seconds: float


def stage(
    source: str,
    folder: str | os.PathLike[str],
    *,
    job: Job | None = None,
    alone: bool = False,
    use_cache: bool = True,
    connections: int | None = None,
    piece_bytes: int = PIECE_BYTES,
) -> StageResult:
    """Copy the objects below `source`, an s3:// URL, into `folder`, together with the other hosts of `job`.

    `job` is the present one by default. With `alone` this host reads everything itself. Where the instance is of a
    warm pool, its cache is used (`cache.py`) unless `use_cache` is false. `connections` to S3 are 8 to 128 by
    default, by cores and size. `piece_bytes` must be equal on all hosts. Raises ConfigError, StoreError.
    """
    started = time.monotonic()
    objects = Source(source, piece_bytes)
    target = Path(os.path.abspath(folder))
    if objects.is_object and not (os.fspath(folder).endswith("/") or target.is_dir()):
        raise ConfigError(
            f"{source} is one object and {folder} is no directory; write {folder}/ to stage it into that directory"
        )
    group = Group() if alone else group_of(job or Job.read())
    cached = cache_directory(objects.table, target) if use_cache else None
    with _locked(target), _locked(cached) if cached else contextlib.nullcontext():
        files = StagedFiles(objects.table, cached or target)
        ledger = Ledger(objects.table, cached or target)
        ledger.load(files)
        try:
            files.open(ledger.published)
            ledger.start()
            share = len(objects.table.pieces) // len(group.hosts)
            session = Session(objects, files, ledger, group, connections or default_connections(share))
            session.run(publish=files.publish)
            ledger.finish(files)
            if cached:
                link_files(objects.table, cached, target)
        finally:
            ledger.close()
            files.close()
    result = StageResult(
        folder=target,
        files=len(objects.table.files),
        size_bytes=objects.table.size_bytes,
        source_bytes=session.source_bytes,
        peer_bytes=session.peer_bytes,
        seconds=time.monotonic() - started,
    )
    counts = {
        "files": result.files,
        "gb": round(result.size_bytes / 1e9, 3),
        "from_source_gb": round(result.source_bytes / 1e9, 3),
        "from_hosts_gb": round(result.peer_bytes / 1e9, 3),
        "seconds": round(result.seconds, 1),
    }
    logger.info("staged %s: %s", target, format_fields(counts))
    return result


def group_of(job: Job, environ: os._Environ[str] = os.environ) -> Group:
    """Return the hosts that stage together. Raises ConfigError."""
    text = environ.get("ESTIBA_STAGING_PORT") or str(PORT)
    if not text.isdigit() or not 0 < int(text) < 65536:
        raise ConfigError(f"environment variable ESTIBA_STAGING_PORT is {text!r}: must be a port, such as {PORT}")
    if job.host_count > 1 and not job.cluster.are_names_reachable:
        logger.warning(
            "staging: %s does not tell how hosts reach each other; each reads everything", job.cluster.source
        )
        return Group()
    return Group(
        hosts=job.hosts,
        me=job.host_index,
        port=int(text),
        job=job.name or "",
        token=environ.get("ESTIBA_STAGING_TOKEN", ""),
    )


def default_connections(pieces: int) -> int:
    """Return the connections to S3 for a host that reads so many pieces.

    A connection carries some 90 MB/s, and a large instance's network a hundred times that. A small share gets fewer, so
    that no large part of it is on its way when a host dies.
    """
    most = min(128, max(32, 2 * (os.cpu_count() or 1)))
    return max(8, min(most, pieces // 4))


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the directory for this process. The processes of one host take turns: the second finds it done."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise disk_error(folder, error) from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("staging: another process stages into %s; waiting for it", folder)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(descriptor)
