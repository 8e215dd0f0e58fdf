"""Input channels of one host: which objects it gets, and the directory that is mounted for them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from estiba_launch.errors import HostError, disk_error
from estiba_launch.jobs.inputs import files, objects
from estiba_launch.jobs.keys import paths_below
from estiba_launch.jobs.links import stays_inside
from estiba_launch.jobs.s3 import S3Store
from estiba_launch.request.contract import ChannelSource, Host, file_path
from estiba_launch.targets.docker_command import Mount


def place(channel: ChannelSource, host: Host, cluster: list[Host], root: Path, *, copy: bool) -> Mount:
    """Fetch the channel's files for `host` below `root`, unless they can be mounted in place.

    File mode is read-only too, unless `copy` gives each host its own writable files, as SageMaker does.
    Raises HostError.
    """
    target = f"/opt/ml/input/data/{channel.name}"
    own = copy and channel.mode == "File"
    path = own_folder(channel)
    if path is not None and path.is_dir() and not channel.sharded and not own:
        return Mount(source=path, target=target, read_only=True)
    keys = list(objects(channel))
    if channel.sharded:
        peers = [peer for peer in cluster if not channel.groups or peer.group in channel.groups]
        keys = sorted(keys)[peers.index(host) :: len(peers)]
    separate = own or channel.sharded
    folder = root / (host.name if separate else "all") / channel.name
    if own and folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        _fetch(channel, keys, folder, link=not own)
    except OSError as error:
        raise HostError(f"channel {channel.name} at {folder}: {disk_error(error)}") from error
    return Mount(source=folder, target=target, read_only=not own)


def own_folder(channel: ChannelSource) -> Path | None:
    """The folder of this machine that holds the channel, and nothing else, as the container may see it.

    None for a file, a name prefix, a folder with links out of it, and an address on S3.
    """
    path = file_path(channel.uri)
    if not channel.uri.startswith("file://") or path.is_file() or (path.is_dir() and not stays_inside(path)):
        return None
    is_prefix = not path.exists() and any(one.name.startswith(path.name) for one in path.parent.glob("*"))
    return None if is_prefix else path


def _fetch(channel: ChannelSource, keys: list[str], folder: Path, *, link: bool) -> None:
    if channel.uri.startswith("s3://"):
        store, sizes = S3Store(channel.uri).matching()
        # A restart finds the previous attempt's files. A different size means a changed object.
        store.get_changed({key: sizes[key] for key in keys}, folder)
        return
    found = files(channel)
    for key, path in paths_below(folder, keys, channel.uri).items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        if link:
            try:
                os.link(found[key].path, path)
                continue
            except OSError:
                # Another file system, or links are not allowed: copy.
                pass
        shutil.copy2(found[key].path, path)


def mounted(channel: ChannelSource, host: Host, root: Path) -> Path:
    """The directory that `place` mounted for the channel."""
    places = [root / name / channel.name for name in (host.name, "all")]
    return next((path for path in places if path.is_dir()), file_path(channel.uri))
