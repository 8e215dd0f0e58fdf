"""Each image folder is complete, and the build graph knows it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

PACKAGE_FILES = ["config.py", "data.py", "model.py", "work.py", "__main__.py"]


def graph(root: Path, **variables: str) -> dict[str, Any]:
    """What bake would build, with the given variables and none from the environment."""
    if (
        shutil.which("docker") is None
        or subprocess.run(["docker", "buildx", "version"], capture_output=True).returncode
    ):
        pytest.skip("docker buildx is not installed here (`make engine` installs it)")
    dull = {"IMAGES", "BASE", "REGISTRY", "VERSION", "REVISION", "AWS_REGION"}
    environ = {name: value for name, value in os.environ.items() if name not in dull} | variables
    done = subprocess.run(
        ["docker", "buildx", "bake", "--print", "default", "tests"],
        cwd=root, env=environ, check=True, capture_output=True, text=True,
    )  # fmt: skip
    plan: dict[str, Any] = json.loads(done.stdout)
    return plan


def test_a_bare_bake_builds_exactly_the_image_folders(root: Path, images: list[str]) -> None:
    targets = set(graph(root)["target"])
    assert targets == {*images, *(f"{name}-test" for name in images)}, (
        'docker-bake.hcl: make the default of variable "IMAGES" the list of image folders'
    )


def test_the_bake_file_names_no_image_that_has_no_folder(root: Path, images: list[str]) -> None:
    text = (root / "docker-bake.hcl").read_text()
    (default,) = re.findall(r'variable "IMAGES" { default = "([^"]*)" }', text)
    assert sorted(default.split(",")) == images


def test_local_images_stand_on_the_stand_in_and_need_no_registry(root: Path, image: str) -> None:
    plan = graph(root, BASE="local")
    assert plan["target"][image]["contexts"]["base"] == "target:base"
    assert plan["target"][image]["tags"] == [f"estiba/{image}:local"]
    assert "amazonaws" not in json.dumps(plan)


def test_dlc_images_stand_on_awss_registry_of_the_region(root: Path, image: str) -> None:
    base = graph(root, BASE="dlc", AWS_REGION="eu-west-3")["target"][image]["contexts"]["base"]
    assert base.startswith("docker-image://763104351884.dkr.ecr.eu-west-3.amazonaws.com/")
    assert ("huggingface" in base) == (image in {"embed", "finetune"})


def test_public_images_need_no_aws_account(root: Path, image: str) -> None:
    base = graph(root, BASE="public")["target"][image]["contexts"]["base"]
    assert base.startswith("docker-image://public.ecr.aws/")


@pytest.mark.parametrize("registry", ["registry.example:5000/team", "registry.example:5000/team/"])
def test_a_registry_prefix_stands_before_every_tag(root: Path, image: str, registry: str) -> None:
    plan = graph(root, REGISTRY=registry, VERSION="1.2.3")
    assert plan["target"][image]["tags"] == [f"registry.example:5000/team/estiba/{image}:1.2.3"]


def test_a_pinned_digest_reaches_the_base(root: Path, image: str) -> None:
    digest = "sha256:" + "0" * 64
    assert graph(root, BASE="public", PUBLIC_DIGEST=digest)["target"][image]["contexts"]["base"].endswith(f"@{digest}")


@pytest.mark.parametrize("name", ["Dockerfile", "requirements.in", "requirements.txt", "README.md", "job.yaml"])
def test_an_image_folder_holds(root: Path, image: str, name: str) -> None:
    assert (root / "images" / image / name).is_file()


def test_an_images_package_reads_in_the_usual_order(root: Path, image: str) -> None:
    folder = root / "images" / image / image.replace("-", "_")
    assert [name for name in PACKAGE_FILES if not (folder / name).is_file()] == []


@pytest.mark.parametrize("heading", ["Takes", "Gives", "Run", "Stop and resume", "Measured"])
def test_an_images_page_says(root: Path, image: str, heading: str) -> None:
    page = (root / "images" / image / "README.md").read_text()
    assert re.search(rf"^## {heading}$", page, re.MULTILINE)


def test_an_image_starts_the_job_layer_as_pid_1(root: Path, image: str) -> None:
    lines = (root / "images" / image / "Dockerfile").read_text().splitlines()
    assert 'ENTRYPOINT ["python", "-m", "estiba.entry"]' in lines
    assert lines[-1] == 'CMD ["train"]'


def test_an_image_has_tests_of_its_own(root: Path, image: str) -> None:
    folder = root / "tests" / "images" / image
    assert list(folder.glob("test_*.py")) != []
    assert (folder / "requirements.in").is_file()
