"""Both stores behave the same: atomic writes, exact reads, any name, errors with a remedy."""

from __future__ import annotations

import array
import errno
import fcntl
import io
import os
import re
import signal
import subprocess
import sys
import threading
import uuid
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from estiba.errors import ConfigError, StoreError
from estiba.storage import TEMPORARY_SUFFIX, Entry, FileStore, Store, open_store, split_location, stage

WRITER = """
import os, signal, sys
from pathlib import Path
from estiba.storage import FileStore
with FileStore(Path(sys.argv[1])).writer("a/x.bin") as file:
    file.write(b"half of the new")
    file.flush()
    print("half", flush=True)
    sys.stdin.readline()
    file.write(b", and the rest")
"""


@pytest.fixture(params=["file", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "file":
        return FileStore(tmp_path / "store")
    request.getfixturevalue("s3")
    return open_store(f"s3://estiba/{uuid.uuid4().hex}")


@pytest.fixture
def files(tmp_path: Path) -> FileStore:
    return FileStore(tmp_path / "store")


def paths(store: Store, prefix: str = "") -> list[str]:
    return [entry.path for entry in store.list(prefix)]


def on_disk(files: FileStore) -> list[str]:
    """Every file, published or not."""
    return sorted(str(path.relative_to(files.root)) for path in files.root.rglob("*") if path.is_file())


# --- the two are one -----------------------------------------------------------------------------------------------

segments = st.text(st.sampled_from("abñé日😀 #%+&=?;@~.,-_()[]{}!*'\"^`|<>$\\:"), min_size=1, max_size=8).filter(
    lambda text: text not in (".", "..") and not text.endswith(TEMPORARY_SUFFIX)
)
names = st.tuples(st.lists(segments.map(lambda text: f"d{text}"), max_size=2), segments).map(
    lambda parts: "/".join([*parts[0], f"f{parts[1]}"])
)


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(
    contents=st.dictionaries(names, st.binary(max_size=40), min_size=1, max_size=4),
    prefix=st.sampled_from(["", "p", "p #1%20/ñ+"]),
    data=st.data(),
)
def test_files_and_objects_behave_the_same(
    tmp_path: Path, s3: Any, s3_client: Any, contents: dict[str, bytes], prefix: str, data: st.DataObject
) -> None:
    name = uuid.uuid4().hex
    here, there = FileStore(tmp_path / name), open_store(f"s3://estiba/{name}/{prefix}")
    for path, content in contents.items():
        here.write(path, content)
        there.write(path, content)

    def entries(prefix: str = "") -> list[tuple[str, int]]:
        mine, theirs = ([(entry.path, entry.size_bytes) for entry in store.list(prefix)] for store in (here, there))
        assert mine == theirs
        return mine

    assert entries() == sorted((path, len(content)) for path, content in contents.items())
    for path, content in contents.items():
        start = data.draw(st.integers(0, len(content)))
        length = data.draw(st.integers(0, len(content) - start))
        folder = path.rpartition("/")[0]
        below = [other for other in contents if not folder or other.startswith(f"{folder}/")]
        assert [found for found, _ in entries(folder)] == sorted(below)
        for store in (here, there):
            assert store.read(path) == content
            assert store.read(path, start) == content[start:]
            assert store.read(path, start, length) == content[start : start + length]
            with store.open(path) as file:
                assert file.seek(0, io.SEEK_END) == len(content)
                assert file.seek(start) == start
                assert file.read(length) == content[start : start + length]
                assert file.read() == content[start + length :]
            found = store.head(path)
            assert found is not None
            assert (found.path, found.size_bytes) == (path, len(content))
    first = min(contents)
    for store in (here, there):
        store.rename(first, "renamed/to here")
        assert store.head(first) is None
        assert store.read("renamed/to here") == contents[first]
    entries()
    for store in (here, there):
        store.delete("renamed/to here")
        store.delete("renamed/to here")
    assert [path for path, _ in entries()] == sorted(set(contents) - {first})
    # An independent S3 client sees the same names.
    keys = s3_client.list_objects_v2(Bucket="estiba", Prefix=f"{name}/").get("Contents", [])
    root = f"{name}/{prefix}/" if prefix else f"{name}/"
    assert sorted(item["Key"].removeprefix(root) for item in keys) == sorted(set(contents) - {first})


def test_an_empty_store_has_an_empty_list_and_no_entry(store: Store) -> None:
    assert store.list() == []
    assert store.list("no/such") == []
    assert store.head("absent") is None
    store.write("a/x", b"1")
    assert store.head("a") is None  # a folder is no object
    assert store.head("a/x/y") is None
    assert store.list("a/x") == []  # an object is no folder


def test_a_prefix_is_a_folder_and_not_the_beginning_of_a_name(store: Store) -> None:
    for path in ("ab/1", "abc/2", "ab3"):
        store.write(path, b"x")
    assert paths(store, "ab") == paths(store, "ab/") == ["ab/1"]


def test_reading_a_missing_object_names_it(store: Store) -> None:
    for act in (
        lambda: store.read("ñ/absent"),
        lambda: store.read("ñ/absent", 3),
        lambda: store.read("ñ/absent", 3, 4),
        lambda: store.open("ñ/absent"),
        lambda: store.rename("ñ/absent", "b"),
    ):
        with pytest.raises(StoreError) as caught:
            act()
        assert f"{store.url}/ñ/absent" in str(caught.value)
        assert re.search("no such|not found|does not exist", str(caught.value), re.IGNORECASE)


def test_fewer_bytes_than_asked_for_is_an_error(store: Store) -> None:
    store.write("x", b"0123456789")
    for start, length in ((0, 11), (5, 6), (10, 1), (20, 5)):
        with pytest.raises(StoreError) as caught:
            store.read("x", start, length)
        assert f"{store.url}/x" in str(caught.value)
    assert store.read("x", 10) == b""
    assert store.read("x", 10, 0) == b""


def test_a_write_replaces_and_takes_any_buffer(store: Store) -> None:
    store.write("x", b"a longer one")
    store.write("x", memoryview(b"short"))
    assert store.read("x") == b"short"
    floats = array.array("d", [1.5, -2.0])
    with store.writer("floats") as file:
        assert file.write(memoryview(floats)) == 16
        assert file.tell() == 16
        file.write(b"tail")
        assert file.tell() == 20
    assert store.read("floats") == floats.tobytes() + b"tail"


def test_an_unfinished_write_is_not_visible(store: Store) -> None:
    with store.writer("a/x") as file:
        file.write(b"1" * 100_000)
        assert store.list() == []
        assert store.head("a/x") is None
    assert paths(store) == ["a/x"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, StoreError, FileNotFoundError])
def test_a_writer_whose_block_raises_leaves_nothing(store: Store, error: type[BaseException]) -> None:
    def write() -> None:
        with store.writer("a/x") as file:
            file.write(b"half")
            raise error("in the block")

    with pytest.raises(error, match=r"^in the block$"):
        write()
    assert store.list() == []
    if isinstance(store, FileStore):
        assert on_disk(store) == []


def test_a_writer_whose_block_raises_leaves_the_old_object(store: Store) -> None:
    def write() -> None:
        with store.writer("x") as file:
            file.write(b"new")
            raise ZeroDivisionError

    store.write("x", b"old")
    with pytest.raises(ZeroDivisionError):
        write()
    assert store.read("x") == b"old"


def test_only_the_first_of_two_creators_succeeds(store: Store) -> None:
    assert store.write_new("a/x", b"first") is True
    assert store.write_new("a/x", b"second") is False
    assert store.read("a/x") == b"first"
    assert paths(store) == ["a/x"]
    if isinstance(store, FileStore):
        assert on_disk(store) == ["a/x"]


def test_one_of_many_racing_creators_succeeds(store: Store) -> None:
    gate = threading.Barrier(6)
    won: list[int] = []
    failed: list[BaseException] = []

    def create(number: int) -> None:
        gate.wait(10)
        try:
            if store.write_new("race", b"%d" % number):
                won.append(number)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=create, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert len(won) == 1
    assert store.read("race") == b"%d" % won[0]


def test_a_rename_replaces_and_makes_folders(store: Store) -> None:
    store.write("a", b"1")
    store.write("b/c", b"2")
    store.rename("a", "b/c")
    store.rename("b/c", "new/folder/d")
    assert paths(store) == ["new/folder/d"]
    assert store.read("new/folder/d") == b"1"


# --- places --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("location", "folder"),
    [
        ("/data/in", "/data/in"),
        ("file:///data/in", "/data/in"),
        ("file://localhost/data/in", "/data/in"),
        ("FILE:///data/in", "/data/in"),
        ("file:///data/a%20b%23", "/data/a b#"),
        ("file:///data/a#b?c", "/data/a#b?c"),
        ("file:///", "/"),
        ("/data/a#b?c%20", "/data/a#b?c%20"),
    ],
)
def test_a_directory_is_a_path_or_a_file_url(location: str, folder: str) -> None:
    store = open_store(location)
    assert isinstance(store, FileStore)
    assert store.root == Path(folder)
    assert store.url == folder


