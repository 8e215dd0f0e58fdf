"""The scan of an HDF5 file finds what is wrong with it: links, odd attributes, damage, a failing disk."""

from __future__ import annotations

import errno
import io
import os
import re
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hdf5_files import SESSIONS, open_trials, write_session, write_trial

from brain_to_text.data.indexing import scan_pool
from brain_to_text.data.indexing.scan import ScanResult, scan_object
from estiba.errors import DataError, StoreError
from estiba.storage import Entry, FileStore


def scanned(path: Path) -> ScanResult:
    return scan_object(FileStore(path.parent), Entry(path.name, path.stat().st_size))


def linked(group: h5py.Group, other: Path) -> None:
    del group["input_features"]
    group["input_features"] = h5py.ExternalLink(other, "/trial_0001/input_features")


def linked_on(group: h5py.Group, other: Path) -> None:
    group.file["elsewhere"] = h5py.ExternalLink(other, "/trial_0001")
    del group["seq_class_ids"]
    group["seq_class_ids"] = h5py.SoftLink("/elsewhere/seq_class_ids")


def virtual(group: h5py.Group, other: Path) -> None:
    del group["seq_class_ids"]
    layout = h5py.VirtualLayout((500,), "i4")
    layout[:] = h5py.VirtualSource(str(other), "trial_0001/seq_class_ids", (500,))
    group.create_virtual_dataset("seq_class_ids", layout)


def no_number(group: h5py.Group, _: Path) -> None:
    group.attrs["n_time_steps"] = np.inf


def two_numbers(group: h5py.Group, _: Path) -> None:
    group.attrs["seq_len"] = np.array([5, 6])


def huge(group: h5py.Group, _: Path) -> None:
    del group["seq_class_ids"]
    group.create_dataset("seq_class_ids", (2**40,), "i4", chunks=(1000,))


def words(group: h5py.Group, _: Path) -> None:
    del group["seq_class_ids"]
    group["seq_class_ids"] = np.array([b"AA", b"AE"])


@pytest.mark.parametrize(
    ("how", "problem"),
    [
        (linked, "is a link to another file, .*other.hdf5"),
        (linked_on, "is a link to /elsewhere/seq_class_ids, which does not exist or is another link"),
        (virtual, "is a virtual dataset"),
        (no_number, "its attribute n_time_steps is 'inf', not a whole number; correct"),
        (two_numbers, r"its attribute seq_len is '\[5 6\]', not a whole number; correct"),
        (huge, r"has shape \(1099511627776,\), but up to 500"),
        (words, "not whole numbers; write it as int32"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_problem_with_one_trial_does_not_affect_the_others(tmp_path: Path, how: Any, problem: str) -> None:
    """In a Python file object, h5py looks for the target of an external link in the same file: another trial."""
    other = write_session(tmp_path / "other", trials=3).rename(tmp_path / "other.hdf5")
    path = write_session(tmp_path / "data", trials=4)
    with h5py.File(path, "r+") as file:
        how(file["trial_0002"], other)
        file.id.links.create_soft(b"trial_\xff", b"/trial_0000")  # a name that is not valid text is not a trial
    result = scanned(path)
    assert len(result.trials) == 4 and list(result.problems) == ["trial_0002"]
    assert re.search(problem, result.problems["trial_0002"])


def test_a_link_within_the_file_is_followed(tmp_path: Path) -> None:
    path = write_session(tmp_path, trials=2)
    with h5py.File(path, "r+") as file:
        file["trial_0007"] = h5py.SoftLink("/trial_0001")
    result = scanned(path)
    assert not result.problems and result.trials[2].name == "trial_0007"
    assert result.trials[2].features == result.trials[1].features


def test_a_failing_disk_is_not_reported_as_a_damaged_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_session(tmp_path, trials=30)

    class Failing(io.FileIO):
        reads = 0

        def readinto(self, buffer: Any) -> int | None:
            Failing.reads += 1
            if Failing.reads == 200:
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
            return super().readinto(buffer)

    monkeypatch.setattr(FileStore, "open", lambda *_: Failing(path))
    with pytest.raises(StoreError, match=r"data_train.hdf5: cannot be read \(Stale file handle\); check the disk"):
        scanned(path)
    assert not scanned(path).problems


def test_a_file_whose_writer_was_killed_is_refused(tmp_path: Path) -> None:
    path = write_session(tmp_path)
    with h5py.File(path, "w", libver="latest") as file:
        write_trial(file, 0)
        file.flush()
        unfinished = path.read_bytes()
    path.write_bytes(unfinished)
    with pytest.raises(DataError, match=r"data_train.hdf5: is being written, or its writer was killed .*h5clear"):
        scanned(path)


def test_a_damaged_chunk_table_is_found_by_the_scan(tmp_path: Path) -> None:
    path = write_session(tmp_path, trials=1, layout="chunked")
    data = path.read_bytes()
    features = scanned(path).trials[0].features
    assert features is not None
    offset = features.chunks[1][1]
    entry = offset.to_bytes(8, "little")
    assert data.count(entry) == 1
    path.write_bytes(data.replace(entry, bytes(8)))
    assert "its chunk table is damaged" in scanned(path).problems["trial_0000"]


def test_tables_that_point_at_each_other_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupted copy can leave zeros in the heap of strings, which HDF5 would read forever."""
    path = write_session(tmp_path, SESSIONS[0], trials=3)
    write_session(tmp_path, SESSIONS[1], trials=3)
    data = path.read_bytes()
    at = data.index(b"GCOL") + 16
    path.write_bytes(data[:at] + bytes(512) + data[at + 512 :])
    monkeypatch.setattr(scan_pool, "MAX_SCAN_S", 2.0)
    with pytest.raises(
        DataError, match=rf"{SESSIONS[0]}/data_train.hdf5: its tables could not be read within 2 CPU seconds"
    ):
        open_trials(tmp_path, sessions=SESSIONS[:2], num_dataloader_workers=1)
