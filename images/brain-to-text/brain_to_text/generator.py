"""Data of the study's form, made up: English sentences, their phonemes, and neurons that are tuned to them.

    brain-to-text generate --out runs/brain/input --sessions 4 --trials 60

What makes it a task: each phoneme has a place in a space of a few dimensions, and each feature a direction in it to
which it answers. From day to day that space is turned, so that what meant one phoneme means another one, and part of
every feature's direction is found anew: a decoder without a layer for each day hears languages that contradict each
other. Phonemes last differently long, run into
each other, and lie under noise that is white, slow, and shared between features. The same arguments and the same
dictionary and text give the same values.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import h5py
import numpy as np
from pydantic import Field

from brain_to_text.destination import SPLITS, Destination, session_names
from brain_to_text.indexing.schema import MAX_LABELS, N_PHONEMES, SILENCE, diphones_of
from brain_to_text.sentences import Spoken, read_sentences
from estiba.config import Config, load
from estiba.errors import EstibaError, StoreError
from estiba.stop import say

Layout = Literal["contiguous", "chunked", "gzip", "shuffle"]
LAYOUTS: tuple[Layout, ...] = ("contiguous", "chunked", "gzip", "shuffle")
Count = Annotated[int, Field(ge=1)]
RENEWED = 0.25
"""Of the drift: what is not turned but new."""


class Recipe(Config):
    """How much is made, and how hard it is."""

    sessions: Count = 4
    """Days that are recorded."""
    trials: Count = 60
    """Training trials a session."""
    held_out_trials: Count | None = None
    """Trials of the val and of the test split of a session, each; default is a sixth of --trials, at least 2."""
    features: Count = 512
    """Features of a 20 ms bin; the study has 512."""
    seed: Annotated[int, Field(ge=0)] = 1
    """Of all that is drawn: the same seed gives the same values."""
    drift: Annotated[float, Field(ge=0, le=1)] = 0.8
    """How much each feature's tuning changes every day: 0 not, 1 altogether."""
    noise: Annotated[float, Field(ge=0)] = 1.0
    """Standard deviation of a feature's noise in a 20 ms bin, over that of its answers to phonemes."""
    bins_per_phoneme: Annotated[float, Field(ge=2)] = 9.0
    """How long phonemes last on average, in bins of 20 ms. Speech has about 4; whoever tries to speak with this implant
    is slower, some 15 to 20."""
    dimensions: Count = 16
    """Of the space in which phonemes have their places."""
    longest_words: Count = 9
    """Words of a sentence; a longer one is cut there."""
    labels: Literal["phoneme", "diphone"] = "phoneme"
    """What trials are labelled with; diphone has phonemes beside them."""
    layout: Layout = "contiguous"
    """How HDF5 stores features: in one piece, in chunks, in compressed chunks, or in these with bytes shuffled."""
    text: str | None = None
    """A file of English prose to take sentences from; default is Python's documentation."""


class Place(Config):
    """Where it is made."""

    out: str
    """Folder for SESSION/data_{train,val,test}.hdf5: a new one, or one that is there and empty."""
    overwrite: bool = False
    """Replace what was generated there with another recipe. Files that were not generated are left alone."""


class GenerateConfig(Recipe, Place):
    """Make up data of the study's form. A folder that is finished already is left as it is."""


def make_dataset(
    folder: str | Path, recipe: Recipe | None = None, *, overwrite: bool = False, **settings: object
) -> Path:
    """Write SESSION/data_{train,val,test}.hdf5 into a folder, which must not hold other data; returns the folder.

    Settings are the fields of `Recipe`. A folder that this very recipe made is left as it is; what another recipe made
    is replaced with `overwrite`. Raises ConfigError, DataError, StoreError; ValueError for a setting that cannot be.
    """
    made = Recipe.model_validate({**(recipe or Recipe()).model_dump(), **settings})
    folder = Path(folder)
    destination = Destination(folder, made.model_dump(mode="json"))
    if destination.is_finished():
        return folder
    with _explained(folder):
        destination.begin(overwrite=overwrite)
    whole = read_sentences(Path(made.text) if made.text else None)
    cut = {one.text: one for one in (sentence.cut(made.longest_words) for sentence in whole)}
    spoken = [one for one in cut.values() if len(one.phonemes) <= MAX_LABELS]
    with _explained(folder):
        _write_all(destination, made, spoken)
        destination.publish(sentences=len(spoken))
    return folder


