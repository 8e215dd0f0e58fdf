"""Whether a data set is what the model expects, told from its index, before anything is trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from brain_to_text.indexing.index import ObjectIndex
from brain_to_text.indexing.schema import (
    FEATURES,
    LABELS,
    N_DIPHONES,
    N_PHONEMES,
    PHONEME_LABELS,
    Split,
    Trial,
    session_of,
)
from brain_to_text.reading.reader import Known
from estiba.errors import ConfigError, DataError
from estiba.stop import say
from estiba.store import Entry, Store

SHOWN = 5
MOST_BYTES = 2**33
"""Of one trial, days of speech: more is damage, and would fill the memory."""


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What a model takes."""

    split: Split
    n_classes: int
    n_features: int
    feature_subset: Sequence[int] | None
    bad_trials: Mapping[str, Mapping[str, Sequence[int]]] | None
    skips: bool


def choose_sessions(
    objects: Sequence[Entry], sessions: Sequence[str] | None, split: Split, url: str
) -> tuple[list[str], list[Entry]]:
    """Sessions in order (their position is the day), and the split's object of each that has one.

    Only the training split must exist for every session: some days of the study have no others.
    Raises DataError, ConfigError.
    """
    there: dict[tuple[str, str], Entry] = {}
    for entry in objects:
        named = session_of(entry.path)
        assert named is not None
        if named in there:
            raise DataError(
                f"{url}: session {named[0]} has two files of the {named[1]} split, {there[named].path} and "
                f"{entry.path}; give the folder that holds the sessions of one data set"
            )
        there[named] = entry
    known = sorted({session for session, _ in there})
    with_training = sorted({session for session, kind in there if kind == "train"})
    if sessions is None:
        names = with_training or known
        if untrained := sorted(name for name, kind in there if kind == split and name not in names):
            say(f"left out: session {_some(untrained)} has a data_{split}.hdf5 and no data_train.hdf5, so no day layer")
    else:
        names = list(sessions)
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise ConfigError(f"sessions name {', '.join(repeated)} more than once; name each once")
        if missing := [name for name in names if name not in known]:
            raise DataError(
                f"{url}: has no session {_some(missing)} (there are {len(known)}: {_some(known)}); copy it there, or "
                "leave it out of sessions"
            )
        if split == "train" and (missing := [name for name in names if name not in with_training]):
            raise DataError(
                f"{url}: session {_some(missing)} has no data_train.hdf5; copy it there, or leave it out of sessions"
            )
    entries = [there[name, split] for name in names if (name, split) in there]
    if not entries:
        raise DataError(f"{url}: no session has a data_{split}.hdf5 (sessions: {_some(names)}); copy it there")
    return names, entries


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def check_trials(
    indexes: Sequence[ObjectIndex], sessions: Sequence[str], wanted: Wanted, store: Store
) -> tuple[list[Known], list[str]]:
    """The trials that can be used, in order, and what is left out where that is allowed.

    Raises DataError for the first object with a trial that cannot be used, unless such are to be left out.
    """
    days = {name: day for day, name in enumerate(sessions)}
    good: list[Known] = []
    bad: list[str] = []
    # A batch has the phonemes of all of its trials, or spells them out of the diphones of all of them.
    has_phonemes = wanted.n_classes > N_PHONEMES and any(
        trial.phoneme_labels is not None for index in indexes for trial in index.trials
    )
    for index in sorted(indexes, key=lambda index: days[index.session]):
        url = store.url_of(index.path)
        if not index.trials:
            raise DataError(
                f"{url}: holds no trial (no group trial_0000, …); copy it again, or leave session {index.session} out"
            )
        problems: list[str] = []
        before = len(good)
        for trial in index.trials:
            if _is_left_out(trial, index.session, wanted):
                continue
            problem = index.problems.get(trial.name) or problem_of(trial, index.pin.size_bytes, wanted)
            if problem is None and has_phonemes and trial.labels is not None and trial.phoneme_labels is None:
                problem = f"has no dataset {PHONEME_LABELS}, which other trials have; write it anew"
            if problem is None:
                good.append(Known(trial, index.path, url, index.pin, index.session, days[index.session]))
            else:
                problems.append(f"{trial.name}: {problem}")
        if problems and not wanted.skips:
            more = f" ({len(problems)} of its {len(index.trials)} trials cannot be used)" if len(problems) > 1 else ""
            is_all = len(problems) == len(index.trials)
            remedy = "" if is_all else "; or leave such trials out with --on-bad-trial skip"
            raise DataError(f"{url}: {problems[0]}{more}{remedy}")
        bad += [f"{index.session}/{problem} ({url})" for problem in problems]
        if wanted.split == "train" and len(good) == before:
            raise DataError(
                f"{url}: none of its {len(index.trials)} trials can be used"
                + (f", the first because {problems[0]}" if problems else " (all are named as bad)")
                + f"; mend it, or leave session {index.session} out"
            )
    if not good:
        raise DataError(f"{store.url}: no trial of the {wanted.split} split can be used; see what was left out above")
    return good, bad


