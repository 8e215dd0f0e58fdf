"""What stands in one HDF5 file, and what is wrong with it: links, odd attributes, damage, a disk that fails."""

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
from files import SESSIONS, open_trials, write_session, write_trial

from brain_to_text.indexing import surveyors
from brain_to_text.indexing.survey import Survey, survey
from estiba.errors import DataError, StoreError
from estiba.store import Entry, FileStore


def surveyed(path: Path) -> Survey:
    return survey(FileStore(path.parent), Entry(path.name, path.stat().st_size))


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
    ("how", "said"),
    [
        (linked, "is a link to .*other.hdf5, another file"),
        (linked_on, "is a link to /elsewhere/seq_class_ids, which leads nowhere or further on"),
        (virtual, "a virtual dataset"),
        (no_number, "its attribute n_time_steps is 'inf', not a whole number; mend"),
        (two_numbers, r"its attribute seq_len is '\[5 6\]', not a whole number; mend"),
        (huge, r"has the shape \(1099511627776,\), and up to 500"),
        (words, "not whole numbers; write it as int32"),
    ],
    ids=lambda one: getattr(one, "__name__", ""),
)
def test_a_trial_that_is_not_all_there_is_a_problem_of_that_trial_alone(tmp_path: Path, how: Any, said: str) -> None:
    """h5py over a file of ours takes a link to another file for one into this file: another trial's values."""
    other = write_session(tmp_path / "other", trials=3).rename(tmp_path / "other.hdf5")
    path = write_session(tmp_path / "data", trials=4)
    with h5py.File(path, "r+") as file:
        how(file["trial_0002"], other)
        file.id.links.create_soft(b"trial_\xff", b"/trial_0000")  # a name that is no text is no trial
    found = surveyed(path)
    assert len(found.trials) == 4 and list(found.problems) == ["trial_0002"]
    assert re.search(said, found.problems["trial_0002"])


def test_a_link_within_the_file_is_the_trial_it_leads_to(tmp_path: Path) -> None:
    path = write_session(tmp_path, trials=2)
    with h5py.File(path, "r+") as file:
        file["trial_0007"] = h5py.SoftLink("/trial_0001")
    found = surveyed(path)
    assert not found.problems and found.trials[2].name == "trial_0007"
    assert found.trials[2].features == found.trials[1].features


def test_a_disk_that_fails_while_tables_are_read_is_no_fault_of_the_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
        surveyed(path)
    assert not surveyed(path).problems


def test_a_file_whose_writer_was_killed_is_refused(tmp_path: Path) -> None:
    path = write_session(tmp_path)
    with h5py.File(path, "w", libver="latest") as file:
        write_trial(file, 0)
        file.flush()
        unfinished = path.read_bytes()
    path.write_bytes(unfinished)
    with pytest.raises(DataError, match=r"data_train.hdf5: is being written, or its writer was killed .*h5clear"):
        surveyed(path)


def test_a_damaged_table_of_chunks_is_named_before_its_chunks_are_read(tmp_path: Path) -> None:
    path = write_session(tmp_path, trials=1, layout="chunked")
    data = path.read_bytes()
    features = surveyed(path).trials[0].features
    assert features is not None
    offset = features.chunks[1][1]
    entry = offset.to_bytes(8, "little")
    assert data.count(entry) == 1
    path.write_bytes(data.replace(entry, bytes(8)))
    assert "its table of chunks is damaged" in surveyed(path).problems["trial_0000"]


def test_tables_that_go_round_in_circles_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hole of zeros in the heap of texts, as a copy that broke off leaves one: HDF5 reads it for ever."""
    path = write_session(tmp_path, SESSIONS[0], trials=3)
    write_session(tmp_path, SESSIONS[1], trials=3)
    data = path.read_bytes()
    at = data.index(b"GCOL") + 16
    path.write_bytes(data[:at] + bytes(512) + data[at + 512 :])
    monkeypatch.setattr(surveyors, "LONGEST_S", 2.0)
    with pytest.raises(DataError, match=rf"{SESSIONS[0]}/data_train.hdf5: its tables cannot be read to their end"):
        open_trials(tmp_path, sessions=SESSIONS[:2], workers=1)
