"""The sharded checkpoints that a job can use: those in its folder, and those on S3."""

from __future__ import annotations

import contextlib

from estiba.checkpoint import format as ckpt_format
from estiba.checkpoint.format import MANIFEST
from estiba.checkpoint.sharded import format as sharded
from estiba.errors import CheckpointError, StoreError
from estiba.log import get_logger
from estiba.storage import FileStore, Store

logger = get_logger(__name__)


class Catalogue:
    """A folder, and an S3 prefix that has the same checkpoints or more of them."""

    def __init__(self, folder: FileStore, remote: Store | None) -> None:
        self.folder = folder
        self.stores: list[Store] = [folder] if remote is None else [folder, remote]

    def names(self) -> list[str] | str:
        """Commit what is whole, and return the committed names, newest first; or why S3 cannot be listed."""
        names: set[str] = set()
        for store in self.stores:
            try:
                entries = store.list()
                for name in sharded.uncommitted(entries):
                    with contextlib.suppress(CheckpointError):
                        if sharded.commit_if_whole(store, name) is not None:
                            logger.info(f"{store.url_of(name)}: all parts are there; committed")
                            names.add(name)
                names |= set(sharded.committed(entries))
            except StoreError as error:
                if store is self.folder or not names:
                    return str(error)
                logger.warning(
                    f"{store.url}: cannot be listed ({error}); continuing from the checkpoints in {self.folder.root}"
                )
        return sorted(names, key=ckpt_format.sort_key, reverse=True)

    def revoke(self, name: str, token: str) -> None:
        """Revoke the commit of an attempt everywhere."""
        for store in self.stores:
            sharded.revoke(store, name, token)


def read_manifest(name: str, stores: list[Store]) -> bytes | str:
    """Return the manifest's bytes from the first store that has it, or what is wrong with it."""
    problem = "has no manifest"
    for store in stores:
        with contextlib.suppress(StoreError):
            if store.head(f"{name}/{MANIFEST}") is None:
                continue
            try:
                return sharded.read_manifest(store, name).to_bytes()
            except CheckpointError as error:
                problem = str(error)
    return problem
