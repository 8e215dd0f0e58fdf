"""Finished work verifies on every load; damaged work is quarantined, and the previous chunk is used."""

from __future__ import annotations

import os
import signal
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import xxhash

from estiba.checkpoint import ChunkStore, Ledger, digest_of, exclusive
from estiba.errors import CheckpointError, StoreError
from estiba.storage import FileStore, Store, open_store

DATA = bytes(range(256)) * 64  # four pages


@pytest.fixture(params=["file", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "file":
        return FileStore(tmp_path / "store")
    request.getfixturevalue("s3")
    return open_store(f"s3://estiba/{uuid.uuid4().hex}")


def names(store: Store) -> list[str]:
    return [entry.path for entry in store.list()]


# --- chunks -------------------------------------------------------------------------------------------------------


def test_a_committed_chunk_loads_by_its_key(store: Store) -> None:
    chunks = ChunkStore(store, "done/pieces")
    name = chunks.commit("a b/0001.ñ", DATA)
    assert name == f"done/pieces/a b/0001.ñ.{xxhash.xxh3_128_hexdigest(DATA)}.piece"
    for found in (chunks, ChunkStore(store, "done/pieces"), ChunkStore(store, "/done/pieces/")):
        assert "a b/0001.ñ" in found
        assert "a b" not in found
        assert found.load("a b/0001.ñ") == DATA
        assert found.load("absent") is None
    assert ChunkStore(store, "done/pieces", listed=False).load("a b/0001.ñ") is None


def test_an_empty_chunk_is_a_chunk(store: Store) -> None:
    ChunkStore(store, "").commit("nothing", b"")
    assert ChunkStore(store, "").load("nothing") == b""


def test_keys_come_sorted_and_by_folder(store: Store) -> None:
    chunks = ChunkStore(store, "p")
    for key in ("b/2", "a/10", "b/1", "bb/0"):
        chunks.commit(key, key.encode())
    for found in (chunks, ChunkStore(store, "p")):
        assert found.keys() == ["a/10", "b/1", "b/2", "bb/0"]
        assert found.keys("b/") == ["b/1", "b/2"]


def test_a_chunk_committed_again_replaces_the_old_one(store: Store) -> None:
    chunks = ChunkStore(store, "p")
    chunks.commit("a", b"old")
    chunks.commit("a", b"new")
    chunks.commit("a", b"new")
    assert names(store) == [f"p/a.{digest_of(b'new')}.piece"]
    assert ChunkStore(store, "p").load("a") == b"new"


def test_dropped_chunks_are_gone(store: Store) -> None:
    chunks = ChunkStore(store, "p")
    for key in ("a", "b", "c"):
        chunks.commit(key, key.encode())
    chunks.drop(["a", "absent", "c"])
    assert chunks.keys() == ["b"]
    assert ChunkStore(store, "p").keys() == ["b"]


def test_a_chunk_of_another_process_can_be_adopted(store: Store) -> None:
    mine = ChunkStore(store, "p")
    name = ChunkStore(store, "p").commit("a", b"theirs")
    assert mine.load("a") is None
    mine.adopt("a", name)
    assert mine.load("a") == b"theirs"


def damage(kind: str, data: bytes) -> bytes:
    match kind:
        case "a flipped bit":
            return data[:9000] + bytes([data[9000] ^ 0x10]) + data[9001:]
        case "a zeroed page":
            return data[:4096] + bytes(4096) + data[8192:]
        case "cut short":
            return data[:-1]
        case "emptied":
            return b""
        case "grown":
            return data + b"\0"
    raise AssertionError(kind)


@pytest.mark.parametrize("kind", ["a flipped bit", "a zeroed page", "cut short", "emptied", "grown"])
def test_a_damaged_chunk_is_quarantined_and_never_returned(
    store: Store, kind: str, capfd: pytest.CaptureFixture[str]
) -> None:
    name = ChunkStore(store, "p").commit("a", DATA)
    ChunkStore(store, "p").commit("b", DATA)
    store.write(name, damage(kind, DATA))
    chunks = ChunkStore(store, "p")
    assert "a" in chunks
    assert chunks.load("a") is None
    assert capfd.readouterr().err == (
        f"warning: {store.url}/{name}: its bytes do not match its digest; quarantined, this chunk is computed again\n"
    )
    assert names(store) == [f"{name}.bad", f"p/b.{digest_of(DATA)}.piece"]
    for later in (chunks, ChunkStore(store, "p")):
        assert "a" not in later
        assert later.load("a") is None
        assert later.load("b") == DATA
    assert capfd.readouterr().err == ""  # reported once
    chunks.commit("a", DATA)
    assert ChunkStore(store, "p").load("a") == DATA


def test_a_deleted_chunk_is_computed_again(store: Store, capfd: pytest.CaptureFixture[str]) -> None:
    chunks = ChunkStore(store, "p")
    store.delete(chunks.commit("a", DATA))
    assert chunks.load("a") is None
    assert "warning: " in capfd.readouterr().err
    assert "a" not in chunks


def test_a_damaged_chunk_on_a_read_only_disk_is_still_not_returned(
    open_dir: Path, as_nobody: Callable[[Callable[[], Any]], Any]
) -> None:
    store = FileStore(open_dir)
    name = ChunkStore(store, "p").commit("a", DATA)
    store.path_of(name).write_bytes(DATA[:-1])
    os.chmod(store.path_of(name), 0o644)
    assert as_nobody(lambda: [(chunks := ChunkStore(store, "p")).load("a"), chunks.load("a")]) == [None, None]


def test_other_files_in_the_folder_are_not_chunks(store: Store) -> None:
    for name in (
        "p/notes.txt",
        "p/a.piece",
        f"p/a.{'0' * 31}.piece",
        f"p/a.{'G' * 32}.piece",
        f"pp/b.{'0' * 32}.piece",
    ):
        store.write(name, b"x")
    store.write(f"p/a.{digest_of(b'x')}.piece.bad", b"x")
    assert ChunkStore(store, "p").keys() == []


CRASH = """
import os, signal, sys
from pathlib import Path
from estiba.checkpoint import ChunkStore
from estiba.storage import FileStore
class Killed(FileStore):
    def write(self, path, data):
        with self.writer(path) as file:
            file.write(data[: len(data) // 2])
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
ChunkStore(Killed(Path(sys.argv[1])), "p").commit("a", b"half of this is written")
"""


def test_leftovers_of_a_killed_process_are_not_chunks_and_do_not_block_writes(place: Any, tmp_path: Path) -> None:
    store = FileStore(tmp_path / "store")
    ChunkStore(store, "p").commit("b", b"kept")
    process = place.start(sys.executable, place.script(CRASH), store.url)
    assert place.run(process).returncode == -signal.SIGKILL
    left = [path.name for path in store.path_of("p").iterdir() if "tmp" in path.name]
    assert len(left) == 1  # it was killed in the middle
    chunks = ChunkStore(store, "p")
    assert chunks.keys() == ["b"]
    chunks.commit("a", b"half of this is written")
    assert ChunkStore(store, "p").load("a") == b"half of this is written"
    assert [path.name for path in store.path_of("p").iterdir() if "tmp" in path.name] == []


# --- the ledger ----------------------------------------------------------------------------------------------------


def test_the_newest_record_is_read_and_the_newest_two_are_kept(store: Store) -> None:
    ledger = Ledger(store, "ledger", "algo-1")
    assert list(ledger.newest()) == []
    for number in range(12):
        ledger.write(b"record %d" % number)
        assert list(Ledger(store, "ledger", "algo-1").newest()) == [b"record %d" % number]
    assert len(names(store)) == 2
    Ledger(store, "ledger", "algo-1").write(b"after a restart")
    assert list(ledger.newest()) == [b"record 11"]  # listed once, at its start
    assert list(Ledger(store, "ledger", "algo-1").newest()) == [b"after a restart"]
    assert len(names(store)) == 2


def test_a_damaged_newest_record_falls_back_to_the_previous_one(
    store: Store, capfd: pytest.CaptureFixture[str]
) -> None:
    ledger = Ledger(store, "ledger", "algo-1")
    for data in (b"first", b"second", b"third"):
        ledger.write(data)
    [newest] = [name for name in names(store) if digest_of(b"third") in name]
    store.write(newest, b"thirD")
    found = Ledger(store, "ledger", "algo-1")
    assert list(found.newest()) == [b"second"]
    assert "quarantined" in capfd.readouterr().err
    found.write(b"fourth")
    assert list(Ledger(store, "ledger", "algo-1").newest()) == [b"fourth"]


def test_when_no_record_verifies_there_is_none(store: Store) -> None:
    ledger = Ledger(store, "ledger", "algo-1")
    ledger.write(b"first")
    ledger.write(b"second")
    for name in names(store):
        store.write(name, b"")
    assert list(Ledger(store, "ledger", "algo-1").newest()) == []


def test_hosts_that_share_a_folder_write_their_own_records_and_read_all(store: Store) -> None:
    hosts = [f"algo-{number}" for number in (1, 2, 10)]
    ledgers = {host: Ledger(store, "ledger", host) for host in hosts}
    for number in range(3):
        for host, ledger in ledgers.items():
            ledger.write(f"{host} {number}".encode())
    assert sorted(Ledger(store, "ledger", "algo-1").newest()) == [b"algo-1 2", b"algo-10 2", b"algo-2 2"]
    assert len(names(store)) == 6
    Ledger(store, "ledger", "algo-1").write(b"algo-1 3")
    assert sorted(Ledger(store, "ledger", "algo-2").newest()) == [b"algo-1 3", b"algo-10 2", b"algo-2 2"]


def test_a_host_whose_records_are_all_damaged_hides_no_other(store: Store) -> None:
    Ledger(store, "ledger", "algo-1").write(b"good")
    Ledger(store, "ledger", "algo-2").write(b"bad")
    [theirs] = [name for name in names(store) if "algo-2" in name]
    store.write(theirs, b"baD")
    assert list(Ledger(store, "ledger", "algo-1").newest()) == [b"good"]


# --- one process at a time -----------------------------------------------------------------------------------------

HOLD = """
import sys, time
from pathlib import Path
from estiba.checkpoint import exclusive
from estiba.errors import CheckpointError
from estiba.storage import FileStore
try:
    with exclusive(FileStore(Path(sys.argv[1])), "embed-algo-1"):
        print("held", flush=True)
        if "stay" in sys.argv:
            time.sleep(60)
except CheckpointError as error:
    print(error, flush=True)
"""


def test_a_second_process_is_refused_until_the_first_is_gone(place: Any, tmp_path: Path) -> None:
    script, folder = place.script(HOLD), tmp_path / "checkpoints"
    first = place.start(sys.executable, script, folder, "stay")
    assert first.stdout.readline() == b"held\n"
    refused = place.run(place.start(sys.executable, script, folder)).stdout.decode()
    assert refused == (
        f"{folder}: another job is using this checkpoint directory; wait for it or give this one its own\n"
    )
    with exclusive(FileStore(folder), "embed-algo-2"):  # another host of the same job
        pass
    first.kill()
    first.wait()
    assert place.run(place.start(sys.executable, script, folder)).stdout == b"held\n"


def test_a_folder_is_free_again_after_its_block_even_if_that_raised(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    with pytest.raises(ValueError, match="in the block"), exclusive(store, "a"):
        raise ValueError("in the block")
    with exclusive(store, "a"), pytest.raises(CheckpointError), exclusive(store, "a"):
        raise AssertionError("both are inside")


def test_an_unwritable_folder_is_named_with_the_remedies(
    open_dir: Path, as_nobody: Callable[[Callable[[], Any]], Any]
) -> None:
    def hold() -> None:
        with exclusive(FileStore(open_dir / "checkpoints"), "a"):
            pass

    with pytest.raises(CheckpointError) as caught:
        as_nobody(hold)
    for word in (str(open_dir), "Permission denied", "user 65534", "--checkpoint-path", "--no-checkpoint"):
        assert word in str(caught.value)


def test_objects_have_no_locks_and_need_none(s3_url: str) -> None:
    store = open_store(s3_url)
    with exclusive(store, "a"), exclusive(store, "a"):
        pass
    assert store.list() == []


def test_a_lock_file_is_not_a_chunk(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    with exclusive(store, "embed-algo-1"):
        assert ChunkStore(store, "").keys() == []


def test_a_store_that_cannot_be_listed_is_an_error_and_not_an_empty_checkpoint(
    open_dir: Path, as_nobody: Callable[[Callable[[], Any]], Any]
) -> None:
    store = FileStore(open_dir)
    ChunkStore(store, "p").commit("a", DATA)
    store.path_of("p").chmod(0o700)
    with pytest.raises(StoreError, match="Permission denied"):
        as_nobody(lambda: ChunkStore(store, "p").keys())