@contextlib.contextmanager
def _explained(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StoreError(f"{folder}: cannot be written ({error}); mend that, and run it again") from None


def _write_all(destination: Destination, recipe: Recipe, spoken: Sequence[Spoken]) -> None:
    held_out = max(2, recipe.trials // 6) if recipe.held_out_trials is None else recipe.held_out_trials
    for session, brain in zip(session_names(recipe.sessions), brains(recipe), strict=True):
        # Splits share no sentence, in any session.
        for number, split in enumerate(SPLITS):
            random = np.random.default_rng([recipe.seed, 1, brain.day, number])
            mine = _share(spoken, split)
            count = recipe.trials if split == "train" else held_out
            with h5py.File(destination.path_of(session, split), "w") as file:
                for trial in range(count):
                    sentence = mine[int(random.integers(len(mine)))]
                    features = brain.listen(sentence.phonemes, random, recipe)
                    group = file.create_group(f"trial_{trial:04d}")
                    _write_trial(group, features, sentence, split, session, trial, recipe)


def _share(spoken: Sequence[Spoken], split: str) -> Sequence[Spoken]:
    """Of ten sentences, eight to train on, one to each of the others."""
    return [
        one
        for at, one in enumerate(spoken)
        if {8: "val", 9: "test"}.get(at * 7 % 10, "train") == split
    ]  # fmt: skip


@dataclass(frozen=True)
class Brain:
    """One day's tuning. Shapes: K dimensions, C features."""

    day: int
    places: np.ndarray
    """float32[41, K]: of each phoneme; the blank's is not used."""
    tuning: np.ndarray
    """float32[K, C]."""
    offset: np.ndarray
    """float32[C]."""

    def listen(self, phonemes: Sequence[int], random: np.random.Generator, recipe: Recipe) -> np.ndarray:
        """float32[T, C]: what is recorded while these phonemes are spoken."""
        mean = recipe.bins_per_phoneme
        least = max(2, round(mean * 0.6))
        lasting = least + random.poisson(mean - least, len(phonemes)) if mean > least else np.full(len(phonemes), least)
        rest = random.integers(round(mean), round(2 * mean) + 1, 2)
        spoken = np.concatenate([[SILENCE], phonemes, [SILENCE]]).astype(np.int64)
        path = np.repeat(self.places[spoken], [rest[0], *lasting, rest[1]], axis=0)
        path = _smooth(path, width=mean / 6)
        steps, width = len(path), self.tuning.shape[1]
        answers = path @ self.tuning
        noise = random.standard_normal((steps, width), np.float32)
        slow = _smooth(random.standard_normal((steps, 4), np.float32), width=25.0) * 5
        shared = random.standard_normal((4, width), np.float32)
        return (answers + recipe.noise * (0.9 * noise + 0.25 * slow @ shared) + self.offset).astype(np.float32)


def brains(recipe: Recipe) -> list[Brain]:
    """The tuning of every day: each is the one before, with part of it made new."""
    random = np.random.default_rng([recipe.seed, 0])
    shape = (recipe.dimensions, recipe.features)
    places = random.standard_normal((N_PHONEMES, recipe.dimensions)).astype(np.float32)
    places[SILENCE] *= 0.3  # at rest little happens
    tuning = random.standard_normal(shape).astype(np.float32) / np.sqrt(recipe.dimensions, dtype=np.float32)
    offset = np.zeros(recipe.features, np.float32)
    found = []
    for day in range(recipe.sessions):
        if day:
            new = random.standard_normal(shape).astype(np.float32) / np.sqrt(recipe.dimensions, dtype=np.float32)
            share = recipe.drift * RENEWED
            turned = _turn(recipe.dimensions, recipe.drift, random) @ tuning
            tuning = np.float32(np.sqrt(1 - share**2)) * turned + np.float32(share) * new
            kept = np.float32(np.sqrt(1 - recipe.drift**2))
            offset = kept * offset + 0.5 * np.float32(recipe.drift) * random.standard_normal(
                recipe.features
            ).astype(np.float32)  # fmt: skip
        found.append(Brain(day, places, tuning.astype(np.float32), offset.astype(np.float32)))
    return found


def _turn(dimensions: int, drift: float, random: np.random.Generator) -> np.ndarray:
    """float32[K, K]: a rotation, the identity without drift and any at all with a drift of 1."""
    mixed = np.sqrt(1 - drift**2) * np.eye(dimensions) + drift * random.standard_normal(
        (dimensions, dimensions)
    ) / np.sqrt(dimensions)
    left, _, right = np.linalg.svd(mixed)  # the rotation nearest to it
    turn: np.ndarray = (left @ right).astype(np.float32)
    return turn


def _smooth(values: np.ndarray, *, width: float) -> np.ndarray:
    """Gaussian along the first axis; ends are held."""
    reach = max(1, round(3 * width))
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / width) ** 2)
    kernel /= kernel.sum()
    padded = np.pad(values, ((reach, reach), (0, 0)), mode="edge")
    columns = [np.convolve(padded[:, at], kernel, mode="valid") for at in range(values.shape[1])]
    return np.stack(columns, axis=1).astype(np.float32)


