"""Check a data set against what the model expects before training starts. This needs only its index."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from brain_to_text.config import BrainConfig
from brain_to_text.ctc import frames_needed, to_phonemes
from brain_to_text.data import schema
from brain_to_text.data.indexing.index_file import ObjectIndex
from brain_to_text.data.name_list import first_few
from brain_to_text.data.schema import FEATURES, LABELS, N_PHONEMES, PHONEME_LABELS, Split, Trial, TrialRef
from brain_to_text.model import output_frames
from estiba.errors import ConfigError, DataError
from estiba.log import get_logger
from estiba.storage import Entry, Store

logger = get_logger(__name__)

NOT_EVALUATED = "list sessions and dataset_probability_val in --config-file, with a 0"
MAX_TRIAL_BYTES = 2**33
"""Enough for days of speech. A larger trial means a damaged file, and would exhaust the memory."""


def choose_sessions(
    objects: Sequence[Entry], sessions: Sequence[str] | None, split: Split, url: str
) -> tuple[list[str], list[Entry]]:
    """Return the sessions in order (the position is the day), and the objects of the split, for sessions that have one.

    Every session must have a training split. The other splits are optional, because some days of the study lack them.
    Raises DataError, ConfigError.
    """
    entries: dict[tuple[str, str], Entry] = {}
    for entry in objects:
        key = schema.parse_path(entry.path)
        assert key is not None
        if key in entries:
            raise DataError(
                f"{url}: session {key[0]} has two files of the {key[1]} split, {entries[key].path} and "
                f"{entry.path}; give the folder that holds the sessions of one data set"
            )
        entries[key] = entry
    existing = sorted({session for session, _ in entries})
    with_training = sorted({session for session, kind in entries if kind == "train"})
    if sessions is None:
        names = with_training or existing
        if untrained := sorted(name for name, kind in entries if kind == split and name not in names):
            logger.info(
                f"skipped session {first_few(untrained)}: has a data_{split}.hdf5 but no data_train.hdf5, so it has "
                "no input layer"
            )
    else:
        names = list(sessions)
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise ConfigError(f"sessions {', '.join(repeated)} are listed more than once; list each once")
        if missing := [name for name in names if name not in existing]:
            raise DataError(
                f"{url}: has no session {first_few(missing)} (it has {len(existing)}: {first_few(existing)}); copy it "
                "there, or remove it from sessions"
            )
        if split == "train" and (missing := [name for name in names if name not in with_training]):
            raise DataError(
                f"{url}: session {first_few(missing)} has no data_train.hdf5; copy it there, or remove it from sessions"
            )
    of_split = [entries[name, split] for name in names if (name, split) in entries]
    if not of_split:
        remedy = f"; or train without evaluation: {NOT_EVALUATED} for each" if split == "val" else ""
        raise DataError(
            f"{url}: no session has a data_{split}.hdf5 (sessions: {first_few(names)}); copy it there{remedy}"
        )
    return names, of_split


def check_trials(
    indexes: Sequence[ObjectIndex], sessions: Sequence[str], config: BrainConfig, split: Split, store: Store
) -> tuple[list[TrialRef], dict[str, str]]:
    """Return the valid trials, in order, and the skipped ones as name -> reason.

    Raises DataError for the first object with an invalid trial, unless --on-bad-trial is skip.
    """
    days = {name: day for day, name in enumerate(sessions)}
    valid: list[TrialRef] = []
    skipped: dict[str, str] = {}
    # Within a batch, either all trials have phoneme labels or the phonemes are derived from the diphones of all trials.
    has_phonemes = config.n_classes > N_PHONEMES and any(
        trial.phoneme_labels is not None for index in indexes for trial in index.trials
    )
    widths = {
        trial.features.shape[1]
        for index in indexes
        for trial in index.trials
        if trial.features is not None and len(trial.features.shape) == 2
    }
    common_width = next(iter(widths - {0})) if len(widths) == 1 and 0 not in widths else None
    for index in sorted(indexes, key=lambda index: days[index.session]):
        url = store.url_of(index.path)
        if not index.trials:
            remedy = (
                f"or remove session {index.session}" if split == "train" else f"or {NOT_EVALUATED} for this session"
            )
            raise DataError(f"{url}: has no trials (no group trial_0000, ...); copy it again, {remedy}")
        problems: dict[str, str] = {}
        n_valid_before = len(valid)
        for trial in index.trials:
            if _is_excluded(trial, index.session, config):
                continue
            if trial.features is not None and trial.features.end > index.version.size_bytes:
                raise DataError(
                    f"{url}: {trial.name}: ends at byte {trial.features.end:,}, but the object is truncated at "
                    f"{index.version.size_bytes:,}; copy it again"
                )
            problem = index.problems.get(trial.name) or problem_of(trial, config, split, common_width)
            if problem is None and has_phonemes and trial.labels is not None and trial.phoneme_labels is None:
                problem = f"has no dataset {PHONEME_LABELS}, which other trials have; rewrite it"
            if problem is None:
                valid.append(TrialRef(trial, index.path, url, index.version, index.session, days[index.session]))
            else:
                problems[trial.name] = problem
        first = next((f"{name}: {problem}" for name, problem in problems.items()), None)
        if first is not None and config.on_bad_trial == "fail":
            count = f" ({len(problems)} of its {len(index.trials)} trials cannot be used)" if len(problems) > 1 else ""
            is_all = len(problems) == len(index.trials)
            raise DataError(f"{url}: {first}{count}" + ("" if is_all else "; or skip such trials: --on-bad-trial skip"))
        skipped |= {f"{index.session}/{name}": f"{problem} ({url})" for name, problem in problems.items()}
        if split == "train" and len(valid) == n_valid_before:
            reason = "bad_trials_dict names all of them" if first is None else f"the first one is {first}"
            raise DataError(
                f"{url}: none of its {len(index.trials)} trials can be used ({reason}); fix it, or remove session "
                f"{index.session}"
            )
    if not valid:
        raise DataError(f"{store.url}: no trial of the {split} split can be used; the log has the reason for each")
    return valid, skipped


def _is_excluded(trial: Trial, session: str, config: BrainConfig) -> bool:
    """Return whether upstream's bad_trials_dict names the trial: {session: {block: [trial numbers]}}."""
    blocks = (config.bad_trials_dict or {}).get(session) or {}
    return trial.number in blocks.get(str(trial.block), ())