def test_a_relative_path_is_below_the_current_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    store = open_store("data")
    monkeypatch.chdir("/")
    assert store.url == str(tmp_path / "data")
    assert store.url_of("a/b") == str(tmp_path / "data/a/b")


def test_a_file_url_with_two_slashes_is_refused_with_the_right_one() -> None:
    with pytest.raises(ConfigError, match=r"file:///data/in"):
        open_store("file://data/in")


@pytest.mark.parametrize("location", ["gs://bucket/x", "https://host/x", "s3a://bucket/x", "://x"])
def test_a_storage_of_another_kind_is_refused_by_name(location: str) -> None:
    with pytest.raises(ConfigError) as caught:
        open_store(location)
    assert location in str(caught.value)
    assert "s3://" in str(caught.value)


@pytest.mark.parametrize(
    ("location", "parts"),
    [
        ("s3://b/a/x.parquet", ("s3://b/a", "x.parquet")),
        ("s3://b/x", ("s3://b", "x")),
        ("/data/x", ("/data", "x")),
        ("/data/x/", ("/data", "x")),
        ("/x", ("/", "x")),
        ("x", (".", "x")),
        ("file:///data/a%23b", ("file:///data", "a%23b")),
    ],
)
def test_a_location_is_a_folder_and_a_name(location: str, parts: tuple[str, str]) -> None:
    assert split_location(location) == parts


