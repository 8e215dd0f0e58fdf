"""`brain-to-text generate`: generate recordings of English sentences from simulated neurons tuned to phonemes.

    brain-to-text generate --out runs/brain/input --sessions 4 --trials 60

Each phoneme is a point in a low-dimensional space, and each feature responds to a direction in that space. From day to
day the space is rotated, so that the same activity means another phoneme, and each feature's direction is replaced in
part: a decoder without an input layer per day sees contradictory labels. Phonemes vary in duration, blend into each
other, and have white, slow and shared noise added. The same arguments, dictionary and text give the same values.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import h5py
import numpy as np
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt

from brain_to_text.data.schema import (
    FEATURES,
    LABELS,
    MAX_LABELS,
    N_PHONEMES,
    PHONEME_LABELS,
    SILENCE,
    TRANSCRIPTION,
    to_diphones,
)
from brain_to_text.synthetic.destination import SPLITS, Destination, session_names
from brain_to_text.synthetic.sentences import Sentence, read_sentences
from estiba.config import Config
from estiba.errors import StoreError

Layout = Literal["contiguous", "chunked", "gzip", "shuffle"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)
REPLACED_SHARE = 0.25
"""The share of the drift that replaces tuning instead of rotating it."""


class Recipe(Config):
    """How much data to generate, and how hard it is to decode."""

    sessions: PositiveInt = 4
    """Number of sessions (recording days)."""
    trials: PositiveInt = 60
    """Number of training trials per session."""
    held_out_trials: PositiveInt | None = None
    """Number of trials in each of a session's val and test splits; default is a sixth of --trials, at least 2."""
    features: PositiveInt = 512
    """Number of features per 20 ms bin; the study has 512."""
    seed: NonNegativeInt = 1
    """Random seed; the same seed gives the same values."""
    drift: float = Field(default=0.8, ge=0, le=1)
    """How much each feature's tuning changes from day to day, from 0 (not at all) to 1 (completely)."""
    noise: NonNegativeFloat = 1.0
    """Standard deviation of the noise, relative to that of the response to phonemes."""
    bins_per_phoneme: float = Field(default=9.0, ge=2)
    """Mean duration of a phoneme, in 20 ms bins. Normal speech has about 4; attempted speech with this implant is
    slower, about 15 to 20."""
    dimensions: PositiveInt = 16
    """Number of dimensions of the phoneme space."""
    longest_words: PositiveInt = 9
    """Maximum number of words per sentence; longer sentences are cut off."""
    labels: Literal["phoneme", "diphone"] = "phoneme"
    """Labels of the trials; diphone adds phoneme labels too."""
    layout: Layout = "contiguous"
    """How HDF5 stores features: contiguous, in chunks, in compressed chunks (gzip), or shuffled and compressed ones."""
    text: str | None = None
    """A file of English prose to take sentences from; default is the documentation of Python's standard library."""


class OutputConfig(Config):
    """Where to write the data."""

    out: str
    """Output folder for SESSION/data_{train,val,test}.hdf5, new or empty."""
    overwrite: bool = False
    """Replace data that was generated there with other settings. Other files are left alone."""


class GenerateConfig(Recipe, OutputConfig):
    """Generate synthetic data in the study's format. Does nothing if the folder has exactly this data already."""


def generate(config: GenerateConfig) -> str:
    """Run the command. Returns a summary. Raises EstibaError."""
    recipe = Recipe.model_validate(config.model_dump(include=set(Recipe.model_fields)))
    out = make_dataset(config.out, recipe, overwrite=config.overwrite)
    size = sum(path.stat().st_size for path in out.rglob("*.hdf5"))
    return f"{out}: {recipe.sessions} sessions, {size / 1e6:.0f} MB"


