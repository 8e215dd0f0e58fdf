"""The checkpoint directory of one host and its place in the store.

Restored before the start, uploaded while the job runs, local deletes carried out in the store. Objects that others add
to the store later are not pulled, as on SageMaker.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path

from ..errors import HostError
from .store import Store, walk

Signature = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class Moved:
    """What one pass did."""

    uploaded: int = 0
    uploaded_bytes: int = 0
    deleted: int = 0


class CheckpointSync:
    """Keeps `local` and `store` alike, in the direction that SageMaker does."""

    def __init__(self, local: Path, store: Store) -> None:
        self.local = local
        self.store = store
        self._known: dict[str, Signature] = {}
        self._lock = threading.Lock()

    def restore(self) -> tuple[int, int]:
        """Bring everything from the store: (files, bytes). Raises HostError."""
        self.local.mkdir(parents=True, exist_ok=True)
        objects = self.store.list()
        for key in objects:
            path = self.local / key
            if not path.resolve().is_relative_to(self.local.resolve()):
                raise HostError(f"{self.store.uri}/{key}: leads out of the checkpoint directory; remove it")
            self.store.get(key, path)
        self._known = self._scan()
        return len(objects), sum(objects.values())

    def adopt(self) -> None:
        """Take over a directory that an earlier process had restored and was syncing when it died. Raises HostError."""
        # Every key counts as changed: what is here goes up again, what is not here was deleted while nobody looked.
        self._known = dict.fromkeys(self.store.list(), (-1, -1, -1))

    def push(self) -> Moved:
        """Upload what is new or changed, then carry out deletes. Raises HostError with the rest left for next time."""
        with self._lock:
            if not self.local.is_dir():
                # An unmounted disk is not a job that deleted all its checkpoints.
                raise HostError(f"{self.local}: gone; nothing is deleted from {self.store.uri}")
            now = self._scan()
            uploaded = size = deleted = 0
            for key, seen in now.items():
                if self._known.get(key) == seen:
                    continue
                path = self.local / key
                try:
                    self.store.put(path, key)
                except HostError:
                    if path.exists():
                        raise
                    # Renamed or removed between the look and the copy: the next pass sees what became of it.
                    continue
                # The signature from before the copy: a file that grew meanwhile goes up again next time.
                self._known[key] = seen
                uploaded += 1
                size += seen[0]
            # Deletes last, so that the store is never without the newer checkpoint.
            for key in [key for key in self._known if key not in now and not (self.local / key).exists()]:
                self.store.delete(key)
                del self._known[key]
                deleted += 1
            return Moved(uploaded=uploaded, uploaded_bytes=size, deleted=deleted)

    def pending(self) -> tuple[int, int]:
        """What is here and not in the store yet: (files, bytes)."""
        sizes = [seen[0] for key, seen in self._scan().items() if self._known.get(key) != seen]
        return len(sizes), sum(sizes)

    def _scan(self) -> dict[str, Signature]:
        return {key: (stat.st_size, stat.st_mtime_ns, stat.st_ino) for key, stat in walk(self.local)}
