"""What a training loop holds: save without waiting, restore the newest checkpoint that verifies.

checkpoints = Checkpoints(folder)
found = checkpoints.restore()              # None: nothing there yet
...
checkpoints.save(step, {"model": model.state_dict(), "optimizer": optimizer.state_dict(), ...})
...
checkpoints.close()                        # waits until everything is durable
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from estiba.checkpoint import directory, layout, tree
from estiba.checkpoint.arena import Arena
from estiba.checkpoint.directory import Manifest
from estiba.checkpoint.disk import padded
from estiba.checkpoint.pieces import exclusive
from estiba.checkpoint.remote import Remote
from estiba.checkpoint.retention import Retention
from estiba.errors import CheckpointError, StoreError
from estiba.ranks import Ranks
from estiba.stop import say
from estiba.store import FileStore

MODEL_FILE = "model.safetensors"
PATIENCE_S = 600.0
"""How long the first rank's writer waits for the parts of the others."""
CAUTION = 1.25
"""A disk may be slower this time than it was."""
LOCK_PATIENCE_S = 3.0
"""A trainer that is killed while it starts its writer leaves a child that holds its lock until it has become one."""
SPACING = 10.0
"""A snapshot stalls the step; no more than one part in so many of the time goes to that."""


@dataclass(frozen=True, kw_only=True)
class Restored:
    """A state whose every byte was verified. Tensors are on the CPU and belong to whoever restored them."""

    state: dict[str, Any]
    step: int
    path: Path
    manifest: Manifest


@dataclass(kw_only=True)
class Measured:
    """What saving cost so far; what the choice before a stop is made from."""

    size_bytes: int = 0
    blocking_s: float = 0.0
    durable_s: float = 0.0
    """From the start of the snapshot until the name is on the disk."""
    upload_bytes_per_s: float | None = None


@dataclass
class _Order:
    step: int
    started: float
    blocking_s: float
    size_bytes: int
    process: subprocess.Popen[str] | None = None
    """The writer that it was given to."""
    done: threading.Event = field(default_factory=threading.Event)
    name: str | None = None
    problem: str | None = None


def load(path: Path, ranks: Ranks | None = None) -> Restored:
    """One checkpoint, every byte of what is read verified. Raises CheckpointError."""
    ranks = ranks or Ranks()
    manifest = directory.read_manifest(path)
    if (order := directory.order_of(path.name)) and order[0] != manifest.step:
        raise CheckpointError(f"{path}: holds step {manifest.step}; somebody renamed it")
    if ranks.is_first and manifest.ranks > 1:  # the other ranks take what this one found whole
        directory.verify(path)
    state = _load_tree(path, manifest, "state", with_model=True)
    own = _stem(ranks, manifest.ranks)
    if own != "state" and f"{own}.json" in manifest.files:
        state |= _load_tree(path, manifest, own, with_model=False)
    return Restored(state=state, step=manifest.step, path=path, manifest=manifest)


