"""Every byte is verified before use. A checkpoint that fails is quarantined, and the one before it is used."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from estiba.checkpoint import disk
from estiba.checkpoint import format as ckpt_format
from estiba.checkpoint.format import MANIFEST, Manifest
from estiba.checkpoint.manager import CheckpointManager
from estiba.checkpoint.restore import load_newest, peek
from estiba.errors import CheckpointError, NewerFormatError, StoreError
from tensors.states import PAGE_BYTES, files_of, flip_bit, is_same, state_of, zero_page

Opened = Callable[..., CheckpointManager]
FILES = ["model.safetensors", "state.safetensors", "state.json", "manifest.json"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Steps 1, 2 and 3; tests work on copies."""
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    checkpoints = CheckpointManager(folder)
    for step in (1, 2, 3):
        checkpoints.save(step, state_of(step), wait=True, metrics={"val_loss": step / 2**20})
    checkpoints.close()
    return folder


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "checkpoints"))


def falls_back_to(step: int | None, opened: Opened, capfd: pytest.CaptureFixture[str]) -> str:
    """Restore the expected step exactly; returns the log."""
    checkpoints = opened()
    found = checkpoints.restore()
    checkpoints.close()
    assert (found.step if found else None) == step
    if found is not None:
        assert is_same(found.state, state_of(found.step))
    return capfd.readouterr().err


def test_untouched_it_comes_back(copy: Path, opened: Opened, capfd: pytest.CaptureFixture[str]) -> None:
    assert falls_back_to(3, opened, capfd) == ""


@pytest.mark.parametrize("name", FILES)
def test_one_flipped_bit_anywhere_is_caught_and_the_one_before_is_taken(
    copy: Path, opened: Opened, capfd: pytest.CaptureFixture[str], name: str
) -> None:
    chance = random.Random(name)
    path = copy / "step-00000003" / name
    size = path.stat().st_size
    places = [0, size * 8 - 1, *(chance.randrange(size * 8) for _ in range(6))]
    for bit in places:
        flip_bit(path, bit)
        err = falls_back_to(2, opened, capfd)
        assert "quarantined as bad-step-00000003, falling back to the one before" in err and name in err
        flip_bit(copy / "bad-step-00000003" / name, bit)
        os.rename(copy / "bad-step-00000003", copy / "step-00000003")
    falls_back_to(3, opened, capfd)


def test_every_single_bit_of_a_manifest_counts(copy: Path) -> None:
    data = (copy / "step-00000003" / MANIFEST).read_bytes()
    assert Manifest.from_bytes(data, "it").step == 3 and b"e-06" in data  # E-06 would be the same number
    for bit in range(len(data) * 8):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        with pytest.raises(CheckpointError):
            Manifest.from_bytes(bytes(changed), "it")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["zeroed page", "truncated", "appended", "deleted", "emptied", "a folder"])
