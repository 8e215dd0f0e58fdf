"""Which host fetches which piece from the source, and from whom this host gets the others.

A piece's owner is its number modulo the hosts. Where the owner is dead, the next living host takes its place. Hosts may
disagree for a while about who is dead: a piece's chain of hosts ends at one that takes itself for the fetcher, so a
disagreement costs a second read of the source and never a wait without end.

Sets of pieces are the bits of a number: a table of 100,000 pieces is 12 KB.
"""

from __future__ import annotations

import threading

from estiba.staging.pieces import Piece, PieceTable

MISMATCHES = 2
"""After so many copies with a wrong digest a piece is read from the source."""


class Assignments:
    """The state of each piece on this host. Thread-safe."""

    def __init__(self, table: PieceTable, held: set[int], *, host_count: int, me: int) -> None:
        self.table, self.me, self.host_count = table, me, host_count
        self.changed = threading.Condition()
        self.dead: set[int] = set()
        self._held = sum(1 << index for index in held)
        self._all = (1 << len(table.pieces)) - 1
        self._missing = self._all & ~self._held
        """Neither held nor being fetched."""
        self._from_source = 0
        """Peers sent these with wrong digests."""
        self._mismatches: dict[int, int] = {}
        self._owned = [0] * host_count
        for piece in table.pieces:
            self._owned[table.owner(piece, host_count)] |= 1 << piece.index
        self._holdings = [0] * host_count

    @property
    def is_complete(self) -> bool:
        return self._held == self._all

    def held_bits(self) -> int:
        with self.changed:
            return self._held

    def take(self, host: int) -> Piece | None:
        """Return the next piece to get from a host (from the source, if it is this one), or None for now."""
        with self.changed:
            wanted = self._missing & self._wanted_from(host)
            if not wanted:
                return None
            lowest = wanted & -wanted
            self._missing &= ~lowest
            return self.table.pieces[lowest.bit_length() - 1]

    def wait(self, timeout_s: float) -> None:
        """Wait until something may have changed."""
        with self.changed:
            if not self.is_complete:
                self.changed.wait(timeout_s)

    def put_back(self, piece: Piece, *, mismatched: bool = False) -> None:
        """Offer a piece again that could not be had."""
        with self.changed:
            self._missing |= 1 << piece.index
            if mismatched:
                count = self._mismatches[piece.index] = self._mismatches.get(piece.index, 0) + 1
                if count >= MISMATCHES:
                    self._from_source |= 1 << piece.index
            self.changed.notify_all()

    def hold(self, piece: Piece) -> None:
        """A piece is on the disk, and its digest is known."""
        with self.changed:
            self._held |= 1 << piece.index
            self.changed.notify_all()

    def wait_held(self, index: int, timeout_s: float) -> bool:
        """Wait for a piece. Returns whether it is held."""
        with self.changed:
            return self.changed.wait_for(lambda: bool(self._held >> index & 1), timeout_s)

    def set_holdings(self, host: int, bits: int) -> None:
        """Learn which pieces a peer holds."""
        with self.changed:
            if bits != self._holdings[host]:
                self._holdings[host] = bits
                self.changed.notify_all()

    def set_dead(self, host: int, is_dead: bool) -> bool:
        """Learn whether a peer lives. Returns whether that is news."""
        with self.changed:
            if is_dead == (host in self.dead):
                return False
            (self.dead.add if is_dead else self.dead.discard)(host)
            self.changed.notify_all()
            return True

    def _wanted_from(self, host: int) -> int:
        """Return the pieces to get from a host; from a peer, what it is known to hold before what it is to fetch."""
        if host in self.dead:
            return 0
        fetched = 0
        for owner, bits in enumerate(self._owned):
            if self._fetcher(owner) == host:
                fetched |= bits
        if host == self.me:  # what a peer holds comes from there: this host is late, or was started again
            return fetched & ~self._held_by_peers() | self._from_source
        from_peers = self._missing & ~self._from_source
        return from_peers & self._holdings[host] or from_peers & fetched

    def _fetcher(self, owner: int) -> int:
        ring = ((owner + step) % self.host_count for step in range(self.host_count))
        return next(host for host in ring if host == self.me or host not in self.dead)

    def _held_by_peers(self) -> int:
        held = 0
        for host, bits in enumerate(self._holdings):
            if host != self.me and host not in self.dead:
                held |= bits
        return held
