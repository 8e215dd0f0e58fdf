"""Where a job may run: read-only inputs, any user, a read-only file system, no network."""

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

STRANGER = "1234:1234"
"""A user that no image knows: no account, no home, no group."""


SEALED: dict[str, Any] = {"read_only": True, "tmpfs": {"/tmp": "size=256m"}}
PLACES: dict[str, dict[str, Any]] = {
    "as a user without an account": {"user": STRANGER},
    "on a read-only file system": SEALED,
    "as both, without capabilities": {
        "user": STRANGER,
        **SEALED,
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
    """`plain` ran so; this says that it did, and so that every check standing on it did."""
    assert plain.code == 0, plain.log
    assert plain.settings["NetworkMode"] == "none"
    assert {bind.rsplit(":", 1)[1] for bind in plain.settings["Binds"] if "/opt/ml/input" in bind} == {"ro"}


@pytest.fixture(scope="session")
def elsewhere(image: Image, prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ended]:
    """The quick job in each of the places."""

    def call(place: str) -> Callable[[], Ended]:
        tree = open_to_all(tree_of(prepared.quick, tmp_path_factory.mktemp(f"place-{image.name}")))
        return lambda: image.run(tree=tree, **PLACES[place])

    return dict(zip(PLACES, together(*map(call, PLACES)), strict=True))


@pytest.mark.parametrize("place", PLACES)
def test_a_job_gives_the_same_bytes(place: str, elsewhere: dict[str, Ended], plain: Ended, prepared: Prepared) -> None:
    assert elsewhere[place].code == 0, elsewhere[place].log
    assert_same(results_of(elsewhere[place], prepared.ignore), results_of(plain, prepared.ignore))


def test_what_a_user_writes_is_its_own(elsewhere: dict[str, Ended], prepared: Prepared) -> None:
    tree = elsewhere["as a user without an account"].tree
    assert tree is not None
    assert {path.stat().st_uid for path in (tree.root / prepared.writes).rglob("*")} == {1234}


def test_input_is_left_as_it_was(image: Image, prepared: Prepared, tmp_path: Path) -> None:
    """A job that may write to its input must not."""
    tree = tree_of(prepared.quick, tmp_path)
    writable = {
        source: {**bind, "mode": "rw"} for source, bind in tree.binds().items() if "/input/data/" in bind["bind"]
    }
    before = {source: files_below(Path(source)) for source in writable}
    assert image.run(tree=tree, volumes=writable).code == 0
    assert {source: files_below(Path(source)) for source in writable} == before


def test_a_user_that_may_not_write_is_told_where_and_what_to_do(
    image: Image, prepared: Prepared, tmp_path: Path
) -> None:
    def run(closed: str) -> Ended:
        tree = open_to_all(tree_of(prepared.quick, tmp_path / closed))
        os.chmod(tree.root / closed, 0o755)  # noqa: S103
        return image.run(tree=tree, user=STRANGER)

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
    ended = image.run(["python", "-c", code], user=STRANGER)
    assert ended.code == 0, ended.log


def test_any_user_has_a_name(image: Image) -> None:
    """torch's compile cache and the model hub's client ask for one."""
    assert image.tell(["python", "-c", "import getpass; print(getpass.getuser())"], user=STRANGER).strip()


def test_the_code_is_not_below_opt_ml(image: Image, tree: Tree) -> None:
    """SageMaker mounts over /opt/ml as a whole: nothing that the image needs may be hidden by that."""
    ended = image.run(["--help"], tmpfs={"/opt/ml": ""})
    assert ended.code == 0, ended.log
