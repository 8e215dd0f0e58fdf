"""Data of the study's form, made up: English sentences, their phonemes, and neurons that are tuned to them.

    python -m brain_to_text generate --out runs/brain/input --sessions 4 --trials 60

What makes it a task: each phoneme has a place in a space of a few dimensions, and each feature a direction in it to
which it answers. From day to day that space is turned, so that what meant one phoneme means another one, and part of
every feature's direction is found anew: a decoder without a layer for each day hears languages that contradict each
other. Phonemes last differently long, run into
each other, and lie under noise that is white, slow, and shared between features. The same arguments and the same
dictionary and text give the same values.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date, timedelta
from pathlib import Path
from typing import Literal

import h5py
import numpy as np

from brain_to_text.indexing.index import forget
from brain_to_text.indexing.schema import MAX_LABELS, N_PHONEMES, SILENCE, diphones_of
from brain_to_text.sentences import Spoken, read_sentences
from estiba.errors import ConfigError, EstibaError
from estiba.stop import say

Layout = Literal["contiguous", "chunked", "gzip", "shuffle"]
LAYOUTS: tuple[Layout, ...] = ("contiguous", "chunked", "gzip", "shuffle")
SPLITS = ("train", "val", "test")
FIRST_DAY = date(2023, 8, 11)
ABOUT = "generated.json"
RENEWED = 0.25
"""Of the drift: what is not turned but new."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How much is made, and how hard it is."""

    sessions: int = 4
    trials: int = 60
    """Training trials a session."""
    held_out_trials: int | None = None
    """Of the val and the test split, each; None is a sixth of the training trials, at least 2."""
    features: int = 512
    seed: int = 1
    drift: float = 0.8
    """How much each feature's tuning changes every day: 0 not, 1 altogether."""
    noise: float = 1.0
    """Standard deviation of a feature's noise in a 20 ms bin, over that of its answers to phonemes."""
    bins_per_phoneme: float = 9.0
    """On average, of 20 ms. Speech has about 4; whoever tries to speak with this implant is slower, some 15 to 20."""
    dimensions: int = 16
    """Of the space of phonemes."""
    longest_words: int = 9
    """A longer sentence is cut there."""
    labels: Literal["phoneme", "diphone"] = "phoneme"
    layout: Layout = "contiguous"
    text: str | None = None
    """A file of English prose; None takes Python's documentation."""


def make_dataset(folder: str | Path, recipe: Recipe | None = None, **settings: object) -> Path:
    """Write SESSION/data_{train,val,test}.hdf5 into a folder, which must not hold other data; returns the folder.

    Settings are the fields of `Recipe`. A folder that this very recipe made is left as it is. Raises ConfigError,
    DataError.
    """
    made = replace(recipe or Recipe(), **settings)  # type: ignore[arg-type]
    _check(made)
    folder = Path(folder)
    about = folder / ABOUT
    wanted = json.loads(json.dumps(asdict(made)))
    if about.exists():
        with_recipe = json.loads(about.read_text("utf-8"))
        if with_recipe.get("recipe") == wanted:
            return folder
    if folder.is_dir() and any(folder.iterdir()) and not about.exists():
        raise ConfigError(f"{folder}: holds other files; name a new folder with --out")
    whole = read_sentences(Path(made.text) if made.text else None)
    cut = {one.text: one for one in (sentence.cut(made.longest_words) for sentence in whole)}
    spoken = [one for one in cut.values() if len(one.phonemes) <= MAX_LABELS]
    beside = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(beside, ignore_errors=True)
    _write_all(beside, made, spoken)
    (beside / ABOUT).write_text(json.dumps({"recipe": wanted, "sentences": len(spoken)}, indent=1) + "\n", "utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside.rename(folder)
    forget(folder)
    return folder


def _check(recipe: Recipe) -> None:
    for name, least in (
        ("sessions", 1),
        ("trials", 1),
        ("features", 1),
        ("dimensions", 1),
        ("bins_per_phoneme", 2),
        ("longest_words", 1),
    ):
        if getattr(recipe, name) < least:
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(recipe, name)}: must be at least {least}")
    if not 0 <= recipe.drift <= 1:
        raise ConfigError(f"--drift {recipe.drift}: must be from 0 to 1")


def _write_all(folder: Path, recipe: Recipe, spoken: Sequence[Spoken]) -> None:
    held_out = max(2, recipe.trials // 6) if recipe.held_out_trials is None else recipe.held_out_trials
    for session, brain in zip(session_names(recipe.sessions), brains(recipe), strict=True):
        (folder / session).mkdir(parents=True)
        # Splits share no sentence, in any session.
        for number, split in enumerate(SPLITS):
            random = np.random.default_rng([recipe.seed, 1, brain.day, number])
            mine = _share(spoken, split)
            count = recipe.trials if split == "train" else held_out
            path = folder / session / f"data_{split}.hdf5"
            with h5py.File(path, "w") as file:
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


def session_names(count: int) -> list[str]:
    """'t15.2023.08.11', and so on, a few days apart."""
    gaps = (0, 2, 5, 7, 12, 16)
    days = (gaps[at % len(gaps)] + 21 * (at // len(gaps)) for at in range(count))
    return [f"t15.{FIRST_DAY + timedelta(days=day):%Y.%m.%d}" for day in days]


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
    usual = Recipe()
    parser = argparse.ArgumentParser(prog="python -m brain_to_text generate", description=command.__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to make")
    for name, value in asdict(usual).items():
        flag, explained = f"--{name.replace('_', '-')}", f"(default {value})"
        if name == "layout":
            parser.add_argument(flag, choices=LAYOUTS, default=value)
        elif name == "labels":
            parser.add_argument(flag, choices=("phoneme", "diphone"), default=value)
        elif name in ("text", "held_out_trials"):
            parser.add_argument(flag, type=str if name == "text" else int, default=None)
        else:
            parser.add_argument(flag, type=type(value), default=value, help=explained)
    options = vars(parser.parse_args(arguments))
    out: Path = options.pop("out")
    try:
        make_dataset(out, Recipe(**options))
    except EstibaError as error:
        say(f"error: {error}")
        return error.exit_code
    size = sum(path.stat().st_size for path in out.rglob("*.hdf5"))
    print(f"{out}: {options['sessions']} sessions, {size / 1e6:.0f} MB")
    return 0
