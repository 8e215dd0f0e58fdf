"""Unpacking what came from elsewhere: nothing is written outside the folder, and nothing but files is made."""

from __future__ import annotations

import os
import shutil
import tarfile
import tempfile
from pathlib import Path, PurePosixPath

from ..errors import HostError


def unpack(archive: Path, into: Path) -> int:
    """Unpack a tar into a folder; returns the number of files.

    Raises HostError, and leaves the folder as it was, for a member with an absolute path or `..`, a link that leads
    out, a device or FIFO, or an archive that is cut short. Links within stay links.
    """
    into.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".unpack-", dir=into))
    count = 0
    try:
        with tarfile.open(archive, "r:*") as tar:
            for member in tar:
                refuse(member, archive)
                member.uid = member.gid = os.getuid()
                member.uname = member.gname = ""
                member.mode = (member.mode & 0o755) | (0o700 if member.isdir() else 0o600)
                place = scratch / member.name
                # A link made by an earlier member must not carry this one out.
                if not place.parent.resolve().is_relative_to(scratch.resolve()):
                    raise HostError(
                        f"{archive.name}: {member.name!r} goes through a link out of the folder; not unpacked"
                    )
                if member.isdir() and place.is_symlink():
                    raise HostError(f"{archive.name}: {member.name!r} replaces a link; not unpacked")
                tar.extract(member, scratch, set_attrs=not member.issym(), filter="fully_trusted")
                count += not member.isdir()
        _move(scratch, into)
    except (tarfile.TarError, EOFError, OSError) as error:
        raise HostError(f"{archive.name}: cannot be unpacked ({error}); fetch it again") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return count


def refuse(member: tarfile.TarInfo, archive: Path) -> None:
    """Raise HostError for a member that must not be made."""
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
    """Move everything into a folder that may have some of it from an earlier time."""
    for entry in sorted(os.scandir(source), key=lambda entry: entry.name):
        place = into / entry.name
        if entry.is_dir(follow_symlinks=False) and place.is_dir() and not place.is_symlink():
            _move(Path(entry.path), place)
            continue
        if place.is_dir() and not place.is_symlink():
            shutil.rmtree(place)
        os.replace(entry.path, place)
