"""Input channels of one host: which objects it gets, and the directory that is mounted for them."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from ..contract import ChannelSource, Host, file_path
from ..errors import HostError
from .store import S3Store, walk


@dataclass(frozen=True, kw_only=True)
class Mount:
    """A directory of this machine inside the container."""

    source: Path
    target: str
    read_only: bool


def check(channel: ChannelSource) -> None:
    """Raise HostError when the channel has nothing to give; looked at before anything starts."""
    if not objects(channel):
        raise HostError(
            f"channel {channel.name}: nothing at {channel.uri}; put the data there or correct InputDataConfig"
        )


def objects(channel: ChannelSource) -> dict[str, int]:
    """Key to size of everything the address names: a directory, a file, or every key that starts like it."""
    if channel.uri.startswith("s3://"):
        store = S3Store(channel.uri)
        inside = store.list()
        return inside or store.list_prefix()
    path = file_path(channel.uri)
    if path.is_dir():
        return {key: stat.st_size for key, stat in walk(path)}
    if path.is_file():
        return {path.name: path.stat().st_size}
    return {key: stat.st_size for key, stat in walk(path.parent) if key.startswith(path.name)} if path.name else {}


def share(keys: list[str], index: int, count: int) -> list[str]:
    """Host `index`'s part of sorted keys, about 1/count of them (ShardedByS3Key)."""
    return sorted(keys)[index::count]


def place(channel: ChannelSource, host: Host, cluster: list[Host], root: Path, *, copy: bool) -> Mount:
    """Have the channel's files for `host` somewhere below `root`, or where they are, and say what to mount.

    File mode is read-only too unless `copy` gives each host its own writable files, as SageMaker does.
    Raises HostError.
    """
    target = f"/opt/ml/input/data/{channel.name}"
    own = copy and channel.mode == "File"
    peers = [peer for peer in cluster if not channel.groups or peer.group in channel.groups]
    local = channel.uri.startswith("file://")
    path = file_path(channel.uri) if local else None
    if path is not None and path.is_dir() and not channel.sharded and not own:
        return Mount(source=path, target=target, read_only=True)
    keys = list(objects(channel))
    if channel.sharded:
        keys = share(keys, peers.index(host), len(peers))
    separate = own or channel.sharded
    place_at = root / (host.name if separate else "all") / channel.name
    if own and place_at.exists():
        shutil.rmtree(place_at)
    place_at.mkdir(parents=True, exist_ok=True)
    try:
        _bring(channel, keys, place_at, link=not own)
    except OSError as error:
        raise HostError(f"channel {channel.name}: {error.strerror or error} at {place_at}; make room there") from error
    return Mount(source=place_at, target=target, read_only=not own)


def _bring(channel: ChannelSource, keys: list[str], place_at: Path, *, link: bool) -> None:
    if channel.uri.startswith("s3://"):
        store = S3Store(channel.uri)
        sizes = store.list()
        if not sizes and store.prefix:
            store.prefix = store.prefix.rpartition("/")[0]
            sizes = store.list()
        for key in keys:
            path = place_at / key
            # A restart finds the files of the attempt before; a size that differs means an object that changed.
            if not path.exists() or path.stat().st_size != sizes[key]:
                store.get(key, path)
        return
    source = file_path(channel.uri)
    base = source if source.is_dir() else source.parent
    for key in keys:
        path = place_at / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        if link:
            try:
                os.link(base / key, path)
                continue
            except OSError:
                # Another file system, or links are not allowed: copy.
                pass
        shutil.copy2(base / key, path)
