"""One host's part in staging: read its own pieces from the source, get the others from its peers, and serve them."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from estiba.errors import ConfigError, EstibaError, StoreError, first_line
from estiba.log import get_logger
from estiba.progress import Progress
from estiba.staging.assignments import Assignments
from estiba.staging.files import DiskError, StagedFiles
from estiba.staging.ledger import Ledger
from estiba.staging.peers import Identity, Link, NotYet, OtherVersion, Server, Status
from estiba.staging.pieces import Piece
from estiba.staging.source import Source, SourceChanged

logger = get_logger(__name__)

PEER_FLOWS = 8
"""TCP connections over which pieces arrive from peers, at least; one carries 5 Gbit/s between hosts on EC2."""
PING_S = 1.0
FIRST_PING_S, START_S = 0.1, 10.0
"""Hosts start together, but not at once: in its first seconds a host asks more often whether a peer is there."""
DEAD_AFTER_S = 15.0
"""A host that answered before and is silent for so long is dead."""
REFUSED_AFTER_S = 5.0
"""A host that answered before and whose port has been closed for so long: its process ended."""
ABSENT_AFTER_S = 120.0
"""A host that never answered is given up after so long. Hosts start within minutes of each other."""
NOTHING_TO_DO_S = 5.0
"""A host that has everything already waits so long for others that may want it."""
FAREWELL_S = 5.0
SOURCE_ATTEMPTS = 4
_RETRY_S = 0.5


@dataclass(frozen=True, kw_only=True)
class Group:
    """The hosts that stage together."""

    hosts: tuple[str, ...] = ("localhost",)
    me: int = 0
    port: int = 7799
    job: str = ""
    token: str = ""


@dataclass
class _Peer:
    index: int
    name: str
    seen_at: float | None = None
    refused_since: float | None = None
    is_done: bool = False
    knows_outcome: bool = False
    """It was told that this host is done, or why it failed."""
    failure: str | None = None
    warned: set[str] = field(default_factory=set)


class _OtherListing(StoreError):
    """Hosts see different objects at the source. They exchange no status, so each must find it out."""


class Session:
    """Stages the pieces that `ledger` lacks."""

    def __init__(self, source: Source, files: StagedFiles, ledger: Ledger, group: Group, connections: int) -> None:
        self.source, self.files, self.ledger, self.group, self.connections = source, files, ledger, group, connections
        table = source.table
        self.assignments = Assignments(table, set(ledger.digests), host_count=len(group.hosts), me=group.me)
        self.source_bytes = 0
        self.peer_bytes = 0
        self._identity = Identity.of(
            source=table.source, fingerprint=table.fingerprint, job=group.job, hosts=group.hosts, token=group.token
        )
        self._peers = [_Peer(index, name) for index, name in enumerate(group.hosts) if index != group.me]
        self._had_everything = self.assignments.is_complete
        self._started = time.monotonic()
        self._lock = threading.Lock()
        self._status = Status(host=group.me)
        self._failure: EstibaError | None = None
        self._done_hosts = 0
        self._ending = threading.Event()
        self._news = threading.Event()
        """This host is done or has failed, and its peers are to know now."""
        done_mb = sum(table.pieces[index].size_bytes for index in ledger.digests) / 1e6
        self._progress = Progress(total=round(table.size_bytes / 1e6), unit="staged_mb", done=round(done_mb))

    def run(self, publish: Callable[[], None]) -> None:
        """Get every piece, publish, and serve until the living peers are done. Raises EstibaError."""
        server = self._serve() if self._peers else None
        threads = [self._thread(self._monitor, peer) for peer in self._peers]
        try:
            if self._peers and not self._had_everything:
                self._await_first_contact()
            workers = [self._thread(self._read_source) for _ in range(self.connections)]
            for peer in self._peers:
                workers += [self._thread(self._pull, peer) for _ in range(max(2, -(-PEER_FLOWS // len(self._peers))))]
            for worker in workers:
                worker.join()
            if self._failure is None:
                publish()
                self._set_status(replace(self._status, is_done=True))
                self._serve_until_peers_are_done()
        except EstibaError as error:
            self._fail(error)
        finally:
            self._say_farewell()
            self._ending.set()
            self._news.set()
            for thread in threads:
                thread.join(timeout=1.0)
            if server is not None:
                server.shutdown()
                server.server_close()
            self._progress.close()
        if self._failure is not None:
            raise self._failure

    # --- the source ------------------------------------------------------------------------------------------------

    def _read_source(self) -> None:
        attempts: dict[int, int] = {}
        while self._is_working():
            piece = self.assignments.take(self.group.me)
            if piece is None:
                self.assignments.wait(0.5)
                continue
            try:
                digest = self.files.write(piece, self.source.read(piece))
            except (SourceChanged, DiskError) as error:
                self._fail(error)
                return
            except StoreError as error:
                attempts[piece.index] = attempts.get(piece.index, 0) + 1
                if attempts[piece.index] >= SOURCE_ATTEMPTS:
                    self._fail(error)
                    return
                self.assignments.put_back(piece)
                self._ending.wait(_RETRY_S)
                continue
            self._keep(piece, digest, from_source=True)

    def _keep(self, piece: Piece, digest: bytes, *, from_source: bool) -> None:
        with self._lock:
            try:
                self.ledger.add(piece, digest)
            except StoreError as error:
                self._fail(error)
                return
            if from_source:
                self.source_bytes += piece.size_bytes
            else:
                self.peer_bytes += piece.size_bytes
            self._progress.advance(piece.size_bytes / 1e6)
        self.assignments.hold(piece)

    # --- peers -----------------------------------------------------------------------------------------------------

    def _pull(self, peer: _Peer) -> None:
        link: Link | None = None
        while self._is_working():
            piece = self.assignments.take(peer.index)
            if piece is None:
                self.assignments.wait(0.5)
                continue
            is_held = mismatched = is_away = False
            try:
                link = link or Link(self._address(peer), self._identity)
                expected, chunks = link.piece(piece.index, piece.size_bytes)
                digest = self.files.write(piece, chunks)
                mismatched = digest != expected
                if not mismatched:
                    self._keep(piece, digest, from_source=False)
                    is_held = True
                else:
                    logger.warning(
                        "%s: bytes at %d from %s differ from its digest; they are fetched again",
                        self.source.table.url_of(piece), piece.start, peer.name,
                    )  # fmt: skip
            except NotYet:
                pass
            except DiskError as error:
                self._fail(error)
            except (OSError, OtherVersion, StoreError, ValueError, TypeError):
                if link is not None:
                    link.close()
                link, is_away = None, True
            finally:
                if not is_held:
                    self.assignments.put_back(piece, mismatched=mismatched)
            if is_away:  # only now: others may get the piece meanwhile
                self._ending.wait(_RETRY_S)
        if link is not None:
            link.close()

    def _monitor(self, peer: _Peer) -> None:
        """Exchange status with one peer every second, and decide whether it lives."""
        link: Link | None = None
        has_news = False
        while not self._ending.is_set():
            try:
                link = link or Link(self._address(peer), self._identity)
                mine = self._current_status()
                self._learn(peer, link.exchange(mine), told=mine)
            except NotYet:  # it is busy with another source
                pass
            except OtherVersion:
                self._fail(self._other_version(peer))
            except (OSError, ValueError, TypeError) as error:
                if isinstance(error, ConnectionRefusedError):
                    peer.refused_since = peer.refused_since or time.monotonic()
                if link is not None:
                    link.close()
                link = None
            self._judge(peer)
            is_starting = peer.seen_at is None and time.monotonic() - self._started < START_S
            if self._news.is_set() and not has_news:
                has_news = True  # tell it at once, and then again every second
                continue
            (self._ending if has_news else self._news).wait(FIRST_PING_S if is_starting else PING_S)
        if link is not None:
            link.close()

    def _on_status(self, theirs: Status) -> Status:
        """Answer a peer's status with this host's."""
        mine = self._current_status()
        peer = next((peer for peer in self._peers if peer.index == theirs.host), None)
        if peer is not None:
            self._learn(peer, theirs, told=mine)
            self._judge(peer)
        return mine

    def _learn(self, peer: _Peer, theirs: Status, *, told: Status) -> None:
        peer.seen_at = time.monotonic()
        peer.refused_since = None
        peer.is_done = theirs.is_done
        with self._lock:
            self._done_hosts |= int(theirs.done_hosts, 16) | theirs.is_done << peer.index
        peer.failure = theirs.failure
        if told.is_done or told.failure:
            peer.knows_outcome = True
        self.assignments.set_holdings(peer.index, int(theirs.held, 16))
        if theirs.failure and theirs.is_fatal:
            self._fail(SourceChanged(f"{theirs.failure} ({peer.name} found it)"))

    def _judge(self, peer: _Peer) -> None:
        now = time.monotonic()
        if peer.seen_at is None:
            is_dead = now - self._started > ABSENT_AFTER_S
            reason = f"did not answer for {ABSENT_AFTER_S:.0f} s"
            if not is_dead and now - self._started > DEAD_AFTER_S:
                self._note(peer, f"does not answer yet; it is waited for, at most {ABSENT_AFTER_S:.0f} s")
        else:
            is_gone = peer.refused_since is not None and now - peer.refused_since > REFUSED_AFTER_S
            is_dead = peer.failure is not None or is_gone or now - peer.seen_at > DEAD_AFTER_S
            reason = f"failed: {peer.failure}" if peer.failure else "ended" if is_gone else "is silent"
        if self.assignments.set_dead(peer.index, is_dead) and not peer.is_done and not self._status.is_done:
            if is_dead:
                logger.warning("staging: %s %s; its part is read from the source by the next host", peer.name, reason)
            else:
                logger.info("staging: %s is back", peer.name)

    def _await_first_contact(self) -> None:
        """Give running peers a moment to answer, so that what they hold is not read from the source again."""
        deadline = time.monotonic() + 1.0
        while time.monotonic() < deadline and any(peer.seen_at is None for peer in self._peers):
            self._ending.wait(0.05)

    def _serve_until_peers_are_done(self) -> None:
        while self._failure is None and not self._ending.is_set():
            waiting = [
                peer
                for peer in self._peers
                if peer.index not in self.assignments.dead and not (peer.is_done and peer.knows_outcome)
            ]
            # It left before this host came.
            waiting = [peer for peer in waiting if peer.seen_at or not self._done_hosts >> peer.index & 1]
            if self._had_everything and time.monotonic() - self._started > NOTHING_TO_DO_S:
                waiting = [peer for peer in waiting if peer.seen_at is not None]
            if not waiting:
                return
            self._ending.wait(0.1)

    def _say_farewell(self) -> None:
        """Let the peers learn of a failure now, not when this host's silence is noticed."""
        deadline = time.monotonic() + FAREWELL_S
        while self._failure is not None and time.monotonic() < deadline:
            uninformed = [peer for peer in self._peers if not peer.knows_outcome and peer.seen_at is not None]
            if not isinstance(self._failure, _OtherListing) and not uninformed:
                return
            time.sleep(0.1)

    # --- state -----------------------------------------------------------------------------------------------------

    def _is_working(self) -> bool:
        return self._failure is None and not self.assignments.is_complete

    def _current_status(self) -> Status:
        with self._lock:
            held = self.assignments.held_bits()
            return replace(self._status, held=f"{held:x}", done_hosts=f"{self._done_hosts:x}")

    def _set_status(self, status: Status) -> None:
        with self._lock:
            self._status = status
        self._news.set()

    def _fail(self, error: EstibaError) -> None:
        if self._failure is None:
            self._failure = error
            self._status = replace(self._status, failure=first_line(error), is_fatal=isinstance(error, SourceChanged))
            self._news.set()

    def _other_version(self, peer: _Peer) -> StoreError:
        return _OtherListing(
            f"{self.source.table.source}: this host and {peer.name} see different objects there; they were replaced "
            "while they were staged. Run the same command again on all hosts (and with one ESTIBA_STAGING_TOKEN)"
        )

    def _note(self, peer: _Peer, text: str) -> None:
        if text not in peer.warned:
            peer.warned.add(text)
            logger.warning("staging: %s %s", peer.name, text)

    def _address(self, peer: _Peer) -> tuple[str, int]:
        return peer.name, self.group.port

    def _serve(self) -> Server:
        name = self.group.hosts[self.group.me]
        arguments = (self._identity, self.assignments, self.files, self.ledger.digests, self._on_status)
        try:
            with contextlib.suppress(socket.gaierror):
                return Server((socket.gethostbyname(name), self.group.port), *arguments)
            return Server(("", self.group.port), *arguments)
        except OSError as error:
            raise ConfigError(
                f"{name}: port {self.group.port} cannot be opened ({error.strerror}), over which hosts exchange "
                "what they stage; set ESTIBA_STAGING_PORT to a free one, on all hosts"
            ) from None

    def _thread(self, target: Callable[..., None], *arguments: object) -> threading.Thread:
        def run() -> None:
            try:
                target(*arguments)
            except Exception as error:  # else the others would wait for its piece
                logger.exception("staging: a thread failed")
                self._fail(
                    StoreError(f"{self.files.folder}: staging failed by a fault of its own: {first_line(error)}")
                )

        thread = threading.Thread(target=run, name=f"estiba-stage{target.__name__}", daemon=True)
        thread.start()
        return thread
