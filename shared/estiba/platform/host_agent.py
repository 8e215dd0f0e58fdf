"""The host agent: what each host of a job tells the others once a second, and what it concludes from their silence.

Every agent listens on a TCP port and calls every other host (`agent_addresses`). One exchange is a JSON line each way:
phase, failures, step. No host is central, so any may die. A host is lost after LOST_S without an exchange in either
direction; a shorter cut costs nothing. A host that ended in order is not lost. Messages of another job on the same
network are dropped by their token, which tells jobs apart and is no password.
Standard library only; all threads are daemons.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import signal
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from estiba.errors import RanksLost
from estiba.log import get_logger
from estiba.platform.agent_addresses import Addresses
from estiba.platform.hosts import Hosts, token_of
from estiba.platform.outcomes import CONSEQUENCE, LOST, STOPPED, Failure, first
from estiba.platform.stop import seconds

logger = get_logger("estiba.platform.host_agent")
PORT = 7979
BEAT_S = 1.0
POLL_S = 0.2
LOST_S = 20.0
"""Silence after which a host is lost. With the exchanges' own timeouts it is known to all within 30 s."""
SILENT_S = 6.0
"""Silence that the log mentions."""
CALL_S = 3.0
"""For one connection or answer. A dropped packet is sent again within it; after a cut, a new connection is faster."""
LEAVE_S = 5.0
"""How long a host that has finished waits until all others know."""
SETTLE_S = 2.0
"""How long a host that failed listens for an earlier failure elsewhere, so that all hosts name the same one."""
FROZEN_S = 5.0
"""A gap between two beats of this host's own clock: it stood still itself, so the others' silence proves nothing."""
MAX_BYTES = 65_536
PREPARING, READY, RUNNING, ENDED = "preparing", "ready", "running", "ended"
EXIT_LOST = RanksLost.exit_code
"""Exit status after another host was lost: EX_TEMPFAIL, start again. A bug keeps its own status, a stop has 143."""


@dataclass
class Peer:
    """What this host knows of another one."""

    heard_at: float | None = None
    """Monotonic time of the last exchange; None before the first."""
    heard_time: float = 0.0
    """The same in seconds since 1970."""
    phase: str = ""
    failures: list[Failure] = field(default_factory=list)
    observed: list[Failure] = field(default_factory=list)
    step: int | None = None
    acknowledged: int = -1
    """The newest state of this host that the peer has received."""
    refused_since: float | None = None
    """Since when the peer's machine answers that no agent listens; None while it does not answer so."""
    is_lost: bool = False
    is_mentioned: bool = False


