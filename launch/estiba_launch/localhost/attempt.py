"""One attempt: a new set of hosts, from input files to the end of their containers."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from docker.errors import DockerException

from .. import contract
from ..errors import HostError
from . import channels, control, interruption
from .control import LocalOptions
from .engine import End, Engine, EngineGone
from .logs import JobLog, Metrics, Pump
from .record import Record, disk_is_full, now_text
from .store import open_store
from .sync import CheckpointSync

POLL_S = 0.25
ENGINE_PATIENCE_S = 600.0
FINAL_SYNC_PATIENCE_S = 600.0
KILLED_CODES = (137, 143, 255)
"""What a container ends with when its engine goes: by KILL, by TERM, or unknown."""


class Outcome(StrEnum):
    """How an attempt ended."""

    COMPLETED = "Completed"
    FAILED = "Failed"
    STOPPED = "Stopped"
    INTERRUPTED = "Interrupted"
    MAX_RUNTIME = "MaxRuntimeExceeded"
    MAX_WAIT = "MaxWaitTimeExceeded"
    HOST_LOST = "HostLost"


@dataclass(frozen=True, kw_only=True)
class Result:
    """The end of one attempt."""

    outcome: Outcome
    reason: str = ""
    """What a person is told: the failure file, or what became of the host."""
    capacity_wait_s: float = 0.0
    """After an interruption: seconds until there is a new host."""


@dataclass(kw_only=True)
class HostRun:
    """One host of the attempt."""

    host: contract.Host
    root: Path
    container: str
    sync: CheckpointSync | None
    end: End | None = None


class Attempt:
    """Runs one attempt and leaves its hosts' directories below `root`."""

    def __init__(
        self,
        *,
        job_dir: Path,
        request: dict[str, Any],
        options: LocalOptions,
        engine: Engine,
        record: Record,
        log: JobLog,
        metrics: Metrics,
        deadline: Callable[[], tuple[float, Outcome] | None],
    ) -> None:
        self.job_dir, self.request, self.options = job_dir, request, options
        self.engine, self.record, self.log, self.metrics = engine, record, log, metrics
        self.deadline = deadline
        """(seconds left, what happens then), or None when there is no limit."""
        self.cluster = contract.hosts(request)
        self.image = request["AlgorithmSpecification"]["TrainingImage"]
        self.number = record.attempts[-1]["Number"]
        self.root = job_dir / "attempts" / str(self.number)
        self.runs: list[HostRun] = []
        self._pumps: dict[str, Pump] = {}
        self.quiet = threading.Event()
        """Set when nothing more of the hosts' directories goes to the store."""
        self._unwatched = False

    # ---- before the start

    def begin(self) -> None:
        """Prepare and start every host. Raises HostError; calling again is safe once `clear` was called."""
        self.runs = []
        self.record.to("Downloading", "Downloading input data")
        placed = {
            host.name: [
                channels.place(channel, host, self.cluster, self.job_dir / "inputs", copy=self.options.copy_inputs)
                for channel in contract.channels(self.request)
                if not channel.groups or host.group in channel.groups
            ]
            for host in self.cluster
        }
        restored: dict[str, Any] = {}
        for host in self.cluster:
            root = self.root / host.name
            self._write_config(host, root, [channel.target for channel in placed[host.name]])
            sync = self._sync(root)
            if sync:
                files, size = sync.restore()
                restored = {"RestoredFiles": files, "RestoredBytes": size}
            self.runs.append(HostRun(host=host, root=root, container="", sync=sync))
        self.record.attempts[-1].update(restored, Restored=True)
        if restored:
            self.log.mark(f"restored {restored['RestoredFiles']} checkpoint files, {restored['RestoredBytes']} bytes")
        self.engine.ensure_image(self.image, self.log.mark)
        network = self.engine.network(
            self.record.value["TrainingJobName"], isolated=bool(self.request.get("EnableNetworkIsolation"))
        )
        self.record.to("Training", "Training image download completed. Training in progress.")
        entrypoint, arguments = contract.command(self.request)
        for run in self.runs:
            run.container = self.engine.start(
                job=self.record.value["TrainingJobName"],
                attempt=self.number,
                host=run.host,
                image=self.image,
                entrypoint=entrypoint,
                arguments=arguments,
                environment={**self.options.environment, **contract.environment(self.request)},
                mounts=[*self._mounts(run), *placed[run.host.name]],
                network=network,
                options=self.options.host,
            )
        self.record.attempts[-1]["TrainingStartTime"] = now_text()
        self.record.save()

    def adopt(self) -> bool:
        """Take over hosts that an earlier supervisor started; False when there is nothing to take over."""
        containers = self.engine.containers(self.record.value["TrainingJobName"], self.number)
        if set(containers) != {host.name for host in self.cluster} or not self.record.attempts[-1].get("Restored"):
            return False
        for host in self.cluster:
            root = self.root / host.name
            sync = self._sync(root)
            if sync:
                sync.adopt()
            self.runs.append(HostRun(host=host, root=root, container=containers[host.name], sync=sync))
        self._unwatched = True
        return True

    def find_files(self) -> None:
        """Know the directories of an attempt that has ended, for what they still hold."""
        for host in self.cluster:
            if (self.root / host.name).is_dir():
                self.runs.append(HostRun(host=host, root=self.root / host.name, container="", sync=None))

    def lost(self, reason: str) -> Result:
        """The attempt could not go on, through no fault of the job."""
        self.record.end_attempt(Outcome.HOST_LOST, {}, reason)
        return Result(outcome=Outcome.HOST_LOST, reason=reason)

    def failed(self, reason: str) -> Result:
        """The attempt could not start, through a fault of the job."""
        self.record.end_attempt(Outcome.FAILED, {}, reason)
        return Result(outcome=Outcome.FAILED, reason=reason)

    def _write_config(self, host: contract.Host, root: Path, targets: list[str]) -> None:
        try:
            for folder in ("input/config", "input/data", "model", "output/data"):
                (root / folder).mkdir(parents=True, exist_ok=True)
            # Docker needs a place to hang each channel on.
            for target in targets:
                (root / target.removeprefix("/opt/ml/")).mkdir(parents=True, exist_ok=True)
            files = contract.config_files(self.request, host, self.options.host.encoding)
            for name, text in files.items():
                (root / "input/config" / name).write_text(text, "utf-8")
        except OSError as error:
            raise HostError(f"{root}: {error.strerror or error}; make room, or point ESTIBA_STATE elsewhere") from error

    def _sync(self, root: Path) -> CheckpointSync | None:
        config = self.request.get("CheckpointConfig")
        return CheckpointSync(root / "checkpoints", open_store(config["S3Uri"])) if config else None

    def _mounts(self, run: HostRun) -> list[channels.Mount]:
        mounts = [
            channels.Mount(source=run.root / name, target=f"/opt/ml/{name}", read_only=False)
            for name in ("input", "model", "output")
        ]
        local = contract.checkpoint_dir(self.request)
        if local:
            mounts.append(channels.Mount(source=run.root / "checkpoints", target=local, read_only=False))
        return mounts

    # ---- while it runs

    def watch(self) -> Result:
        """Until the attempt is over; then no container of it runs, and its last files are in the store."""
        syncing = threading.Thread(target=self._sync_now_and_then, name="sync", daemon=True)
        syncing.start()
        try:
            result = self._watch()
        finally:
            self.quiet.set()
            syncing.join()
        for run in self.runs:
            if run.host.name in self._pumps:
                self._pumps[run.host.name].join(timeout=30)
            # Whatever a broken connection left out is read now; what is there already is skipped.
            self._new_pump(run).run()
        self.metrics.flush()
        return result

    def _watch(self) -> Result:
        gone_since: float | None = None
        while True:
            try:
                result = self._look(gone_since is not None)
                gone_since = None
            except EngineGone as error:
                if gone_since is None:
                    gone_since = time.monotonic()
                    self.log.mark(f"{error}; waiting for it")
                if time.monotonic() - gone_since > ENGINE_PATIENCE_S:
                    return self.lost(str(error))
                time.sleep(2.0)
                continue
            if result is not None:
                return result
            time.sleep(POLL_S)

    def _look(self, engine_was_gone: bool) -> Result | None:
        """One look at everything that can end the attempt."""
        # What ended before a new supervisor's first look ended while nobody watched, as at a restart of the machine.
        unwatched, self._unwatched = self._unwatched, False
        for run in self.runs:
            run.end = run.end or self.engine.end(run.container)
            self._pump(run)
        ended = [run for run in self.runs if run.end]
        bad = [run for run in ended if run.end and run.end.exit_code != 0]
        if (engine_was_gone or unwatched) and any(
            run.end and run.end.exit_code in KILLED_CODES and not run.end.out_of_memory for run in bad
        ):
            self.engine.kill(self.running())
            return self.finish(Outcome.HOST_LOST, "the docker engine died and took the job's containers with it")
        if bad:
            self.engine.stop(self.running(), self.options.stop_grace_s)
            return self.finish(Outcome.FAILED, self._failure_reason(bad[0]))
        if len(ended) == len(self.runs):
            return self.finish(Outcome.COMPLETED)
        reason = control.stop_ordered(self.job_dir)
        limit = self.deadline()
        if reason is not None or (limit is not None and limit[0] <= 0):
            outcome = Outcome.STOPPED if reason is not None or limit is None else limit[1]
            self.record.to("Stopping", f"Stopping the training job: {reason or outcome}")
            self.log.mark(f"stopping ({reason or outcome}): TERM, then KILL after {self.options.stop_grace_s} s")
            self.engine.stop(self.running(), self.options.stop_grace_s)
            return self.finish(outcome, reason or "")
        order = control.take_interruption(self.job_dir)
        return interruption.carry_out(self, order) if order else None

    def interrupted(self, note: dict[str, Any], *, sync: bool, wait_s: float) -> Result:
        """The attempt's hosts were taken away; `note` says how."""
        self.record.attempts[-1]["Interruption"] = note
        return self.finish(Outcome.INTERRUPTED, "spot capacity was taken back", sync=sync, wait_s=wait_s)

    def finish(self, outcome: Outcome, reason: str = "", *, sync: bool = True, wait_s: float = 0.0) -> Result:
        """No container runs any more: note how each ended, and bring the last checkpoint files to the store."""
        for run in self.runs:
            run.end = run.end or self.engine.end(run.container)
        self.quiet.set()
        codes = {run.host.name: run.end.exit_code if run.end else None for run in self.runs}
        if sync:
            try:
                self.engine.own_files(self.root, self.image)
            except HostError as error:
                self.log.mark(f"files stay root's: {error}")
            self._last_sync()
        self.record.end_attempt(outcome, codes, reason)
        return Result(outcome=outcome, reason=reason, capacity_wait_s=wait_s)

    def running(self) -> list[str]:
        return [run.container for run in self.runs if self.engine.end(run.container) is None]

    def _failure_reason(self, run: HostRun) -> str:
        """The failure file's text, or what is known without one."""
        end = run.end
        assert end is not None
        try:
            text = (run.root / "output" / "failure").read_bytes().decode("utf-8", "replace").strip()
        except OSError:
            text = ""
        if text:
            return text
        where = f" on {run.host.name}" if len(self.runs) > 1 else ""
        if end.out_of_memory:
            return f"OutOfMemory: the container was killed at its memory limit{where}; give it more (--memory)"
        full = f" (the disk of {run.root} is full: make room there)" if disk_is_full(run.root) else ""
        return (
            f"AlgorithmError: exit code {end.exit_code}{where}{full}; "
            "/opt/ml/output/failure was not written, see the log"
        )

    # ---- beside it

    def _pump(self, run: HostRun) -> None:
        """Have somebody copy the host's output; a pump that broke off is followed by another."""
        pump = self._pumps.get(run.host.name)
        if pump and (pump.is_alive() or run.end):
            return
        self._pumps[run.host.name] = self._new_pump(run)
        self._pumps[run.host.name].start()

    def _new_pump(self, run: HostRun) -> Pump:
        own = self.root / f"{run.host.name}.log"
        container = run.container
        return Pump(run.host.name, own, self.log, self.metrics, lambda since: self.engine.logs(container, since))

    def _sync_now_and_then(self) -> None:
        failing = False
        while not self.quiet.wait(self.options.sync_every_s):
            for run in self.runs:
                if run.sync is None or self.quiet.is_set() or control.sync_held(self.job_dir):
                    continue
                try:
                    run.sync.push()
                    failing = False
                except (HostError, OSError) as error:
                    # The store may be away for a while; what is on disk goes up when it is back.
                    if not failing:
                        self.log.mark(f"checkpoints of {run.host.name} not synced, trying again: {error}")
                    failing = True

    def _last_sync(self) -> None:
        """Bring what is left to the store, waiting for it if it is away. Raises HostError when it stays away."""
        started = time.monotonic()
        pause_s = 1.0
        for run in self.runs:
            while run.sync is not None:
                try:
                    run.sync.push()
                    break
                except (HostError, OSError) as error:
                    if time.monotonic() - started > FINAL_SYNC_PATIENCE_S:
                        raise HostError(f"checkpoints are only at {run.root / 'checkpoints'}: {error}") from error
                    self.log.mark(f"last sync of {run.host.name} failed, again in {pause_s:.0f} s: {error}")
                    time.sleep(pause_s)
                    pause_s = min(pause_s * 2, 30.0)

    def clear(self) -> None:
        """Remove the attempt's containers; their writable layers (/tmp and all) go with them."""
        try:
            self.engine.remove([run.container for run in self.runs if run.container])
            leftover = self.engine.containers(self.record.value["TrainingJobName"], self.number)
            self.engine.remove(list(leftover.values()))
        except (HostError, DockerException) as error:
            self.log.mark(f"containers not removed: {error}")
