"""Unpacks untrusted archives: writes nothing outside the folder, and only files, folders and links."""

from __future__ import annotations

import gzip
import os
import shutil
import tarfile
import tempfile
import zlib
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from estiba_launch.errors import HostError
from estiba_launch.jobs.keys import is_below

MAX_RATIO = 100
"""Unpacked bytes per byte of the archive, above `ALWAYS_BYTES`. Weights and text stay below 10, gzip reaches 1,000."""
ALWAYS_BYTES = 256 << 20
MAX_MEMBERS = 1_000_000


class TooLarge(Exception):
    """The archive unpacks to more than its limit."""


class Bounded:
    """A tar stream that ends with TooLarge past its limit. tarfile itself reads a header of any size into memory."""

    def __init__(self, file: BinaryIO, limit: int, remedy: str) -> None:
        self._file, self._left, self._remedy = file, limit, remedy

    def read(self, size: int) -> bytes:
        data = self._file.read(size)
        self._left -= len(data)
        if self._left < 0:
            raise TooLarge(self._remedy)
        return data


def unpack(archive: Path, into: Path) -> int:
    """Unpack a tar into a folder; returns the number of files.

    Raises HostError, and leaves the folder as it was, for a member with an absolute path or `..`, a link that leads
    out, a device or FIFO, a truncated archive, or one that unpacks to far more than its size. Links within the
    folder stay links.
    """
    packed = archive.stat().st_size
    limit = max(ALWAYS_BYTES, MAX_RATIO * packed)
    remedy = (
        f"unpacks to more than {limit} bytes ({MAX_RATIO} times its {packed}, at least {ALWAYS_BYTES}) "
        f"or {MAX_MEMBERS} members; if you trust it, fetch it by itself and unpack it with tar"
    )
    into.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".unpack-", dir=into))
    links: list[tarfile.TarInfo] = []
    count = members = unpacked = 0
    try:
        with archive.open("rb") as raw:
            is_gzip = raw.peek(2)[:2] == b"\x1f\x8b"
            source = Bounded(gzip.GzipFile(fileobj=raw) if is_gzip else raw, limit, remedy)  # type: ignore[arg-type]
            # Read as a stream, so that nothing is read twice.
            with tarfile.open(fileobj=source, mode="r|", bufsize=1 << 20) as tar:  # type: ignore[call-overload]
                for member in tar:
                    # A sparse member is larger than its bytes in the archive.
                    members, unpacked = members + 1, unpacked + member.size
                    if unpacked > limit or members > MAX_MEMBERS:
                        raise TooLarge(remedy)
                    _extract(tar, member, scratch, archive)
                    count += not member.isdir()
                    if member.issym():
                        links.append(member)
                    tar.members = []
            # Read on to the checksum: tarfile mistakes damage for the end.
            while source.read(1 << 20):
                pass
        for link in links:
            # Where a link leads may depend on later links.
            if not is_below(scratch / link.name, scratch):
                raise HostError(f"{archive.name}: {link.name!r} is a link out of the folder; nothing was unpacked")
        _move(scratch, into)
    except TooLarge as error:
        raise HostError(f"{archive.name}: {error}; nothing was unpacked") from None
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise HostError(f"{archive.name}: cannot be unpacked ({error}); fetch it again") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return count


def _extract(tar: tarfile.TarFile, member: tarfile.TarInfo, scratch: Path, archive: Path) -> None:
    refuse(member, archive)
    member.uid = member.gid = os.getuid()
    member.uname = member.gname = ""
    member.mode = (member.mode & 0o755) | (0o700 if member.isdir() else 0o600)
    place = scratch / member.name
    # A link made by an earlier member must not carry this one out.
    if not is_below(place.parent, scratch) or (member.islnk() and not is_below(scratch / member.linkname, scratch)):
        raise HostError(f"{archive.name}: {member.name!r} goes through a link out of the folder; not unpacked")
    if member.isdir() and place.is_symlink():
        raise HostError(f"{archive.name}: {member.name!r} replaces a link; not unpacked")
    if not member.isdir() and (place.is_symlink() or place.is_file()):
        # Do not write through it: the old file may be a link to another.
        place.unlink()
    # `refuse` has checked the member. Python before 3.11.4, as in Debian 12, has no filter.
    trusted = {"filter": "fully_trusted"} if hasattr(tarfile, "fully_trusted_filter") else {}
    tar.extract(member, scratch, set_attrs=not member.issym(), **trusted)  # type: ignore[arg-type]


def refuse(member: tarfile.TarInfo, archive: Path) -> None:
    """Raise HostError for a member that must not be unpacked."""
    path = PurePosixPath(member.name)
    why = None
    if path.is_absolute() or ".." in path.parts:
        why = "leads out of the folder"
    elif not (member.isfile() or member.isdir() or member.issym() or member.islnk()):
        why = "is a device or FIFO"
    elif member.issym() or member.islnk():
        start = path.parent if member.issym() else PurePosixPath()
        target = PurePosixPath(os.path.normpath(start / member.linkname))
        if PurePosixPath(member.linkname).is_absolute() or target.parts[:1] == ("..",):
            why = f"is a link out of the folder ({member.linkname})"
    if why:
        raise HostError(f"{archive.name}: {member.name!r} {why}; nothing was unpacked")


def _move(source: Path, into: Path) -> None:
    """Move everything into a folder that may hold some of it from an earlier call."""
    for entry in sorted(os.scandir(source), key=lambda entry: entry.name):
        place = into / entry.name
        if entry.is_dir(follow_symlinks=False) and place.is_dir() and not place.is_symlink():
            _move(Path(entry.path), place)
            continue
        if place.is_dir() and not place.is_symlink():
            shutil.rmtree(place)
        os.replace(entry.path, place)