class HostAgent:
    """The agent of one host. Use from PID 1's main thread; its threads only move state."""

    def __init__(
        self,
        hosts: Sequence[str],
        current: str,
        *,
        token: str,
        port: int = PORT,
        lost_s: float = LOST_S,
        first_address: str | None = None,
    ) -> None:
        """`first_address` is where the first host is, if no others' address is known and the names are made up."""
        self.current = current
        self.token = token
        self.lost_s = lost_s
        self.addresses = Addresses(hosts, current, port, first_address=first_address)
        self.peers = {host: Peer() for host in hosts if host != current}
        self._changed = threading.Condition()
        self._version = 0
        self._phase = PREPARING
        self._failures: list[Failure] = []
        self._observed: list[Failure] = []
        self._step: int | None = None
        self._losses: dict[str, Failure] = {}
        self._stood_still_s = 0.0
        self._is_closed = False

    # --- what PID 1 calls ------------------------------------------------------------------------------------------

    def start(self) -> HostAgent:
        """Listen and call the others. Raises OSError if the port is taken."""
        listener = self.addresses.listen()
        # Signals are for the main thread; another one would take them from its sigtimedwait.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            self._run(self._listen, listener)
            for host in self.peers:
                self._run(self._call, host)
            self._run(self._watch)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return self

    def publish(
        self,
        *,
        phase: str | None = None,
        failure: Failure | None = None,
        observed: Sequence[Failure] | None = None,
        step: int | None = None,
    ) -> None:
        """Change what the others are told. `failure` ends them; `observed` only explains other failures."""
        with self._changed:
            before = (self._phase, len(self._failures), self._observed)
            self._phase = phase or self._phase
            if failure is not None:
                self._failures.append(failure)
            if observed is not None:
                self._observed = list(observed)
            self._step = self._step if step is None else step
            if before != (self._phase, len(self._failures), self._observed):
                self._version += 1
                self._changed.notify_all()

    def verdict(self) -> Failure | None:
        """Return why this host must end because of another one; None while all is well."""
        return first(self._ends_of_others())

    def loss(self) -> Failure | None:
        """Return why ranks of another host are gone; None while all are there, or end in order after a stop."""
        return first(failure for failure in self._ends_of_others() if failure.kind != STOPPED)

    def wait_until_heard(self, timeout_s: float) -> list[str]:
        """Wait until every other host was heard once. Returns those that were not."""
        with self._changed:
            self._changed.wait_for(lambda: all(peer.heard_at for peer in self.peers.values()), timeout_s)
            return [host for host, peer in self.peers.items() if peer.heard_at is None]

    def wait_for_all(self, pause: Callable[[float], None], *, wait_s: float, refused_s: float, tell_s: float) -> None:
        """Wait until every other host is ready too. `pause` sleeps and may raise.

        A host that was heard may take any time. Raises TimeoutError, which names the hosts that were never heard within
        `wait_s`. One whose machine answers for `refused_s` that no agent listens has an older image: it is left out.
        """
        self.publish(phase=READY)
        started = told = time.monotonic()
        given_up: set[str] = set()
        while self.verdict() is None:
            now = time.monotonic()
            with self._changed:
                waiting = [host for host, peer in self.peers.items() if peer.phase in ("", PREPARING)]
                silent = [host for host in waiting if self.peers[host].heard_at is None]
                old = {
                    host
                    for host in silent
                    if (since := self.peers[host].refused_since) is not None and now - since >= refused_s
                }
            for host in sorted(old - given_up):
                logger.warning("%s runs no host agent (an older image?); this host starts without watching it", host)
            given_up |= set(self.peers) if self.addresses.depend_on in old else old
            waiting = [host for host in waiting if host not in given_up]
            if not waiting:
                break
            if now - started >= wait_s and set(silent) - given_up:
                raise TimeoutError(", ".join(sorted(set(silent) - given_up)))
            if now - told >= tell_s:
                told = now
                logger.info("waiting for %s to be ready: %.0f s", ", ".join(waiting), now - started)
            pause(POLL_S)
        self.publish(phase=RUNNING)

    def finish(self, failure: Failure | None) -> Failure | None:
        """Tell the others how this host ended, and hear what they have to say. Returns the job's failure, or None.

        Waits for a host that is silent until it is lost, and for the reason of a failure that is only a consequence.
        """
        if failure is not None and failure not in self._failures:
            self.publish(failure=failure)
        self.publish(phase=ENDED)
        started = time.monotonic()
        settled_at = started + (0.0 if failure is None else SETTLE_S)
        patience_s = LEAVE_S if failure is None else self.lost_s + 2 * CALL_S
        while time.monotonic() - started < patience_s:
            with self._changed:
                if first(self._all_failures()) is not None:
                    # Another host's failure may be the consequence of a third one, which is not lost yet.
                    patience_s = self.lost_s + 2 * CALL_S
                listening = [
                    peer
                    for peer in self.peers.values()
                    if peer.heard_at is not None and peer.phase != ENDED and not peer.is_lost
                ]
                is_told = all(peer.acknowledged >= self._version for peer in listening)
                reason = first(self._all_failures())
                is_explained = reason is None or reason.kind != CONSEQUENCE or not listening
                if is_told and is_explained and (time.monotonic() >= settled_at or not listening):
                    break
                self._changed.wait(0.1)
        with self._changed:
            return first(self._all_failures())

    def steps(self) -> dict[str, int]:
        """Return the last reported step of each other host that reported one."""
        with self._changed:
            return {host: peer.step for host, peer in self.peers.items() if peer.step is not None}

    def close(self) -> None:
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def _ends_of_others(self) -> list[Failure]:
        with self._changed:
            told = [failure for peer in self.peers.values() for failure in peer.failures]
            return [*told, *self._losses.values()]

    def _all_failures(self) -> list[Failure]:
        peers = self.peers.values()
        told = [failure for peer in peers for failure in (*peer.failures, *peer.observed)]
        return [*self._failures, *self._observed, *self._losses.values(), *told]

    # --- threads ---------------------------------------------------------------------------------------------------

    def _run(self, target: Callable[..., None], *args: Any) -> None:
        threading.Thread(target=target, args=args, name=f"estiba-agent-{target.__name__}", daemon=True).start()

    def _listen(self, listener: socket.socket) -> None:
        while not self._is_closed:
            with contextlib.suppress(OSError):
                connection, _ = listener.accept()
                self._run(self._answer, connection)

    def _answer(self, connection: socket.socket) -> None:
        """Serve one caller until it leaves or falls silent."""
        with connection, contextlib.suppress(OSError, ValueError):
            connection.settimeout(self.lost_s)
            with connection.makefile("rb") as lines:
                while not self._is_closed and (line := lines.readline(MAX_BYTES)):
                    if not self._hear(line, caller=connection.getpeername()[0]):
                        return
                    connection.sendall(self._state()[0])

    def _call(self, host: str) -> None:
        """Exchange states with one host every BEAT_S, and at once when this host's state changes."""
        peer = self.peers[host]
        while not self._is_closed:
            if (address := self.addresses.of(host)) is None:
                time.sleep(POLL_S)
                continue
            try:
                with socket.create_connection(address, timeout=CALL_S) as connection:
                    connection.settimeout(CALL_S)
                    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    with connection.makefile("rb") as lines:
                        while not self._is_closed:
                            line, version = self._state()
                            connection.sendall(line)
                            if not self._hear(lines.readline(MAX_BYTES)):
                                break
                            with self._changed:
                                peer.acknowledged = max(peer.acknowledged, version)
                                self._changed.notify_all()
                                self._changed.wait_for(lambda seen=version: self._version > seen, BEAT_S)  # type: ignore[misc]
            except ConnectionRefusedError:
                with self._changed:
                    peer.refused_since = peer.refused_since or time.monotonic()
            except (OSError, ValueError):
                peer.refused_since = None
            with self._changed:
                self._changed.wait(BEAT_S)

    def _watch(self) -> None:
        """Look once a second for hosts that fell silent."""
        before = time.monotonic()
        while not self._is_closed:
            time.sleep(BEAT_S / 2)
            now = time.monotonic()
            with self._changed:
                if (gap := now - before) > FROZEN_S:
                    self._stood_still_s = gap
                    for peer in self.peers.values():
                        peer.heard_at = None if peer.heard_at is None else peer.heard_at + gap
                before = now
                for host, peer in self.peers.items():
                    self._judge(host, peer, now)

    def _judge(self, host: str, peer: Peer, now: float) -> None:
        has_left = self._phase == ENDED and not self._failures
        if peer.heard_at is None or peer.phase == ENDED or peer.is_lost or has_left:
            return
        silent_s = now - peer.heard_at
        if silent_s < SILENT_S:
            if peer.is_mentioned:
                logger.info("%s answers again", host)
            peer.is_mentioned = False
        elif silent_s < self.lost_s:
            if not peer.is_mentioned:
                logger.warning("no answer from %s for %.0f s; it is lost after %.0f s", host, silent_s, self.lost_s)
            peer.is_mentioned = True
        else:
            peer.is_lost = True
            watched = [one for one in self.peers.values() if one.heard_at is not None and one.phase != ENDED]
            is_alone = len(watched) > 1 and all(now - (one.heard_at or 0) > SILENT_S for one in watched)
            text = f"lost host {host}: no heartbeat for {silent_s:.0f} s"
            if self._stood_still_s:
                text += f", after this host ({self.current}) had stood still for {self._stood_still_s:.0f} s"
            elif is_alone:
                text += f"; {self.current} hears no other host, so it may be the one that is cut off"
            self._losses[host] = Failure(text=text, host=host, at=peer.heard_time, code=EXIT_LOST, kind=LOST)
            self._failures.append(replace(self._losses[host]))
            self._version += 1
            self._changed.notify_all()
            logger.error("%s", text)

    # --- messages --------------------------------------------------------------------------------------------------

    def _state(self) -> tuple[bytes, int]:
        with self._changed:
            message = {
                "job": self.token,
                "host": self.current,
                "phase": self._phase,
                "failures": [failure.as_dict() for failure in self._failures[-4:]],
                "observed": [failure.as_dict() for failure in self._observed[:4]],
                "step": self._step,
                **self.addresses.message(),
            }
            return json.dumps(message).encode() + b"\n", self._version

    def _hear(self, line: bytes, *, caller: str | None = None) -> bool:
        """Note another host's state. Returns False for a message that is not from this job."""
        if not line:
            return False
        message = json.loads(line)
        if not isinstance(message, dict) or not hmac.compare_digest(str(message.get("job")), self.token):
            return False
        peer = self.peers.get(str(message.get("host")))
        if peer is None:
            return False
        with contextlib.suppress(TypeError, KeyError, AttributeError):
            self.addresses.learn(str(message["host"]), message, caller)
            failures = [Failure.from_dict(one) for one in message["failures"]]
            observed = [Failure.from_dict(one) for one in message["observed"]]
            with self._changed:
                peer.heard_at, peer.heard_time, peer.refused_since = time.monotonic(), time.time(), None
                peer.phase, peer.failures, peer.observed = str(message["phase"]), failures, observed
                peer.step = message["step"] if isinstance(message.get("step"), int) else None
                self._changed.notify_all()
        return True


def start_agent(hosts: Hosts, environ: Mapping[str, str]) -> HostAgent | None:
    """Start this host's agent if the job has several hosts that can reach each other. Raises ConfigError."""
    if len(hosts.names) == 1 or environ.get("ESTIBA_HOST_AGENT") == "0":
        return None
    if not hosts.are_names_reachable and hosts.main_address is None:
        logger.warning("%s tells no host's address, so hosts do not watch each other", hosts.source)
        return None
    port = int(seconds(environ, "ESTIBA_AGENT_PORT") or PORT)
    lost_s = seconds(environ, "ESTIBA_HOST_LOST_S") or LOST_S
    first_address = None if hosts.are_names_reachable else hosts.main_address
    token = token_of(environ, hosts.names)
    agent = HostAgent(hosts.names, hosts.current, token=token, port=port, lost_s=lost_s, first_address=first_address)
    try:
        return agent.start()
    except OSError as error:
        logger.warning("port %d of the host agent: %s; this host does not watch the others", port, error)
        return None


def stopped(signal_name: str, host: str) -> Failure:
    """What a host tells the others that was asked to stop."""
    return Failure(text=f"{signal_name} on {host}", host=host, at=time.time(), code=143, kind=STOPPED)
