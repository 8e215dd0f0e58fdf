"""HDF5 files of every layout, and a folder of sessions, for the tests of the reader."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np

from brain_to_text.data import Trials
from estiba.stop import Stop

WIDTH = 8
SESSIONS = ("t15.2023.08.11", "t15.2023.08.13", "t15.2023.08.18")
LAYOUTS: dict[str, dict[str, Any]] = {
    "contiguous": {},
    "chunked": {"chunks": (7, 3)},
    "gzip": {"chunks": (16, 8), "compression": "gzip"},
    "shuffle": {"chunks": (5, 8), "compression": "gzip", "shuffle": True},
    "shuffle alone": {"chunks": (5, 4), "shuffle": True},
    "fletcher32": {"chunks": (9, 5), "fletcher32": True},
    "everything": {"chunks": (4, 8), "compression": "gzip", "shuffle": True, "fletcher32": True},
    "lzf": {"chunks": (6, 8), "compression": "lzf", "shuffle": True},
    "scaleoffset": {"chunks": (6, 8), "scaleoffset": 3},
}


def write_trial(
    file: h5py.File,
    number: int,
    *,
    steps: int = 20,
    labels: int = 5,
    width: int = WIDTH,
    layout: str = "contiguous",
    random: np.random.Generator | None = None,
) -> h5py.Group:
    random = random or np.random.default_rng(number)
    group = file.create_group(f"trial_{number:04d}")
    values = random.standard_normal((steps, width)).astype(np.float32)
    group.create_dataset("input_features", data=values, **LAYOUTS[layout])
    padded = np.zeros(500, np.int32)
    padded[:labels] = random.integers(1, 41, labels)
    group.create_dataset("seq_class_ids", data=padded)
    codes = np.zeros(500, np.int32)
    codes[:5] = [ord(letter) for letter in "hello"]
    group.create_dataset("transcription", data=codes)
    group.attrs.update({"n_time_steps": steps, "seq_len": labels, "block_num": 1 + number // 10, "trial_num": number})
    group.attrs["session"], group.attrs["sentence_label"] = "here", "hello."
    return group


def write_session(
    folder: Path, session: str = SESSIONS[0], split: str = "train", *, trials: int = 12, **options: Any
) -> Path:
    path = folder / session / f"data_{split}.hdf5"
    path.parent.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng([len(session), ord(session[-1]), trials, ord(split[0])])
    with h5py.File(path, "w") as file:
        for number in range(trials):
            write_trial(file, number, steps=16 + int(random.integers(30)), random=random, **options)
    return path


def write_folder(folder: Path, *, splits: tuple[str, ...] = ("train", "val"), **options: Any) -> Path:
    for session in SESSIONS:
        for split in splits:
            write_session(folder, session, split, **options)
    return folder


def open_trials(location: str | Path, **options: Any) -> Trials:
    usual: dict[str, Any] = {
        "sessions": None, "split": "train", "stop": Stop(), "seed": 3, "batch_size": 6, "days_per_batch": 2,
        "cache_bytes": 10**6, "disk_cache": None, "n_classes": 41, "n_features": WIDTH, "workers": 0,
    }  # fmt: skip
    return Trials.open(str(location), **{**usual, **options})


def features_by_h5py(folder: Path, name: str, split: str = "train") -> np.ndarray:
    """Of 't15.2023.08.11/trial_0003'."""
    session, trial = name.split("/")
    with h5py.File(folder / session / f"data_{split}.hdf5", "r") as file:
        values: np.ndarray = file[trial]["input_features"][()]
    return values