def _is_left_out(trial: Trial, session: str, wanted: Wanted) -> bool:
    """Named in the reference trainer's bad_trials_dict: {session: {block: [trial numbers]}}."""
    blocks = (wanted.bad_trials or {}).get(session)
    return bool(blocks) and trial.number in (blocks or {}).get(str(trial.block), ())


def problem_of(trial: Trial, object_bytes: int, wanted: Wanted) -> str | None:
    """What keeps a model from using this trial, and what to do; None where nothing does."""
    features = trial.features
    if features is None:
        return f"has no dataset {FEATURES}; write it anew"
    if len(features.shape) != 2 or not features.shape[0]:
        return f"{FEATURES} has the shape {list(features.shape)}, not [time steps, features]; write it anew"
    width = features.shape[1]
    subset = wanted.feature_subset
    if subset is not None:
        if len(subset) != wanted.n_features:
            return (
                f"feature_subset names {len(subset)} features and the model takes {wanted.n_features}; give "
                f"--n-input-features {len(subset)}"
            )
        if min(subset) < 0 or max(subset) >= width:
            return f"{FEATURES} has {width} features, and feature_subset names {max(subset)}; name others"
    elif width != wanted.n_features:
        return (
            f"{FEATURES} has {width} features where {wanted.n_features} were expected; give --n-input-features {width}"
        )
    if features.size_bytes > MOST_BYTES:
        return f"{FEATURES} has the shape {list(features.shape)}, {features.size_bytes / 1e9:,.0f} GB; write it anew"
    if features.end > object_bytes:
        return (
            f"reaches to byte {features.end:,} of an object that has {object_bytes:,}: it was cut short; copy it again"
        )
    steps = trial.n_time_steps
    if steps is not None and not 0 < steps <= features.shape[0]:
        return f"n_time_steps says {steps}, and {FEATURES} has {features.shape[0]} of them; mend the attribute"
    if trial.labels is None:
        if wanted.split == "test":
            return None
        return f"has no dataset {LABELS}, which the {wanted.split} split needs; write it anew"
    problem = _labels_problem(LABELS, trial.labels, trial.label_length, wanted.n_classes)
    if problem is None and trial.phoneme_labels is not None:
        return _labels_problem(PHONEME_LABELS, trial.phoneme_labels, trial.phoneme_length, N_PHONEMES)
    return problem


def _labels_problem(name: str, labels: np.ndarray, length: int | None, n_classes: int) -> str | None:
    if length is not None and len(labels) != length:
        return f"its attribute says {length} labels and {name} has {len(labels)}; mend one of them"
    if not len(labels):
        return f"{name} has no label; mend it"
    outside = labels[(labels < 1) | (labels >= n_classes)]
    if not len(outside):
        return None
    value = int(outside[0])
    what = f"{name} holds class {value} at position {int(np.argmax(labels == value))}, outside 1 to {n_classes - 1}"
    if value == 0:
        return f"{what} (0 is the blank, and the padding behind the last label); mend the labels or their length"
    if n_classes <= N_PHONEMES < value < N_DIPHONES:
        return f"{what}; these look like diphones: give --n-classes {N_DIPHONES}"
    return f"{what}; mend the labels"
