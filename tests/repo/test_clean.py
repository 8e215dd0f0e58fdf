"""`make clean` removes what can be made again, and nothing that somebody trained."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

USER = 1234
"""A user without an account, and without sudo."""


@pytest.fixture
def checkout(root: Path, tmp_path: Path) -> Path:
    """A checkout with everything in it that clean knows."""
    (tmp_path / "scripts").mkdir()
    shutil.copy(root / "Makefile", tmp_path)
    shutil.copy(root / "scripts/clean.sh", tmp_path / "scripts")
    for name in (".build/wheels", ".venv/bin", ".mypy_cache", ".pytest_cache", "runs/aura/out/model"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "file").write_text("x")
    return tmp_path


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_clean_keeps_trained_models(checkout: Path) -> None:
    subprocess.run(["make", "clean"], cwd=checkout, check=True)
    assert names(checkout) == {"Makefile", "scripts", "runs"}
    assert (checkout / "runs/aura/out/model/file").exists()


def test_runs_are_removed_only_by_name(checkout: Path) -> None:
    subprocess.run(["make", "clean/runs"], cwd=checkout, check=True)
    assert not (checkout / "runs").exists()
    assert (checkout / ".build/wheels/file").exists()


def as_user(checkout: Path, groups: list[int]) -> subprocess.CompletedProcess[str]:
    """clean.sh as a user who owns the checkout except for .build, which belongs to root."""
    if os.geteuid() != 0:
        pytest.skip("becoming another user needs root")
    for path in (checkout, *checkout.rglob("*")):
        os.chown(path, *((0, 0) if ".build" in path.parts else (USER, USER)))
    for parent in checkout.parents[:2]:
        parent.chmod(0o755)
    return subprocess.run(
        ["bash", checkout / "scripts/clean.sh"],
        user=USER, group=USER, extra_groups=groups, capture_output=True, text=True, env=os.environ | {"HOME": "/"},
    )  # fmt: skip


def test_files_of_root_that_cannot_be_removed_are_named_with_the_remedy(checkout: Path) -> None:
    done = as_user(checkout, [])
    assert done.returncode == 1
    assert f"sudo rm -rf {checkout / '.build'}" in done.stderr
    assert names(checkout) == {"Makefile", "scripts", "runs", ".build"}


@pytest.mark.docker
def test_files_of_root_are_removed_through_docker(checkout: Path) -> None:
    done = as_user(checkout, [Path("/var/run/docker.sock").stat().st_gid])
    assert done.returncode == 0, done.stderr
    assert names(checkout) == {"Makefile", "scripts", "runs"}
