"""Checkpoints of a training run: save without waiting, restore the newest that verifies.

checkpoints = CheckpointManager(folder)
restored = checkpoints.restore()           # None: no checkpoint yet
...
checkpoints.save(step, {"model": model.state_dict(), "optimizer": optimizer.state_dict(), ...})
...
checkpoints.close()                        # waits until everything is durable
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from estiba.checkpoint import format as ckpt_format
from estiba.checkpoint import snapshot
from estiba.checkpoint.chunks import exclusive
from estiba.checkpoint.remote import Remote
from estiba.checkpoint.restore import Restored, load, newest_that_verifies
from estiba.checkpoint.retention import Retention
from estiba.checkpoint.staging import StagingBuffer
from estiba.checkpoint.writer_process import Reply, WriterProcess
from estiba.distributed import DistContext
from estiba.log import get_logger
from estiba.storage import FileStore

__all__ = ["CheckpointManager", "Restored", "load"]

logger = get_logger(__name__)
RANK_TIMEOUT_S = 600.0
"""How long the main rank's writer waits for the other ranks' parts."""
DURABLE_MARGIN = 1.25
"""The disk may be slower than when it was measured."""
LOCK_TIMEOUT_S = 3.0
"""A trainer killed while it starts its writer leaves a forked child that holds the lock until it has called exec."""
SPACING = 10.0
"""A snapshot stalls the step. Saves are spaced so that this takes at most 1/SPACING of the time."""


@dataclass(kw_only=True)
class SaveTimings:
    """Measurements of the last save. `save_before_stop` decides by them."""

    size_bytes: int = 0
    blocking_s: float = 0.0
    durable_s: float = 0.0
    """From the start of the snapshot until the checkpoint is on the disk."""
    upload_bytes_per_s: float | None = None


@dataclass
class SaveRequest:
    """A snapshot that the writer is to save."""

    step: int
    started: float
    blocking_s: float
    size_bytes: int
    writer: WriterProcess
    done: threading.Event = field(default_factory=threading.Event)
    is_saved: bool = False


class CheckpointManager:
    """The checkpoints in a folder that only this job uses."""

    is_sharded = False
    """Whether each rank saves a shard of the state."""
    has_replicas = False
    """Whether there are several copies of the sharded state, so that `save_replica` can save one of them."""
    is_first_of_replica = True
    """Whether this rank commits what `save_replica` saves."""

    def __init__(
        self,
        folder: Path,
        *,
        retention: Retention | None = None,
        upload: str | None = None,
        dist: DistContext | None = None,
    ) -> None:
        """`upload` is an S3 prefix that every checkpoint is copied to, and restored from if the folder has none.

        The ranks of one host share the folder. Create it in the main thread: the writer process dies with the thread
        that starts it. Raises CheckpointError if the folder cannot be written or another job uses it.
        """
        self.folder, self.upload = Path(folder).absolute(), upload
        self.dist = dist or DistContext()
        self.retention = retention or Retention()
        self.timings = SaveTimings()
        self.newest_step: int | None = None
        """Step of the newest checkpoint on the disk."""
        self._token: str = self.dist.broadcast(uuid.uuid4().hex[:8])
        self._stem = snapshot.file_stem(self.dist.rank, self.dist.world_size)
        self._buffer = StagingBuffer()
        self._request: SaveRequest | None = None
        self._writer: WriterProcess | None = None
        self._restored_name: str | None = None
        self._next_save_at = 0.0
        self._saves = 0  # the same on all ranks, which save together or not at all
        self.state_lock = threading.RLock()
        """Held while the state that is saved changes, or is copied."""
        self._lock = ExitStack()
        if self.dist.is_main:
            self._lock.enter_context(exclusive(FileStore(self.folder), "training", timeout_s=LOCK_TIMEOUT_S))
            self._remove_incomplete()

    def _remove_incomplete(self) -> None:
        ckpt_format.remove_unfinished(self.folder)
        for name, new_name in ckpt_format.quarantine_incomplete(self.folder).items():
            logger.warning(
                f"{self.folder / name}: has no manifest, so it is incomplete; quarantined as {new_name}. If a copy is "
                f"still under way, let it finish, rename it {name} and start again"
            )

    # --- restoring

    def restore(self, source: Path | None = None) -> Restored | None:
        """Return the newest state that verifies, in the folder or at `upload`; None if there is none.

        A checkpoint that does not verify is quarantined with a warning, and the previous one is tried. With `source`,
        the path of one checkpoint, that one is loaded. Raises CheckpointError if `source` does not verify.
        """
        if source is not None:
            return load(source, self.dist)
        restored = newest_that_verifies(self.folder, self.upload) if self.dist.is_main else None
        path = self.dist.broadcast(restored and str(restored.path))
        if path is None:
            return None
        if restored is None:  # on the other ranks
            restored = load(Path(path), self.dist)
        self.newest_step, self._restored_name = restored.step, restored.path.name
        return restored

    def supersede_after(self, step: int) -> list[str]:
        """Rename every later checkpoint, here and at `upload`, so that the run restarts from `step`.

        Nothing is deleted. Returns the new names. On the main rank only.
        """
        names = [name for name in ckpt_format.checkpoint_names(self.folder) if ckpt_format.sort_key(name)[0] > step]
        renamed = [ckpt_format.quarantine(self.folder, name, ckpt_format.SUPERSEDED_PREFIX) for name in names]
        if self.upload is not None:
            remote = Remote(self.upload)
            for name in remote.names():
                if ckpt_format.sort_key(name)[0] > step:
                    remote.supersede(name)
        left = ckpt_format.checkpoint_names(self.folder)
        self.newest_step, self._restored_name = (ckpt_format.sort_key(left[0])[0], left[0]) if left else (None, None)
        return [name for name in renamed if name is not None]

    # --- saving

    @property
    def is_busy(self) -> bool:
        """Whether a save is in progress, so that another would wait for it."""
        return self._request is not None and not self._request.done.is_set()

    @property
    def is_affordable(self) -> bool:
        """Whether a save now would neither wait nor stall the steps for too large a share of the time (`SPACING`)."""
        return not self.is_busy and time.monotonic() >= self._next_save_at

    def reserve(self, state: Mapping[str, Any]) -> None:
        """Allocate memory for snapshots of this size and start the writer, in the background."""
        snapshot.reserve(self._buffer, state, self._stem)
        self._start_writer()

    def save(
        self,
        step: int,
        state: Mapping[str, Any],
        *,
        kind: str = "step",
        metrics: Mapping[str, float] | None = None,
        wait: bool = False,
    ) -> None:
        """Copy the state into memory and have the writer save it. With `wait`, return when it is on the disk.

        `state["model"]` (dict[str, Tensor]) becomes a file of its own. A save that fails logs a warning: the
        run continues, and earlier checkpoints are kept. Raises CheckpointError for a state that cannot be saved.
        """
        self.wait()
        started = time.monotonic()
        staged = snapshot.take(self._buffer, state, self._stem)
        blocking_s = time.monotonic() - started
        self._saves += 1
        writer = self._start_writer()
        self._request = SaveRequest(step, started, blocking_s, staged.size_bytes, writer)
        needed = staged.size_bytes + sum(map(len, staged.texts.values()))
        writer.send(
            {
                "do": "save",
                "step": step,
                "number": self._saves,
                "needed": int(self.dist.all_reduce_sum(float(needed))[0]),
                "kind": kind,
                "metrics": {name: float(value) for name, value in (metrics or {}).items()},
                "buffer_bytes": self._buffer.size_bytes,
                "files": staged.files,
                "texts": staged.texts,
                "rank_timeout_s": RANK_TIMEOUT_S,
            }
        )
        self._next_save_at = time.monotonic() + SPACING * blocking_s
        if wait:
            self.wait()

    def save_replica(
        self, step: int, state: Mapping[str, Any], *, timeout_s: float, metrics: Mapping[str, float] | None = None
    ) -> bool:
        """Save one replica without the ranks of the others (`has_replicas`). Returns whether it is saved."""
        raise NotImplementedError

    def save_before_stop(
        self,
        step: int,
        state: Mapping[str, Any],
        *,
        seconds_left: float | None,
        fits: bool | None = None,
        **options: Any,
    ) -> str:
        """Save as much as the time left allows. Returns what is saved, for the final message.

        If the measured bandwidth is enough, a new snapshot is saved; else the save in progress is finished; else the
        newest checkpoint remains. `fits` is the main rank's decision, which all ranks follow.
        """
        if self._request is not None and self._request.step == step:  # this step is being saved already
            self.wait(timeout_s=seconds_left)
            if self.dist.broadcast(self.newest_step == step or self.is_busy):
                return self._saved_so_far()
        if self.fits(seconds_left) if fits is None else fits:
            self.save(step, state, wait=True, **options)
        else:
            instead = "the save in progress is finished instead" if self.is_busy else "none is started"
            left = "too little time" if seconds_left is None else f"{seconds_left:.0f} s"
            logger.warning(f"{left} left and a checkpoint takes {self.expected_s():.0f} s here; {instead}")
            self.wait(timeout_s=seconds_left)
        return self._saved_so_far()

    def _saved_so_far(self) -> str:
        newest_step = self.dist.broadcast(self.newest_step)  # the other ranks know only about their own parts
        if newest_step is None:
            return "no checkpoint could be written"
        return f"everything up to step {newest_step} is saved in {self.folder}"

    def fits(self, seconds_left: float | None) -> bool:
        """Return whether a checkpoint that starts now would be durable in time; True before the first measurement."""
        return seconds_left is None or self.expected_s() <= seconds_left

    def expected_s(self) -> float:
        """Return the seconds until a checkpoint that starts now is durable; 0 before the first measurement."""
        if not self.timings.durable_s:
            return 0.0
        remaining_s = 0.0
        if self._request is not None and self.is_busy:
            remaining_s = max(0.0, self.timings.durable_s - (time.monotonic() - self._request.started))
        return self.timings.durable_s * DURABLE_MARGIN + remaining_s

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait for the save in progress. Returns False on a timeout."""
        request = self._request
        if request is None:
            return True
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while not request.done.wait(0.05):
            if deadline is not None and time.monotonic() > deadline:
                return False
            if not request.writer.is_running:
                request.done.wait(1.0)  # its last replies may not have been read yet
                self._on_failure(request, request.writer.exit_report())
        return True

    def close(self, timeout_s: float | None = None) -> None:
        """Wait until every save is on the disk and, with `upload`, copied; at most `timeout_s`."""
        started = time.monotonic()
        self.wait(timeout_s)
        writer, self._writer = self._writer, None
        if writer is not None:
            left_s = None if timeout_s is None else max(0.0, timeout_s - (time.monotonic() - started))
            if not writer.close(left_s) and self.upload:
                logger.warning(f"{self.upload}: the last checkpoint was not uploaded in the time left")
        self._lock.close()

    # --- the writer

    def _start_writer(self) -> WriterProcess:
        if self._writer is not None and self._writer.is_running:
            return self._writer
        settings = {
            "folder": str(self.folder),
            "rank": self.dist.rank,
            "ranks": self.dist.world_size,
            "token": self._token,
            "descriptor": self._buffer.descriptor,
            "retention": self.retention.model_dump(),
            "upload": self.upload,
        }
        self._writer = WriterProcess(
            settings, descriptor=self._buffer.descriptor, on_reply=self._on_reply, on_exit=self._on_exit
        )
        if self._restored_name is not None:
            self._writer.send({"do": "verified", "name": self._restored_name})
        return self._writer

    def _on_reply(self, reply: Reply) -> None:
        request = self._request
        if "warning" in reply:
            logger.warning(reply["warning"])
        elif "sent" in reply and reply["seconds"] > 0:
            self.timings.upload_bytes_per_s = reply["size"] / reply["seconds"]
        elif request is not None and reply.get("step") == request.step:
            if "failed" in reply:
                self._on_failure(request, reply["failed"])
            else:
                self.timings.size_bytes = request.size_bytes
                self.timings.blocking_s = request.blocking_s
                self.timings.durable_s = time.monotonic() - request.started
                self.newest_step = request.step
                request.is_saved = True
                request.done.set()

    def _on_exit(self, writer: WriterProcess) -> None:
        request = self._request
        if request is not None and request.writer is writer:
            self._on_failure(request, writer.exit_report())

    def _on_failure(self, request: SaveRequest, problem: str) -> None:
        if request.done.is_set():
            return
        newest = "there is none yet" if self.newest_step is None else f"the newest is of step {self.newest_step}"
        logger.warning(f"no checkpoint at step {request.step}: {problem}. The run continues; {newest}")
        request.done.set()