def test_a_single_file_is_found_through_its_folder(files: FileStore) -> None:
    files.write("x.bin", b"1")
    location = f"{files.url}/x.bin"
    assert open_store(location).list() == []  # as on S3, where no object lies below it
    folder, name = split_location(location)
    assert open_store(folder).head(name) == Entry("x.bin", 1)


# --- links ---------------------------------------------------------------------------------------------------------


def test_links_are_followed_and_a_link_back_up_ends(files: FileStore, tmp_path: Path) -> None:
    files.write("a/b/x", b"1")
    (files.root / "a/b/up").symlink_to(files.root)
    (files.root / "a/self").symlink_to(".")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "y").write_bytes(b"22")
    (files.root / "linked").symlink_to(elsewhere)
    (files.root / "z").symlink_to(elsewhere / "y")
    assert files.list() == [Entry("a/b/x", 1), Entry("linked/y", 2), Entry("z", 2)]


def test_a_folder_with_two_names_is_listed_under_both(files: FileStore) -> None:
    files.write("2026-09/x", b"1")
    (files.root / "current").symlink_to("2026-09")
    assert paths(files) == ["2026-09/x", "current/x"]


def test_folders_that_link_to_each_other_end(files: FileStore) -> None:
    files.write("a/x", b"1")
    files.write("b/y", b"1")
    (files.root / "a/to-b").symlink_to("../b")
    (files.root / "b/to-a").symlink_to("../a")
    assert paths(files) == ["a/to-b/y", "a/x", "b/to-a/x", "b/y"]


def test_a_dangling_link_is_listed_and_named_when_it_is_read(files: FileStore) -> None:
    files.root.mkdir()
    (files.root / "gone").symlink_to("nowhere")
    assert files.list() == [Entry("gone", 0)]
    assert files.head("gone") is None
    with pytest.raises(StoreError, match=f"{files.url}/gone: No such file or directory"):
        files.read("gone")


# --- a file store's own troubles -----------------------------------------------------------------------------------


