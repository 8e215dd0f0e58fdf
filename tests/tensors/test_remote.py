"""Checkpoints on S3: the manifest is the commit, uploads never hurt the run, a lost disk is no loss."""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from estiba.checkpoint import format as ckpt_format
from estiba.checkpoint.format import MANIFEST
from estiba.checkpoint.manager import CheckpointManager
from estiba.checkpoint.remote import Remote
from estiba.checkpoint.retention import Retention
from estiba.errors import StoreError
from s3server import S3Server, s3_server
from tensors.states import flip_bit, is_same, state_of

Opened = Callable[..., CheckpointManager]
BIG = {"width": 1400, "layers": 1}
"""24 MB: files of several parts."""


@pytest.fixture
def three(tmp_path: Path, s3_url: str) -> Path:
    """Steps 1 to 3 in a folder and at `s3_url`."""
    folder = tmp_path / "checkpoints"
    checkpoints = CheckpointManager(folder)
    for step in (1, 2, 3):
        checkpoints.save(step, state_of(step, width=16), wait=True)
    checkpoints.close()
    for name in reversed(ckpt_format.checkpoint_names(folder)):
        Remote(s3_url).send(folder / name)
    return folder


def test_what_is_saved_is_uploaded_and_a_host_without_it_restores_from_there(
    tmp_path: Path, s3_url: str, opened: Opened, capfd: pytest.CaptureFixture[str]
) -> None:
    first = opened(upload=s3_url)
    first.save(7, state_of(7, **BIG), wait=True)
    first.close()
    assert Remote(s3_url).names() == ["step-00000007"]
    shutil.rmtree(tmp_path / "checkpoints")
    again = opened(upload=s3_url)
    found = again.restore()
    assert found is not None and found.step == 7 and is_same(found.state, state_of(7, **BIG))
    assert found.path == again.folder / "step-00000007"  # now it is in the folder too
    err = capfd.readouterr().err
    assert "restored from s3://" in err and "/step-00000007\n" in err
    ckpt_format.verify(again.folder / "step-00000007")


def test_the_manifest_is_uploaded_last(three: Path, s3_url: str) -> None:
    place = Remote(s3_url + "/other")
    seen: list[tuple[str, list[str]]] = []
    real_file, real_write = place.store.put_file, place.store.write

    def put_file(path: str, source: Path) -> None:
        seen.append((path, place.names()))
        real_file(path, source)

    def write(path: str, data: bytes) -> None:
        seen.append((path, place.names()))
        real_write(path, data)

    place.store.put_file, place.store.write = put_file, write  # type: ignore[method-assign, assignment]
    place.send(three / "step-00000003")
    assert seen[-1][0] == f"step-00000003/{MANIFEST}" and len(seen) == 4
    assert all(names == [] for _, names in seen)
    assert place.names() == ["step-00000003"]


@pytest.mark.parametrize("after", [0, 1, 2])
def test_an_interrupted_upload_is_never_restored(
    three: Path, tmp_path: Path, s3_url: str, opened: Opened, after: int
) -> None:
    place = Remote(s3_url)
    folder = tmp_path / "new"
    new = CheckpointManager(folder)
    new.save(4, state_of(4, width=16), wait=True)
    new.close()
    real, sent = place.store.put_file, []

    def put_file(path: str, source: Path) -> None:
        if len(sent) == after:
            raise StoreError("the network is gone")
        sent.append(path)
        real(path, source)

    place.store.put_file = put_file  # type: ignore[method-assign]
    with pytest.raises(StoreError, match="the network is gone"):
        place.send(folder / "step-00000004")
    assert place.names()[0] == "step-00000003"
    found = opened(tmp_path / "host", upload=s3_url).restore()
    assert found is not None and found.step == 3


def test_the_same_name_with_other_bytes_is_never_there_in_part(three: Path, tmp_path: Path, s3_url: str) -> None:
    """A step that was saved again after its first checkpoint was quarantined."""
    folder = tmp_path / "new"
    new = CheckpointManager(folder)
    new.save(3, state_of(30, width=16), wait=True)
    new.close()
    place = Remote(s3_url)
    real = place.store.put_file

    def put_file(path: str, source: Path) -> None:
        real(path, source)
        raise StoreError("the network is gone")

    place.store.put_file = put_file  # type: ignore[method-assign]
    with pytest.raises(StoreError):
        place.send(folder / "step-00000003")
    assert place.names() == ["step-00000002", "step-00000001"]
    place.store.put_file = real  # type: ignore[method-assign]
    place.send(folder / "step-00000003")
    name = place.fetch("step-00000003", tmp_path / "fetched")
    found = CheckpointManager(tmp_path / "fetched").restore(tmp_path / "fetched" / name)
    assert found is not None and is_same(found.state, state_of(30, width=16))


