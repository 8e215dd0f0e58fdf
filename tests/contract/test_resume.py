"""A job that is stopped or killed goes on from what it committed, and ends with the same bytes as one that was not."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from contract.checks import assert_same, results_of, run_job, tree_of
from contract.containers import Ended, Image, Running, Tree, together
from contract.workloads import Prepared

SOON_S = 15.0


@dataclass(frozen=True, kw_only=True)
class Stopped:
    """A job that was interrupted."""

    ended: Ended
    tree: Tree
    failure: str | None
    """The failure file as it was then."""
    seconds: float
    """From the signal to the end."""


INTERRUPTIONS: dict[str, Callable[[Running], object]] = {
    "TERM": lambda running: running.stop(),
    "INT": lambda running: running.signal("SIGINT"),
    "KILL": lambda running: running.signal("SIGKILL"),
}
CODES = {"TERM": 143, "INT": 130, "KILL": 137}


def interrupt(image: Image, prepared: Prepared, tree: Tree, how: Callable[[Running], object]) -> Stopped:
    """The slow job, interrupted once it has committed a little more than what was there."""
    enough = prepared.commits(tree.checkpoints) + prepared.commits_before_a_signal
    running = image.start(tree=tree)
    running.wait_until(lambda: prepared.commits(tree.checkpoints) >= enough, "committed enough")
    signalled = time.monotonic()
    how(running)
    ended = running.end()
    assert ended.code != 0, "the slow job ended before it was interrupted; make it slower in workloads.py"
    return Stopped(ended=ended, tree=tree, failure=tree.failure, seconds=time.monotonic() - signalled)


@dataclass(frozen=True, kw_only=True)
class Voyage:
    """A job that was interrupted, and the same job started again."""

    stopped: Stopped
    resumed: Ended


@pytest.fixture(scope="session")
def uninterrupted(image: Image, prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Ended:
    return run_job(image, prepared.slow, tmp_path_factory.mktemp(f"whole-{image.name}"))


@pytest.fixture(scope="session")
def voyages(image: Image, prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Voyage]:
    """The slow job, interrupted in its middle in each of the ways, and resumed on the same host."""

    def sail(name: str, root: Path) -> Voyage:
        stopped = interrupt(image, prepared, tree_of(prepared.slow, root), INTERRUPTIONS[name])
        return Voyage(stopped=stopped, resumed=image.run(tree=stopped.tree))

    def call(name: str) -> Callable[[], Voyage]:
        root = tmp_path_factory.mktemp(f"voyage-{image.name}")
        return lambda: sail(name, root)

    return dict(zip(INTERRUPTIONS, together(*map(call, INTERRUPTIONS)), strict=True))


@pytest.mark.parametrize("name", ["TERM", "INT"])
def test_a_stopped_job_says_what_is_safe_and_how_to_go_on(name: str, voyages: dict[str, Voyage]) -> None:
    stopped = voyages[name].stopped
    assert stopped.ended.code == CODES[name], stopped.ended.log
    assert f"SIG{name} received" in stopped.ended.log
    assert "Traceback" not in stopped.ended.log
    assert re.match(rf"stopped by SIG{name}: .*; run the same command again to go on$", (stopped.failure or "").strip())


@pytest.mark.parametrize("name", ["TERM", "INT"])
def test_a_signal_ends_the_job_within_seconds(name: str, voyages: dict[str, Voyage]) -> None:
    """Of the 120 that SageMaker gives."""
    assert voyages[name].stopped.ended.code == CODES[name]
    assert voyages[name].stopped.seconds < SOON_S


@pytest.mark.parametrize("name", INTERRUPTIONS)
def test_an_interrupted_job_ends_with_the_same_bytes(
    name: str, prepared: Prepared, voyages: dict[str, Voyage], uninterrupted: Ended
) -> None:
    voyage = voyages[name]
    assert voyage.stopped.ended.code == CODES[name], voyage.stopped.ended.log
    assert voyage.resumed.code == 0, voyage.resumed.log
    assert prepared.resumed.search(voyage.resumed.log), f"nothing was taken up again:\n{voyage.resumed.log}"
    assert_same(results_of(voyage.resumed, prepared.ignore), results_of(uninterrupted, prepared.ignore))
    assert voyage.resumed.tree is not None
    assert voyage.resumed.tree.failure is None


def test_a_job_killed_twice_on_changing_hosts_ends_with_the_same_bytes(
    image: Image, prepared: Prepared, uninterrupted: Ended, tmp_path: Path
) -> None:
    """As on SageMaker's spot hosts: only the checkpoints come along. The second kill hits what the first resume did."""
    tree = tree_of(prepared.slow, tmp_path / "0")
    for attempt in (1, 2):
        stopped = interrupt(image, prepared, tree, INTERRUPTIONS["KILL"])
        assert stopped.ended.code == CODES["KILL"], stopped.ended.log
        tree = tree.on_a_new_host(tmp_path / str(attempt))
        assert tree.results() == {}
    ended = image.run(tree=tree)
    assert ended.code == 0, ended.log
    assert prepared.resumed.search(ended.log), f"nothing was taken up again:\n{ended.log}"
    assert_same(tree.results(prepared.ignore), results_of(uninterrupted, prepared.ignore))


def test_a_job_that_is_complete_does_nothing_again(image: Image, prepared: Prepared, uninterrupted: Ended) -> None:
    """A platform may start a job once more after its end; its results stay, and so do their bytes."""
    assert uninterrupted.tree is not None
    before = results_of(uninterrupted, prepared.ignore)
    ended = image.run(tree=uninterrupted.tree)
    assert ended.code == 0, ended.log
    assert prepared.resumed.search(ended.log), ended.log
    assert_same(results_of(ended, prepared.ignore), before)
