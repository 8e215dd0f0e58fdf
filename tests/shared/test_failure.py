"""The failure file says the cause in its first line, and is written whole or not at all."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from estiba.platform.failure import (
    SHOWN_CHARACTERS,
    cause_of,
    install_error,
    read_failure,
    remove_failure,
    script_wrote_failure,
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


def test_the_cause_wins_over_later_log_lines() -> None:
    assert cause_of(CRASH + "cleaning up\nbye\n") == "ValueError: loss is nan: step 7"


def test_the_last_of_chained_exceptions_is_the_cause() -> None:
    chained = (
        CRASH + "\nDuring handling of the above exception, another exception occurred:\n\n"
        'Traceback (most recent call last):\n  File "x.py", line 1\nmylib.errors.StepFailed: step 7\n'
    )
    assert cause_of(chained) == "mylib.errors.StepFailed: step 7"


@pytest.mark.parametrize("name", ["KeyboardInterrupt", "torch.cuda.OutOfMemoryError: CUDA out of memory. Tried 2 GiB"])
def test_an_exception_without_a_message_or_with_a_dotted_name_is_a_cause(name: str) -> None:
    assert cause_of(f'Traceback (most recent call last):\n  File "x.py", line 1, in <module>\n{name}\n') == name


def test_without_a_traceback_the_last_line_counts() -> None:
    assert cause_of("loading\nmake: *** [all] Error 2\n\n") == "make: *** [all] Error 2"


def test_a_progress_bar_is_many_lines() -> None:
    assert cause_of("10%\r20%\rout of disk\r\n") == "out of disk"


def test_an_empty_log_has_no_cause() -> None:
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


def test_what_a_script_wrote_itself_is_known_with_its_exit_code_from_the_toolkits_log() -> None:
    log = TOOLKIT_LOG.replace("Reporting training FAILURE", "Failure file exists. Skipping creation....")
    assert script_wrote_failure(log) and not script_wrote_failure(TOOLKIT_LOG)
    assert toolkit_exit_code(f"no column x\n{log}") == 3


# --- the file ------------------------------------------------------------------------------------------------------


def test_a_written_failure_file_reads_back(tmp_path: Path) -> None:
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


def test_a_name_that_is_not_utf8_does_not_stop_it_from_being_written(tmp_path: Path) -> None:
    write_failure(tmp_path / "failure", "caf\udce9.parquet: ñ")
    assert (tmp_path / "failure").read_text(encoding="utf-8") == "caf\\udce9.parquet: ñ\n"


def test_bytes_that_are_no_utf8_can_still_be_read(tmp_path: Path) -> None:
    (tmp_path / "failure").write_bytes(b"ExecuteUserScriptError:\nExitCode 3\n\xff")
    assert toolkit_exit_code(read_failure(tmp_path / "failure") or "") == 3


def test_an_unwritable_directory_is_not_an_error(open_dir: Path, as_nobody: Callable[[Callable[[], Any]], Any]) -> None:
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


TOOLKIT = """InstallRequirementsError:
ExitCode 1
ErrorMessage ""
Command "/opt/venv/bin/python -m pip install -r requirements.txt"
"""
INVALID = """2026-11-28 22:37:46,396 sagemaker-training-toolkit INFO     Installing dependencies from requirements.txt
ERROR: Invalid requirement: 'numpy=1': Expected semicolon (after name with no version specifier) or end
    numpy=1
         ^ (from line 1 of requirements.txt)
Hint: = is not a valid operator. Did you mean == ?
2026-11-28 22:37:47,433 sagemaker-training-toolkit ERROR    InstallRequirementsError:
"""
MISSING = """WARNING: Retrying (Retry(total=0)) after connection broken by 'NewConnectionError(no route)': /simple/
ERROR: Could not find a version that satisfies the requirement nosuch==9 (from versions: none)
ERROR: No matching distribution found for nosuch==9
2026-11-28 22:38:00,372 sagemaker-training-toolkit ERROR    Reporting training FAILURE
"""


@pytest.mark.parametrize(
    ("log", "says"),
    [
        (INVALID, ["ERROR: Invalid requirement: 'numpy=1': Expected semicolon (after name with no version specifier)"]),
        (
            MISSING,
            [
                "ERROR: Could not find a version that satisfies the requirement nosuch==9",
                "ERROR: No matching distribution found for nosuch==9",
                "connection broken by 'NewConnectionError(no route)'",
            ],
        ),
    ],
)
def test_requirements_that_are_not_installed_are_told_in_the_words_of_pip(log: str, says: list[str]) -> None:
    text = install_error(TOOLKIT, log)
    assert text is not None
    assert text.startswith(says[0])
    assert all(part in text for part in says)
    assert len(text) < SHOWN_CHARACTERS


def test_an_error_line_of_the_script_is_no_error_of_pip() -> None:
    assert install_error("ExecuteUserScriptError:\nExitCode 1", "ERROR: from the script") is None
