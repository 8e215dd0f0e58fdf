"""Who fetches which piece: every piece has a reader in every view of who is dead, and no host is asked in vain."""

from __future__ import annotations

import itertools

from estiba.staging.assignments import Assignments
from estiba.staging.pieces import PieceTable
from estiba.storage import Entry

TABLE = PieceTable("s3://b/m", [Entry("x", 1200, "etag")], piece_bytes=100)


def view(me: int, hosts: int, dead: frozenset[int] = frozenset(), held: set[int] | None = None) -> Assignments:
    assignments = Assignments(TABLE, held or set(), host_count=hosts, me=me)
    for host in dead:
        assignments.set_dead(host, True)
    return assignments


def taken(assignments: Assignments, host: int) -> list[int]:
    found = []
    while (piece := assignments.take(host)) is not None:
        found.append(piece.index)
    return found


def test_each_piece_is_read_from_the_source_by_one_host() -> None:
    read = [taken(view(me, 3), me) for me in range(3)]
    assert sorted(itertools.chain(*read)) == list(range(12))
    assert {len(pieces) for pieces in read} == {4}


def test_every_piece_has_a_reader_whatever_each_host_believes_about_the_others() -> None:
    """Host 3 is dead; the living may or may not know it, and may wrongly take each other for dead."""
    beliefs = [frozenset(dead) for size in range(4) for dead in itertools.combinations(range(4), size)]
    for first, second, third in itertools.product(beliefs, repeat=3):
        views = [dead - {me} for me, dead in enumerate((first, second, third))]
        if any(3 not in dead for dead in views):
            continue  # silence makes it known to all in the end
        read = set(itertools.chain(*(taken(view(me, 4, dead), me) for me, dead in enumerate(views))))
        assert read == set(range(12))


def test_the_next_living_host_reads_a_dead_ones_pieces() -> None:
    assert taken(view(0, 3, frozenset({2})), 0) == [0, 2, 3, 5, 6, 8, 9, 11]
    assert taken(view(1, 3, frozenset({2})), 0) == [0, 2, 3, 5, 6, 8, 9, 11]
    assert taken(view(1, 3, frozenset({2})), 1) == [1, 4, 7, 10]


def test_what_a_peer_holds_is_not_read_from_the_source() -> None:
    late = view(0, 3)
    late.set_holdings(1, 0b1001)
    assert taken(late, 0) == [6, 9]
    assert taken(late, 1)[:2] == [0, 3]


def test_a_dead_host_is_asked_for_nothing_even_if_it_held_everything() -> None:
    assignments = view(0, 3)
    assignments.set_holdings(1, 2**12 - 1)
    assignments.set_dead(1, True)
    assert taken(assignments, 1) == []
    assert taken(assignments, 0) == [0, 3, 6, 9]
    assert taken(assignments, 2) == [1, 2, 4, 5, 7, 8, 10, 11]


def test_a_piece_that_came_wrong_twice_is_read_from_the_source() -> None:
    assignments = view(0, 2)
    for _ in range(2):
        piece = assignments.take(1)
        assert piece is not None and piece.index == 1
        assignments.put_back(piece, mismatched=True)
    assert 1 in taken(assignments, 0)
    assert 1 not in taken(assignments, 1)


def test_held_pieces_are_wanted_from_nobody() -> None:
    everything = view(0, 2, held=set(range(12)))
    assert everything.is_complete
    assert taken(everything, 0) == taken(everything, 1) == []
