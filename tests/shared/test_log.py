"""The log: one place sets it up, and its lines are what a metric's regular expression and a person read."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from estiba.log import format_fields, get_logger, json_value

HEAVY = {"boto3", "botocore", "obstore", "pydantic", "tqdm", "torch", "numpy", "xxhash", "psutil", "asyncio", "urllib3"}
"""What PID 1 never imports."""


def test_info_has_no_prefix_and_warnings_and_errors_have_one(capfd: pytest.CaptureFixture[str]) -> None:
    logger = get_logger("a_package.module")
    logger.info("rows=%d of=%d", 3, 9)
    logger.warning("a disk is at 100%")
    logger.error("no such file")
    found = capfd.readouterr()
    assert found.err == "rows=3 of=9\nwarning: a disk is at 100%\nerror: no such file\n" and found.out == ""


def test_a_package_is_set_up_once_however_many_modules_log(capfd: pytest.CaptureFixture[str]) -> None:
    for name in ("b_package", "b_package.one", "b_package.two", "b_package.one"):
        get_logger(name).info("from %s", name)
    assert capfd.readouterr().err.count("\n") == 4


def test_a_root_logger_that_a_script_set_up_does_not_print_lines_again(capfd: pytest.CaptureFixture[str]) -> None:
    handler = logging.StreamHandler(sys.stderr)
    logging.getLogger().addHandler(handler)
    try:
        get_logger("c_package").warning("once")
    finally:
        logging.getLogger().removeHandler(handler)
    assert capfd.readouterr().err == "warning: once\n"


def test_a_closed_log_pipe_does_not_end_the_job(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("from estiba.log import get_logger\nget_logger('x').error('a')\nprint('alive')\n")
    reading, writing = os.pipe()
    os.close(reading)
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, str(script)], stdout=subprocess.PIPE, stderr=writing, env=environ)
    os.close(writing)
    assert (done.returncode, done.stdout) == (0, b"alive\n")


def test_fields_are_pairs_without_those_that_are_unknown_and_json_has_no_nan() -> None:
    assert format_fields({"step": 4, "loss": 1.23456, "rate": 12345.6, "mfu": None}) == "step=4 loss=1.235 rate=12346"
    assert [json_value(value) for value in (1, "a", 0.5, float("nan"), float("inf"))] == [1, "a", 0.5, None, None]


def test_pid_1_imports_nothing_heavy() -> None:
    text = "import sys, estiba.platform.entry; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", text], stdout=subprocess.PIPE, text=True, check=True, env=environ)
    assert not HEAVY & set(done.stdout.split())