def problem_of(trial: Trial, config: BrainConfig, split: Split, common_width: int | None) -> str | None:
    """Return why the model cannot use this trial, and the remedy; None if it can.

    `common_width` is the number of features of all trials; None if they differ.
    """
    features = trial.features
    if features is None:
        return f"has no dataset {FEATURES}; rewrite it"
    if len(features.shape) != 2 or not features.shape[0]:
        return f"{FEATURES} has shape {list(features.shape)}, not [time steps, features]; rewrite it"
    width, subset = features.shape[1], config.feature_subset
    if subset is not None:
        if min(subset) < 0 or max(subset) >= width:
            return f"{FEATURES} has {width} features, but feature_subset has {max(subset)}; give indices below {width}"
    elif width != config.n_input_features:
        expected = config.n_input_features
        remedy = f"give --n-input-features {width}" if width == common_width else "rewrite it"
        return f"{FEATURES} has {width} features, but {expected} were expected; {remedy}"
    if features.size_bytes > MAX_TRIAL_BYTES:
        return f"{FEATURES} has shape {list(features.shape)}, {features.size_bytes / 1e9:,.0f} GB; rewrite it"
    steps = trial.n_time_steps
    if steps is not None and not 0 < steps <= features.shape[0]:
        return f"n_time_steps is {steps}, but {FEATURES} has {features.shape[0]} time steps; correct the attribute"
    if trial.labels is None:
        if split == "test":
            return None
        return f"has no dataset {LABELS}, which the {split} split needs; rewrite it"
    problem = _labels_problem(LABELS, trial.labels, trial.label_length, config.n_classes)
    if problem is None and trial.phoneme_labels is not None:
        problem = _labels_problem(PHONEME_LABELS, trial.phoneme_labels, trial.phoneme_length, N_PHONEMES)
    if problem is None and split == "train":  # in an evaluation, they count as errors of the decoder
        return _frames_problem(trial.labels, trial, features.shape[0] if steps is None else steps, config)
    return problem


def _frames_problem(labels: np.ndarray, trial: Trial, n_bins: int, config: BrainConfig) -> str | None:
    """Return the problem of a trial that is too short for its labels, whose CTC loss would be infinite."""
    cut = max(0, config.random_cut - 1)
    frames = max(0, output_frames(n_bins - cut, config.patch_size, config.patch_stride))
    needed, count = frames_needed(labels), len(labels)
    if config.use_composite_loss:
        phonemes = trial.phoneme_labels
        if phonemes is None:
            phonemes = np.asarray(to_phonemes(labels.tolist()), np.int64)
        needed, count = max((needed, count), (frames_needed(phonemes), len(phonemes)))
    if frames >= needed:
        return None
    return (
        f"its {n_bins} bins make {frames} output frames (patches of {config.patch_size} at stride "
        f"{config.patch_stride}, after a cut of {cut} bins), but its {count} labels need {needed}; lower "
        "--patch-stride, or remove the trial from the data"
    )


def _labels_problem(name: str, labels: np.ndarray, length: int | None, n_classes: int) -> str | None:
    if length is not None and len(labels) != length:
        return f"its attribute says {length} labels, but {name} has {len(labels)}; correct one of them"
    if not len(labels):
        return f"{name} has no labels; rewrite it"
    outside = labels[(labels < 1) | (labels >= n_classes)]
    if not len(outside):
        return None
    value = int(outside[0])
    problem = f"{name} has class {value} at position {int(np.argmax(labels == value))}, outside 1 to {n_classes - 1}"
    if value == 0:
        return f"{problem} (0 is the blank, and the padding after the last label); correct the labels or their length"
    if n_classes <= N_PHONEMES < value < schema.N_DIPHONES:
        return f"{problem}; these look like diphones: give --n-classes {schema.N_DIPHONES}"
    return f"{problem}; correct the labels"
