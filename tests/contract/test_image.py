"""The contents of an image: no secrets, an unchanged base, no additional privileges."""

from __future__ import annotations

import json
import re
from functools import cache

import docker.errors
import pytest

from contract.containers import Image
from contract.workloads import Prepared

# torch and everything below it: CUDA, NCCL, cuDNN, kernels compiled against this build of torch.
ACCELERATOR = re.compile(r"torch|triton|nvidia|cuda|nccl|cudnn|flash.attn|transformer.engine|deepspeed", re.IGNORECASE)
SECRETS = re.compile(
    r"""\b(?:AKIA|ASIA)[A-Z0-9]{16}\b            # AWS key id
    |\bhf_[A-Za-z0-9]{30,}\b                     # model hub
    |\bgh[pousr]_[A-Za-z0-9]{30,}\b              # GitHub
    |-----BEGIN[ A-Z]*PRIVATE\ KEY-----
    |(?:secret_access_key|session_token|password|api_?key|auth_?token|hf_token)\s*[=:]\s*[^\s"'$]+
    |://[^/\s:@"']+:[^/\s:@"']+@                 # a user and password in a URL""",
    re.IGNORECASE | re.VERBOSE,
)
CREDENTIAL_FILES = (
    ".aws .netrc .pypirc .git-credentials .docker/config.json .ssh .config/pip .pip .cache/huggingface/token"
).split()
FREEZE = """
import importlib.metadata as m
for name in sorted({f"{d.name.lower().replace('_', '-')}=={d.version}" for d in m.distributions() if d.name}):
    print(name)
"""


HEAVY = {"torch", "transformers", "sentence_transformers", "sklearn", "scipy", "pandas"}
"""Imports that take seconds on a busy machine."""
ADDED_LICENCES = """
import importlib.metadata as m, json
base = set(open("/opt/estiba/base-freeze.txt").read().split())
print(json.dumps({d.name: " ".join([str(d.metadata["License-Expression"] or ""), (d.metadata["License"] or "")[:100],
    *[line for line in d.metadata.get_all("Classifier", []) if line.startswith("License")]])
    for d in m.distributions() if d.name and f"{d.name.lower()}=={d.version}" not in base}))
"""


@pytest.fixture(scope="session")
def known_bases() -> dict[str, Image]:
    """By reference: what several images share is looked at once."""
    return {}


@pytest.fixture(scope="session")
def base(image: Image, known_bases: dict[str, Image]) -> Image:
    """The base image that the label names."""
    labels = image.client.images.get(image.reference).labels
    reference = labels["org.opencontainers.image.base.name"]
    base = Image(image.client, image.name, "", image._label)
    base.reference = reference
    try:
        image.client.images.get(reference)
    except docker.errors.ImageNotFound:
        pytest.fail(f"{reference}, the base of {image.reference}, is not on this machine; build or pull it")
    return known_bases.setdefault(reference, base)


@cache
def packages(image: Image) -> dict[str, str]:
    freeze = image.output_of(["-c", FREEZE], entrypoint=["python"])
    return dict(line.split("==") for line in freeze.split())


@cache
def privileged_files(image: Image) -> set[str]:
    """Set-user-ID and set-group-ID files."""
    command = "find / -xdev -type f -perm /6000 -print"
    return set(image.output_of(["-c", command], entrypoint=["sh"]).split())


def test_packages_of_the_base_are_unchanged(image: Image, base: Image) -> None:
    before, now = packages(base), packages(image)
    mine = {name: version for name, version in now.items() if ACCELERATOR.search(name)}
    assert "torch" in mine
    assert mine == {name: version for name, version in before.items() if ACCELERATOR.search(name)}
    assert set(before) - set(now) == set(), "packages of the base are gone"


def test_the_installed_packages_are_compatible(image: Image) -> None:
    ended = image.run(["python", "-m", "pip", "check"])
    assert ended.code == 0, ended.log


def test_the_image_adds_no_set_user_id_files(image: Image, base: Image) -> None:
    assert privileged_files(image) - privileged_files(base) == set()


