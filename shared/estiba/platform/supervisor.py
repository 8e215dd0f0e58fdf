"""The child of PID 1: start it, forward signals, enforce the deadline, explain how it ended. Standard library only."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path

from estiba.errors import ConfigError
from estiba.log import get_logger
from estiba.platform.failure import (
    SHOWN_CHARACTERS,
    cause_of,
    install_error,
    read_failure,
    script_wrote_failure,
    toolkit_exit_code,
    write_failure,
)
from estiba.platform.host_agent import EXIT_LOST, HostAgent, stopped
from estiba.platform.outcomes import LOST, STOPPED, Failure, kind_of
from estiba.platform.process_tree import LimitHits, descendants, has_children, next_signal, reap, receivers
from estiba.platform.staged_channels import channel_environment
from estiba.platform.steps import StepWatch

logger = get_logger("estiba.platform.entry")
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
STOPPING = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT})
RESERVE_S = 4.0
"""The part of the grace period reserved for killing remaining processes and writing the failure file."""
TAIL_BYTES = 16_384
AGENT_POLL_S = 0.5
LOST_FILE = "ESTIBA_LOST_FILE"
"""Names the file that says why ranks of another host are gone. A rank that waits for them in a collective cannot handle
SIGTERM."""
WATCHED = "ESTIBA_HOSTS_WATCHED"
"""Tells the ranks that PID 1 watches the other hosts. It has no agent if it knows of no others."""
_PR_SET_CHILD_SUBREAPER = 36
CHILD_ENVIRONMENT = {"GOMP_SPINCOUNT": "3000"}
"""Defaults for the child's environment.

