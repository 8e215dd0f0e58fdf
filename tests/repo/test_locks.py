"""Locks match their requirements and contain nothing specific to the machine that wrote them."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

LOCKS = sorted(Path(__file__).resolve().parents[2].glob("**/requirements.txt"))
LOCKS = [path for path in LOCKS if not {".venv", ".build"} & set(path.parts)]
lock = pytest.mark.parametrize("lock", LOCKS, ids=lambda path: f"{path.parent.parent.name}/{path.parent.name}")


def required(source: Path) -> list[Requirement]:
    """The requirements of a .in file, with those it includes by -r."""
    requirements = []
    for line in source.read_text().splitlines():
        line = line.partition("#")[0].strip()
        if line.startswith("-r "):
            requirements += required(source.parent / line.removeprefix("-r ").strip())
        elif line:
            requirements.append(Requirement(line))
    return requirements


def locked(path: Path) -> list[tuple[str, Version, Marker | None]]:
    """(canonical name, version, marker) of each entry of a lock."""
    entries: list[tuple[str, Version, Marker | None]] = []
    for line in path.read_text().splitlines():
        if match := re.match(r"([A-Za-z0-9._-]+)(?:\[[^]]*\])?==([^ ;]+)(?: ; ([^\\]+))?", line):
            name, version, marker = match.groups()
            entries.append((canonicalize_name(name), Version(version), Marker(marker.strip()) if marker else None))
    return entries


@lock
def test_a_lock_satisfies_its_requirements(lock: Path) -> None:
    entries = locked(lock)
    for requirement in required(lock.parent / "requirements.in"):
        if requirement.name == "torch":
            continue  # comes with the base
        versions = [version for name, version, _ in entries if name == canonicalize_name(requirement.name)]
        assert versions, f"{requirement.name} is in requirements.in but not in the lock: run `make lock`"
        assert all(version in requirement.specifier for version in versions), f"{requirement}: run `make lock`"


@lock
@pytest.mark.parametrize("python", ["3.11", "3.12"])
def test_a_lock_has_one_version_of_each_package_for_each_python(lock: Path, python: str) -> None:
    target = {"python_version": python, "python_full_version": f"{python}.0", "sys_platform": "linux"}
    names = [name for name, _, marker in locked(lock) if marker is None or marker.evaluate(target)]
    assert sorted(names) == sorted(set(names))


@lock
def test_a_lock_leaves_torch_and_cuda_to_the_base(lock: Path) -> None:
    assert [name for name, _, _ in locked(lock) if re.match(r"torch$|triton|nvidia|cuda", name)] == []


@lock
def test_every_entry_of_a_lock_has_hashes(lock: Path) -> None:
    text = lock.read_text()
    assert len(re.findall(r"^[a-z0-9].*==", text, re.MULTILINE)) == len(
        re.findall(r"^[^#\n]*== ?.*\\\n +--hash=", text, re.MULTILINE)
    )


@lock
def test_a_lock_names_no_index(lock: Path) -> None:
    assert re.findall(r"https?://|file:|--index|--find-links|@ ", lock.read_text()) == []


def test_an_image_ships_the_versions_that_its_tests_use(root: Path, image: str) -> None:
    tested = {(name, version) for name, version, _ in locked(root / "tests/images" / image / "requirements.txt")}
    shipped = {(name, version) for name, version, _ in locked(root / "images" / image / "requirements.txt")}
    assert shipped - tested == set(), "run `make lock`"


def test_the_local_base_installs_the_cpu_build_of_the_torch_it_locked(root: Path) -> None:
    (torch,) = [r for r in required(root / "images/base/requirements.in") if r.name == "torch"]
    (pin,) = [line for line in (root / "images/base/torch.txt").read_text().splitlines() if line.startswith("torch")]
    assert pin == f"{torch}+cpu"


def test_images_include_the_job_layers_requirements(root: Path, image: str) -> None:
    first = (root / "images" / image / "requirements.in").read_text().splitlines()[0]
    assert first == "-r ../../shared/requirements.in"


def test_the_developer_environment_is_locked_and_light(root: Path) -> None:
    packages = {entry["name"] for entry in tomllib.loads((root / "uv.lock").read_text())["package"]}
    assert not packages & {"torch", "triton", "transformers", "sentence-transformers"}
    uv = root / ".build/tools/bin/uv"
    if not uv.exists():
        pytest.skip("uv is not in .build/tools (`make env` puts it there)")
    done = subprocess.run([uv, "lock", "--check", "--offline"], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stderr}\nrun `make lock`"


def test_the_host_has_the_job_layers_requirements_of_the_images(root: Path) -> None:
    groups = tomllib.loads((root / "pyproject.toml").read_text())["dependency-groups"]
    host = {str(Requirement(line)) for line in groups["job-layer"]}
    assert {str(r) for r in required(root / "shared/requirements.in")} <= host
