"""The tokenizer and the tokenized text beside checkpoints on S3, for a new host.

Their names contain digests, so that a copy is used only if its bytes are what was uploaded.
"""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from estiba.log import get_logger
from estiba.storage import TEMPORARY_SUFFIX, Entry, FileStore, open_store

logger = get_logger(__name__)

COPIES = 8
"""Files that are copied at a time."""


class Mirror:
    """What is at an S3 prefix and in a local folder. Without a prefix it does nothing."""

    def __init__(self, folder: Path, url: str | None) -> None:
        self._here = FileStore(folder)
        self._there = None if url is None else open_store(url)

    def fetch(self) -> None:
        """Download what is not here. Raises StoreError."""
        there = self._there
        if there is None:
            return
        here = {entry.path for entry in self._here.list()}
        missing = [entry for entry in there.list() if _is_kept(entry.path) and entry.path not in here]

        def copy(entry: Entry) -> None:
            with there.open(entry.path, entry.size_bytes) as source, self._here.writer(entry.path) as target:
                shutil.copyfileobj(source, target, 2**24)

        with ThreadPoolExecutor(COPIES) as pool:
            list(pool.map(copy, missing))
        if missing:
            logger.info(f"{there.url}: {len(missing)} files of tokens and tokenizers restored")

    def send(self) -> None:
        """Upload what is not there. Raises StoreError."""
        there = self._there
        if there is None:
            return
        done = {entry.path for entry in there.list()}
        paths = [entry.path for entry in self._here.list() if _is_kept(entry.path) and entry.path not in done]
        with ThreadPoolExecutor(COPIES) as pool:
            list(pool.map(lambda path: there.put_file(path, self._here.path_of(path)), paths))


def _is_kept(path: str) -> bool:
    folder, _, name = path.rpartition("/")
    is_ours = folder.startswith(("tokenizer-", "tokens/text-"))
    return is_ours and not name.startswith(".") and not name.endswith((TEMPORARY_SUFFIX, ".bad"))
