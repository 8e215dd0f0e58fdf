"""Input files, and their lines in chunks."""

from __future__ import annotations

import io
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from estiba.errors import ConfigError
from estiba.platform.contract import Job
from estiba.storage import Entry, Store, open_store


def require_input(location: str) -> None:
    """Raise ConfigError if `location` is a local path that does not exist."""
    if "://" not in location and not Path(location).exists():
        raise _no_input(location)


def list_files(input_path: str, job: Job) -> tuple[Store, list[Entry]]:
    """The input, and this host's share of its files. Raises ConfigError if there are none at all."""
    source = open_store(input_path)
    files = [entry for entry in source.list() if not entry.path.rpartition("/")[2].startswith((".", "_"))]
    if not files:
        raise _no_input(input_path)
    channel = job.channel_of(Path(input_path))
    if channel is None or not channel.is_sharded:  # every host sees all files
        files = files[job.host_index :: job.host_count]
    return source, files


def chunks_of(source: Store, file: Entry, lines: int) -> Iterator[list[str]]:
    """The lines of a file, `lines` at a time. Memory does not grow with the file."""
    with source.open(file.path, file.size_bytes) as opened:
        text = io.TextIOWrapper(opened, encoding="utf-8", errors="replace")
        while chunk := list(islice(text, lines)):
            yield chunk


def _no_input(location: str) -> ConfigError:
    return ConfigError(
        f"{location}: no input files; mount a directory of text files on it "
        "(-v DIR:/opt/ml/input/data/dataset), name the channel `dataset`, or pass --input-path"
    )