def _write_trial(
    group: h5py.Group, features: np.ndarray, sentence: Spoken, split: str, session: str, trial: int, recipe: Recipe
) -> None:
    write_features(group, features, recipe.layout)
    group.attrs["n_time_steps"] = np.int64(len(features))
    group.attrs["block_num"] = np.int64(trial // 50 + 1)
    group.attrs["trial_num"] = np.int64(trial % 50)
    group.attrs["session"] = session
    if split == "test":
        return
    phonemes = np.asarray(sentence.phonemes, np.int64)
    labels = diphones_of(phonemes) if recipe.labels == "diphone" else phonemes
    group.create_dataset("seq_class_ids", data=_padded(labels))
    group.create_dataset("transcription", data=_padded(np.array([ord(letter) for letter in sentence.text])))
    group.attrs["seq_len"] = np.int64(len(labels))
    group.attrs["sentence_label"] = sentence.text
    if recipe.labels == "diphone":
        group.create_dataset("seq_class_ids_phoneme", data=_padded(phonemes))
        group.attrs["seq_len_phoneme"] = np.int64(len(phonemes))


def write_features(group: h5py.Group, features: np.ndarray, layout: Layout) -> None:
    """The dataset `input_features`, stored one way or another."""
    options: dict[str, object] = {}
    if layout != "contiguous":
        options["chunks"] = (min(len(features), 128), min(features.shape[1], 128))
    if layout in ("gzip", "shuffle"):
        options["compression"], options["compression_opts"] = "gzip", 1
    if layout == "shuffle":
        options["shuffle"] = True
    group.create_dataset("input_features", data=features, **options)


def _padded(values: np.ndarray) -> np.ndarray:
    padded = np.zeros(MAX_LABELS, np.int32)
    padded[: len(values)] = values[:MAX_LABELS]
    return padded


def command(arguments: Sequence[str]) -> int:
    """`brain-to-text generate --out DIR`: data of the study's form, made up."""
    try:
        config = load(GenerateConfig, argv=arguments, environ=None, hyperparameters=None, prog="brain-to-text generate")
        recipe = Recipe.model_validate(config.model_dump(include=set(Recipe.model_fields)))
        out = make_dataset(config.out, recipe, overwrite=config.overwrite)
    except EstibaError as error:
        say(f"error: {error}")
        return error.exit_code
    size = sum(path.stat().st_size for path in out.rglob("*.hdf5"))
    print(f"{out}: {recipe.sessions} sessions, {size / 1e6:.0f} MB")
    return 0
