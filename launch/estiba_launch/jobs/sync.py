"""The checkpoint directory of one host and its address in the store.

Restored before the start, uploaded while the job runs, local deletes carried out in the store. Objects that others add
to the store later are not pulled, as on SageMaker. Several hosts, and others, may write below one address: a host
overwrites nothing that is newer than its own file and deletes nothing that somebody else wrote.

The ssh target copies this file to remote hosts, with errors.py, ledger.py, mirror.py and s3.py.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from estiba_launch.errors import HostError
from estiba_launch.jobs.keys import paths_below, shown
from estiba_launch.jobs.ledger import Entry, Ledger, Origin, is_copy
from estiba_launch.jobs.links import InContainer, on_this_machine
from estiba_launch.jobs.mirror import UPLOADED, UPLOADING, KeyRefused, Scan, Signature, scan, signature

if TYPE_CHECKING:
    from estiba_launch.jobs.store import Store

NAMED_AT_ONCE = 5


@dataclass
class PushResult:
    uploaded: int = 0
    uploaded_bytes: int = 0
    deleted: int = 0
    problems: dict[str, str] = field(default_factory=dict)
    """Key to the reason why it is not in the store."""
    notes: dict[str, str] = field(default_factory=dict)
    """Key to the reason why it need not be."""


class DeniedFiles(Protocol):
    """Reads what this user may not read."""

    def list(self, folder: str) -> dict[str, Signature]:
        """Every file below a folder. Raises HostError."""

    def copy(self, key: str, path: Path) -> None:
        """Write one file's content to `path`. Raises HostError."""


