"""The log: no warnings in a healthy run, plain lines without a terminal, a progress bar on one."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from contract.checks import assert_same, results_of, tree_of
from contract.containers import Ended, Image, together
from contract.workloads import Prepared

ALARMING = re.compile(r"warning|deprecat|traceback|exception|\berror\b", re.IGNORECASE)

COLUMNS = (100, 0)
"""The width is 0 under `docker run -t` if its output is not a terminal, and under compose's `tty: true`."""


def test_a_healthy_run_logs_no_warning(plain: Ended) -> None:
    assert [line for line in plain.log.splitlines() if ALARMING.search(line)] == []
    assert plain.log.strip(), "the job logs nothing"


def test_a_healthy_run_leaves_no_failure_file(plain: Ended) -> None:
    assert plain.tree is not None
    assert plain.tree.failure is None


def test_without_a_terminal_the_log_is_plain_lines(plain: Ended) -> None:
    """Log collectors split at line feeds: a bar would be one endless line, and colour codes are noise."""
    assert "\r" not in plain.log
    assert "\x1b" not in plain.log
    assert plain.log.endswith("\n")
    assert max(len(line) for line in plain.log.splitlines()) < 1000


@pytest.fixture(scope="session")
def on_terminals(image: Image, prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Ended]:
    """The quick job on a terminal, by its width."""

    def call(columns: int) -> Callable[[], Ended]:
        tree = tree_of(prepared.quick, tmp_path_factory.mktemp(f"terminal-{image.name}"))

        def run() -> Ended:
            running = image.start(tree=tree, tty=True)
            if columns:
                running.container.resize(height=40, width=columns)
            return running.end()

        return run

    return dict(zip(COLUMNS, together(*map(call, COLUMNS)), strict=True))


@pytest.mark.parametrize("columns", COLUMNS)
def test_on_a_terminal_there_is_a_progress_bar(
    columns: int, on_terminals: dict[int, Ended], plain: Ended, prepared: Prepared
) -> None:
    ended = on_terminals[columns]
    assert ended.code == 0, ended.log
    assert re.search(r"\r[^\n]*100%", ended.log), ended.log
    assert_same(results_of(ended, prepared.ignore), results_of(plain, prepared.ignore))