def test_a_file_that_cannot_be_read_is_named_with_the_user(
    open_dir: Path, as_nobody: Callable[[Callable[[], Any]], Any]
) -> None:
    files = FileStore(open_dir)
    files.write("a/x", b"1")
    files.path_of("a/x").chmod(0o600)
    reads: list[Callable[[], object]] = [lambda: files.read("a/x"), lambda: files.open("a/x")]
    for act in reads:
        with pytest.raises(StoreError) as caught:
            as_nobody(act)
        assert str(caught.value).startswith(f"{open_dir}/a/x: Permission denied (this process runs as user 65534;")
    files.path_of("a").chmod(0o700)
    others: list[Callable[[], object]] = [files.list, lambda: files.head("a/x"), lambda: files.delete("a/x")]
    for act in others:
        with pytest.raises(StoreError, match=r"Permission denied .*user 65534"):
            as_nobody(act)


def test_a_place_that_cannot_be_written_is_named_with_the_user(
    open_dir: Path, as_nobody: Callable[[Callable[[], Any]], Any]
) -> None:
    files = FileStore(open_dir)
    for act in (lambda: files.write("x", b"1"), lambda: files.write_new("x", b"1")):
        with pytest.raises(StoreError, match=f"{open_dir}/x: Permission denied .*user 65534"):
            as_nobody(act)
    assert list(open_dir.iterdir()) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of one MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        pytest.skip(f"a small disk cannot be mounted here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.parametrize("how", ["write", "write_new", "in pieces", "at the very end"])
def test_a_full_disk_leaves_no_partial_file_and_reports_the_free_space(small_disk: Path, how: str) -> None:
    files = FileStore(small_disk)
    files.write("a/old", b"x" * 100_000)
    too_much = b"y" * 2_000_000

    def fill() -> None:
        if how == "write":
            files.write("a/new", too_much)
        elif how == "write_new":
            files.write_new("a/new", too_much)
        else:
            with files.writer("a/new") as file:
                if how == "in pieces":
                    for _ in range(2000):
                        file.write(b"y" * 1000)
                file.write(b"y" * 5000)  # stays in the buffer until the file is published
                (small_disk / "fill").write_bytes(b"z" * (os.statvfs(small_disk).f_bavail * 4096))

    with pytest.raises(StoreError) as caught:
        fill()
    assert str(caught.value).startswith(f"{small_disk}/a/new: No space left on device (")
    assert "MB free" in str(caught.value)
    (small_disk / "fill").unlink(missing_ok=True)
    assert on_disk(files) == ["a/old"]
    files.write("a/new", b"y" * 500_000)
    assert files.read("a/new") == b"y" * 500_000


def test_an_error_of_the_block_is_not_reported_as_a_write_error(files: FileStore) -> None:
    def copy() -> None:
        with files.writer("out") as file:
            file.write(b"half")
            raise OSError(errno.EIO, "the input broke")

    with pytest.raises(OSError, match="the input broke") as caught:
        copy()
    assert not isinstance(caught.value, StoreError)
    assert on_disk(files) == []


def test_a_killed_writer_leaves_the_old_file(place: Any, files: FileStore) -> None:
    files.write("a/x.bin", b"the old")
    process = place.start(sys.executable, place.script(WRITER), files.url, stdin=-1)
    assert process.stdout.readline() == b"half\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert files.read("a/x.bin") == b"the old"
    assert paths(files) == ["a/x.bin"]
    assert len(on_disk(files)) == 2  # its leftovers are there and are not an object
    with files.writer("a/x.bin") as file:
        assert file.tell() == 0
        file.write(b"new")
    assert files.read("a/x.bin") == b"new"
    assert on_disk(files) == ["a/x.bin"]


def test_two_processes_cannot_write_one_file_and_the_first_ones_is_whole(place: Any, files: FileStore) -> None:
    process = place.start(sys.executable, place.script(WRITER), files.url, stdin=-1)
    assert process.stdout.readline() == b"half\n"
    with pytest.raises(StoreError) as caught:
        files.write("a/x.bin", b"of the second")
    assert str(caught.value).startswith(f"{files.url}/a/x.bin: another process is writing it")
    process.communicate(b"\n", timeout=10)
    assert files.read("a/x.bin") == b"half of the new, and the rest"
    assert on_disk(files) == ["a/x.bin"]
    files.write("a/x.bin", b"of the second")
    assert files.read("a/x.bin") == b"of the second"


def test_a_writer_that_comes_just_as_the_first_publishes_empties_nothing(
    files: FileStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between its opening and its lock the other process may rename the very file it opened."""
    files.write("x", b"")
    beside = files.path_of(f".x{TEMPORARY_SUFFIX}")
    beside.write_bytes(b"of the first")
    lock = fcntl.flock

    def publish_then_lock(file: Any, operation: int) -> None:
        monkeypatch.setattr(fcntl, "flock", lock)
        os.rename(beside, files.path_of("x"))
        lock(file, operation)

    monkeypatch.setattr(fcntl, "flock", publish_then_lock)
    with files.writer("x") as file:
        assert files.read("x") == b"of the first"
        file.write(b"of the second")
    assert files.read("x") == b"of the second"
    assert on_disk(files) == ["x"]


def test_a_writer_that_seeks_back_writes_where_it_is(files: FileStore) -> None:
    with files.writer("x.zip") as raw, zipfile.ZipFile(raw, "w") as archive:
        archive.writestr("a", b"1" * 1000)
        with archive.open("b", "w") as member:  # its size is filled in afterwards
            member.write(b"2" * 5000)
    with zipfile.ZipFile(files.path_of("x.zip")) as archive:
        assert archive.testzip() is None
        assert archive.read("b") == b"2" * 5000


def test_a_published_file_has_the_rights_the_umask_leaves(files: FileStore) -> None:
    before = os.umask(0o027)
    try:
        files.write("x", b"1")
        files.write_new("y", b"1")
    finally:
        os.umask(before)
    assert {files.path_of(name).stat().st_mode & 0o777 for name in "xy"} == {0o640}


def test_a_file_where_a_folder_is_needed_is_named(files: FileStore) -> None:
    files.write("a", b"1")
    with pytest.raises(StoreError, match=f"{files.url}/a/x: "):
        files.write("a/x", b"2")
    assert files.read("a") == b"1"


def test_a_name_that_is_not_utf8_is_listed_and_read(files: FileStore) -> None:
    name = os.fsdecode(b"caf\xe9.bin")
    files.write(name, b"1")
    assert paths(files) == [name]
    assert files.read(name) == b"1"


# --- staging -------------------------------------------------------------------------------------------------------


def test_staging_copies_once_and_whole(store: Store, tmp_path: Path) -> None:
    contents = {"config.json": b"{}", "1_Pooling/config.json": b"[]", "model.bin": os.urandom(3_000_000), "empty": b""}
    for path, content in contents.items():
        store.write(path, content)
    folder = tmp_path / "staged/model"
    assert stage(store.url, folder) == folder
    copied = FileStore(folder)
    assert {path: copied.read(path) for path in paths(copied)} == contents
    assert [path.name for path in folder.parent.iterdir()] == ["model"]
    store.write("late", b"x")
    stage(store.url, folder)
    assert not (folder / "late").exists()


def test_staging_nothing_is_refused_with_the_place(store: Store, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        stage(store.url, tmp_path / "model")
    assert store.url in str(caught.value)
    assert not (tmp_path / "model").exists()


def test_staging_that_fails_leaves_nothing(files: FileStore, tmp_path: Path) -> None:
    files.write("a", b"1")
    (files.root / "b").symlink_to("nowhere")
    with pytest.raises(StoreError, match="/b: "):
        stage(files.url, tmp_path / "staged/model")
    assert list((tmp_path / "staged").iterdir()) == []


def test_staging_an_object_that_changes_under_it_is_an_error(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.write("a", b"12345")
    entries = store.list()
    store.write("a", b"123")

    monkeypatch.setattr(type(store), "list", mock.Mock(return_value=entries))
    with pytest.raises(StoreError, match="changed while it was copied"):
        stage(store.url, tmp_path / "staged/model")
    assert list((tmp_path / "staged").iterdir()) == []


def test_concurrent_stagings_all_get_the_complete_folder(place: Any, files: FileStore, tmp_path: Path) -> None:
    for number in range(20):
        files.write(f"{number}", os.urandom(50_000))
    script = """
import sys
from pathlib import Path
from estiba.storage import FileStore, stage
folder = stage(sys.argv[1], Path(sys.argv[2]))
print(sum(entry.size_bytes for entry in FileStore(folder).list()))
"""
    running = [place.start(sys.executable, "-c", script, files.url, tmp_path / "staged/model") for _ in range(3)]
    assert [place.run(process).stdout for process in running] == [b"1000000\n"] * 3
    assert [path.name for path in (tmp_path / "staged").iterdir()] == ["model"]
