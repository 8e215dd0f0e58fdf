"""Names of files, trials and phoneme classes."""

from __future__ import annotations

import numpy as np
import pytest

from brain_to_text.data.schema import (
    N_DIPHONES,
    N_PHONEMES,
    PHONEMES,
    SILENCE,
    DatasetLayout,
    parse_path,
    to_diphones,
    trial_number,
)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("t15.2023.08.11/data_train.hdf5", ("t15.2023.08.11", "train")),
        ("a/b/t12.2022.01.02/data_val.hdf5", ("t12.2022.01.02", "val")),
        ("t15.2023.08.11/data_test.h5", ("t15.2023.08.11", "test")),
        ("data_train.hdf5", None),
        ("t15.2023.08.11/data_train.hdf5.part", None),
        ("t15.2023.08.11/xdata_train.hdf5", None),
    ],
)
def test_session_and_split_are_parsed_from_the_path(path: str, expected: tuple[str, str] | None) -> None:
    assert parse_path(path) == expected


def test_the_trial_number_is_parsed_from_the_name() -> None:
    assert [trial_number(name) for name in ("trial_0003", "trial_12345", "trial_", "about")] == [3, 12345, None, None]


def test_classes_match_the_study() -> None:
    assert (N_PHONEMES, N_DIPHONES, PHONEMES[0], PHONEMES[1], PHONEMES[SILENCE]) == (41, 1681, "BLANK", "AA", "SIL")
    assert len(set(PHONEMES)) == 41


def test_the_last_axis_of_a_diphone_is_its_phoneme() -> None:
    phonemes = np.array([3, 40, 17])
    diphones = to_diphones(phonemes)
    before, this = np.unravel_index(diphones, (41, 41))
    assert this.tolist() == [3, 40, 17] and before.tolist() == [SILENCE, 3, 40]
    assert to_diphones(np.array([], np.int64)).tolist() == []


def test_a_layout_knows_its_end() -> None:
    assert DatasetLayout((2, 3), "<f4", offset=100).end == 124
    chunked = DatasetLayout((4, 3), "<f4", chunk_shape=(2, 3), chunks=(((2, 0), 50, 9, 0), ((0, 0), 70, 11, 0)))
    assert chunked.end == 81 and chunked.size_bytes == 48
