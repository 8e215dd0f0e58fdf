"""Shared by the contract's checks: every built image, its jobs, and the runs that several checks inspect.

The folder is the registry: an image is checked because images/<name>/Dockerfile exists, and fails if it is not built.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import docker
import docker.errors
import pytest

from contract.checks import NewTree, run_job
from contract.containers import Ended, Image, Tree, client_of_session
from contract.workloads import Prepared, prepare

ROOT = Path(__file__).resolve().parents[2]
LABEL = f"estiba.contract-{os.getpid()}"
TIMEOUT_S = 600
JOB_LAYER = ("test_processes", "test_script_mode")
"""Checks of the parts that every image gets unchanged from images/common.Dockerfile."""


def image_names() -> list[str]:
    return sorted(path.parent.name for path in ROOT.glob("images/*/Dockerfile") if path.parent.name != "base")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--tag", default="local", help="check estiba/<name>:TAG")
    parser.addoption("--image", action="append", choices=image_names(), help="check this image only; may be repeated")
    parser.addoption(
        "--job-layer-on", choices=image_names(), help="check what all images have in common only if IMAGE is this one"
    )


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    images = config.getoption("--image") or image_names()
    chosen = config.getoption("--job-layer-on")
    if collection_path.stem in JOB_LAYER and chosen is not None and chosen not in images:
        return True
    return True if collection_path.stem == "test_several_hosts" and "multinode" not in images else None


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "image_name" in metafunc.fixturenames:
        names = metafunc.config.getoption("--image") or image_names()
        metafunc.parametrize("image_name", names, scope="session")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.docker)
            item.add_marker(pytest.mark.timeout(TIMEOUT_S))


@pytest.fixture(scope="session")
def client() -> Iterator[docker.DockerClient]:
    try:
        with client_of_session(LABEL) as client:
            yield client
    except docker.errors.DockerException as error:
        pytest.fail(f"no Docker engine answers ({error}); `make engine` installs or starts one")


@pytest.fixture(scope="session")
def image(client: docker.DockerClient, image_name: str, pytestconfig: pytest.Config) -> Image:
    """The built image of one folder."""
    image = Image(client, image_name, pytestconfig.getoption("--tag"), LABEL)
    try:
        client.images.get(image.reference)
    except docker.errors.ImageNotFound:
        pytest.fail(f"{image.reference} is not built; `make build/{image_name} BASE=local` builds it")
    return image


@pytest.fixture(scope="session")
def prepared(image: Image, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """The image's jobs, small enough for these checks."""
    if not (ROOT / "tests/images" / image.name / "contract.py").is_file():
        pytest.fail(f"tests/images/{image.name}/contract.py is missing; it defines a quick job of the image")
    folder = tmp_path_factory.mktemp(f"prepared-{image.name}")
    os.chmod(folder, 0o755)  # readable by any user of a container  # noqa: S103
    return prepare(image, folder)


@pytest.fixture
def new_tree(tmp_path: Path) -> NewTree:
    """new_tree(channels=…): another job's /opt/ml."""
    trees: list[Tree] = []

    def make(channels: Mapping[str, Path] | None = None) -> Tree:
        trees.append(Tree(root=tmp_path / f"tree-{len(trees)}", channels=channels or {}).make())
        return trees[-1]

    return make


@pytest.fixture
def tree(new_tree: NewTree) -> Tree:
    """A job's /opt/ml without input."""
    return new_tree()


@pytest.fixture(scope="session")
def plain(image: Image, prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """The quick job, started as one of AWS's SDKs does: no command, hyperparameters in their file."""
    return run_job(image, prepared.quick, tmp_path_factory.mktemp(f"plain-{image.name}"))
