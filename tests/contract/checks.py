"""Steps and verdicts that several files of this folder use."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from contract.containers import Ended, Image, Tree
from contract.workloads import Job, as_plain_strings


class NewTree(Protocol):
    """Makes another job's /opt/ml."""

    def __call__(self, channels: Mapping[str, Path] | None = None) -> Tree: ...


def tree_of(job: Job, root: Path) -> Tree:
    """A job as one of AWS's SDKs would send it: channels, and hyperparameters in their file."""
    tree = Tree(root=root, channels=job.channels).make()
    return tree.write_config(hyperparameters=as_plain_strings(job.settings))


def run_job(image: Image, job: Job, root: Path, **options: Any) -> Ended:
    """One job to its end, which must be a good one."""
    ended = image.run(tree=tree_of(job, root), **options)
    assert ended.code == 0, ended.log
    return ended


def results_of(ended: Ended, ignore: Sequence[str] = ()) -> dict[str, bytes]:
    assert ended.tree is not None
    return ended.tree.results(ignore)


def assert_same(found: Mapping[str, bytes], expected: Mapping[str, bytes]) -> None:
    """Same files, same bytes; says which differ, not how."""
    assert expected, "the job that this one is compared with gave nothing"
    assert sorted(found) == sorted(expected)
    assert [name for name in expected if found[name] != expected[name]] == []


def assert_refused(ended: Ended, *says: str, code: int = 2) -> None:
    """A person's mistake: the right status, one message in the log and first in the failure file, nothing written."""
    assert ended.code == code, ended.log
    assert "Traceback" not in ended.log
    message = re.search(r"^error: (.*)", ended.log, re.MULTILINE)
    assert message, ended.log
    for part in says:
        assert part in ended.log
    assert ended.tree is not None
    assert ended.tree.failure is not None, "no failure file"
    assert ended.tree.failure.startswith(message[1]), "the cause is not first in the failure file"
    for part in says:
        assert part in ended.tree.failure[:1024]
    assert ended.tree.results() == {}
