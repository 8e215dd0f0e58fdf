"""The checkpoint sync: what one host may overwrite and delete, and what must not stop it."""

from __future__ import annotations

import errno
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from estiba_launch.errors import HostError
from estiba_launch.jobs import mirror
from estiba_launch.jobs.mirror import KeyRefused, Signature
from estiba_launch.jobs.s3 import S3Store
from estiba_launch.jobs.store import FileStore, Store
from estiba_launch.jobs.sync import CheckpointSync, PushResult
from estiba_launch.targets.ssh import agent

NOT_UTF8 = os.fsdecode(b"caf\xe9.bin")


def write(path: Path, text: str, at_s: float | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    if at_s is not None:
        os.utime(path, (at_s, at_s))


def content(store: Store, tmp_path: Path) -> dict[str, str]:
    found = {}
    for key in store.list():
        store.get(key, tmp_path / "seen")
        found[key] = (tmp_path / "seen").read_text()
    return found


class Hosts:
    """Two hosts that sync to one store, each with a directory and a ledger of its own."""

    def __init__(self, tmp_path: Path, store: Store) -> None:
        self.tmp, self.store = tmp_path, store
        self.said: list[str] = []
        self.one, self.two = self.again()
        for host in (self.one, self.two):
            host.restore()

    def again(self) -> list[CheckpointSync]:
        """The syncs of a new process."""
        found = [
            CheckpointSync(self.tmp / name, self.store, ledger=self.tmp / f"{name}.json", report=self.said.append)
            for name in ("algo-1", "algo-2")
        ]
        found[0].peers, found[1].peers = found[1:], found[:1]
        return found

    def die(self) -> None:
        """kill -9, then a process that takes over."""
        self.one, self.two = self.again()
        self.one.adopt()
        self.two.adopt()

    def push(self) -> None:
        for host in (self.one, self.two):
            host.push()

    def content(self) -> dict[str, str]:
        return content(self.store, self.tmp)


@pytest.fixture
def hosts(store, tmp_path) -> Hosts:
    return Hosts(tmp_path, store)


# ---- one host


def test_a_sync_uploads_changes_carries_out_deletes_and_restores(store, local, tmp_path):
    sync = CheckpointSync(local, store)
    assert sync.restore() == (0, 0)
    assert (sync.push().uploaded, sync.push().uploaded) == (0, 0), "what was there at the start counts as known"
    (local / "new").write_text("123")
    (local / "a").write_text("changed")
    moved = sync.push()
    assert (moved.uploaded, moved.uploaded_bytes, moved.deleted) == (2, 10, 0)
    (local / "new").unlink()
    assert (sync.push().deleted, sync.push().deleted, sync.push().deleted) == (0, 1, 0)
    assert store.list() == {"a": 7}
    other = CheckpointSync(tmp_path / "other", store)
    assert other.restore() == (1, 7)
    assert (tmp_path / "other" / "a").read_text() == "changed"
    (tmp_path / "other" / "b").write_text("b")
    (tmp_path / "other" / "a").unlink()
    assert other.push(last=True).deleted == 1, "nobody writes any more, and what was restored may be deleted"
    assert store.list() == {"b": 1}


def test_markers_show_what_is_uploaded_and_are_no_checkpoints(store, local, tmp_path, monkeypatch):
    """As on SageMaker: NAME.sagemaker-uploading while NAME is on its way, NAME.sagemaker-uploaded afterwards."""
    sync = CheckpointSync(local, store, markers=True)
    sync.restore()
    write(local / "step-1/weights", "one")
    seen = []
    put = store.put

    def watched(path: Path, key: str, changed_ns: int) -> str:
        seen.append(sorted(one.name for one in path.parent.iterdir()))
        return put(path, key, changed_ns)

    monkeypatch.setattr(store, "put", watched)
    sync.push()
    assert seen == [["weights", "weights.sagemaker-uploading"]]
    assert sorted(one.name for one in (local / "step-1").iterdir()) == ["weights", "weights.sagemaker-uploaded"]
    assert sync.push().uploaded == 0
    assert set(store.list()) == {"step-1/weights"}
    assert sync.pending() == (0, 0)
    (local / "step-1/weights").unlink()
    write(local / "step-2/weights", "two")
    sync.push(last=True)
    assert set(store.list()) == {"step-2/weights"}
    assert list((local / "step-1").iterdir()) == []


def test_a_failed_upload_leaves_no_marker(store, local, monkeypatch):
    sync = CheckpointSync(local, store, markers=True)
    sync.restore()
    write(local / "weights", "one")

    def refuse(*words: Any) -> str:
        raise KeyRefused("no")

    monkeypatch.setattr(store, "put", refuse)
    assert "weights" in sync.push().problems
    assert [path.name for path in local.rglob("*.sagemaker-*")] == []


def test_objects_that_others_add_are_neither_pulled_nor_deleted(store, local):
    sync = CheckpointSync(local, store)
    sync.restore()
    store.put(local / "a", "of-another-host")
    (local / "mine").write_text("m")
    sync.push()
    assert sorted(store.list()) == ["mine", "of-another-host"]
    assert not (local / "of-another-host").exists()


def test_a_directory_that_is_gone_deletes_nothing(store, local, tmp_path):
    sync = CheckpointSync(local, store)
    sync.restore()
    (local / "c").write_text("c")
    sync.push()
    local.rename(tmp_path / "unmounted")
    for _ in range(3):
        with pytest.raises(HostError, match="nothing is deleted"):
            sync.push()
    assert store.list() == {"c": 1}


def test_a_directory_that_lost_all_its_files_at_once_deletes_nothing(store, local):
    said: list[str] = []
    store.put(local / "a", "from-before")
    sync = CheckpointSync(local, store, report=said.append)
    sync.restore()
    (local / "c").write_text("c")
    sync.push()
    for path in (local / "a", local / "deep/b", local / "c", local / "from-before"):
        path.unlink()
    assert [sync.push().deleted for _ in range(3)] == [0, 0, 0]
    assert sync.push(last=True).problems, "the final status tells it"
    # Also not when the job goes on: it did not delete them.
    (local / "d").write_text("dd")
    assert [sync.push().deleted for _ in range(3)] == [0, 0, 0]
    assert store.list() == {"c": 1, "d": 2, "from-before": 1}
    assert len(said) == 1
    assert "has lost all its files; 4 stay in" in said[0]
    # What the job writes and deletes from then on is its own again.
    (local / "c").write_text("new")
    sync.push()
    (local / "c").unlink()
    sync.push(last=True)
    assert store.list() == {"d": 2, "from-before": 1}


def test_a_folder_that_is_being_emptied_deletes_nothing(store, local):
    sync = CheckpointSync(local, store)
    sync.restore()
    for name in ("p", "q", "r"):
        (local / name).write_text(name)
    sync.push()
    for name in ("a", "p", "q"):
        (local / name).unlink()
    assert sync.push().deleted == 0
    (local / "r").unlink()
    (local / "deep/b").unlink()
    assert [sync.push().deleted for _ in range(3)] == [0, 0, 0]
    assert sorted(store.list()) == ["p", "q", "r"]


@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES])
@pytest.mark.parametrize("where", ["deep", "local"])
def test_a_folder_that_cannot_be_listed_deletes_nothing(store, local, monkeypatch, code, where):
    sync = CheckpointSync(local, store)
    sync.restore()
    (local / "deep" / "c").write_text("c")
    sync.push()
    real = os.listdir

    def listdir(path):
        if Path(path).name == where:
            raise OSError(code, os.strerror(code), str(path))
        return real(path)

    (local / "new").write_text("new")
    with monkeypatch.context() as patch:
        patch.setattr(os, "listdir", listdir)
        for last in (False, False, True):
            if where == "local":
                with pytest.raises(HostError, match=os.strerror(code)):
                    sync.push(last=last)
            else:
                assert sync.push(last=last).problems == {"deep": os.strerror(code)}
    assert store.list() == ({"deep/c": 1} if where == "local" else {"deep/c": 1, "new": 3})