def _load_tree(path: Path, manifest: Manifest, stem: str, *, with_model: bool) -> dict[str, Any]:
    tensors: dict[str, torch.Tensor] = {}
    for name, prefix in ((MODEL_FILE, "model/"), (f"{stem}.safetensors", "")):
        if name in manifest.files and (with_model or name != MODEL_FILE):
            for key, tensor in layout.read(directory.read_verified(path, manifest, name)).items():
                tensors[prefix + key] = tensor
    skeleton = json.loads(bytes(directory.read_verified(path, manifest, f"{stem}.json")))
    try:
        state: dict[str, Any] = tree.restore(skeleton, tensors.__getitem__)
    except (KeyError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: its files do not belong together ({error})") from None
    return state


def _stem(ranks: Ranks, count: int) -> str:
    """The first rank has `state`, the others a file of their own each."""
    return "state" if ranks.is_first or count == 1 else f"state-{ranks.rank:05d}"


class Checkpoints:
    """The checkpoints in one folder, which this job alone uses."""

    def __init__(
        self,
        folder: Path,
        *,
        retention: Retention | None = None,
        upload: str | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        """`upload` is an S3 prefix that every checkpoint is copied to, and restored from where the folder has none.

        Ranks of one box share the folder. Made in the main thread: the writer dies with the thread that started it.
        Raises CheckpointError where the folder cannot be written or another job uses it.
        """
        self.folder, self.upload = Path(folder).absolute(), upload
        self.ranks = ranks or Ranks()
        self.retention = retention or Retention()
        self.measured = Measured()
        self.newest: int | None = None
        """Step of the newest checkpoint that is on the disk."""
        self._token: str = self.ranks.from_first(uuid.uuid4().hex[:8])
        self._arena = Arena()
        self._order: _Order | None = None
        self._process: subprocess.Popen[str] | None = None
        self._sent: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._restored_name: str | None = None
        self._next_at = 0.0
        self._saves = 0  # the same on all ranks, which save together or not at all
        self._hold = ExitStack()
        if self.ranks.is_first:
            self._hold.enter_context(exclusive(FileStore(self.folder), "training", patience_s=LOCK_PATIENCE_S))
            if incomplete := directory.clean(self.folder):
                say(f"{self.folder}: {', '.join(incomplete)} incomplete (its copy never ended), deleted")

    # --- restoring

    def restore(self, source: Path | None = None) -> Restored | None:
        """The newest state that verifies, here or at `upload`; None where there is none.

        What does not verify is set aside with a warning, and the one before is tried. `source` names one checkpoint,
        and that one or an error is what there is.
        """
        if source is not None:
            return load(source, self.ranks)
        found = self._newest_that_verifies() if self.ranks.is_first else None
        path = self.ranks.from_first(found and str(found.path))
        if path is None or self.ranks.is_first:
            return found
        found = load(Path(path), self.ranks)
        self.newest = found.step
        return found

    def _newest_that_verifies(self) -> Restored | None:
        local = directory.names_in(self.folder)
        remote, away = self._remote_names(bool(local))
        names = sorted({*local, *away}, key=lambda name: directory.order_of(name) or (0, 0), reverse=True)
        for name in names:
            if name in local:
                try:
                    return self._found(load(self.folder / name, self.ranks), name)
                except CheckpointError as error:
                    new_name = directory.set_aside(self.folder, name)
                    say(f"warning: {error}; set aside as {new_name}, going back to the one before")
            if name in away and remote is not None:
                try:
                    here = remote.fetch(name, self.folder)
                    say(f"{remote.url}/{name}: restored from there")
                    return self._found(load(self.folder / here, self.ranks), here)
                except CheckpointError as error:
                    say(f"warning: {error}; set aside, going back to the one before")
                    with contextlib.suppress(StoreError):
                        remote.set_aside(name)
        if names:
            say(f"warning: {self.folder}: none of {len(names)} checkpoints verifies; this run starts anew")
        return None

    def _remote_names(self, is_something_here: bool) -> tuple[Remote | None, list[str]]:
        """What is at `upload`. Raises StoreError where that cannot be asked and there is nothing here to go on from."""
        if self.upload is None:
            return None, []
        try:
            remote = Remote(self.upload)
            return remote, remote.names()
        except StoreError as error:
            if not is_something_here:
                raise
            say(f"warning: {self.upload}: cannot be asked for checkpoints ({error}); going on from those here")
            return None, []

    def _found(self, found: Restored, name: str) -> Restored:
        self.newest, self._restored_name = found.step, name
        return found

    # --- saving

    @property
    def is_busy(self) -> bool:
        """True while a snapshot is on its way to the disk: a save now would wait for it."""
        return self._order is not None and not self._order.done.is_set()

    @property
    def is_affordable(self) -> bool:
        """False while another save would cost more than one part in ten of the time, or would wait."""
        return not self.is_busy and time.monotonic() >= self._next_at

    def reserve(self, state: Mapping[str, Any]) -> None:
        """Get memory for snapshots of this size, and the writer, ready while the job goes on."""
        tensors, _ = tree.flatten(state)
        self._arena.reserve(sum(padded(plan.size_bytes) for _, plan, _ in self._plans(tensors)))
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
        """Copy the state into memory and have it written; with `wait`, return when it is on the disk.

        `state["model"]` (dict[str, Tensor]) becomes a file of its own. A save that fails is said and costs nothing
        else: the run goes on, and the checkpoints before it stay. Raises CheckpointError for a state that cannot be
        saved at all.
        """
        self.settle()
        started = time.monotonic()
        tensors, skeleton = tree.flatten(state)
        plans = self._plans(tensors)
        self._arena.reserve(sum(padded(plan.size_bytes) for _, plan, _ in plans))
        self._arena.pin()
        files, start = [], 0
        for name, plan, members in plans:
            self._copy(start, plan, members)
            files.append({"name": name, "start": start, "size": plan.size_bytes})
            start += padded(plan.size_bytes)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        blocking_s = time.monotonic() - started
        size = sum(plan.size_bytes for _, plan, _ in plans)
        self._order = _Order(step, started, blocking_s, size)
        self._saves += 1
        self._start_writer()
        self._order.process = self._process
        text = json.dumps(skeleton)
        self._tell(
            {
                "do": "save",
                "step": step,
                "number": self._saves,
                "needed": int(self.ranks.sums(float(size + len(text)))[0]),
                "kind": kind,
                "metrics": {name: float(value) for name, value in (metrics or {}).items()},
                "arena": self._arena.size_bytes,
                "files": files,
                "texts": {f"{_stem(self.ranks, self.ranks.count)}.json": text},
                "patience_s": PATIENCE_S,
            }
        )
        self._next_at = time.monotonic() + SPACING * blocking_s
        if wait:
            self.settle()

    def save_before_stop(
        self,
        step: int,
        state: Mapping[str, Any],
        *,
        seconds_left: float | None,
        fits: bool | None = None,
        **how: Any,
    ) -> str:
        """The most that can be made durable in the time left. Returns what is safe, for the last message.

        A fresh snapshot if the bandwidth measured so far lets it reach the disk in time; else the one that is already
        in memory, on its way; else the newest that is there. `fits` is the answer of the first rank, which all follow.
        """
        if self._order is not None and self._order.step == step:  # this very step is on its way, or was
            self.settle(timeout_s=seconds_left)
            if self.ranks.from_first(self.newest == step or self.is_busy):
                return self._what_is_safe()
        if self.fits(seconds_left) if fits is None else fits:
            self.save(step, state, wait=True, **how)
        else:
            instead = "the one on its way is finished instead" if self.is_busy else "none is begun"
            left = "less" if seconds_left is None else f"{seconds_left:.0f} s"
            say(f"warning: {left} left and a checkpoint takes {self.expected_s():.0f} s here; {instead}")
            self.settle(timeout_s=seconds_left)
        return self._what_is_safe()

    def _what_is_safe(self) -> str:
        newest = self.ranks.from_first(self.newest)  # another rank knows of its own part alone
        if newest is None:
            return "no checkpoint could be written"
        return f"everything up to step {newest} is saved in {self.folder}"

    def fits(self, seconds_left: float | None) -> bool:
        """Whether a checkpoint that begins now would be durable in time; True where nothing was measured yet."""
        return seconds_left is None or self.expected_s() <= seconds_left

    def expected_s(self) -> float:
        """Seconds until a checkpoint that begins now is durable, the one on its way included; 0 without a measure."""
        if not self.measured.durable_s:
            return 0.0
        behind = self.measured.durable_s - (time.monotonic() - self._order.started) if self._order else 0.0
        return self.measured.durable_s * CAUTION + (max(0.0, behind) if self.is_busy else 0.0)

    def settle(self, timeout_s: float | None = None) -> bool:
        """Wait for the save on its way. False where the time was not enough."""
        order = self._order
        if order is None:
            return True
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while not order.done.wait(0.05):
            if deadline is not None and time.monotonic() > deadline:
                return False
            if self._process is None or self._process.poll() is not None:
                order.done.wait(1.0)  # its last words are still on the way
                if not order.done.is_set():
                    self._on_failure(order, "the process that writes checkpoints ended")
        return True

    def close(self, timeout_s: float | None = None) -> None:
        """Wait until what was saved is written, and copied to S3 where that is asked for; at most so long."""
        started = time.monotonic()
        self.settle(timeout_s)
        process, self._process = self._process, None
        if process is not None:
            with contextlib.suppress(OSError):
                assert process.stdin is not None
                process.stdin.write(json.dumps({"do": "close"}) + "\n")
                process.stdin.close()
            left = None if timeout_s is None else max(0.0, timeout_s - (time.monotonic() - started))
            try:
                process.wait(left)
            except subprocess.TimeoutExpired:
                if self.upload:
                    say(f"warning: {self.upload}: the last checkpoint was not uploaded in the time left")
                process.kill()
                process.wait()
        self._hold.close()

    # --- inside

    def _plans(self, tensors: Mapping[str, torch.Tensor]) -> list[tuple[str, layout.Layout, dict[str, torch.Tensor]]]:
        model = {key.removeprefix("model/"): tensor for key, tensor in tensors.items() if key.startswith("model/")}
        rest = {key: tensor for key, tensor in tensors.items() if not key.startswith("model/")}
        groups = [(MODEL_FILE, model), (f"{_stem(self.ranks, self.ranks.count)}.safetensors", rest)]
        return [(name, layout.lay_out(members), members) for name, members in groups if members]

    def _copy(self, start: int, plan: layout.Layout, members: Mapping[str, torch.Tensor]) -> None:
        buffer = self._arena.buffer
        buffer[start : start + len(plan.header)] = plan.header
        for name, tensor in members.items():
            if tensor.numel():
                target = layout.view(buffer, start + plan.offsets[name], tensor)
                target.copy_(tensor, non_blocking=True)

    def _start_writer(self) -> None:
        if self._process is not None and self._process.poll() is None:
            return
        environ = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        process = subprocess.Popen(
            [sys.executable, "-m", "estiba.checkpoint.writer", str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            pass_fds=[self._arena.descriptor],
            start_new_session=True,  # Ctrl-C in a terminal is for the trainer
            env=environ,
        )
        self._process = process
        self._tell(
            {
                "folder": str(self.folder),
                "rank": self.ranks.rank,
                "ranks": self.ranks.count,
                "token": self._token,
                "descriptor": self._arena.descriptor,
                "retention": self.retention.model_dump(),
                "upload": self.upload,
            }
        )
        if self._restored_name is not None:
            self._tell({"do": "known", "name": self._restored_name})
        threading.Thread(target=self._listen, args=(process,), name="estiba-checkpoints", daemon=True).start()

    def _tell(self, command: Mapping[str, Any]) -> None:
        assert self._process is not None and self._process.stdin is not None
        with contextlib.suppress(OSError):  # it ended; `settle` finds out and says so
            self._process.stdin.write(json.dumps(command) + "\n")
            self._process.stdin.flush()

    def _listen(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            try:
                reply = json.loads(line)
            except ValueError:  # it was killed in the middle of a word
                continue
            order = self._order
            if "warning" in reply:
                say(f"warning: {reply['warning']}")
            elif "sent" in reply and reply["seconds"] > 0:
                self.measured.upload_bytes_per_s = reply["size"] / reply["seconds"]
            elif order is not None and reply.get("step") == order.step:
                if "failed" in reply:
                    self._on_failure(order, reply["failed"])
                else:
                    self._on_success(order, reply["saved"])
        process.wait()  # its pipe ends a little before it does; the next save must not take it for alive
        order = self._order
        if order is not None and order.process is process:
            self._on_failure(order, "the process that writes checkpoints ended")

    def _on_success(self, order: _Order, name: str | None) -> None:
        self.measured.size_bytes = order.size_bytes
        self.measured.blocking_s = order.blocking_s
        self.measured.durable_s = time.monotonic() - order.started
        self.newest, order.name = order.step, name
        order.done.set()

    def _on_failure(self, order: _Order, problem: str) -> None:
        if order.done.is_set():
            return
        kept = f"the newest is of step {self.newest}" if self.newest is not None else "there is none yet"
        say(f"warning: no checkpoint at step {order.step}: {problem}. The run goes on; {kept}")
        order.problem = problem
        order.done.set()
