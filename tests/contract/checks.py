"""Steps and checks that several files of this folder use."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from contract.containers import Ended, Image, Tree
from contract.workloads import Job, as_plain_strings


class NewTree(Protocol):
    """Creates the /opt/ml tree of another job."""

    def __call__(self, channels: Mapping[str, Path] | None = None) -> Tree: ...


def tree_of(job: Job, root: Path) -> Tree:
    """A job as AWS's SDKs send it: channels, and hyperparameters in their file."""
    tree = Tree(root=root, channels=job.channels).make()
    return tree.write_config(hyperparameters=as_plain_strings(job.settings))


def run_job(image: Image, job: Job, root: Path, **options: Any) -> Ended:
    """Run one job to its end, which must be successful."""
    ended = image.run(tree=tree_of(job, root), **options)
    assert ended.code == 0, ended.log
    return ended


def results_of(ended: Ended, ignore: Sequence[str] = ()) -> dict[str, bytes]:
    assert ended.tree is not None
    return ended.tree.results(ignore)


def assert_same(actual: Mapping[str, bytes], expected: Mapping[str, bytes]) -> None:
    """Check that files and bytes are the same. A failure names the files that differ."""
    assert expected, "the job to compare with wrote nothing"
    assert sorted(actual) == sorted(expected)
    assert [name for name in expected if actual[name] != expected[name]] == []


def assert_refused(ended: Ended, *says: str, code: int = 2) -> None:
    """Check for the exit status, one message in the log and first in the failure file, and no results."""
    assert ended.code == code, ended.log
    assert "Traceback" not in ended.log
    message = re.search(r"^error: (.*)", ended.log, re.MULTILINE)
    assert message, ended.log
    for part in says:
        assert part in ended.log
    assert ended.tree is not None
    assert ended.tree.failure is not None, "no failure file"
    assert ended.tree.failure.startswith(message[1]), "the failure file does not begin with the cause"
    for part in says:
        assert part in ended.tree.failure[:1024]
    assert ended.tree.results() == {}
