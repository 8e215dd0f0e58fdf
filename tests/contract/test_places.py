"""Where a job may run: read-only inputs, any user, a read-only file system, no network."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from contract.checks import assert_same, results_of, run_job, tree_of
from contract.containers import Ended, Image, Tree
from contract.workloads import Prepared

STRANGER = "1234:1234"
"""A user that no image knows: no account, no home, no group."""


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


def test_input_is_left_as_it_was(image: Image, prepared: Prepared, plain: Ended, tmp_path: Path) -> None:
    """A job that may write to its input must not."""
    tree = tree_of(prepared.quick, tmp_path)
    writable = {
        source: {**bind, "mode": "rw"} for source, bind in tree.binds().items() if "/input/data/" in bind["bind"]
    }
    before = {source: files_below(Path(source)) for source in writable}
    assert image.run(tree=tree, volumes=writable).code == 0
    assert {source: files_below(Path(source)) for source in writable} == before


def test_any_user_can_run_a_job_where_it_may_write(
    image: Image, prepared: Prepared, plain: Ended, tmp_path: Path
) -> None:
    tree = open_to_all(tree_of(prepared.quick, tmp_path))
    ended = image.run(tree=tree, user=STRANGER)
    assert ended.code == 0, ended.log
    assert_same(results_of(ended, prepared.ignore), results_of(plain, prepared.ignore))
    assert {path.stat().st_uid for path in tree.output.rglob("*")} == {1234}


@pytest.mark.parametrize("closed", ["output", "checkpoints"])
def test_a_user_that_may_not_write_is_told_where_and_what_to_do(
    closed: str, image: Image, prepared: Prepared, tmp_path: Path
) -> None:
    tree = open_to_all(tree_of(prepared.quick, tmp_path))
    os.chmod(tree.root / closed, 0o755)  # noqa: S103
    ended = image.run(tree=tree, user=STRANGER)
    assert ended.code == 2, ended.log
    assert "Traceback" not in ended.log
    assert re.search(rf"error: .*/opt/ml/{closed}\b.*user 1234.*mount", ended.log), ended.log
    assert results_of(ended) == {}
    if closed != "output":
        assert "user 1234" in (tree.failure or "")


def test_a_read_only_root_file_system_is_enough(
    image: Image, prepared: Prepared, plain: Ended, tmp_path: Path
) -> None:
    ended = run_job(image, prepared.quick, tmp_path, read_only=True, tmpfs={"/tmp": "size=256m"})
    assert_same(results_of(ended, prepared.ignore), results_of(plain, prepared.ignore))


def test_a_stranger_on_a_read_only_file_system_can_run_a_job(
    image: Image, prepared: Prepared, plain: Ended, tmp_path: Path
) -> None:
    """Both at once, and no capability left: how a careful cluster runs what it does not know."""
    tree = open_to_all(tree_of(prepared.quick, tmp_path))
    ended = image.run(
        tree=tree,
        user=STRANGER,
        read_only=True,
        tmpfs={"/tmp": "size=256m"},
        cap_drop=["ALL"],
        security_opt=["no-new-privileges"],
    )
    assert ended.code == 0, ended.log
    assert_same(results_of(ended, prepared.ignore), results_of(plain, prepared.ignore))


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
