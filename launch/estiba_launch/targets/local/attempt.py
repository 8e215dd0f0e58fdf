"""One attempt: a new set of hosts, from input files to the end of their containers."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from docker.errors import DockerException

from estiba_launch.errors import HostError
from estiba_launch.jobs import control
from estiba_launch.jobs.control import Fault
from estiba_launch.jobs.logs import JobLog, Metrics, copy_bars, copy_output
from estiba_launch.jobs.options import SubmitOptions
from estiba_launch.jobs.record import Record, now_text
from estiba_launch.jobs.store import open_store
from estiba_launch.jobs.sync import CheckpointSync
from estiba_launch.request import contract
from estiba_launch.targets.docker_command import Mount, host_mounts
from estiba_launch.targets.local import channels
from estiba_launch.targets.local.engine import End, Engine, EngineGone
from estiba_launch.targets.local.files import ContainerFiles
from estiba_launch.targets.local.interruptible import MustEnd, run_unless
from estiba_launch.targets.local.outcome import Outcome, Result
from estiba_launch.targets.local.reason import failure_reason
from estiba_launch.targets.local.script import local_container
from estiba_launch.targets.local.uploads import CheckpointUploads

POLL_S = 0.25
ENGINE_PATIENCE_S = 600.0
COPIER_JOIN_S = 30.0
KILLED_CODES = (137, 143, 255)
"""Exit codes of containers whose engine died: KILL, TERM, or unknown."""


@dataclass(kw_only=True)
class HostRun:
    """One host of the attempt."""

    host: contract.Host
    root: Path
    container: str = ""
    """Container id; empty before the start."""
    end: End | None = None
    start_at: float | None = None
    """time.monotonic() of the start of a host that comes late; None once it is there."""


class Attempt:
    """Runs one attempt. Leaves the directories of its hosts below `root`."""

    def __init__(
        self,
        *,
        job_dir: Path,
        request: dict[str, Any],
        options: SubmitOptions,
        engine: Engine,
        record: Record,
        log: JobLog,
        metrics: Metrics,
        must_end: Callable[[], Result | None],
        inject: Callable[[Attempt, Fault], Result | None],
    ) -> None:
        self.job_dir, self.request, self.options = job_dir, request, options
        self.engine, self.record, self.log, self.metrics = engine, record, log, metrics
        self.must_end = must_end
        """Returns the job's end when it was stopped or a time limit has passed."""
        self.inject = inject
        """Interrupts the attempt; returns None when the job ended by itself first."""
        self.job = str(request["TrainingJobName"])
        self.cluster = contract.hosts(request)
        self.image = request["AlgorithmSpecification"]["TrainingImage"]
        self.number = record.attempts[-1]["Number"]
        self.root = job_dir / "attempts" / str(self.number)
        self.runs: list[HostRun] = []
        self.has_started = False
        self.uploads = CheckpointUploads(job_dir, log, options.sync_every_s)
        self._abandoned = False
        self.unsynced = ""
        """What of the checkpoints is in no store, and why. The attempt's directory is kept for it."""
        self._mounted: dict[str, list[Mount]] = {}
        self._addresses: dict[str, str] = {}
        self._copiers: dict[str, threading.Thread] = {}
        self._unwatched = False

    # ---- before the start

    def begin(self) -> None:
        """Prepare and start every host. Raises HostError; after `clear` it may be called again.

        Raises MustEnd, with nothing started, when the job must end meanwhile.
        """
        try:
            inputs = run_unless(self.must_end, self._prepare)
        except MustEnd:
            self._abandoned = True
            raise
        isolated = bool(self.request.get("EnableNetworkIsolation"))
        addresses = self.engine.network(self.job, isolated=isolated, hosts=[host.name for host in self.cluster])
        self.record.to("Training", "Training image download completed. Training in progress.")
        late = contract.late_host(self.request)
        self._mounted = {run.host.name: [*self._mounts(run), *inputs[run.host.name]] for run in self.runs}
        self._addresses = addresses
        for run in self.runs:
            for folder in [run.root, *(mount.source for mount in inputs[run.host.name] if not mount.read_only)]:
                self.engine.give_files(folder, self.image)
            if late and late.name == run.host.name:
                run.start_at = time.monotonic() + late.late_s
                self.log.mark(f"{late.name} starts {late.late_s:g} s later")
            else:
                self._start(run)
        self.has_started = True
        self.record.attempts[-1]["TrainingStartTime"] = now_text()
        self.record.save()

    def _start(self, run: HostRun) -> None:
        late = contract.late_host(self.request)
        hidden = late.name if late and late.is_nameless and late.name != run.host.name else None
        run.container = self.engine.start(
            local_container(
                self.request,
                run.host,
                self.options,
                self._mounted[run.host.name],
                attempt=self.number,
                addresses={name: address for name, address in self._addresses.items() if name != hidden},
            )
        )
        run.start_at = None

    def _prepare(self) -> dict[str, list[Mount]]:
        """Fetch inputs, checkpoints and image. Returns the inputs of each host."""
        self.runs = []
        self.uploads = CheckpointUploads(self.job_dir, self.log, self.options.sync_every_s)
        self.record.to("Downloading", "Downloading input data")
        inputs: dict[str, list[Mount]] = {}
        for host in self.cluster:
            inputs[host.name] = []
            for channel in contract.channels(self.request):
                if self._abandoned:
                    return {}
                if not channel.groups or host.group in channel.groups:
                    inputs[host.name].append(
                        channels.place(
                            channel, host, self.cluster, self.job_dir / "inputs", copy=self.options.copy_inputs
                        )
                    )
        restored: dict[str, Any] = {}
        for host in self.cluster:
            if self._abandoned:
                return {}
            run = self._add_run(host)
            self._write_config(run, inputs[host.name])
            if host.name in self.uploads.syncs:
                files, size_bytes = self.uploads.syncs[host.name].restore()
                restored = {"RestoredFiles": files, "RestoredBytes": size_bytes}
        if self._abandoned:
            return {}
        self.record.attempts[-1].update(restored, Restored=True)
        if restored:
            self.log.mark(f"restored {restored['RestoredFiles']} checkpoint files, {restored['RestoredBytes']} bytes")
        self.engine.ensure_image(self.image, self.log.mark)
        return inputs

    def adopt(self) -> bool:
        """Take over hosts that an earlier supervisor prepared. Returns False when it had not done that."""
        containers = self.engine.containers(self.job, self.number)
        if not self.record.attempts[-1].get("Restored"):
            return False
        for host in self.cluster:
            run = self._add_run(host)
            run.container = containers.get(host.name, "")
            if not run.container:
                # Removed, or never started. What is in its directory is synced all the same.
                run.end = End(exit_code=137, out_of_memory=False)
        self.has_started = bool(containers)
        for sync in self.uploads.syncs.values():
            sync.adopt()
        self._unwatched = True
        return True

    def find_host_dirs(self) -> None:
        """Find the host directories of an attempt that has ended."""
        self.unsynced = self.record.attempts[-1].get("Unsynced", "")
        self.runs = [
            HostRun(host=host, root=self.root / host.name) for host in self.cluster if (self.root / host.name).is_dir()
        ]
        self.has_started = "TrainingStartTime" in self.record.attempts[-1]

    def end(self, outcome: Outcome, reason: str) -> Result:
        """Record the end of an attempt without exit codes."""
        self.record.end_attempt(outcome, {}, reason)
        return Result(outcome=outcome, reason=reason)

    def _add_run(self, host: contract.Host) -> HostRun:
        run = HostRun(host=host, root=self.root / host.name)
        self.runs.append(run)
        config = self.request.get("CheckpointConfig")
        if config:
            self.uploads.add(host.name, self._sync(run, config["S3Uri"]))
        return run

    def _sync(self, run: HostRun, uri: str) -> CheckpointSync:
        name = run.host.name
        mark = f"checkpoints of {name}: " if len(self.cluster) > 1 else "checkpoints: "
        target = contract.checkpoint_dir(self.request) or ""

        def report(text: str) -> None:
            self.log.mark(f"{mark}{text}")

        return CheckpointSync(
            run.root / "checkpoints",
            open_store(uri, report),
            # One for all attempts: what this host uploaded in an earlier one is still its own.
            ledger=self.job_dir / "sync" / f"{name}.json",
            report=report,
            denied=ContainerFiles(self.engine, lambda: run.container, target),
            mounted_at=target,
            markers=True,
        )

    def _write_config(self, run: HostRun, inputs: list[Mount]) -> None:
        # Docker needs a directory to attach each channel to.
        targets = [mount.target.removeprefix("/opt/ml/") for mount in inputs]
        try:
            for folder in ("input/config", "input/data", "model", "output/data", *targets):
                (run.root / folder).mkdir(parents=True, exist_ok=True)
            files = contract.config_files(self.request, run.host, self.options.host.encoding)
            for name, text in files.items():
                (run.root / "input/config" / name).write_text(text, "utf-8")
        except OSError as error:
            raise HostError(
                f"{run.root}: {error.strerror or error}; make room, or point ESTIBA_STATE elsewhere"
            ) from error

    def _mounts(self, run: HostRun) -> list[Mount]:
        target = contract.checkpoint_dir(self.request)
        return host_mounts(run.root) + ([Mount(source=run.root / "checkpoints", target=target)] if target else [])

    def folders(self, run: HostRun) -> dict[str, Path]:
        """The host's mounts: path in the container to path on this machine."""
        sources = {mount.target: mount.source for mount in self._mounts(run)}
        sources["/opt/ml/output/data"] = run.root / "output" / "data"
        for channel in contract.channels(self.request):
            place = channels.mounted(channel, run.host, self.job_dir / "inputs")
            sources[f"/opt/ml/input/data/{channel.name}"] = place
        return sources

    # ---- while it runs

    def watch(self) -> Result:
        """Wait until no container of the attempt is running and its last files are in the store."""
        self.uploads.start()
        try:
            result = self._watch()
        finally:
            self.uploads.join()
        for run in self.runs:
            self._join_copier(run)
            # Catches up on what a broken connection missed.
            self._copy_output(run)
        self.metrics.flush()
        return result

    def _watch(self) -> Result:
        gone_since: float | None = None
        while True:
            try:
                result = self._check(gone_since is not None)
                gone_since = None
            except EngineGone as error:
                if gone_since is None:
                    gone_since = time.monotonic()
                    self.log.mark(f"{error}; waiting for it")
                if time.monotonic() - gone_since > ENGINE_PATIENCE_S:
                    return self.end(Outcome.HOST_LOST, str(error))
                time.sleep(2.0)
                continue
            if result is not None:
                return result
            time.sleep(POLL_S)

    def _check(self, engine_was_gone: bool) -> Result | None:
        """Check once for everything that can end the attempt."""
        # A container that ends before a new supervisor's first check ended unwatched, as in a machine restart.
        unwatched, self._unwatched = self._unwatched, False
        for run in self.runs:
            if run.start_at is not None:
                if time.monotonic() < run.start_at:
                    continue
                self._start(run)
            run.end = run.end or self.engine.end(run.container)
            self._ensure_copier(run)
        ends = [(run, run.end) for run in self.runs if run.end]
        failed = [(run, end) for run, end in ends if end.exit_code != 0]
        if (engine_was_gone or unwatched) and any(
            end.exit_code in KILLED_CODES and not end.out_of_memory for _, end in failed
        ):
            self.engine.kill(self.running())
            return self.finish(Outcome.HOST_LOST, "the docker engine died and took the job's containers with it")
        if failed:
            self.engine.stop(self.running(), self.options.stop_grace_s)
            return self.finish(Outcome.FAILED, self.failure_reason(*failed[0]))
        if len(ends) == len(self.runs):
            return self.finish(Outcome.COMPLETED)
        if result := self.must_end():
            self.record_stop(result, f": TERM, then KILL after {self.options.stop_grace_s} s")
            self.engine.stop(self.running(), self.options.stop_grace_s)
            return self.finish(result.outcome, result.reason)
        fault = control.take_fault(self.job_dir)
        return self.inject(self, fault) if fault else None

    def record_stop(self, result: Result, how: str) -> None:
        why = result.reason or result.outcome
        self.record.to("Stopping", f"Stopping the training job: {why}")
        self.log.mark(f"stopping ({why}){how}")

    def interrupted(self, note: dict[str, Any], *, sync: bool, wait_s: float) -> Result:
        """The hosts of the attempt were taken away; `note` says how."""
        self.record.attempts[-1]["Interruption"] = note
        return self.finish(Outcome.INTERRUPTED, "spot capacity was taken back", sync=sync, wait_s=wait_s)

    def finish(self, outcome: Outcome, reason: str = "", *, sync: bool = True, wait_s: float = 0.0) -> Result:
        """Record how each container ended and upload the last checkpoint files. No container is running any more."""
        for run in self.runs:
            run.end = run.end or self._end_of(run)
        self.uploads.stop()
        codes = {run.host.name: run.end.exit_code if run.end else None for run in self.runs}
        away = False
        if sync:
            try:
                self.engine.own_files(self.root, self.image)
            except HostError as error:
                self.log.mark(f"files still belong to root: {error}")
            try:
                self.unsynced = self.uploads.finish()
            except HostError as error:
                self.unsynced, away = str(error), True
            if self.unsynced:
                self.log.mark(f"checkpoints not in the store: {self.unsynced}")
                self.record.attempts[-1].update(Unsynced=self.unsynced, StoreIsAway=away)
        self.record.end_attempt(outcome, codes, reason)
        return Result(outcome=outcome, reason=reason, capacity_wait_s=wait_s, store_is_away=away)

    def running(self) -> list[str]:
        running = [run for run in self.runs if run.container and not run.end]
        return [run.container for run in running if self.engine.end(run.container) is None]

    def _end_of(self, run: HostRun) -> End | None:
        """How a host ended; None for one that was never there, or still is."""
        return self.engine.end(run.container) if run.container else None

    def failure_reason(self, run: HostRun, end: End) -> str:
        return failure_reason(run.root, run.host.name if len(self.runs) > 1 else None, end)

    def _ensure_copier(self, run: HostRun) -> None:
        """Start the threads that copy the host's output, again for those that were cut off."""
        for work in (self._copy_output, self._copy_bars):
            name = f"{work.__name__.strip('_')} {run.host.name}"
            if name in self._copiers and (self._copiers[name].is_alive() or run.end):
                continue
            self._copiers[name] = threading.Thread(target=work, args=(run,), name=name, daemon=True)
            self._copiers[name].start()

    def _join_copier(self, run: HostRun) -> None:
        """Wait for the output copier for as long as its file grows."""
        copier = self._copiers.get(f"copy_output {run.host.name}")
        own, copied = self.root / f"{run.host.name}.log", -1
        while copier and copier.is_alive() and own.exists() and own.stat().st_size > copied:
            copied = own.stat().st_size
            copier.join(timeout=COPIER_JOIN_S)

    def _copy_output(self, run: HostRun) -> None:
        if not run.container:
            return
        container, own = run.container, self.root / f"{run.host.name}.log"
        try:
            copy_output(run.host.name, own, self.log, self.metrics, lambda since: self.engine.logs(container, since))
        except Exception as error:
            self.log.mark(f"log of {run.host.name} was cut off ({error})")

    def _copy_bars(self, run: HostRun) -> None:
        with contextlib.suppress(Exception):
            copy_bars(run.host.name, self.log, self.engine.attach(run.container))

    def clear(self) -> None:
        """Remove the attempt's containers; their writable layers (/tmp included) are lost."""
        try:
            self.engine.remove([run.container for run in self.runs if run.container])
            leftover = self.engine.containers(self.job, self.number)
            self.engine.remove(list(leftover.values()))
        except (HostError, DockerException) as error:
            self.log.mark(f"containers not removed: {error}")
