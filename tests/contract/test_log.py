"""What a run says: nothing to worry about when all is well, plain lines off a terminal, a bar on one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from contract.checks import assert_same, results_of, tree_of
from contract.containers import Ended, Image
from contract.workloads import Prepared

ALARMING = re.compile(r"warning|deprecat|traceback|exception|\berror\b", re.IGNORECASE)


def test_a_healthy_run_says_nothing_alarming(plain: Ended) -> None:
    assert [line for line in plain.log.splitlines() if ALARMING.search(line)] == []
    assert plain.log.strip(), "a job that says nothing cannot be followed"


def test_a_healthy_run_leaves_no_failure_file(plain: Ended) -> None:
    assert plain.tree is not None
    assert plain.tree.failure is None


def test_off_a_terminal_the_log_is_plain_lines(plain: Ended) -> None:
    """Log collectors split at line feeds: a bar would be one endless line, colours would be rubbish."""
    assert "\r" not in plain.log
    assert "\x1b" not in plain.log
    assert plain.log.endswith("\n")
    assert max(len(line) for line in plain.log.splitlines()) < 1000


@pytest.mark.parametrize("columns", [100, 0])
def test_on_a_terminal_there_is_a_progress_bar(
    columns: int, image: Image, prepared: Prepared, plain: Ended, tmp_path: Path
) -> None:
    """0 columns is what `docker run -t` has when its own output is no terminal, and compose's `tty: true`."""
    running = image.start(tree=tree_of(prepared.quick, tmp_path), tty=True)
    if columns:
        running.container.resize(height=40, width=columns)
    ended = running.end()
    assert ended.code == 0, ended.log
    assert re.search(r"\r[^\n]*100%", ended.log), ended.log
    assert_same(results_of(ended, prepared.ignore), results_of(plain, prepared.ignore))