def test_the_command_that_stages_models_is_in_the_image(image: Image) -> None:
    assert "s3://BUCKET/PREFIX" in image.output_of(["--help"], entrypoint=["estiba-stage"])


def test_image_history_and_config_hold_no_secret(image: Image) -> None:
    built = image.client.images.get(image.reference)
    text = json.dumps([built.history(), built.attrs["Config"]])
    assert [match[0][:60] for match in SECRETS.finditer(text)] == []


def test_no_file_holds_credentials(image: Image) -> None:
    homes = ["/root", "/opt/estiba/home", "$HOME"]
    paths = " ".join(f"{home}/{name}" for home in homes for name in CREDENTIAL_FILES)
    assert image.output_of(["-c", f"ls -d {paths} 2>/dev/null; true"], entrypoint=["sh"], user="0").split() == []
    config = image.output_of(
        ["-c", "cat /etc/pip.conf /etc/apt/sources.list /etc/apt/sources.list.d/* 2>/dev/null; true"], entrypoint=["sh"]
    )
    assert [match[0][:60] for match in SECRETS.finditer(config)] == []


def test_the_image_starts_as_sagemaker_starts_it(image: Image) -> None:
    """Exec form, so that PID 1 is the job layer; a CMD for SDKs that send no command; root, which SageMaker needs."""
    config = image.client.images.get(image.reference).attrs["Config"]
    assert config["Entrypoint"] == ["python", "-m", "estiba.platform.entry"]
    assert config["Cmd"] == ["train"]
    assert config.get("User") in (None, "", "root", "0")
    assert config.get("StopSignal") in (None, "SIGTERM")
    assert not config.get("Volumes"), "an anonymous volume would hide what SageMaker mounts"


def test_idle_openmp_threads_sleep_soon_unless_it_is_set_otherwise(image: Image) -> None:
    """By default they spin so long that another job on the same cores slows this one several times."""
    show = ["bash", "-c", "echo $GOMP_SPINCOUNT"]
    assert image.output_of(show).strip() == "3000"
    assert image.output_of(show, environment={"GOMP_SPINCOUNT": "7"}).strip() == "7"


def test_help_is_printed_without_importing_torch(image: Image, prepared: Prepared) -> None:
    for command in ("", *prepared.commands):
        words = [image.name, *command.split(), "--help"]
        ended = image.run(words, environment={"PYTHONPROFILEIMPORTTIME": "1"})
        assert ended.code == 0, ended.log
        assert ended.out.startswith("usage: ")
        imported = set(re.findall(r"^import time:.*\| +([\w.]+)$", ended.err, re.MULTILINE))
        assert "argparse" in imported
        assert imported & HEAVY == set(), words


def test_no_package_that_the_image_adds_is_under_the_gpl(image: Image) -> None:
    added = json.loads(image.output_of(["-c", ADDED_LICENCES], entrypoint=["python"]))
    # The job layer needs it, so a list without it was not read.
    assert "pydantic" in added
    # AWS's command line brings it. Its wheel is in the public domain or under the BSD and PSF licences; the mode for
    # Emacs, which is under the GPL, is only in its source.
    added.pop("docutils", None)
    assert [
        name for name, text in added.items() if re.search(r"(?<!L)(?<!Lesser )\bA?GPL|(?<!Lesser )General Public", text)
    ] == []


def test_the_image_has_its_labels(image: Image) -> None:
    labels = image.client.images.get(image.reference).labels
    assert labels["org.opencontainers.image.title"] == f"estiba/{image.name}"
    for name in ("version", "revision", "base.name", "description"):
        assert labels.get(f"org.opencontainers.image.{name}"), name


def test_no_tools_of_the_build_are_left(image: Image) -> None:
    """No wheels and no package caches."""
    script = "cd /root; ls -d /wheels /compiled /install.sh .cache/* /var/cache/apt/archives/*.deb 2>/dev/null; true"
    assert image.output_of(["-c", script], entrypoint=["sh"]).split() == []
