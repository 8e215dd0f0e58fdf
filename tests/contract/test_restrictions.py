"""Restrictions a job must run under: read-only input, any user, a read-only file system, no network."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from contract.checks import assert_same, results_of, tree_of
from contract.containers import Ended, Image, Tree, together
from contract.workloads import Prepared

UNKNOWN_USER = "1234:1234"
"""A user without an account, a home or a group in any image."""
READ_ONLY: dict[str, Any] = {"read_only": True, "tmpfs": {"/tmp": "size=256m"}}
RESTRICTIONS: dict[str, dict[str, Any]] = {
    "as a user without an account": {"user": UNKNOWN_USER},
    "on a read-only file system": READ_ONLY,
    "as both, without capabilities": {
        "user": UNKNOWN_USER,
        **READ_ONLY,
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges"],
    },
}


def open_to_all(tree: Tree) -> Tree:
    for folder in (tree.output, tree.model, tree.checkpoints):
        os.chmod(folder, 0o777)  # noqa: S103
    return tree


def files_below(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob("*")}


def test_input_is_read_only_and_a_network_is_not_needed(plain: Ended) -> None:
    """`plain` ran this way, and so do all checks that use it."""
    assert plain.code == 0, plain.log
    assert plain.settings["NetworkMode"] == "none"
    assert {bind.rsplit(":", 1)[1] for bind in plain.settings["Binds"] if "/opt/ml/input" in bind} == {"ro"}


@pytest.fixture(scope="session")
def restricted(image: Image, prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ended]:
    """The quick job under each restriction."""

    def call(restriction: str) -> Callable[[], Ended]:
        tree = open_to_all(tree_of(prepared.quick, tmp_path_factory.mktemp(f"restricted-{image.name}")))
        return lambda: image.run(tree=tree, **RESTRICTIONS[restriction])

    return dict(zip(RESTRICTIONS, together(*map(call, RESTRICTIONS)), strict=True))


@pytest.mark.parametrize("restriction", RESTRICTIONS)
def test_a_restricted_job_gives_the_same_bytes(
    restriction: str, restricted: dict[str, Ended], plain: Ended, prepared: Prepared
) -> None:
    assert restricted[restriction].code == 0, restricted[restriction].log
    assert_same(results_of(restricted[restriction], prepared.ignore), results_of(plain, prepared.ignore))


def test_files_belong_to_the_user_who_ran_the_job(restricted: dict[str, Ended], prepared: Prepared) -> None:
    tree = restricted["as a user without an account"].tree
    assert tree is not None
    assert {path.stat().st_uid for path in (tree.root / prepared.writes).rglob("*")} == {1234}


def test_input_is_not_changed(image: Image, prepared: Prepared, tmp_path: Path) -> None:
    """Not even if the job may write there."""
    tree = tree_of(prepared.quick, tmp_path)
    writable = {
        source: {**bind, "mode": "rw"} for source, bind in tree.binds().items() if "/input/data/" in bind["bind"]
    }
    before = {source: files_below(Path(source)) for source in writable}
    assert image.run(tree=tree, volumes=writable).code == 0
    assert {source: files_below(Path(source)) for source in writable} == before


def test_a_location_that_is_not_writable_is_refused_with_the_remedy(
    image: Image, prepared: Prepared, tmp_path: Path
) -> None:
    def run(closed: str) -> Ended:
        tree = open_to_all(tree_of(prepared.quick, tmp_path / closed))
        os.chmod(tree.root / closed, 0o755)  # noqa: S103
        return image.run(tree=tree, user=UNKNOWN_USER)

    endings = together(lambda: run(prepared.writes), lambda: run("checkpoints"))
    for closed, ended in zip((prepared.writes, "checkpoints"), endings, strict=True):
        assert ended.code == 2, ended.log
        assert "Traceback" not in ended.log
        assert re.search(rf"error: .*/opt/ml/{closed}\b.*user 1234.*mount", ended.log), ended.log
        assert results_of(ended) == {}
    assert "user 1234" in (endings[1].tree.failure or "")


@pytest.mark.parametrize("variable", ["HOME", "HF_HOME", "TMPDIR"])
def test_any_user_can_write_to(variable: str, image: Image) -> None:
    code = f"import os, tempfile; tempfile.TemporaryFile(dir=os.environ.get({variable!r}) or '/tmp')"
    ended = image.run(["python", "-c", code], user=UNKNOWN_USER)
    assert ended.code == 0, ended.log


def test_any_user_has_a_name(image: Image) -> None:
    """torch's compile cache and the model hub's client need one."""
    assert image.output_of(["python", "-c", "import getpass; print(getpass.getuser())"], user=UNKNOWN_USER).strip()


def test_the_code_is_not_below_opt_ml(image: Image, tree: Tree) -> None:
    """SageMaker may mount over all of /opt/ml, which hides what the image has there."""
    ended = image.run(["--help"], tmpfs={"/opt/ml": ""})
    assert ended.code == 0, ended.log


THREADS = (
    "import threading, time; [threading.Thread(target=time.sleep, args=(5,), daemon=True).start() for _ in range(9)]"
)


@pytest.mark.parametrize(
    ("code", "limit", "says"),
    [
        ("bytearray(10**9)", {"mem_limit": "64m", "memswap_limit": "64m"}, "out of memory: a process was killed"),
        (THREADS, {"pids_limit": 8}, "the container's limit of 8 processes and threads was reached"),
    ],
)
def test_a_limit_of_the_container_is_named_in_the_log_and_in_the_failure_file(
    image: Image, tree: Tree, code: str, limit: dict[str, Any], says: str
) -> None:
    ended = image.run(["python", "-c", code], tree=tree, **limit)
    assert ended.code != 0
    assert f"error: {says}" in ended.err
    assert (tree.failure or "").startswith(says)
