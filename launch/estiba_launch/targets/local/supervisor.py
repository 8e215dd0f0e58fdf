"""The process that runs one local job from start to end: `python -m estiba_launch.targets.local.supervisor DIR`.

It is detached from the command that started it and holds the job's lock. When it dies, the containers keep running, and
another supervisor takes over from what is in the job's directory.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import shutil
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from estiba_launch.errors import HostError
from estiba_launch.jobs import artifacts, control
from estiba_launch.jobs.directory import REQUEST, read_json
from estiba_launch.jobs.logs import JobLog, Metrics
from estiba_launch.jobs.options import SubmitOptions
from estiba_launch.jobs.record import FAILURE_CHARS, Record
from estiba_launch.jobs.status import TERMINAL
from estiba_launch.request import contract
from estiba_launch.targets.local import faults
from estiba_launch.targets.local.attempt import POLL_S, Attempt
from estiba_launch.targets.local.engine import Engine, EngineGone
from estiba_launch.targets.local.interruptible import MustEnd
from estiba_launch.targets.local.outcome import Outcome, Result
from estiba_launch.targets.local.uploads import retry

UPLOAD_PATIENCE_S = 600.0
START_PATIENCE_S = 600.0
RESTART_PAUSE_S = 1.0


class Supervisor:
    """Runs one job to a terminal status."""

    def __init__(self, job_dir: Path, engine: Engine | None = None) -> None:
        self.job_dir = job_dir
        self.request: dict[str, Any] = read_json(job_dir / REQUEST)
        self.name = str(self.request["TrainingJobName"])
        self.options = SubmitOptions.read(job_dir)
        self.record = Record.load(job_dir)
        self.engine = engine or Engine()
        self.hosts = [host.name for host in contract.hosts(self.request)]
        self.log = JobLog(job_dir, many=len(self.hosts) > 1)
        self.metrics = Metrics(self.request, self.record.metrics)
        self.attempt: Attempt | None = None
        """The latest attempt, until the directories of its hosts are removed."""

    def run(self) -> None:
        """Run the job to a terminal status, whatever happens.

        The status is written last: whoever sees it finds the log line, the uploads and the clean-up done.
        """
        files_are_safe = False
        try:
            result = self._attempts()
            files_are_safe = self._upload_results(result)
            if result.outcome is Outcome.COMPLETED and (stop_reason := control.stop_reason(self.job_dir)):
                result = Result(outcome=Outcome.STOPPED, reason=stop_reason)
            secondary, reason = self._final_status(result)
            shown = reason[:FAILURE_CHARS] if secondary == "Failed" else result.outcome
            line = f"{'Stopped' if secondary.startswith('Max') else secondary}: {shown}"
        except HostError as error:
            secondary, reason, line = "Failed", f"InternalServerError: {error}", f"failed: {error}"
        except Exception as error:
            traceback.print_exc()
            reason = f"InternalServerError: {type(error).__name__}: {error}; see {self.job_dir}/supervisor.log"
            secondary, line = "Failed", f"failed: {reason}"
        try:
            self._clean_up(files_are_safe)
        except Exception:
            traceback.print_exc()
        self.log.mark(line)
        self.record.to(secondary, reason)

    def _attempts(self) -> Result:
        """Run attempt after attempt until one is final."""
        retries = int(self.request.get("RetryStrategy", {}).get("MaximumRetryAttempts", 0))
        spot = bool(self.request.get("EnableManagedSpotTraining"))
        adopting = bool(self.record.attempts)
        wait_s = self.options.capacity_wait_s
        while True:
            if not adopting:
                if wait_s > 0:
                    self.log.mark(f"waiting {wait_s:g} s for capacity")
                ended = self._pause(wait_s)
                if ended is not None:
                    return ended
                entry = self.record.begin_attempt(self.hosts)
                self.log.mark(f"attempt {entry['Number']} on {', '.join(self.hosts)}")
            self.attempt = Attempt(
                job_dir=self.job_dir,
                request=self.request,
                options=self.options,
                engine=self.engine,
                record=self.record,
                log=self.log,
                metrics=self.metrics,
                must_end=self._must_end,
                inject=faults.inject,
            )
            result = self._adopt(self.attempt) if adopting else self._start(self.attempt)
            adopting = False
            self.log.mark(f"attempt {self.attempt.number} ended: {result.outcome}")
            stopped = control.stop_reason(self.job_dir)
            if stopped is not None and result.outcome in (Outcome.INTERRUPTED, Outcome.HOST_LOST):
                return dataclasses.replace(result, outcome=Outcome.STOPPED, reason=stopped)
            if result.store_is_away:
                return result
            if result.outcome is Outcome.HOST_LOST and retries > 0:
                retries -= 1
            elif result.outcome in (Outcome.INTERRUPTED, Outcome.HOST_LOST) and spot:
                self.record.to("Interrupted", result.reason)
            else:
                return result
            self.attempt.clear()
            self._remove_hosts()
            wait_s = max(result.capacity_wait_s, RESTART_PAUSE_S if result.outcome is Outcome.HOST_LOST else 0.0)
            self.record.to("Restarting", "Preparing new hosts; the checkpoint directory is restored")

    def _start(self, attempt: Attempt) -> Result:
        """Start the attempt's hosts and watch them. A first attempt that cannot start fails the job.

        Later attempts wait until they can start, so a minute's outage of the store costs a minute.
        """
        started = time.monotonic()
        pause_s = 1.0
        while True:
            try:
                attempt.begin()
                break
            except MustEnd as error:
                attempt.record_stop(error.result, " before the hosts started")
                return attempt.end(error.result.outcome, error.result.reason)
            except EngineGone as error:
                return attempt.end(Outcome.HOST_LOST, str(error))
            except HostError as error:
                attempt.clear()
                patience_s = START_PATIENCE_S if attempt.number > 1 else 0.0
                if time.monotonic() - started >= patience_s:
                    return attempt.end(Outcome.FAILED, f"ClientError: {error}")
                self.log.mark(f"attempt {attempt.number} cannot start, again in {pause_s:.0f} s: {error}")
                if ended := self._pause(pause_s):
                    return attempt.end(ended.outcome, ended.reason)
                pause_s = min(pause_s * 2, 30.0)
        return attempt.watch()

    def _adopt(self, attempt: Attempt) -> Result:
        """Continue an attempt whose supervisor died."""
        entry = self.record.attempts[-1]
        if "EndTime" in entry:
            attempt.find_host_dirs()
            away = entry.get("StoreIsAway", False)
            return Result(outcome=Outcome(entry["Outcome"]), reason=entry.get("Reason", ""), store_is_away=away)
        if attempt.adopt():
            self.log.mark(f"attempt {attempt.number} taken over by a new supervisor")
            return attempt.watch()
        attempt.clear()
        return attempt.end(Outcome.HOST_LOST, "the supervisor died before the hosts were up")

    def _deadline(self) -> tuple[float, Outcome]:
        """Seconds to the nearer of the two limits, and which one it is."""
        condition = self.request.get("StoppingCondition", {})
        run_left_s = contract.max_runtime_s(self.request) - self.record.running_s()
        max_wait_s = condition.get("MaxWaitTimeInSeconds")
        if max_wait_s is not None and int(max_wait_s) - self.record.age_s() < run_left_s:
            return int(max_wait_s) - self.record.age_s(), Outcome.MAX_WAIT
        return run_left_s, Outcome.MAX_RUNTIME

    def _must_end(self) -> Result | None:
        """The job's end when it was stopped or a time limit has passed."""
        reason = control.stop_reason(self.job_dir)
        if reason is not None:
            return Result(outcome=Outcome.STOPPED, reason=reason)
        left_s, outcome = self._deadline()
        return Result(outcome=outcome) if left_s <= 0 else None

    def _pause(self, seconds: float) -> Result | None:
        """Wait. Returns a result when the job must end meanwhile."""
        until = time.monotonic() + seconds
        while not (ended := self._must_end()) and time.monotonic() < until:
            time.sleep(min(POLL_S, max(until - time.monotonic(), 0.01)))
        return ended

    def _upload_results(self, result: Result) -> bool:
        """Upload what the last hosts left. Returns False when their directories are the only copy."""
        self._clear()
        if result.outcome is Outcome.HOST_LOST:
            return False
        if self.attempt and self.attempt.has_started:
            hosts = [self.attempt.folders(run) for run in self.attempt.runs]
            self.record.to("Uploading", "Uploading generated training model and output")
            if result.outcome is not Outcome.FAILED:
                model = self._upload("model", hosts)
                self.record.value["ModelArtifacts"] = {"S3ModelArtifacts": model}
            output_uri = self._upload("output", hosts)
            self.record.value["Estiba"]["OutputArtifacts"] = output_uri
            self.record.save()
        return True

    def _final_status(self, result: Result) -> tuple[str, str]:
        """The last secondary status, and its message or the failure's reason."""
        unsynced = self.attempt.unsynced if self.attempt else ""
        if unsynced and result.store_is_away and result.outcome in (Outcome.HOST_LOST, Outcome.INTERRUPTED):
            return "Failed", f"InternalServerError: the host was lost with its checkpoints not in the store: {unsynced}"
        if result.outcome is Outcome.HOST_LOST:
            return "Failed", f"InternalServerError: {result.reason}"
        if result.outcome is Outcome.FAILED:
            return "Failed", result.reason
        if result.outcome is Outcome.INTERRUPTED:
            # Not a spot job: a lost host is the end, as on SageMaker.
            return "Failed", "InternalServerError: the host was lost; EnableManagedSpotTraining would start again"
        messages = {Outcome.COMPLETED: "Training job completed", Outcome.STOPPED: "Training job stopped"}
        message = messages.get(result.outcome, f"Training job stopped: {result.outcome}")
        return result.outcome, f"{message}; checkpoints not in the store: {unsynced}" if unsynced else message

    def _upload(self, what: str, hosts: Sequence[artifacts.Mounts]) -> str:
        started = time.monotonic()
        # Logged once, however often the upload is tried.
        report = functools.cache(lambda text: self.log.mark(f"{what}: {text}; not stored"))

        def failed(error: HostError, pause_s: float) -> None:
            if self._must_end() and time.monotonic() - started >= self.options.stop_grace_s:
                raise error
            self.log.mark(f"{what} not uploaded, again in {pause_s:.0f} s: {error}")

        try:
            return retry(
                lambda: artifacts.upload(self.request, what, hosts, self.job_dir / "scratch", report),
                patience_s=UPLOAD_PATIENCE_S,
                failed=failed,
            )
        except HostError as error:
            raise HostError(f"{what} not uploaded, it stays in {hosts[0][artifacts.FOLDERS[what]]}: {error}") from error

    def _clear(self) -> None:
        """Remove containers and network."""
        if self.attempt is not None:
            self.attempt.clear()
        self.engine.remove_network(self.name)

    def _remove_hosts(self) -> None:
        """Remove the directories of the hosts. Their logs stay, and what a container made as root may stay too."""
        if self.attempt and not self.options.keep_hosts and not self.attempt.unsynced:
            for name in self.hosts:
                shutil.rmtree(self.attempt.root / name, ignore_errors=True)
        self.attempt = None

    def _clean_up(self, files_are_safe: bool) -> None:
        """Remove everything except files that could not be uploaded."""
        self._clear()
        if files_are_safe:
            self._remove_hosts()
            shutil.rmtree(self.job_dir / "scratch", ignore_errors=True)
            if not self.options.keep_hosts:
                shutil.rmtree(self.job_dir / "inputs", ignore_errors=True)


def main(job_dir: Path) -> int:
    """Supervise until the end. Returns 0 also when another process does so already."""
    lock = control.hold(job_dir)
    if lock is None:
        return 0
    with lock:
        supervisor = Supervisor(job_dir)
        if supervisor.record.status not in TERMINAL:
            supervisor.run()
    return 0


if __name__ == "__main__":
    code = main(Path(sys.argv[1]))
    sys.stdout.flush()
    sys.stderr.flush()
    # An abandoned download runs on in its thread, and a normal exit would wait for it.
    os._exit(code)