class CheckpointSync:
    """Keeps the store in line with `local`. Every method raises HostError."""

    def __init__(
        self,
        local: Path,
        store: Store,
        *,
        ledger: Path | None = None,
        report: Callable[[str], None] = lambda _: None,
        denied: DeniedFiles | None = None,
        mounted_at: str | None = None,
        markers: bool = False,
    ) -> None:
        """`mounted_at` is where the container has the folder: its absolute links begin there.

        With `markers` the folder shows what is uploaded, as on SageMaker: a file `NAME.sagemaker-uploading` while NAME
        is on its way, and `NAME.sagemaker-uploaded` once it is there.
        """
        self.local, self.store, self.denied = local, store, denied
        self.peers: list[CheckpointSync] = []
        """Syncs of the job's other hosts, which may still have what this host deletes."""
        self._resolve = InContainer({mounted_at: local}) if mounted_at else on_this_machine
        self._ledger = Ledger(ledger) if ledger else None
        self._report = report
        self._markers = markers
        self._known: dict[str, Entry] = {}
        self._begun: dict[str, Signature] = {}
        """Uploads that an earlier process may have finished without a note."""
        self._taken_over = False
        self._failed: set[str] = set()
        self._troubled: set[str] = set()
        """Problems of the latest push."""
        self._named: set[str] = set()
        self._lock = threading.Lock()

    # ---- what is known

    def restore(self) -> tuple[int, int]:
        """Download everything from the store. Returns (files, bytes)."""
        before, begun = self._ledger.load() if self._ledger else ({}, {})
        for key in begun:
            self.store.tidy(key)
        self.local.mkdir(parents=True, exist_ok=True)
        objects = self.store.objects()
        for key, path in paths_below(self.local, objects, self.store.uri).items():
            self.store.get(key, path)
        self._known = {
            key: Entry(seen, objects[key].etag if key in objects else None, Origin.RESTORED)
            for key, seen in self._scan().files.items()
        }
        for key in self._known.keys() & before.keys():
            # Written by this host in an earlier attempt.
            if before[key].origin is Origin.UPLOADED and (seen := self.store.head(key)) and before[key].is_same(seen):
                self._known[key].origin = Origin.UPLOADED
        self._save({})
        return len(objects), sum(one.size_bytes for one in objects.values())

    def adopt(self) -> None:
        """Take over a directory that an earlier process restored and synced until it died."""
        if self._ledger:
            self._known, self._begun = self._ledger.load()
        self._taken_over = True

    def _save(self, begun: dict[str, Signature]) -> None:
        if self._ledger is None:
            return
        try:
            self._ledger.save(self._known, begun)
        except OSError as error:
            # A full disk must not keep the files on it from being saved elsewhere.
            self._name({str(self._ledger.path): error.strerror or str(error)})

    # ---- the sync

    def push(self, *, last: bool = False) -> PushResult:
        """Upload what is new or changed, then carry out deletes. After an error the next call does the rest.

        A file must be missing at two pushes before it counts as deleted, except at the `last` one, when nobody writes
        any more. One that cannot be uploaded does not stop the others: it is tried again, and reported once.
        """
        with self._lock:
            now = self._scan()
            self._settle_begun()
            moved = PushResult(problems=dict(now.unlisted), notes=dict(now.skipped))
            try:
                self._upload_changed(now, moved)
                self._delete_missing(now, moved, last=last)
            finally:
                self._save({})
                # What one push could not do, the next one often can: a file was just being renamed.
                lasting = {key: why for key, why in moved.problems.items() if last or key in self._troubled}
                self._name({**moved.notes, **lasting})
                self._troubled = set(moved.problems)
            self._taken_over = False
            return moved

    def pending(self) -> tuple[int, int]:
        """What is here and not in the store yet: (files, bytes)."""
        sizes = [seen[0] for key, seen in self._scan().files.items() if self._is_changed(key, seen)]
        return len(sizes), sum(sizes)

    def _scan(self) -> Scan:
        try:
            return scan(self.local, self.denied.list if self.denied else None, self._resolve)
        except OSError as error:
            reason = error.strerror or error
            raise HostError(f"{self.local}: {reason}; nothing is deleted from {self.store.uri}") from error

    def _is_changed(self, key: str, seen: Signature) -> bool:
        return key not in self._known or self._known[key].signature != seen

    def _settle_begun(self) -> None:
        while self._begun:
            key, begun = next(iter(self._begun.items()))
            self.store.tidy(key)
            seen = self.store.head(key)
            if seen and is_copy(seen, begun):
                self._known[key] = Entry(begun, seen.etag, Origin.UPLOADED)
            del self._begun[key]

    def _upload_changed(self, now: Scan, moved: PushResult) -> None:
        changed = [key for key, seen in now.files.items() if self._is_changed(key, seen)]
        if not changed:
            return
        self._save({key: now.files[key] for key in changed})
        # Oldest first: a manifest, which names the other files of its checkpoint, is written last.
        changed.sort(key=lambda key: (now.files[key][1], key))
        self._each(changed, lambda key: self._upload(key, now, moved), now, moved)

    def _each(self, keys: list[str], call: Callable[[str], None], now: Scan, moved: PushResult) -> None:
        """Call for every key, past those that are refused. Raises HostError when it is the store that fails."""
        away: tuple[str, HostError] | None = None
        # What failed before comes after what may pass.
        for key in sorted(keys, key=lambda key: key in self._failed):
            try:
                call(key)
            except HostError as error:
                if self._has_changed(key, now):
                    # Renamed, removed or written meanwhile; the next push finds what became of it.
                    continue
                if isinstance(error, KeyRefused) or key in self._failed:
                    self._failed.add(key)
                    moved.problems[key] = str(error)
                elif away:
                    # Two in a row.
                    raise
                else:
                    away = key, error
                continue
            self._failed.discard(key)
            if away:
                # The store takes others.
                self._failed.add(away[0])
                moved.problems[away[0]] = str(away[1])
                away = None
        if away:
            raise away[1]

    def _has_changed(self, key: str, now: Scan) -> bool:
        try:
            return signature(now.linked.get(key, self.local / key).stat()) != now.files.get(key)
        except PermissionError:
            return False
        except OSError:
            return key in now.files

    def _upload(self, key: str, found: Scan, moved: PushResult) -> None:
        now = found.files[key]
        entry = self._known.get(key)
        seen = self.store.head(key)
        if seen and entry and entry.is_same(seen):
            if self._taken_over and now[1] < entry.signature[1]:
                # While nobody watched, an old copy took the place of what was uploaded.
                moved.notes[key] = "older than the object in the store, which is kept"
                self._known[key] = Entry(now, seen.etag, entry.origin)
                return
        elif seen and is_copy(seen, now):
            self._known[key] = Entry(now, seen.etag, Origin.UPLOADED)
            return
        elif seen and seen.modified_ns >= now[1]:
            moved.notes[key] = "somebody else has written a newer object, which is kept"
            self._known[key] = Entry(now, seen.etag, Origin.FOREIGN)
            return
        path = found.linked.get(key, self.local / key)
        with ExitStack() as stack:
            if self._markers:
                stack.enter_context(marked(self.local / key))
            if self.denied and not os.access(path, os.R_OK):
                path = Path(stack.enter_context(self._scratch())) / "file"
                self.denied.copy(key, path)
            etag = self.store.put(path, key, now[1])
        # The signature from before the upload: a file that grew meanwhile goes up again.
        self._known[key] = Entry(now, etag, Origin.UPLOADED)
        moved.uploaded += 1
        moved.uploaded_bytes += now[0]

    def _scratch(self) -> tempfile.TemporaryDirectory[str]:
        try:
            return tempfile.TemporaryDirectory(dir=self._ledger.path.parent if self._ledger else None)
        except OSError as error:
            raise KeyRefused(f"no room for a copy ({error.strerror})") from error

    def _delete_missing(self, now: Scan, moved: PushResult, *, last: bool) -> None:
        """Deletes come after uploads, so that the store is never without the newer checkpoint."""
        gone = []
        for key, entry in self._known.items():
            if key in now.files or key in now.skipped or now.hides(key):
                entry.missing = entry.kept = False
            elif not entry.kept:
                gone.append(key)
        if not now.files and not now.unlisted:
            # An unmounted disk or an `rm -rf` by hand is not a job that deleted every checkpoint.
            for key in gone:
                self._known[key].kept = True
            kept = sum(entry.kept for entry in self._known.values())
            if kept:
                moved.problems[str(self.local)] = f"has lost all its files; {kept} stay in {self.store.uri}"
            return
        due = [key for key in gone if last or self._known[key].missing]
        for key in gone:
            self._known[key].missing = True
        due = [key for key in due if not os.path.lexists(self.local / key)]
        self._each(due, lambda key: self._delete(key, moved), now, moved)

    def _delete(self, key: str, moved: PushResult) -> None:
        entry = self._known[key]
        if entry.origin is Origin.RESTORED and any(os.path.lexists(peer.local / key) for peer in self.peers):
            return
        if entry.origin is not Origin.FOREIGN:
            seen = self.store.head(key)
            if seen and entry.is_same(seen):
                self.store.delete(key)
                moved.deleted += 1
        if self._markers:
            with contextlib.suppress(OSError):
                (self.local / f"{key}{UPLOADED}").unlink(missing_ok=True)
        del self._known[key]

    def _name(self, problems: dict[str, str]) -> None:
        """Report each problem once."""
        new = sorted(problems.keys() - self._named)
        self._named.update(new)
        if new:
            self._report(f"not synced: {describe({key: problems[key] for key in new})}")


@contextlib.contextmanager
def marked(path: Path) -> Iterator[None]:
    """Mark a file as uploading, and as uploaded if the block succeeds. A folder that cannot be written has no marks."""
    uploading, uploaded = path.with_name(path.name + UPLOADING), path.with_name(path.name + UPLOADED)
    with contextlib.suppress(OSError):
        uploaded.unlink(missing_ok=True)
        uploading.touch()
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            uploading.unlink(missing_ok=True)
        raise
    with contextlib.suppress(OSError):
        uploading.rename(uploaded)


def describe(problems: dict[str, str]) -> str:
    text = "; ".join(f"{shown(key)}: {reason}" for key, reason in list(problems.items())[:NAMED_AT_ONCE])
    more = len(problems) - NAMED_AT_ONCE
    return f"{text}; and {more} more" if more > 0 else text