def test_a_push_that_fails_half_way_is_finished_by_the_next(store, local, monkeypatch):
    sync = CheckpointSync(local, store)
    sync.restore()
    for number, name in enumerate(("p", "q", "r")):
        write(local / name, name, 1000 + number)
    real, calls, away = store.put, [], [True]

    def flaky(path: Path, key: str, modified_ns: int | None = None) -> str | None:
        calls.append(key)
        if key != "p" and away:
            raise HostError("the store is away")
        return real(path, key, modified_ns)

    monkeypatch.setattr(store, "put", flaky)
    with pytest.raises(HostError):
        sync.push()
    assert sorted(store.list()) == ["p"]
    away.clear()
    sync.push()
    assert sorted(store.list()) == ["p", "q", "r"]
    assert calls == ["p", "q", "r", "q", "r"], "what was up already does not go up again"


def test_a_store_key_cannot_leave_the_checkpoint_directory(tmp_path, local):
    class Evil(FileStore):
        def objects(self) -> dict[str, mirror.Stored]:
            return {"../../etc/evil": mirror.Stored(1, 1, "x")}

    with pytest.raises(HostError, match="leads out"):
        CheckpointSync(tmp_path / "c" / "d", Evil(local)).restore()


# ---- several hosts, one store


def test_a_process_that_takes_over_deletes_and_overwrites_nothing_of_others(hosts, tmp_path):
    for number, host in enumerate((hosts.one, hosts.two)):
        write(host.local / f"algo-{number + 1}.pt", f"rank {number}")
    write(hosts.one.local / "shared", "step 4", 1000)
    hosts.push()
    write(hosts.two.local / "shared", "step 8", 2000)
    hosts.push()
    write(tmp_path / "notes", "by hand")
    hosts.store.put(tmp_path / "notes", "NOTES.txt")
    want = {"algo-1.pt": "rank 0", "algo-2.pt": "rank 1", "shared": "step 8", "NOTES.txt": "by hand"}
    for _ in range(3):
        hosts.die()
        hosts.push()
        hosts.push()
        assert hosts.content() == want