def test_damage_of_any_kind_is_caught_and_the_one_before_is_taken(
    copy: Path, opened: Opened, capfd: pytest.CaptureFixture[str], name: str, damage: str
) -> None:
    path = copy / "step-00000003" / name
    size = path.stat().st_size
    if damage == "zeroed page":
        zero_page(path, size // PAGE_BYTES // 2)
    elif damage == "truncated":
        os.truncate(path, size - 1)
    elif damage == "appended":
        with open(path, "ab") as file:
            file.write(b"\x00")
    elif damage == "emptied":
        os.truncate(path, 0)
    else:
        path.unlink()
        if damage == "a folder":
            path.mkdir()
    err = falls_back_to(2, opened, capfd)
    assert "step-00000003" in err
    assert not (copy / "step-00000003").exists()


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_another_checkpoint_is_caught(
    copy: Path, opened: Opened, capfd: pytest.CaptureFixture[str], name: str
) -> None:
    shutil.copy(copy / "step-00000001" / name, copy / "step-00000003" / name)
    assert "quarantined as bad-step-00000003" in falls_back_to(2, opened, capfd)


def test_a_checkpoint_under_the_name_of_another_is_caught(
    copy: Path, opened: Opened, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(copy / "step-00000001", copy / "step-00000009")
    assert "step-00000009: holds step 1" in falls_back_to(3, opened, capfd)


def test_several_bad_ones_are_passed_over_and_all_bad_is_a_warning(
    copy: Path, opened: Opened, capfd: pytest.CaptureFixture[str]
) -> None:
    flip_bit(copy / "step-00000003/model.safetensors", 5000)
    flip_bit(copy / "step-00000002/state.json", 50)
    falls_back_to(1, opened, capfd)
    flip_bit(copy / "step-00000001/state.safetensors", 9000)
    assert "none of 1 checkpoints verifies; this run starts from step 0" in falls_back_to(None, opened, capfd)
    assert sorted(ckpt_format.quarantined_names(copy)) == [f"bad-step-0000000{step}" for step in (1, 2, 3)]


def test_one_that_was_asked_for_by_name_is_that_one_or_an_error(copy: Path, opened: Opened) -> None:
    found = opened().restore(copy / "step-00000002")
    assert found is not None and found.step == 2
    flip_bit(copy / "step-00000002/model.safetensors", 5000)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: its bytes do not match their digest"):
        opened(copy.parent / "elsewhere").restore(copy / "step-00000002")
    assert (copy / "step-00000002").is_dir()


@pytest.mark.parametrize("code", ckpt_format.PROCESS_ERRORS)
def test_a_checkpoint_is_not_called_bad_for_what_is_wrong_with_this_process(
    copy: Path, opened: Opened, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refuse(*_: Any) -> Any:
        raise OSError(code, os.strerror(code))

    checkpoints = opened()
    with monkeypatch.context() as patch:
        patch.setattr(disk, "read", refuse)
        with pytest.raises(StoreError, match="checkpoint itself may be intact and is kept"):
            checkpoints.restore()
    assert ckpt_format.checkpoint_names(copy)[0] == "step-00000003"
    found = checkpoints.restore()
    assert found is not None and found.step == 3


def test_a_read_error_of_the_disk_counts_as_damage(
    copy: Path, opened: Opened, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    real = disk.read

    def fail(path: Path, size_bytes: int) -> memoryview:
        if "step-00000003" in str(path):
            raise OSError(errno.EIO, "Input/output error")
        return real(path, size_bytes)

    monkeypatch.setattr(disk, "read", fail)
    assert "cannot be read (Input/output error); quarantined" in falls_back_to(2, opened, capfd)


def test_a_manifest_cannot_name_files_outside_its_folder(copy: Path) -> None:
    for name in ("../step-00000001/state.json", "/etc/passwd", ".hidden", MANIFEST, ""):
        data = Manifest(step=1, files={name: {"size": 1, "xxh3_128": "0" * 32}}).to_bytes()
        with pytest.raises(CheckpointError, match="file names"):
            Manifest.from_bytes(data, "it")


def test_a_manifest_of_another_format_is_refused_by_its_name() -> None:
    body = json.loads(Manifest(step=1, files={}).to_bytes())
    body["format"] = "estiba-checkpoint/9"
    with pytest.raises(CheckpointError, match=r"estiba-checkpoint/9.*reads 'estiba-checkpoint/1'"):
        Manifest.from_bytes(json.dumps(body).encode(), "it")


def test_two_that_verify_stay_when_the_newest_rots_on_the_disk(copy: Path, opened: Opened) -> None:
    """A long run with the least retention always has two checkpoints that were read back."""
    flip_bit(copy / "step-00000003/model.safetensors", 70_000)
    from estiba.checkpoint.retention import Retention

    checkpoints = opened(retention=Retention(keep_last=2))
    found = checkpoints.restore()
    assert found is not None and found.step == 2
    for step in (4, 5, 6, 7):
        checkpoints.save(step, state_of(step), wait=True)
        good = 0
        for name in ckpt_format.checkpoint_names(copy):
            try:
                ckpt_format.verify(copy / name)
                good += 1
            except CheckpointError:
                continue
        assert good >= 2
    checkpoints.close()
    assert files_of(copy / "step-00000007") and ckpt_format.checkpoint_names(copy)[:2] == [
        "step-00000007",
        "step-00000006",
    ]


# --- what is not damage


def _as_newer(folder: Path, name: str) -> None:
    """Rewrite a manifest as a version after this one would write it."""
    path = folder / name / MANIFEST
    body = json.loads(path.read_bytes())
    body.pop("xxh3_128")
    body["format"] = "estiba-checkpoint/2"
    body["parts"] = 4
    path.write_text(json.dumps({**body, "xxh3_128": ckpt_format._digest_of_body(body)}, indent=1) + "\n")


def test_a_checkpoint_of_a_newer_version_is_named_and_neither_quarantined_nor_passed_over(
    copy: Path, opened: Opened
) -> None:
    _as_newer(copy, "step-00000003")
    checkpoints = opened(copy)
    with pytest.raises(NewerFormatError, match=r"written by a newer version \(format 'estiba-checkpoint/2'"):
        checkpoints.restore()
    assert (copy / "step-00000003").exists() and not list(copy.glob("bad-*"))
    with pytest.raises(NewerFormatError):
        load_newest(copy, flag="--checkpoint")


@pytest.mark.parametrize("file", FILES)
def test_a_fifo_in_a_checkpoint_is_damage_and_does_not_hang(file: str, copy: Path, opened: Opened) -> None:
    (copy / "step-00000003" / file).unlink()
    os.mkfifo(copy / "step-00000003" / file)
    found = opened(copy).restore()
    assert found is not None and found.step == 2
    assert (copy / "bad-step-00000003").exists()


def test_a_restart_from_an_older_step_renames_the_later_ones_and_keeps_them(copy: Path, opened: Opened) -> None:
    checkpoints = opened(copy)
    assert checkpoints.supersede_after(1) == ["superseded-step-00000003", "superseded-step-00000002"]
    found = checkpoints.restore()
    assert found is not None and found.step == 1
    for step in (2, 3, 4, 5, 6):
        checkpoints.save(step, state_of(step), wait=True)
    checkpoints.close()
    assert [ckpt_format.verify(path).step for path in sorted(copy.glob("superseded-*"))] == [2, 3]


def test_peeking_reads_the_newest_state_without_tensors_and_quarantines_nothing(copy: Path) -> None:
    where, state = peek(copy) or ("", {})
    assert where == str(copy / "step-00000003") and set(state["model"].values()) == {None}
    assert state["loop"] == state_of(3)["loop"]
    flip_bit(copy / "step-00000003/state.json", 30)
    where, _ = peek(copy) or ("", {})
    assert where == str(copy / "step-00000002") and not list(copy.glob("bad-*"))
    assert peek(copy / "absent") is None
