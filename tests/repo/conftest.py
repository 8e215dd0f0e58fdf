"""Shared by the repository's own tests: its root, its files, its images."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def files() -> list[Path]:
    """Every file in the repository, tracked or untracked, that is not ignored."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    return [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]


def image_names() -> list[str]:
    """The image folders. The local base is not an image of its own."""
    return sorted(path.parent.name for path in ROOT.glob("images/*/Dockerfile") if path.parent.name != "base")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes `image` runs once for each image folder."""
    if "image" in metafunc.fixturenames:
        metafunc.parametrize("image", image_names())


@pytest.fixture(scope="session")
def images() -> list[str]:
    return image_names()