def test_the_newest_of_two_hosts_wins_whoever_syncs_first(hosts):
    write(hosts.one.local / "shared", "new", 2000.25)
    write(hosts.two.local / "shared", "old", 2000)
    hosts.push()
    assert hosts.content() == {"shared": "new"}
    write(hosts.two.local / "shared", "newest", 2000.5)
    hosts.push()
    assert hosts.content() == {"shared": "newest"}


def test_a_restored_copy_of_another_host_never_goes_up_again(hosts):
    write(hosts.two.local / "algo-2.pt", "step 4")
    hosts.push()
    hosts.one, hosts.two = hosts.again()
    hosts.one.restore()
    hosts.two.restore()
    write(hosts.two.local / "algo-2.pt", "step 8")
    hosts.push()
    hosts.die()
    hosts.push()
    assert (hosts.one.local / "algo-2.pt").read_text() == "step 4"
    assert hosts.content() == {"algo-2.pt": "step 8"}
    # Nor when what was known is lost.
    (hosts.tmp / "algo-1.json").unlink()
    hosts.die()
    hosts.push()
    assert hosts.content() == {"algo-2.pt": "step 8"}


def test_a_host_deletes_what_it_wrote_and_not_what_another_host_still_has(hosts):
    write(hosts.one.local / "mine", "1")
    write(hosts.two.local / "theirs", "2")
    hosts.push()
    hosts.one, hosts.two = hosts.again()
    for host in (hosts.one, hosts.two):
        host.restore()
        write(host.local / host.local.name, "is never empty")
    # In the second attempt, the first host has a copy of both.
    for name in ("mine", "theirs"):
        (hosts.one.local / name).unlink()
    for _ in range(3):
        hosts.push()
    assert sorted(hosts.store.list()) == ["algo-1", "algo-2", "theirs"]
    (hosts.two.local / "theirs").unlink()
    for _ in range(3):
        hosts.push()
    assert sorted(hosts.store.list()) == ["algo-1", "algo-2"]


def test_an_object_that_somebody_else_has_replaced_is_not_deleted(store, local, tmp_path):
    sync = CheckpointSync(local, store)
    sync.restore()
    (local / "c").write_text("mine")
    sync.push()
    write(tmp_path / "other", "by hand")
    store.put(tmp_path / "other", "c")
    (local / "c").unlink()
    sync.push(last=True)
    assert content(store, tmp_path) == {"c": "by hand"}


def test_a_newer_object_of_somebody_else_is_not_overwritten(hosts, tmp_path):
    write(hosts.one.local / "c", "step 1")
    hosts.push()
    write(hosts.one.local / "c", "step 2", time.time() - 5)
    write(tmp_path / "other", "by hand")
    hosts.store.put(tmp_path / "other", "c")
    hosts.die()
    hosts.push()
    assert hosts.content() == {"c": "by hand"}
    assert hosts.said == ["not synced: c: somebody else has written a newer object, which is kept"]
    write(hosts.one.local / "c", "step 3")
    hosts.push()
    assert hosts.content() == {"c": "step 3"}


