"""One run of a workload ends with the right status, one message for a mistake, and the reason on file."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from typing import Any

import pytest

from estiba.errors import DataError
from estiba.platform.workload import run_command


def stub(place: Any, *flags: str, **options: Any) -> subprocess.CompletedProcess[bytes]:
    done: subprocess.CompletedProcess[bytes] = place.run(place.start(sys.executable, "-m", "stub", *flags, **options))
    return done


def test_a_finished_job_exits_0_without_a_failure_file(place: Any) -> None:
    place.hyperparameters(**{"text-column": '"texto_libre"', "batch_size": "8", "sagemaker_region": '"us-east-1"'})
    done = stub(place, "--batch-size", "9", env={"TRAINING_JOB_NAME": "stub-1"})
    assert (done.returncode, done.stderr) == (0, b"")
    assert json.loads(done.stdout) == {
        "mode": "report",
        "text_column": "texto_libre",
        "batch_size": 9,
        "root": str(place.root),
        "name": "stub-1",
    }
    assert not place.failure.exists()


@pytest.mark.parametrize(
    ("mode", "code", "message"),
    [
        ("config-error", 2, "--mode is 'config-error': that cannot be; choose another"),
        ("data-error", 1, "a.parquet: no column 'texto'; pass --text-column NAME"),
        ("memory", 1, "out of memory; give the container more, or lower --batch-size"),
    ],
)
def test_a_user_error_is_one_message_without_a_traceback(place: Any, mode: str, code: int, message: str) -> None:
    done = stub(place, "--mode", mode)
    assert done.returncode == code
    assert done.stderr.decode() == f"error: {message}\n"
    assert place.failure_text() == f"{message}\n"


def test_a_command_runs_by_its_name_and_a_mistake_is_one_message(capsys: pytest.CaptureFixture[str]) -> None:
    calls: list[list[str]] = []

    def refuse(arguments: list[str]) -> None:
        raise DataError(f"{arguments[0]}: no such text; give another")

    commands = {"plan": calls.append, "tokenizer train": refuse}
    assert run_command(commands, ["plan", "--hours", "7"], prog="tool") == 0
    assert calls == [["--hours", "7"]]
    assert run_command(commands, ["tokenizer", "train", "a.txt"], prog="tool") == 1
    assert run_command(commands, ["tokenizer"], prog="tool") == 2
    assert capsys.readouterr().err == (
        "error: a.txt: no such text; give another\n"
        "error: unknown command 'tokenizer'; available: tool plan, tool tokenizer train; to train, pass only flags\n"
    )


def test_mistakes_in_the_configuration_are_reported_before_any_work(place: Any) -> None:
    place.hyperparameters(batchsize="1", mode="crash")
    done = stub(place, "--batch-size", "x")
    assert done.returncode == 2
    assert b"Traceback" not in done.stderr
    for word in ("unknown hyperparameter 'batchsize'; did you mean batch-size?", "flag --batch-size is 'x'"):
        assert word in place.failure_text()
        assert word in done.stderr.decode()


def test_a_broken_contract_is_reported_where_the_failure_file_belongs(place: Any) -> None:
    place.hyperparameters()
    (place.root / "input/config/hyperparameters.json").write_text("{")
    done = stub(place)
    assert done.returncode == 2
    assert place.failure_text().startswith(f"{place.root}/input/config/hyperparameters.json: is not JSON")


def test_a_grace_period_that_is_not_a_number_is_reported_before_any_work(place: Any) -> None:
    done = stub(place, "--mode", "crash", env={"ESTIBA_STOP_GRACE_S": "soon"})
    assert done.returncode == 2
    assert place.failure_text().startswith("environment variable ESTIBA_STOP_GRACE_S is 'soon'")


@pytest.mark.parametrize(
    ("mode", "first_line"),
    [("crash", "ValueError: the third step went wrong"), ("chained-crash", "RuntimeError: the lookup went wrong")],
)
def test_a_bug_keeps_its_traceback_and_the_failure_file_starts_with_the_cause(
    place: Any, mode: str, first_line: str
) -> None:
    done = stub(place, "--mode", mode)
    assert done.returncode == 1
    assert done.stderr.decode().startswith("Traceback (most recent call last):\n")
    assert done.stderr.decode().rstrip().endswith(first_line)
    assert place.failure_text().splitlines()[0] == first_line
    assert 'stub/__main__.py", line' in place.failure_text()


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_job_says_what_is_safe_and_ends_with_the_signal(
    place: Any, signum: signal.Signals, code: int
) -> None:
    process = place.start(sys.executable, "-m", "stub", "--mode", "wait")
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(signum)
    done = place.run(process)
    assert done.returncode == code
    assert b"Traceback" not in done.stderr
    assert place.failure_text() == (
        f"stopped by {signum.name}: 3 steps are saved; run the same command again to resume\n"
    )


def test_a_job_that_finishes_in_its_grace_period_succeeds(place: Any) -> None:
    process = place.start(sys.executable, "-m", "stub", "--mode", "finish")
    assert process.stdout.readline() == b"ready\n"
    process.terminate()
    assert place.run(process).returncode == 0
    assert not place.failure.exists()


def test_a_thread_that_is_stuck_does_not_keep_a_finished_job_alive(place: Any) -> None:
    assert stub(place, "--mode", "stuck-thread").returncode == 0


def test_names_that_are_not_utf8_can_be_printed_and_reported(place: Any) -> None:
    done = stub(place, "--mode", "odd-name", env={"LC_ALL": "C.UTF-8"})
    assert done.returncode == 1
    assert done.stdout == b"caf\\udce9.parquet\n"
    assert done.stderr == b"error: caf\\udce9.parquet: is not parquet\n"
    assert place.failure_text() == "caf\\udce9.parquet: is not parquet\n"


def test_a_closed_output_pipe_does_not_change_the_result(place: Any) -> None:
    for mode, code in (("report", 0), ("data-error", 1)):
        reading, writing = os.pipe()
        os.close(reading)
        process = place.start(
            sys.executable, "-m", "stub", "--mode", mode, stdout=writing, env={"PYTHONUNBUFFERED": None}
        )
        os.close(writing)
        assert place.run(process).returncode == code


def test_help_exits_0_without_a_failure_file(place: Any) -> None:
    done = stub(place, "--help")
    assert done.returncode == 0
    assert b"--text-column" in done.stdout
    assert not place.failure.exists()


def test_without_a_place_for_the_failure_file_the_message_and_status_remain(place: Any) -> None:
    place.root.mkdir()
    (place.root / "output").touch()
    done = stub(place, "--mode", "data-error")
    assert done.returncode == 1
    assert done.stderr == b"error: a.parquet: no column 'texto'; pass --text-column NAME\n"
