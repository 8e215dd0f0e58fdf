"""The supervisor of a user's script, which may be any pile of shells, starters and ranks.

Three things differ from a workload. TERM goes to the ranks (`ranks.py`). Exit statuses that `| tee` and os.system
swallow count (`outcomes.py`). What the script leaves running does not hold the job open, unless it has a rank.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path

from estiba.platform.failure import SHOWN_CHARACTERS, cause_of, read_failure, write_failure
from estiba.platform.host_agent import HostAgent
from estiba.platform.outcomes import CONSEQUENCE, ERROR, STOPPED, Failure, Outcomes, first, kind_of
from estiba.platform.process_tree import descendants, parents
from estiba.platform.ranks import program_processes, rank_processes
from estiba.platform.steps import StepWatch
from estiba.platform.supervisor import Command, Supervisor, code_for, describe, logger

ALONE_S = 0.5
"""Python's own helpers, such as multiprocessing's resource tracker, end by themselves within this time."""
HELPER_S = 10.0
"""Between TERM and KILL for what a script left running."""
FAILED_RANK_S = 60.0
"""How long a script of several hosts may run on after one of its ranks failed and was not started again."""


class ScriptSupervisor(Supervisor):
    """Runs one script in the code directory."""

    poll_s = 0.5

    def __init__(
        self,
        command: Command,
        failure_path: Path,
        grace_s: float,
        *,
        environ: Mapping[str, str],
        code: Path,
        outcomes: Outcomes,
        steps: StepWatch,
        hosts: int = 1,
        agent: HostAgent | None = None,
    ) -> None:
        super().__init__(command, failure_path, grace_s, environ=environ, folder=code, agent=agent, steps=steps)
        self._failed_since: float | None = None
        self.code = code
        self.outcomes = outcomes
        self.host = outcomes.host
        self.hosts = hosts
        self._signalled: dict[int, bool] = {}
        """The processes that got the signal, and whether each is a rank."""
        self._ended_at: float | None = None
        self._helpers_end_at: float | None = None

    # --- stopping --------------------------------------------------------------------------------------------------

    def _forward(self, signum: signal.Signals) -> None:
        if signum in (signal.SIGTERM, signal.SIGINT):
            self.outcomes.note_stop()
        super()._forward(signum)

    def _receivers(self) -> list[int]:
        if ranks := rank_processes(self.outcomes.living_ranks()):
            found = dict.fromkeys(ranks, True)
        else:
            found = dict.fromkeys(program_processes(self._child, self.code), False)
        if self._stopping:
            self._signalled |= found
        return list(found)

    def _watch(self) -> None:
        super()._watch()
        if self._stopping is None and self._status is None:
            self._look_for_trouble()
        if self._stopping and self._status is None and not self._killed:
            # A wrapper may start its next stage once a save is complete. That must not train.
            for pid in rank_processes(self.outcomes.living_ranks()):
                if pid not in self._signalled:
                    self._signalled[pid] = True
                    _send(pid, self._stopping)
        if self._status is not None:
            self._end_helpers()

    def _look_for_trouble(self) -> None:
        """Tell the other hosts of failed ranks, and stop a script that lost one and does not end."""
        if self.agent is None:
            return
        errors, now = self._errors(), time.monotonic()
        self.agent.publish(observed=errors)
        self._failed_since = (self._failed_since or now) if errors else None
        if self._failed_since is not None and now - self._failed_since > FAILED_RANK_S:
            self._stop_for_own(errors[0])

    def _has_ended(self) -> bool:
        return self._status is not None and not self._left()

    def _left(self) -> list[int]:
        tree = parents()
        return [pid for pid in descendants(os.getpid(), tree) if pid in tree]

    def _end_helpers(self) -> None:
        """The script has ended; end what it left running. Ranks are no helpers: the job waits for them."""
        if rank_processes(self.outcomes.living_ranks()) and not self._killed:
            return
        left = self._left()
        if not left:
            return
        now = time.monotonic()
        if self._ended_at is None:
            self._ended_at = now
        elif self._helpers_end_at is None and now >= self._ended_at + ALONE_S:
            self._helpers_end_at = now + HELPER_S
            logger.info("the script has ended; processes that it left running get TERM, then KILL: %d", len(left))
            for pid in left:
                _send(pid, signal.SIGTERM)
        elif self._helpers_end_at is not None and now >= self._helpers_end_at:
            for pid in left:
                _send(pid, signal.SIGKILL)

    # --- the end ---------------------------------------------------------------------------------------------------

    def _explain(self, code: int) -> int:
        """Find out how the script ended and write the failure file. Returns the exit status."""
        code = 128 - code if code < 0 else code
        limit = self._limit_reached()
        if self._stopping is None:
            self.failure = self._own_failure(code)
            code = self.failure.code if self.failure is not None and code == 0 else code
        else:
            code = self._code_after_stop(code)
        if self.agent is not None:
            self.agent.publish(observed=self._errors())
            reason = self.agent.finish(self.failure)
        else:
            reason = self.failure
        self._log_end(reason, limit)
        if self._stopping is not None and (reason is None or reason.kind == STOPPED):
            return self._write_stop(code, reason)
        if reason is None:
            return code
        is_own = reason == self.failure and self.verdict is None
        self._write_failure(code, reason, limit, is_own=is_own)
        return code if is_own else code_for(reason)

    def _explain_with_others(self, code: int) -> int:
        return code  # `_explain` has asked them

    def _own_failure(self, code: int) -> Failure | None:
        if code == 0:
            return first(self.outcomes.hidden_failures())
        found = first(self.outcomes.failures())
        # A launcher's own error says less than the log's last exception.
        is_launchers = found is None or (found.kind == CONSEQUENCE and found.rank is None)
        return self._unrecorded(code) if is_launchers else found

    def _errors(self) -> list[Failure]:
        """What programs raised by themselves, and not because others were gone or because they were told to stop."""
        return [failure for failure in self.outcomes.failed_ranks() if failure.kind == ERROR]

    def _code_after_stop(self, code: int) -> int:
        assert self._stopping is not None
        if self._child in self._signalled:
            return code
        # A wrapper, whose own status says nothing about the ranks.
        is_complete = code == 0 and all(self.outcomes.ended_well(pid) for pid in self._signalled)
        return code if is_complete or self._killed else 128 + self._stopping

    def _log_end(self, reason: Failure | None, limit: str | None) -> None:
        if limit is not None:
            logger.error("%s", limit)
        elif reason is not None and self._stopping is None:
            logger.error("the script failed: %s", describe(reason))

    def _write_stop(self, code: int, reason: Failure | None) -> int:
        """Write why the script was stopped, unless it ended with 0 or wrote it itself. Returns the exit status."""
        assert self._stopping is not None
        is_elsewhere = reason is not None and self.verdict is not None
        if code and read_failure(self.failure_path) is None:
            by = describe(reason) if is_elsewhere and reason is not None else f"stopped by {self._stopping.name}"
            if self._killed:
                by = by.replace("stopped by ", "", 1)
                text = f"the script did not stop within {self.stop_s:.0f} s of {by}: killed"
            else:
                text = f"{by}: the script ended with {code}"
            error = first(self._errors())
            write_failure(self.failure_path, "\n".join([text, *([self._line(error)] if error else [])]))
        return code

    def _write_failure(self, code: int, reason: Failure, limit: str | None, *, is_own: bool) -> None:
        written = (read_failure(self.failure_path) or "").strip()
        if written and is_own and limit is None:
            return  # the script explained it
        ended = f"(the script ended with exit code {code})"
        if not is_own and self._killed:
            ended = f"(the script was killed {self.stop_s:.0f} s after it was told to stop)"
        text = "\n".join([self._line(reason), ended])
        write_failure(self.failure_path, "\n\n".join(filter(None, [limit, text, written])))

    def _unrecorded(self, code: int) -> Failure:
        """The failure of a script whose programs recorded nothing, such as a shell's."""
        line = cause_of(self._tail.decode("utf-8", "replace"))
        text = line or f"the script ended with exit code {code}"
        if code > 128:
            with contextlib.suppress(ValueError):
                text = f"the script was killed by {signal.Signals(code - 128).name}" + (f": {line}" if line else "")
        return Failure(
            text=text[:SHOWN_CHARACTERS], host=self.outcomes.host, at=time.time(), code=code, kind=kind_of(text)
        )

    def _line(self, failure: Failure) -> str:
        return failure.text if failure.rank is None and self.hosts == 1 else describe(failure)


def _send(pid: int, signum: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, signum)