By default idle OpenMP threads spin 300,000 times before they sleep. With another job on the same cores a training step
then takes nine times as long; 3,000 spins cost nothing measurable (2 cores, brain-to-text: 160 trials/s alone and 59
beside another job; by default 155 and 16).
"""


@dataclass(frozen=True)
class Command:
    argv: tuple[str, ...]
    is_toolkit: bool = False
    is_workload: bool = False


class Supervisor:
    """Runs one child in its own process group until it ends."""

    poll_s = 60.0

    def __init__(
        self,
        command: Command,
        failure_path: Path,
        grace_s: float,
        *,
        environ: Mapping[str, str] | None = None,
        folder: Path | None = None,
        agent: HostAgent | None = None,
        steps: StepWatch | None = None,
    ) -> None:
        """`environ` None is this process's environment, `folder` None its working directory, `agent` None one host."""
        self.agent = agent
        self.steps = steps
        self.host = agent.current if agent is not None else ""
        self.failure: Failure | None = None
        """This host's own failure; None while there is none."""
        self.verdict: Failure | None = None
        """Why another host ended this one; None if none did."""
        self.command = command
        self.failure_path = failure_path
        self.stop_s = max(1.0, grace_s - RESERVE_S)
        self.environ = {**(os.environ if environ is None else environ), **({WATCHED: "1"} if agent is not None else {})}
        self.folder = folder
        self._child = 0
        self._status: int | None = None
        """The child's wait status, once it has ended."""
        self._stopping: signal.Signals | None = None
        self._deadline = float("inf")
        self._killed = False
        self._was_told = False
        self._tail = bytearray()
        self._is_writing = False
        self._limits_before = LimitHits.read()

    def run(self) -> int:
        """Run the child to its end. Returns the exit status. Raises ConfigError if the child cannot start."""
        # Outside a container this is not PID 1, and orphans reach it only as a subreaper.
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        handled = {*FORWARDED, signal.SIGCHLD}
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # if inherited as ignored, no exit status arrives
        signal.pthread_sigmask(signal.SIG_BLOCK, handled)
        child, pump = self._start()
        self._child = child.pid
        while not self._has_ended():
            poll_s = self.poll_s if self.agent is None else min(self.poll_s, AGENT_POLL_S)
            wait_s = max(0.0, min(poll_s, self._deadline - time.monotonic()))
            signum = next_signal(handled, wait_s)
            if signum is not None and signum != signal.SIGCHLD:
                self._forward(signum)
            elif time.monotonic() >= self._deadline and not self._killed:
                self._kill()
            for pid, ended in reap():
                if pid == child.pid:
                    self._status = ended
            self._watch()
        if pump is not None:
            self._drain(pump)
        assert self._status is not None
        code = self._explain(os.waitstatus_to_exitcode(self._status))
        return code if self.agent is None else self._explain_with_others(code)

    def _has_ended(self) -> bool:
        return self._status is not None and not (self._stopping and not self._killed and has_children())

    def _watch(self) -> None:
        """Called after every signal and every `poll_s`: end with the other hosts, and when no step is made."""
        if self._status is not None:
            return
        if self._stopping is not None:
            if self.agent is not None and (loss := self.agent.loss()) is not None:  # while all save together
                self._tell_ranks(loss)
            return
        if self.agent is not None and (verdict := self.agent.verdict()) is not None:
            self._stop_for(verdict)
        elif self.steps is not None and (silent_s := self.steps.look()) is not None:
            self._stop_for_own(self._stall(self.steps, silent_s))
        if self.agent is not None and self.steps is not None:
            self.agent.publish(step=self.steps.step)

    def _stall(self, watch: StepWatch, silent_s: float) -> Failure:
        steps = {self.host: watch.step or 0, **(self.agent.steps() if self.agent is not None else {})}
        behind = [host for host, step in steps.items() if step == min(steps.values())]
        where = f"; the furthest behind: {', '.join(behind)}" if len(set(steps.values())) > 1 else ""
        text = (
            f"stalled: no step for {silent_s:.0f} s after step {watch.step}, "
            f"of which one takes {watch.median_s:.3g} s{where}"
        )
        return Failure(text=text, host=self.host, at=time.time())

    def _stop_for_own(self, failure: Failure) -> None:
        """Stop because of a failure that is seen from here while the child still runs."""
        self.failure = failure
        if self.agent is not None:
            self.agent.publish(failure=failure)
        self._stop_for(failure)

    def _stop_for(self, verdict: Failure) -> None:
        logger.error("stopping, since %s", describe(verdict))
        self.verdict = verdict
        if verdict.kind != STOPPED:  # a stop alone takes no ranks away: all of them save together
            self._tell_ranks(verdict)
        self._forward(signal.SIGTERM)

    def _tell_ranks(self, loss: Failure) -> None:
        path = Path(self.environ.get(LOST_FILE, ""))
        if path.name and not path.exists():
            tell_ranks(path, loss)

    def _start(self) -> tuple[subprocess.Popen[bytes], threading.Thread | None]:
        terminal = 0 if os.isatty(0) else None

        def prepare() -> None:
            os.setpgid(0, 0)
            if terminal is not None:  # the terminal then sends Ctrl-C to the child's group directly
                with contextlib.suppress(OSError):
                    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTTOU})
                    os.tcsetpgrp(terminal, os.getpid())
            signal.pthread_sigmask(signal.SIG_SETMASK, set())

        # On a terminal the child writes directly. Any other stderr is piped through here, to keep its last lines.
        keeps_tail = not os.isatty(2)
        try:
            child = subprocess.Popen(
                self.command.argv,
                stderr=subprocess.PIPE if keeps_tail else None,
                preexec_fn=prepare,
                env={**CHILD_ENVIRONMENT, **self.environ},
                cwd=self.folder,
            )
        except FileNotFoundError:
            raise CommandError(
                f"command {self.command.argv[0]!r} is not in this image; check its spelling", 127
            ) from None
        except (PermissionError, OSError) as error:
            reason = self._limit_reached() or str(error)
            raise CommandError(f"command {self.command.argv[0]!r} cannot be started: {reason}", 126) from None
        if child.stderr is None:
            return child, None
        pump = threading.Thread(target=self._pump, args=(child.stderr.fileno(),), name="estiba-stderr", daemon=True)
        try:
            pump.start()
        except RuntimeError as error:
            child.kill()
            reason = self._limit_reached() or str(error)
            raise CommandError(f"a thread for the log cannot be started: {reason}", 126) from None
        return child, pump

    def _pump(self, source: int) -> None:
        while chunk := os.read(source, 65536):
            self._tail = (self._tail + chunk)[-TAIL_BYTES:]
            self._is_writing = True
            with contextlib.suppress(OSError):
                while chunk:
                    chunk = chunk[os.write(2, chunk) :]
            self._is_writing = False

    def _drain(self, pump: threading.Thread) -> None:
        """Write the child's last lines. Waits for a slow reader, as the child would; a stop ends the wait."""
        pump.join(timeout=1.0)
        while pump.is_alive() and self._is_writing and not self._stopping and not signal.sigpending() & STOPPING:
            pump.join(timeout=0.2)

    def _forward(self, signum: signal.Signals) -> None:
        if signum in STOPPING:
            if self._stopping is None:
                self._stopping = signum
                self._deadline = time.monotonic() + self.stop_s
                if self.agent is not None and self.verdict is None:
                    self.agent.publish(failure=stopped(signum.name, self.agent.current))
            elif self.verdict is not None and not self._was_told:
                # The platform stops all hosts. The processes have heard it; a second signal would end them at once.
                self._was_told = True
                return
        for pid in self._receivers():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signum)

    def _receivers(self) -> list[int]:
        return receivers(self._child, self.command.is_toolkit)

    def _kill(self) -> None:
        self._killed = True
        self._deadline = float("inf")  # a process that survives this (a stuck driver) is waited for without polling
        logger.info("killed processes that were still running %.0f s after the signal", self.stop_s)
        for pid in descendants(os.getpid()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _explain(self, code: int) -> int:
        """Write the failure file for a child's return code. Returns the exit status."""
        written = read_failure(self.failure_path)
        tail = self._tail.decode("utf-8", "replace")
        if self.command.is_toolkit and code != 0 and written is not None:
            code = toolkit_exit_code(written) or toolkit_exit_code(tail) or code
        was_killed = code < 0
        if was_killed:
            code = 128 - code
        if code == 0:
            return 0
        limit = self._limit_reached()
        is_explained = written is not None and (not self.command.is_toolkit or script_wrote_failure(tail))
        cause = None if is_explained else self._cause(code)
        if cause and written and not self._stopping:
            cause = install_error(written, tail) or cause
        if limit or (was_killed and not self._stopping):
            logger.error("%s", limit or cause)  # what is killed cannot log why
        if limit or not is_explained:
            write_failure(self.failure_path, "\n\n".join(filter(None, [limit, cause, (written or "").strip()])))
        return code

    def _explain_with_others(self, code: int) -> int:
        """Explain the end of a workload that needs the other hosts. Returns the exit status."""
        assert self.agent is not None
        own = self.failure
        if code and self.verdict is None and self._stopping is None:
            line = (read_failure(self.failure_path) or f"exit code {code}").strip().splitlines()[0]
            own = Failure(
                text=line[:SHOWN_CHARACTERS],
                host=self.agent.current,
                at=time.time(),
                code=code,
                kind=STOPPED if code in (128 + signal.SIGTERM, 128 + signal.SIGINT) else kind_of(line),
            )
        reason = self.agent.finish(own)
        is_own = reason is not None and reason.host == self.agent.current and reason.kind != LOST
        if reason is None or (is_own and self.failure is None):
            return code
        written = (read_failure(self.failure_path) or "").strip()
        write_failure(self.failure_path, "\n\n".join(filter(None, [describe(reason), written])))
        return code_for(reason)

    def _limit_reached(self) -> str | None:
        return None if self._stopping else LimitHits.read().since(self._limits_before)

    def _cause(self, code: int) -> str:
        what = "the script" if self.command.is_toolkit else " ".join(self.command.argv[:3])
        last_line = cause_of(self._tail.decode("utf-8", "replace"))
        if self._killed:
            return f"{what} did not stop within {self.stop_s:.0f} s of {self._stopping.name}: killed"  # type: ignore[union-attr]
        if self._stopping is not None:
            return f"stopped by {self._stopping.name}: {what} ended with {code}"
        if code > 128:
            with contextlib.suppress(ValueError):
                return f"{what} was killed by {signal.Signals(code - 128).name}" + (
                    f": {last_line}" if last_line else ""
                )
        return (
            f"{last_line}\n({what} ended with exit code {code})" if last_line else f"{what} ended with exit code {code}"
        )


def tell_ranks(path: Path, loss: Failure) -> None:
    """Write ESTIBA_LOST_FILE, whole or not at all."""
    with contextlib.suppress(OSError):
        new = path.with_name(f"{path.name}.new")
        new.write_text(describe(loss))
        os.replace(new, path)


def describe(failure: Failure) -> str:
    """Return one line that says what failed, and where."""
    if failure.kind == LOST:
        return failure.text
    if failure.kind == STOPPED:
        return f"stopped by {failure.text}"
    place = f", {failure.place}" if failure.place else ""
    return f"{failure.text} ({failure.who}{place})"


def code_for(failure: Failure) -> int:
    """Return the exit status of a host that ends because of another one's failure."""
    if failure.kind == LOST:
        return EXIT_LOST
    return 128 + signal.SIGTERM if failure.kind == STOPPED else failure.code or 1


def stage_command(environ: MutableMapping[str, str]) -> Command | None:
    """Return the command that stages the channels of ESTIBA_STAGE_<CHANNEL>; None if there are none.

    The variables that name the channels' directories are added to `environ`. Raises ConfigError.
    """
    channels = channel_environment(environ)
    if not channels:
        return None
    environ.update(channels)
    return Command((sys.executable, "-m", "estiba.staging.channels"))


def run_staged(command: Command, environ: MutableMapping[str, str], failure_path: Path, grace_s: float) -> int:
    """Stage channels, if the request asks for it, and run a command. Returns the exit status. Raises ConfigError."""
    for each in filter(None, [stage_command(environ), command]):
        if code := Supervisor(each, failure_path, grace_s).run():
            return code
    return 0


class CommandError(ConfigError):
    """A command that could not be started. The exit code is 126 or 127, as from a shell."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code
