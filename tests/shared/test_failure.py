"""The failure file says the cause in its first line, and is written whole or not at all."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from estiba.failure import (
    SHOWN_CHARACTERS,
    cause_of,
    read_failure,
    remove_failure,
    toolkit_exit_code,
    write_failure,
)

CRASH = """Traceback (most recent call last):
  File "train.py", line 3, in <module>
    step()
  File "train.py", line 2, in step
    raise ValueError("loss is nan: step 7")
ValueError: loss is nan: step 7
"""
TOOLKIT_LOG = """2026-09-01 10:00:00,123 sagemaker-training-toolkit ERROR    Reporting training FAILURE
2026-09-01 10:00:00,124 sagemaker-training-toolkit ERROR    ExecuteUserScriptError:
ExitCode 3
2026-09-01 10:00:00,125 sagemaker-training-toolkit ERROR    Encountered exit_code 1
"""


# --- the cause in a log --------------------------------------------------------------------------------------------


def test_the_cause_is_the_last_line_of_a_traceback() -> None:
    assert cause_of("step 6\n" + CRASH) == "ValueError: loss is nan: step 7"


def test_the_cause_stands_before_what_was_said_after_it() -> None:
    assert cause_of(CRASH + "cleaning up\nbye\n") == "ValueError: loss is nan: step 7"


def test_of_chained_exceptions_the_last_is_the_cause() -> None:
    chained = (
        CRASH + "\nDuring handling of the above exception, another exception occurred:\n\n"
        'Traceback (most recent call last):\n  File "x.py", line 1\nmylib.errors.StepFailed: step 7\n'
    )
    assert cause_of(chained) == "mylib.errors.StepFailed: step 7"


@pytest.mark.parametrize("name", ["KeyboardInterrupt", "torch.cuda.OutOfMemoryError: CUDA out of memory. Tried 2 GiB"])
def test_an_exception_without_words_or_with_a_dotted_name_is_a_cause(name: str) -> None:
    assert cause_of(f'Traceback (most recent call last):\n  File "x.py", line 1, in <module>\n{name}\n') == name


def test_without_a_traceback_the_last_line_counts() -> None:
    assert cause_of("loading\nmake: *** [all] Error 2\n\n") == "make: *** [all] Error 2"


def test_a_progress_bar_is_many_lines() -> None:
    assert cause_of("10%\r20%\rout of disk\r\n") == "out of disk"


def test_nothing_said_is_no_cause() -> None:
    assert cause_of("") is None
    assert cause_of("\n \r\n") is None


def test_the_toolkits_own_log_is_never_the_cause() -> None:
    assert cause_of(CRASH + TOOLKIT_LOG) == "ValueError: loss is nan: step 7"
    own = (
        'Traceback (most recent call last):\n  File "trainer.py"\nsagemaker_training.errors.ExecuteUserScriptError: x\n'
    )
    assert cause_of("killed by the admin\n" + "2026-09-01 10:00:00,1 sagemaker-training-toolkit INFO x\n") == (
        "killed by the admin"
    )
    assert not (cause_of(own) or "").startswith("Traceback")


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ('ExecuteUserScriptError:\nExitCode 3\nErrorMessage "x"\nCommand "python x.py"', 3),
        ('ExecuteUserScriptError:\nExitCode -9\nErrorMessage ""', -9),
        ("InstallRequirementsError:\nExitCode 1\n", 1),
        ('Framework Error: \nTraceback …\nExecuteUserScriptError:\nExitCode 7\nErrorMessage ""', 7),
        ("Framework Error: \nTraceback (most recent call last):\nKeyError: 'x'", None),
        ("ExecuteUserScriptError:\nExitCode None\n", None),
        ("my script says: ExitCode 4", None),
    ],
)
def test_the_scripts_own_exit_code_is_found_in_what_the_toolkit_wrote(text: str, code: int | None) -> None:
    assert toolkit_exit_code(text) == code


# --- the file ------------------------------------------------------------------------------------------------------


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "output/failure"
    write_failure(path, "no column 'texto'\n\nmore\n\n")
    assert path.read_text() == "no column 'texto'\n\nmore\n"
    assert read_failure(path) == "no column 'texto'\n\nmore\n"
    write_failure(path, "another")
    assert read_failure(path) == "another\n"
    assert [item.name for item in path.parent.iterdir()] == ["failure"]


def test_an_absent_file_is_none_and_may_be_removed(tmp_path: Path) -> None:
    assert read_failure(tmp_path / "failure") is None
    remove_failure(tmp_path / "failure")
    write_failure(tmp_path / "failure", "x")
    remove_failure(tmp_path / "failure")
    assert read_failure(tmp_path / "failure") is None


def test_a_name_that_is_no_utf8_does_not_stop_it_from_being_written(tmp_path: Path) -> None:
    write_failure(tmp_path / "failure", "caf\udce9.parquet: ñ")
    assert (tmp_path / "failure").read_text(encoding="utf-8") == "caf\\udce9.parquet: ñ\n"


def test_bytes_that_are_no_utf8_can_still_be_read(tmp_path: Path) -> None:
    (tmp_path / "failure").write_bytes(b"ExecuteUserScriptError:\nExitCode 3\n\xff")
    assert toolkit_exit_code(read_failure(tmp_path / "failure") or "") == 3


def test_a_place_that_cannot_be_written_is_no_error(
    open_dir: Path, as_nobody: Callable[[Callable[[], Any]], Any]
) -> None:
    as_nobody(lambda: write_failure(open_dir / "output/failure", "x"))
    assert list(open_dir.iterdir()) == []
    as_nobody(lambda: write_failure(Path("/dev/null/failure"), "x"))


def test_a_mounted_file_that_cannot_be_replaced_is_written_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def busy(source: object, target: object) -> None:  # what the kernel says of `docker run -v FILE:…/failure`
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))

    path = tmp_path / "failure"
    path.write_text("an earlier and longer text")
    monkeypatch.setattr(os, "replace", busy)
    write_failure(path, "the cause")
    assert path.read_text() == "the cause\n"
    assert [item.name for item in tmp_path.iterdir()] == ["failure"]


def test_what_sagemaker_shows_is_a_thousand_characters() -> None:
    assert SHOWN_CHARACTERS == 1024
