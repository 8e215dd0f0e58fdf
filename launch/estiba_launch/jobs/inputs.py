"""What the input channels of a job hold, wherever the data is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from estiba_launch.errors import EXIT_INVALID, HostError, LaunchError
from estiba_launch.jobs.artifacts import refuse_unwritable
from estiba_launch.jobs.keys import paths_below
from estiba_launch.jobs.links import Found, follow
from estiba_launch.jobs.s3 import S3Store, disk_errors
from estiba_launch.request.contract import ChannelSource, channels, file_path

SHOWN = 3
"""Broken links that a message names."""


class BrokenLinks(HostError):
    """Links in the data lead nowhere, or in a circle."""

    exit_code = EXIT_INVALID


def local_problems(request: Mapping[str, Any], *, runs_here: bool) -> Iterator[LaunchError]:
    """What is wrong with the folders of this machine that a job, here or elsewhere, reads and writes."""
    try:
        refuse_unwritable(request, runs_here=runs_here)
    except LaunchError as error:
        yield error
    for channel in channels(request):
        if channel.uri.startswith("file://"):
            try:
                check(channel)
            except LaunchError as error:
                yield error


def check(channel: ChannelSource) -> None:
    """Raise LaunchError when the channel is empty, HostError when its files cannot be given to a host."""
    found = objects(channel)
    if not found:
        raise LaunchError(
            f"channel {channel.name}: nothing at {channel.uri}; put the data there or correct InputDataConfig"
        )
    paths_below(Path("/"), found, channel.uri)


def objects(channel: ChannelSource) -> dict[str, int]:
    """Key and size of everything that the address names: a directory, a file, or every key that starts with it."""
    if channel.uri.startswith("s3://"):
        return S3Store(channel.uri).matching()[1]
    return {key: one.size_bytes for key, one in files(channel).items()}


def files(channel: ChannelSource) -> dict[str, Found]:
    """The files of a file:// channel, links followed wherever they lead. Raises BrokenLinks naming the first."""
    path = file_path(channel.uri)
    broken: list[str] = []
    with disk_errors(channel.uri):
        if path.is_dir():
            found = {one.key: one for one in follow(path, broken.append)}
        elif path.is_file():
            found = {path.name: Found(path.name, path.resolve(), path.stat().st_size)}
        elif path.parent.is_dir() and path.name:
            found = {one.key: one for one in follow(path.parent, broken.append, starts=path.name)}
        else:
            found = {}
    if broken:
        more = f" and {len(broken) - SHOWN} more" if len(broken) > SHOWN else ""
        remedy = "remove such links, or put there what they lead to"
        raise BrokenLinks(f"channel {channel.name}: {channel.uri}: {'; '.join(broken[:SHOWN])}{more}; {remedy}")
    return found
