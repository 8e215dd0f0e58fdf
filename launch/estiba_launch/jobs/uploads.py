"""Sending what a job needs to S3 before it starts."""

from __future__ import annotations

from collections.abc import Callable

from estiba_launch.errors import LaunchError
from estiba_launch.jobs.s3 import S3Store
from estiba_launch.request.jobfile import Upload
from estiba_launch.request.uploads import stamp_of


def send(upload: Upload, report: Callable[[str], None]) -> None:
    """Upload one file, unless its content is there. Raises HostError, LaunchError when the file changes meanwhile."""
    store, name = S3Store(upload.address), upload.file.name
    if upload.stamp is None:
        return store.put(upload.file, name)
    size_bytes = upload.stamp[0]
    if store.holds(name, size_bytes):
        return report(f"{upload.address}/{name}: already there")
    report(f"{upload.file}: uploading {size_bytes / 1e6:,.1f} MB to {upload.address}/{name}")
    store.put(upload.file, name)
    if stamp_of(upload.file) != upload.stamp:
        store.delete(name)
        raise LaunchError(f"{upload.file}: was changed while it was uploaded; start the job again")
    return None
