"""Write HDF5 files in every layout, and folders of sessions, to test the reader with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from brain_to_text.config import BrainConfig
from brain_to_text.data import opening
from brain_to_text.data.collate import NO_PADDING, PaddingSpec
from brain_to_text.data.dataset import TrialDataset
from brain_to_text.data.schema import Split
from estiba.platform.stop import Stop

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


def open_trials(
    location: str | Path,
    *,
    sessions: Sequence[str] | None = None,
    split: Split = "train",
    stop: Stop | None = None,
    cache_bytes: int = 10**6,
    disk_cache: tuple[Path, int] | None = None,
    padding: PaddingSpec = NO_PADDING,
    rebuild_index: bool = False,
    **settings: Any,
) -> TrialDataset:
    """Open trials in batches of six trials from two days. `settings` are training settings."""
    defaults: dict[str, Any] = {
        "dataset_dir": str(location), "dataset_seed": 3, "batch_size": 6, "days_per_batch": 2, "n_classes": 41,
        "n_input_features": WIDTH, "num_dataloader_workers": 0, "cache_gb": cache_bytes / 1e9,
        "patch_size": 0,
    }  # fmt: skip
    if disk_cache is not None:
        defaults |= {"disk_cache_dir": str(disk_cache[0]), "disk_cache_gb": disk_cache[1] / 1e9}
    config = BrainConfig(**defaults).model_copy(update=settings)
    return opening.open_trials(
        config, split, stop or Stop(), sessions=sessions, padding=padding, rebuild_index=rebuild_index
    )


def features_by_h5py(folder: Path, name: str, split: str = "train") -> np.ndarray:
    """Return the features of a trial such as 't15.2023.08.11/trial_0003' as h5py reads them."""
    session, trial = name.split("/")
    with h5py.File(folder / session / f"data_{split}.hdf5", "r") as file:
        values: np.ndarray = file[trial]["input_features"][()]
    return values