def make_dataset(
    folder: str | Path, recipe: Recipe | None = None, *, overwrite: bool = False, **settings: object
) -> Path:
    """Write SESSION/data_{train,val,test}.hdf5 to a folder without other data. Returns the folder.

    `settings` are fields of `Recipe`. Data of the same recipe is kept, and data of another one is replaced only with
    `overwrite`. Raises ConfigError, DataError, StoreError; ValueError for an invalid setting.
    """
    recipe = Recipe.model_validate({**(recipe or Recipe()).model_dump(), **settings})
    folder = Path(folder)
    destination = Destination(folder, recipe.model_dump(mode="json"))
    if destination.is_complete():
        return folder
    with _write_errors(folder):
        destination.begin(overwrite=overwrite)
    cut = [sentence.cut(recipe.longest_words) for sentence in read_sentences(recipe.text)]
    distinct = {sentence.text: sentence for sentence in cut}
    sentences = [sentence for sentence in distinct.values() if len(sentence.phonemes) <= MAX_LABELS]
    with _write_errors(folder):
        _write_all(destination, recipe, sentences)
        destination.publish(sentences=len(sentences))
    return folder


@contextlib.contextmanager
def _write_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StoreError(f"{folder}: cannot be written ({error}); fix that, and run again") from None


def _write_all(destination: Destination, recipe: Recipe, sentences: Sequence[Sentence]) -> None:
    held_out = max(2, recipe.trials // 6) if recipe.held_out_trials is None else recipe.held_out_trials
    for session, tuning in zip(session_names(recipe.sessions), daily_tunings(recipe), strict=True):
        for number, split in enumerate(SPLITS):
            random = np.random.default_rng([recipe.seed, 1, tuning.day, number])
            of_split = _sentences_for(split, sentences)
            with h5py.File(destination.path_of(session, split), "w") as file:
                for trial in range(recipe.trials if split == "train" else held_out):
                    sentence = of_split[int(random.integers(len(of_split)))]
                    features = tuning.record(sentence.phonemes, random, recipe)
                    group = file.create_group(f"trial_{trial:04d}")
                    _write_trial(group, features, sentence, split, session, trial, recipe)


def _sentences_for(split: str, sentences: Sequence[Sentence]) -> Sequence[Sentence]:
    """Return the sentences of a split: eighty percent for training, ten for each other split, none in two splits."""
    splits = ({8: "val", 9: "test"}.get(index * 7 % 10, "train") for index in range(len(sentences)))
    return [sentence for sentence, name in zip(sentences, splits, strict=True) if name == split]


@dataclass(frozen=True)
class DayTuning:
    """The tuning of all features on one day. Shapes: K dimensions, C features."""

    day: int
    phoneme_points: np.ndarray
    """float32[41, K]: the point of each phoneme. The blank's is unused."""
    tuning: np.ndarray
    """float32[K, C]."""
    offset: np.ndarray
    """float32[C]."""

    def record(self, phonemes: Sequence[int], random: np.random.Generator, recipe: Recipe) -> np.ndarray:
        """Return float32[T, C]: the features recorded while these phonemes are spoken."""
        mean = recipe.bins_per_phoneme
        low = max(2, round(mean * 0.6))
        bins = low + random.poisson(mean - low, len(phonemes)) if mean > low else np.full(len(phonemes), low)
        rest = random.integers(round(mean), round(2 * mean) + 1, 2)
        spoken = np.concatenate([[SILENCE], phonemes, [SILENCE]]).astype(np.int64)
        path = np.repeat(self.phoneme_points[spoken], [rest[0], *bins, rest[1]], axis=0)
        path = _smooth(path, width=mean / 6)
        steps, width = len(path), self.tuning.shape[1]
        response = path @ self.tuning
        noise = random.standard_normal((steps, width), np.float32)
        slow = _smooth(random.standard_normal((steps, 4), np.float32), width=25.0) * 5
        shared = random.standard_normal((4, width), np.float32)
        return (response + recipe.noise * (0.9 * noise + 0.25 * slow @ shared) + self.offset).astype(np.float32)


def daily_tunings(recipe: Recipe) -> list[DayTuning]:
    """Return the tuning of every day: the previous day's, rotated and replaced in part."""
    random = np.random.default_rng([recipe.seed, 0])
    shape = (recipe.dimensions, recipe.features)
    points = random.standard_normal((N_PHONEMES, recipe.dimensions)).astype(np.float32)
    points[SILENCE] *= 0.3  # little activity at rest
    tuning = random.standard_normal(shape).astype(np.float32) / np.sqrt(recipe.dimensions, dtype=np.float32)
    offset = np.zeros(recipe.features, np.float32)
    tunings = []
    for day in range(recipe.sessions):
        if day:
            new = random.standard_normal(shape).astype(np.float32) / np.sqrt(recipe.dimensions, dtype=np.float32)
            share = recipe.drift * REPLACED_SHARE
            rotated = _rotation(recipe.dimensions, recipe.drift, random) @ tuning
            tuning = np.float32(np.sqrt(1 - share**2)) * rotated + np.float32(share) * new
            kept = np.float32(np.sqrt(1 - recipe.drift**2))
            change = random.standard_normal(recipe.features).astype(np.float32)
            offset = kept * offset + 0.5 * np.float32(recipe.drift) * change
        tunings.append(DayTuning(day, points, tuning.astype(np.float32), offset.astype(np.float32)))
    return tunings


def _rotation(dimensions: int, drift: float, random: np.random.Generator) -> np.ndarray:
    """Return float32[K, K]: the identity for a drift of 0, a uniformly random rotation for a drift of 1."""
    noise = drift * random.standard_normal((dimensions, dimensions)) / np.sqrt(dimensions)
    left, _, right = np.linalg.svd(np.sqrt(1 - drift**2) * np.eye(dimensions) + noise)
    rotation: np.ndarray = (left @ right).astype(np.float32)
    return rotation


def _smooth(values: np.ndarray, *, width: float) -> np.ndarray:
    """Smooth with a Gaussian along the first axis. Values at the ends are repeated."""
    reach = max(1, round(3 * width))
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / width) ** 2)
    kernel /= kernel.sum()
    padded = np.pad(values, ((reach, reach), (0, 0)), mode="edge")
    columns = [np.convolve(column, kernel, mode="valid") for column in padded.T]
    return np.stack(columns, axis=1).astype(np.float32)