def test_an_old_copy_that_took_the_files_place_while_nobody_watched_does_not_go_up(hosts):
    write(hosts.one.local / "c", "step 8", 2000)
    hosts.push()
    (hosts.one.local / "c").unlink()
    write(hosts.one.local / "c", "step 4", 1000)
    hosts.die()
    hosts.push()
    assert hosts.content() == {"c": "step 8"}
    # A job may well go back to an older file while it is watched.
    write(hosts.one.local / "c", "step 2", 500)
    hosts.push()
    assert hosts.content() == {"c": "step 2"}


class Killed(BaseException):
    """What a process that is killed does not catch."""


@pytest.mark.parametrize("after_put", [0, 1, 2])
def test_uploads_that_a_kill_cut_off_are_known_to_the_next_process(hosts, monkeypatch, after_put):
    write(hosts.one.local / "stays", "x")
    hosts.push()
    write(hosts.one.local / "at-1", "1")
    write(hosts.one.local / "at-2", "2")
    real, count = hosts.store.put, [0]

    def put(path: Path, key: str, modified_ns: int | None = None) -> str | None:
        if count[0] == after_put:
            raise Killed
        count[0] += 1
        return real(path, key, modified_ns)

    with monkeypatch.context() as patch:
        patch.setattr(hosts.store, "put", put)
        # Nothing is noted after the kill.
        patch.setattr(hosts.one, "_save", lambda begun: begun and CheckpointSync._save(hosts.one, begun))
        if after_put < 2:
            with pytest.raises(Killed):
                hosts.one.push()
        else:
            hosts.one.push()
    (hosts.one.local / "at-1").unlink()
    (hosts.one.local / "at-2").unlink()
    write(hosts.one.local / "at-3", "3")
    hosts.die()
    hosts.push()
    hosts.push()
    assert hosts.content() == {"stays": "x", "at-3": "3"}


def test_a_taken_over_directory_is_brought_in_line_with_the_store(hosts):
    write(hosts.one.local / "a", "1")
    write(hosts.one.local / "b", "1")
    hosts.push()
    write(hosts.one.local / "a", "newer")
    (hosts.one.local / "b").unlink()
    write(hosts.one.local / "c", "new")
    hosts.die()
    hosts.push()
    hosts.push()
    assert hosts.content() == {"a": "newer", "c": "new"}


# ---- files that cannot be synced


def test_one_file_that_is_refused_does_not_stop_the_others_and_is_named_once(store, local, monkeypatch):
    said: list[str] = []
    sync = CheckpointSync(local, store, report=said.append)
    sync.restore()
    for number, name in enumerate(("early", "bad", "late")):
        write(local / name, name, 1000 + number)
    real, refuses = store.put, [True]

    def put(path: Path, key: str, modified_ns: int | None = None) -> str | None:
        if key == "bad" and refuses:
            raise HostError("internal error")
        return real(path, key, modified_ns)

    monkeypatch.setattr(store, "put", put)
    for _ in range(3):
        assert sync.push().problems == {"bad": "internal error"}
    assert sorted(store.list()) == ["early", "late"]
    assert said == ["not synced: bad: internal error"]
    (local / "a").unlink()
    write(local / "gone", "x")
    sync.push()
    (local / "gone").unlink()
    sync.push()
    assert sync.push().deleted == 1, "deletes are carried out all the same"
    refuses.clear()
    assert sync.push(last=True).problems == {}
    assert sorted(store.list()) == ["bad", "early", "late"]


def test_names_that_a_store_cannot_hold_are_passed_by(store, local):
    said: list[str] = []
    sync = CheckpointSync(local, store, report=said.append)
    sync.restore()
    (local / NOT_UTF8).write_text("x")
    (local / ("n" * 255)).write_text("x")
    (local / "zz last").write_text("x")
    for _ in range(2):
        problems = sync.push().problems
    found = store.list()
    assert {"zz last", "n" * 255} <= set(found)
    if isinstance(store, FileStore):
        assert (problems, said) == ({}, [])
        assert NOT_UTF8 in found
    else:
        assert list(problems) == [NOT_UTF8]
        assert len(said) == 1
        assert r"'caf\udce9.bin'" in said[0]
        assert "rename" in said[0]