def test_uploads_that_killed_processes_began_are_aborted(s3: S3Server, s3_url: str, opened: Opened) -> None:
    client = s3.client()
    prefix = s3_url.rpartition("/")[2]
    for key in (f"{prefix}/step-00000001/model.safetensors", f"{prefix}-other/x"):
        client.create_multipart_upload(Bucket="estiba", Key=key)
    checkpoints = opened(upload=s3_url)
    checkpoints.save(1, state_of(1, width=16), wait=True)
    checkpoints.close()
    left = [upload["Key"] for upload in client.list_multipart_uploads(Bucket="estiba").get("Uploads", [])]
    assert [key for key in left if prefix in key] == [f"{prefix}-other/x"]


def test_s3_keeps_the_same_checkpoints_as_the_folder(three: Path, tmp_path: Path, s3_url: str) -> None:
    place = Remote(s3_url)
    folder = tmp_path / "new"
    new = CheckpointManager(folder)
    for step in (4, 5):
        new.save(step, state_of(step, width=16), wait=True)
        if step == 5:
            place.store.put_file("step-00000002-1/model.safetensors", folder / "step-00000005/model.safetensors")
        place.send(folder / ckpt_format.checkpoint_name(step))
    new.close()
    place.prune(Retention(keep_last=2, keep_every=3))
    assert place.names() == ["step-00000005", "step-00000004", "step-00000003"]
    assert {entry.path.split("/")[0] for entry in place.store.list()} == set(place.names())


def test_a_run_prunes_s3_by_itself(s3_url: str, opened: Opened) -> None:
    checkpoints = opened(upload=s3_url, retention=Retention(keep_last=2))
    for step in range(1, 6):
        checkpoints.save(step, state_of(step, width=16), wait=True)
        _wait_for(lambda step=step: ckpt_format.checkpoint_name(step) in Remote(s3_url).names())
    checkpoints.close()
    assert Remote(s3_url).names() == ["step-00000005", "step-00000004"]


def test_a_bad_local_checkpoint_is_replaced_by_the_good_one_on_s3(
    three: Path, s3_url: str, opened: Opened, capfd: pytest.CaptureFixture[str]
) -> None:
    flip_bit(three / "step-00000003/model.safetensors", 3000)
    found = opened(upload=s3_url).restore()
    assert found is not None and found.step == 3 and is_same(found.state, state_of(3, width=16))
    err = capfd.readouterr().err
    assert "quarantined as bad-step-00000003" in err and "restored from s3://" in err


def test_a_bad_checkpoint_on_s3_is_quarantined_there_and_the_previous_one_is_restored(
    three: Path, s3: S3Server, s3_url: str, opened: Opened, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    place = Remote(s3_url)
    data = bytearray(place.store.read("step-00000003/model.safetensors"))
    data[700] ^= 4
    place.store.write("step-00000003/model.safetensors", bytes(data))
    place.store.delete("step-00000002/state.safetensors")
    found = opened(tmp_path / "host", upload=s3_url).restore()
    assert found is not None and found.step == 1 and is_same(found.state, state_of(1, width=16))
    assert place.names() == ["step-00000001"]
    err = capfd.readouterr().err
    assert "do not match their digest; quarantined" in err and "is missing where" in err


def test_a_full_local_disk_does_not_quarantine_checkpoints_on_s3(
    three: Path, s3_url: str, opened: Opened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    host = opened(tmp_path / "host", upload=s3_url)
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", refuse)
        with pytest.raises(StoreError, match="No space left"):
            host.restore()
    assert Remote(s3_url).names()[0] == "step-00000003"
    assert not [name for name in os.listdir(tmp_path / "host") if "saving" in name]
    found = host.restore()
    assert found is not None and found.step == 3


def test_an_outage_during_an_upload_does_not_hurt_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, opened: Opened, capfd: pytest.CaptureFixture[str]
) -> None:
    with s3_server(directory=tmp_path / "s3") as server:
        for name, value in server.environ.items():
            monkeypatch.setenv(name, value)
        url = server.make_bucket("estiba") + "/run"
        checkpoints = opened(upload=url)
        checkpoints.save(1, state_of(1), wait=True)
        _wait_for(lambda: Remote(url).names() == ["step-00000001"])
        server.stop()
        for step in (2, 3):
            before = time.monotonic()
            checkpoints.save(step, state_of(step), wait=True)
            assert time.monotonic() - before < 5 and checkpoints.newest_step == step
        checkpoints.close(timeout_s=1)
        assert "the last checkpoint was not uploaded in the time left" in capfd.readouterr().err
        server.start()
        again = opened(upload=url)
        found = again.restore()
        assert found is not None and is_same(found.state, state_of(3))  # the disk had it
        again.save(4, state_of(4), wait=True)
        again.close()
        assert Remote(url).names()[0] == "step-00000004"


def test_tensors_of_many_parts_arrive_whole(s3_url: str, tmp_path: Path, opened: Opened) -> None:
    state = {"model": {"w": torch.arange(11_000_000, dtype=torch.int32)}}
    checkpoints = opened(upload=s3_url)
    checkpoints.save(1, state, wait=True)
    checkpoints.close()
    assert checkpoints.timings.upload_bytes_per_s is None or checkpoints.timings.upload_bytes_per_s > 0
    found = opened(tmp_path / "host", upload=s3_url).restore()
    assert found is not None and is_same(found.state, state)


def _wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "waited twenty seconds in vain"
        time.sleep(0.02)