def _write_trial(
    group: h5py.Group, features: np.ndarray, sentence: Sentence, split: str, session: str, trial: int, recipe: Recipe
) -> None:
    write_features(group, features, recipe.layout)
    group.attrs["n_time_steps"] = np.int64(len(features))
    group.attrs["block_num"] = np.int64(trial // 50 + 1)
    group.attrs["trial_num"] = np.int64(trial % 50)
    group.attrs["session"] = session
    if split == "test":
        return
    phonemes = np.asarray(sentence.phonemes, np.int64)
    labels = to_diphones(phonemes) if recipe.labels == "diphone" else phonemes
    group.create_dataset(LABELS, data=_padded(labels))
    group.create_dataset(TRANSCRIPTION, data=_padded(np.array([ord(letter) for letter in sentence.text])))
    group.attrs["seq_len"] = np.int64(len(labels))
    group.attrs["sentence_label"] = sentence.text
    if recipe.labels == "diphone":
        group.create_dataset(PHONEME_LABELS, data=_padded(phonemes))
        group.attrs["seq_len_phoneme"] = np.int64(len(phonemes))


def write_features(group: h5py.Group, features: np.ndarray, layout: Layout) -> None:
    """Write the features in the given layout."""
    options: dict[str, object] = {}
    if layout != "contiguous":
        options["chunks"] = (min(len(features), 128), min(features.shape[1], 128))
    if layout in ("gzip", "shuffle"):
        options["compression"], options["compression_opts"] = "gzip", 1
    if layout == "shuffle":
        options["shuffle"] = True
    group.create_dataset(FEATURES, data=features, **options)


def _padded(values: np.ndarray) -> np.ndarray:
    padded = np.zeros(MAX_LABELS, np.int32)
    padded[: len(values)] = values[:MAX_LABELS]
    return padded
