"""A job that is stopped or killed goes on from what it committed, and ends with the same bytes as one that was not."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from contract.checks import assert_same, results_of, run_job, tree_of
from contract.containers import Ended, Image, Running, Tree, together
from contract.workloads import Prepared

SOON_S = 15.0


def interrupted(image: Image, prepared: Prepared, root: Path, how: Callable[[Running], object]) -> Ended:
    """The slow job, interrupted once it has committed a little more than what was there."""
    return interrupt_again(image, prepared, tree_of(prepared.slow, root), how)


def interrupt_again(image: Image, prepared: Prepared, tree: Tree, how: Callable[[Running], object]) -> Ended:
    enough = prepared.commits(tree.checkpoints) + prepared.commits_before_a_signal
    running = image.start(tree=tree)
    running.wait_until(lambda: prepared.commits(tree.checkpoints) >= enough, "committed enough")
    how(running)
    ended = running.end()
    assert ended.code != 0, "the slow job ended before it was interrupted; make it slower in workloads.py"
    return ended


@pytest.fixture(scope="session")
def slow_tree(image: Image, prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    return lambda name: tmp_path_factory.mktemp(f"slow-{image.name}-{name}")


@pytest.fixture(scope="session")
def uninterrupted(image: Image, prepared: Prepared, slow_tree: Callable[[str], Path]) -> Ended:
    return run_job(image, prepared.slow, slow_tree("whole"))


@pytest.fixture(scope="session")
def stops(image: Image, prepared: Prepared, slow_tree: Callable[[str], Path]) -> dict[str, Ended]:
    """The slow job, once stopped by each of the signals, after what was to happen had happened."""

    def interrupt(name: str, how: Callable[[Running], object]) -> Callable[[], Ended]:
        return lambda: interrupted(image, prepared, slow_tree(name), how)

    names = ("TERM", "INT", "KILL", "KILL, new host")
    hows: list[Callable[[Running], object]] = [
        lambda running: running.stop(),
        lambda running: running.signal("SIGINT"),
        lambda running: running.signal("SIGKILL"),
        lambda running: running.signal("SIGKILL"),
    ]
    calls = [interrupt(name.replace(", ", "-").replace(" ", "-"), how) for name, how in zip(names, hows, strict=True)]
    return dict(zip(names, together(*calls), strict=True))


@pytest.mark.parametrize(("name", "code"), [("TERM", 143), ("INT", 130)])
def test_a_stopped_job_says_what_is_safe_and_how_to_go_on(name: str, code: int, stops: dict[str, Ended]) -> None:
    ended = stops[name]
    assert ended.code == code, ended.log
    assert "Traceback" not in ended.log
    assert ended.tree is not None
    assert ended.tree.failure is not None
    assert re.match(rf"stopped by SIG{name}: .*; run the same command again to go on$", ended.tree.failure.strip())


def test_docker_stop_is_answered_within_seconds(image: Image, prepared: Prepared, stops: dict[str, Ended]) -> None:
    """Of the 120 that SageMaker gives."""
    assert stops["TERM"].code == 143
    assert "SIGTERM received" in stops["TERM"].log


@pytest.mark.parametrize("name", ["TERM", "INT", "KILL", "KILL, new host"])
def test_an_interrupted_job_ends_with_the_same_bytes(
    name: str,
    image: Image,
    prepared: Prepared,
    stops: dict[str, Ended],
    uninterrupted: Ended,
    tmp_path: Path,
) -> None:
    stopped = stops[name]
    assert stopped.tree is not None
    assert stopped.code == {"TERM": 143, "INT": 130}.get(name, 137), stopped.log
    tree = stopped.tree
    if name == "KILL, new host":
        tree = tree.on_a_new_host(tmp_path)
        assert tree.results() == {}
    ended = image.run(tree=tree)
    assert ended.code == 0, ended.log
    assert prepared.resumed.search(ended.log), f"nothing was taken up again:\n{ended.log}"
    assert tree.failure is None
    assert_same(tree.results(prepared.ignore), results_of(uninterrupted, prepared.ignore))


def test_a_job_killed_twice_on_changing_hosts_ends_with_the_same_bytes(
    image: Image, prepared: Prepared, uninterrupted: Ended, tmp_path: Path
) -> None:
    """The second kill hits what the first resume had built upon."""
    tree = tree_of(prepared.slow, tmp_path / "0")
    for attempt in (1, 2):
        ended = interrupt_again(image, prepared, tree, lambda running: running.signal("SIGKILL"))
        assert ended.code == 137, ended.log
        tree = tree.on_a_new_host(tmp_path / str(attempt))
    ended = image.run(tree=tree)
    assert ended.code == 0, ended.log
    assert prepared.resumed.search(ended.log), ended.log
    assert_same(tree.results(prepared.ignore), results_of(uninterrupted, prepared.ignore))


def test_a_job_that_is_complete_does_nothing_again(
    image: Image, prepared: Prepared, uninterrupted: Ended
) -> None:
    """A platform may start a job once more after its end; its results stay, and so do their bytes."""
    assert uninterrupted.tree is not None
    before = results_of(uninterrupted, prepared.ignore)
    ended = image.run(tree=uninterrupted.tree)
    assert ended.code == 0, ended.log
    assert prepared.resumed.search(ended.log), ended.log
    assert_same(results_of(ended, prepared.ignore), before)
