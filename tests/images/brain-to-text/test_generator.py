"""Synthetic data has the study's format, is reproducible, and is as hard to decode as it should be."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hdf5_files import open_trials

from brain_to_text.commands import COMMANDS
from brain_to_text.data.schema import PHONEMES, SILENCE, to_diphones
from brain_to_text.synthetic.destination import SPLITS, session_names
from brain_to_text.synthetic.generator import LAYOUTS, GenerateConfig, Recipe, daily_tunings, make_dataset
from brain_to_text.synthetic.sentences import Sentence, read_sentences
from estiba.errors import ConfigError
from estiba.platform.workload import run_command

SMALL: dict[str, Any] = {"sessions": 2, "trials": 6, "features": 10, "longest_words": 3}


def generate(*flags: str) -> int:
    """Run the command. Returns its exit status."""
    return run_command(COMMANDS, ["generate", *flags], prog="brain-to-text")


def digests(folder: Path) -> dict[str, str]:
    """Return digests of the values, because HDF5 files also contain times."""
    digests = {}
    for path in sorted(folder.rglob("*.hdf5")):
        digest = hashlib.sha256()
        with h5py.File(path) as file:
            for name, group in file.items():
                digest.update(name.encode() + repr(sorted((k, str(v)) for k, v in group.attrs.items())).encode())
                for dataset in group.values():
                    digest.update(dataset[()].tobytes())
        digests[path.relative_to(folder).as_posix()] = digest.hexdigest()
    return digests


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_files_have_the_format_of_the_study(tmp_path: Path) -> None:
    folder = make_dataset(tmp_path / "data", **SMALL)
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*.hdf5")}
    assert names == {f"{day}/data_{split}.hdf5" for day in session_names(2) for split in ("train", "val", "test")}
    with h5py.File(folder / session_names(2)[0] / "data_train.hdf5") as file:
        assert sorted(file) == [f"trial_{number:04d}" for number in range(6)]
        for group in file.values():
            assert sorted(group) == ["input_features", "seq_class_ids", "transcription"]
            assert group["input_features"].dtype == np.float32 and group["input_features"].chunks is None
            assert group["input_features"].shape == (group.attrs["n_time_steps"], 10)
            assert group["seq_class_ids"].dtype == np.int32 and group["seq_class_ids"].shape == (500,)
            labels, length = group["seq_class_ids"][()], group.attrs["seq_len"]
            assert (labels[:length] > 0).all() and not labels[length:].any() and labels.max() <= SILENCE
            printed = "".join(map(chr, np.trim_zeros(group["transcription"][()], "b")))
            assert printed == group.attrs["sentence_label"]
            assert {"block_num", "trial_num", "session"} <= set(group.attrs)
    with h5py.File(folder / session_names(2)[0] / "data_test.hdf5") as file:
        assert sorted(file["trial_0000"]) == ["input_features"]
        assert "sentence_label" not in file["trial_0000"].attrs


def test_the_same_recipe_gives_the_same_values_and_another_seed_others(tmp_path: Path) -> None:
    first = digests(make_dataset(tmp_path / "a", **SMALL))
    assert digests(make_dataset(tmp_path / "b", **SMALL)) == first
    other = digests(make_dataset(tmp_path / "c", **SMALL, seed=2))
    assert all(other[name] != digest for name, digest in first.items())


def test_a_generated_folder_is_kept_and_another_persons_is_refused(tmp_path: Path) -> None:
    folder = make_dataset(tmp_path / "a", **SMALL)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.hdf5")}
    make_dataset(folder, **SMALL)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.hdf5")} == before
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "thesis.tex").write_text("x")
    with pytest.raises(ConfigError, match="contains other files"):
        make_dataset(tmp_path / "own", **SMALL)
    assert sorted(path.name for path in (tmp_path / "own").iterdir()) == ["thesis.tex"]


def test_data_of_another_recipe_is_replaced_only_on_request_and_other_files_never(tmp_path: Path) -> None:
    folder = make_dataset(tmp_path / "a", **SMALL, labels="diphone")
    first, last = session_names(2)
    (folder / last / "notes.txt").write_text("x")
    before = digests(folder)
    with pytest.raises(ConfigError, match=r"sessions is 2, 1 requested, labels is diphone, phoneme requested"):
        make_dataset(folder, **{**SMALL, "sessions": 1})
    with pytest.raises(ConfigError, match=rf"other files \({last}/notes.txt\); give another .*--out.*--overwrite"):
        make_dataset(folder, **{**SMALL, "sessions": 1})
    assert digests(folder) == before
    make_dataset(folder, **{**SMALL, "sessions": 1}, overwrite=True)
    assert files(folder) == {"generated.json", f"{last}/notes.txt", *(f"{first}/data_{split}.hdf5" for split in SPLITS)}
    assert digests(folder) == digests(make_dataset(tmp_path / "b", **{**SMALL, "sessions": 1}))


@pytest.mark.parametrize("name", [f"{session_names(1)[0]}/data_train.hdf5", "t15.2024.01.01/data_val.hdf5"])
def test_recordings_that_were_not_generated_are_never_replaced_or_added_to(tmp_path: Path, name: str) -> None:
    real = tmp_path / name
    real.parent.mkdir()
    real.write_bytes(b"of the study")
    with pytest.raises(ConfigError, match=rf"was not generated \({name}\), which is never replaced"):
        make_dataset(tmp_path, **SMALL, overwrite=True)
    assert files(tmp_path) == {name} and real.read_bytes() == b"of the study"


def test_an_existing_empty_folder_is_filled_and_not_replaced(tmp_path: Path) -> None:
    """It may be a mount point."""
    inode = tmp_path.stat().st_ino
    make_dataset(tmp_path, **SMALL)
    assert tmp_path.stat().st_ino == inode
    assert {path.name for path in tmp_path.iterdir()} == {"generated.json", *session_names(2)}


@pytest.mark.parametrize("moves", [0, 1, 4])
def test_the_leftovers_of_a_killed_run_do_not_count_as_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moves: int
) -> None:
    folder, replace = make_dataset(tmp_path / "a", **SMALL, labels="diphone"), Path.replace
    done: list[Path] = []

    def fail(path: Path, target: Path) -> Path:
        if "data_" in path.name:
            done.append(path)
            if len(done) > moves:
                raise KeyboardInterrupt
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(KeyboardInterrupt):
        make_dataset(folder, **SMALL, overwrite=True)
    monkeypatch.setattr(Path, "replace", replace)
    assert not (folder / "generated.json").exists()
    make_dataset(folder, **{**SMALL, "sessions": 1})
    assert files(folder) == {"generated.json", *(f"{session_names(1)[0]}/data_{split}.hdf5" for split in SPLITS)}


def test_a_data_set_with_a_missing_file_is_generated_again(tmp_path: Path) -> None:
    whole = digests(make_dataset(tmp_path, **SMALL))
    (tmp_path / session_names(1)[0] / "data_val.hdf5").unlink()
    assert digests(make_dataset(tmp_path, **SMALL)) == whole


def test_a_folder_that_is_not_writable_is_refused_at_once_in_one_line(tmp_path: Path) -> None:
    if os.getuid() != 0:
        pytest.skip("only root can become another user")
    program = (
        "import os, sys; from brain_to_text.commands import COMMANDS; from brain_to_text.synthetic import generator; "
        "from estiba.platform.workload import run_command; "
        "os.setgid(65534); os.setuid(65534); "
        "generator.read_sentences = lambda _: sys.exit('too late'); "
        "sys.exit(run_command(COMMANDS, ['generate', *sys.argv[1:]], prog='brain-to-text'))"
    )
    top = Path(tempfile.mkdtemp())  # pytest's own folders are closed to other users
    try:
        top.chmod(0o755)
        (top / "data").mkdir()
        for out in ("new", "data"):
            done = subprocess.run(
                [sys.executable, "-c", program, "--out", str(top / out)], capture_output=True, text=True, timeout=60
            )
            assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
            assert done.stderr.startswith(f"error: {top / out}: cannot be written (Permission denied) by user 65534")
            assert "--out" in done.stderr
    finally:
        shutil.rmtree(top)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_layout_changes_only_the_bytes_on_disk(tmp_path: Path, layout: Any) -> None:
    plain = make_dataset(tmp_path / "plain", **SMALL)
    other = make_dataset(tmp_path / "other", **SMALL, layout=layout)
    assert digests(plain) == digests(other)
    with open_trials(plain, n_input_features=10) as plain_trials, open_trials(other, n_input_features=10) as trials:
        for step in range(3):
            expected = plain_trials.batch(step).features.numpy().tobytes()
            assert trials.batch(step).features.numpy().tobytes() == expected


def test_diphone_labels_come_with_the_phonemes(tmp_path: Path) -> None:
    folder = make_dataset(tmp_path / "a", **SMALL, labels="diphone")
    with h5py.File(folder / session_names(1)[0] / "data_train.hdf5") as file:
        group = file["trial_0001"]
        length = group.attrs["seq_len"]
        assert length == group.attrs["seq_len_phoneme"]
        phonemes = group["seq_class_ids_phoneme"][:length]
        np.testing.assert_array_equal(group["seq_class_ids"][:length], to_diphones(phonemes))


def test_sentences_are_english_and_pronounced_as_in_the_dictionary() -> None:
    sentences = read_sentences(None)
    assert len(sentences) > 300
    assert len({sentence.text for sentence in sentences}) == len(sentences)
    for sentence in sentences[::50]:
        assert 3 <= len(sentence.words) <= 9 and sentence.phonemes.count(SILENCE) == len(sentence.words)


def test_sentences_can_come_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    numbers = "one two three four five six seven eight nine ten eleven twelve".split()
    path.write_text(". ".join(f"{a} sees {b} again" for a in numbers for b in numbers[:3]) + ". Xqzt is no word.")
    sentences = read_sentences(str(path))
    assert len(sentences) == 36
    spoken = {sentence.text: sentence for sentence in sentences}["one sees two again."]
    assert [PHONEMES[code] for code in spoken.phonemes] == "W AH N SIL S IY Z SIL T UW SIL AH G EH N SIL".split()
    assert spoken.cut(2) == Sentence("one sees.", spoken.words[:2])


def test_splits_share_no_sentence(tmp_path: Path) -> None:
    folder = make_dataset(tmp_path / "a", **{**SMALL, "trials": 60, "features": 2, "longest_words": 9})
    heard: dict[str, set[str]] = {}
    for split in ("train", "val"):
        for path in folder.rglob(f"data_{split}.hdf5"):
            with h5py.File(path) as file:
                heard.setdefault(split, set()).update(str(group.attrs["sentence_label"]) for group in file.values())
    assert not heard["train"] & heard["val"]


def frames(recipe: Recipe, day: int, seed: int, count: int = 600) -> tuple[np.ndarray, np.ndarray]:
    """Generate bins in the middle of long, isolated phonemes, and their classes."""
    random = np.random.default_rng(seed)
    day_tuning = daily_tunings(recipe)[day]
    classes = random.integers(1, 41, count)
    values = (
        day_tuning.phoneme_points[classes] @ day_tuning.tuning + day_tuning.offset
    ) + recipe.noise * random.standard_normal((count, recipe.features))
    return values.astype(np.float32), classes


def accuracy(train: tuple[np.ndarray, np.ndarray], test: tuple[np.ndarray, np.ndarray]) -> float:
    """Return the accuracy of a linear decoder."""
    values, classes = train
    design = np.c_[values, np.ones(len(values))]
    weights = np.linalg.solve(design.T @ design + 10 * np.eye(design.shape[1]), design.T @ np.eye(41)[classes])
    return float((np.argmax(np.c_[test[0], np.ones(len(test[0]))] @ weights, 1) == test[1]).mean())


def test_a_decoder_works_on_its_own_day_and_not_on_another() -> None:
    recipe = Recipe(features=48, sessions=4)
    own = accuracy(frames(recipe, 3, 1, 2400), frames(recipe, 3, 2))
    others = accuracy(frames(recipe, 0, 1, 2400), frames(recipe, 3, 2))
    days = [frames(recipe, day, 10 + day) for day in range(4)]
    pooled = accuracy(
        (np.concatenate([values for values, _ in days]), np.concatenate([classes for _, classes in days])),
        frames(recipe, 3, 2),
    )
    assert own > 0.5 and others < own / 4, (own, others)
    assert pooled < own * 0.7, "one decoder for all days is worse than one per day with as much data"
    still = Recipe(features=48, sessions=4, drift=0.0)
    assert accuracy(frames(still, 0, 1), frames(still, 3, 2)) > 0.5, "without drift, the day does not matter"


def test_the_command_generates_data_and_refuses_mistakes_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["--sessions", "1", "--trials", "3", "--features", "4"]
    assert generate("--out", str(tmp_path / "a"), *small) == 0
    assert "1 sessions" in capsys.readouterr().out
    assert generate("--out", str(tmp_path / "b"), *small, "--drift", "2") == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: flag --drift is '2': ") and "less than or equal to 1" in printed
    assert generate("--out", str(tmp_path / "a"), *small, "--seed", "2") == 2
    assert "seed is 1, 2 requested" in capsys.readouterr().err
    assert generate("--out", str(tmp_path / "a"), *small, "--seed", "2", "--overwrite") == 0


def test_help_explains_every_option_under_its_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        generate("--help")
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert text.startswith("usage: brain-to-text generate ")
    for name, info in GenerateConfig.model_fields.items():
        assert info.description, name
        assert f"--{name.replace('_', '-')} " in text and " ".join(info.description.split()) in text
    assert "ESTIBA_" not in text, "this command reads no environment variables"
