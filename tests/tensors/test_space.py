"""A full disk ends neither the run nor existing checkpoints, and saving resumes when there is space."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from estiba.checkpoint import disk
from estiba.checkpoint import format as ckpt_format
from estiba.checkpoint.manager import CheckpointManager
from estiba.checkpoint.retention import Retention
from estiba.checkpoint.writer import MARGIN_BYTES, Writer
from tensors import runs, toy
from tensors.states import is_same, state_of

Opened = Callable[..., CheckpointManager]
SMALL_DISK = Path("/small-disk")
WIDE = {"width": 512, "layers": 4}
"""12 MB."""


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 MB: one that is mounted already (scripts/test.sh does so), or a new one."""
    if os.path.ismount(SMALL_DISK):
        place = SMALL_DISK
        yield place
        for left in place.iterdir():
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        return
    place = tmp_path / "disk"
    place.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(place)]
    try:
        done = subprocess.run(words, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("there is no mount command here")
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_full_disk_costs_one_save_and_saving_goes_on_when_there_is_space(
    small_disk: Path, opened: Opened, capfd: pytest.CaptureFixture[str]
) -> None:
    checkpoints = opened(small_disk / "c", retention=Retention(keep_last=2))
    checkpoints.save(1, state_of(1, **WIDE), wait=True)
    with open(small_disk / "somebody's", "wb") as file:
        os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(small_disk).free - (1 << 20))
    checkpoints.save(2, state_of(2, **WIDE), wait=True)
    err = capfd.readouterr().err
    assert (
        "no checkpoint at step 2" in err and "29.4 MB needed (12.6 and a margin of 16.8), 1.0 MB free; free some" in err
    )
    assert "The run continues; the newest is of step 1" in err and checkpoints.newest_step == 1
    (small_disk / "somebody's").unlink()
    checkpoints.save(3, state_of(3, **WIDE), wait=True)
    assert checkpoints.newest_step == 3
    found = checkpoints.restore()
    assert found is not None and is_same(found.state, state_of(3, **WIDE))
    checkpoints.close()


def test_space_that_goes_in_the_middle_of_a_write_costs_that_save_alone(
    small_disk: Path, opened: Opened, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # The check before the first byte is answered wrongly, as it is where others write to the same disk.
    (tmp_path / "sitecustomize.py").write_text(
        "import shutil, types\nshutil.disk_usage = lambda _: types.SimpleNamespace(free=10**12)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    checkpoints = opened(small_disk / "c", retention=Retention(keep_last=2))
    checkpoints.save(1, state_of(1, **WIDE), wait=True)
    with open(small_disk / "somebody's", "wb") as file:
        os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(small_disk).free - (7 << 20))
    checkpoints.save(2, state_of(2, **WIDE), wait=True)
    err = capfd.readouterr().err
    assert f"no checkpoint at step 2: {small_disk / 'c'}: no space left" in err and "larger volume" in err
    assert os.listdir(small_disk / "c") and not [name for name in os.listdir(small_disk / "c") if "saving" in name]
    (small_disk / "somebody's").unlink()
    checkpoints.save(3, state_of(3, **WIDE), wait=True)
    assert checkpoints.newest_step == 3
    checkpoints.close()


def test_for_want_of_space_old_ones_go_but_never_the_last_two_that_verify(small_disk: Path, opened: Opened) -> None:
    """12 MB each on 64 MB with a margin of 16: three fit, and five were asked for."""
    checkpoints = opened(small_disk / "c", retention=Retention(keep_last=5))
    for step in range(1, 8):
        checkpoints.save(step, state_of(step, **WIDE), wait=True)
        names = ckpt_format.checkpoint_names(small_disk / "c")
        assert names[0] == ckpt_format.checkpoint_name(step)
        assert len(names) >= min(step, 2)
        time.sleep(0.15)  # until it was read back
    checkpoints.close()
    newest = ckpt_format.checkpoint_names(small_disk / "c")[:2]
    assert [ckpt_format.verify(small_disk / "c" / name).step for name in newest] == [7, 6]


def test_what_was_quarantined_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "c"
    (folder / "bad-step-00000001").mkdir(parents=True)
    (folder / "bad-step-00000001/model.safetensors").write_bytes(bytes(100))
    writer = Writer(
        {
            "folder": str(folder), "rank": 0, "ranks": 1, "token": "feed", "descriptor": os.memfd_create("test"),
            "retention": {}, "upload": None,
        }
    )  # fmt: skip
    monkeypatch.setattr(
        writer, "_free_bytes", lambda: 0 if (folder / "bad-step-00000001").exists() else MARGIN_BYTES + 1000
    )
    writer._make_room(900)
    assert not (folder / "bad-step-00000001").exists()


def test_a_full_disk_is_found_before_the_first_byte_is_written(small_disk: Path) -> None:
    memory = memoryview(bytearray(96 << 20))
    with pytest.raises(OSError, match="No space left"):
        disk.write(small_disk / "x", memory, 0, 80 << 20)
    assert (small_disk / "x").stat().st_size == 0 or (small_disk / "x").stat().st_blocks == 0


def test_a_run_on_a_full_disk_goes_on_to_its_end(
    small_disk: Path, opened: Opened, capfd: pytest.CaptureFixture[str]
) -> None:
    """Neither checkpoints nor metrics can be written, and the weights are those of any other run."""
    whole = toy.Toy()
    trainer = runs.make(None, whole)
    trainer.resume(None)
    trainer.run()
    checkpoints = opened(small_disk / "c")
    with open(small_disk / "somebody's", "wb") as file:
        os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(small_disk).free)
    work = toy.Toy()
    trainer = runs.make(small_disk, work, checkpoints=checkpoints)
    trainer.resume(checkpoints.restore())
    trainer.run()
    assert trainer.step == runs.STEPS and toy.digest(work.model) == toy.digest(whole.model)
    err = capfd.readouterr().err
    assert f"no checkpoint at step {runs.STEPS}" in err and "there is none yet" in err
    assert err.count("metrics are no longer written there") == 1
    checkpoints.close()
