"""Should the job stop, and how many seconds are left? One flag for signals, runtime limit and EC2 spot notice."""

from __future__ import annotations

import _thread
import contextlib
import http.client
import json
import os
import signal
import stat
import threading
import time
import urllib.request
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from datetime import UTC, datetime
from types import FrameType
from typing import TypeVar

from estiba.errors import ConfigError, Interrupted

GRACE_S = 120.0
"""Between SIGTERM and SIGKILL on SageMaker (`docker stop -t 120`)."""
SPOT_POLL_S = 5.0
SPOT_NOTICE_S = 120.0
"""EC2 announces a spot interruption at most two minutes ahead."""

# The notice comes from this host's hypervisor, which a proxy from the environment cannot reach.
_direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))


T = TypeVar("T")


class Stop:
    """A flag that signals, clocks and notices set, and that the job polls between steps.

    The first TERM or INT sets the flag. A second one ends the process at once with 128 + signal, since its sender has
    stopped waiting. HUP, which a lost terminal sends, sets the flag too and never ends the process at once.
    """

    def __init__(
        self, *, grace_s: float = GRACE_S, max_runtime_s: float | None = None, spot_notice: bool = False
    ) -> None:
        self.grace_s = grace_s
        self.reason: str | None = None
        self.signum: int | None = None
        self._deadline: float | None = None
        self._asked = False
        self._event = threading.Event()
        self._max_runtime_s = max_runtime_s
        self._runtime_end = None if max_runtime_s is None else time.monotonic() + max_runtime_s
        self._spot_notice = spot_notice
        self.on_thread_start: Callable[[], None] = lambda: None
        """Called in the thread of each action, such as to choose its GPU."""

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] = os.environ) -> Stop:
        """Read ESTIBA_STOP_GRACE_S, ESTIBA_MAX_RUNTIME_S (seconds) and ESTIBA_SPOT_NOTICE=1 (for a plain EC2 host)."""
        return cls(
            grace_s=seconds(environ, "ESTIBA_STOP_GRACE_S") or GRACE_S,
            max_runtime_s=seconds(environ, "ESTIBA_MAX_RUNTIME_S"),
            spot_notice=environ.get("ESTIBA_SPOT_NOTICE", "").lower() in ("1", "true", "yes"),
        )

    def install(self) -> Stop:
        """Handle SIGTERM, SIGINT and SIGHUP of this process, and start the watchers that are enabled."""
        signal.signal(signal.SIGTERM, self._on_signal)
        signal.signal(signal.SIGINT, self._on_signal)
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup ignores it, so that the job outlives its terminal
            signal.signal(signal.SIGHUP, self._on_signal)
        if self._runtime_end is not None:
            self._watch(self._wait_for_runtime_end)
        if self._spot_notice:
            self._watch(self._wait_for_spot_notice)
        return self

    def request(self, reason: str, *, seconds_left: float | None = None, signum: int | None = None) -> None:
        """Set the flag. The first reason is kept."""
        if self._asked:
            return
        self.reason, self.signum = reason, signum
        self._deadline = time.monotonic() + (self.grace_s if seconds_left is None else seconds_left)
        self._asked = True
        # A signal handler runs in the main thread, which may be inside `wait` and hold the event's lock. Setting the
        # event from there would deadlock; another thread can wait until the lock is free.
        with contextlib.suppress(RuntimeError):  # without a new thread, `wait` sees the flag when it times out
            _thread.start_new_thread(self._event.set, ())

    def __call__(self) -> bool:
        """Return whether a stop was requested."""
        return self._asked

    def wait(self, timeout_s: float) -> bool:
        """Sleep until the flag is set, at most `timeout_s`. Returns whether it is set."""
        return self._asked or self._event.wait(timeout_s) or self._asked

    def seconds_left(self) -> float | None:
        """Return the seconds until the process will be killed; None before a stop is requested."""
        return None if self._deadline is None else max(0.0, self._deadline - time.monotonic())

    def unless_stopped(self, action: Callable[[], T], what_is_safe: str) -> T:
        """Run an action that cannot poll the flag, such as loading a model, and abandon it on a stop.

        Raises what the action raised, or Interrupted; its thread then runs until the process ends. An error after the
        stop may be its consequence, as that of a child process that heard it too, and counts as Interrupted.
        """
        future: Future[T] = Future()

        def run() -> None:
            try:
                self.on_thread_start()
                future.set_result(action())
            except BaseException as error:
                future.set_exception(error)

        threading.Thread(target=run, name="estiba-unless-stopped", daemon=True).start()
        while not self():
            try:
                return future.result(timeout=0.1)
            except Exception:
                if not future.done():  # the wait timed out
                    continue
                if future.exception() is None:  # it ended just after the wait
                    return future.result()
                if not self():
                    raise
        raise self.interrupted(what_is_safe)

    def interrupted(self, what_is_safe: str) -> Interrupted:
        """Return the error to raise: why the job stops, and what is safe."""
        return Interrupted(
            f"stopped by {self.reason}: {what_is_safe}; run the same command again to resume", self.signum
        )

    def _on_signal(self, signum: int, _frame: FrameType | None) -> None:
        if signum == signal.SIGHUP:
            _leave_terminal()  # it is gone, and writing to it would fail
            if self._asked:  # the kernel and the shell each send one
                return
        elif self._asked and self.signum not in (None, signal.SIGHUP):
            os._exit(128 + signum)
        name = signal.Signals(signum).name
        # os.write, since a handler may run in the middle of a buffered write
        with contextlib.suppress(OSError):  # a closed log must not fail a step
            text = f"{name} received: finishing, at most {self.grace_s:.0f} s; a second signal ends at once\n"
            os.write(2, text.encode())
        if self._asked:  # the clock or a notice came first; the signal sets the exit status
            self.signum = signum
        self.request(name, signum=signum)

    def _watch(self, target: Callable[[], None]) -> None:
        threading.Thread(target=target, name=f"estiba-{target.__name__.strip('_')}", daemon=True).start()

    def _wait_for_runtime_end(self) -> None:
        assert self._runtime_end is not None and self._max_runtime_s is not None
        # A limit shorter than the grace period must not stop the job before its first step.
        reserve_s = min(self.grace_s, self._max_runtime_s / 2)
        remaining = self._runtime_end - reserve_s - time.monotonic()
        if not self._event.wait(max(0.0, remaining)):
            self.request("the runtime limit", seconds_left=max(0.0, self._runtime_end - time.monotonic()))

    def _wait_for_spot_notice(self) -> None:
        base = os.environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT", "http://169.254.169.254").rstrip("/")
        while not self._event.wait(SPOT_POLL_S):
            if action := _spot_action(base):
                self.request("the EC2 spot notice", seconds_left=_seconds_to(action))


