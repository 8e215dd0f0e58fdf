"""Staging on one host: what arrives, what is left after a kill, and what bad input gets."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from estiba.errors import ConfigError, StoreError
from estiba.staging import stage
from estiba.staging.files import StagedFiles
from estiba.staging.pieces import PieceTable
from estiba.staging.source import SourceChanged
from estiba.storage import Entry
from s3server import S3Server
from shaped_endpoint import ShapedEndpoint, shaped_endpoint

SHARED = Path(__file__).resolve().parents[2] / "shared"
PIECE = 2**16
ODD_NAMES = ("a b.bin", "c#1.bin", "d?x=1.bin", "ñandú/é.bin", "e%20f.bin", "deep/er/g+h.bin", "n" * 250 + ".bin")


def put(client: Any, url: str, name: str, data: bytes) -> None:
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    client.put_object(Bucket=bucket, Key=f"{prefix}/{name}", Body=data)


def tree(folder: Path) -> dict[str, bytes]:
    """All files below a folder, hidden ones too."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_is_staged_equals_the_objects_and_nothing_else_is_there(
    s3_url: str, s3_client: Any, tmp_path: Path
) -> None:
    objects = {name: os.urandom(3 * PIECE + number) for number, name in enumerate(ODD_NAMES)} | {"empty": b""}
    for name, data in objects.items():
        put(s3_client, s3_url, name, data)
    result = stage(s3_url, tmp_path / "model", piece_bytes=PIECE)
    assert tree(tmp_path / "model") == objects
    assert result.source_bytes == result.size_bytes == sum(map(len, objects.values()))


@pytest.mark.parametrize("form", ["{}/", "{}/*"])
def test_a_source_may_be_written_as_for_other_tools(form: str, s3_url: str, s3_client: Any, tmp_path: Path) -> None:
    put(s3_client, s3_url, "x", b"1")
    stage(form.format(s3_url), tmp_path / "model")
    assert tree(tmp_path / "model") == {"x": b"1"}


def test_one_object_is_staged_into_a_directory(s3_url: str, s3_client: Any, tmp_path: Path) -> None:
    put(s3_client, s3_url, "model.bin", b"weights")
    put(s3_client, s3_url, "model.bin.md5", b"another object")
    stage(f"{s3_url}/model.bin", f"{tmp_path}/new/")
    assert tree(tmp_path / "new") == {"model.bin": b"weights"}
    with pytest.raises(ConfigError, match=r"is one object.*write .*/other/"):
        stage(f"{s3_url}/model.bin", tmp_path / "other")


def test_files_are_as_new_as_now_so_that_a_sync_leaves_them_alone(s3_url: str, s3_client: Any, tmp_path: Path) -> None:
    before = time.time() - 1
    put(s3_client, s3_url, "x", b"1")
    stage(s3_url, tmp_path / "model")
    assert (tmp_path / "model/x").stat().st_mtime >= before


def test_a_second_run_reads_nothing(s3_url: str, s3_client: Any, tmp_path: Path) -> None:
    put(s3_client, s3_url, "x", os.urandom(3 * PIECE))
    stage(s3_url, tmp_path / "model", piece_bytes=PIECE)
    assert stage(s3_url, tmp_path / "model", piece_bytes=PIECE).source_bytes == 0


def test_a_file_that_was_changed_since_is_staged_again(s3_url: str, s3_client: Any, tmp_path: Path) -> None:
    objects = {"x": os.urandom(3 * PIECE), "y": os.urandom(2 * PIECE)}
    for name, data in objects.items():
        put(s3_client, s3_url, name, data)
    stage(s3_url, tmp_path / "model", piece_bytes=PIECE)
    damaged = bytearray(objects["x"])
    damaged[PIECE + 7] ^= 1
    (tmp_path / "model/x").write_bytes(damaged)
    assert stage(s3_url, tmp_path / "model", piece_bytes=PIECE).source_bytes == 3 * PIECE
    assert tree(tmp_path / "model") == objects


def test_an_object_that_was_replaced_is_staged_again_and_the_others_are_not(
    s3_url: str, s3_client: Any, tmp_path: Path
) -> None:
    put(s3_client, s3_url, "x", bytes(3 * PIECE))
    put(s3_client, s3_url, "y", bytes(2 * PIECE))
    stage(s3_url, tmp_path / "model", piece_bytes=PIECE)
    new = os.urandom(2 * PIECE)
    put(s3_client, s3_url, "y", new)
    assert stage(s3_url, tmp_path / "model", piece_bytes=PIECE).source_bytes == 2 * PIECE
    assert tree(tmp_path / "model") == {"x": bytes(3 * PIECE), "y": new}


