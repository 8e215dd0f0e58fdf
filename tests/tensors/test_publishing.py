"""A checkpoint appears whole or not at all, whatever ends the trainer, the writer or the disk."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from estiba.checkpoint import disk
from estiba.checkpoint import format as ckpt_format
from estiba.checkpoint.format import Manifest
from estiba.checkpoint.manager import CheckpointManager
from estiba.checkpoint.writer import Writer
from estiba.errors import CheckpointError
from tensors.states import files_of, is_same, state_of

Opened = Callable[..., CheckpointManager]


@pytest.mark.parametrize("shape", ["small", "direct"])
def test_kills_at_random_moments_lose_nothing_that_was_acknowledged(tmp_path: Path, shape: str) -> None:
    # In its own process: pytest's has threads that a fork would leave behind.
    words = [sys.executable, "-m", "tensors.kills", str(tmp_path / "kills"), "4", "11", shape]
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "OMP_NUM_THREADS": "1"}
    log = subprocess.run(words, env=environ, stdout=subprocess.PIPE, text=True, check=True, timeout=60).stdout
    found = json.loads(log.split("KILLS ", 1)[1])
    assert found["unrecoverable"] == []
    assert found["kills"] == 4 and found["saves"] > 4 and found["resumed"] >= 2


FAULTS = ["file", "fsync", "manifest", "rename", "parent"]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_anywhere_before_the_name_leaves_no_checkpoint_and_the_next_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, until: Callable[[Callable[[], Any]], Any], fault: str
) -> None:
    writer = Writer(_settings(tmp_path))
    assert writer.save(_command(1, b"one")) == "step-00000001"
    until(lambda: writer.verified == {"step-00000001"})
    with monkeypatch.context() as patch:

        def fail(*_: Any, **__: Any) -> Any:
            raise OSError(errno.EIO, "Input/output error")

        if fault == "file":
            patch.setattr(ckpt_format, "write_file", fail)
        elif fault == "fsync":
            patch.setattr(os, "fsync", fail)
        elif fault == "manifest":
            real = Manifest.to_bytes
            patch.setattr(Manifest, "to_bytes", lambda manifest: fail() if manifest.step == 2 else real(manifest))
        elif fault == "rename":
            patch.setattr(os, "rename", fail)
        elif fault == "parent":
            patch.setattr(ckpt_format, "sync_directory", fail)
        with pytest.raises(OSError, match="Input/output"):
            writer.save(_command(2, b"two"))
    assert ckpt_format.checkpoint_names(tmp_path) == ["step-00000001"]
    assert not [name for name in os.listdir(tmp_path) if name.startswith(ckpt_format.TEMPORARY_PREFIX)]
    assert writer.save(_command(2, b"two again")) == "step-00000002"
    assert (tmp_path / "step-00000002/state.json").read_bytes() == b"two again"
    ckpt_format.verify(tmp_path / "step-00000002")


def test_the_manifest_is_the_last_file_and_everything_is_synced_before_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    real_sync, real_rename = os.fsync, os.rename

    def sync(descriptor: int) -> None:
        events.append("sync " + os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        real_sync(descriptor)

    def rename(old: Any, new: Any) -> None:
        events.append("rename " + os.path.basename(new))
        real_rename(old, new)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "rename", rename)
    Writer(_settings(tmp_path)).save(_command(3, b"three"))
    hidden = next(event for event in events if event.startswith("sync .saving-"))
    assert events == [
        "sync state.json", "sync manifest.json", hidden, "rename step-00000003", f"sync {tmp_path.name}"
    ]  # fmt: skip


def test_leftovers_of_a_crash_are_deleted_and_an_unfinished_copy_is_kept(
    tmp_path: Path, opened: Opened, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "checkpoints"
    for name in (".saving-step-00000005-0badc0de-1", ".saving-deleting-step-00000002-0badc0de", "step-00000004"):
        (folder / name).mkdir(parents=True)
        (folder / name / "state.json").write_text("{")
    (folder / "somebody's notes").mkdir()
    checkpoints = opened()
    assert checkpoints.restore() is None
    assert sorted(os.listdir(folder)) == [".training.lock", "bad-step-00000004", "somebody's notes"]
    assert (folder / "bad-step-00000004/state.json").read_text() == "{"
    said = capfd.readouterr().err
    assert "step-00000004: has no manifest" in said and "quarantined as bad-step-00000004" in said
    (folder / "step-00000003").mkdir()  # somebody copies one here while the job runs
    checkpoints.save(5, state_of(5), wait=True)
    assert checkpoints.newest_step == 5
    assert (folder / "step-00000003").exists()
    found = checkpoints.restore()
    assert found is not None and is_same(found.state, state_of(5))


def test_the_same_step_again_is_a_checkpoint_beside_the_first_and_the_newer_one_counts(opened: Opened) -> None:
    checkpoints = opened()
    checkpoints.save(5, state_of(5), wait=True)
    checkpoints.save(5, state_of(6), wait=True)
    assert ckpt_format.checkpoint_names(checkpoints.folder) == ["step-00000005-1", "step-00000005"]
    found = checkpoints.restore()
    assert found is not None and is_same(found.state, state_of(6)) and found.step == 5


def test_a_folder_in_the_way_without_a_manifest_is_never_written_into(tmp_path: Path) -> None:
    (tmp_path / "step-00000007").mkdir()
    writer = Writer(_settings(tmp_path))
    (tmp_path / "step-00000007").mkdir(exist_ok=True)
    assert writer.save(_command(7, b"seven")) in ("step-00000007", "step-00000007-1")
    assert ckpt_format.checkpoint_names(tmp_path)


def test_a_killed_writer_is_reported_the_run_continues_and_the_next_save_works(
    opened: Opened, capfd: pytest.CaptureFixture[str], until: Callable[[Callable[[], Any]], Any]
) -> None:
    checkpoints = opened()
    checkpoints.save(1, state_of(1), wait=True)
    assert checkpoints._writer is not None
    os.kill(checkpoints._writer.pid, signal.SIGSTOP)  # so that the kill comes in the middle of the save
    checkpoints.save(2, state_of(2))
    assert checkpoints.is_busy
    os.kill(checkpoints._writer.pid, signal.SIGKILL)
    until(lambda: not checkpoints.is_busy)  # without a wait: a manager that stays busy would never save again
    assert "no checkpoint at step 2: the checkpoint writer was killed, likely out of memory" in capfd.readouterr().err
    assert checkpoints.newest_step == 1
    checkpoints.save(3, state_of(3), wait=True)
    assert checkpoints.newest_step == 3
    found = checkpoints.restore()
    assert found is not None and is_same(found.state, state_of(3))
    assert capfd.readouterr().err == ""


def test_what_a_killed_writer_left_is_cleared_by_the_next_save(opened: Opened) -> None:
    checkpoints = opened()
    checkpoints.save(1, state_of(1), wait=True)
    left = checkpoints.folder / f"{ckpt_format.TEMPORARY_PREFIX}step-00000002-{checkpoints._token}-2"
    left.mkdir()
    (left / "model.safetensors").write_bytes(bytes(10_000))
    checkpoints.save(3, state_of(3), wait=True)
    assert not left.exists()


def test_the_writer_dies_with_its_trainer(tmp_path: Path, until: Callable[[Callable[[], Any]], Any]) -> None:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        checkpoints = CheckpointManager(tmp_path)
        checkpoints.save(1, state_of(1), wait=True)
        assert checkpoints._writer is not None
        os.write(writing, str(checkpoints._writer.pid).encode())
        signal.pause()
    os.close(writing)
    with os.fdopen(reading) as file:
        pid = int(os.read(file.fileno(), 20))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)

    def is_gone() -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
        except OSError:
            return True

    until(is_gone)


def test_a_lock_that_a_killed_trainer_s_child_still_holds_for_a_moment_is_waited_for(
    tmp_path: Path, opened: Opened
) -> None:
    (tmp_path / "checkpoints").mkdir()
    with open(tmp_path / "checkpoints/.training.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        threading.Timer(0.5, fcntl.flock, (file, fcntl.LOCK_UN)).start()
        assert opened().restore() is None


def test_two_jobs_cannot_share_a_folder(opened: Opened) -> None:
    opened()
    with pytest.raises(CheckpointError, match="another job is using this checkpoint directory"):
        opened()


def test_a_file_system_without_direct_writes_is_written_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = os.urandom(disk.CHUNK_BYTES + 12_345)
    memory = memoryview(bytearray(data + bytes(disk.PAGE_BYTES)))
    real = os.open

    def refuse(path: Any, flags: int, *more: Any, **how: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(path, flags, *more, **how)

    monkeypatch.setattr(os, "open", refuse)
    digest = disk.write(tmp_path / "x", memory, 0, len(data))
    assert (tmp_path / "x").read_bytes() == data
    assert disk.digest_of(tmp_path / "x", len(data)) == digest
    assert bytes(disk.read(tmp_path / "x", len(data))) == data


@pytest.mark.parametrize("size", [0, 1, 4096, 4097, disk.CHUNK_BYTES, disk.CHUNK_BYTES + 1, 3 * disk.CHUNK_BYTES + 777])
def test_files_of_any_size_are_written_and_read_exactly(tmp_path: Path, size: int) -> None:
    import mmap

    buffer = mmap.mmap(-1, (size // disk.PAGE_BYTES + 2) * disk.PAGE_BYTES)
    data = os.urandom(size)
    buffer[disk.PAGE_BYTES : disk.PAGE_BYTES + size] = data
    digest = disk.write(tmp_path / "x", memoryview(buffer), disk.PAGE_BYTES, size)
    assert (tmp_path / "x").read_bytes() == data
    assert bytes(disk.read(tmp_path / "x", size)) == data
    assert disk.digest_of(tmp_path / "x", size) == digest


def test_a_checkpoint_has_the_files_that_its_manifest_names(opened: Opened) -> None:
    checkpoints = opened()
    checkpoints.save(4, state_of(4), metrics={"val_loss": 0.25}, kind="interrupt", wait=True)
    path = checkpoints.folder / "step-00000004"
    manifest = ckpt_format.verify(path)
    assert files_of(path) == ["model.safetensors", "state.json", "state.safetensors", "manifest.json"]
    assert sorted(manifest.files) == files_of(path)[:-1]
    assert (manifest.step, manifest.kind, manifest.ranks, manifest.metrics) == (4, "interrupt", 1, {"val_loss": 0.25})


def test_the_weights_are_a_file_that_plain_safetensors_reads(opened: Opened) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    checkpoints = opened()
    checkpoints.save(4, state_of(4), wait=True)
    found = safetensors.load_file(checkpoints.folder / "step-00000004/model.safetensors")
    assert is_same(dict(sorted(found.items())), dict(sorted(state_of(4)["model"].items())))


def _settings(folder: Path) -> dict[str, Any]:
    descriptor = os.memfd_create("test")
    os.ftruncate(descriptor, 4096)
    return {
        "folder": str(folder), "rank": 0, "ranks": 1, "token": "feed", "descriptor": descriptor,
        "retention": {}, "upload": None,
    }  # fmt: skip


def _command(step: int, text: bytes) -> dict[str, Any]:
    return {
        "step": step, "number": step, "needed": len(text), "kind": "step", "metrics": {},
        "buffer_bytes": 4096, "files": [], "texts": {"state.json": text.decode()}, "rank_timeout_s": 1,
    }  # fmt: skip
