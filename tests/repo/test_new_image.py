"""`make new/NAME`: the template gives a complete image under any name."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import new_image

NAME = "un-nombre-bastante-largo"


@pytest.fixture(params=new_image.KINDS)
def created(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, list[Path]]:
    """A root with an image of each kind, and the image's files."""
    shutil.copy(new_image.ROOT / "docker-bake.hcl", tmp_path)
    return tmp_path, new_image.make(NAME, request.param, tmp_path)


def test_a_new_image_has_all_files_of_an_image_except_its_locks(created: tuple[Path, list[Path]]) -> None:
    root, files = created
    image, tests = root / "images" / NAME, root / "tests/images" / NAME
    package = image / NAME.replace("-", "_")
    needed = [image / name for name in ("Dockerfile", "requirements.in", "README.md", "job.yaml")]
    needed += [package / name for name in ("__init__.py", "__main__.py", "config.py", "artifacts.py")]
    needed += [tests / "contract.py", tests / "requirements.in"]
    assert [path for path in needed if path not in files] == []
    assert list(tests.glob("test_*.py")) != []


def test_the_templates_name_is_replaced_everywhere(created: tuple[Path, list[Path]]) -> None:
    root, files = created
    assert [path for path in files if re.search(r"new.image", path.relative_to(root).as_posix())] == []
    assert [path for path in files if re.search(r"new[-_]image", path.read_text())] == []


def test_a_new_image_is_in_the_build_graph(created: tuple[Path, list[Path]]) -> None:
    root, _ = created
    before = re.findall(r'variable "IMAGES" { default = "([^"]*)" }', (new_image.ROOT / "docker-bake.hcl").read_text())
    after = re.findall(r'variable "IMAGES" { default = "([^"]*)" }', (root / "docker-bake.hcl").read_text())
    assert after == [",".join(sorted([*before[0].split(","), NAME]))]


def test_a_new_image_passes_lint(created: tuple[Path, list[Path]]) -> None:
    """After the fixes of scripts/new.sh: the order of imports and the length of lines depend on the name."""
    ruff = Path(sys.executable).parent / "ruff"
    if not ruff.exists():
        pytest.skip("ruff is not in this environment (`make env` puts it there)")
    root, _ = created
    shutil.copy(new_image.ROOT / "pyproject.toml", root)
    for words in (["check", "--quiet", "--select", "I", "--fix"], ["format", "--quiet"]):
        subprocess.run([ruff, *words, "."], cwd=root, check=True)
    done = subprocess.run([ruff, "check", "--no-cache", "."], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", ["Aura", "a_b", "base", "x-test", "x-common", "json", "../x", "", "-x"])
def test_an_invalid_name_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(new_image.NewImageError):
        new_image.make(name, "job", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_image_that_exists_is_not_overwritten(created: tuple[Path, list[Path]]) -> None:
    root, files = created
    before = {path: path.read_bytes() for path in files}
    with pytest.raises(new_image.NewImageError, match=f"images/{NAME} exists"):
        new_image.make(NAME, "job", root)
    assert {path: path.read_bytes() for path in files} == before