def test_a_file_store_says_which_name_it_has_no_room_for(tmp_path, local):
    # 255 bytes fit, whatever they end in; a file where a folder is does not.
    store = FileStore(tmp_path / "store")
    sync = CheckpointSync(local, store)
    sync.restore()
    write(tmp_path / "store" / "x", "a file of somebody else")
    write(local / "x" / "y", "a folder here")
    write(local / "z", "z")
    assert list(sync.push().problems) == ["x/y"]
    assert store.list() == {"x": 23, "z": 1}


def test_what_is_no_file_is_named_and_left_alone(store, local, tmp_path):
    said: list[str] = []
    sync = CheckpointSync(local, store, report=said.append)
    sync.restore()
    os.mkfifo(local / "pipe")
    with socket.socket(socket.AF_UNIX) as unix:
        unix.bind(str(local / "socket"))
    (tmp_path / "secret").write_text("outside")
    (local / "out").symlink_to(tmp_path / "secret")
    (local / "nowhere").symlink_to("missing")
    (local / "deep" / "around").symlink_to("../deep")
    (local / "zz").write_text("x")
    for _ in range(2):
        assert sync.push().problems == {}
    assert store.list() == {"zz": 1}
    assert len(said) == 1
    for text in (
        "pipe: neither",
        "socket: neither",
        "out: a link out",
        "nowhere: a link to nothing",
        "deep/around: a link to a folder around it",
    ):
        assert text in said[0]


def test_links_inside_the_folder_are_stored_as_what_they_lead_to(store, local, tmp_path):
    sync = CheckpointSync(local, store, mounted_at="/opt/ml/checkpoints")
    sync.restore()
    write(local / "step-1" / "model", "one")
    (local / "last.ckpt").symlink_to("step-1/model")
    (local / "latest").symlink_to("/opt/ml/checkpoints/step-1")
    assert sync.push().notes == {}
    assert content(store, tmp_path) == {"last.ckpt": "one", "latest/model": "one", "step-1/model": "one"}
    write(local / "step-2" / "model", "two!")
    (local / "latest").unlink()
    (local / "latest").symlink_to("step-2")
    sync.push()
    assert content(store, tmp_path)["latest/model"] == "two!"


def test_a_file_that_vanishes_or_grows_while_it_is_read_goes_up_as_it_is_at_the_next_push(store, local, monkeypatch):
    said: list[str] = []
    sync = CheckpointSync(local, store, report=said.append)
    sync.restore()
    for number, name in enumerate(("vanishes", "grows", "stays")):
        write(local / name, "1", 1000 + number)
    real = store.put

    def put(path: Path, key: str, modified_ns: int | None = None) -> str | None:
        if key == "vanishes":
            path.unlink()
        etag = real(path, key, modified_ns)
        if key == "grows":
            path.write_text("1 and more")
        return etag

    with monkeypatch.context() as patch:
        patch.setattr(store, "put", put)
        assert sync.push().problems == {}
    assert sync.push().problems == {}
    assert store.list() == {"grows": 10, "stays": 1}
    assert said == []


def test_what_this_user_may_not_read_is_read_for_him(store, local, monkeypatch, tmp_path):
    """As for an ordinary user in group docker, whose container writes as root."""

    class Root:
        def list(self, folder: str) -> dict[str, Signature]:
            assert folder == "closed"
            return {"closed/deep/x": mirror.signature((local / "closed/deep/x").stat())}

        def copy(self, key: str, path: Path) -> None:
            if key == "broken":
                raise KeyRefused("not read")
            path.write_bytes((local / key).read_bytes())

    sync = CheckpointSync(local, store, denied=Root())
    sync.restore()
    write(local / "a-private", "root's", 1000)
    write(local / "broken", "x", 1001)
    write(local / "closed" / "deep" / "x", "xx", 1002)
    write(local / "open", "mine", 1003)
    real_listdir, real_access = os.listdir, os.access

    def listdir(path: Any) -> list[str]:
        if Path(path) == local / "closed":
            raise PermissionError(errno.EACCES, "Permission denied")
        return real_listdir(path)

    def access(path: Any, mode: int) -> bool:
        return Path(path) == local / "open" or (not Path(path).is_relative_to(local) and real_access(path, mode))

    monkeypatch.setattr(os, "access", access)
    monkeypatch.setattr("estiba_launch.jobs.mirror.os.listdir", listdir)
    assert sync.push().problems == {"broken": "not read"}
    monkeypatch.undo()
    assert content(sync.store, tmp_path) == {"a-private": "root's", "closed/deep/x": "xx", "open": "mine"}