def _leave_terminal() -> None:
    """Send standard output and error to /dev/null where they are a terminal."""
    for descriptor in (1, 2):
        with contextlib.suppress(OSError):
            if stat.S_ISCHR(os.fstat(descriptor).st_mode):
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, descriptor)
                os.close(null)


def _seconds_to(action: str) -> float:
    """Return the seconds until the time in a notice, `{"action": "terminate", "time": "2026-09-18T08:22:00Z"}`."""
    try:
        stop_time = datetime.strptime(json.loads(action)["time"], "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)
        return min(SPOT_NOTICE_S, max(0.0, stop_time.timestamp() - time.time()))
    except (ValueError, KeyError, TypeError):
        return SPOT_NOTICE_S


def _spot_action(base: str) -> str | None:
    """Return the body of `spot/instance-action`, or None while there is none. IMDSv2 requires a token."""
    try:
        token_request = urllib.request.Request(
            f"{base}/latest/api/token", method="PUT", headers={"X-aws-ec2-metadata-token-ttl-seconds": "60"}
        )
        with _direct.open(token_request, timeout=2) as response:
            token = response.read().decode()
        request = urllib.request.Request(
            f"{base}/latest/meta-data/spot/instance-action", headers={"X-aws-ec2-metadata-token": token}
        )
        with _direct.open(request, timeout=2) as response:
            return response.read().decode()
    except (OSError, http.client.HTTPException, ValueError):  # 404 means no notice; other errors are retried
        return None


def seconds(environ: Mapping[str, str], name: str) -> float | None:
    """Return a positive number of seconds from the environment, or None. Raises ConfigError."""
    raw = environ.get(name, "").strip()
    if not raw:
        return None
    try:
        value = float(raw)
    except ValueError:
        value = -1.0
    if not 0 < value < float("inf"):
        raise ConfigError(f"environment variable {name} is {raw!r}: must be a positive number of seconds, such as 120")
    return value
