"""Each image folder is complete and part of the build graph."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

EVERY_PACKAGE = ["config", "artifacts", "__main__"]
TRAINING_PACKAGE = ["data", "model", "task", "train"]


def graph(root: Path, **variables: str) -> dict[str, Any]:
    """The graph that bake would build with the given variables, without those of the environment."""
    if (
        shutil.which("docker") is None
        or subprocess.run(["docker", "buildx", "version"], capture_output=True).returncode
    ):
        pytest.skip("docker buildx is not installed here (`make engine` installs it)")
    bake_variables = {"IMAGES", "BASE", "REGISTRY", "VERSION", "REVISION", "AWS_REGION"}
    environ = {name: value for name, value in os.environ.items() if name not in bake_variables} | variables
    done = subprocess.run(
        ["docker", "buildx", "bake", "--print", "default", "tests"],
        cwd=root, env=environ, check=True, capture_output=True, text=True,
    )  # fmt: skip
    targets_of_bake: dict[str, Any] = json.loads(done.stdout)
    return targets_of_bake


def base_of(targets_of_bake: dict[str, Any], image: str) -> str:
    """The base of an image, which is the base of its common stage."""
    targets = targets_of_bake["target"]
    assert targets[image]["contexts"] == {"common": f"target:{image}-common"}
    base: str = targets[f"{image}-common"]["contexts"]["base"]
    return base


def default_of(root: Path, variable: str) -> list[str]:
    """The names in a list variable of the bake file."""
    text = (root / "docker-bake.hcl").read_text()
    (default,) = re.findall(rf'variable "{variable}" {{ default = "([^"]*)" }}', text)
    return default.split(",")


def test_a_bare_bake_builds_exactly_the_image_folders(root: Path, images: list[str]) -> None:
    targets = set(graph(root)["target"])
    assert targets == {name + part for name in images for part in ("", "-common", "-test")}, (
        'docker-bake.hcl: make the default of variable "IMAGES" the list of image folders'
    )


def test_the_bake_file_names_no_image_that_has_no_folder(root: Path, images: list[str]) -> None:
    assert sorted(default_of(root, "IMAGES")) == images


def test_local_images_use_the_local_base_and_need_no_registry(root: Path, image: str) -> None:
    targets_of_bake = graph(root, BASE="local")
    assert base_of(targets_of_bake, image) == "target:base"
    assert targets_of_bake["target"][image]["tags"] == [f"estiba/{image}:local"]
    assert "amazonaws" not in json.dumps(targets_of_bake)


def test_dlc_images_use_the_registry_of_the_region(root: Path, image: str) -> None:
    base = base_of(graph(root, BASE="dlc", AWS_REGION="eu-west-3"), image)
    assert base.startswith("docker-image://763104351884.dkr.ecr.eu-west-3.amazonaws.com/")
    assert ("huggingface" in base) == (image in default_of(root, "ON_HUGGINGFACE"))


def test_public_images_need_no_aws_account(root: Path, image: str) -> None:
    base = base_of(graph(root, BASE="public"), image)
    assert base.startswith("docker-image://public.ecr.aws/")


@pytest.mark.parametrize("registry", ["registry.example:5000/team", "registry.example:5000/team/"])
def test_every_tag_starts_with_the_registry_prefix(root: Path, image: str, registry: str) -> None:
    targets_of_bake = graph(root, REGISTRY=registry, VERSION="1.2.3")
    assert targets_of_bake["target"][image]["tags"] == [f"registry.example:5000/team/estiba/{image}:1.2.3"]


def test_a_pinned_digest_reaches_the_base(root: Path, image: str) -> None:
    digest = "sha256:" + "0" * 64
    assert base_of(graph(root, BASE="public", PUBLIC_DIGEST=digest), image).endswith(f"@{digest}")


@pytest.mark.parametrize("name", ["Dockerfile", "requirements.in", "requirements.txt", "README.md", "job.yaml"])
def test_an_image_folder_has_its_files(root: Path, image: str, name: str) -> None:
    assert (root / "images" / image / name).is_file()


def test_an_images_package_has_the_usual_modules(root: Path, image: str) -> None:
    """A training image has a task; any other image is a plain job, with data and a model only if it needs them."""
    folder = root / "images" / image / image.replace("-", "_")
    names = {path.stem for path in (*folder.glob("*.py"), *(path.parent for path in folder.glob("*/__init__.py")))}
    needed = EVERY_PACKAGE + (TRAINING_PACKAGE if "task" in names else ["job"])
    assert [name for name in needed if name not in names] == []


@pytest.mark.parametrize("heading", ["Takes", "Gives", "Run", "Stop and resume", "Measured"])
def test_an_images_readme_has_its_headings(root: Path, image: str, heading: str) -> None:
    page = (root / "images" / image / "README.md").read_text()
    assert re.search(rf"^## {heading}$", page, re.MULTILINE)


def test_the_projects_readme_shows_the_image(root: Path, image: str) -> None:
    assert f"| [`{image}`](images/{image}/README.md) |" in (root / "README.md").read_text()


def instructions(dockerfile: Path) -> list[str]:
    """The logical lines of a Dockerfile, without comments."""
    lines = [line for line in dockerfile.read_text().splitlines() if not line.lstrip().startswith("#")]
    return [line for line in "\n".join(lines).replace("\\\n", " ").splitlines() if line.strip()]


def test_all_images_start_the_job_layer_as_pid_1(root: Path) -> None:
    common = instructions(root / "images" / "common.Dockerfile")
    assert 'ENTRYPOINT ["python", "-m", "estiba.platform.entry"]' in common
    assert common[-1] == 'CMD ["train"]'


def test_an_images_dockerfile_holds_only_what_differs(root: Path, image: str) -> None:
    mine = instructions(root / "images" / image / "Dockerfile")
    assert mine[0] == "FROM common"
    assert any(line.startswith("LABEL org.opencontainers.image.description=") for line in mine)
    fixed = "FROM ENTRYPOINT CMD USER VOLUME STOPSIGNAL WORKDIR HEALTHCHECK".split()
    assert [line for line in mine[1:] if line.split()[0].upper() in fixed] == []


def test_a_change_of_code_or_version_reinstalls_no_wheels(root: Path) -> None:
    """Build arguments and copied code come after the installation, whose layer then stays cached."""
    words = [line.split()[0] for line in instructions(root / "images" / "common.Dockerfile")]
    assert words[:2] == ["FROM", "RUN"]
    assert "images/install.sh" in instructions(root / "images" / "common.Dockerfile")[1]


def test_an_image_has_tests_of_its_own(root: Path, image: str) -> None:
    folder = root / "tests" / "images" / image
    assert list(folder.glob("test_*.py")) != []
    assert [name for name in ("requirements.in", "contract.py") if not (folder / name).is_file()] == []