def test_an_object_that_changes_while_it_is_staged_is_an_error_and_publishes_nothing(
    s3_url: str, s3_client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(s3_client, s3_url, "a", bytes(PIECE))
    put(s3_client, s3_url, "x", bytes(4 * PIECE))
    original = StagedFiles.open

    def replaced_after_the_listing(self: StagedFiles, published: Any) -> None:
        put(s3_client, s3_url, "x", os.urandom(4 * PIECE))
        original(self, published)

    monkeypatch.setattr(StagedFiles, "open", replaced_after_the_listing)
    with pytest.raises(SourceChanged, match=r"/x: it was replaced or deleted while.*Run the same command"):
        stage(s3_url, tmp_path / "model", piece_bytes=PIECE)
    assert not [path for path in (tmp_path / "model").rglob("*") if not path.name.endswith(".estiba-tmp")]


def test_a_source_without_objects_is_one_message(s3_url: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing there to stage; check the bucket and the prefix"):
        stage(s3_url, tmp_path / "model")


def test_a_source_that_is_not_on_s3_is_one_message(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is not on S3"):
        stage(str(tmp_path), tmp_path / "model")


@pytest.mark.parametrize("paths", [("a", "a/b"), ("../x",), ("a/../../x",), ("a//b",), ("n" * 256,)])
def test_names_that_cannot_be_files_are_named(paths: tuple[str, ...]) -> None:
    with pytest.raises(StoreError, match="rename"):
        PieceTable("s3://b/p", [Entry(path, 1, "e") for path in paths])


def test_too_little_room_is_said_before_the_first_byte(
    s3_url: str, s3_client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(s3_client, s3_url, "x", bytes(3 * PIECE))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9 - PIECE, PIECE))
    with pytest.raises(StoreError, match=r"model: .* GB are still to be staged and .* GB are free; free some"):
        stage(s3_url, tmp_path / "model", piece_bytes=PIECE)


def test_a_disk_that_fills_up_meanwhile_is_one_message(s3_url: str, s3_client: Any, tmp_path: Path) -> None:
    put(s3_client, s3_url, "x", bytes(40 * PIECE))
    limit = f'ulimit -f {10 * PIECE // 1024}; exec "$@"'  # a write beyond it fails, as on a full disk
    program = f"import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n{PROGRAM}"
    done = subprocess.run(
        ["bash", "-c", limit, "-", sys.executable, "-c", program, s3_url, str(tmp_path / "model"), str(PIECE)],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(SHARED)}, timeout=60,
    )  # fmt: skip
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert f"{tmp_path / 'model'}: File too large; check the disk" in done.stderr
    assert not (tmp_path / "model/x").exists()


def test_no_space_left_is_one_message_with_its_remedy(
    s3_url: str, s3_client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(s3_client, s3_url, "x", bytes(4 * PIECE))
    real = os.pwrite

    def full(descriptor: int, data: Any, at: int) -> int:
        if at >= 2 * PIECE:
            raise OSError(28, "No space left on device")
        return real(descriptor, data, at)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(StoreError, match=r"model: No space left on device; free some space, stage into another"):
        stage(s3_url, tmp_path / "model", piece_bytes=PIECE)
    assert not (tmp_path / "model/x").exists()


def test_a_fault_of_a_thread_is_an_error_and_no_wait_without_end(
    s3_url: str, s3_client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(s3_client, s3_url, "x", bytes(4 * PIECE))
    monkeypatch.setattr(StagedFiles, "write", lambda *_: 1 / 0)
    with pytest.raises(StoreError, match="division by zero"):
        stage(s3_url, tmp_path / "model", piece_bytes=PIECE)


def test_ctrl_c_is_no_traceback_and_keeps_what_arrived(
    slow: ShapedEndpoint, tmp_path: Path, until: Callable[[Callable[[], Any]], Any]
) -> None:
    line = [sys.executable, "-m", "estiba.staging", "s3://bucket/model", str(tmp_path / "model")]
    environ = {**os.environ, **slow.environ, "PYTHONPATH": str(SHARED)}
    process = subprocess.Popen(line, env=environ, stderr=subprocess.PIPE, text=True)
    until(lambda: list((tmp_path / "model").glob(".*")))
    process.send_signal(signal.SIGINT)
    _, text = process.communicate(timeout=60)
    assert (process.returncode, "Traceback" in text) == (130, False), text


def test_a_path_that_is_a_file_is_one_message(s3_url: str, s3_client: Any, tmp_path: Path) -> None:
    put(s3_client, s3_url, "x", b"1")
    (tmp_path / "model").write_text("in the way")
    with pytest.raises(StoreError, match=r"model: File exists; .* is in the way"):
        stage(s3_url, tmp_path / "model")


# --- kills ---------------------------------------------------------------------------------------------------------

PROGRAM = """
import os, sys
from estiba.errors import EstibaError
from estiba.staging import stage
try:
    stage(sys.argv[1], sys.argv[2], piece_bytes=int(sys.argv[3]), connections=4)
except EstibaError as error:
    print(error, file=sys.stderr)
    os._exit(error.exit_code)
os._exit(0)
"""


@pytest.fixture
def slow(tmp_path: Path) -> Iterator[ShapedEndpoint]:
    """An endpoint that sends 2 MB/s a connection, with 4 MB in two objects."""
    folder = tmp_path / "served"
    (folder / "bucket/model").mkdir(parents=True)
    for name in "ab":
        (folder / "bucket/model" / name).write_bytes(os.urandom(2**21))
    with shaped_endpoint(folder, tmp_path / "log", "--mb-per-s", "2") as endpoint:
        yield endpoint


def start(endpoint: ShapedEndpoint, target: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", PROGRAM, "s3://bucket/model", str(target), str(PIECE)]
    return subprocess.Popen(command, env={**os.environ, **endpoint.environ, "PYTHONPATH": str(SHARED)})


def test_a_killed_run_resumes_and_reads_only_what_was_missing(
    slow: ShapedEndpoint, tmp_path: Path, until: Callable[[Callable[[], Any]], Any]
) -> None:
    target = tmp_path / "model"
    first = start(slow, target)
    until(lambda: slow.sent_bytes() >= 2**21)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert not [path for path in target.iterdir() if not path.name.endswith(".estiba-tmp")]
    before = slow.sent_bytes()
    assert start(slow, target).wait(60) == 0
    assert slow.sent_bytes() - before <= 2**22 - before + 8 * PIECE
    assert tree(target) == tree(slow.folder / "bucket/model")


def test_bytes_that_the_disk_lost_after_a_kill_are_read_again(
    slow: ShapedEndpoint, tmp_path: Path, until: Callable[[Callable[[], Any]], Any]
) -> None:
    target = tmp_path / "model"
    first = start(slow, target)
    until(lambda: slow.sent_bytes() >= 2**21)
    first.send_signal(signal.SIGKILL)
    first.wait()
    for path in target.iterdir():
        if path.stat().st_size == 2**21:  # the data; not the ledger
            path.write_bytes(bytes(2**21))
    assert start(slow, target).wait(60) == 0
    assert tree(target) == tree(slow.folder / "bucket/model")


def test_two_processes_of_one_host_read_the_source_once(
    slow: ShapedEndpoint, tmp_path: Path, until: Callable[[Callable[[], Any]], Any]
) -> None:
    both = [start(slow, tmp_path / "model") for _ in range(2)]
    assert [process.wait(60) for process in both] == [0, 0]
    until(lambda: slow.sent_bytes() >= 2**22)  # the endpoint logs a request when its pause has passed
    assert slow.sent_bytes() == 2**22
    assert tree(tmp_path / "model") == tree(slow.folder / "bucket/model")


# --- the command ---------------------------------------------------------------------------------------------------


def command(s3: S3Server, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "estiba.staging", *arguments],
        capture_output=True, text=True, env={**os.environ, **s3.environ, "PYTHONPATH": str(SHARED)}, timeout=60,
    )  # fmt: skip


def test_the_command_stages_and_says_what_it_did(s3: S3Server, s3_url: str, s3_client: Any, tmp_path: Path) -> None:
    put(s3_client, s3_url, "x", b"weights")
    done = command(s3, s3_url, str(tmp_path / "model"))
    assert (done.returncode, tree(tmp_path / "model")) == (0, {"x": b"weights"})
    assert "files=1" in done.stderr


def test_a_mistake_is_one_line_and_status_2(s3: S3Server, s3_url: str, tmp_path: Path) -> None:
    done = command(s3, s3_url, str(tmp_path / "model"))
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "nothing there to stage" in done.stderr


@pytest.mark.parametrize(("source", "target"), [("s3://a/b", "s3://c/d"), ("a", "b")])
def test_two_sides_of_a_kind_are_refused(source: str, target: str, s3: S3Server) -> None:
    done = command(s3, source, target)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "one of them must be on S3" in done.stderr


def test_the_command_uploads_a_directory(s3: S3Server, s3_url: str, s3_client: Any, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/x").write_bytes(b"weights")
    assert command(s3, str(tmp_path / "model"), s3_url).returncode == 0
    assert s3_client.get_object(Bucket="estiba", Key=f"{s3_url[12:]}/x")["Body"].read() == b"weights"


# --- what users' scripts do afterwards ------------------------------------------------------------------------------


def s5cmd_sync(s3: S3Server, url: str, target: Path) -> list[str]:
    """Run the line of a public train.sh, unedited. Returns what was transferred."""
    environ = {**os.environ, **s3.environ, "S3_ENDPOINT_URL": s3.endpoint_url}
    line = ["s5cmd", "sync", f"{url}/*", f"{target}/"]
    program = str(Path(sys.executable).parent / "s5cmd")
    done = subprocess.run(line, executable=program, env=environ, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("where", ["directory", "warm pool", "warm pool on another disk"])
def test_an_unedited_sync_afterwards_transfers_nothing(
    where: str, s3: S3Server, s3_url: str, s3_client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    objects = {"a b.bin": os.urandom(PIECE), "deep/x.bin": os.urandom(PIECE)}
    for name, data in objects.items():
        put(s3_client, s3_url, name, data)
    if where != "directory":
        monkeypatch.setenv("SAGEMAKER_MANAGED_WARMPOOL_CACHE_DIRECTORY", str(tmp_path / "warmpoolcache"))
    if where == "warm pool on another disk":
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError(18, "Invalid cross-device link")))
    assert len(s5cmd_sync(s3, s3_url, tmp_path / "unstaged")) == 2
    stage(s3_url, tmp_path / "model")
    assert s5cmd_sync(s3, s3_url, tmp_path / "model") == []
    assert {name: (tmp_path / "model" / name).read_bytes() for name in objects} == objects


# --- the warm pool's cache -----------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "warmpoolcache"
    folder.mkdir()
    monkeypatch.setenv("SAGEMAKER_MANAGED_WARMPOOL_CACHE_DIRECTORY", str(folder))
    return folder


def test_the_next_job_of_a_warm_pool_reads_nothing(s3_url: str, s3_client: Any, tmp_path: Path, cache: Path) -> None:
    data = os.urandom(3 * PIECE)
    put(s3_client, s3_url, "deep/x", data)
    assert stage(s3_url, tmp_path / "job-1/model", piece_bytes=PIECE).source_bytes == 3 * PIECE
    shutil.rmtree(tmp_path / "job-1")
    assert stage(s3_url, tmp_path / "job-2/model", piece_bytes=PIECE).source_bytes == 0
    assert tree(tmp_path / "job-2/model") == {"deep/x": data}


def test_a_model_that_changed_replaces_what_the_cache_holds(
    s3_url: str, s3_client: Any, tmp_path: Path, cache: Path
) -> None:
    put(s3_client, s3_url, "x", bytes(PIECE))
    stage(s3_url, tmp_path / "model", piece_bytes=PIECE)
    put(s3_client, s3_url, "x", b"new")
    stage(s3_url, tmp_path / "model", piece_bytes=PIECE)
    assert tree(tmp_path / "model") == {"x": b"new"}


def test_a_full_cache_gives_up_its_oldest_entries_and_is_not_used_if_that_is_not_enough(
    s3_url: str, s3_client: Any, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(s3_client, s3_url, "x", bytes(3 * PIECE))
    old = cache / "estiba-stage/old"
    old.mkdir(parents=True)
    real = shutil.disk_usage

    def usage(path: Any) -> Any:
        return shutil._ntuple_diskusage(0, 0, PIECE) if cache in Path(path).parents else real(path)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    stage(s3_url, tmp_path / "model", piece_bytes=PIECE)
    assert not old.exists()
    assert tree(tmp_path / "model") == {"x": bytes(3 * PIECE)}
    assert not list(cache.rglob("x"))
