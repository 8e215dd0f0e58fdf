"""A job that is stopped or killed resumes from its committed work and ends with the bytes of an uninterrupted one."""

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
    """The failure file after the interruption."""
    seconds: float
    """From the signal to the end."""


INTERRUPTIONS: dict[str, Callable[[Running], object]] = {
    "TERM": lambda running: running.stop(),
    "INT": lambda running: running.signal("SIGINT"),
    "KILL": lambda running: running.signal("SIGKILL"),
}
CODES = {"TERM": 143, "INT": 130, "KILL": 137}


def interrupt(image: Image, prepared: Prepared, tree: Tree, how: Callable[[Running], object]) -> Stopped:
    """The slow job, interrupted once it has committed new work."""
    enough = prepared.commits(tree.checkpoints) + prepared.commits_before_a_signal
    running = image.start(tree=tree)
    running.wait_until(lambda: prepared.commits(tree.checkpoints) >= enough, "committed enough")
    signalled = time.monotonic()
    how(running)
    ended = running.end()
    assert ended.code != 0, "the slow job ended before it was interrupted; make it slower in contract.py"
    return Stopped(ended=ended, tree=tree, failure=tree.failure, seconds=time.monotonic() - signalled)


@dataclass(frozen=True, kw_only=True)
class Resumption:
    """A job that was interrupted, and the same job run again."""

    stopped: Stopped
    resumed: Ended


@pytest.fixture(scope="session")
def uninterrupted(image: Image, prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Ended:
    return run_job(image, prepared.slow, tmp_path_factory.mktemp(f"whole-{image.name}"))


@pytest.fixture(scope="session")
def resumptions(image: Image, prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Resumption]:
    """The slow job, interrupted half-way by each signal and resumed on the same host."""

    def run(name: str, root: Path) -> Resumption:
        stopped = interrupt(image, prepared, tree_of(prepared.slow, root), INTERRUPTIONS[name])
        return Resumption(stopped=stopped, resumed=image.run(tree=stopped.tree))

    def call(name: str) -> Callable[[], Resumption]:
        root = tmp_path_factory.mktemp(f"resumption-{image.name}")
        return lambda: run(name, root)

    return dict(zip(INTERRUPTIONS, together(*map(call, INTERRUPTIONS)), strict=True))


@pytest.mark.parametrize("name", ["TERM", "INT"])
def test_a_stopped_job_says_what_is_saved_and_how_to_resume(name: str, resumptions: dict[str, Resumption]) -> None:
    stopped = resumptions[name].stopped
    assert stopped.ended.code == CODES[name], stopped.ended.log
    assert f"SIG{name} received" in stopped.ended.log
    assert "Traceback" not in stopped.ended.log
    advice = "run the same command again to resume"
    assert re.match(rf"stopped by SIG{name}: .*; {advice}$", (stopped.failure or "").strip())


@pytest.mark.parametrize("name", ["TERM", "INT"])
def test_a_signal_ends_the_job_within_seconds(name: str, resumptions: dict[str, Resumption]) -> None:
    """SageMaker allows 120."""
    assert resumptions[name].stopped.ended.code == CODES[name]
    assert resumptions[name].stopped.seconds < SOON_S


@pytest.mark.parametrize("name", INTERRUPTIONS)
def test_an_interrupted_job_ends_with_the_same_bytes(
    name: str, prepared: Prepared, resumptions: dict[str, Resumption], uninterrupted: Ended
) -> None:
    resumption = resumptions[name]
    assert resumption.stopped.ended.code == CODES[name], resumption.stopped.ended.log
    assert resumption.resumed.code == 0, resumption.resumed.log
    assert prepared.resumed.search(resumption.resumed.log), f"nothing was resumed:\n{resumption.resumed.log}"
    assert_same(results_of(resumption.resumed, prepared.ignore), results_of(uninterrupted, prepared.ignore))
    assert resumption.resumed.tree is not None
    assert resumption.resumed.tree.failure is None


def test_a_job_killed_twice_on_changing_hosts_ends_with_the_same_bytes(
    image: Image, prepared: Prepared, uninterrupted: Ended, tmp_path: Path
) -> None:
    """As on spot hosts of SageMaker, where only the checkpoints survive. The second kill hits the first resume."""
    tree = tree_of(prepared.slow, tmp_path / "0")
    for attempt in (1, 2):
        stopped = interrupt(image, prepared, tree, INTERRUPTIONS["KILL"])
        assert stopped.ended.code == CODES["KILL"], stopped.ended.log
        tree = tree.on_a_new_host(tmp_path / str(attempt))
        assert tree.results() == {}
    ended = image.run(tree=tree)
    assert ended.code == 0, ended.log
    assert prepared.resumed.search(ended.log), f"nothing was resumed:\n{ended.log}"
    assert_same(tree.results(prepared.ignore), results_of(uninterrupted, prepared.ignore))


def test_a_complete_job_computes_nothing_again(image: Image, prepared: Prepared, uninterrupted: Ended) -> None:
    """A platform may start a job again after its end. The results keep their bytes."""
    assert uninterrupted.tree is not None
    before = results_of(uninterrupted, prepared.ignore)
    ended = image.run(tree=uninterrupted.tree)
    assert ended.code == 0, ended.log
    assert prepared.resumed.search(ended.log), ended.log
    assert_same(results_of(ended, prepared.ignore), before)
