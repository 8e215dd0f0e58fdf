"""The process that looks after one local job from start to end: `python -m estiba_launch.localhost.supervisor DIR`.

It is detached from the command that started it and holds the job's lock. If it dies, another takes over where it was:
containers go on meanwhile, and everything it knew is in the job's directory.
"""

from __future__ import annotations

import sys
import time
import traceback
from pathlib import Path
from typing import Any

from .. import contract
from ..errors import HostError
from ..rules.inputs import DEFAULT_MAX_RUNTIME_S
from ..state import read_json
from . import control, output
from .attempt import POLL_S, Attempt, Outcome, Result
from .engine import Engine, EngineGone
from .logs import JobLog, Metrics
from .record import TERMINAL, Record

UPLOAD_PATIENCE_S = 600.0
START_PATIENCE_S = 600.0
RESTART_PAUSE_S = 1.0


class Supervisor:
    """One job's whole life."""

    def __init__(self, job_dir: Path, engine: Engine | None = None) -> None:
        self.job_dir = job_dir
        self.request: dict[str, Any] = read_json(job_dir / control.REQUEST)
        self.name = str(self.request["TrainingJobName"])
        self.options = control.LocalOptions.read(job_dir)
        self.record = Record.load(job_dir)
        self.engine = engine or Engine()
        self.hosts = [host.name for host in contract.hosts(self.request)]
        self.log = JobLog(job_dir, many=len(self.hosts) > 1)
        definitions = self.request["AlgorithmSpecification"].get("MetricDefinitions", [])
        self.metrics = Metrics(definitions, self.record.metrics)
        self.attempt: Attempt | None = None
        """The latest one, as long as its hosts are not forgotten."""

    def run(self) -> None:
        """To a terminal status, whatever happens on the way."""
        files_are_safe = False
        try:
            files_are_safe = self._conclude(self._attempts())
        except HostError as error:
            self.log.mark(f"failed: {error}")
            self.record.fail(f"InternalServerError: {error}")
        except Exception as error:
            traceback.print_exc()
            self.record.fail(f"InternalServerError: {type(error).__name__}: {error}; see {self.job_dir}/supervisor.log")
        finally:
            self._tidy(files_are_safe)

    def _attempts(self) -> Result:
        """Attempt after attempt until one is final."""
        retries = int(self.request.get("RetryStrategy", {}).get("MaximumRetryAttempts", 0))
        spot = bool(self.request.get("EnableManagedSpotTraining"))
        adopting = bool(self.record.attempts)
        wait_s = self.options.capacity_wait_s
        while True:
            if not adopting:
                ended = self._wait_for_capacity(wait_s)
                if ended is not None:
                    return ended
                entry = self.record.begin_attempt(self.hosts)
                self.log.mark(f"attempt {entry['Number']} on {', '.join(self.hosts)}")
            self.attempt = self._attempt()
            result = self._adopted(self.attempt) if adopting else self._fresh(self.attempt)
            adopting = False
            self.log.mark(f"attempt {self.attempt.number} ended: {result.outcome}")
            if result.outcome is Outcome.HOST_LOST and retries > 0:
                retries -= 1
            elif result.outcome in (Outcome.INTERRUPTED, Outcome.HOST_LOST) and spot:
                self.record.to("Interrupted", result.reason)
            else:
                return result
            self.attempt.clear()
            self._forget()
            wait_s = max(result.capacity_wait_s, RESTART_PAUSE_S if result.outcome is Outcome.HOST_LOST else 0.0)
            self.record.to("Restarting", "Preparing new hosts; the checkpoint directory is restored")

    def _attempt(self) -> Attempt:
        return Attempt(
            job_dir=self.job_dir,
            request=self.request,
            options=self.options,
            engine=self.engine,
            record=self.record,
            log=self.log,
            metrics=self.metrics,
            deadline=self._deadline,
        )

    def _fresh(self, attempt: Attempt) -> Result:
        """Start the attempt's hosts and watch them. What cannot be started is the job's mistake, not the host's.

        A job that ran before was no mistake: what is in the way now is waited for, so that a store that is away for a
        minute costs a minute.
        """
        started = time.monotonic()
        pause_s = 1.0
        while True:
            try:
                attempt.begin()
                return attempt.watch()
            except EngineGone as error:
                return attempt.lost(str(error))
            except HostError as error:
                attempt.clear()
                patience_s = START_PATIENCE_S if attempt.number > 1 else 0.0
                stopped = control.stop_ordered(self.job_dir) is not None or self._deadline()[0] <= 0
                if stopped or time.monotonic() - started >= patience_s:
                    return attempt.failed(f"ClientError: {error}")
                self.log.mark(f"attempt {attempt.number} cannot start, again in {pause_s:.0f} s: {error}")
                time.sleep(pause_s)
                pause_s = min(pause_s * 2, 30.0)

    def _adopted(self, attempt: Attempt) -> Result:
        """Go on with an attempt whose supervisor died."""
        entry = self.record.attempts[-1]
        if "EndTime" in entry:
            outcome = Outcome(entry["Outcome"])
            attempt.find_files()
            return Result(outcome=outcome, reason=entry.get("Reason", ""))
        if attempt.adopt():
            self.log.mark(f"attempt {attempt.number} taken over by a new supervisor")
            return attempt.watch()
        attempt.clear()
        return attempt.lost("the supervisor died before the hosts were up")

    def _deadline(self) -> tuple[float, Outcome]:
        """Seconds to the nearer of the two limits, and which one it is."""
        condition = self.request.get("StoppingCondition", {})
        run_left = int(condition.get("MaxRuntimeInSeconds", DEFAULT_MAX_RUNTIME_S)) - self.record.running_s()
        wait = condition.get("MaxWaitTimeInSeconds")
        if wait is not None and int(wait) - self.record.age_s() < run_left:
            return int(wait) - self.record.age_s(), Outcome.MAX_WAIT
        return run_left, Outcome.MAX_RUNTIME

    def _wait_for_capacity(self, seconds: float) -> Result | None:
        """Wait for a host; a result when the job ended in the meantime."""
        until = time.monotonic() + seconds
        if seconds > 0:
            self.log.mark(f"waiting {seconds:g} s for capacity")
        while True:
            reason = control.stop_ordered(self.job_dir)
            if reason is not None:
                return Result(outcome=Outcome.STOPPED, reason=reason)
            left_s, outcome = self._deadline()
            if left_s <= 0:
                return Result(outcome=outcome)
            if time.monotonic() >= until:
                return None
            time.sleep(min(POLL_S, max(until - time.monotonic(), 0.01)))

    def _conclude(self, result: Result) -> bool:
        """Upload what the last hosts left and enter the terminal status; True when nothing is left to bring away."""
        self._clear()
        if result.outcome is Outcome.HOST_LOST:
            self.record.fail(f"InternalServerError: {result.reason}")
            return False
        roots = [run.root for run in self.attempt.runs] if self.attempt else []
        if roots:
            self.record.to("Uploading", "Uploading generated training model and output")
            if result.outcome is not Outcome.FAILED:
                model = self._upload("model", [root / "model" for root in roots])
                self.record.value["ModelArtifacts"] = {"S3ModelArtifacts": model}
            output_uri = self._upload("output", [root / "output" / "data" for root in roots])
            self.record.value["Estiba"]["OutputArtifacts"] = output_uri
        if result.outcome is Outcome.FAILED:
            self.record.fail(result.reason)
        elif result.outcome is Outcome.INTERRUPTED:
            # Not a spot job: a lost host is the end, as it is on SageMaker.
            self.record.fail("InternalServerError: the host was lost; EnableManagedSpotTraining would start again")
        else:
            words = {Outcome.COMPLETED: "Training job completed", Outcome.STOPPED: "Training job stopped"}
            self.record.to(result.outcome, words.get(result.outcome, f"Training job stopped: {result.outcome}"))
        self.log.mark(f"{self.record.status}: {self.record.value.get('FailureReason', result.outcome)}")
        return True

    def _upload(self, what: str, folders: list[Path]) -> str:
        started = time.monotonic()
        pause_s = 1.0
        while True:
            try:
                return output.upload(self.request, what, folders, self.job_dir / "scratch")
            except HostError as error:
                if time.monotonic() - started > UPLOAD_PATIENCE_S:
                    raise HostError(f"{what} not uploaded, it stays in {folders[0]}: {error}") from error
                self.log.mark(f"{what} not uploaded, again in {pause_s:.0f} s: {error}")
                time.sleep(pause_s)
                pause_s = min(pause_s * 2, 30.0)

    def _clear(self) -> None:
        """Remove containers and network; before the terminal status, so that a finished job holds nothing."""
        if self.attempt is not None:
            self.attempt.clear()
        self.engine.remove_network(self.name)

    def _forget(self) -> None:
        """The old hosts are gone with all they had; logs stay."""
        if self.attempt and not self.options.keep_hosts:
            for name in self.hosts:
                output.remove_tree(self.attempt.root / name)
        self.attempt = None

    def _tidy(self, files_are_safe: bool) -> None:
        """Leave nothing behind but the files of a job that could not bring them to their place."""
        self._clear()
        if files_are_safe:
            self._forget()
            output.remove_tree(self.job_dir / "scratch")
            if not self.options.keep_hosts:
                output.remove_tree(self.job_dir / "inputs")


def main(job_dir: Path) -> int:
    """Supervise until the end; 0 also when another process does so already."""
    lock = control.hold(job_dir)
    if lock is None:
        return 0
    with lock:
        supervisor = Supervisor(job_dir)
        if supervisor.record.status not in TERMINAL:
            supervisor.run()
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