def test_a_full_disk_under_the_ledger_stops_no_upload(store, local, tmp_path):
    (tmp_path / "file").write_text("")
    said: list[str] = []
    sync = CheckpointSync(local, store, ledger=tmp_path / "file" / "known.json", report=said.append)
    sync.restore()
    (local / "new").write_text("x")
    assert sync.push().uploaded == 1
    assert sync.push().uploaded == 0
    assert len(said) == 1


# ---- the agent of a remote host


@pytest.fixture
def agent_at(monkeypatch, tmp_path) -> Callable[[S3Store, Callable[[Path], None]], Path]:
    """Runs the agent in this process while a job, in another thread, works in its folder; then TERM."""
    root = tmp_path / "data"
    root.mkdir()
    monkeypatch.setattr(agent, "ROOT", root)
    monkeypatch.setattr(agent, "LEDGER", tmp_path / "state" / "known.json")
    monkeypatch.setattr(agent, "EVERY_S", 0.05)
    monkeypatch.setattr(agent, "RETRY_S", 0.01)
    monkeypatch.setattr(agent, "LAST_S", 0.5)

    def run(store: S3Store, job: Callable[[Path], None]) -> Path:
        before = signal.getsignal(signal.SIGTERM)

        def work() -> None:
            try:
                job(root)
            finally:
                os.kill(os.getpid(), signal.SIGTERM)

        thread = threading.Thread(target=work)
        monkeypatch.setattr(agent, "say", lambda text: thread.start() if text == "ready" else print(text))
        try:
            agent.sync(store, "/opt/ml/checkpoints")
        finally:
            signal.signal(signal.SIGTERM, before)
            thread.join()
        return root

    return run


def until(done: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not done():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("store", ["s3"], indirect=True)
def test_the_agent_on_a_remote_host_syncs_by_the_same_rules(store, local, agent_at, monkeypatch):
    store.put(local / "a", "old")
    passes: list[bool] = []
    real = CheckpointSync.push

    def push(self: CheckpointSync, *, last: bool = False) -> PushResult:
        try:
            return real(self, last=last)
        finally:
            passes.append(last)

    monkeypatch.setattr(CheckpointSync, "push", push)

    def some_passes() -> None:
        before = len(passes)
        until(lambda: len(passes) >= before + 3)

    def job(root: Path) -> None:
        assert (root / "old").read_text() == "a"
        (root / "new").write_text("new")
        until(lambda: "new" in store.list())
        root.rename(root.with_name("unmounted"))
        some_passes()
        root.mkdir()
        some_passes()
        assert sorted(store.list()) == ["new", "old"], "vanished, then emptied: nothing is deleted"
        root.rmdir()
        root.with_name("unmounted").rename(root)
        some_passes()
        (root / "old").unlink()

    agent_at(store, job)
    assert sorted(store.list()) == ["new"]


@pytest.mark.parametrize("store", ["s3"], indirect=True)
def test_an_agent_that_died_goes_on_from_what_it_knew(store, local, agent_at):
    store.put(local / "a", "old")
    agent_at(store, lambda root: (root / "first").write_text("1"))
    (agent.ROOT / "first").unlink()
    (agent.ROOT / "second").write_text("2")
    agent_at(store, lambda _: None)
    assert sorted(store.list()) == ["old", "second"]


@pytest.mark.parametrize("store", ["s3"], indirect=True)
def test_the_agent_ends_and_says_so_when_the_last_sync_fails(store, local, agent_at, monkeypatch):
    store.put(local / "a", "old")
    with pytest.raises(HostError, match="No such file"):
        agent_at(store, lambda root: root.rename(root.with_name("removed")))
    assert sorted(store.list()) == ["old"]
    agent.LEDGER.unlink()
    agent.ROOT.mkdir()

    def away(*_: Any, **__: Any) -> None:
        raise HostError("the store is away")

    def job(root: Path) -> None:
        monkeypatch.setattr(store, "put", away)
        (root / "new").write_text("x")

    with pytest.raises(HostError, match="the store is away"):
        agent_at(store, job)
