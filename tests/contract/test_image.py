"""What is in an image: nothing secret, nothing of the base changed, nothing that gives a user more power."""

from __future__ import annotations

import json
import re

import docker.errors
import pytest

from contract.containers import Image

# torch and everything below it: CUDA, NCCL, cuDNN, kernels compiled against this very torch.
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


@pytest.fixture(scope="session")
def base(image: Image) -> Image:
    """The image that this one stands on, as its label says."""
    labels = image.client.images.get(image.reference).labels
    reference = labels["org.opencontainers.image.base.name"]
    below = Image(image.client, image.name, "", image._label)
    below.reference = reference
    try:
        image.client.images.get(reference)
    except docker.errors.ImageNotFound:
        pytest.fail(f"{reference}, the base of {image.reference}, is not on this machine; build or pull it")
    return below


def packages(image: Image) -> dict[str, str]:
    told = image.tell(["-c", FREEZE], entrypoint=["python"])
    return dict(line.split("==") for line in told.split())


def privileged_files(image: Image) -> set[str]:
    """Files that give who runs them another user's or group's rights."""
    found = "find / -xdev -type f -perm /6000 -print"
    return set(image.tell(["-c", found], entrypoint=["sh"]).split())


def test_what_the_base_owns_is_as_the_base_has_it(image: Image, base: Image) -> None:
    before, now = packages(base), packages(image)
    mine = {name: version for name, version in now.items() if ACCELERATOR.search(name)}
    assert "torch" in mine
    assert mine == {name: version for name, version in before.items() if ACCELERATOR.search(name)}
    assert set(before) - set(now) == set(), "packages of the base are gone"


def test_the_packages_agree_with_each_other(image: Image) -> None:
    ended = image.run(["python", "-m", "pip", "check"])
    assert ended.code == 0, ended.log


def test_no_file_gives_more_rights_than_in_the_base(image: Image, base: Image) -> None:
    assert privileged_files(image) - privileged_files(base) == set()


def test_the_build_left_no_secret(image: Image) -> None:
    found = image.client.images.get(image.reference)
    said = json.dumps([found.history(), found.attrs["Config"]])
    assert [match[0][:60] for match in SECRETS.finditer(said)] == []


def test_no_file_holds_credentials(image: Image) -> None:
    homes = ["/root", "/opt/estiba/home", "$HOME"]
    paths = " ".join(f"{home}/{name}" for home in homes for name in CREDENTIAL_FILES)
    assert image.tell(["-c", f"ls -d {paths} 2>/dev/null; true"], entrypoint=["sh"], user="0").split() == []
    config = image.tell(
        ["-c", "cat /etc/pip.conf /etc/apt/sources.list /etc/apt/sources.list.d/* 2>/dev/null; true"], entrypoint=["sh"]
    )
    assert [match[0][:60] for match in SECRETS.finditer(config)] == []


def test_the_image_starts_as_sagemaker_starts_it(image: Image) -> None:
    """Exec form, so that PID 1 is the job layer; CMD for the SDK that sends no command; root, as SageMaker needs."""
    config = image.client.images.get(image.reference).attrs["Config"]
    assert config["Entrypoint"] == ["python", "-m", "estiba.entry"]
    assert config["Cmd"] == ["train"]
    assert config.get("User") in (None, "", "root", "0")
    assert config.get("StopSignal") in (None, "SIGTERM")
    assert not config.get("Volumes"), "an anonymous volume would hide what SageMaker mounts"


def test_the_image_says_what_it_is(image: Image) -> None:
    labels = image.client.images.get(image.reference).labels
    assert labels["org.opencontainers.image.title"] == f"estiba/{image.name}"
    for name in ("version", "revision", "base.name", "description"):
        assert labels.get(f"org.opencontainers.image.{name}"), name


def test_no_tools_of_the_build_are_left(image: Image) -> None:
    """No wheels, no package caches, no bytecode that belongs to nobody: they are only weight."""
    script = "cd /root; ls -d /wheels /compiled /install.sh .cache/* /var/cache/apt/archives/*.deb 2>/dev/null; true"
    assert image.tell(["-c", script], entrypoint=["sh"]).split() == []
